//! Which intercepts this replica serves, and what is wrong with those that cannot be.
//!
//! Pure. An intercept belongs to the replica whose name its Session's status holds. Where no replica holds the Session,
//! the first of the ready ones says so, so that nobody waits for an answer that nobody gives.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;
use tp_manager_api::intercept::{Intercept, Reason};
use tp_manager_api::route_table::Protocol;
use tp_manager_api::tls::Handover;

use super::problem::Problem;
use super::secret::secret;
use super::seen::Known;
use super::workstations::{Here, SessionUid};
use super::world::Held;
use crate::sessions::ObjectName;

/// A Session as it matters here.
#[derive(Clone, Debug)]
pub(super) struct SessionView {
    /// Its uid.
    pub(super) uid: SessionUid,
    /// Whose it is.
    pub(super) user: String,
    /// The replica that its status names.
    pub(super) replica: Option<String>,
    /// Since when it does.
    pub(super) since: Instant,
    /// Whether that was only a moment ago ([`HANDOVER`]).
    pub(super) lately: bool,
    /// Whether it is past its end.
    pub(super) over: bool,
    /// Whether its workstation is connected to this replica.
    pub(super) here: Here,
    /// Whether its user has lost the right to intercepts here.
    pub(super) forbidden: bool,
    /// What its workstation read of the Secret that this intercept names.
    pub(super) tls: Option<Handover>,
}

/// How long a replica leaves its routes in agents after the Session has moved on: the next one has yet to connect to
/// them, and until it has, requests would be nobody's but the application's.
pub(super) const HANDOVER: Duration = Duration::from_secs(5);

/// What a replica does for an intercept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Serves,
    /// Another one serves it, and may not have got to the agents yet.
    HandsOver,
    Nothing,
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Replica<'a> {
    /// Name of this pod.
    pub(super) name: &'a str,
    /// The ready pods, in order.
    pub(super) ready: &'a [String],
}

impl Replica<'_> {
    /// Whether this one speaks for what no replica holds.
    pub(super) fn is_first(&self) -> bool {
        self.ready.first().is_some_and(|first| first == self.name)
    }

    /// Whether a Session is this one's to serve or to report on.
    fn part(&self, session: Option<&SessionView>) -> Part {
        let if_first = match self.is_first() {
            true => Part::Serves,
            false => Part::Nothing,
        };
        let Some(session) = session else {
            return if_first;
        };
        let moved_on = match session.lately {
            true => Part::HandsOver,
            false => Part::Nothing,
        };
        match (&session.replica, session.here) {
            (Some(replica), _) if replica == self.name => Part::Serves,
            // It moved on, and what is left here has not noticed.
            (Some(_), Here::Now(since)) if session.since > since => moved_on,
            // The status may be a moment behind; a connection is a fact.
            (_, Here::Now(_)) => Part::Serves,
            (Some(replica), Here::Lately) if self.ready.contains(replica) => moved_on,
            (Some(replica), Here::No) if self.ready.contains(replica) => Part::Nothing,
            (Some(_) | None, Here::Lately | Here::No) => if_first,
        }
    }
}

/// The intercept as this replica serves it; `None` when another one does.
pub(super) fn hold(
    known: &Known,
    session: Option<&SessionView>,
    replica: Replica<'_>,
    others: &[&Intercept],
    now: Timestamp,
) -> Option<(Held, Option<SessionUid>)> {
    let part = replica.part(session);
    if part == Part::Nothing {
        return None;
    }
    let intercept = &known.object;
    if intercept.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let (spec, metadata) = (&intercept.spec, &intercept.metadata);
    let name: ObjectName = (
        Arc::from(metadata.namespace.as_deref()?),
        Arc::from(metadata.name.as_deref()?),
    );
    let problem = wrong(known, session, others).or_else(|| away(session));
    let handover = session.and_then(|session| session.tls.as_ref());
    let (tls, untold) = match secret(intercept, handover, now) {
        Ok(tls) => (tls, None),
        Err(problem) => (None, Some(problem)),
    };
    let held = Held {
        id: metadata.uid.clone()?,
        user: spec.user.clone(),
        created: created(intercept),
        workload: spec.workload.clone(),
        port: spec.port,
        protocol: spec.protocol,
        matchers: known.matchers.clone().unwrap_or_default(),
        strict: spec.strict,
        close_idle: spec.close_idle,
        attach: spec.attach,
        connected: session.is_some_and(|session| matches!(session.here, Here::Now(_))),
        problem: problem.or(untold),
        outgoing: part == Part::HandsOver,
        tls,
        name,
    };
    Some((held, session.map(|session| Arc::clone(&session.uid))))
}

fn created(intercept: &Intercept) -> i64 {
    let time = intercept.metadata.creation_timestamp.as_ref();
    time.map_or(i64::MAX, |time| time.0.as_millisecond())
}

