//! A text compared with a value, a beginning or a pattern.

use regex::bytes::{Regex, RegexBuilder};

use super::{MatcherError, PATTERN_MAX, Text};

/// A compiled [`Text`].
#[derive(Clone, Debug)]
pub(super) enum Pattern {
    Exact(Box<[u8]>),
    Prefix(Box<[u8]>),
    Regex(Regex),
}

/// Memory of one compiled pattern, and again of what it remembers while it runs. A thousand such patterns still fit the
/// agent's budget.
const COMPILED_MAX: usize = 16 * 1024;

impl Pattern {
    /// `what` names the matcher in errors.
    pub(super) fn try_new(text: &Text, what: &str) -> Result<Self, MatcherError> {
        let bounded = |text: &String| match text.len() {
            size if size > PATTERN_MAX => Err(MatcherError::TooLong {
                matcher: what.to_owned(),
                size,
                max: PATTERN_MAX,
            }),
            _ => Ok(text.as_bytes().into()),
        };
        match text {
            Text {
                exact: Some(exact),
                prefix: None,
                regex: None,
            } => bounded(exact).map(Self::Exact),
            Text {
                exact: None,
                prefix: Some(prefix),
                regex: None,
            } => bounded(prefix).map(Self::Prefix),
            Text {
                exact: None,
                prefix: None,
                regex: Some(regex),
            } => {
                bounded(regex)?;
                compile(regex)
                    .map(Self::Regex)
                    .map_err(|why| MatcherError::Pattern {
                        matcher: what.to_owned(),
                        why,
                    })
            }
            Text { .. } => Err(MatcherError::Text(what.to_owned())),
        }
    }

    pub(super) fn matches(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => **exact == *value,
            Self::Prefix(prefix) => value.starts_with(prefix),
            Self::Regex(regex) => regex.is_match(value),
        }
    }
}

/// Compiled alone first, so that no pattern can close the group that anchors it.
fn compile(pattern: &str) -> Result<Regex, String> {
    let build = |pattern: &str| {
        RegexBuilder::new(pattern)
            .unicode(false)
            .size_limit(COMPILED_MAX)
            .dfa_size_limit(COMPILED_MAX)
            .nest_limit(32)
            .build()
    };
    build(pattern)
        .and_then(|_| build(&format!(r"\A(?:{pattern})\z")))
        .map_err(
            |error| match matches!(error, regex::Error::CompiledTooBig(_)) {
                true => "the pattern needs too much memory; repeat less in it".to_owned(),
                false => last_line(&error.to_string()),
            },
        )
}

/// The crate draws the place under the pattern; what is wrong stands last.
fn last_line(text: &str) -> String {
    let line = text.lines().last().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regex(pattern: &str) -> Result<Pattern, MatcherError> {
        let text = Text {
            regex: Some(pattern.to_owned()),
            ..Text::default()
        };
        Pattern::try_new(&text, "path")
    }

    #[test]
    fn a_pattern_matches_the_whole_text_or_nothing() {
        let pattern = regex("/a|/ab.*").unwrap();
        assert!(pattern.matches(b"/a"));
        assert!(pattern.matches(b"/abc"));
        assert!(!pattern.matches(b"/ac"));
        assert!(!pattern.matches(b"x/a"));
        assert!(!pattern.matches(b"/a\n"));
        // Values of headers need not be UTF-8.
        assert!(regex(".*\u{e4}.").unwrap().matches(b"\xc3\xa4\xff"));
    }

    #[test]
    fn hostile_patterns_are_refused_in_one_line() {
        for pattern in [
            "a)(b",
            "(?x) a # ",
            "(a{100}){100}",
            "[",
            r"(?P<x>a)\1",
            &"(".repeat(1000),
            r"\p{Greek}",
        ] {
            let error = regex(pattern).unwrap_err().to_string();
            assert!(
                !error.contains('\n') && error.starts_with("path: "),
                "{error}"
            );
        }
        assert!(matches!(
            regex(&"a".repeat(1025)),
            Err(MatcherError::TooLong { size: 1025, .. })
        ));
    }

    #[test]
    fn exactly_one_kind_of_text_is_given() {
        let both = Text {
            exact: Some("a".into()),
            prefix: Some("a".into()),
            regex: None,
        };
        for text in [both, Text::default()] {
            let error = Pattern::try_new(&text, "path").unwrap_err();
            assert_eq!(error, MatcherError::Text("path".into()));
        }
    }
}
