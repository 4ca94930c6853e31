//! The intercepts of one connection: made as objects with the user's own identity, watched, and removed at the end.
//!
//! The objects are the truth. What is kept here besides is only where each one leads on this workstation, and that never
//! leaves it. After a new Session the objects are pointed to it; otherwise nothing is written again, whatever happens to
//! managers and carriers.

mod readiness;
mod to_pod;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use k8s_openapi::api::authentication::v1::UserInfo;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::watch_object;
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tp_manager_api::intercept::InterceptSpec;
use tp_manager_api::{ClientInfo, Intercept, Matcher, Session};
use tp_tunnel::Tunnel;

use super::inbound::{Counts, Way, Ways};
use super::login::Login;
use super::peers;
use super::secrets;
use super::services::refusal;
use super::session::{SessionLease, host_name};
use super::sightings::Sightings;
use super::status::InterceptStatus;
use super::wanted::{Wanted, WantedPort};
use crate::kubeconfig::Cluster;
use crate::report::{Failure, status_of};

/// Pause after the API server refused to let an object be watched: rights and credentials change by hand.
const REFUSED_PAUSE: Duration = Duration::from_secs(10);

/// Owner of the fields in the API server's books.
const FIELD_MANAGER: &str = "tp";

/// See the module.
#[derive(Debug)]
pub struct Intercepts {
    login: Login,
    lease: Arc<SessionLease>,
    namespace: String,
    tunnel: watch::Receiver<Option<Tunnel>>,
    /// By the name that the user gave.
    held: Mutex<BTreeMap<String, Vec<Entry>>>,
    count_tx: watch::Sender<usize>,
}

/// One object of ours.
#[derive(Debug)]
struct Entry {
    object: String,
    wanted: WantedPort,
    counts: Arc<Counts>,
    /// One for all ports of a name.
    sightings: Sightings,
    seen_rx: watch::Receiver<Seen>,
    _watch: AbortOnDropHandle<()>,
    /// Serves ports of this machine that lead to its pods.
    _to_pod: Option<AbortOnDropHandle<()>>,
}

/// The object as it was last seen.
#[derive(Clone, Debug)]
enum Seen {
    There(Box<Intercept>),
    /// Somebody deleted it; what it was.
    Gone(Box<InterceptSpec>),
}

impl Ways for Intercepts {
    fn way(&self, uid: &str) -> Option<Way> {
        let held = self.lock();
        let entry = held.values().flatten().find(|entry| {
            matches!(&*entry.seen_rx.borrow(), Seen::There(object) if object.uid().as_deref() == Some(uid))
        })?;
        Some(Way {
            to: entry.wanted.local.clone(),
            protocol: entry.wanted.protocol,
            counts: Arc::clone(&entry.counts),
            sightings: entry.sightings.clone(),
        })
    }
}

impl Intercepts {
    /// None yet. `tunnel` is the one in use.
    pub fn new(
        login: Login,
        lease: Arc<SessionLease>,
        namespace: String,
        tunnel: watch::Receiver<Option<Tunnel>>,
    ) -> Self {
        Self {
            login,
            lease,
            namespace,
            tunnel,
            held: Mutex::default(),
            count_tx: watch::Sender::new(0),
        }
    }

    /// How many there are.
    pub fn count(&self) -> watch::Receiver<usize> {
        self.count_tx.subscribe()
    }

    /// What can be said of all of them now, one entry a port.
    pub fn statuses(&self) -> Vec<InterceptStatus> {
        let held = self.lock();
        let all = held
            .iter()
            .flat_map(|(name, entries)| entries.iter().map(move |entry| (name, entry)));
        all.map(|(name, entry)| entry.status(name)).collect()
    }

    /// Makes the objects of an intercept. On failure, [`Intercepts::leave`] removes those that were made; it must not be
    /// dropped half-way.
    ///
    /// # Errors
    /// There is one of this name, somebody else has it, or the API server refused.
    pub async fn make(&self, wanted: &Wanted) -> Result<(), Failure> {
        self.reserve(&wanted.name)?;
        let made = self.make_all(wanted).await;
        if made.is_err() {
            self.leave(&wanted.name).await?;
        }
        made
    }

