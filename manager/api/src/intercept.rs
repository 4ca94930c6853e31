//! `Intercept`: one port of a workload whose matching requests go to one workstation, as the API server stores it.
//!
//! The workstation writes it with the user's own Kubernetes identity, as it does its Session; the policy of
//! [`crate::policy`] makes sure that `user` and `groups` are the writer's. An object has one port: a command for several
//! ports writes several objects. Its name is [`InterceptSpec::object_name`], a hash of workload, port and matchers, so two
//! equal intercepts have one name and the API server refuses the second with 409. The replica of the manager that holds
//! the Session makes it so and reports in the status.

#![expect(
    unreachable_pub,
    reason = "KubeSchema repeats the struct inside of a function"
)]

use std::fmt;
use std::str::FromStr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::matcher::{Matcher, MatcherError, Matchers, intercept_name};
use crate::route_table::Protocol;
use crate::session::ClientInfo;

/// What is intercepted, for whom.
#[derive(CustomResource, Clone, Debug, Deserialize, Serialize, KubeSchema, PartialEq)]
#[kube(
    group = "tp.dev",
    version = "v1alpha1",
    kind = "Intercept",
    plural = "intercepts",
    namespaced,
    status = "InterceptStatus",
    doc = "Requests to one port of a workload that go to one workstation.",
    printcolumn = r#"{"name":"Name","type":"string","jsonPath":".spec.name"}"#,
    printcolumn = r#"{"name":"User","type":"string","jsonPath":".spec.user"}"#,
    printcolumn = r#"{"name":"Kind","type":"string","jsonPath":".spec.workload.kind"}"#,
    printcolumn = r#"{"name":"Workload","type":"string","jsonPath":".spec.workload.name"}"#,
    printcolumn = r#"{"name":"Port","type":"integer","jsonPath":".spec.port"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct InterceptSpec {
    /// What its user calls it, as in `tp leave NAME`. The ports of one command share it.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// User name, as the API server sees the writer (`SelfSubjectReview`).
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = kept("user"))]
    pub user: String,
    /// Groups of that user, as the API server sees them; the order does not matter.
    #[serde(default)]
    #[schemars(length(max = 1024))]
    pub groups: Vec<String>,
    /// Name of the Session, in the same namespace and of the same user, whose workstation gets the requests. A
    /// workstation that had to make a new Session writes it here.
    #[schemars(length(min = 1, max = 253))]
    pub session: String,
    /// The workload.
    #[x_kube(validation = kept("workload"))]
    pub workload: Workload,
    /// Port that clients of the pods connect to: the number of the container's port, not that of a Service.
    #[schemars(with = "i32", range(min = 1, max = 65535))]
    #[x_kube(validation = kept("port"))]
    pub port: u16,
    /// What is carried to the port. A datagram is no request, so an intercept of a UDP port has no matchers.
    #[serde(default)]
    #[x_kube(validation = kept("protocol"))]
    pub protocol: Protocol,
    /// Service by which the user named the port, for people. Nothing is decided by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub service: Option<String>,
    /// Container whose environment the user's program gets. Nothing else is decided by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub container: Option<String>,
    /// Which requests; all must match. None at all: every connection to the port, whatever it speaks.
    #[serde(default)]
    #[schemars(length(max = 16))]
    #[x_kube(validation = kept("matchers"))]
    pub matchers: Vec<Matcher>,
    /// Whether a workstation that does not answer is an error (502) instead of the application's turn.
    #[serde(default)]
    pub strict: bool,
    /// Secret of the namespace, of type `kubernetes.io/tls`, that holds the application's certificate and key. The
    /// workstation reads it with its user's identity; with it agents end TLS and match the requests inside. Without one TLS
    /// passes unparsed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub tls_secret: Option<String>,
    /// Whether connections to the port that were open before are reset once they have been idle for a second. They would
    /// bypass the intercept until they end.
    #[serde(default)]
    pub close_idle: bool,
    /// How the agent gets into the pods.
    #[serde(default)]
    pub attach: AttachMode,
    /// The workstation, for people who list intercepts. Nothing is decided by it.
    #[serde(default)]
    pub client: ClientInfo,
}

