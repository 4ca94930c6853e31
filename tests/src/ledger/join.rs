//! The join: what became of each request, from what both ends wrote down.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use super::plan::Id;
use super::record::{Event, Record};

/// What became of one request. Where two are true, the later one in this list is what it counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Answered once, wholly, by who should.
    Ok,
    /// Ended with an error that its client was told in time, and was executed at most once.
    CleanError,
    /// Neither answer nor error within the deadline.
    Hung,
    /// Answered as if all were well by a server that never had it.
    SilentLoss,
    /// Executed more than once.
    Duplicate,
    /// Went to somebody it was not for.
    Misrouted,
    /// A byte of request or reply was another.
    Corrupt,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Ok,
        Self::CleanError,
        Self::Hung,
        Self::SilentLoss,
        Self::Duplicate,
        Self::Misrouted,
        Self::Corrupt,
    ];
}

/// Who should have answered, and how soon.
#[derive(Clone, Debug)]
pub struct Expectation {
    /// Instance that requests with the intercept's header are for.
    pub mine: String,
    /// Instance that all others are for.
    pub others: String,
    /// From sending to answer or error.
    pub deadline: Duration,
    /// Times of sending, in milliseconds since 1970, at which `others` may answer mine too, because the intercept is on
    /// its way in or out or its workstation is away. Never the other way round.
    pub excused: Vec<Range<u64>>,
}

/// One request that did not end well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Which.
    pub id: Id,
    /// What became of it.
    pub class: Class,
    /// What the ledgers say about it, in the order of time.
    pub records: Vec<Record>,
}

/// The result of a join.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// How many requests ended in which class.
    pub counts: BTreeMap<Class, u64>,
    /// Mine that the application answered in the workstation's place, and said so; they are in `counts` too.
    pub fallbacks: u64,
    /// Mine that the workstation answered.
    pub mine: u64,
    /// Mine that ended with an error, and with which.
    pub mine_failed: Vec<(Id, String)>,
    /// Requests that a server got after their client had been told of an error: nobody waits for their effect any more.
    pub stale: Vec<Id>,
    /// The others' request that took longest, and how long.
    pub slowest_other: Option<(Duration, Id)>,
    /// All that were not [`Class::Ok`].
    pub findings: Vec<Finding>,
}

impl Report {
    /// How many requests ended so.
    pub fn count(&self, class: Class) -> u64 {
        self.counts.get(&class).copied().unwrap_or(0)
    }

    /// Clean errors of requests that were sent after that time, in milliseconds since 1970.
    fn errors_after(&self, time: u64) -> Vec<&Finding> {
        let errors = self.findings.iter();
        errors
            .filter(|finding| finding.class == Class::CleanError)
            .filter(|finding| finding.records[0].at > time)
            .collect()
    }

    /// Panics if a request that was sent after that time ended with an error, and says what became of it.
    #[track_caller]
    pub fn assert_no_error_after(&self, seed: u64, time: u64) {
        let late = self.errors_after(time);
        let few: Vec<_> = late.iter().take(3).collect();
        assert!(
            late.is_empty(),
            "seed {seed}: {} errors of requests sent after {time}\n{few:#?}",
            late.len()
        );
    }

    /// The gate of every scenario: nothing lost, doubled, misrouted, damaged or hung, and at most so many clean errors.
    /// Panics with the first findings and with what to repeat it by.
    #[track_caller]
    pub fn assert_clean(&self, seed: u64, clean_errors: u64) {
        let forbidden = self
            .findings
            .iter()
            .filter(|finding| finding.class != Class::CleanError);
        let bad: Vec<_> = forbidden.take(5).collect();
        let errors = self.count(Class::CleanError);
        assert!(
            bad.is_empty() && errors <= clean_errors,
            "seed {seed}: {:?}, {clean_errors} clean errors allowed\n{bad:#?}\n{:#?}",
            self.counts,
            self.findings
                .iter()
                .filter(|finding| finding.class == Class::CleanError)
                .take(3)
                .collect::<Vec<_>>(),
        );
    }
}

/// Joins the ledgers of one run, in any order.
pub fn join(records: impl IntoIterator<Item = Record>, expected: &Expectation) -> Report {
    let mut requests: BTreeMap<Id, Vec<Record>> = BTreeMap::new();
    for record in records {
        requests.entry(record.id).or_default().push(record);
    }
    let mut report = Report::default();
    for (id, mut records) in requests {
        // Stable: what one process wrote within a millisecond stays in its order.
        records.sort_by_key(|record| record.at);
        let request = Request::of(&records);
        let class = request.class(expected);
        *report.counts.entry(class).or_default() += 1;
        report.fallbacks += u64::from(request.fallback());
        report.mine += u64::from(request.answered_by(&expected.mine));
        if let Some((_, error)) = request.failed.filter(|_| request.is_mine()) {
            report.mine_failed.push((id, error.to_owned()));
        }
        if request.stale() {
            report.stale.push(id);
        }
        if let Some(took) = request.took().filter(|_| !request.is_mine()) {
            report.slowest_other = report.slowest_other.max(Some((took, id)));
        }
        if class != Class::Ok {
            report.findings.push(Finding { id, class, records });
        }
    }
    report
}

