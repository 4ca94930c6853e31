//! Which Services a namespace has, as far as the user may list them.
//!
//! A temporary manager has no right to know, and the user's own rights are at hand here. Knows nothing of what the
//! names are for.

use std::collections::BTreeSet;
use std::pin::pin;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Service;
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Api, ResourceExt};
use tokio::sync::watch;

use super::login::Login;
use crate::kubeconfig::Cluster;
use crate::report::Failure;

/// The names; `None` while nobody could say.
pub type Known = Option<BTreeSet<String>>;

/// Pause after the API server refused to list: rights and credentials change by hand.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// Keeps `known_tx` up to date for ever. Cancel safe.
pub async fn follow(login: Login, namespace: String, known_tx: watch::Sender<Known>) {
    loop {
        let refused = match login.cluster().await {
            Ok(cluster) => follow_until_refused(&cluster, &namespace, &known_tx).await,
            Err(failure) => failure,
        };
        tracing::info!(reason = refused.one_line(), "Services are not known");
        tokio::time::sleep(REFUSED_PAUSE).await;
    }
}

async fn follow_until_refused(
    cluster: &Cluster,
    namespace: &str,
    known_tx: &watch::Sender<Known>,
) -> Failure {
    let api: Api<PartialObjectMeta<Service>> = Api::namespaced(cluster.client.clone(), namespace);
    let events = watcher::watcher(api, watcher::Config::default()).default_backoff();
    let mut events = pin!(events);
    let mut names = BTreeSet::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                if apply(&mut names, event) {
                    known_tx.send_replace(Some(names.clone()));
                }
            }
            Err(error) => match refusal(error) {
                Some(kube::Error::Api(status)) if status.code == 401 => {
                    cluster.set_refused();
                    return kube::Error::Api(status).into();
                }
                Some(error) => {
                    known_tx.send_replace(None);
                    return error.into();
                }
                None => {}
            },
        }
    }
    unreachable!("a watcher has no end")
}

/// Says whether the names are complete now, and may have changed.
fn apply(names: &mut BTreeSet<String>, event: Event<PartialObjectMeta<Service>>) -> bool {
    match event {
        Event::Init => {
            names.clear();
            false
        }
        Event::InitApply(service) => {
            names.insert(service.name_any());
            false
        }
        Event::InitDone => true,
        Event::Apply(service) => names.insert(service.name_any()),
        Event::Delete(service) => names.remove(&service.name_any()),
    }
}

/// What will not pass by itself.
pub(super) fn refusal(error: watcher::Error) -> Option<kube::Error> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => {
            matches!(status.code, 401 | 403).then_some(kube::Error::Api(status))
        }
        watcher::Error::InitialListFailed(_)
        | watcher::Error::WatchStartFailed(_)
        | watcher::Error::WatchError(_)
        | watcher::Error::WatchFailed(_)
        | watcher::Error::NoResourceVersion => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str) -> PartialObjectMeta<Service> {
        let mut service = PartialObjectMeta::default();
        service.metadata.name = Some(name.to_owned());
        service
    }

    #[test]
    fn the_names_are_told_once_they_are_complete_and_when_they_change() {
        let mut names = BTreeSet::new();
        let mut told = |event| apply(&mut names, event).then(|| names.clone());
        let set = |names: &[&str]| Some(names.iter().map(ToString::to_string).collect());

        assert_eq!(told(Event::Init), None);
        assert_eq!(told(Event::InitApply(service("a"))), None);
        assert_eq!(told(Event::InitDone), set(&["a"]));
        assert_eq!(told(Event::Apply(service("b"))), set(&["a", "b"]));
        assert_eq!(told(Event::Apply(service("b"))), None, "nothing new");
        assert_eq!(told(Event::Delete(service("a"))), set(&["b"]));
    }
}
