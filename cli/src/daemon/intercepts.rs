//! The intercepts of one connection: made as objects with the user's own identity, watched, and removed at the end.
//!
//! The objects are the truth. What is kept here besides is only where each one leads on this workstation, and that never
//! leaves it. After a new Session the objects are pointed to it; otherwise nothing is written again, whatever happens to
//! managers and carriers.

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
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tp_manager_api::intercept::{AttachMode, InterceptSpec, Reason, Workload};
use tp_manager_api::{ClientInfo, Intercept, Matcher, Matchers, Session};

use super::inbound::{Counts, LocalAddress, Way, Ways};
use super::login::Login;
use super::peers;
use super::services::refusal;
use super::session::{SessionLease, host_name};
use super::status::InterceptStatus;
use crate::kubeconfig::Cluster;
use crate::report::{Failure, status_of};

/// How long an intercept may take to be ready while nothing is known to be wrong.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// How long the manager may take to say anything of a new intercept.
const HEARD_WITHIN: Duration = Duration::from_secs(5);

/// Pause after the API server refused to let an object be watched: rights and credentials change by hand.
const REFUSED_PAUSE: Duration = Duration::from_secs(10);

/// Owner of the fields in the API server's books.
const FIELD_MANAGER: &str = "tp";

/// What a command asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Wanted {
    /// What its user calls it.
    pub name: String,
    /// The workload.
    pub workload: Workload,
    /// Its ports, each with its way.
    pub ports: Vec<WantedPort>,
    /// Container whose environment the user's program gets.
    pub container: Option<String>,
    /// Which requests.
    pub matchers: Matchers,
    /// Whether a workstation that does not answer is an error.
    pub strict: bool,
    /// Whether idle connections from before are reset.
    pub close_idle: bool,
    /// How the agent gets into the pods.
    pub attach: AttachMode,
    /// Whether the intercept ends with the command that asked for it.
    pub held: bool,
}

/// One port of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedPort {
    /// The container's port.
    pub port: u16,
    /// Service by which it is reached.
    pub service: Option<String>,
    /// Where it leads.
    pub local: LocalAddress,
}

/// See the module.
#[derive(Debug)]
pub struct Intercepts {
    login: Login,
    lease: Arc<SessionLease>,
    namespace: String,
    /// By the name that the user gave.
    held: Mutex<BTreeMap<String, Vec<Entry>>>,
    count_tx: watch::Sender<usize>,
}

/// One object of ours.
#[derive(Debug)]
struct Entry {
    object: String,
    /// As it was made. The object's own may name another Session by now.
    spec: InterceptSpec,
    wanted: WantedPort,
    counts: Arc<Counts>,
    seen_rx: watch::Receiver<Seen>,
    _watch: AbortOnDropHandle<()>,
}

/// The object as it was last seen.
#[derive(Clone, Debug)]
enum Seen {
    There(Box<Intercept>),
    /// Somebody deleted it.
    Gone,
}

impl Ways for Intercepts {
    fn way(&self, uid: &str) -> Option<Way> {
        let held = self.lock();
        let entry = held.values().flatten().find(|entry| {
            matches!(&*entry.seen_rx.borrow(), Seen::There(object) if object.uid().as_deref() == Some(uid))
        })?;
        Some(Way {
            to: entry.wanted.local.clone(),
            counts: Arc::clone(&entry.counts),
        })
    }
}

