//! Which keys may speak, as the Sessions of the cluster say at this moment.
//!
//! An index of the watched Sessions by key. It knows no connections: whoever is admitted holds its [`LiveSession`] and
//! hears from it when it ends, by deletion or because nobody renewed it. Expiry runs on the monotonic clock from the
//! moment a Session was seen, so a jump of the wall clock ends nothing.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tp_manager_api::{LONGEST_SESSION, Session};
use tp_tunnel::KeyHash;

use crate::dial::rights::User;

/// Namespace and name.
pub type ObjectName = (Arc<str>, Arc<str>);

/// One Session, for as long as somebody is connected by it.
#[derive(Debug)]
pub struct LiveSession {
    /// Namespace whose pods' names the session resolves.
    pub namespace: Arc<str>,
    /// Name of the object.
    pub name: Arc<str>,
    /// Tells it from a later one of the same name.
    pub uid: String,
    /// The writer, vouched for by the API server's policy.
    pub user: Arc<User>,
    key: KeyHash,
    created: Timestamp,
    standing: watch::Sender<Standing>,
    replica: Mutex<Replica>,
}

/// The replica that the status of a Session names.
#[derive(Clone, Debug)]
pub struct Replica {
    /// Its pod; none before the first connection.
    pub name: Option<String>,
    /// When we saw that.
    pub since: Instant,
}

/// Whether a session may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Until(Instant),
    TooLong,
    Deleted,
}

/// Why a key is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotAdmitted {
    /// No Session lists it.
    #[error("no Session lists the key")]
    Unknown,
    /// Two Sessions of the same second list it, so whose it is cannot be told.
    #[error("more than one Session of the same age lists the key")]
    Ambiguous,
    /// Its Session was deleted a moment ago.
    #[error("the Session was deleted")]
    Deleted,
    /// Its Session was not renewed.
    #[error("the Session has expired")]
    Expired,
    /// The admission policy is missing or was bypassed.
    #[error(
        "the Session's expiresAt is more than an hour ahead, which the admission policy forbids"
    )]
    TooLong,
}

impl LiveSession {
    /// Resolves with the reason when the session ends. Cancel safe.
    pub async fn ended(&self) -> NotAdmitted {
        let mut standing = self.standing.subscribe();
        loop {
            let now = *standing.borrow_and_update();
            if let Err(reason) = check(now) {
                return reason;
            }
            let Standing::Until(deadline) = now else {
                continue;
            };
            tokio::select! {
                () = sleep_until(deadline) => {}
                _ = standing.changed() => {}
            }
        }
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        check(self.standing()).is_err()
    }

    /// Where its workstation connected last, as its status says.
    pub fn replica(&self) -> Replica {
        self.reported().clone()
    }

    fn set_replica(&self, session: &Session) {
        let (name, mut known) = (replica(session), self.reported());
        if known.name != name {
            let since = Instant::now();
            *known = Replica { name, since };
        }
    }

    fn reported(&self) -> MutexGuard<'_, Replica> {
        self.replica.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn standing(&self) -> Standing {
        *self.standing.borrow()
    }
}

fn check(standing: Standing) -> Result<(), NotAdmitted> {
    match standing {
        Standing::Until(deadline) if deadline > Instant::now() => Ok(()),
        Standing::Until(_) => Err(NotAdmitted::Expired),
        Standing::TooLong => Err(NotAdmitted::TooLong),
        Standing::Deleted => Err(NotAdmitted::Deleted),
    }
}

/// All Sessions of the cluster.
#[derive(Debug)]
pub struct SessionTable {
    inner: Mutex<Index>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Index {
    by_name: HashMap<ObjectName, Arc<LiveSession>>,
    by_key: HashMap<KeyHash, Vec<Arc<LiveSession>>>,
    /// Those of the previous list that the list under way has not shown yet.
    unconfirmed: HashSet<ObjectName>,
}

impl Default for SessionTable {
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            changed: watch::channel(()).0,
        }
    }
}

impl SessionTable {
    /// How long an unknown key may wait for the watch, which is a moment behind the write.
    pub const PATIENCE: Duration = Duration::from_secs(2);

