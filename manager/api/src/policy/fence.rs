//! What the manager's own account may do to pods, decided by the API server itself.
//!
//! RBAC lets it add ephemeral containers to pods, and cannot say which. This policy does: the agent of the installed
//! image and nothing else, without privileges beyond the three capabilities that it needs, without mounts or values of
//! others, and not into pods that are a node's or the cluster's own. Whoever steals the account gets no more than that.
//! That containers which are there already cannot be changed is the API server's own rule.

use k8s_openapi::api::admissionregistration::v1::ValidatingAdmissionPolicy;
use serde_json::{Value, json};

use super::{Enforced, binding, rule};
use crate::{AGENT_PREFIX, AGENT_PROGRAM, AGENT_SEED, INTERCEPT_LABEL, MANAGER_NAME};

/// Name of the policy and of its binding.
pub const FENCE: &str = "agents.tp.dev";

/// Capabilities of an agent: the packet filter, and giving its privileges up.
pub const CAPABILITIES: [&str; 3] = ["NET_ADMIN", "SETGID", "SETUID"];

/// The policy and its binding, for a manager in `namespace` whose agents run `image`.
pub fn fence(namespace: &str, image: &str) -> Enforced {
    (policy(namespace, image), binding(FENCE))
}

fn policy(namespace: &str, image: &str) -> ValidatingAdmissionPolicy {
    let account = format!("system:serviceaccount:{namespace}:{MANAGER_NAME}");
    serde_json::from_value(json!({
        "metadata": { "name": FENCE },
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": { "resourceRules": [{
                "apiGroups": [""],
                "apiVersions": ["*"],
                "operations": ["UPDATE"],
                "resources": ["pods/ephemeralcontainers"],
            }]},
            "matchConditions": [{
                "name": "manager",
                "expression": format!("request.userInfo.username == {}", text(&account)),
            }],
            "variables": [
                { "name": "before", "expression": BEFORE },
                { "name": "added", "expression": ADDED },
            ],
            "validations": validations(namespace, image),
        },
    }))
    .expect("the policy is of the right shape whatever the texts in it")
}

fn validations(namespace: &str, image: &str) -> Vec<Value> {
    let agent = format!(
        "c.name.startsWith({}) && c.image == {} && has(c.command) && c.command == [{}]",
        text(AGENT_PREFIX),
        text(image),
        text(AGENT_PROGRAM),
    );
    let own_values = format!(
        "(!has(c.env) || c.env.all(e, e.name == {} && !has(e.valueFrom))) && !has(c.envFrom) && \
         !has(c.volumeMounts) && !has(c.volumeDevices) && !has(c.targetContainerName)",
        text(AGENT_SEED),
    );
    let privileges = format!(
        "has(c.securityContext) && {UNPRIVILEGED} && has(c.securityContext.capabilities) && \
         has(c.securityContext.capabilities.drop) && 'ALL' in c.securityContext.capabilities.drop && \
         (!has(c.securityContext.capabilities.add) || c.securityContext.capabilities.add.all(a, a in {CAPABILITIES:?}))",
    );
    let opted_out = format!(
        "has(namespaceObject.metadata.labels) && {label} in namespaceObject.metadata.labels && \
         namespaceObject.metadata.labels[{label}] == 'disabled'",
        label = text(INTERCEPT_LABEL),
    );
    let all = |expression: &str| format!("variables.added.all(c, {expression})");
    vec![
        rule(
            "Forbidden",
            &all(&agent),
            "the manager adds nothing but its agents",
        ),
        rule(
            "Forbidden",
            &all(&own_values),
            "an agent mounts nothing and gets no value of others",
        ),
        rule(
            "Forbidden",
            &all(&privileges),
            "an agent has three capabilities and no other privilege",
        ),
        rule(
            "Forbidden",
            &format!(
                "!(request.namespace in ['kube-system', {}])",
                text(namespace)
            ),
            "no agent goes into pods of the cluster itself or of the manager",
        ),
        rule(
            "Forbidden",
            &format!("!({opted_out})"),
            "the namespace is labelled so that nothing is attached in it",
        ),
        rule(
            "Forbidden",
            OWN_NAMESPACES,
            "no agent goes into a pod that shares its node's network, processes or IPC",
        ),
    ]
}

/// A text as CEL writes it. JSON's escapes are CEL's too.
fn text(text: &str) -> String {
    Value::from(text).to_string()
}

const BEFORE: &str = "has(oldObject.spec.ephemeralContainers) ? \
     oldObject.spec.ephemeralContainers.map(c, c.name) : []";

const ADDED: &str = "has(object.spec.ephemeralContainers) ? \
     object.spec.ephemeralContainers.filter(c, !(c.name in variables.before)) : []";

const UNPRIVILEGED: &str = "(!has(c.securityContext.privileged) || !c.securityContext.privileged) && \
     has(c.securityContext.allowPrivilegeEscalation) && !c.securityContext.allowPrivilegeEscalation && \
     has(c.securityContext.seccompProfile) && c.securityContext.seccompProfile.type == 'RuntimeDefault' && \
     !has(c.securityContext.procMount) && !has(c.securityContext.seLinuxOptions) && \
     !has(c.securityContext.appArmorProfile) && !has(c.securityContext.windowsOptions)";

const OWN_NAMESPACES: &str = "!(has(object.spec.hostNetwork) && object.spec.hostNetwork) && \
     !(has(object.spec.hostPID) && object.spec.hostPID) && !(has(object.spec.hostIPC) && object.spec.hostIPC)";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fence_fails_closed_and_binds_the_managers_account_alone() {
        let (policy, binding) = fence("tools", "registry.example/tp:1");
        let spec = serde_json::to_value(policy.spec).unwrap();

        assert_eq!(spec["failurePolicy"], "Fail");
        assert_eq!(
            spec["matchConditions"][0]["expression"],
            r#"request.userInfo.username == "system:serviceaccount:tools:tp-manager""#
        );
        let rules = spec["validations"].to_string();
        assert!(rules.contains("registry.example/tp:1"), "{rules}");
        assert!(rules.contains("'kube-system'") && rules.contains("tools"));
        let binding = serde_json::to_value(binding.spec).unwrap();
        assert_eq!(binding["validationActions"], json!(["Deny"]));
    }

    #[test]
    fn an_image_cannot_break_out_of_its_quotes() {
        let (policy, _) = fence("tools", r#"x" || true || ""#);
        let rules = serde_json::to_string(&policy.spec.unwrap().validations).unwrap();

        assert!(rules.contains(r#"\\\" || true || \\\""#), "{rules}");
    }
}
