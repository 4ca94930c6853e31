//! What one Session may reach and see in a cluster, and when that ends.
//!
//! An address belongs to a namespace or to none; the former asks for the right to that namespace, the latter for the
//! right to leave the cluster. Rights that were used are asked for again while the session is connected: when one is
//! gone the flows that stood on it are cut, and the connection when it is the right that the session itself stands on.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio_util::sync::CancellationToken;
use tp_manager_api::cluster_view::ManagerInfo;
use tp_manager_api::{ClusterView, GROUP, PROTOCOL};

use crate::cluster::{Cluster, in_short};
use crate::dial::refuse::Surroundings;
use crate::dial::rights::{Reviewer, Right, Rights, Unavailable, User};
use crate::dial::{Destination, Permit, Reach};
use crate::service::{Views, with_version};
use crate::sessions::LiveSession;

/// What does not differ between sessions.
pub struct Town {
    /// The cluster as watched.
    pub cluster: Arc<Cluster>,
    /// Answers of RBAC.
    pub rights: Rights,
    /// Addresses of this pod.
    pub own_addresses: Vec<IpAddr>,
    /// Nameservers of this pod.
    pub nameservers: Vec<IpAddr>,
    /// Cluster domain.
    pub domain: String,
    /// Name of this pod.
    pub replica: Arc<str>,
}

impl Surroundings for Town {
    fn is_nameserver(&self, address: IpAddr) -> bool {
        self.nameservers.contains(&address)
    }

    fn is_node(&self, address: IpAddr) -> bool {
        self.cluster.inventory().is_node(address)
    }

    fn is_manager(&self, address: IpAddr, _port: u16) -> bool {
        self.own_addresses.contains(&address) || self.cluster.is_manager(address)
    }
}

/// The reach of one connection.
pub struct SessionReach {
    town: Arc<Town>,
    session: Arc<LiveSession>,
    /// Rights that flows stand on besides the session's own, and what cuts those flows.
    used: Mutex<BTreeMap<Right, CancellationToken>>,
}

impl SessionReach {
    /// For one connection of `session`.
    pub fn new(town: Arc<Town>, session: Arc<LiveSession>) -> Self {
        Self {
            town,
            session,
            used: Mutex::default(),
        }
    }

    /// Whether the user still has the right that the Session itself stood on when it was created. Asked anew: the API
    /// server has just granted it, and a refusal that is remembered may be older than the grant.
    pub async fn check_session(&self) -> Result<(), String> {
        let (user, right) = (&self.session.user, self.own_right());
        let rights = &self.town.rights;
        let _ = rights.allows_within(user, &right, Duration::ZERO).await;
        self.require(right).await.map(drop)
    }

    /// Cuts the flows whose right is gone, at most a minute after that. Resolves with the reason when the session's own
    /// right is.
    pub async fn revoked(&self) -> String {
        loop {
            tokio::time::sleep(RECHECK).await;
            if self.is_gone(&self.own_right()).await {
                return self.refusal(&self.own_right());
            }
            let used: Vec<Right> = self.used().keys().cloned().collect();
            for right in used {
                if self.is_gone(&right).await
                    && let Some(flows) = self.used().remove(&right)
                {
                    tracing::info!(session = %self.session.name, "{}: its flows are cut", self.refusal(&right));
                    flows.cancel();
                }
            }
        }
    }

    async fn is_gone(&self, right: &Right) -> bool {
        let (user, rights) = (&self.session.user, &self.town.rights);
        let still = rights.allows_within(user, right, RECHECK / 2).await;
        matches!(still, Ok(false))
    }

    fn own_right(&self) -> Right {
        Right::Namespace(Arc::clone(&self.session.namespace))
    }

    async fn require(&self, right: Right) -> Result<Permit, String> {
        let own = right == self.own_right();
        match self.town.rights.allows(&self.session.user, &right).await {
            Ok(true) if own => Ok(None),
            Ok(true) => Ok(Some(self.used().entry(right).or_default().clone())),
            Ok(false) => Err(self.refusal(&right)),
            // The API server checked it when it took the Session.
            Err(_) if own => Ok(None),
            Err(error) => Err(format!("{}: {error}", self.refusal(&right))),
        }
    }

    fn refusal(&self, right: &Right) -> String {
        format!("user {:?} may not {right}", self.session.user.name)
    }

    fn used(&self) -> std::sync::MutexGuard<'_, BTreeMap<Right, CancellationToken>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right that a destination needs.
    async fn needs(&self, destination: &Destination) -> Right {
        if let Some(namespace) = self.town.cluster.namespace_of(destination.address).await {
            return Right::Namespace(namespace);
        }
        match destination
            .name
            .as_deref()
            .and_then(|name| self.alias_in(name))
        {
            Some(namespace) => Right::Namespace(namespace),
            None => Right::Egress(Arc::clone(&self.session.namespace)),
        }
    }

