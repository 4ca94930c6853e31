//! Who may do what: the roles that administrators bind, and those of the manager's own account.
//!
//! Nothing here is bound to a user. A person who connects to namespace `shop` needs the Role `tp-connect` in the
//! manager's namespace and the ClusterRole `tp-user` bound in `shop`; one who intercepts has `tp-intercept` bound there.

use serde_json::{Value, json};
use tp_manager_api::{EGRESS, GROUP, INTERCEPTS, KEY_SECRET, MANAGER_NAME, OTHERS, SESSIONS};

use super::{ATTACH, Settings};

/// What someone does with their own objects. Not listing: a Session says who works from where.
const OWN: [&str; 5] = ["create", "delete", "get", "patch", "update"];
const SEE_ALL: [&str; 2] = ["list", "watch"];
/// What has pods, besides pods themselves.
const WORKLOADS: [&str; 4] = ["deployments", "statefulsets", "daemonsets", "replicasets"];

/// The ClusterRoles to bind in the namespaces that people work on.
pub(super) fn for_users() -> Vec<Value> {
    let sessions = rule(GROUP, &[SESSIONS], &OWN);
    let intercepts = rule(GROUP, &[INTERCEPTS], &OWN);
    let see_intercepts = rule(GROUP, &[INTERCEPTS], &SEE_ALL);
    let see_sessions = rule(GROUP, &[SESSIONS], &SEE_ALL);
    let egress = rule(GROUP, &[&sub(SESSIONS, EGRESS)], &["create"]);
    let others = rule(
        GROUP,
        &[&sub(SESSIONS, OTHERS), &sub(INTERCEPTS, OTHERS)],
        &["delete"],
    );
    let see = ["get", "list", "watch"];
    let workloads = rule("apps", &WORKLOADS, &see);
    let pods = rule("", &["pods", "services"], &see);
    vec![
        cluster_role("tp-user", &[&sessions]),
        cluster_role(
            "tp-intercept",
            &[&sessions, &intercepts, &see_intercepts, &workloads, &pods],
        ),
        cluster_role("tp-egress", &[&egress]),
        cluster_role(
            "tp-admin",
            &[
                &sessions,
                &see_sessions,
                &intercepts,
                &see_intercepts,
                &workloads,
                &pods,
                &egress,
                &others,
            ],
        ),
    ]
}

/// The manager's own rights, and the Role with which people reach it.
pub(super) fn for_manager(settings: &Settings) -> Vec<Value> {
    let mut objects = vec![
        cluster_role(MANAGER_NAME, &manager_rules().each_ref()),
        cluster_role_binding(settings, MANAGER_NAME),
        cluster_role(
            ATTACH,
            &[&rule("", &["pods/ephemeralcontainers"], &["patch"])],
        ),
    ];
    objects.extend(attaching(settings));
    objects.extend([
        role(settings, MANAGER_NAME, own_rules(settings)),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": settings.metadata(MANAGER_NAME),
            "roleRef": role_ref("Role", MANAGER_NAME),
            "subjects": [account(settings)],
        }),
        role(settings, "tp-connect", connect_rules()),
    ]);
    objects
}

/// Where the manager may add agents to pods: in all namespaces, or in those that were named.
fn attaching(settings: &Settings) -> Vec<Value> {
    if settings.namespaces.is_empty() {
        return vec![cluster_role_binding(settings, ATTACH)];
    }
    let named = settings.namespaces.iter().map(|namespace| {
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": { "name": ATTACH, "namespace": namespace },
            "roleRef": role_ref("ClusterRole", ATTACH),
            "subjects": [account(settings)],
        })
    });
    named.collect()
}

fn cluster_role_binding(settings: &Settings, role: &str) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": { "name": role },
        "roleRef": role_ref("ClusterRole", role),
        "subjects": [account(settings)],
    })
}