fn kept(field: &str) -> kube::core::Rule {
    let message = format!("spec.{field} cannot change; delete the Intercept and make another");
    kube::core::Rule::new("self == oldSelf").message(message.as_str())
}

/// A workload of the Intercept's namespace.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// Its kind.
    pub kind: WorkloadKind,
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// What can be intercepted.
#[derive(
    Clone, Copy, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq, PartialOrd, Ord, Hash,
)]
pub enum WorkloadKind {
    /// `apps/v1`
    Deployment,
    /// `apps/v1`
    StatefulSet,
    /// `apps/v1`
    DaemonSet,
    /// `apps/v1`
    ReplicaSet,
    /// `v1`; one that nothing makes anew.
    Pod,
}

impl WorkloadKind {
    /// All of them, in the order in which a name is looked for.
    pub const ALL: [Self; 5] = [
        Self::Deployment,
        Self::StatefulSet,
        Self::DaemonSet,
        Self::ReplicaSet,
        Self::Pod,
    ];

    /// As Kubernetes spells the kind.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "Deployment",
            Self::StatefulSet => "StatefulSet",
            Self::DaemonSet => "DaemonSet",
            Self::ReplicaSet => "ReplicaSet",
            Self::Pod => "Pod",
        }
    }
}

/// `deployment/web`, as kubectl takes it.
impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.as_str().to_lowercase(), self.name)
    }
}

/// How an agent gets into a pod.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub enum AttachMode {
    /// As the pod allows.
    #[default]
    Auto,
    /// As an ephemeral container: nothing restarts.
    Ephemeral,
    /// As a sidecar, in pods that were made with one.
    Sidecar,
}

impl InterceptSpec {
    /// The name that the object must have.
    ///
    /// # Errors
    /// Matchers that cannot be used.
    pub fn object_name(&self) -> Result<String, MatcherError> {
        let matchers = Matchers::try_new(self.matchers.iter().cloned())?;
        let kind = self.workload.kind.as_str().to_lowercase();
        let port = match self.protocol {
            Protocol::Tcp => self.port.to_string(),
            Protocol::Udp => format!("{}/udp", self.port),
        };
        Ok(intercept_name(&kind, &self.workload.name, port, &matchers))
    }
}

/// What the manager reports about an intercept.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct InterceptStatus {
    /// The manager's pod that serves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<String>,
    /// One condition, [`READY`]. Its reason is a [`Reason`]; its message is one line of what, and a second one of what to
    /// do about it where there is something to do.
    #[serde(default)]
    pub conditions: Vec<Condition>,
    /// Running pods of the workload.
    #[serde(default)]
    #[schemars(with = "i32", range(min = 0))]
    pub desired: u32,
    /// Those whose agent has the routes.
    #[serde(default)]
    #[schemars(with = "i32", range(min = 0))]
    pub attached: u32,
    /// Connections to the port that were open when the agents came and still are, all pods together: they bypass the
    /// intercept until they end. Absent while no agent has said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 0))]
    pub open_before: Option<u32>,
    /// The pods, the first [`PODS_MAX`] by name.
    #[serde(default)]
    pub pods: Vec<PodAttachment>,
}

/// Type of the one condition: whether every running pod of the workload sends matching requests to the workstation.
pub const READY: &str = "Ready";

/// Pods that a status lists.
pub const PODS_MAX: usize = 50;

