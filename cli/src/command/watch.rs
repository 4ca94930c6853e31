//! What `tp intercept … --watch` prints: each request that was an intercept's, once it was answered.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tokio_util::task::AbortOnDropHandle;
use tp_manager_api::sighting::{AnsweredBy, Sighting};

use crate::daemon::sightings::Watch;
use crate::report::{self, Failure, Output, escaped};

/// Prints to stdout until the intercept was left, or its connection has ended.
pub(super) async fn print(mut watch: Watch, output: Output) -> Result<(), Failure> {
    while let Some(sighting) = watch.next().await {
        output.print_next(&sighting, || told(&sighting, &TimeZone::system()))?;
    }
    report::note("the intercept has ended");
    Ok(())
}

/// Prints to stderr, beside a command that has stdout, for as long as the result lives.
pub(super) fn print_beside(mut watch: Watch) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(sighting) = watch.next().await {
            report::note_line(&told(&sighting, &TimeZone::system()));
        }
    }))
}

fn told(sighting: &Sighting, zone: &TimeZone) -> String {
    let at = i64::try_from(sighting.at).unwrap_or(i64::MAX);
    let at = Timestamp::from_millisecond(at).unwrap_or_default();
    let time = at.to_zoned(zone.clone()).strftime("%H:%M:%S%.3f");
    let answer = match (sighting.by, sighting.status) {
        (AnsweredBy::Workstation, Some(status)) => format!("{status}"),
        (AnsweredBy::Application, Some(status)) => format!("{status} by the application instead"),
        (AnsweredBy::Nobody, Some(status)) => format!("{status}, the workstation was gone"),
        (_, None) => "no answer".to_owned(),
    };
    let Sighting {
        method,
        target,
        took_ms,
        peer,
        pod,
        ..
    } = sighting;
    escaped(&format!(
        "{time}  {method} {target}  {answer}  {took_ms} ms  from {peer} to {pod}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_says_what_was_asked_and_who_answered() {
        let seen = |by, status| Sighting {
            at: 1_700_000_000_123,
            pod: "web-1".into(),
            peer: [10, 0, 0, 7].into(),
            method: "GET".into(),
            target: "/cart?a=\u{1b}[2J".into(),
            headers: Vec::new(),
            by,
            status,
            took_ms: 12,
        };
        for (by, status, expected) in [
            (AnsweredBy::Workstation, Some(200), "200"),
            (
                AnsweredBy::Application,
                Some(404),
                "404 by the application instead",
            ),
            (
                AnsweredBy::Nobody,
                Some(502),
                "502, the workstation was gone",
            ),
            (AnsweredBy::Nobody, None, "no answer"),
        ] {
            let line = told(&seen(by, status), &TimeZone::UTC);
            let (start, rest) = line.split_at(line.find("  ").unwrap());
            assert_eq!(start, "22:13:20.123");
            assert!(!line.contains('\u{1b}'), "{line}");
            assert!(
                rest.ends_with(&format!("  {expected}  12 ms  from 10.0.0.7 to web-1")),
                "{line}"
            );
        }
    }
}
