//! Intercepts: from the object in the API server to routes in the agents of every pod, and flows back to workstations.
//!
//! [`plan`] decides, from what [`seen`] has watched, which agents there are to be and what they are told; this module
//! carries it out. Nothing of it is kept: after a restart the same objects give the same plan. The replica that holds an
//! intercept's Session serves it ([`held`]); any number of replicas may have routes in one agent.

mod container;
mod held;
mod link;
mod plan;
mod pod;
mod problem;
mod seen;
mod status;
mod workstations;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::jiff::Timestamp;
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams,
    Preconditions,
};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tp_manager_api::Intercept;
use tp_manager_api::intercept::{InterceptStatus, Workload, WorkloadKind};
use tp_tunnel::Identity;

pub use self::workstations::{Seat, Workstations};

use self::container::Blueprint;
use self::held::{Replica, SessionView};
use self::link::{Agent, Link};
use self::plan::{Attach, Held, LinkView, NotLetIn, Plan, PodUid, World, plan};
use self::problem::Problem;
use self::seen::Seen;
use self::workstations::SessionUid;
use crate::cluster::in_short;
use crate::dial::rights::Right;
use crate::metrics::Metrics;
use crate::reach::Town;
use crate::sessions::{ObjectName, SessionTable};

/// What a controller needs.
pub struct Setting {
    /// The API server.
    pub client: Client,
    /// Nodes, the manager's ready pods, rights, and who this pod is.
    pub town: Arc<Town>,
    /// Whose a Session is.
    pub sessions: Arc<SessionTable>,
    /// Where flows go.
    pub workstations: Arc<Workstations>,
    /// Where to count.
    pub metrics: Arc<Metrics>,
    /// Image of the agents.
    pub image: String,
    /// The manager's key.
    pub identity: Identity,
    /// Namespace of the manager.
    pub namespace: Arc<str>,
}

/// Makes intercepts so, for ever.
pub async fn control(setting: Setting) -> Infallible {
    let mut controller = Controller::new(setting);
    let mut ready = controller.town.cluster.ready_replicas();
    let mut sessions = controller.sessions.changes();
    let mut workstations = controller.workstations.changes();
    let mut changed = controller.changed.subscribe();
    let watching = {
        let (seen, client) = (Arc::clone(&controller.seen), controller.client.clone());
        async move { seen.watch_intercepts(client).await }
    };
    let turns = async {
        loop {
            let pause = tokio::time::sleep(controller.turn());
            // A busy namespace changes many times a second; one look serves all of them.
            tokio::time::sleep(SETTLE).await;
            tokio::select! {
                // None of the senders goes before this.
                _ = changed.changed() => {}
                _ = ready.changed() => {}
                _ = sessions.changed() => {}
                _ = workstations.changed() => {}
                Some(done) = controller.work.join_next(), if !controller.work.is_empty() => {
                    controller.note(done);
                }
                () = pause => {}
            }
        }
    };
    tokio::select! {
        never = watching => never,
        never = turns => never,
    }
}

/// Some of what is decided depends on time alone. This often while something is on its way,
const SOON: Duration = Duration::from_millis(250);

/// this often while all is well,
const STEADY: Duration = Duration::from_secs(1);

/// and this often while there is no intercept.
const IDLE: Duration = Duration::from_secs(30);

/// Between two looks.
const SETTLE: Duration = Duration::from_millis(5);

/// How long a namespace is watched on after its last intercept: the next one finds everything known.
const LINGER: Duration = Duration::from_secs(120);

/// How long an answer about a workload or its NetworkPolicies stands.
const KEPT: Duration = Duration::from_secs(2);

/// How often the right to an intercept is asked for again. Two of these pass before it ends at the latest.
const RECHECK: Duration = Duration::from_secs(25);

/// After a refusal to let an agent in.
const AGAIN: Duration = Duration::from_secs(5);

/// How long an Intercept may be without its Session. A workstation that makes another one writes it into its Intercepts.
const ORPHANED: Duration = Duration::from_secs(60);

