//! Whether an intercept does what it was made for, as the manager says in its object.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tp_manager_api::Intercept;
use tp_manager_api::intercept::{InterceptSpec, Reason};

use super::Seen;
use crate::report::Failure;

/// How long it may take while nothing is known to be wrong.
pub(super) const READY_WITHIN: Duration = Duration::from_secs(30);

/// How long the manager may take to say anything of a new one.
pub(super) const HEARD_WITHIN: Duration = Duration::from_secs(5);

/// What an object says of its readiness.
pub(super) enum Readiness {
    Ready,
    /// Nobody has looked at it.
    Unheard,
    /// Waiting may help.
    Waiting(Failure),
    /// Waiting does not help.
    Stuck(Failure),
}

/// Waits until the intercept is ready, or it is known that it will not be. Cancel safe.
pub(super) async fn wait(mut seen_rx: watch::Receiver<Seen>) -> Result<(), Failure> {
    let begun = Instant::now();
    loop {
        let readiness = of(&seen_rx.borrow_and_update());
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

/// Pure.
pub(super) fn of(seen: &Seen) -> Readiness {
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