    /// The namespace of an ExternalName Service: who may write those decides where they lead.
    fn alias_in(&self, name: &str) -> Option<Arc<str>> {
        let (service, rest) = name.split_once('.')?;
        let (namespace, rest) = rest.split_once('.')?;
        let domain = rest.strip_prefix("svc.")?;
        let name = (Arc::from(namespace), Arc::from(service));
        let alias = self
            .town
            .cluster
            .inventory()
            .service(&name)
            .is_some_and(|service| service.external_name);
        (alias && domain == self.town.domain).then_some(name.0)
    }
}

/// Two of these pass before a flow is cut at the latest.
const RECHECK: Duration = Duration::from_secs(25);

impl Reach for SessionReach {
    fn surroundings(&self) -> &dyn Surroundings {
        &*self.town
    }

    fn namespace(&self) -> Option<&str> {
        Some(&self.session.namespace)
    }

    fn permit<'a>(&'a self, destination: &'a Destination) -> BoxFuture<'a, Result<Permit, String>> {
        Box::pin(async move {
            let right = self.needs(destination).await;
            self.require(right)
                .await
                .map_err(|refusal| match &destination.name {
                    Some(name) => format!("{name}: {refusal}"),
                    None => format!("{}: {refusal}", destination.address),
                })
        })
    }
}

/// The view of one connection.
pub struct SessionViews {
    town: Arc<Town>,
    session: Arc<LiveSession>,
    seen: AtomicU64,
}

impl SessionViews {
    /// For one connection of `session`.
    pub fn new(town: Arc<Town>, session: Arc<LiveSession>) -> Self {
        Self {
            town,
            session,
            seen: AtomicU64::new(0),
        }
    }

    /// The namespaces this user reaches, as far as RBAC answers within a moment; the rest shows in a later view.
    async fn namespaces(&self) -> Vec<Arc<str>> {
        let all: Vec<Arc<str>> = self
            .town
            .cluster
            .inventory()
            .namespaces()
            .cloned()
            .collect();
        let age =
            Rights::KEPT * u32::try_from(all.len() / NAMESPACES_A_MINUTE + 1).unwrap_or(u32::MAX);
        let survey = async {
            if self.has(Right::EveryNamespace, age).await {
                return;
            }
            let questions = futures::stream::iter(all.clone());
            questions
                .for_each_concurrent(16, async |namespace| {
                    self.has(Right::Namespace(namespace), age).await;
                })
                .await;
        };
        let _ = tokio::time::timeout(SURVEY, survey).await;
        let knows = |right| self.town.rights.remembered(&self.session.user, &right) == Some(true);
        if knows(Right::EveryNamespace) {
            return all;
        }
        let reached = |namespace: &Arc<str>| {
            *namespace == self.session.namespace || knows(Right::Namespace(Arc::clone(namespace)))
        };
        all.into_iter().filter(reached).collect()
    }

    async fn has(&self, right: Right, age: Duration) -> bool {
        self.town
            .rights
            .allows_within(&self.session.user, &right, age)
            .await
            .unwrap_or(false)
    }
}

/// How long a view waits for RBAC.
const SURVEY: Duration = Duration::from_millis(300);

/// Bounds how often one user's view asks RBAC about namespaces it already asked about.
const NAMESPACES_A_MINUTE: usize = 60;

/// Rights change without an event.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// Several changes close together make one view.
const SETTLE: Duration = Duration::from_millis(100);

impl Views for SessionViews {
    fn view(&self) -> BoxFuture<'_, ClusterView> {
        Box::pin(async move {
            self.seen
                .store(*self.town.cluster.view_changes().borrow(), Relaxed);
            let reached = self.namespaces().await;
            let inventory = self.town.cluster.inventory();
            let services: BTreeMap<String, Vec<String>> = reached
                .iter()
                .map(|namespace| (namespace.to_string(), inventory.services_of(namespace)))
                .filter(|(_, names)| !names.is_empty())
                .collect();
            with_version(ClusterView {
                version: 0,
                protocol: PROTOCOL,
                manager: ManagerInfo {
                    name: self.town.replica.to_string(),
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                },
                namespace: self.session.namespace.to_string(),
                domain: self.town.domain.clone(),
                service_ranges: inventory.service_ranges(),
                pod_ranges: inventory.pod_ranges(),
                namespaces: reached.iter().map(ToString::to_string).collect(),
                services,
                suffixes: Vec::new(),
                everything: false,
            })
        })
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let seen = self.seen.load(Relaxed);
            let mut changes = self.town.cluster.view_changes();
            let change = changes.wait_for(|version| *version != seen);
            if tokio::time::timeout(LOOK_AGAIN, change).await.is_ok() {
                tokio::time::sleep(SETTLE).await;
            }
        })
    }
}

