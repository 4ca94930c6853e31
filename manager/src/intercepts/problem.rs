//! What stands in the way of an attachment, and what to do about it: one line each.

use std::collections::BTreeMap;

use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::core::{Selector, SelectorExt};
use tp_manager_api::intercept::Reason;
use tp_manager_api::policy::fence::FENCE;
use tp_manager_api::{AGENT_PORT, INTERCEPT_LABEL};

/// Why something is not attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    /// For programs.
    pub(super) reason: Reason,
    /// What.
    pub(super) what: String,
    /// What to do about it, where there is something to do.
    pub(super) cure: Option<String>,
}

impl Problem {
    /// Something to wait for.
    pub(super) fn passing(reason: Reason, what: impl Into<String>) -> Self {
        Self {
            reason,
            what: what.into(),
            cure: None,
        }
    }

    /// Something that a person has to do something about.
    pub(super) fn lasting(
        reason: Reason,
        what: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self {
            reason,
            what: what.into(),
            cure: Some(cure.into()),
        }
    }

    /// As a condition holds it: what, and on a second line what to do.
    pub(super) fn message(&self) -> String {
        match &self.cure {
            Some(cure) => format!("{}\n{cure}", self.what),
            None => self.what.clone(),
        }
    }

    /// An agent was not let into a pod of `namespace`. `None` when the pod is gone: that is nobody's problem.
    pub(super) fn not_let_in(namespace: &str, error: &kube::Error) -> Option<Self> {
        let kube::Error::Api(status) = error else {
            let what = format!(
                "the API server cannot be asked: {}",
                crate::cluster::in_short(error)
            );
            return Some(Self::passing(Reason::ApiServer, what));
        };
        let message = one_line(&status.message);
        let refused = |reason, what: String, cure: String| Some(Self::lasting(reason, what, cure));
        match status.code {
            404 => None,
            400 | 403 | 422 if message.contains("violates PodSecurity") => refused(
                Reason::PodSecurity,
                format!(
                    "the PodSecurity level of namespace {namespace} refuses the agent: {}",
                    after(&message, "violates PodSecurity ")
                ),
                "attach as a sidecar, which every level lets in and which makes the pods anew: `--attach sidecar --restart-pods`"
                    .to_owned(),
            ),
            403 | 422 if message.contains(FENCE) && message.contains("labelled") => refused(
                Reason::Namespace,
                format!("namespace {namespace} does not take part"),
                format!("an administrator removes its label {INTERCEPT_LABEL}"),
            ),
            403 if message.contains("pods/ephemeralcontainers")
                && message.contains("cannot patch") =>
            {
                refused(
                    Reason::Admission,
                    format!(
                        "the manager may not add ephemeral containers to pods of namespace {namespace}"
                    ),
                    format!(
                        "an administrator gives it that right: `tp upgrade`, or, where it was installed for some namespaces only, \
                         `tp upgrade --namespaces …,{namespace}`"
                    ),
                )
            }
            400 | 403 | 422 => refused(
                Reason::Admission,
                format!("the API server refuses the agent: {message}"),
                "the policy or webhook that it names has to let the manager's agent in".to_owned(),
            ),
            _ => Some(Self::passing(
                Reason::ApiServer,
                format!("the API server answered: {message}"),
            )),
        }
    }

    /// The agent of a pod runs and does not answer.
    pub(super) fn unreachable(manager_namespace: &str, policies: &[String]) -> Self {
        let what = format!("the manager cannot reach port {AGENT_PORT} of the pod");
        let cure = match policies {
            [] => format!(
                "something between the nodes drops it; let TCP port {AGENT_PORT} pass from namespace {manager_namespace}"
            ),
            policies => format!(
                "allow TCP port {AGENT_PORT} from namespace {manager_namespace} in a NetworkPolicy; {} select{} the pod",
                policies.join(", "),
                if policies.len() == 1 { "s" } else { "" },
            ),
        };
        Self::lasting(Reason::Unreachable, what, cure)
    }
}