/// What the manager looks at everywhere, and what it does there. It reads no Secret. Of Sessions and Intercepts it writes
/// the status, and removes those whose workstations never came back to do so. Where it may add containers to pods,
/// [`attaching`] says, and which, the policy of `tp_manager_api::policy::fence`.
fn manager_rules() -> [Value; 8] {
    let look = ["get", "list", "watch"];
    let [ours, status, others] = [
        [SESSIONS.to_owned(), INTERCEPTS.to_owned()],
        [SESSIONS, INTERCEPTS].map(|resource| sub(resource, "status")),
        [SESSIONS, INTERCEPTS].map(|resource| sub(resource, OTHERS)),
    ];
    [
        rule("", &["services", "pods", "namespaces", "nodes"], &look),
        rule("apps", &WORKLOADS, &look),
        rule(GROUP, &ours.each_ref().map(String::as_str), &look),
        rule(
            GROUP,
            &status.each_ref().map(String::as_str),
            &["patch", "update"],
        ),
        rule(GROUP, &ours.each_ref().map(String::as_str), &["delete"]),
        rule(GROUP, &others.each_ref().map(String::as_str), &["delete"]),
        rule(
            "networking.k8s.io",
            &["servicecidrs", "networkpolicies"],
            &look,
        ),
        json!({
            "apiGroups": ["authorization.k8s.io", "authentication.k8s.io"],
            "resources": ["subjectaccessreviews", "tokenreviews"],
            "verbs": ["create"],
        }),
    ]
}

/// What the manager writes in its own namespace. RBAC cannot bind a creation to a name.
fn own_rules(settings: &Settings) -> Vec<Value> {
    let mut rules = vec![
        rule("", &["secrets", "configmaps"], &["create"]),
        only(
            KEY_SECRET,
            rule("", &["secrets"], &["get", "update", "patch"]),
        ),
        only(
            MANAGER_NAME,
            rule("", &["configmaps"], &["get", "update", "patch"]),
        ),
    ];
    if settings.ranges_by_dry_run {
        rules.push(rule("", &["services"], &["create"]));
    }
    rules
}

/// Finding the manager and forwarding a port to it. A WebSocket is a GET; newer API servers ask for `create` as well.
fn connect_rules() -> Vec<Value> {
    vec![
        only(MANAGER_NAME, rule("", &["configmaps"], &["get"])),
        rule("", &["pods/portforward"], &["create", "get"]),
    ]
}

fn sub(resource: &str, subresource: &str) -> String {
    format!("{resource}/{subresource}")
}

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> Value {
    json!({ "apiGroups": [group], "resources": resources, "verbs": verbs })
}

fn only(name: &str, mut rule: Value) -> Value {
    rule["resourceNames"] = json!([name]);
    rule
}

fn cluster_role(name: &str, rules: &[&Value]) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": { "name": name },
        "rules": rules,
    })
}

fn role(settings: &Settings, name: &str, rules: Vec<Value>) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": settings.metadata(name),
        "rules": rules,
    })
}