/// Asks the API server by SubjectAccessReview.
pub struct KubeReviewer {
    /// As the manager's account.
    pub client: Client,
}

/// For one review.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(3);

impl Reviewer for KubeReviewer {
    fn review<'a>(
        &'a self,
        user: &'a User,
        right: &'a Right,
    ) -> BoxFuture<'a, Result<bool, Unavailable>> {
        Box::pin(async move {
            let (resource, subresource) = right.resource();
            let review = SubjectAccessReview {
                spec: SubjectAccessReviewSpec {
                    user: Some(user.name.clone()),
                    groups: Some(user.groups.clone()),
                    resource_attributes: Some(ResourceAttributes {
                        verb: Some("create".to_owned()),
                        group: Some(GROUP.to_owned()),
                        resource: Some(resource.to_owned()),
                        subresource: subresource.map(str::to_owned),
                        namespace: Some(right.namespace().to_owned()),
                        ..ResourceAttributes::default()
                    }),
                    ..SubjectAccessReviewSpec::default()
                },
                ..SubjectAccessReview::default()
            };
            review_access(self.client.clone(), review).await
        })
    }
}

/// Sends a review and reads its verdict.
pub(crate) async fn review_access(
    client: Client,
    review: SubjectAccessReview,
) -> Result<bool, Unavailable> {
    let api = Api::<SubjectAccessReview>::all(client);
    let params = PostParams::default();
    match tokio::time::timeout(REVIEW_TIMEOUT, api.create(&params, &review)).await {
        Ok(Ok(review)) => Ok(review.status.is_some_and(|status| status.allowed)),
        Ok(Err(error)) => Err(Unavailable(in_short(&error))),
        Err(_) => Err(Unavailable("no answer within 3 s".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::{SignedDuration, Timestamp};
    use tp_manager_api::{ClientInfo, Session, SessionSpec};
    use tp_tunnel::Identity;

    use super::*;
    use crate::inventory::Service;
    use crate::sessions::SessionTable;

    /// Grants that can be taken back: (user, resource, namespace).
    #[derive(Clone, Default)]
    struct Grants(Arc<Mutex<HashSet<(String, String)>>>);

    impl Grants {
        fn set(&self, user: &str, right: &Right, granted: bool) {
            let grant = (user.to_owned(), right.to_string());
            let mut grants = self.0.lock().unwrap();
            if granted {
                grants.insert(grant);
            } else {
                grants.remove(&grant);
            }
        }
    }

    impl Reviewer for Grants {
        fn review<'a>(
            &'a self,
            user: &'a User,
            right: &'a Right,
        ) -> BoxFuture<'a, Result<bool, Unavailable>> {
            let grant = (user.name.clone(), right.to_string());
            let granted = self.0.lock().unwrap().contains(&grant);
            Box::pin(std::future::ready(Ok(granted)))
        }
    }

    fn of(namespace: &str) -> Right {
        Right::Namespace(namespace.into())
    }

    /// Services `web` in `shop` and `bank`, and an alias in `shop` that leads outside.
    fn town(grants: &Grants) -> Arc<Town> {
        let cluster = Arc::new(Cluster::new("tp-system".into()));
        let services = [
            ("shop", "web", Some("10.96.0.1")),
            ("bank", "web", Some("10.96.0.2")),
            ("shop", "ext", None),
        ];
        for (namespace, name, address) in services {
            let service = Service {
                addresses: address
                    .map(|text| text.parse().unwrap())
                    .into_iter()
                    .collect(),
                external_name: address.is_none(),
            };
            let name = (Arc::from(namespace), Arc::from(name));
            cluster.update(|inventory| {
                inventory.set_namespace(&name.0, true);
                inventory.set_service(&name, Some(service))
            });
        }
        Arc::new(Town {
            cluster,
            rights: Rights::new(grants.clone()),
            own_addresses: Vec::new(),
            nameservers: Vec::new(),
            domain: "cluster.local".into(),
            replica: "tp-manager-1".into(),
        })
    }

    async fn session(user: &str, namespace: &str) -> Arc<LiveSession> {
        let (table, key, now) = (
            SessionTable::default(),
            Identity::generate().key_hash(),
            Timestamp::now(),
        );
        let mut session = Session::new(
            user,
            SessionSpec {
                user: user.to_owned(),
                groups: Vec::new(),
                key_hash: key.to_string(),
                expires_at: Time(now + SignedDuration::from_secs(3600)),
                client: ClientInfo::default(),
            },
        );
        session.metadata.namespace = Some(namespace.to_owned());
        table.apply(&session, now);
        table.admit(key).await.unwrap()
    }

    async fn permit(reach: &SessionReach, name: Option<&str>, address: &str) -> Result<(), String> {
        permitted(reach, name, address).await.map(drop)
    }

    async fn permitted(
        reach: &SessionReach,
        name: Option<&str>,
        address: &str,
    ) -> Result<Permit, String> {
        let destination = Destination {
            name: name.map(str::to_owned),
            address: address.parse().unwrap(),
            port: 80,
        };
        reach.permit(&destination).await
    }

    #[tokio::test(start_paused = true)]
    async fn each_user_reaches_the_own_namespace_and_the_refusal_names_the_right() {
        let grants = Grants::default();
        grants.set("ada", &of("shop"), true);
        grants.set("bob", &of("bank"), true);
        let town = town(&grants);
        let ada = SessionReach::new(Arc::clone(&town), session("ada", "shop").await);
        let bob = SessionReach::new(town, session("bob", "bank").await);

        assert_eq!(permit(&ada, None, "10.96.0.1").await, Ok(()));
        assert_eq!(permit(&bob, None, "10.96.0.2").await, Ok(()));
        let refusal = permit(&ada, Some("web.bank.svc.cluster.local"), "10.96.0.2")
            .await
            .unwrap_err();
        assert_eq!(
            refusal,
            "web.bank.svc.cluster.local: user \"ada\" may not create sessions.tp.dev in namespace bank"
        );
        assert!(permit(&bob, None, "10.96.0.1").await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn outside_needs_egress_unless_an_alias_of_a_reached_namespace_leads_there() {
        let grants = Grants::default();
        grants.set("ada", &of("shop"), true);
        let reach = SessionReach::new(town(&grants), session("ada", "shop").await);

        let refusal = permit(&reach, Some("db.example"), "203.0.113.5")
            .await
            .unwrap_err();
        assert!(
            refusal.contains("sessions.tp.dev/egress in namespace shop"),
            "{refusal}"
        );
        assert_eq!(
            permit(&reach, Some("ext.shop.svc.cluster.local"), "203.0.113.5").await,
            Ok(())
        );
        let elsewhere = permit(&reach, Some("ext.shop.svc.cluster.local"), "10.96.0.2").await;
        assert!(elsewhere.is_err(), "an alias opens no other namespace");
        assert!(
            permit(&reach, Some("web.shop.svc.cluster.local"), "203.0.113.5")
                .await
                .is_err()
        );

        tokio::time::advance(Rights::KEPT).await;
        grants.set("ada", &Right::Egress("shop".into()), true);
        assert_eq!(
            permit(&reach, Some("db.example"), "203.0.113.5").await,
            Ok(())
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_right_taken_back_cuts_its_flows_within_a_minute_and_the_sessions_own_cuts_all() {
        let grants = Grants::default();
        for namespace in ["shop", "bank"] {
            grants.set("ada", &of(namespace), true);
        }
        let reach = SessionReach::new(town(&grants), session("ada", "shop").await);
        let minute = Duration::from_secs(60);
        let own = permitted(&reach, None, "10.96.0.1").await.unwrap();
        let other = permitted(&reach, None, "10.96.0.2").await.unwrap();
        let other = other.expect("a right besides the session's own can be withdrawn alone");
        assert!(own.is_none());

        grants.set("ada", &of("bank"), false);
        let cut = tokio::time::timeout(minute, async {
            tokio::select! {
                reason = reach.revoked() => panic!("the connection is cut: {reason}"),
                () = other.cancelled() => {}
            }
        });
        cut.await.unwrap();
        assert!(permit(&reach, None, "10.96.0.2").await.is_err());
        assert!(permit(&reach, None, "10.96.0.1").await.is_ok());

        tokio::time::advance(Rights::KEPT).await;
        grants.set("ada", &of("bank"), true);
        let again = permitted(&reach, None, "10.96.0.2").await.unwrap();
        assert!(again.is_some_and(|permit| !permit.is_cancelled()));

        grants.set("ada", &of("shop"), false);
        let reason = tokio::time::timeout(minute, reach.revoked()).await.unwrap();
        assert!(reason.ends_with("in namespace shop"), "{reason}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_view_shows_the_namespaces_that_are_reached() {
        let grants = Grants::default();
        grants.set("ada", &of("shop"), true);
        let town = town(&grants);
        let views = SessionViews::new(Arc::clone(&town), session("ada", "shop").await);

        let view = views.view().await;
        assert_eq!(view.namespaces, ["shop"]);
        assert_eq!(view.services["shop"], ["ext", "web"]);

        grants.set("eve", &Right::EveryNamespace, true);
        let all = SessionViews::new(town, session("eve", "shop").await)
            .view()
            .await;
        assert_eq!(all.namespaces, ["bank", "shop"]);
        assert_ne!(all.version, view.version);
    }
}
