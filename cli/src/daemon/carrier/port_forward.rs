//! Through the API server to a pod of the manager: one WebSocket that carries one forwarded port.
//!
//! The pods and their key come from a ConfigMap that only the manager writes, so they are as trustworthy as the API
//! server is. It is read anew for each attempt, since replicas come and go.

use futures::FutureExt;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::Api;
use tp_manager_api::locator::{LOCATOR_ENTRY, Skew};
use tp_manager_api::{MANAGER_NAME, ManagerLocator, OLDEST_PROTOCOL, PROTOCOL};
use tp_tunnel::carrier::port_forward::{PortForwardStream, Subprotocol};
use tp_tunnel::{BoxedStream, KeyHash};

use super::super::login::Login;
use super::super::status::CarrierKind;
use super::super::unmet::Unmet;
use super::{CarrierDialer, Place};
use crate::kubeconfig::{Cluster, websocket};
use crate::report::Failure;

/// Reads where the installed manager is.
#[derive(Clone, Debug)]
pub struct Finder {
    /// Access to the cluster to look into.
    pub login: Login,
    /// The namespace the manager is installed into.
    pub namespace: String,
}

impl Finder {
    /// The manager's locator and its key hash.
    ///
    /// # Errors
    /// No manager, no right to read of it, or one that this release cannot speak with.
    pub async fn locate(&self) -> Result<(ManagerLocator, KeyHash), Unmet> {
        let cluster = self.login.cluster().await.map_err(Unmet::passing)?;
        let api: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), &self.namespace);
        let map = cluster.in_time(api.get_opt(MANAGER_NAME)).await;
        let Some(map) = map.map_err(Unmet::passing)? else {
            return Err(Unmet::passing(self.missing(&cluster)));
        };
        let text = map
            .data
            .as_ref()
            .and_then(|data| data.get(LOCATOR_ENTRY))
            .map_or("", String::as_str);
        let locator: ManagerLocator =
            serde_json::from_str(text).map_err(|error| self.unreadable(&error))?;
        let key = locator
            .key_hash
            .parse()
            .map_err(|error| self.unreadable(&error))?;
        check_skew(&locator)?;
        Ok((locator, key))
    }

    fn missing(&self, cluster: &Cluster) -> Failure {
        let cluster = match cluster.context.as_str() {
            "" => &cluster.server,
            context => context,
        };
        Failure::new(format!("there is no manager in namespace {} of {cluster}", self.namespace)).hint(
            "an administrator installs it once with `tp install`; `tp connect --temporary` runs one for this connection only",
        )
    }

    fn unreadable(&self, error: &dyn std::error::Error) -> Unmet {
        let what = format!(
            "ConfigMap {MANAGER_NAME} in namespace {} does not describe a manager",
            self.namespace
        );
        Unmet::passing(
            Failure::new(what)
                .caused_by(error)
                .hint("`tp upgrade` writes it anew"),
        )
    }
}

/// One line that says which side to upgrade.
fn check_skew(locator: &ManagerLocator) -> Result<(), Unmet> {
    let ours = env!("CARGO_PKG_VERSION");
    let ManagerLocator {
        protocol,
        oldest_protocol,
        version,
        ..
    } = locator;
    let failure = match locator.skew(OLDEST_PROTOCOL, PROTOCOL) {
        Skew::None => return Ok(()),
        Skew::WorkstationTooOld => Failure::new(format!(
            "this tp {ours} (protocol {PROTOCOL}) is too old for the manager {version} (protocol {oldest_protocol} and later)"
        ))
        .hint("upgrade tp on this workstation"),
        Skew::ManagerTooOld => Failure::new(format!(
            "the manager {version} (protocol {protocol}) is too old for this tp {ours} (protocol {OLDEST_PROTOCOL} and later)"
        ))
        .hint("an administrator upgrades the manager with `tp upgrade`"),
    };
    Err(Unmet::lasting(failure))
}

/// A DNS subdomain (RFC 1123), which every pod's name is. It becomes part of a path that is asked for with the user's
/// rights.
fn is_object_name(name: &str) -> bool {
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.');
    (1..=253).contains(&name.len())
        && name.bytes().all(allowed)
        && !name.starts_with(['-', '.'])
        && !name.contains("..")
}

/// See the module.
pub struct PortForward {
    login: Login,
    namespace: String,
    target: Target,
}

enum Target {
    Installed(Finder),
    Pod(Place),
}

impl PortForward {
    /// To any ready pod of the installed manager.
    pub fn installed(finder: Finder) -> Self {
        Self {
            login: finder.login.clone(),
            namespace: finder.namespace.clone(),
            target: Target::Installed(finder),
        }
    }

