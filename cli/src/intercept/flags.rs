//! Which requests: from flags to matchers. Pure.
//!
//! The names and the plain forms are Telepresence's; the forms for a prefix and a pattern follow the operators of CSS's
//! attribute selectors.

use tp_manager_api::matcher::{Graphql, Grpc, NamedText, Text};
use tp_manager_api::{Matcher, Matchers};

use super::guess::{self, HEADER};
use crate::report::{Failure, USAGE};

/// The flags that say which requests are wanted. All must match.
#[derive(clap::Args, Debug, Clone, Default)]
#[command(next_help_heading = "Which requests (all that is given must match)")]
pub struct MatcherFlags {
    /// A header: NAME=VALUE or "NAME: VALUE", NAME^=PREFIX, NAME~=REGEX; repeatable; `auto` makes a random one
    #[arg(long, value_name = "HEADER", value_parser = header)]
    pub http_header: Vec<HeaderFlag>,
    /// The path, without the query
    #[arg(long, value_name = "PATH")]
    pub http_path_equal: Option<String>,
    /// How the path begins
    #[arg(long, value_name = "PREFIX")]
    pub http_path_prefix: Option<String>,
    /// A regular expression for the whole path
    #[arg(long, value_name = "REGEX")]
    pub http_path_regex: Option<String>,
    /// The method
    #[arg(long, value_name = "METHOD")]
    pub http_method: Option<String>,
    /// A parameter of the query: NAME=VALUE, NAME^=PREFIX, NAME~=REGEX; repeatable
    #[arg(long, value_name = "PARAMETER", value_parser = named)]
    pub http_query: Vec<NamedText>,
    /// A cookie, as above; repeatable
    #[arg(long, value_name = "COOKIE", value_parser = named)]
    pub http_cookie: Vec<NamedText>,
    /// A member of the W3C baggage header, as above; repeatable
    #[arg(long, value_name = "MEMBER", value_parser = named)]
    pub baggage: Vec<NamedText>,
    /// A member of the W3C tracestate header, as above; repeatable
    #[arg(long, value_name = "MEMBER", value_parser = named)]
    pub tracestate: Vec<NamedText>,
    /// A gRPC call: SERVICE/METHOD, SERVICE/* or METHOD
    #[arg(long, value_name = "CALL", value_parser = grpc)]
    pub grpc_method: Option<Grpc>,
    /// Name of a GraphQL operation
    #[arg(long, value_name = "NAME")]
    pub graphql_operation: Option<String>,
    /// Everything that comes to the port, of everybody, whatever it speaks
    #[arg(long)]
    pub global: bool,
}

/// One `--http-header`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderFlag {
    /// A random one is to be made.
    Auto,
    /// This one.
    Given(NamedText),
}

/// What the flags come to.
#[derive(Debug)]
pub struct Chosen {
    /// The matchers, checked.
    pub matchers: Matchers,
    /// What the user should know of them.
    pub warnings: Vec<String>,
}

impl MatcherFlags {
    /// The matchers. Where nothing says which requests, a random header does.
    ///
    /// # Errors
    /// One cannot be used, or `--global` stands beside another.
    pub fn choose(&self) -> Result<Chosen, Failure> {
        self.choose_with(guess::random_value)
    }

    fn choose_with(&self, random: impl FnOnce() -> String) -> Result<Chosen, Failure> {
        let mut matchers = self.given();
        let auto = self.http_header.contains(&HeaderFlag::Auto);
        if self.global && (auto || !matchers.is_empty()) {
            let failure = Failure::new("`--global` takes everything, so nothing can be chosen");
            return Err(failure.hint("leave it out, or the other flags").exit(USAGE));
        }
        if auto || (matchers.is_empty() && !self.global) {
            matchers.push(Matcher::Header(exactly(HEADER, random())));
        }
        let matchers = Matchers::try_new(matchers).map_err(|error| {
            Failure::new("these requests cannot be chosen")
                .caused_by(&error)
                .exit(USAGE)
        })?;
        let warnings = warning(&matchers).into_iter().collect();
        Ok(Chosen { matchers, warnings })
    }