/// One pod of an intercept.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct PodAttachment {
    /// Its name.
    pub name: String,
    /// Why it is, or is not, attached: a [`Reason`].
    pub reason: String,
    /// As in the condition.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// Reasons of [`READY`]: one word for programs beside the text for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The one of `True`.
    Attached,
    /// An agent is on its way into a pod.
    Attaching,
    /// The workload has no running pod yet; the next one is attached.
    NoPods,
    /// The workstation is not connected; the application answers.
    NoWorkstation,
    /// There is no such workload.
    NoWorkload,
    /// The object's name is not the one that its spec makes.
    Name,
    /// There is no such Session, or it is somebody else's.
    Session,
    /// Its user may not create Intercepts here any more.
    Forbidden,
    /// The matchers cannot be used.
    Matchers,
    /// An older intercept of the port takes every request.
    Conflict,
    /// The namespace's PodSecurity level does not let the agent in.
    PodSecurity,
    /// Another admission policy or webhook does not let the agent in.
    Admission,
    /// Nothing is attached in this namespace.
    Namespace,
    /// The pod uses its node's network.
    HostNetwork,
    /// The pod is the kubelet's own.
    StaticPod,
    /// The pod runs on a node that is not Linux.
    OperatingSystem,
    /// The image has nothing for the node's architecture.
    Architecture,
    /// The pod has a service mesh's proxy.
    Mesh,
    /// The node cannot get the image.
    ImagePull,
    /// The agent runs and the manager cannot reach it.
    Unreachable,
    /// The agent does not stay up.
    AgentFails,
    /// The pod was made without the sidecar, or with one that does not stand before the port.
    Sidecar,
    /// The Secret of [`InterceptSpec::tls_secret`] cannot be had, or is not what the application serves with.
    TlsSecret,
    /// The API server could not be asked, or refused; it is tried again.
    ApiServer,
}

impl Reason {
    const ALL: [Self; 24] = [
        Self::Attached,
        Self::Attaching,
        Self::NoPods,
        Self::NoWorkstation,
        Self::NoWorkload,
        Self::Name,
        Self::Session,
        Self::Forbidden,
        Self::Matchers,
        Self::Conflict,
        Self::PodSecurity,
        Self::Admission,
        Self::Namespace,
        Self::HostNetwork,
        Self::StaticPod,
        Self::OperatingSystem,
        Self::Architecture,
        Self::Mesh,
        Self::ImagePull,
        Self::Unreachable,
        Self::AgentFails,
        Self::Sidecar,
        Self::TlsSecret,
        Self::ApiServer,
    ];

