//! Keeps the ConfigMap by which workstations find the manager.
//!
//! Every replica writes it, each from its own watch of the ready pods; the API server's resource versions keep two of
//! them from undoing each other. A replica of an older release leaves a newer one's numbers alone.

use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tp_manager_api::locator::LOCATOR_ENTRY;
use tp_manager_api::{MANAGER_NAME, ManagerLocator, OLDEST_PROTOCOL, PROTOCOL, TUNNEL_PORT};
use tp_tunnel::KeyHash;

use crate::cluster::in_short;

/// Writes whenever the ready replicas differ from what is written. Never ends.
pub async fn keep(
    client: Client,
    namespace: &str,
    key: KeyHash,
    mut ready: watch::Receiver<Vec<String>>,
) {
    let api = Api::<ConfigMap>::namespaced(client, namespace);
    loop {
        let pods = ready.borrow_and_update().clone();
        let pause = match write(&api, locator(key, pods)).await {
            Ok(()) => LOOK_AGAIN,
            Err(kube::Error::Api(status)) if status.code == 409 => RETRY,
            Err(error) => {
                tracing::warn!(
                    error = in_short(&error),
                    "cannot write where the manager is"
                );
                RETRY
            }
        };
        let changed = async {
            if ready.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let _ = tokio::time::timeout(pause, changed).await;
    }
}

/// Somebody may have edited or deleted it.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// After a failure, and after losing a race to another replica.
const RETRY: Duration = Duration::from_secs(1);

fn locator(key: KeyHash, pods: Vec<String>) -> ManagerLocator {
    ManagerLocator {
        protocol: PROTOCOL,
        oldest_protocol: OLDEST_PROTOCOL,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        key_hash: key.to_string(),
        port: TUNNEL_PORT,
        pods,
    }
}

async fn write(api: &Api<ConfigMap>, mine: ManagerLocator) -> kube::Result<()> {
    let written = api.get_opt(MANAGER_NAME).await?;
    let params = PostParams::default();
    match written {
        None => drop(api.create(&params, &config_map(None, &mine)).await?),
        Some(map) => {
            if let Some(next) = successor(read(&map), mine) {
                let map = config_map(Some(map), &next);
                api.replace(MANAGER_NAME, &params, &map).await?;
            }
        }
    }
    Ok(())
}

fn read(map: &ConfigMap) -> Option<ManagerLocator> {
    serde_json::from_str(map.data.as_ref()?.get(LOCATOR_ENTRY)?).ok()
}

/// What to write over `written`; nothing when it says all that `mine` says.
fn successor(written: Option<ManagerLocator>, mine: ManagerLocator) -> Option<ManagerLocator> {
    let Some(written) = written else {
        return Some(mine);
    };
    let newer_wrote =
        (written.protocol, release(&written.version)) > (mine.protocol, release(&mine.version));
    let next = match newer_wrote {
        true => ManagerLocator {
            pods: mine.pods,
            key_hash: mine.key_hash,
            ..written.clone()
        },
        false => mine,
    };
    (next != written).then_some(next)
}

/// Numbers of a release, comparable; what is no number counts as nothing.
fn release(version: &str) -> Vec<u64> {
    version
        .split(['.', '-', '+'])
        .map(|part| part.parse().unwrap_or(0))
        .collect()
}

/// Keeps labels and the resource version of what is replaced, so that a race is refused.
fn config_map(replaced: Option<ConfigMap>, locator: &ManagerLocator) -> ConfigMap {
    let mut map = replaced.unwrap_or_else(|| ConfigMap {
        metadata: ObjectMeta {
            name: Some(MANAGER_NAME.to_owned()),
            ..ObjectMeta::default()
        },
        ..ConfigMap::default()
    });
    map.metadata.managed_fields = None;
    let text = serde_json::to_string(locator).expect("a locator is always JSON");
    map.data
        .get_or_insert_default()
        .insert(LOCATOR_ENTRY.to_owned(), text);
    map
}

#[cfg(test)]
mod tests {
    use tp_tunnel::Identity;

    use super::*;

    fn mine(pods: &[&str]) -> ManagerLocator {
        let mut locator = locator(
            Identity::generate().key_hash(),
            pods.iter().map(ToString::to_string).collect(),
        );
        locator.key_hash = "sha256:same".into();
        locator
    }

    #[test]
    fn nothing_is_written_when_nothing_differs() {
        assert_eq!(successor(Some(mine(&["a"])), mine(&["a"])), None);
        assert_eq!(
            successor(Some(mine(&["a"])), mine(&["a", "b"]))
                .unwrap()
                .pods,
            ["a", "b"]
        );
        assert!(successor(None, mine(&[])).is_some());
    }

    #[test]
    fn an_older_replica_changes_the_pods_of_a_newer_one_and_nothing_else() {
        let newer = ManagerLocator {
            version: "99.10.0".into(),
            ..mine(&["new"])
        };

        let next = successor(Some(newer.clone()), mine(&["new", "old"])).unwrap();

        assert_eq!(next.version, "99.10.0");
        assert_eq!(next.pods, ["new", "old"]);
        assert_eq!(successor(Some(newer), mine(&["new"])), None);
    }

    #[test]
    fn what_was_written_reads_back_and_the_rest_of_the_map_stays() {
        let mut map = config_map(None, &mine(&["a"]));
        map.metadata.resource_version = Some("7".into());
        map.data
            .as_mut()
            .unwrap()
            .insert("other".into(), "kept".into());

        let map = config_map(Some(map), &mine(&["b"]));

        assert_eq!(read(&map).unwrap().pods, ["b"]);
        assert_eq!(map.metadata.resource_version.as_deref(), Some("7"));
        assert_eq!(map.data.unwrap()["other"], "kept");
    }
}