struct Controller {
    client: Client,
    town: Arc<Town>,
    sessions: Arc<SessionTable>,
    workstations: Arc<Workstations>,
    metrics: Arc<Metrics>,
    blueprint: Arc<Blueprint>,
    namespace: Arc<str>,
    changed: watch::Sender<()>,
    seen: Arc<Seen>,
    watches: BTreeMap<Arc<str>, Watching>,
    links: BTreeMap<PodUid, Link>,
    attaching: BTreeSet<PodUid>,
    not_let_in: BTreeMap<PodUid, NotLetIn>,
    workloads: BTreeMap<(Arc<str>, Workload), (bool, Instant)>,
    policies: BTreeMap<PodUid, (Vec<String>, Instant)>,
    looking: BTreeSet<String>,
    /// Whether the user of an intercept still has the right to it, and when that was asked.
    rights: BTreeMap<String, (bool, Instant)>,
    written: BTreeMap<ObjectName, InterceptStatus>,
    writing: BTreeSet<ObjectName>,
    orphans: BTreeMap<ObjectName, Instant>,
    /// What the log knows of.
    told: BTreeMap<String, String>,
    work: JoinSet<Done>,
}

struct Watching {
    task: AbortHandle,
    needed: Instant,
}

/// What a piece of work came to.
enum Done {
    Attached(PodUid, Result<(), Option<Problem>>),
    Workload((Arc<str>, Workload), Option<bool>),
    Policies(PodUid, Vec<String>),
    Right(String, Option<bool>),
    Wrote(ObjectName, bool),
    /// A watch or a link ended, as told.
    Ended,
}

impl Controller {
    fn new(setting: Setting) -> Self {
        let changed = watch::channel(()).0;
        Self {
            client: setting.client,
            town: setting.town,
            sessions: setting.sessions,
            workstations: setting.workstations,
            metrics: setting.metrics,
            blueprint: Arc::new(Blueprint::new(setting.image, setting.identity)),
            namespace: setting.namespace,
            seen: Arc::new(Seen::new(changed.clone())),
            changed,
            watches: BTreeMap::new(),
            links: BTreeMap::new(),
            attaching: BTreeSet::new(),
            not_let_in: BTreeMap::new(),
            workloads: BTreeMap::new(),
            policies: BTreeMap::new(),
            looking: BTreeSet::new(),
            rights: BTreeMap::new(),
            written: BTreeMap::new(),
            writing: BTreeSet::new(),
            orphans: BTreeMap::new(),
            told: BTreeMap::new(),
            work: JoinSet::new(),
        }
    }

    /// Looks at everything and does what follows. When to come back, if nothing changes.
    fn turn(&mut self) -> Duration {
        let (held, owners) = self.held();
        self.workstations.assign(owners);
        self.watch_namespaces(&held);
        let plan = self.plan(&held);
        self.link(&plan);
        self.metrics.intercepting(held.len(), self.links.len());
        self.tell_changes(&held);
        for attach in &plan.attach {
            self.attach(attach);
        }
        self.ask_rights(&held);
        for place in &plan.look_for {
            self.look_for(place.clone());
        }
        for (namespace, pod, labels) in &plan.look_at {
            self.look_at(namespace, pod, labels.clone());
        }
        self.report(&plan);
        self.sweep();
        match plan.reports.iter().any(|report| report.problem.is_some()) {
            true => SOON,
            false if held.is_empty() && self.watches.is_empty() && self.orphans.is_empty() => IDLE,
            false => STEADY,
        }
    }

    fn held(&self) -> (Vec<Held>, BTreeMap<String, SessionUid>) {
        let ready = self.town.cluster.ready_replicas().borrow().clone();
        let replica = Replica {
            name: &self.town.replica,
            ready: &ready,
        };
        let seen = self.seen.now();
        let others: Vec<_> = seen
            .intercepts
            .values()
            .map(|known| &known.object)
            .collect();
        let (mut held, mut owners) = (Vec::new(), BTreeMap::new());
        for known in seen.intercepts.values() {
            let session = self.session_of(&known.object);
            if let Some((one, owner)) = held::hold(known, session.as_ref(), replica, &others) {
                if let Some(owner) = owner.filter(|_| one.problem.is_none()) {
                    owners.insert(one.id.clone(), owner);
                }
                held.push(one);
            }
        }
        (held, owners)
    }

    /// Who diverts what, from when to when, for whoever reads the log later.
    fn tell_changes(&mut self, held: &[Held]) {
        let serving: BTreeMap<_, _> = held
            .iter()
            .filter(|held| held.problem.is_none())
            .map(|held| {
                let (namespace, object) = &held.name;
                let what = format!("{} port {}", held.workload, held.port);
                let text = format!("{what} in {namespace} for {} ({object})", held.user);
                (held.id.clone(), text)
            })
            .collect();
        for (_, what) in serving
            .iter()
            .filter(|(id, _)| !self.told.contains_key(*id))
        {
            tracing::info!(what, "intercept begins");
        }
        for (_, what) in self
            .told
            .iter()
            .filter(|(id, _)| !serving.contains_key(*id))
        {
            tracing::info!(what, "intercept ends");
        }
        self.told = serving;
    }

