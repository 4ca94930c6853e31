//! Which requests are mine: the matchers of an intercept, in the one vocabulary of client, manager and agent.
//!
//! A [`Matcher`] is what a custom resource holds. [`Matchers`] is a list of them that was checked and compiled; all must
//! match. Everything here is pure and takes time linear in the request: patterns run on an engine without
//! backtracking. It knows no connection: whoever parses HTTP fills a [`RequestHead`].

#![cfg_attr(
    feature = "kube",
    expect(
        unreachable_pub,
        reason = "KubeSchema repeats structs inside of functions"
    )
)]

pub mod graphql;
mod grpc;
mod head;
mod judge;
mod members;
mod text;

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use head::RequestHead;
pub use judge::{Finding, Outcome, Verdict};

use judge::Compiled;

/// One condition on a request, as it stands in an `Intercept`: `{header: {name: x-tp-user, exact: ada}}`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Matcher {
    /// A header field of this name. Names are compared without case, values byte for byte; of repeated fields one is
    /// enough.
    Header(NamedText),
    /// The path as it was sent, without the query and without decoding.
    Path(Text),
    /// The method, case-sensitive (RFC 9110 §9.1).
    Method(String),
    /// A parameter of the query, percent-decoded.
    Query(NamedText),
    /// A cookie, as it was sent.
    Cookie(NamedText),
    /// A member of the W3C `baggage` header, percent-decoded and without its properties.
    Baggage(NamedText),
    /// A member of the W3C `tracestate` header.
    Tracestate(NamedText),
    /// A gRPC call: a path `/service/method` with a content type of gRPC.
    Grpc(Grpc),
    /// The operation of a GraphQL request: `operationName`, or the only named operation of the document.
    Graphql(Graphql),
}

/// A text that equals `exact`, begins with `prefix` or is matched by `regex` from its first to its last byte. Exactly
/// one of the three is given.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[cfg_attr(feature = "kube", derive(kube::KubeSchema))]
#[cfg_attr(
    feature = "kube",
    x_kube(validation = Rule::new(
        "[has(self.exact), has(self.prefix), has(self.regex)].exists_one(given, given)"
    ).message("exactly one of exact, prefix and regex is needed"))
)]
#[serde(rename_all = "camelCase")]
pub struct Text {
    /// The whole text.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(length(max = 1024)))]
    pub exact: Option<String>,
    /// How the text begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(length(max = 1024)))]
    pub prefix: Option<String>,
    /// A regular expression of Rust's `regex` crate for the whole text; `\w`, `\d` and `.` mean ASCII and bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(length(max = 1024)))]
    pub regex: Option<String>,
}

/// Something with a name whose value is matched.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct NamedText {
    /// Its name.
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 256)))]
    pub name: String,
    /// Its value.
    #[serde(flatten)]
    pub value: Text,
}

/// A gRPC service, a method, or both.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[cfg_attr(feature = "kube", derive(kube::KubeSchema))]
#[cfg_attr(
    feature = "kube",
    x_kube(validation = Rule::new("has(self.service) || has(self.method)")
        .message("a service or a method is needed"))
)]
#[serde(rename_all = "camelCase")]
pub struct Grpc {
    /// Full name with its package, as `shop.v1.Cart`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 256)))]
    pub service: Option<String>,
    /// Name of the method, as `Add`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 256)))]
    pub method: Option<String>,
}

/// A GraphQL operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Graphql {
    /// Its name.
    #[cfg_attr(feature = "kube", schemars(length(min = 1, max = 256)))]
    pub operation: String,
}

/// Matchers of one intercept: checked, in canonical order, compiled. All must match; an empty list matches everything.
///
/// Equal sets of matchers are equal values with equal JSON, whatever order and case they were written in.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(try_from = "Vec<Matcher>", into = "Vec<Matcher>")]
pub struct Matchers {
    canonical: Vec<Matcher>,
    compiled: Vec<Compiled>,
}

/// Matchers of one intercept at most: none of them is free for the agent.
pub const MATCHERS_MAX: usize = 16;

/// Bytes of a pattern or of a value to compare with.
pub const PATTERN_MAX: usize = 1024;

/// Bytes of a name.
pub const NAME_MAX: usize = 256;

/// Why a list of matchers cannot be used. The text names the matcher.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MatcherError {
    /// More than [`MATCHERS_MAX`].
    #[error("{0} matchers are more than {MATCHERS_MAX}")]
    TooMany(usize),
    /// None or several of `exact`, `prefix` and `regex`.
    #[error("{0} needs exactly one of exact, prefix and regex")]
    Text(String),
    /// A text longer than its bound.
    #[error("{matcher}: {size} bytes are more than {max}")]
    TooLong {
        /// Which matcher.
        matcher: String,
        /// What it has.
        size: usize,
        /// What it may have.
        max: usize,
    },
    /// A pattern that is none, or that needs too much memory.
    #[error("{matcher}: {why}")]
    Pattern {
        /// Which matcher.
        matcher: String,
        /// What is wrong with it, on one line.
        why: String,
    },
    /// A name that cannot stand there.
    #[error("{0:?} is no name for a {1}")]
    Name(String, &'static str),
    /// A header that must not decide: the host, credentials as a whole, or what belongs to one connection.
    #[error("requests must not be chosen by the header {0:?}")]
    Forbidden(String),
    /// Neither a service nor a method.
    #[error("a grpc matcher needs a service or a method")]
    Grpc,
}

