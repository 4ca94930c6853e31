//! What a user may reach, as RBAC says.
//!
//! Every question is a SubjectAccessReview for the user and the groups of the Session; answers, also refusals, are kept
//! for a minute. While the API server cannot be asked the last answer stands: flows that were permitted go on, and
//! nothing becomes permitted that was not. Knows neither sessions nor addresses.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::Instant;
use tp_manager_api::{EGRESS, GROUP, INTERCEPTS, SESSIONS};

/// Whose rights are asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct User {
    /// As the API server knows it.
    pub name: String,
    /// Groups, as the API server knows them.
    pub groups: Vec<String>,
}

/// Something RBAC can grant.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Right {
    /// Reach Services and pods of a namespace.
    Namespace(Arc<str>),
    /// Reach those of all namespaces, as one grant for the whole cluster.
    EveryNamespace,
    /// Leave the cluster, granted in the namespace of the session.
    Egress(Arc<str>),
    /// Divert requests of a namespace's workloads.
    Intercepts(Arc<str>),
}

impl Right {
    /// Resource and subresource of the review; the verb is always `create`.
    pub fn resource(&self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::Namespace(_) | Self::EveryNamespace => (SESSIONS, None),
            Self::Egress(_) => (SESSIONS, Some(EGRESS)),
            Self::Intercepts(_) => (INTERCEPTS, None),
        }
    }

    /// Namespace of the review; empty for all.
    pub fn namespace(&self) -> &str {
        match self {
            Self::Namespace(namespace) | Self::Egress(namespace) | Self::Intercepts(namespace) => {
                namespace
            }
            Self::EveryNamespace => "",
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespace(namespace) => {
                write!(f, "create {SESSIONS}.{GROUP} in namespace {namespace}")
            }
            Self::Intercepts(namespace) => {
                write!(f, "create {INTERCEPTS}.{GROUP} in namespace {namespace}")
            }
            Self::EveryNamespace => write!(f, "create {SESSIONS}.{GROUP} in all namespaces"),
            Self::Egress(namespace) => write!(
                f,
                "create {SESSIONS}.{GROUP}/{EGRESS} in namespace {namespace}"
            ),
        }
    }
}

/// The API server could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("the API server could not be asked: {0}")]
pub struct Unavailable(pub String);

/// Who is asked. One in the product; another in tests.
pub trait Reviewer: Send + Sync + 'static {
    /// Asks whether the user has the right, now.
    fn review<'a>(
        &'a self,
        user: &'a User,
        right: &'a Right,
    ) -> BoxFuture<'a, Result<bool, Unavailable>>;
}

/// Answers for everyone, with a memory.
pub struct Rights {
    reviewer: Box<dyn Reviewer>,
    answers: Mutex<HashMap<(Arc<User>, Right), Answer>>,
}

#[derive(Clone, Copy)]
struct Answer {
    allowed: bool,
    at: Instant,
}

impl Rights {
    /// How long an answer stands.
    pub const KEPT: Duration = Duration::from_secs(60);

    /// Asks `reviewer` what it does not remember.
    pub fn new(reviewer: impl Reviewer) -> Self {
        Self {
            reviewer: Box::new(reviewer),
            answers: Mutex::default(),
        }
    }

    /// Whether the user has the right, by an answer of at most [`Self::KEPT`] ago.
    pub async fn allows(&self, user: &Arc<User>, right: &Right) -> Result<bool, Unavailable> {
        self.allows_within(user, right, Self::KEPT).await
    }

    /// Whether the user has the right, by an answer not older than `age`; by an older one when nobody can be asked.
    pub async fn allows_within(
        &self,
        user: &Arc<User>,
        right: &Right,
        age: Duration,
    ) -> Result<bool, Unavailable> {
        let known = self.known(user, right);
        if let Some(answer) = known.filter(|answer| answer.at.elapsed() < age) {
            return Ok(answer.allowed);
        }
        match self.reviewer.review(user, right).await {
            Ok(allowed) => {
                self.remember(user, right, allowed);
                Ok(allowed)
            }
            Err(error) => known.map(|answer| answer.allowed).ok_or(error),
        }
    }

    /// The last answer, without asking.
    pub fn remembered(&self, user: &Arc<User>, right: &Right) -> Option<bool> {
        self.known(user, right).map(|answer| answer.allowed)
    }