    fn given(&self) -> Vec<Matcher> {
        let headers = self.http_header.iter().filter_map(|flag| match flag {
            HeaderFlag::Auto => None,
            HeaderFlag::Given(header) => Some(Matcher::Header(header.clone())),
        });
        let path = |text: &Option<String>, kind: fn(String) -> Text| {
            text.clone().map(|text| Matcher::Path(kind(text)))
        };
        let all = |members: &[NamedText], kind: fn(NamedText) -> Matcher| {
            members.iter().cloned().map(kind).collect::<Vec<_>>()
        };
        headers
            .chain(path(&self.http_path_equal, exact))
            .chain(path(&self.http_path_prefix, prefix))
            .chain(path(&self.http_path_regex, regex))
            .chain(self.http_method.clone().map(Matcher::Method))
            .chain(all(&self.http_query, Matcher::Query))
            .chain(all(&self.http_cookie, Matcher::Cookie))
            .chain(all(&self.baggage, Matcher::Baggage))
            .chain(all(&self.tracestate, Matcher::Tracestate))
            .chain(self.grpc_method.clone().map(Matcher::Grpc))
            .chain(
                self.graphql_operation
                    .clone()
                    .map(|operation| Matcher::Graphql(Graphql { operation })),
            )
            .collect()
    }
}

/// What is wrong with matchers that work.
fn warning(matchers: &Matchers) -> Option<String> {
    let marks: Vec<_> = matchers.as_slice().iter().filter_map(mark).collect();
    match marks.as_slice() {
        [] if matchers.is_empty() => Some(
            "everything that comes to the port goes to this workstation, whoever sent it".to_owned(),
        ),
        [] => Some(
            "nothing in these requests says whose they are: everybody's go to this workstation"
                .to_owned(),
        ),
        marks if marks.iter().any(|value| !guess::is_guessable(value)) => None,
        _ => Some(
            "whoever guesses this value can send requests to this workstation; `--http-header auto` makes one that nobody guesses"
                .to_owned(),
        ),
    }
}

/// The value by which a sender marks a request as somebody's.
fn mark(matcher: &Matcher) -> Option<&str> {
    match matcher {
        Matcher::Header(named)
        | Matcher::Query(named)
        | Matcher::Cookie(named)
        | Matcher::Baggage(named)
        | Matcher::Tracestate(named) => {
            let Text { exact, prefix, .. } = &named.value;
            Some(exact.as_ref().or(prefix.as_ref()).map_or("", |text| text))
        }
        Matcher::Path(_) | Matcher::Method(_) | Matcher::Grpc(_) | Matcher::Graphql(_) => None,
    }
}

fn header(text: &str) -> Result<HeaderFlag, String> {
    if text == "auto" {
        return Ok(HeaderFlag::Auto);
    }
    match (text.find(':'), text.find('=')) {
        (Some(colon), equals) if equals.is_none_or(|equals| colon < equals) => {
            let (name, value) = (text[..colon].trim(), text[colon + 1..].trim());
            Ok(HeaderFlag::Given(exactly(name, value.to_owned())))
        }
        _ => named(text).map(HeaderFlag::Given).map_err(|_| {
            "expected NAME=VALUE, \"NAME: VALUE\", NAME^=PREFIX, NAME~=REGEX or auto".to_owned()
        }),
    }
}

fn named(text: &str) -> Result<NamedText, String> {
    let expected = || "expected NAME=VALUE, NAME^=PREFIX or NAME~=REGEX".to_owned();
    let (name, value) = text.split_once('=').ok_or_else(expected)?;
    let value = value.to_owned();
    let (name, value) = match (name.strip_suffix('^'), name.strip_suffix('~')) {
        (Some(name), _) => (name, prefix(value)),
        (None, Some(name)) => (name, regex(value)),
        (None, None) => (name, exact(value)),
    };
    match name.trim() {
        "" => Err(expected()),
        name => Ok(NamedText {
            name: name.to_owned(),
            value,
        }),
    }
}

fn grpc(text: &str) -> Result<Grpc, String> {
    let text = text.trim_start_matches('/');
    let given = |part: &str| (part != "*").then(|| part.to_owned());
    let call = match text.rsplit_once('/') {
        Some((service, method)) => Grpc {
            service: given(service),
            method: given(method),
        },
        None => Grpc {
            service: None,
            method: given(text),
        },
    };
    let is_empty = |part: &Option<String>| part.as_ref().is_some_and(String::is_empty);
    match is_empty(&call.service)
        || is_empty(&call.method)
        || (call.service.is_none() && call.method.is_none())
    {
        true => Err("expected SERVICE/METHOD, SERVICE/* or METHOD".to_owned()),
        false => Ok(call),
    }
}

fn exactly(name: &str, value: String) -> NamedText {
    NamedText {
        name: name.to_owned(),
        value: exact(value),
    }
}

fn exact(text: String) -> Text {
    Text {
        exact: Some(text),
        ..Text::default()
    }
}

fn prefix(text: String) -> Text {
    Text {
        prefix: Some(text),
        ..Text::default()
    }
}