    /// The live session of a key. Waits for news while no Session lists it at all.
    pub async fn admit(&self, key: KeyHash) -> Result<Arc<LiveSession>, NotAdmitted> {
        let mut changed = self.changed.subscribe();
        let wait = async {
            loop {
                match self.find(key) {
                    // An error means that the table is gone, and with it all hope of news.
                    Err(NotAdmitted::Unknown) if changed.changed().await.is_ok() => {}
                    outcome => return outcome,
                }
            }
        };
        timeout(Self::PATIENCE, wait)
            .await
            .unwrap_or(Err(NotAdmitted::Unknown))
    }

    /// The Session of that name.
    pub fn get(&self, name: &ObjectName) -> Option<Arc<LiveSession>> {
        self.index().by_name.get(name).cloned()
    }

    /// Tells of every change.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Several Sessions may list one key, though only one can hold the private half. The oldest is its owner's: nobody
    /// can have copied the hash before it was written. Times have whole seconds, so a copy may be as old as its
    /// original; then neither is believed, since a guess would let the owner work in another's namespace.
    fn find(&self, key: KeyHash) -> Result<Arc<LiveSession>, NotAdmitted> {
        let index = self.index();
        let listing = index.by_key.get(&key).ok_or(NotAdmitted::Unknown)?;
        let oldest = listing.iter().min_by_key(|session| session.created);
        let session = oldest.ok_or(NotAdmitted::Unknown)?;
        let as_old = listing
            .iter()
            .filter(|other| other.created == session.created);
        if as_old.count() > 1 {
            return Err(NotAdmitted::Ambiguous);
        }
        check(session.standing()).map(|()| Arc::clone(session))
    }

    /// A list of all Sessions begins.
    pub fn begin_list(&self) {
        let mut index = self.index();
        index.unconfirmed = index.by_name.keys().cloned().collect();
    }

    /// The list is complete: what it did not show is gone.
    pub fn end_list(&self) {
        let mut index = self.index();
        for name in std::mem::take(&mut index.unconfirmed) {
            index.remove(&name);
        }
        drop(index);
        self.changed.send_replace(());
    }

    /// A Session was written. `wall` is the time of this machine, which `expiresAt` is compared with once.
    pub fn apply(&self, session: &Session, wall: Timestamp) {
        let Some(name) = object_name(session) else {
            return;
        };
        let mut index = self.index();
        index.unconfirmed.remove(&name);
        let standing = standing(session, wall);
        let known = index
            .by_name
            .get(&name)
            .filter(|known| known.is_same(session))
            .cloned();
        match known {
            Some(known) => {
                known.standing.send_replace(standing);
                known.set_replica(session);
            }
            None => {
                index.remove(&name);
                index.insert(name, session, standing);
            }
        }
        drop(index);
        self.changed.send_replace(());
    }

    /// A Session was deleted: whoever is connected by it hears so now.
    pub fn delete(&self, session: &Session) {
        if let Some(name) = object_name(session) {
            self.index().remove(&name);
            self.changed.send_replace(());
        }
    }

    /// Namespace, name and uid of the Sessions that ended at least `ago` before now and were left behind.
    pub fn expired(&self, ago: Duration) -> Vec<(Arc<str>, Arc<str>, String)> {
        let index = self.index();
        let long_over = index
            .by_name
            .values()
            .filter(|session| match session.standing() {
                Standing::Until(deadline) => deadline.elapsed() >= ago && deadline < Instant::now(),
                Standing::TooLong | Standing::Deleted => false,
            });
        long_over
            .map(|session| {
                (
                    session.namespace.clone(),
                    session.name.clone(),
                    session.uid.clone(),
                )
            })
            .collect()
    }