    fn known(&self, user: &Arc<User>, right: &Right) -> Option<Answer> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.get(&(Arc::clone(user), right.clone())).copied()
    }

    fn remember(&self, user: &Arc<User>, right: &Right, allowed: bool) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.len() >= MOST_ANSWERS {
            answers.retain(|_, answer| answer.at.elapsed() < Self::KEPT);
        }
        let question = (Arc::clone(user), right.clone());
        // An answer that is known is always replaced: an old one would stand while the API server is away.
        if answers.len() < MOST_ANSWERS || answers.contains_key(&question) {
            let at = Instant::now();
            answers.insert(question, Answer { allowed, at });
        }
    }
}

/// Some 200 bytes each: 100 users of 300 namespaces. Beyond it the API server is asked each time.
const MOST_ANSWERS: usize = 32 * 1024;

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::SeqCst};

    use super::*;

    /// Answers for user `ada` in namespace `shop` by a switch: 0 no, 1 yes, 2 unreachable. Counts the questions.
    #[derive(Clone, Default)]
    struct Switch(Arc<(AtomicU8, AtomicUsize)>);

    impl Reviewer for Switch {
        fn review<'a>(
            &'a self,
            user: &'a User,
            right: &'a Right,
        ) -> BoxFuture<'a, Result<bool, Unavailable>> {
            self.0.1.fetch_add(1, SeqCst);
            let own = user.name == "ada" && right.namespace() == "shop";
            Box::pin(async move {
                match self.0.0.load(SeqCst) {
                    2 => Err(Unavailable("connection refused".into())),
                    on => Ok(on == 1 && own),
                }
            })
        }
    }

    fn setting() -> (Switch, Rights, Arc<User>, Right) {
        let switch = Switch::default();
        switch.0.0.store(1, SeqCst);
        let ada = Arc::new(User {
            name: "ada".into(),
            groups: vec!["dev".into()],
        });
        (
            switch.clone(),
            Rights::new(switch),
            ada,
            Right::Namespace("shop".into()),
        )
    }

    #[tokio::test(start_paused = true)]
    async fn two_users_and_two_namespaces_are_told_apart() {
        let (_switch, rights, ada, shop) = setting();
        let bob = Arc::new(User {
            name: "bob".into(),
            groups: vec!["dev".into()],
        });
        let bank = Right::Namespace("bank".into());

        assert!(rights.allows(&ada, &shop).await.unwrap());
        assert!(!rights.allows(&bob, &shop).await.unwrap());
        assert!(!rights.allows(&ada, &bank).await.unwrap());
        assert!(!rights.allows(&bob, &bank).await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn answers_of_both_kinds_stand_for_a_minute() {
        let (switch, rights, ada, shop) = setting();
        let bank = Right::Namespace("bank".into());
        for _ in 0..5 {
            assert!(rights.allows(&ada, &shop).await.unwrap());
            assert!(!rights.allows(&ada, &bank).await.unwrap());
        }
        assert_eq!(switch.0.1.load(SeqCst), 2);

        switch.0.0.store(0, SeqCst);
        tokio::time::advance(Duration::from_secs(59)).await;
        assert!(rights.allows(&ada, &shop).await.unwrap());
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(!rights.allows(&ada, &shop).await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn without_an_api_server_the_last_answer_stands_and_nothing_new_is_permitted() {
        let (switch, rights, ada, shop) = setting();
        assert!(rights.allows(&ada, &shop).await.unwrap());

        switch.0.0.store(2, SeqCst);
        tokio::time::advance(Duration::from_secs(600)).await;

        assert!(rights.allows(&ada, &shop).await.unwrap());
        assert!(
            rights
                .allows(&ada, &Right::Egress("shop".into()))
                .await
                .is_err()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_memory_still_forgets_a_right_that_is_gone() {
        let (switch, rights, ada, shop) = setting();
        assert!(rights.allows(&ada, &shop).await.unwrap());
        for number in 0..MOST_ANSWERS {
            rights.remember(&ada, &Right::Egress(number.to_string().into()), false);
        }

        switch.0.0.store(0, SeqCst);
        let asked_anew = Duration::ZERO;
        assert!(!rights.allows_within(&ada, &shop, asked_anew).await.unwrap());

        assert_eq!(rights.remembered(&ada, &shop), Some(false));
    }

    #[test]
    fn a_right_names_verb_resource_and_namespace() {
        assert_eq!(
            Right::Namespace("b".into()).to_string(),
            "create sessions.tp.dev in namespace b"
        );
        assert_eq!(
            Right::Egress("a".into()).to_string(),
            "create sessions.tp.dev/egress in namespace a"
        );
    }
}