    async fn make_all(&self, wanted: &Wanted) -> Result<(), Failure> {
        let mut to_pod = to_pod::listen(&wanted.to_pod).await?;
        let cluster = self.login.cluster().await?;
        let user = cluster.identity().await?;
        if let Some(secret) = &wanted.tls_secret {
            let user = user.username.as_deref().unwrap_or_default();
            secrets::check(&cluster, &self.namespace, secret, user).await?;
        }
        for port in &wanted.ports {
            let spec = self.spec(wanted, port, &user)?;
            let object = self.post(&cluster, spec).await?;
            let knows_all = object.spec.tls_secret == wanted.tls_secret
                && object.spec.protocol == port.protocol;
            let to_pod = std::mem::take(&mut to_pod);
            self.keep(&wanted.name, port.clone(), object, to_pod);
            if !knows_all {
                return Err(older_release());
            }
        }
        Ok(())
    }

    /// Where the objects are.
    pub(super) async fn place(&self) -> Result<(Cluster, String), Failure> {
        Ok((self.login.cluster().await?, self.namespace.clone()))
    }

    /// Uid and Secret of each object that names one; a uid of `None` is not known yet.
    pub(super) fn tls_secrets(&self) -> Vec<(Option<String>, String)> {
        let held = self.lock();
        let seen = held.values().flatten().map(|entry| entry.seen_rx.borrow());
        let secrets = seen.filter_map(|seen| match &*seen {
            Seen::There(object) => Some((object.uid(), object.spec.tls_secret.clone()?)),
            Seen::Gone(spec) => Some((None, spec.tls_secret.clone()?)),
        });
        secrets.collect()
    }

    /// Waits until every port of an intercept is ready. Cancel safe.
    ///
    /// # Errors
    /// Something stands in the way of the agent, or the manager does not answer.
    pub async fn ready(&self, name: &str) -> Result<Vec<InterceptStatus>, Failure> {
        let entries: Vec<_> = {
            let held = self.lock();
            let entries = held.get(name).into_iter().flatten();
            entries.map(|entry| entry.seen_rx.clone()).collect()
        };
        let waiting = join_all(entries.into_iter().map(readiness::wait)).await;
        waiting.into_iter().collect::<Result<(), _>>()?;
        tracing::info!(intercept = name, "ready");
        let mut statuses = self.statuses();
        statuses.retain(|status| status.name == name);
        Ok(statuses)
    }

    /// The sightings of an intercept of this name.
    pub(super) fn sightings(&self, name: &str) -> Option<Sightings> {
        let held = self.lock();
        Some(held.get(name)?.first()?.sightings.clone())
    }

    /// Removes an intercept. Says whether there was one.
    ///
    /// # Errors
    /// The API server refused or did not answer. It leads nowhere any more all the same, and ends with the Session.
    pub async fn leave(&self, name: &str) -> Result<bool, Failure> {
        let Some(entries) = self.lock().remove(name) else {
            return Ok(false);
        };
        self.set_count();
        let removals = entries.iter().map(|entry| self.remove(entry));
        let removed: Result<Vec<()>, Failure> = join_all(removals).await.into_iter().collect();
        tracing::info!(intercept = name, "left");
        removed.map(|_| true)
    }

    /// Removes all of them. What cannot be removed now ends with the Session, and is logged.
    pub async fn leave_all(&self) {
        let names: Vec<String> = self.lock().keys().cloned().collect();
        let leaving = names.iter().map(|name| self.leave(name));
        for failure in join_all(leaving).await.into_iter().filter_map(Result::err) {
            tracing::warn!(error = failure.one_line(), "intercept not removed");
        }
    }

    /// Points the objects to the Session of the moment, and makes those anew that went with an expired one. To be called
    /// when a tunnel has come up: a Session is never replaced without one.
    pub async fn follow_session(&self) {
        let Some(session) = self.lease.status().map(|status| status.name) else {
            return;
        };
        for seen in self.of_other_sessions(&session) {
            let followed = match seen {
                Seen::There(object) => self.point(&object, &session).await,
                Seen::Gone(spec) => self.make_anew(*spec, &session).await,
            };
            if let Err(failure) = followed {
                tracing::warn!(
                    error = failure.one_line(),
                    "intercept without the new session"
                );
            }
        }
    }

