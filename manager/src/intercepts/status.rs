//! A report as the object's status.
//!
//! Pure. The time of a transition stays while the condition's status does, as Kubernetes asks of conditions.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use tp_manager_api::intercept::{
    Intercept, InterceptStatus, PODS_MAX, PodAttachment, READY, Reason,
};

use super::plan::Report;

/// The status to write; `None` when `known` says it all.
pub(super) fn next(
    intercept: &Intercept,
    known: Option<&InterceptStatus>,
    report: &Report,
    replica: &str,
    now: Timestamp,
) -> Option<InterceptStatus> {
    let attached = report.pods.iter().filter(|(_, problem)| problem.is_none());
    let (desired, attached) = (count(report.pods.len()), count(attached.count()));
    let mut status = InterceptStatus {
        replica: Some(replica.to_owned()),
        conditions: vec![condition(intercept, report, attached, now)],
        desired,
        attached,
        open_before: report.open_before,
        pods: report.pods.iter().take(PODS_MAX).map(pod).collect(),
    };
    if let Some(before) = known.and_then(InterceptStatus::ready) {
        let condition = &mut status.conditions[0];
        if before.status == condition.status {
            condition.last_transition_time = before.last_transition_time.clone();
        }
    }
    (known != Some(&status)).then_some(status)
}

fn condition(intercept: &Intercept, report: &Report, attached: u32, now: Timestamp) -> Condition {
    let (status, reason, message) = match &report.problem {
        None => {
            let plural = if attached == 1 { "pod" } else { "pods" };
            let message = format!("attached to {attached} {plural}");
            ("True", Reason::Attached, message)
        }
        Some(problem) => ("False", problem.reason, problem.message()),
    };
    Condition {
        type_: READY.to_owned(),
        status: status.to_owned(),
        reason: reason.to_string(),
        message: bounded(message),
        last_transition_time: Time(now),
        observed_generation: intercept.metadata.generation,
    }
}

fn pod((name, problem): &(std::sync::Arc<str>, Option<super::problem::Problem>)) -> PodAttachment {
    let reason = problem
        .as_ref()
        .map_or(Reason::Attached, |problem| problem.reason);
    PodAttachment {
        name: name.to_string(),
        reason: reason.to_string(),
        message: problem
            .as_ref()
            .map(|problem| bounded(problem.message()))
            .unwrap_or_default(),
    }
}

/// A refusal may quote a whole pod.
const MESSAGE_MAX: usize = 2048;

fn bounded(mut message: String) -> String {
    if let Some((end, _)) = message.char_indices().nth(MESSAGE_MAX) {
        message.truncate(end);
    }
    message
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::problem::Problem;
    use super::*;
    use serde_json::json;

    fn intercept() -> Intercept {
        let spec = json!({
            "name": "web", "user": "ada", "session": "s", "port": 80,
            "workload": { "kind": "Deployment", "name": "web" },
        });
        let mut intercept = Intercept::new("web-1", serde_json::from_value(spec).unwrap());
        intercept.metadata.generation = Some(3);
        intercept
    }

    fn report(problem: Option<Problem>) -> Report {
        Report {
            name: ("shop".into(), "web-1".into()),
            pods: vec![("web-a".into(), None), ("web-b".into(), problem.clone())],
            problem,
            open_before: None,
        }
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn the_time_moves_with_the_status_and_nothing_is_written_twice() {
        let intercept = intercept();
        let waiting = || Problem::passing(Reason::Attaching, "pod web-b: its agent starts");
        let write = |known: Option<&InterceptStatus>, problem, now: &str| {
            next(&intercept, known, &report(problem), "one", at(now))
        };

        let first = write(None, Some(waiting()), "2026-01-01T00:00:00Z").unwrap();
        assert_eq!((first.desired, first.attached), (2, 1));
        assert_eq!(first.ready().unwrap().reason, "Attaching");
        assert_eq!(
            write(Some(&first), Some(waiting()), "2026-01-01T00:00:01Z"),
            None
        );

        let refused = Problem::lasting(Reason::PodSecurity, "refused", "relax it");
        let second = write(Some(&first), Some(refused), "2026-01-01T00:00:02Z").unwrap();
        let ready = second.ready().unwrap();
        assert_eq!(ready.message, "refused\nrelax it");
        assert_eq!(ready.last_transition_time.0, at("2026-01-01T00:00:00Z"));

        let third = write(Some(&second), None, "2026-01-01T00:00:03Z").unwrap();
        let ready = third.ready().unwrap();
        assert_eq!((&*ready.status, &*ready.reason), ("True", "Attached"));
        assert_eq!(ready.last_transition_time.0, at("2026-01-01T00:00:03Z"));
        assert_eq!(ready.observed_generation, Some(3));
    }
}