/// NetworkPolicies that select a pod with these labels and restrict what comes in, by name.
pub(super) fn restricting(
    policies: impl IntoIterator<Item = NetworkPolicy>,
    labels: &BTreeMap<String, String>,
) -> Vec<String> {
    let mut names: Vec<String> = policies
        .into_iter()
        .filter_map(|policy| {
            let spec = policy.spec?;
            let types = spec.policy_types.unwrap_or_default();
            let restricts = types.is_empty() || types.iter().any(|kind| kind == "Ingress");
            let selector = Selector::try_from(spec.pod_selector.unwrap_or_default()).ok()?;
            let name = policy.metadata.name?;
            (restricts && selector.matches(labels)).then_some(name)
        })
        .collect();
    names.sort();
    names
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn after<'a>(text: &'a str, mark: &str) -> &'a str {
    text.find(mark).map_or(text, |at| &text[at + mark.len()..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;
    use serde_json::json;

    fn refusal(code: u16, message: &str) -> Option<Problem> {
        let status = Status::failure(message, "Forbidden").with_code(code);
        Problem::not_let_in("shop", &kube::Error::Api(Box::new(status)))
    }

    #[test]
    fn every_refusal_of_the_api_server_has_a_name_and_a_cure() {
        let security = r#"pods "web" is forbidden: violates PodSecurity "baseline:latest": non-default capabilities (container "tp-agent-0-1-0-1" must not include "NET_ADMIN" in securityContext.capabilities.add)"#;
        let fence = r#"pods "web" is forbidden: ValidatingAdmissionPolicy 'agents.tp.dev' with binding 'agents.tp.dev' denied request: the namespace is labelled so that nothing is attached in it"#;
        let right = r#"pods "web" is forbidden: User "system:serviceaccount:tp-system:tp-manager" cannot patch resource "pods/ephemeralcontainers" in API group "" in the namespace "shop""#;
        let webhook = r#"admission webhook "images.example" denied the request: untrusted image"#;
        for (code, message, reason, word) in [
            (403, security, Reason::PodSecurity, "--attach sidecar"),
            (403, fence, Reason::Namespace, "tp.dev/intercept"),
            (403, right, Reason::Admission, "tp upgrade"),
            (403, webhook, Reason::Admission, "webhook"),
        ] {
            let problem = refusal(code, message).unwrap();
            assert_eq!(problem.reason, reason, "{message}");
            assert!(problem.cure.as_ref().unwrap().contains(word), "{problem:?}");
            assert_eq!(problem.message().lines().count(), 2, "{problem:?}");
        }
        assert!(refusal(403, security).unwrap().what.contains("baseline"));
        assert_eq!(refusal(404, "pods \"web\" not found"), None);
        let busy = refusal(500, "etcd is\naway").unwrap();
        assert_eq!((busy.reason, busy.cure), (Reason::ApiServer, None));
        assert!(busy.what.ends_with("etcd is away"));
    }

    #[test]
    fn only_policies_that_restrict_what_comes_to_the_pod_are_named() {
        let policy = |name: &str, spec: serde_json::Value| -> NetworkPolicy {
            serde_json::from_value(json!({ "metadata": { "name": name }, "spec": spec })).unwrap()
        };
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        let policies = [
            policy(
                "egress",
                json!({ "podSelector": {}, "policyTypes": ["Egress"] }),
            ),
            policy("deny", json!({ "podSelector": {} })),
            policy(
                "db",
                json!({ "podSelector": { "matchLabels": { "app": "db" } } }),
            ),
            policy(
                "app",
                json!({ "podSelector": { "matchExpressions": [{ "key": "app", "operator": "In", "values": ["web"] }] },
                        "policyTypes": ["Ingress", "Egress"] }),
            ),
        ];

        let names = restricting(policies, &labels);

        assert_eq!(names, ["app", "deny"]);
        let problem = Problem::unreachable("tp-system", &names);
        assert!(problem.cure.unwrap().contains("app, deny select the pod"));
    }
}