    fn session_of(&self, intercept: &Intercept) -> Option<SessionView> {
        let namespace = intercept.metadata.namespace.as_deref()?;
        let name = (namespace.into(), intercept.spec.session.as_str().into());
        let session = self.sessions.get(&name)?;
        let replica = session.replica();
        Some(SessionView {
            uid: session.uid.as_str().into(),
            user: session.user.name.clone(),
            replica: replica.name,
            since: replica.since,
            over: session.is_over(),
            here: self.workstations.here(&session.uid),
            forbidden: intercept.metadata.uid.as_ref().is_some_and(|id| {
                let right = self.rights.get(id);
                right.is_some_and(|(allowed, _)| !allowed)
            }),
        })
    }

    fn watch_namespaces(&mut self, held: &[Held]) {
        let now = Instant::now();
        for held in held.iter().filter(|held| held.problem.is_none()) {
            let namespace = Arc::clone(&held.name.0);
            let (seen, client) = (&self.seen, &self.client);
            let work = &mut self.work;
            let watching = self
                .watches
                .entry(Arc::clone(&namespace))
                .or_insert_with(|| {
                    let (seen, client) = (Arc::clone(seen), client.clone());
                    let task = work.spawn(async move {
                        match seen.watch_namespace(client, namespace).await {}
                    });
                    Watching { task, needed: now }
                });
            watching.needed = now;
        }
        let seen = &self.seen;
        self.watches.retain(|namespace, watching| {
            let needed = now.duration_since(watching.needed) < LINGER;
            if !needed {
                watching.task.abort();
                seen.now().scenes.remove(namespace);
            }
            needed
        });
    }

    fn plan(&mut self, held: &[Held]) -> Plan {
        let now = Instant::now();
        let fresh = |at: &Instant| now.duration_since(*at) < KEPT;
        self.workloads.retain(|_, (_, at)| fresh(at));
        self.policies.retain(|_, (_, at)| fresh(at));
        self.not_let_in
            .retain(|_, refused| now < refused.again + AGAIN);
        let links = self.links.iter().map(|(pod, link)| {
            let view = LinkView {
                container: link.container.clone(),
                state: link.state(),
            };
            (Arc::clone(pod), view)
        });
        let workloads = self.workloads.iter();
        let policies = self.policies.iter();
        plan(&World {
            held,
            scenes: &self.seen.now().scenes,
            node: &|name| self.town.cluster.inventory().node(name).cloned(),
            links: &links.collect(),
            attaching: &self.attaching,
            not_let_in: &self.not_let_in,
            workloads: &workloads
                .map(|(place, (there, _))| (place.clone(), *there))
                .collect(),
            policies: &policies
                .map(|(pod, (names, _))| (Arc::clone(pod), names.clone()))
                .collect(),
            own_namespace: &self.namespace,
            now,
        })
    }

    /// Dropping a link withdraws its routes.
    fn link(&mut self, plan: &Plan) {
        self.links.retain(|pod, link| {
            let wanted = plan.links.get(pod);
            wanted.is_some_and(|wanted| wanted.container == link.container)
        });
        for (pod, wanted) in &plan.links {
            if let Some(link) = self.links.get(pod) {
                link.set(wanted.orders.clone());
                continue;
            }
            let agent = Agent {
                address: wanted.address,
                key: self.blueprint.agent_key(pod, &wanted.container),
                identity: self.blueprint.identity().clone(),
            };
            let (container, orders) = (wanted.container.clone(), wanted.orders.clone());
            let (link, ends) = Link::new(container, orders, self.changed.clone());
            let workstations = Arc::clone(&self.workstations);
            self.work.spawn(async move {
                link::serve(agent, ends, workstations).await;
                Done::Ended
            });
            self.links.insert(Arc::clone(pod), link);
        }
    }