    /// As it stands in a condition.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Attached => "Attached",
            Self::Attaching => "Attaching",
            Self::NoPods => "NoPods",
            Self::NoWorkstation => "NoWorkstation",
            Self::NoWorkload => "NoWorkload",
            Self::Name => "Name",
            Self::Session => "Session",
            Self::Forbidden => "Forbidden",
            Self::Matchers => "Matchers",
            Self::Conflict => "Conflict",
            Self::PodSecurity => "PodSecurity",
            Self::Admission => "Admission",
            Self::Namespace => "Namespace",
            Self::HostNetwork => "HostNetwork",
            Self::StaticPod => "StaticPod",
            Self::OperatingSystem => "OperatingSystem",
            Self::Architecture => "Architecture",
            Self::Mesh => "Mesh",
            Self::ImagePull => "ImagePull",
            Self::Unreachable => "Unreachable",
            Self::AgentFails => "AgentFails",
            Self::Sidecar => "Sidecar",
            Self::TlsSecret => "TlsSecret",
            Self::ApiServer => "ApiServer",
        }
    }

    /// Whether waiting does not help: somebody has to do what the second line of the message says.
    pub fn is_lasting(self) -> bool {
        match self {
            Self::Attached
            | Self::Attaching
            | Self::NoPods
            | Self::NoWorkstation
            | Self::ApiServer => false,
            Self::NoWorkload
            | Self::Name
            | Self::Session
            | Self::Forbidden
            | Self::Matchers
            | Self::Conflict
            | Self::PodSecurity
            | Self::Admission
            | Self::Namespace
            | Self::HostNetwork
            | Self::StaticPod
            | Self::OperatingSystem
            | Self::Architecture
            | Self::Mesh
            | Self::ImagePull
            | Self::Unreachable
            | Self::AgentFails
            | Self::Sidecar
            | Self::TlsSecret => true,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The reason is one of a later release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a reason that this release knows")]
pub struct UnknownReason;

impl FromStr for Reason {
    type Err = UnknownReason;

    fn from_str(text: &str) -> Result<Self, UnknownReason> {
        let found = Self::ALL.into_iter().find(|reason| reason.as_str() == text);
        found.ok_or(UnknownReason)
    }
}

impl InterceptStatus {
    /// The condition [`READY`], once the manager has written it.
    pub fn ready(&self) -> Option<&Condition> {
        self.conditions
            .iter()
            .find(|condition| condition.type_ == READY)
    }
}

impl Intercept {
    /// Whether matching requests go to the workstation, as the manager says of the spec as it is now.
    pub fn is_ready(&self) -> bool {
        let ready = self.status.as_ref().and_then(InterceptStatus::ready);
        ready.is_some_and(|ready| {
            ready.status == "True" && ready.observed_generation == self.metadata.generation
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::CustomResourceExt;
    use serde_json::{Value, json};

    fn spec(matchers: Value) -> InterceptSpec {
        serde_json::from_value(json!({
            "name": "web",
            "user": "ada",
            "session": "tp-1",
            "workload": { "kind": "Deployment", "name": "web" },
            "port": 8080,
            "matchers": matchers,
        }))
        .unwrap()
    }

    fn schema() -> Value {
        let crd = serde_json::to_value(Intercept::crd()).unwrap();
        crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"].clone()
    }

    #[test]
    fn equal_intercepts_have_one_name_however_they_are_written() {
        let (a, b) = (
            json!([{ "header": { "name": "X-User", "exact": "ada" } }, { "method": "GET" }]),
            json!([{ "method": "GET" }, { "header": { "name": "x-user", "exact": "ada" } }]),
        );

        let name = spec(a).object_name().unwrap();

        assert_eq!(spec(b).object_name().unwrap(), name);
        assert!(name.starts_with("web-"));
        assert_ne!(spec(json!([])).object_name().unwrap(), name);
        let mut other = spec(json!([]));
        other.workload.kind = WorkloadKind::StatefulSet;
        assert_ne!(
            other.object_name().unwrap(),
            spec(json!([])).object_name().unwrap()
        );
        let bad = json!([{ "header": { "name": "host", "exact": "a" } }]);
        assert!(spec(bad).object_name().is_err());
    }

    #[test]
    fn what_an_intercept_is_cannot_change() {
        let properties = &schema()["properties"];
        for field in ["user", "workload", "port", "protocol", "matchers"] {
            let rules = &properties[field]["x-kubernetes-validations"];
            assert_eq!(rules[0]["rule"], "self == oldSelf", "{field}");
        }
        // A transition rule is skipped where a side has no value.
        assert_eq!(properties["matchers"]["default"], json!([]));
        for field in ["session", "groups", "strict"] {
            let rules = &properties[field]["x-kubernetes-validations"];
            assert!(rules.is_null(), "{field}: {rules}");
        }
    }

    #[test]
    fn the_schema_takes_one_kind_of_matcher_an_item_and_one_kind_of_text_a_matcher() {
        let item = &schema()["properties"]["matchers"]["items"];
        assert_eq!(item["oneOf"].as_array().unwrap().len(), 9);
        for named in ["header", "query", "cookie", "baggage", "tracestate", "path"] {
            let matcher = &item["properties"][named];
            let rules = matcher["x-kubernetes-validations"].as_array().unwrap();
            assert_eq!(rules.len(), 1, "{named}");
            assert_eq!(matcher["properties"]["exact"]["maxLength"], 1024);
        }
        assert_eq!(
            schema()["properties"]["port"]["maximum"].as_f64(),
            Some(65535.0)
        );
    }

    #[test]
    fn every_reason_is_read_as_it_is_written() {
        for reason in Reason::ALL {
            assert_eq!(reason.as_str().parse(), Ok(reason));
        }
        assert_eq!("Weather".parse::<Reason>(), Err(UnknownReason));
        assert!(!Reason::Attaching.is_lasting() && Reason::PodSecurity.is_lasting());
    }

    #[test]
    fn a_status_of_an_older_spec_is_not_ready() {
        let mut intercept = Intercept::new("x", spec(json!([])));
        intercept.metadata.generation = Some(2);
        let status = |generation: i64| {
            let condition = json!({
                "type": READY, "status": "True", "reason": "Attached", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": generation,
            });
            serde_json::from_value(json!({ "conditions": [condition] })).unwrap()
        };

        intercept.status = Some(status(1));
        assert!(!intercept.is_ready());
        intercept.status = Some(status(2));
        assert!(intercept.is_ready());
    }
}
