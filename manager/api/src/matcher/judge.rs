//! Matchers against a request: one answer for the router, one finding a matcher for whoever asks why.

use serde::{Deserialize, Serialize};

use super::graphql::Operation;
use super::text::Pattern;
use super::{Grpc, Matcher, MatcherError, Matchers, NAME_MAX, NamedText, RequestHead};
use super::{grpc, members};

/// What the matchers of one intercept say of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All match.
    Mine,
    /// At least one does not.
    NotMine,
    /// The head alone matches; the operation in the body decides.
    NeedsBody,
}

/// What one matcher says of a request. Holds no value of the request: those may be secrets.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// The matcher.
    pub matcher: Matcher,
    /// Its answer.
    pub outcome: Outcome,
}

/// The answer of one matcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// It matches.
    Matches,
    /// What it looks at is there and has another value.
    Differs,
    /// What it looks at is not there.
    Absent,
    /// It needs the body.
    NeedsBody,
}

/// One matcher, ready to run.
#[derive(Clone, Debug)]
pub(super) struct Compiled {
    /// Its place in the canonical order.
    place: usize,
    check: Check,
}

#[derive(Clone, Debug)]
enum Check {
    Header(Box<str>, Pattern),
    Path(Pattern),
    Method(Box<str>),
    Query(Box<str>, Pattern),
    Cookie(Box<str>, Pattern),
    Baggage(Box<str>, Pattern),
    Tracestate(Box<str>, Pattern),
    Grpc(Grpc),
    Graphql(Box<str>),
}

impl Matchers {
    /// Whether all match. `body` is what [`Operation::of_body`] found, or `None` while the body has not been read; then
    /// the answer may be [`Verdict::NeedsBody`]. Who cannot read it passes `Some(&Operation::default())`.
    pub fn matches(&self, head: &RequestHead<'_>, body: Option<&Operation>) -> Verdict {
        for matcher in &self.compiled {
            match matcher.check(head, body) {
                Outcome::Matches => {}
                Outcome::Differs | Outcome::Absent => return Verdict::NotMine,
                // The costly ones come last, so everything else has matched.
                Outcome::NeedsBody => return Verdict::NeedsBody,
            }
        }
        Verdict::Mine
    }

    /// What each matcher says, in canonical order.
    pub fn explain(&self, head: &RequestHead<'_>, body: Option<&Operation>) -> Vec<Finding> {
        let mut findings: Vec<_> = self
            .compiled
            .iter()
            .map(|matcher| (matcher.place, matcher.check(head, body)))
            .collect();
        findings.sort_by_key(|(place, _)| *place);
        self.canonical
            .iter()
            .zip(findings)
            .map(|(matcher, (_, outcome))| Finding {
                matcher: matcher.clone(),
                outcome,
            })
            .collect()
    }
}

impl Compiled {
    pub(super) fn try_new(place: usize, matcher: &Matcher) -> Result<Self, MatcherError> {
        let named = |named: &NamedText, kind: &'static str| {
            checked_name(&named.name, kind)?;
            let pattern = Pattern::try_new(&named.value, &format!("{kind} {}", named.name))?;
            Ok((named.name.as_str().into(), pattern))
        };
        let check = match matcher {
            Matcher::Header(header) => {
                header_name(&header.name)?;
                let (name, pattern) = named(header, "header")?;
                Check::Header(name, pattern)
            }
            Matcher::Path(path) => Check::Path(Pattern::try_new(path, "path")?),
            Matcher::Method(method) => {
                match method.len() <= 32 && method.bytes().all(is_token) && !method.is_empty() {
                    true => Check::Method(method.as_str().into()),
                    false => return Err(MatcherError::Name(method.clone(), "method")),
                }
            }
            Matcher::Query(query) => {
                let (name, pattern) = named(query, "query")?;
                Check::Query(name, pattern)
            }
            Matcher::Cookie(cookie) => {
                let (name, pattern) = named(cookie, "cookie")?;
                Check::Cookie(name, pattern)
            }
            Matcher::Baggage(member) => {
                let (name, pattern) = named(member, "baggage")?;
                Check::Baggage(name, pattern)
            }
            Matcher::Tracestate(member) => {
                let (name, pattern) = named(member, "tracestate")?;
                Check::Tracestate(name, pattern)
            }
            Matcher::Grpc(Grpc {
                service: None,
                method: None,
            }) => return Err(MatcherError::Grpc),
            Matcher::Grpc(grpc) => {
                for part in [&grpc.service, &grpc.method].into_iter().flatten() {
                    checked_name(part, "grpc")?;
                }
                Check::Grpc(grpc.clone())
            }
            Matcher::Graphql(graphql) => {
                checked_name(&graphql.operation, "graphql")?;
                Check::Graphql(graphql.operation.as_str().into())
            }
        };
        Ok(Self { place, check })
    }

    /// Order in which matchers run: what a look decides first, what needs decoding next, the body last.
    pub(super) fn cost(&self) -> u8 {
        match &self.check {
            Check::Method(_) => 0,
            Check::Header(_, pattern) | Check::Path(pattern) => match pattern {
                Pattern::Exact(_) | Pattern::Prefix(_) => 1,
                Pattern::Regex(_) => 3,
            },
            Check::Grpc(_) => 2,
            Check::Query(..) | Check::Cookie(..) | Check::Baggage(..) | Check::Tracestate(..) => 4,
            Check::Graphql(_) => 5,
        }
    }

    fn check(&self, head: &RequestHead<'_>, body: Option<&Operation>) -> Outcome {
        match &self.check {
            Check::Header(name, pattern) => {
                any(head.values(name).map(|value| pattern.matches(value)))
            }
            Check::Path(pattern) => one(pattern.matches(head.path)),
            Check::Method(method) => one(**method == *head.method),
            Check::Query(name, pattern) => any(head
                .query
                .into_iter()
                .flat_map(members::query)
                .filter(|(found, _)| **found == *name.as_bytes())
                .map(|(_, value)| pattern.matches(&value))),
            Check::Cookie(name, pattern) => any(head
                .values("cookie")
                .flat_map(members::cookies)
                .filter(|(found, _)| *found == name.as_bytes())
                .map(|(_, value)| pattern.matches(value))),
            Check::Baggage(name, pattern) => any(head
                .values("baggage")
                .flat_map(members::baggage)
                .filter(|(found, _)| *found == name.as_bytes())
                .map(|(_, value)| pattern.matches(&value))),
            Check::Tracestate(name, pattern) => any(head
                .values("tracestate")
                .flat_map(members::tracestate)
                .filter(|(found, _)| *found == name.as_bytes())
                .map(|(_, value)| pattern.matches(value))),
            Check::Grpc(grpc) => grpc::matches(grpc, head).map_or(Outcome::Absent, one),
            Check::Graphql(operation) => graphql(operation, head, body),
        }
    }
}