    fn attach(&mut self, attach: &Attach) {
        if !self.attaching.insert(Arc::clone(&attach.uid)) {
            return;
        }
        let pods = Api::<Pod>::namespaced(self.client.clone(), &attach.namespace);
        let mut patch = self.blueprint.patch(&attach.uid, &attach.container);
        // Not a later pod of the same name.
        patch["metadata"] = serde_json::json!({ "uid": *attach.uid });
        let seen = Arc::clone(&self.seen);
        let (pod, uid) = (Arc::clone(&attach.pod), Arc::clone(&attach.uid));
        let (namespace, container) = (Arc::clone(&attach.namespace), attach.container.clone());
        self.work.spawn(async move {
            let patch = Patch::Strategic(patch);
            let patched = pods
                .patch_ephemeral_containers(&pod, &PatchParams::default(), &patch)
                .await;
            match &patched {
                Ok(written) => {
                    tracing::info!(%namespace, %pod, container, "agent added");
                    seen.pod_written(&namespace, written);
                }
                Err(error) => {
                    tracing::warn!(%namespace, %pod, error = in_short(error), "no agent added");
                }
            }
            let refused = |error| Problem::not_let_in(&namespace, &error);
            Done::Attached(uid, patched.map(drop).map_err(refused))
        });
    }

    /// The API server asked when the Intercept was written; rights go without an event.
    fn ask_rights(&mut self, held: &[Held]) {
        let now = Instant::now();
        let ids: BTreeSet<_> = held.iter().map(|held| held.id.as_str()).collect();
        self.rights.retain(|id, _| ids.contains(id.as_str()));
        for held in held {
            let fresh = |(_, at): &(bool, Instant)| now.duration_since(*at) < RECHECK;
            if self.rights.get(&held.id).is_some_and(fresh) || self.looking.contains(&held.id) {
                continue;
            }
            let seen = self.seen.now();
            let intercept = seen.intercepts.get(&held.name).map(|known| &known.object);
            let session = intercept.and_then(|intercept| {
                let name = (
                    Arc::clone(&held.name.0),
                    intercept.spec.session.as_str().into(),
                );
                self.sessions.get(&name)
            });
            let Some(session) = session else { continue };
            drop(seen);
            let (town, id) = (Arc::clone(&self.town), held.id.clone());
            let right = Right::Intercepts(Arc::clone(&held.name.0));
            // A refusal that is remembered may be older than the grant by which the object was written.
            let age = match self.rights.contains_key(&id) {
                true => RECHECK / 2,
                false => Duration::ZERO,
            };
            self.looking.insert(id.clone());
            self.work.spawn(async move {
                let asked = town.rights.allows_within(&session.user, &right, age);
                Done::Right(id, asked.await.ok())
            });
        }
    }

    fn look_for(&mut self, place: (Arc<str>, Workload)) {
        if !self.looking.insert(format!("{}/{}", place.0, place.1)) {
            return;
        }
        let (group, version) = match place.1.kind {
            WorkloadKind::Pod => ("", "v1"),
            WorkloadKind::Deployment
            | WorkloadKind::StatefulSet
            | WorkloadKind::DaemonSet
            | WorkloadKind::ReplicaSet => ("apps", "v1"),
        };
        let kind = GroupVersionKind::gvk(group, version, place.1.kind.as_str());
        let resource = ApiResource::from_gvk(&kind);
        let api = Api::<DynamicObject>::namespaced_with(self.client.clone(), &place.0, &resource);
        self.work.spawn(async move {
            let found = api.get_metadata_opt(&place.1.name).await;
            Done::Workload(place, found.ok().map(|found| found.is_some()))
        });
    }

    fn look_at(&mut self, namespace: &Arc<str>, pod: &PodUid, labels: BTreeMap<String, String>) {
        if !self.looking.insert(pod.to_string()) {
            return;
        }
        let api = Api::<NetworkPolicy>::namespaced(self.client.clone(), namespace);
        let pod = Arc::clone(pod);
        self.work.spawn(async move {
            let found = api.list(&ListParams::default()).await;
            let policies = found.map(|found| found.items).unwrap_or_default();
            Done::Policies(pod, problem::restricting(policies, &labels))
        });
    }

    fn report(&mut self, plan: &Plan) {
        let seen = Arc::clone(&self.seen);
        let seen = seen.now();
        let reported: BTreeSet<_> = plan.reports.iter().map(|report| &report.name).collect();
        self.written.retain(|name, _| reported.contains(name));
        for report in &plan.reports {
            let Some(intercept) = seen.intercepts.get(&report.name).map(|known| &known.object)
            else {
                continue;
            };
            if self.writing.contains(&report.name) {
                continue;
            }
            let known = self.written.get(&report.name).or(intercept.status.as_ref());
            let now = Timestamp::now();
            if let Some(status) = status::next(intercept, known, report, &self.town.replica, now) {
                self.write(&report.name, status);
            }
        }
    }