/// What no waiting mends.
fn wrong(known: &Known, session: Option<&SessionView>, others: &[&Intercept]) -> Option<Problem> {
    let intercept = &known.object;
    let spec = &intercept.spec;
    if let Err(error) = &known.matchers {
        let cure = "make another Intercept with matchers that can be used";
        return Some(Problem::lasting(Reason::Matchers, error.to_string(), cure));
    }
    if spec.protocol == Protocol::Udp && !spec.matchers.is_empty() {
        let what = "a datagram is no request that matchers could choose";
        let cure = "make another Intercept without matchers, which takes everything";
        return Some(Problem::lasting(Reason::Matchers, what, cure));
    }
    let name = known.proper_name.as_deref().unwrap_or_default();
    if intercept.metadata.name.as_deref() != Some(name) {
        return Some(Problem::lasting(
            Reason::Name,
            "the object's name is not that of its workload, port and matchers",
            format!("name it {name}, so that the API server can tell it from others"),
        ));
    }
    let session = session.filter(|session| !session.over);
    if session.is_none_or(|session| session.user != spec.user) {
        return Some(Problem::lasting(
            Reason::Session,
            format!("{} has no live Session {:?} here", spec.user, spec.session),
            "connect with `tp connect`, or name the right Session in spec.session",
        ));
    }
    if session.is_some_and(|session| session.forbidden) {
        return Some(Problem::lasting(
            Reason::Forbidden,
            format!("{} may not create intercepts here any more", spec.user),
            "an administrator grants it with the role tp-intercept",
        ));
    }
    let holder = others
        .iter()
        .find(|other| takes_all_before(other, intercept))?;
    Some(Problem::lasting(
        Reason::Conflict,
        format!(
            "{} takes every request to port {} of {}",
            holder.spec.user, spec.port, spec.workload
        ),
        format!(
            "wait for `tp leave {}` of theirs, or ask for one with a header",
            holder.spec.name
        ),
    ))
}

/// The workstation has been gone for longer than a lease.
fn away(session: Option<&SessionView>) -> Option<Problem> {
    let gone = session.is_none_or(|session| session.here == Here::No);
    let what = "the workstation is not connected; the application answers";
    gone.then(|| Problem::passing(Reason::NoWorkstation, what))
}

