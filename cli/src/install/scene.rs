//! What is seen of pods and what makes them, kept up to date by watches, until something is decided.
//!
//! Nothing is polled: a change in the cluster is what makes us look again. Knows which objects it holds, not what they
//! mean.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::Duration;

use futures::stream::{self, BoxStream, SelectAll};
use futures::{StreamExt, future};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{ConfigMap, Event, Pod};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep_until};

use super::diagnose::Trouble;
use crate::report::Failure;

type Shelf<K> = BTreeMap<String, K>;
type Change = Box<dyn FnOnce(&mut Scene) + Send>;

/// The objects that matter to one wait, by name.
#[derive(Default)]
pub(crate) struct Scene {
    pub(crate) deployments: Shelf<Deployment>,
    pub(crate) replica_sets: Shelf<ReplicaSet>,
    pub(crate) pods: Shelf<Pod>,
    pub(crate) events: Shelf<Event>,
    pub(crate) config_maps: Shelf<ConfigMap>,
}

/// What a look at the scene says.
pub(crate) enum Verdict<T> {
    /// What was waited for is there.
    Done(T),
    /// Something stands in the way.
    Trouble(Trouble),
    /// Not yet.
    Wait,
}

/// A kind of object that a scene holds.
pub(crate) trait Watched:
    Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static
{
    /// Where the scene keeps it.
    fn shelf(scene: &mut Scene) -> &mut Shelf<Self>;
}

macro_rules! watched {
    ($($kind:ty => $shelf:ident),*) => {
        $(impl Watched for $kind {
            fn shelf(scene: &mut Scene) -> &mut Shelf<Self> {
                &mut scene.$shelf
            }
        })*
    };
}
watched!(Deployment => deployments, ReplicaSet => replica_sets, Pod => pods, Event => events, ConfigMap => config_maps);

/// A scene and the watches that feed it.
pub(crate) struct Watching {
    scene: Scene,
    changes: SelectAll<BoxStream<'static, Result<Change, Failure>>>,
}

impl Watching {
    /// Nothing is watched yet.
    pub(crate) fn new() -> Self {
        Self {
            scene: Scene::default(),
            changes: SelectAll::new(),
        }
    }

    /// Watches what is needed: not being allowed to ends the wait.
    pub(crate) fn on<K: Watched>(mut self, api: Api<K>, config: watcher::Config) -> Self {
        self.changes.push(changes(api, config).boxed());
        self
    }

    /// Watches what only makes an explanation better: not being allowed to is no failure.
    pub(crate) fn also<K: Watched>(mut self, api: Api<K>, config: watcher::Config) -> Self {
        let allowed = changes(api, config).take_while(|change| future::ready(change.is_ok()));
        self.changes.push(allowed.boxed());
        self
    }

    /// Looks again at every change until `look` is done, or has seen the same trouble for as long as that trouble
    /// asks for. `None` when the time is over.
    ///
    /// # Errors
    /// A watch that is needed and not allowed, or the API server out of reach.
    pub(crate) async fn until<T>(
        &mut self,
        within: Duration,
        look: impl Fn(&Scene) -> Verdict<T>,
    ) -> Result<Option<Result<T, Trouble>>, Failure> {
        let end = Instant::now() + within;
        let mut pending: Option<(Trouble, Instant)> = None;
        loop {
            match look(&self.scene) {
                Verdict::Done(value) => return Ok(Some(Ok(value))),
                Verdict::Trouble(trouble) => pending = Some(believed_at(trouble, pending.take())),
                Verdict::Wait => pending = None,
            }
            let wake = pending
                .as_ref()
                .map_or(end, |(_, believed)| end.min(*believed));
            tokio::select! {
                change = self.changes.next() => match change {
                    Some(change) => change?(&mut self.scene),
                    None => sleep_until(wake).await,
                },
                () = sleep_until(wake) => {}
            }
            let now = Instant::now();
            match pending.take() {
                Some((trouble, believed)) if believed <= now => return Ok(Some(Err(trouble))),
                _ if end <= now => return Ok(None),
                still => pending = still,
            }
        }
    }

    /// What has been seen so far.
    pub(crate) fn scene(&self) -> &Scene {
        &self.scene
    }
}

/// A trouble keeps the clock of the one before if it is the same.
fn believed_at(trouble: Trouble, before: Option<(Trouble, Instant)>) -> (Trouble, Instant) {
    match before {
        Some((earlier, believed)) if earlier.is_like(&trouble) => (trouble, believed),
        _ => {
            let believed = Instant::now() + trouble.patience();
            (trouble, believed)
        }
    }
}

/// Changes of one kind. The watcher tries again after every error; only those that will not pass are handed out.
fn changes<K: Watched>(
    api: Api<K>,
    config: watcher::Config,
) -> impl futures::Stream<Item = Result<Change, Failure>> + Send {
    watcher(api, config).default_backoff().flat_map(|event| {
        stream::iter(match event {
            Ok(event) => Some(Ok(change(event))),
            Err(error) => refusal(error).map(Err),
        })
    })
}

fn refusal(error: watcher::Error) -> Option<Failure> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => {
            let lasting = matches!(status.code, 401 | 403 | 404);
            lasting.then(|| kube::Error::Api(status).into())
        }
        watcher::Error::InitialListFailed(_)
        | watcher::Error::WatchStartFailed(_)
        | watcher::Error::WatchError(_)
        | watcher::Error::WatchFailed(_)
        | watcher::Error::NoResourceVersion => None,
    }
}

fn change<K: Watched>(event: watcher::Event<K>) -> Change {
    Box::new(move |scene| {
        let shelf = K::shelf(scene);
        match event {
            watcher::Event::Init => shelf.clear(),
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                shelf.insert(object.name_any(), object);
            }
            watcher::Event::Delete(object) => {
                shelf.remove(&object.name_any());
            }
            watcher::Event::InitDone => {}
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trouble() -> Trouble {
        Trouble::Node {
            message: "x".into(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn trouble_is_believed_only_once_it_has_lasted() {
        let begun = Instant::now();

        let ended = Watching::new()
            .until(Duration::from_secs(60), |_| {
                Verdict::<()>::Trouble(trouble())
            })
            .await;

        assert_eq!(ended.unwrap().unwrap().unwrap_err(), trouble());
        assert!(begun.elapsed() >= trouble().patience());
        assert!(begun.elapsed() < Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn time_runs_out_when_nothing_happens() {
        let ended = Watching::new()
            .until(Duration::from_secs(7), |_| Verdict::<()>::Wait)
            .await;

        assert!(ended.unwrap().is_none());
    }

    #[test]
    fn another_trouble_starts_the_clock_anew() {
        let first = believed_at(trouble(), None);
        let same = believed_at(trouble(), Some(first.clone()));
        let other = believed_at(
            Trouble::Refused {
                message: "q".into(),
            },
            Some(same.clone()),
        );

        assert_eq!(first.1, same.1);
        assert_ne!(same.1, other.1);
    }
}