    fn write(&mut self, name: &ObjectName, status: InterceptStatus) {
        let api = Api::<Intercept>::namespaced(self.client.clone(), &name.0);
        let patch = Patch::Merge(serde_json::json!({ "status": status }));
        self.written.insert(name.clone(), status);
        self.writing.insert(name.clone());
        let name = name.clone();
        self.work.spawn(async move {
            let params = PatchParams::default();
            let written = match api.patch_status(&name.1, &params, &patch).await {
                Ok(_) => true,
                Err(kube::Error::Api(status)) if status.is_not_found() => true,
                Err(error) => {
                    tracing::warn!(intercept = %name.1, error = in_short(&error), "cannot write the status");
                    tokio::time::sleep(KEPT).await;
                    false
                }
            };
            Done::Wrote(name, written)
        });
    }

    /// Removes Intercepts whose Sessions are gone: nobody else would, and they keep their names from others.
    fn sweep(&mut self) {
        let seen = self.seen.now();
        let ready = self.town.cluster.ready_replicas().borrow().clone();
        let replica = Replica {
            name: &self.town.replica,
            ready: &ready,
        };
        let first = replica.is_first();
        let orphans: BTreeMap<_, _> = seen
            .intercepts
            .iter()
            .map(|(name, known)| (name, &known.object))
            .filter(|(_, intercept)| seen.listed && first && self.session_of(intercept).is_none())
            .map(|(name, intercept)| (name.clone(), intercept.metadata.uid.clone()))
            .collect();
        drop(seen);
        self.orphans.retain(|name, _| orphans.contains_key(name));
        for (name, uid) in orphans {
            let since = *self
                .orphans
                .entry(name.clone())
                .or_insert_with(Instant::now);
            if since.elapsed() < ORPHANED {
                continue;
            }
            self.orphans.insert(name.clone(), Instant::now());
            let api = Api::<Intercept>::namespaced(self.client.clone(), &name.0);
            self.work.spawn(async move {
                let exactly_this = DeleteParams {
                    preconditions: Some(Preconditions {
                        uid,
                        resource_version: None,
                    }),
                    ..DeleteParams::default()
                };
                match api.delete(&name.1, &exactly_this).await {
                    Ok(_) => tracing::info!(namespace = %name.0, intercept = %name.1, "Intercept without a Session removed"),
                    Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                    Err(error) => {
                        tracing::warn!(intercept = %name.1, error = in_short(&error), "cannot remove an Intercept");
                    }
                }
                Done::Ended
            });
        }
    }

    fn note(&mut self, done: Result<Done, tokio::task::JoinError>) {
        match done {
            Ok(Done::Attached(pod, result)) => {
                self.attaching.remove(&pod);
                match result {
                    Ok(()) | Err(None) => drop(self.not_let_in.remove(&pod)),
                    Err(Some(problem)) => {
                        let again = Instant::now() + AGAIN;
                        self.not_let_in.insert(pod, NotLetIn { problem, again });
                    }
                }
            }
            Ok(Done::Workload(place, found)) => {
                self.looking.remove(&format!("{}/{}", place.0, place.1));
                if let Some(found) = found {
                    self.workloads.insert(place, (found, Instant::now()));
                }
            }
            Ok(Done::Policies(pod, names)) => {
                self.looking.remove(&*pod);
                self.policies.insert(pod, (names, Instant::now()));
            }
            Ok(Done::Right(id, allowed)) => {
                self.looking.remove(&id);
                // While nobody can be asked the last answer stands.
                let before = self.rights.get(&id).is_none_or(|(allowed, _)| *allowed);
                let answer = (allowed.unwrap_or(before), Instant::now());
                self.rights.insert(id, answer);
            }
            Ok(Done::Wrote(name, written)) => {
                self.writing.remove(&name);
                if !written {
                    self.written.remove(&name);
                }
            }
            Ok(Done::Ended) => {}
            Err(error) if error.is_cancelled() => {}
            Err(error) => tracing::error!(%error, "a task of the controller ended abnormally"),
        }
    }
}
