//! Intercepts: from the object in the API server to routes in the agents of every pod, and flows back to workstations.
//!
//! `plan.rs` decides, from what `seen.rs` has watched, which agents there are to be and what they are told; this module
//! carries it out. Nothing of it is kept: after a restart the same objects give the same plan. The replica that holds an
//! intercept's Session serves it (`held.rs`); any number of replicas may have routes in one agent.

mod container;
mod held;
mod link;
mod plan;
pub(crate) mod pod;
mod problem;
mod secret;
mod seen;
mod status;
mod step;
mod work;
pub mod workstations;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::Client;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tp_manager_api::Intercept;
use tp_manager_api::intercept::{InterceptStatus, Workload};
use tp_tunnel::Identity;

use self::workstations::Workstations;

use self::container::Blueprint;
use self::held::{HANDOVER, Replica, SessionView};
use self::link::{Agent, Link};
use self::plan::{KEPT, Plan, plan};
use self::seen::Seen;
use self::work::{AGAIN, Done};
use self::workstations::SessionUid;
use self::world::{Held, LinkView, NotLetIn, PodUid, Restrictions, World};
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

struct Controller {
    client: Client,
    town: Arc<Town>,
    sessions: Arc<SessionTable>,
    workstations: Arc<Workstations>,
    metrics: Arc<Metrics>,
    blueprint: Arc<Blueprint>,
    namespace: Arc<str>,
    began: Timestamp,
    changed: watch::Sender<()>,
    seen: Arc<Seen>,
    watches: BTreeMap<Arc<str>, Watching>,
    links: BTreeMap<PodUid, Link>,
    attaching: BTreeSet<PodUid>,
    not_let_in: BTreeMap<PodUid, NotLetIn>,
    workloads: BTreeMap<(Arc<str>, Workload), (bool, Instant)>,
    policies: BTreeMap<PodUid, Restrictions>,
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
            began: Timestamp::now(),
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
        self.forget_handovers();
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
        let now = Timestamp::now();
        let (mut held, mut owners) = (Vec::new(), BTreeMap::new());
        for known in seen.intercepts.values() {
            let session = self.session_of(&known.object);
            if let Some((one, owner)) = held::hold(known, session.as_ref(), replica, &others, now) {
                if let Some(owner) = owner.filter(|_| one.problem.is_none()) {
                    owners.insert(one.id.clone(), owner);
                }
                held.push(one);
            }
        }
        (held, owners)
    }

    /// A credential goes with its intercept.
    fn forget_handovers(&self) {
        let seen = self.seen.now();
        let known: BTreeSet<_> = seen
            .intercepts
            .values()
            .filter_map(|known| known.object.metadata.uid.as_deref())
            .collect();
        self.workstations.forget_handovers(&known);
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
        let uid = intercept.metadata.uid.as_deref();
        let replica = session.replica();
        Some(SessionView {
            uid: session.uid.as_str().into(),
            user: session.user.name.clone(),
            replica: replica.name,
            since: replica.since,
            lately: replica.since.elapsed() < HANDOVER,
            over: session.is_over(),
            here: self.workstations.here(&session.uid),
            tls: uid.and_then(|id| self.workstations.handover(&session.uid, id)),
            forbidden: uid.is_some_and(|id| {
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
        // Older ones stand until they are looked for again.
        let links = &self.links;
        self.policies.retain(|pod, _| links.contains_key(pod));
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
            policies: &self.policies,
            own_namespace: &self.namespace,
            image: &self.blueprint.image,
            began: self.began,
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
                key: match &wanted.seed {
                    Some(seed) => container::key_of(seed),
                    None => self.blueprint.agent_key(pod, &wanted.container),
                },
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
}