fn one(matches: bool) -> Outcome {
    match matches {
        true => Outcome::Matches,
        false => Outcome::Differs,
    }
}

/// Of several values one is enough.
fn any(values: impl Iterator<Item = bool>) -> Outcome {
    let mut outcome = Outcome::Absent;
    for matches in values {
        match matches {
            true => return Outcome::Matches,
            false => outcome = Outcome::Differs,
        }
    }
    outcome
}

fn graphql(wanted: &str, head: &RequestHead<'_>, body: Option<&Operation>) -> Outcome {
    let named = |operation: &Operation| {
        operation
            .name()
            .map_or(Outcome::Absent, |name| one(name == wanted))
    };
    match (head.method, body) {
        ("GET", _) => {
            let parameter = |wanted: &[u8]| {
                let mut all = head.query.into_iter().flat_map(members::query);
                all.find_map(|(name, value)| (*name == *wanted).then_some(value))
            };
            named(&Operation::of_parameters(
                parameter(b"operationName").as_deref(),
                parameter(b"query").as_deref(),
            ))
        }
        ("POST", _) if !is_graphql_body(head) => Outcome::Absent,
        ("POST", None) => Outcome::NeedsBody,
        ("POST", Some(operation)) => named(operation),
        _ => Outcome::Absent,
    }
}

fn is_graphql_body(head: &RequestHead<'_>) -> bool {
    ["application/json", "application/graphql"]
        .iter()
        .any(|kind| head.has_content_type(kind))
}

/// Headers that must not choose where a request goes.
const FORBIDDEN: [&str; 13] = [
    "authorization",
    "connection",
    "content-length",
    "cookie",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

fn header_name(name: &str) -> Result<(), MatcherError> {
    if FORBIDDEN.contains(&name) {
        return Err(MatcherError::Forbidden(name.to_owned()));
    }
    // Servers disagree on whether `a_b` is `a-b`.
    match name.contains('_') {
        true => Err(MatcherError::Name(name.to_owned(), "header")),
        false => Ok(()),
    }
}

fn checked_name(name: &str, kind: &'static str) -> Result<(), MatcherError> {
    let valid = |byte: u8| match kind {
        "query" => (0x20..0x7f).contains(&byte) || byte >= 0x80,
        "grpc" => byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'/'),
        "tracestate" => is_token(byte) || matches!(byte, b'@' | b'/'),
        _ => is_token(byte),
    };
    match name.len() {
        0 => Err(MatcherError::Name(name.to_owned(), kind)),
        size if size > NAME_MAX => Err(MatcherError::TooLong {
            matcher: kind.to_owned(),
            size,
            max: NAME_MAX,
        }),
        _ if name.bytes().all(valid) => Ok(()),
        _ => Err(MatcherError::Name(name.to_owned(), kind)),
    }
}

/// `tchar` of RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}