    /// How many Sessions there are.
    pub fn len(&self) -> usize {
        self.index().by_name.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Index {
    fn insert(&mut self, name: ObjectName, session: &Session, standing: Standing) {
        let Ok(key) = session.spec.key_hash.parse() else {
            return;
        };
        let live = Arc::new(LiveSession {
            namespace: Arc::clone(&name.0),
            name: Arc::clone(&name.1),
            uid: session.metadata.uid.clone().unwrap_or_default(),
            user: Arc::new(User {
                name: session.spec.user.clone(),
                groups: session.spec.groups.clone(),
            }),
            key,
            created: session
                .metadata
                .creation_timestamp
                .as_ref()
                .map_or(Timestamp::MAX, |time| time.0),
            standing: watch::channel(standing).0,
            replica: Mutex::new(Replica {
                name: replica(session),
                since: Instant::now(),
            }),
        });
        self.by_key.entry(key).or_default().push(Arc::clone(&live));
        self.by_name.insert(name, live);
    }

    fn remove(&mut self, name: &ObjectName) {
        let Some(session) = self.by_name.remove(name) else {
            return;
        };
        session.standing.send_replace(Standing::Deleted);
        if let Some(listing) = self.by_key.get_mut(&session.key) {
            listing.retain(|other| !Arc::ptr_eq(other, &session));
            if listing.is_empty() {
                self.by_key.remove(&session.key);
            }
        }
    }
}

impl LiveSession {
    /// The policy keeps user and key for the life of an object; should they differ, it is another session to us.
    fn is_same(&self, session: &Session) -> bool {
        session.metadata.uid.as_deref() == Some(&self.uid)
            && session.spec.user == self.user.name
            && session.spec.groups == self.user.groups
            && session.spec.key_hash == self.key.to_string()
    }
}

fn object_name(session: &Session) -> Option<ObjectName> {
    let metadata = &session.metadata;
    Some((
        metadata.namespace.as_deref()?.into(),
        metadata.name.as_deref()?.into(),
    ))
}

fn replica(session: &Session) -> Option<String> {
    session.status.as_ref()?.replica.clone()
}

/// Clocks of the API server and of this node may differ.
const CLOCK_LEEWAY: Duration = Duration::from_secs(300);

fn standing(session: &Session, wall: Timestamp) -> Standing {
    if session.metadata.deletion_timestamp.is_some() {
        return Standing::Deleted;
    }
    let ahead = session.spec.expires_at.0.duration_since(wall);
    match Duration::try_from(ahead) {
        Ok(ahead) if ahead > LONGEST_SESSION + CLOCK_LEEWAY => Standing::TooLong,
        Ok(ahead) => Standing::Until(Instant::now() + ahead),
        Err(_) => {
            let ago = ahead.unsigned_abs();
            Standing::Until(Instant::now().checked_sub(ago).unwrap_or_else(Instant::now))
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::SignedDuration;
    use tp_manager_api::{ClientInfo, SessionSpec};
    use tp_tunnel::Identity;

    use super::*;

    fn wall() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    fn session(name: &str, key: KeyHash, seconds_ahead: i64) -> Session {
        let mut session = Session::new(
            name,
            SessionSpec {
                user: "ada".into(),
                groups: vec!["dev".into()],
                key_hash: key.to_string(),
                expires_at: Time(wall() + SignedDuration::from_secs(seconds_ahead)),
                client: ClientInfo::default(),
            },
        );
        session.metadata.namespace = Some("shop".into());
        session.metadata.uid = Some(format!("uid-{name}"));
        session.metadata.creation_timestamp = Some(Time(wall()));
        session
    }

    fn key() -> KeyHash {
        Identity::generate().key_hash()
    }

    #[tokio::test(start_paused = true)]
    async fn a_listed_key_is_admitted_until_its_session_expires() {
        let (table, key) = (SessionTable::default(), key());
        table.apply(&session("a", key, 600), wall());

        let live = table.admit(key).await.unwrap();
        assert_eq!((&*live.namespace, live.user.name.as_str()), ("shop", "ada"));

        let started = Instant::now();
        assert_eq!(live.ended().await, NotAdmitted::Expired);
        assert_eq!(started.elapsed().as_secs(), 600);
        assert_eq!(table.admit(key).await.unwrap_err(), NotAdmitted::Expired);
    }

    #[tokio::test(start_paused = true)]
    async fn renewing_goes_on_and_deleting_ends_at_once() {
        let (table, key) = (Arc::new(SessionTable::default()), key());
        table.apply(&session("a", key, 600), wall());
        let live = table.admit(key).await.unwrap();
        let ended = tokio::spawn(async move { live.ended().await });

        tokio::time::sleep(Duration::from_secs(599)).await;
        table.apply(
            &session("a", key, 1200),
            wall() + SignedDuration::from_secs(599),
        );
        tokio::time::sleep(Duration::from_secs(500)).await;
        assert!(!ended.is_finished());

        let before = Instant::now();
        table.delete(&session("a", key, 1200));
        assert_eq!(ended.await.unwrap(), NotAdmitted::Deleted);
        assert_eq!(before.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_key_waits_two_seconds_for_the_watch() {
        let (table, late, never) = (Arc::new(SessionTable::default()), key(), key());
        let writer = Arc::clone(&table);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            writer.apply(&session("late", late, 600), wall());
        });

        assert!(table.admit(late).await.is_ok());
        let started = Instant::now();
        assert_eq!(table.admit(never).await.unwrap_err(), NotAdmitted::Unknown);
        assert_eq!(started.elapsed(), SessionTable::PATIENCE);
    }

    #[tokio::test(start_paused = true)]
    async fn more_than_an_hour_ahead_is_refused_and_expired_is_not_waited_for() {
        let (table, long, old) = (SessionTable::default(), key(), key());
        table.apply(&session("long", long, 3600 + 301), wall());
        table.apply(&session("old", old, -1), wall());

        let started = Instant::now();
        assert_eq!(table.admit(long).await.unwrap_err(), NotAdmitted::TooLong);
        assert_eq!(table.admit(old).await.unwrap_err(), NotAdmitted::Expired);
        assert_eq!(started.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_new_list_does_not_show_is_gone() {
        let (table, kept, lost) = (SessionTable::default(), key(), key());
        table.apply(&session("kept", kept, 600), wall());
        table.apply(&session("lost", lost, 600), wall());
        let (kept_live, lost_live) = (
            table.admit(kept).await.unwrap(),
            table.admit(lost).await.unwrap(),
        );

        table.begin_list();
        table.apply(&session("kept", kept, 600), wall());
        table.end_list();

        assert_eq!(lost_live.ended().await, NotAdmitted::Deleted);
        assert!(
            timeout(Duration::from_secs(1), kept_live.ended())
                .await
                .is_err()
        );
        assert_eq!(table.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_copied_key_hash_stays_with_its_first_writer() {
        let (table, key) = (SessionTable::default(), key());
        table.apply(&session("ada", key, 600), wall());
        let mut copy = session("copy", key, 600);
        copy.spec.user = "mallory".into();
        copy.metadata.namespace = Some("mallory".into());
        copy.metadata.creation_timestamp = Some(Time(wall() + SignedDuration::from_secs(5)));
        table.apply(&copy, wall());

        assert_eq!(table.admit(key).await.unwrap().user.name, "ada");
    }

    #[tokio::test(start_paused = true)]
    async fn a_copy_made_within_the_second_admits_nobody() {
        let (table, key) = (SessionTable::default(), key());
        table.apply(&session("ada", key, 600), wall());
        // Sorts before the original by name and uid.
        let mut copy = session("a", key, 600);
        copy.spec.user = "mallory".into();
        copy.metadata.namespace = Some("mallory".into());
        table.apply(&copy, wall());

        assert_eq!(table.admit(key).await.unwrap_err(), NotAdmitted::Ambiguous);
        table.delete(&copy);
        assert_eq!(table.admit(key).await.unwrap().user.name, "ada");
    }

    #[tokio::test(start_paused = true)]
    async fn sessions_left_behind_are_found_some_time_after_their_end() {
        let (table, key) = (SessionTable::default(), key());
        table.apply(&session("a", key, 60), wall());
        let ago = Duration::from_secs(600);

        tokio::time::sleep(Duration::from_secs(61)).await;
        assert!(table.expired(ago).is_empty());
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert_eq!(table.expired(ago).len(), 1);
    }
}