/// Whether an older intercept of the same port leaves nothing. Equal ages are told apart by uid, as agents do.
fn takes_all_before(other: &Intercept, intercept: &Intercept) -> bool {
    let age = |one: &Intercept| (created(one), one.metadata.uid.clone());
    other.spec.matchers.is_empty()
        && other.metadata.namespace == intercept.metadata.namespace
        && other.spec.workload == intercept.spec.workload
        && other.spec.port == intercept.spec.port
        && other.spec.protocol == intercept.spec.protocol
        && other.is_ready()
        && age(other) < age(intercept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const ADA: SessionViewOf = SessionViewOf {
        user: "ada",
        replica: Some("one"),
        here: Seen::Now,
    };

    #[derive(Clone, Copy)]
    enum Seen {
        Now,
        NowBeforeTheStatus,
        Lately,
        No,
    }

    struct SessionViewOf {
        user: &'static str,
        replica: Option<&'static str>,
        here: Seen,
    }

    impl SessionViewOf {
        fn view(self) -> SessionView {
            let now = Instant::now();
            let later = now + std::time::Duration::from_secs(1);
            SessionView {
                uid: "s".into(),
                user: self.user.into(),
                replica: self.replica.map(str::to_owned),
                since: now,
                lately: false,
                over: false,
                forbidden: false,
                tls: None,
                here: match self.here {
                    Seen::Now => Here::Now(later),
                    Seen::NowBeforeTheStatus => Here::Now(now - std::time::Duration::from_secs(1)),
                    Seen::Lately => Here::Lately,
                    Seen::No => Here::No,
                },
            }
        }
    }

    fn intercept(matchers: serde_json::Value, created: &str, uid: &str) -> Intercept {
        let spec = serde_json::from_value(json!({
            "name": "web", "user": "ada", "session": "tp-1",
            "workload": { "kind": "Deployment", "name": "web" }, "port": 80, "matchers": matchers,
        }))
        .unwrap();
        let mut intercept = Intercept::new("", spec);
        let metadata = json!({
            "name": intercept.spec.object_name().unwrap_or_default(), "namespace": "shop",
            "uid": uid, "creationTimestamp": created,
        });
        intercept.metadata = serde_json::from_value(metadata).unwrap();
        intercept
    }

    fn mine() -> Intercept {
        let header = json!([{ "header": { "name": "x-user", "exact": "ada" } }]);
        intercept(header, "2026-01-01T00:00:01Z", "b")
    }

    fn ready() -> Vec<String> {
        vec!["one".into(), "two".into()]
    }

    fn reason(
        intercept: &Intercept,
        session: Option<SessionView>,
        others: &[&Intercept],
    ) -> Option<Reason> {
        let ready = ready();
        let replica = Replica {
            name: "one",
            ready: &ready,
        };
        let known = Known::new(intercept.clone());
        let (held, _) = hold(&known, session.as_ref(), replica, others, Timestamp::now()).unwrap();
        held.problem.map(|problem| problem.reason)
    }

    #[test]
    fn the_replica_of_the_session_serves_it_and_the_first_one_what_has_none() {
        let ready = ready();
        let served = |name: &str, session: Option<SessionView>| {
            let replica = Replica {
                name,
                ready: &ready,
            };
            hold(
                &Known::new(mine()),
                session.as_ref(),
                replica,
                &[],
                Timestamp::now(),
            )
            .is_some()
        };
        let of = |replica, here| {
            Some(
                SessionViewOf {
                    replica,
                    here,
                    ..ADA
                }
                .view(),
            )
        };

        for (name, session, expected) in [
            ("one", of(Some("one"), Seen::Now), true),
            ("two", of(Some("one"), Seen::No), false),
            // Connected a moment ago; the status is behind.
            ("two", of(Some("one"), Seen::Now), true),
            // It moved to another replica, and its old connection has not ended yet, or has.
            ("one", of(Some("two"), Seen::NowBeforeTheStatus), false),
            ("one", of(Some("one"), Seen::NowBeforeTheStatus), true),
            ("one", of(Some("two"), Seen::Lately), false),
            // It left, and is expected back.
            ("two", of(Some("two"), Seen::Lately), true),
            // Its replica is no more.
            ("one", of(Some("zero"), Seen::No), true),
            ("two", of(Some("zero"), Seen::No), false),
            ("one", None, true),
            ("two", None, false),
        ] {
            assert_eq!(
                served(name, session.clone()),
                expected,
                "{name} {session:?}"
            );
        }
    }

    #[test]
    fn a_replica_that_a_session_has_just_left_keeps_the_routes_for_the_next_one() {
        let ready = ready();
        let outgoing = |here, lately| {
            let replica = Replica {
                name: "one",
                ready: &ready,
            };
            let session = SessionView {
                lately,
                ..SessionViewOf {
                    replica: Some("two"),
                    here,
                    ..ADA
                }
                .view()
            };
            let held = hold(
                &Known::new(mine()),
                Some(&session),
                replica,
                &[],
                Timestamp::now(),
            );
            held.map(|(held, _)| held.outgoing)
        };

        assert_eq!(outgoing(Seen::NowBeforeTheStatus, true), Some(true));
        assert_eq!(outgoing(Seen::Lately, true), Some(true));
        assert_eq!(outgoing(Seen::NowBeforeTheStatus, false), None);
        assert_eq!(outgoing(Seen::Lately, false), None);
        // It never had it.
        assert_eq!(outgoing(Seen::No, true), None);
        assert_eq!(outgoing(Seen::Now, true), Some(false));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(reason(&mine(), Some(ADA.view()), &[]), None);
        assert_eq!(reason(&mine(), None, &[]), Some(Reason::Session));
        let eves = SessionViewOf { user: "eve", ..ADA }.view();
        assert_eq!(reason(&mine(), Some(eves), &[]), Some(Reason::Session));
        let mut over = ADA.view();
        over.over = true;
        assert_eq!(reason(&mine(), Some(over), &[]), Some(Reason::Session));
        let mut revoked = ADA.view();
        revoked.forbidden = true;
        assert_eq!(reason(&mine(), Some(revoked), &[]), Some(Reason::Forbidden));
        let gone = SessionViewOf {
            here: Seen::No,
            ..ADA
        }
        .view();
        assert_eq!(
            reason(&mine(), Some(gone), &[]),
            Some(Reason::NoWorkstation)
        );
        let lately = SessionViewOf {
            here: Seen::Lately,
            ..ADA
        }
        .view();
        assert_eq!(reason(&mine(), Some(lately), &[]), None);
        let mut misnamed = mine();
        misnamed.metadata.name = Some("web".into());
        assert_eq!(reason(&misnamed, Some(ADA.view()), &[]), Some(Reason::Name));
        let host = json!([{ "header": { "name": "host", "exact": "x" } }]);
        let bad = intercept(host, "2026-01-01T00:00:01Z", "b");
        assert_eq!(reason(&bad, Some(ADA.view()), &[]), Some(Reason::Matchers));
    }

    #[test]
    fn an_older_intercept_of_everything_leaves_nothing_to_a_newer_one() {
        let everything = |created, ready: bool| {
            let mut all = intercept(json!([]), created, "a");
            let condition = json!({ "type": "Ready", "status": if ready { "True" } else { "False" }, "reason": "x",
                "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z" });
            all.status = serde_json::from_value(json!({ "conditions": [condition] })).unwrap();
            all
        };
        for (older, expected) in [
            (
                everything("2026-01-01T00:00:00Z", true),
                Some(Reason::Conflict),
            ),
            // Within one second the uid decides.
            (
                everything("2026-01-01T00:00:01Z", true),
                Some(Reason::Conflict),
            ),
            (everything("2026-01-01T00:00:02Z", true), None),
            (everything("2026-01-01T00:00:00Z", false), None),
        ] {
            assert_eq!(reason(&mine(), Some(ADA.view()), &[&older]), expected);
        }
    }
}