    /// One that was deleted while its Session lived was meant to go.
    fn of_other_sessions(&self, session: &str) -> Vec<Seen> {
        let held = self.lock();
        let all = held.values().flatten();
        let seen = all.map(|entry| entry.seen_rx.borrow().clone());
        seen.filter(|seen| seen.spec().session != session).collect()
    }

    fn reserve(&self, name: &str) -> Result<(), Failure> {
        let mut held = self.lock();
        if held.contains_key(name) {
            return Err(Failure::new(format!("there is an intercept named {name} already"))
                .hint(format!("end it with `tp leave {name}`, or give this one another name: `tp intercept NAME -w WORKLOAD`")));
        }
        held.insert(name.to_owned(), Vec::new());
        Ok(())
    }

    fn spec(
        &self,
        wanted: &Wanted,
        port: &WantedPort,
        user: &UserInfo,
    ) -> Result<InterceptSpec, Failure> {
        let session = self.lease.status().ok_or_else(|| {
            Failure::new("there is no Session yet")
                .hint("try again once `tp status` says connected")
        })?;
        Ok(InterceptSpec {
            name: wanted.name.clone(),
            user: user.username.clone().unwrap_or_default(),
            groups: user.groups.clone().unwrap_or_default(),
            session: session.name,
            workload: wanted.workload.clone(),
            port: port.port,
            protocol: port.protocol,
            service: port.service.clone(),
            container: wanted.container.clone(),
            matchers: wanted.matchers.as_slice().to_vec(),
            strict: wanted.strict,
            tls_secret: wanted.tls_secret.clone(),
            close_idle: wanted.close_idle,
            attach: wanted.attach,
            client: ClientInfo {
                host: host_name(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
        })
    }

    /// Creates the object. One that an earlier daemon of this user left behind is taken over.
    async fn post(&self, cluster: &Cluster, spec: InterceptSpec) -> Result<Intercept, Failure> {
        let name = spec
            .object_name()
            .map_err(|error| Failure::new("these requests cannot be chosen").caused_by(&error))?;
        let api = self.api(cluster);
        let params = PostParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PostParams::default()
        };
        let object = Intercept::new(&name, spec.clone());
        let asked = async { Ok(api.create(&params, &object).await) };
        match cluster.in_time(asked).await? {
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(kube::Error::Api(status)) if status.code == 404 => return Err(unknown_kind()),
            answer => return Ok(answer?),
        }
        let holder = cluster.in_time(api.get(&name)).await?;
        if self.is_left_behind(cluster, &holder, &spec).await? {
            tracing::info!(object = name, "taken over from an earlier connection");
            return self.take_over(cluster, &holder, spec).await;
        }
        Err(held_by(&holder, &spec))
    }

    /// Whether an object is of this user and no workstation serves it: its Session is gone, or was this machine's and
    /// no daemon here has it any more.
    async fn is_left_behind(
        &self,
        cluster: &Cluster,
        holder: &Intercept,
        own: &InterceptSpec,
    ) -> Result<bool, Failure> {
        let theirs = &holder.spec;
        if theirs.user != own.user || theirs.session == own.session {
            return Ok(false);
        }
        let sessions: Api<Session> = Api::namespaced(cluster.client.clone(), &self.namespace);
        let session = cluster.in_time(sessions.get_opt(&theirs.session)).await?;
        if session.is_none() {
            return Ok(true);
        }
        if theirs.client.host != own.client.host {
            return Ok(false);
        }
        let served = peers::statuses(&peers::all()).await;
        let has = |status: &super::status::ConnectionStatus| {
            status
                .session
                .as_ref()
                .is_some_and(|session| session.name == theirs.session)
        };
        Ok(!served.iter().any(has))
    }

    /// Makes that very object ours. What it is about stays, its age too, so nothing changes for the agents but whose
    /// workstation it is.
    async fn take_over(
        &self,
        cluster: &Cluster,
        old: &Intercept,
        spec: InterceptSpec,
    ) -> Result<Intercept, Failure> {
        let patch = Patch::Merge(json!({
            "metadata": { "uid": old.uid(), "resourceVersion": old.resource_version() },
            "spec": {
                "name": spec.name,
                "session": spec.session,
                "groups": spec.groups,
                "service": spec.service,
                "container": spec.container,
                "strict": spec.strict,
                "tlsSecret": spec.tls_secret,
                "closeIdle": spec.close_idle,
                "attach": spec.attach,
                "client": spec.client,
            },
        }));
        let (api, name) = (self.api(cluster), old.name_any());
        cluster.in_time(api.patch(&name, &written(), &patch)).await
    }

    fn keep(
        &self,
        name: &str,
        wanted: WantedPort,
        object: Intercept,
        to_pod: Vec<to_pod::Forward>,
    ) {
        let object_name = object.name_any();
        let (seen_tx, seen_rx) = watch::channel(Seen::There(Box::new(object)));
        let (login, namespace) = (self.login.clone(), self.namespace.clone());
        let following = follow(login, namespace, object_name.clone(), seen_tx);
        let to_pod = (!to_pod.is_empty()).then(|| {
            let pods = to_pod::Pods {
                login: self.login.clone(),
                namespace: self.namespace.clone(),
                seen_rx: seen_rx.clone(),
                tunnel: self.tunnel.clone(),
            };
            AbortOnDropHandle::new(tokio::spawn(to_pod::serve(to_pod, pods)))
        });
        let sightings = self.sightings(name).unwrap_or_default();
        let entry = Entry {
            object: object_name,
            wanted,
            counts: Arc::default(),
            sightings,
            seen_rx,
            _watch: AbortOnDropHandle::new(tokio::spawn(following)),
            _to_pod: to_pod,
        };
        self.lock().entry(name.to_owned()).or_default().push(entry);
        self.set_count();
    }

    async fn remove(&self, entry: &Entry) -> Result<(), Failure> {
        let cluster = self.login.cluster().await?;
        let api = self.api(&cluster);
        let only_ours = DeleteParams {
            preconditions: match &*entry.seen_rx.borrow() {
                Seen::There(object) => Some(Preconditions {
                    uid: object.uid(),
                    resource_version: None,
                }),
                Seen::Gone(_) => return Ok(()),
            },
            ..DeleteParams::default()
        };
        let asked = async { Ok(api.delete(&entry.object, &only_ours).await) };
        match cluster.in_time(asked).await? {
            // Gone already, or another one by now.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            answer => Ok(answer.map(drop)?),
        }
    }

    async fn point(&self, object: &Intercept, session: &str) -> Result<(), Failure> {
        let cluster = self.login.cluster().await?;
        let user = cluster.identity().await?;
        let patch = Patch::Merge(json!({ "spec": {
            "session": session,
            "groups": user.groups.unwrap_or_default(),
        }}));
        let (api, name) = (self.api(&cluster), object.name_any());
        cluster
            .in_time(api.patch(&name, &written(), &patch))
            .await?;
        Ok(())
    }

    async fn make_anew(&self, spec: InterceptSpec, session: &str) -> Result<(), Failure> {
        let cluster = self.login.cluster().await?;
        let user = cluster.identity().await?;
        let spec = InterceptSpec {
            session: session.to_owned(),
            groups: user.groups.unwrap_or_default(),
            ..spec
        };
        self.post(&cluster, spec).await.map(drop)
    }

    fn api(&self, cluster: &Cluster) -> Api<Intercept> {
        Api::namespaced(cluster.client.clone(), &self.namespace)
    }

    fn set_count(&self) {
        let count = self.lock().values().map(Vec::len).sum();
        self.count_tx.send_replace(count);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Entry>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    fn spec(&self) -> &InterceptSpec {
        match self {
            Self::There(object) => &object.spec,
            Self::Gone(spec) => spec,
        }
    }
}

impl Entry {
    fn status(&self, name: &str) -> InterceptStatus {
        let seen = self.seen_rx.borrow();
        let known = InterceptStatus {
            name: name.to_owned(),
            object: self.object.clone(),
            workload: seen.spec().workload.to_string(),
            port: self.wanted.port,
            protocol: self.wanted.protocol,
            service: self.wanted.service.clone(),
            local: self.wanted.local.to_string(),
            matchers: seen.spec().matchers.clone(),
            tls_secret: seen.spec().tls_secret.clone(),
            flows: self.counts.flows.load(Relaxed),
            refused: self.counts.refused.load(Relaxed),
            ..InterceptStatus::default()
        };
        let Seen::There(object) = &*seen else {
            let message = format!("somebody deleted it; `tp leave {name}` and intercept again");
            return InterceptStatus {
                reason: Some("Deleted".to_owned()),
                message: Some(message),
                ..known
            };
        };
        let told = object.status.clone().unwrap_or_default();
        let ready = told.ready();
        InterceptStatus {
            id: object.uid().unwrap_or_default(),
            ready: object.is_ready(),
            reason: ready.map(|ready| ready.reason.clone()),
            message: ready
                .map(|ready| ready.message.clone())
                .filter(|text| !text.is_empty()),
            pods: told.desired,
            pods_attached: told.attached,
            open_before: told.open_before,
            ..known
        }
    }
}

fn written() -> PatchParams {
    PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    }
}

/// Keeps `seen_tx` up to date for ever. Cancel safe.
async fn follow(login: Login, namespace: String, name: String, seen_tx: watch::Sender<Seen>) {
    loop {
        if let Ok(cluster) = login.cluster().await {
            follow_until_refused(&cluster, &namespace, &name, &seen_tx).await;
        }
        tokio::time::sleep(REFUSED_PAUSE).await;
    }
}

async fn follow_until_refused(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    seen_tx: &watch::Sender<Seen>,
) {
    let api: Api<Intercept> = Api::namespaced(cluster.client.clone(), namespace);
    let mut events = std::pin::pin!(watch_object(api, name).default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(Some(object)) => {
                seen_tx.send_replace(Seen::There(Box::new(object)));
            }
            Ok(None) => seen_tx.send_modify(|seen| {
                *seen = Seen::Gone(Box::new(seen.spec().clone()));
            }),
            Err(error) => {
                tracing::debug!(%error, object = name, "not watched for a moment");
                if let Some(error) = refusal(error) {
                    if status_of(&error) == Some(401) {
                        cluster.set_refused();
                    }
                    return;
                }
            }
        }
    }
}