fn regex(text: String) -> Text {
    Text {
        regex: Some(text),
        ..Text::default()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        flags: MatcherFlags,
    }

    fn parse(words: &[&str]) -> Result<MatcherFlags, clap::Error> {
        Line::try_parse_from(std::iter::once(&"tp").chain(words)).map(|line| line.flags)
    }

    fn chosen(words: &[&str]) -> Chosen {
        let flags = parse(words).unwrap_or_else(|error| panic!("{error}"));
        let random = || "mzxw6ytboi2dgnbvgy3tqojq4a".to_owned();
        flags
            .choose_with(random)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn shown(words: &[&str]) -> String {
        let chosen = chosen(words);
        let shown: Vec<_> = chosen
            .matchers
            .as_slice()
            .iter()
            .map(ToString::to_string)
            .collect();
        shown.join("; ")
    }

    #[test]
    fn each_flag_becomes_its_matcher() {
        for (words, expected) in [
            (&["--http-header", "X-User=ada"][..], "header x-user = ada"),
            (&["--http-header", "X-User: ada"], "header x-user = ada"),
            (&["--http-header", "x-user:a=b"], "header x-user = a=b"),
            (
                &["--http-header", "x-url=http://a"],
                "header x-url = http://a",
            ),
            (
                &["--http-header", "x-user^=ad"],
                "header x-user begins with ad",
            ),
            (&["--http-header", "x-user~=a.*"], "header x-user ~ a.*"),
            (&["--http-header", "x="], "header x = "),
            (&["--http-path-equal", "/a"], "path = /a"),
            (&["--http-path-prefix", "/a"], "path begins with /a"),
            (&["--http-path-regex", "/a|/b"], "path ~ /a|/b"),
            (&["--http-method", "POST"], "method = POST"),
            (&["--http-query", "u=ada"], "query u = ada"),
            (&["--http-cookie", "u^=ada"], "cookie u begins with ada"),
            (&["--baggage", "u=ada"], "baggage u = ada"),
            (&["--tracestate", "u=ada"], "tracestate u = ada"),
            (
                &["--grpc-method", "/shop.v1.Cart/Add"],
                "grpc shop.v1.Cart/Add",
            ),
            (&["--grpc-method", "shop.v1.Cart/*"], "grpc shop.v1.Cart/*"),
            (&["--grpc-method", "Add"], "grpc */Add"),
            (&["--graphql-operation", "Cart"], "graphql operation = Cart"),
            (
                &[
                    "--http-header",
                    "b=2",
                    "--http-header",
                    "a=1",
                    "--http-path-prefix",
                    "/x",
                ],
                "header a = 1; header b = 2; path begins with /x",
            ),
        ] {
            assert_eq!(shown(words), expected, "{words:?}");
        }
    }

    #[test]
    fn without_any_a_random_header_chooses() {
        let random = "header x-tp-intercept = mzxw6ytboi2dgnbvgy3tqojq4a";
        assert_eq!(shown(&[]), random);
        assert_eq!(shown(&["--http-header", "auto"]), random);
        assert_eq!(
            shown(&["--http-header", "auto", "--http-path-equal", "/a"]),
            format!("{random}; path = /a")
        );
        assert_eq!(shown(&["--global"]), "");
    }

    #[test]
    fn what_cannot_be_meant_is_a_usage_error() {
        for words in [
            &["--http-header", "x"][..],
            &["--http-header", "=x"],
            &["--http-query", "x"],
            &["--grpc-method", "*/*"],
            &["--grpc-method", "/"],
            &["--http-path-equal", "/a", "--http-path-equal", "/b"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
        for words in [
            &["--http-header", "host=x"][..],
            &["--http-header", "x_y=x"],
            &["--http-path-regex", "("],
            &["--global", "--http-method", "GET"],
            &["--global", "--http-header", "auto"],
        ] {
            let failure = parse(words).unwrap().choose().unwrap_err();
            assert_eq!(failure.exit, USAGE, "{words:?}: {failure}");
        }
    }

    #[test]
    fn what_others_can_trigger_is_said() {
        for (words, warned) in [
            (&[][..], ""),
            (&["--http-header", "x-user=ada"], "guesses"),
            (&["--http-header", "x-user~=.*"], "guesses"),
            (
                &["--http-header", "x-user=ada", "--http-header", "auto"],
                "",
            ),
            (&["--http-path-prefix", "/api"], "everybody's"),
            (&["--global"], "whoever sent it"),
        ] {
            let warnings = chosen(words).warnings;
            match warned {
                "" => assert!(warnings.is_empty(), "{words:?}: {warnings:?}"),
                part => assert!(warnings[0].contains(part), "{words:?}: {warnings:?}"),
            }
        }
    }
}