fn role_ref(kind: &str, name: &str) -> Value {
    json!({ "apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name })
}

fn account(settings: &Settings) -> Value {
    json!({ "kind": "ServiceAccount", "name": MANAGER_NAME, "namespace": settings.namespace })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(role: &Value, resource: &str, verb: &str) -> bool {
        let has = |rule: &Value, key: &str, wanted: &str| {
            rule[key].as_array().unwrap().contains(&json!(wanted))
        };
        let mut rules = role["rules"].as_array().unwrap().iter();
        rules.any(|rule| has(rule, "resources", resource) && has(rule, "verbs", verb))
    }

    fn users(name: &str) -> Value {
        for_users()
            .into_iter()
            .find(|role| role["metadata"]["name"] == name)
            .unwrap()
    }

    #[test]
    fn a_user_connects_but_does_not_leave_the_cluster() {
        let user = users("tp-user");

        assert!(allows(&user, "sessions", "create") && allows(&user, "sessions", "patch"));
        assert!(!allows(&user, "sessions/egress", "create"));
        assert!(!allows(&user, "sessions/others", "delete"));
        assert!(!allows(&user, "intercepts", "create"));
        assert!(!allows(&user, "sessions", "list"));
        assert!(allows(&users("tp-egress"), "sessions/egress", "create"));
        assert!(allows(&users("tp-admin"), "sessions/others", "delete"));
        assert!(allows(&users("tp-admin"), "intercepts/others", "delete"));
    }

    #[test]
    fn who_intercepts_sees_workloads_and_changes_none() {
        let user = users("tp-intercept");

        assert!(allows(&user, "intercepts", "create") && allows(&user, "sessions", "create"));
        assert!(allows(&user, "deployments", "list") && allows(&user, "pods", "get"));
        for verb in ["create", "patch", "update", "delete"] {
            assert!(!allows(&user, "deployments", verb) && !allows(&user, "pods", verb));
        }
        assert!(!allows(&user, "intercepts/others", "delete"));
    }

    #[test]
    fn the_manager_adds_ephemeral_containers_and_changes_no_pod_otherwise() {
        let manager = &for_manager(&Settings::default())[0];

        for resource in ["pods", "deployments", "replicasets", "pods/exec"] {
            for verb in ["create", "patch", "update", "delete"] {
                assert!(!allows(manager, resource, verb), "{verb} {resource}");
            }
        }
        assert!(
            !allows(manager, "intercepts", "create") && !allows(manager, "intercepts", "patch")
        );
    }

    #[test]
    fn agents_are_added_in_all_namespaces_or_in_those_that_were_named() {
        let bound = |namespaces: &[&str]| -> Vec<(String, Option<String>)> {
            let settings = Settings {
                namespaces: namespaces.iter().map(|name| (*name).to_owned()).collect(),
                ..Settings::default()
            };
            let text = |value: &Value| value.as_str().map(str::to_owned);
            let bindings = for_manager(&settings).into_iter();
            bindings
                .filter(|object| object["roleRef"]["name"] == ATTACH)
                .map(|object| {
                    let kind = text(&object["kind"]).unwrap();
                    (kind, text(&object["metadata"]["namespace"]))
                })
                .collect()
        };

        assert_eq!(bound(&[]), [("ClusterRoleBinding".to_owned(), None)]);
        let named = ["shop", "billing"];
        assert_eq!(
            bound(&named),
            named.map(|name| ("RoleBinding".to_owned(), Some(name.to_owned())))
        );
        let objects = for_manager(&Settings::default());
        let granting = objects.iter().filter(|role| {
            role["rules"].is_array() && allows(role, "pods/ephemeralcontainers", "patch")
        });
        let granting: Vec<_> = granting.map(|role| &role["metadata"]["name"]).collect();
        assert_eq!(granting, [ATTACH]);
    }

    #[test]
    fn the_manager_reads_no_secret_but_its_own() {
        for role in for_manager(&Settings::default()) {
            for rule in role["rules"].as_array().into_iter().flatten() {
                let secrets = rule["resources"]
                    .as_array()
                    .unwrap()
                    .contains(&json!("secrets"));
                let reads = rule["verbs"].as_array().unwrap().contains(&json!("get"));
                assert!(
                    !(secrets && reads) || rule["resourceNames"] == json!([KEY_SECRET]),
                    "{rule}"
                );
                assert!(
                    !rule["verbs"].as_array().unwrap().contains(&json!("*")),
                    "{rule}"
                );
            }
        }
    }

    #[test]
    fn the_manager_removes_sessions_and_makes_none() {
        let manager = &for_manager(&Settings::default())[0];

        assert!(
            allows(manager, "sessions", "delete") && allows(manager, "sessions/others", "delete")
        );
        assert!(allows(manager, "sessions/status", "patch"));
        assert!(!allows(manager, "sessions", "create") && !allows(manager, "sessions", "patch"));
    }

    #[test]
    fn services_are_created_only_where_there_is_no_other_way() {
        let may_create = |ranges_by_dry_run| {
            let settings = Settings {
                ranges_by_dry_run,
                ..Settings::default()
            };
            for_manager(&settings)
                .iter()
                .filter(|role| role["rules"].is_array())
                .any(|role| allows(role, "services", "create"))
        };

        assert!(!may_create(false));
        assert!(may_create(true));
    }
}