impl Intercepts {
    /// None yet.
    pub fn new(login: Login, lease: Arc<SessionLease>, namespace: String) -> Self {
        Self {
            login,
            lease,
            namespace,
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
        let cluster = self.login.cluster().await?;
        let user = cluster.identity().await?;
        for port in &wanted.ports {
            let spec = self.spec(wanted, port, &user)?;
            let object = self.post(&cluster, spec).await?;
            self.keep(&wanted.name, port.clone(), object);
        }
        Ok(())
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
        let waiting = join_all(entries.into_iter().map(ready)).await;
        waiting.into_iter().collect::<Result<(), _>>()?;
        tracing::info!(intercept = name, "ready");
        let mut statuses = self.statuses();
        statuses.retain(|status| status.name == name);
        Ok(statuses)
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
        for (spec, seen) in self.of_other_sessions(&session) {
            let followed = match seen {
                Seen::There(object) => self.point(&object, &session).await,
                Seen::Gone => self.make_anew(spec, &session).await,
            };
            if let Err(failure) = followed {
                tracing::warn!(
                    error = failure.one_line(),
                    "intercept without the new session"
                );
            }
        }
    }

    fn of_other_sessions(&self, session: &str) -> Vec<(InterceptSpec, Seen)> {
        let held = self.lock();
        let all = held.values().flatten();
        let seen = all.map(|entry| (entry.spec.clone(), entry.seen_rx.borrow().clone()));
        seen.filter(|(spec, seen)| match seen {
            Seen::There(object) => object.spec.session != session,
            // Deleted while its Session lived, it was meant to go.
            Seen::Gone => spec.session != session,
        })
        .collect()
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
            service: port.service.clone(),
            container: wanted.container.clone(),
            matchers: wanted.matchers.as_slice().to_vec(),
            strict: wanted.strict,
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
                "attach": spec.attach,
                "client": spec.client,
            },
        }));
        let (api, name) = (self.api(cluster), old.name_any());
        cluster.in_time(api.patch(&name, &written(), &patch)).await
    }

    fn keep(&self, name: &str, wanted: WantedPort, object: Intercept) {
        let (object_name, spec) = (object.name_any(), object.spec.clone());
        let (seen_tx, seen_rx) = watch::channel(Seen::There(Box::new(object)));
        let (login, namespace) = (self.login.clone(), self.namespace.clone());
        let following = follow(login, namespace, object_name.clone(), seen_tx);
        let entry = Entry {
            object: object_name,
            spec,
            wanted,
            counts: Arc::default(),
            seen_rx,
            _watch: AbortOnDropHandle::new(tokio::spawn(following)),
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
                Seen::Gone => return Ok(()),
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

impl Entry {
    fn status(&self, name: &str) -> InterceptStatus {
        let Seen::There(object) = self.seen_rx.borrow().clone() else {
            return InterceptStatus {
                name: name.to_owned(),
                object: self.object.clone(),
                service: self.wanted.service.clone(),
                port: self.wanted.port,
                local: self.wanted.local.to_string(),
                reason: Some("Deleted".to_owned()),
                message: Some(format!(
                    "somebody deleted it; `tp leave {name}` and intercept again"
                )),
                ..InterceptStatus::default()
            };
        };
        let told = object.status.clone().unwrap_or_default();
        let ready = told.ready();
        InterceptStatus {
            name: name.to_owned(),
            id: object.uid().unwrap_or_default(),
            object: self.object.clone(),
            workload: object.spec.workload.to_string(),
            port: self.wanted.port,
            service: self.wanted.service.clone(),
            local: self.wanted.local.to_string(),
            matchers: object.spec.matchers.clone(),
            ready: object.is_ready(),
            reason: ready.map(|ready| ready.reason.clone()),
            message: ready
                .map(|ready| ready.message.clone())
                .filter(|text| !text.is_empty()),
            pods: told.desired,
            pods_attached: told.attached,
            open_before: told.open_before,
            flows: self.counts.flows.load(Relaxed),
            refused: self.counts.refused.load(Relaxed),
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
            Ok(None) => {
                seen_tx.send_replace(Seen::Gone);
            }
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

/// What an object says of its readiness.
enum Readiness {
    Ready,
    /// Nobody has looked at it.
    Unheard,
    /// Waiting may help.
    Waiting(Failure),
    /// Waiting does not help.
    Stuck(Failure),
}

async fn ready(mut seen_rx: watch::Receiver<Seen>) -> Result<(), Failure> {
    let begun = Instant::now();
    loop {
        let readiness = readiness(&seen_rx.borrow_and_update());
        let (limit, late) = match readiness {
            Readiness::Ready => return Ok(()),
            Readiness::Stuck(failure) => return Err(failure),
            Readiness::Unheard => (HEARD_WITHIN, unheard()),
            Readiness::Waiting(failure) => (READY_WITHIN, failure),
        };
        match tokio::time::timeout_at(begun + limit, seen_rx.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return Err(late),
        }
    }
}

fn readiness(seen: &Seen) -> Readiness {
    let Seen::There(object) = seen else {
        let failure = Failure::new("the intercept was deleted while it was being made");
        return Readiness::Stuck(failure);
    };
    if object.is_ready() {
        return Readiness::Ready;
    }
    let told = object.status.as_ref().and_then(|status| status.ready());
    let Some(told) = told.filter(|told| told.observed_generation == object.metadata.generation)
    else {
        return Readiness::Unheard;
    };
    let reason = told.reason.parse::<Reason>();
    let failure = not_ready(object, &told.message);
    match reason {
        // The next pod is attached as it comes; until then there is nobody to ask.
        Ok(Reason::NoPods) => Readiness::Ready,
        Ok(reason) if reason.is_lasting() => Readiness::Stuck(failure),
        Ok(_) | Err(_) => Readiness::Waiting(failure),
    }
}

/// The manager says what on the first line, and what to do about it on the second.
fn not_ready(object: &Intercept, message: &str) -> Failure {
    let InterceptSpec { workload, port, .. } = &object.spec;
    let mut lines = message.lines();
    let failure = Failure::new(format!("cannot intercept port {port} of {workload}"));
    let failure = match lines.next() {
        Some(why) if !why.is_empty() => failure.because(why),
        Some(_) | None => failure,
    };
    match lines.next() {
        Some(cure) => failure.hint(cure),
        None => failure,
    }
}

fn unheard() -> Failure {
    Failure::new("the manager says nothing of the intercept")
        .because(format!("no replica has looked at it within {HEARD_WITHIN:?}"))
        .hint("`tp version` shows whether the manager is of a release that knows intercepts; its log says more")
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
mod tests {
    use serde_json::Value;

    use super::*;

    fn intercept(user: &str, matchers: Value, condition: Option<(&str, &str, &str)>) -> Intercept {
        let condition = condition.map(|(status, reason, message)| {
            json!({
                "type": "Ready", "status": status, "reason": reason, "message": message,
                "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1,
            })
        });
        serde_json::from_value(json!({
            "apiVersion": "tp.dev/v1alpha1",
            "kind": "Intercept",
            "metadata": { "name": "web-1", "generation": 1, "creationTimestamp": "2026-01-01T09:00:00Z" },
            "spec": {
                "name": "web", "user": user, "session": "tp-1", "port": 8080, "matchers": matchers,
                "workload": { "kind": "Deployment", "name": "web" },
                "client": { "host": "lovelace", "version": "1" },
            },
            "status": { "conditions": condition.into_iter().collect::<Vec<_>>() },
        }))
        .unwrap()
    }

    fn seen(condition: Option<(&str, &str, &str)>) -> Readiness {
        readiness(&Seen::There(Box::new(intercept(
            "ada",
            json!([]),
            condition,
        ))))
    }

    #[test]
    fn what_the_manager_says_decides_whether_waiting_helps() {
        assert!(matches!(seen(None), Readiness::Unheard));
        assert!(matches!(
            seen(Some(("True", "Attached", ""))),
            Readiness::Ready
        ));
        assert!(matches!(
            seen(Some(("False", "Attaching", "1 of 2"))),
            Readiness::Waiting(_)
        ));
        assert!(matches!(
            seen(Some(("False", "FromTheFuture", ""))),
            Readiness::Waiting(_)
        ));
        let Readiness::Stuck(failure) = seen(Some((
            "False",
            "PodSecurity",
            "namespace shop enforces baseline\nask for privileged",
        ))) else {
            panic!("nothing to wait for");
        };
        assert_eq!(failure.what, "cannot intercept port 8080 of deployment/web");
        assert_eq!(failure.why, ["namespace shop enforces baseline"]);
        assert_eq!(failure.hint.as_deref(), Some("ask for privileged"));
        assert!(matches!(readiness(&Seen::Gone), Readiness::Stuck(_)));
    }

    #[test]
    fn a_status_of_an_older_spec_says_nothing() {
        let mut object = intercept("ada", json!([]), Some(("False", "PodSecurity", "no")));
        object.metadata.generation = Some(2);

        let readiness = readiness(&Seen::There(Box::new(object)));

        assert!(matches!(readiness, Readiness::Unheard));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_told_what_was_last_known() {
        let waited = |condition| async move {
            let object = intercept("ada", json!([]), condition);
            let (_seen_tx, seen_rx) = watch::channel(Seen::There(Box::new(object)));
            let begun = Instant::now();
            let failure = ready(seen_rx).await.unwrap_err();
            (begun.elapsed(), failure)
        };

        let (took, failure) = waited(None).await;
        assert_eq!(took, HEARD_WITHIN);
        assert!(
            failure.what.contains("the manager says nothing"),
            "{failure}"
        );
        let (took, failure) = waited(Some(("False", "Attaching", "1 of 2 pods"))).await;
        assert_eq!(took, READY_WITHIN);
        assert_eq!(failure.why, ["1 of 2 pods"]);
    }

    #[test]
    fn the_holder_is_named() {
        let header = json!([{ "header": { "name": "x-user", "exact": "ada" } }]);
        let own = intercept("ada", header.clone(), None).spec;

        let others = held_by(&intercept("bob", header, None), &own);
        let all = held_by(
            &intercept("ada", json!([]), None),
            &intercept("ada", json!([]), None).spec,
        );

        assert_eq!(
            others.why,
            [
                "bob intercepts the same requests (header x-user = ada) since 2026-01-01 09:00:00Z, as web on lovelace"
            ]
        );
        assert!(others.hint.unwrap().contains("ask bob"));
        assert!(
            all.why[0].starts_with("you already intercept everything"),
            "{all:?}"
        );
    }
}