impl Matchers {
    /// Checks and compiles. Duplicates are dropped and names of headers lower-cased.
    pub fn try_new(matchers: impl IntoIterator<Item = Matcher>) -> Result<Self, MatcherError> {
        let mut canonical: Vec<_> = matchers.into_iter().map(Matcher::canonical).collect();
        canonical.sort();
        canonical.dedup();
        if canonical.len() > MATCHERS_MAX {
            return Err(MatcherError::TooMany(canonical.len()));
        }
        let mut compiled = canonical
            .iter()
            .enumerate()
            .map(|(place, matcher)| Compiled::try_new(place, matcher))
            .collect::<Result<Vec<_>, _>>()?;
        compiled.sort_by_key(Compiled::cost);
        Ok(Self {
            canonical,
            compiled,
        })
    }

    /// Whether every request matches, and every connection, even one that is not HTTP.
    pub fn is_empty(&self) -> bool {
        self.canonical.is_empty()
    }

    /// The matchers in canonical order.
    pub fn as_slice(&self) -> &[Matcher] {
        &self.canonical
    }

    /// The canonical form as text: JSON whose equality is that of the matchers.
    pub fn canonical(&self) -> String {
        serde_json::to_string(&self.canonical).expect("texts in enums are always JSON")
    }
}

impl PartialEq for Matchers {
    fn eq(&self, other: &Self) -> bool {
        self.canonical == other.canonical
    }
}

impl Eq for Matchers {}

impl TryFrom<Vec<Matcher>> for Matchers {
    type Error = MatcherError;

    fn try_from(matchers: Vec<Matcher>) -> Result<Self, MatcherError> {
        Self::try_new(matchers)
    }
}

impl From<Matchers> for Vec<Matcher> {
    fn from(matchers: Matchers) -> Self {
        matchers.canonical
    }
}

/// Name of the `Intercept` object for a port of a workload and its matchers: two equal intercepts have one name, so the
/// API server refuses the second. A DNS label (RFC 1123): the workload's name, cut to 30 bytes, and 128 bits of SHA-256.
///
/// `kind` and `workload` are as in `deployment`, `web`; `port` as in `80` for TCP and `53/udp`.
pub fn intercept_name(
    kind: &str,
    workload: &str,
    port: impl fmt::Display,
    matchers: &Matchers,
) -> String {
    let canonical = matchers.canonical();
    let mut hash = Sha256::new();
    for part in [kind, workload, &port.to_string(), &canonical] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let digest: String = hash.finalize()[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let readable: String = workload
        .chars()
        .map(|c| match c.is_ascii_alphanumeric() {
            true => c.to_ascii_lowercase(),
            false => '-',
        })
        .take(30)
        .collect();
    let readable = readable.trim_matches('-');
    match readable.is_empty() {
        true => format!("i-{digest}"),
        false => format!("{readable}-{digest}"),
    }
}

impl Matcher {
    fn canonical(mut self) -> Self {
        if let Self::Header(header) = &mut self {
            header.name.make_ascii_lowercase();
        }
        self
    }
}

impl fmt::Display for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(named) => write!(f, "header {named}"),
            Self::Path(text) => write!(f, "path {text}"),
            Self::Method(method) => write!(f, "method = {method}"),
            Self::Query(named) => write!(f, "query {named}"),
            Self::Cookie(named) => write!(f, "cookie {named}"),
            Self::Baggage(named) => write!(f, "baggage {named}"),
            Self::Tracestate(named) => write!(f, "tracestate {named}"),
            Self::Grpc(grpc) => write!(f, "grpc {grpc}"),
            Self::Graphql(graphql) => write!(f, "graphql operation = {}", graphql.operation),
        }
    }
}

impl fmt::Display for NamedText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.value)
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self {
                exact: Some(text), ..
            } => write!(f, "= {text}"),
            Self {
                prefix: Some(text), ..
            } => write!(f, "begins with {text}"),
            Self {
                regex: Some(text), ..
            } => write!(f, "~ {text}"),
            Self { .. } => f.write_str("(nothing)"),
        }
    }
}

impl fmt::Display for Grpc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [service, method] = [&self.service, &self.method].map(|part| part.as_deref());
        write!(f, "{}/{}", service.unwrap_or("*"), method.unwrap_or("*"))
    }
}

#[cfg(test)]
mod tests;