/// The cluster keeps nothing of a field that its release does not know.
fn older_release() -> Failure {
    Failure::new("the cluster's release knows neither `--tls-secret` nor UDP ports")
        .hint("an administrator brings it up to date with `tp upgrade`")
}

fn unknown_kind() -> Failure {
    Failure::new("the cluster does not know Intercept objects of tp.dev")
        .hint("an administrator installs them with `tp install` or `tp upgrade`")
}

fn held_by(holder: &Intercept, own: &InterceptSpec) -> Failure {
    let theirs = &holder.spec;
    let since = holder
        .creation_timestamp()
        .map(|at| format!(" since {}", at.0.strftime("%Y-%m-%d %H:%M:%SZ")))
        .unwrap_or_default();
    let who = match theirs.user == own.user {
        true => "you already intercept".to_owned(),
        false => format!("{} intercepts", theirs.user),
    };
    let what = format!("cannot intercept port {} of {}", own.port, own.workload);
    let requests = match own.matchers.as_slice() {
        [] => "everything that comes to it".to_owned(),
        matchers => {
            let shown: Vec<_> = matchers.iter().map(Matcher::to_string).collect();
            format!("the same requests ({})", shown.join(", "))
        }
    };
    let (name, host) = (&theirs.name, &theirs.client.host);
    let why = format!("{who} {requests}{since}, as {name} on {host}");
    Failure::new(what)
        .because(why)
        .hint(match theirs.user == own.user {
            true => format!(
                "`tp leave {}` there ends it; so does `kubectl delete intercepts.tp.dev {}`",
                theirs.name,
                holder.name_any()
            ),
            false => format!(
                "choose other requests, such as `--http-header auto`, or ask {} to leave",
                theirs.user
            ),
        })
}

#[cfg(test)]
mod tests;