    /// To one pod, and no other.
    pub fn to_pod(login: Login, namespace: String, place: Place) -> Self {
        let target = Target::Pod(place);
        Self {
            login,
            namespace,
            target,
        }
    }

    async fn open(&self, place: &Place) -> Result<BoxedStream, Unmet> {
        let cluster = self.login.cluster().await.map_err(Unmet::passing)?;
        let pod = (self.namespace.as_str(), place.name.as_str());
        let asked = websocket::port_forward(&cluster.client, pod, place.port, &Subprotocol::ALL);
        let answer = cluster.in_time(asked).await;
        let (socket, chosen) = answer.map_err(|failure| self.not_forwarded(place, failure))?;
        tracing::debug!(
            pod = place.name,
            subprotocol = chosen.name(),
            "port-forward open"
        );
        let stream = PortForwardStream::open(socket, chosen, place.port).await;
        let stream = stream.map_err(|error| {
            let failure = Failure::new(error.to_string());
            self.not_forwarded(place, failure)
        })?;
        Ok(Box::new(stream))
    }

    fn not_forwarded(&self, place: &Place, failure: Failure) -> Unmet {
        let text = failure.to_string();
        if text.contains("Sec-WebSocket-Protocol") {
            let [best, other] = Subprotocol::ALL.map(Subprotocol::name);
            let what = format!(
                "the API server forwards ports neither by {best} nor by {other}, or a proxy before it strips that"
            );
            return Unmet::lasting(
                failure
                    .within(what)
                    .hint_or("reach the manager past it with `--via`"),
            );
        }
        Unmet::passing(failure.within(format!(
            "cannot forward a port to pod {} in namespace {}",
            place.name, self.namespace
        )))
    }
}

impl CarrierDialer for PortForward {
    fn kind(&self) -> CarrierKind {
        CarrierKind::PortForward
    }

    fn places(&self) -> BoxFuture<'_, Result<Vec<Place>, Unmet>> {
        async {
            let finder = match &self.target {
                Target::Pod(place) => return Ok(vec![place.clone()]),
                Target::Installed(finder) => finder,
            };
            let (locator, key) = finder.locate().await?;
            if locator.pods.is_empty() {
                let namespace = &self.namespace;
                let failure = Failure::new(format!(
                    "no replica of the manager in namespace {namespace} is ready"
                ));
                return Err(Unmet::passing(
                    failure.hint(format!("`kubectl -n {namespace} get pods` shows why")),
                ));
            }
            if let Some(name) = locator.pods.iter().find(|name| !is_object_name(name)) {
                let failure = Failure::new(format!("{name:?} is not the name of a pod"));
                return Err(Unmet::passing(failure.within(format!(
                    "ConfigMap {MANAGER_NAME} in namespace {} does not describe a manager",
                    self.namespace
                ))));
            }
            let port = locator.port;
            Ok(locator
                .pods
                .into_iter()
                .map(|name| Place { name, port, key })
                .collect())
        }
        .boxed()
    }

    fn dial<'a>(&'a self, place: &'a Place) -> BoxFuture<'a, Result<BoxedStream, Unmet>> {
        self.open(place).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_objects_become_part_of_a_path() {
        for name in ["tp-manager-9bb567545-hk8x4", "a", "a.b-1"] {
            assert!(is_object_name(name), "{name}");
        }
        for name in [
            "",
            "../../secrets",
            "..",
            "a b",
            "a?x",
            "A",
            "a/b",
            "a%2f",
            "a\n",
        ] {
            assert!(!is_object_name(name), "{name}");
        }
    }

    fn locator(oldest_protocol: u32, protocol: u32) -> ManagerLocator {
        ManagerLocator {
            protocol,
            oldest_protocol,
            version: "9.9.9".into(),
            key_hash: String::new(),
            port: 8443,
            pods: Vec::new(),
        }
    }

    #[test]
    fn skew_says_in_one_line_which_side_to_upgrade() {
        let newer = check_skew(&locator(PROTOCOL + 1, PROTOCOL + 2))
            .unwrap_err()
            .failure;
        let older = check_skew(&locator(0, OLDEST_PROTOCOL - 1))
            .unwrap_err()
            .failure;

        assert!(
            newer.what.contains("this tp") && newer.what.contains("too old"),
            "{newer}"
        );
        assert!(newer.hint.unwrap().contains("this workstation"));
        assert!(older.what.starts_with("the manager 9.9.9"), "{older}");
        assert!(older.hint.unwrap().contains("tp upgrade"));
        assert!(check_skew(&locator(OLDEST_PROTOCOL, PROTOCOL)).is_ok());
    }
}