/// One request's lines, sorted by what they say.
#[derive(Default)]
struct Request<'a> {
    sent: Option<(u64, bool)>,
    answer: Option<(u64, &'a str, bool, bool)>,
    failed: Option<(u64, &'a str)>,
    received: Vec<(&'a str, bool)>,
    received_last: Option<u64>,
}

/// What was written down later by so many milliseconds than an error happened after it: the processes of a run share a
/// clock, and not a processor.
const LATER: u64 = 500;

impl<'a> Request<'a> {
    fn of(records: &'a [Record]) -> Self {
        let mut request = Self::default();
        for record in records {
            match &record.event {
                Event::Sent { mine } => request.sent = Some((record.at, *mine)),
                Event::Answered {
                    instance,
                    fallback,
                    intact,
                } => {
                    request.answer = Some((record.at, instance, *fallback, *intact));
                }
                Event::Failed { error } => request.failed = Some((record.at, error)),
                Event::Received { instance, intact } => {
                    request.received.push((instance, *intact));
                    request.received_last = Some(record.at);
                }
            }
        }
        request
    }

    fn is_mine(&self) -> bool {
        self.sent.is_some_and(|(_, mine)| mine)
    }

    fn stale(&self) -> bool {
        let told = self.failed.zip(self.received_last);
        told.is_some_and(|((failed, _), received)| received > failed + LATER)
    }

    fn took(&self) -> Option<Duration> {
        let answered = self.answer.map(|(at, ..)| at)?;
        let (sent, _) = self.sent?;
        Some(Duration::from_millis(answered.saturating_sub(sent)))
    }

    fn fallback(&self) -> bool {
        self.answer.is_some_and(|(_, _, fallback, _)| fallback)
    }

    fn answered_by(&self, instance: &str) -> bool {
        self.answer.is_some_and(|(_, by, _, _)| by == instance)
    }

    fn class(&self, expected: &Expectation) -> Class {
        let checks = [
            (Class::Corrupt, self.corrupt()),
            (Class::Misrouted, self.misrouted(expected)),
            (Class::Duplicate, self.received.len() > 1),
            (Class::SilentLoss, self.lost()),
            (Class::Hung, self.hung(expected)),
            (Class::CleanError, self.failed.is_some()),
        ];
        let first = checks.into_iter().find(|(_, holds)| *holds);
        first.map_or(Class::Ok, |(class, _)| class)
    }

    fn corrupt(&self) -> bool {
        self.answer.is_some_and(|(_, _, _, intact)| !intact)
            || self.received.iter().any(|(_, intact)| !intact)
            // A request that nobody sent can only be another one's number.
            || self.sent.is_none()
    }

    fn misrouted(&self, expected: &Expectation) -> bool {
        let Some((sent, mine)) = self.sent else {
            return false;
        };
        let excused = self.fallback() || expected.excused.iter().any(|range| range.contains(&sent));
        let answered = self.answer.map(|(_, instance, _, _)| instance);
        self.received
            .iter()
            .map(|(instance, _)| *instance)
            .chain(answered)
            .any(|instance| {
                let right = if mine {
                    &expected.mine
                } else {
                    &expected.others
                };
                instance != right && !(mine && instance == expected.others && excused)
            })
    }

    fn lost(&self) -> bool {
        self.answer
            .is_some_and(|(_, by, _, _)| !self.received.iter().any(|(instance, _)| *instance == by))
    }

    fn hung(&self, expected: &Expectation) -> bool {
        let Some((sent, _)) = self.sent else {
            return false;
        };
        let over = self
            .answer
            .map(|(at, ..)| at)
            .or(self.failed.map(|(at, _)| at));
        over.is_none_or(|at| u128::from(at.saturating_sub(sent)) > expected.deadline.as_millis())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expectation() -> Expectation {
        Expectation {
            mine: "laptop".into(),
            others: "app".into(),
            deadline: Duration::from_secs(10),
            excused: vec![100..110, 500..600],
        }
    }

    fn sent(at: u64, mine: bool) -> (u64, Event) {
        (at, Event::Sent { mine })
    }

    fn answered(at: u64, instance: &str) -> (u64, Event) {
        (
            at,
            Event::Answered {
                instance: instance.into(),
                fallback: false,
                intact: true,
            },
        )
    }

    fn fell_back(at: u64) -> (u64, Event) {
        (
            at,
            Event::Answered {
                instance: "app".into(),
                fallback: true,
                intact: true,
            },
        )
    }

    fn received(at: u64, instance: &str) -> (u64, Event) {
        (
            at,
            Event::Received {
                instance: instance.into(),
                intact: true,
            },
        )
    }

    fn failed(at: u64) -> (u64, Event) {
        (
            at,
            Event::Failed {
                error: "502".into(),
            },
        )
    }

    fn classify(events: Vec<(u64, Event)>) -> Class {
        let id = Id { flow: 0, seq: 0 };
        let records = events
            .into_iter()
            .map(|(at, event)| Record { id, at, event });
        let report = join(records, &expectation());
        *report.counts.keys().next().unwrap()
    }

    #[test]
    fn every_class_is_found() {
        let damaged_reply = (
            2,
            Event::Answered {
                instance: "app".into(),
                fallback: false,
                intact: false,
            },
        );
        let damaged_request = (
            1,
            Event::Received {
                instance: "app".into(),
                intact: false,
            },
        );
        let table = [
            (
                vec![sent(0, false), received(1, "app"), answered(2, "app")],
                Class::Ok,
            ),
            (
                vec![sent(0, true), received(1, "laptop"), answered(2, "laptop")],
                Class::Ok,
            ),
            // The application in the workstation's place, and said so; or at a time when it may.
            (
                vec![sent(0, true), received(1, "app"), fell_back(2)],
                Class::Ok,
            ),
            (
                vec![sent(550, true), received(551, "app"), answered(552, "app")],
                Class::Ok,
            ),
            (vec![sent(0, true), failed(2)], Class::CleanError),
            (
                vec![sent(0, true), received(1, "laptop"), failed(2)],
                Class::CleanError,
            ),
            (vec![sent(0, true), received(1, "laptop")], Class::Hung),
            (
                vec![sent(0, false), received(1, "app"), answered(10_001, "app")],
                Class::Hung,
            ),
            (vec![sent(0, false), failed(10_001)], Class::Hung),
            (vec![sent(0, false), answered(2, "app")], Class::SilentLoss),
            (
                vec![
                    sent(0, true),
                    received(1, "app"),
                    received(2, "app"),
                    fell_back(3),
                ],
                Class::Duplicate,
            ),
            // Executed at the workstation, then again by the application.
            (
                vec![
                    sent(550, true),
                    received(551, "laptop"),
                    received(552, "app"),
                    fell_back(3),
                ],
                Class::Duplicate,
            ),
            (
                vec![sent(0, true), received(1, "app"), answered(2, "app")],
                Class::Misrouted,
            ),
            (
                vec![sent(0, false), received(1, "laptop"), answered(2, "laptop")],
                Class::Misrouted,
            ),
            (
                vec![sent(550, false), received(551, "laptop"), failed(552)],
                Class::Misrouted,
            ),
            (
                vec![sent(0, false), received(1, "app"), damaged_reply],
                Class::Corrupt,
            ),
            (
                vec![sent(0, false), damaged_request, failed(2)],
                Class::Corrupt,
            ),
            (vec![received(1, "app")], Class::Corrupt),
        ];
        for (events, class) in table {
            assert_eq!(classify(events.clone()), class, "{events:?}");
        }
    }

    #[test]
    fn what_a_server_gets_after_the_error_is_stale() {
        let events = |seq, received_at| {
            let id = Id { flow: 0, seq };
            [sent(0, true), failed(100), received(received_at, "laptop")]
                .map(|(at, event)| Record { id, at, event })
        };
        let records = events(0, 50).into_iter().chain(events(1, 100 + LATER + 1));

        let report = join(records, &expectation());

        assert_eq!(report.stale, [Id { flow: 0, seq: 1 }]);
        assert_eq!(
            (report.mine_failed.len(), report.errors_after(0).len()),
            (2, 0)
        );
    }

    #[test]
    fn one_planted_fault_of_each_class_among_a_thousand_is_found() {
        let plant = |class: Class| match class {
            Class::Ok => vec![sent(0, false), received(1, "app"), answered(2, "app")],
            Class::CleanError => vec![sent(0, false), failed(1)],
            Class::Hung => vec![sent(0, false)],
            Class::SilentLoss => vec![sent(0, false), answered(1, "app")],
            Class::Duplicate => vec![
                sent(0, false),
                received(1, "app"),
                received(2, "app"),
                answered(3, "app"),
            ],
            Class::Misrouted => vec![sent(0, true), received(1, "app"), answered(2, "app")],
            Class::Corrupt => vec![
                sent(0, false),
                (
                    1,
                    Event::Received {
                        instance: "app".into(),
                        intact: false,
                    },
                ),
            ],
        };
        let mut records = Vec::new();
        for seq in 0..1000 {
            let class = Class::ALL
                .get(seq as usize / 100)
                .copied()
                .filter(|_| seq % 100 == 50);
            let id = Id { flow: seq % 7, seq };
            let events = plant(class.unwrap_or(Class::Ok));
            records.extend(
                events
                    .into_iter()
                    .map(|(at, event)| Record { id, at, event }),
            );
        }

        let report = join(records, &expectation());

        for class in Class::ALL.into_iter().skip(1) {
            assert_eq!(report.count(class), 1, "{class:?}");
        }
        assert_eq!(report.count(Class::Ok), 994);
        let found: Vec<_> = report
            .findings
            .iter()
            .map(|finding| finding.id.seq)
            .collect();
        assert_eq!(found.len(), 6);
        assert!(found.iter().all(|seq| seq % 100 == 50), "{found:?}");
        assert!(std::panic::catch_unwind(|| report.assert_clean(0, 1)).is_err());
    }
}
