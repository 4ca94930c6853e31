//! A request that an intercept wants, as a curl line to try it. Pure.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tp_manager_api::matcher::Text;
use tp_manager_api::{Matcher, Matchers};

/// The arguments of curl for such a request; `None` where no plain request shows it (a pattern, gRPC, GraphQL).
///
/// `base` is the URL without a path.
#[must_use]
pub fn curl_arguments(matchers: &Matchers, base: &str) -> Option<Vec<String>> {
    let mut arguments = Vec::new();
    let (mut path, mut query, mut baggage, mut state) =
        ("/".to_owned(), Vec::new(), Vec::new(), Vec::new());
    for matcher in matchers.as_slice() {
        match matcher {
            Matcher::Header(header) => {
                arguments.extend([
                    "-H".to_owned(),
                    format!("{}: {}", header.name, value(&header.value)?),
                ]);
            }
            Matcher::Path(text) => path = value(text)?.to_owned(),
            Matcher::Method(method) => arguments.extend(["-X".to_owned(), method.clone()]),
            Matcher::Query(named) => {
                query.push(format!(
                    "{}={}",
                    encoded(&named.name),
                    encoded(value(&named.value)?)
                ));
            }
            Matcher::Cookie(cookie) => {
                arguments.extend([
                    "-b".to_owned(),
                    format!("{}={}", cookie.name, value(&cookie.value)?),
                ]);
            }
            Matcher::Baggage(member) => {
                baggage.push(format!(
                    "{}={}",
                    member.name,
                    encoded(value(&member.value)?)
                ));
            }
            Matcher::Tracestate(member) => {
                state.push(format!("{}={}", member.name, value(&member.value)?));
            }
            Matcher::Grpc(_) | Matcher::Graphql(_) => return None,
        }
    }
    for (name, members) in [("baggage", baggage), ("tracestate", state)] {
        if !members.is_empty() {
            arguments.extend(["-H".to_owned(), format!("{name}: {}", members.join(","))]);
        }
    }
    let query = match query.is_empty() {
        true => String::new(),
        false => format!("?{}", query.join("&")),
    };
    arguments.push(format!("{base}{path}{query}"));
    Some(arguments)
}

/// The arguments as words of a shell.
#[must_use]
pub fn shell_line(words: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    let quoted: Vec<_> = words
        .iter()
        .map(|word| match !word.is_empty() && word.chars().all(plain) {
            true => word.clone(),
            false => format!("'{}'", word.replace('\'', r"'\''")),
        })
        .collect();
    quoted.join(" ")
}

fn value(text: &Text) -> Option<&str> {
    text.exact.as_deref().or(text.prefix.as_deref())
}

/// What is decoded before it is compared.
fn encoded(text: &str) -> String {
    utf8_percent_encode(text, ENCODED).to_string()
}

/// All but the unreserved characters of RFC 3986 §2.3.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

#[cfg(test)]
mod tests {
    use tp_manager_api::matcher::{RequestHead, Verdict};

    use super::*;

    fn matchers(json: &str) -> Matchers {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn the_line_asks_for_what_the_matchers_want() {
        for (given, expected) in [
            (r#"[]"#, "http://web/"),
            (
                r#"[{"header":{"name":"x-user","exact":"ada"}}]"#,
                "-H 'x-user: ada' http://web/",
            ),
            (
                r#"[{"header":{"name":"x-user","exact":"it's"}},{"path":{"prefix":"/api"}},{"method":"POST"}]"#,
                r"-H 'x-user: it'\''s' -X POST http://web/api",
            ),
            (
                r#"[{"cookie":{"name":"u","exact":"ada"}},{"query":{"name":"q","exact":"a b"}}]"#,
                "-b u=ada 'http://web/?q=a%20b'",
            ),
            (
                r#"[{"baggage":{"name":"u-1","exact":"a,b"}},{"baggage":{"name":"v","prefix":"x"}},{"tracestate":{"name":"t","exact":"1"}}]"#,
                "-H 'baggage: u-1=a%2Cb,v=x' -H 'tracestate: t=1' http://web/",
            ),
        ] {
            let line = shell_line(&curl_arguments(&matchers(given), "http://web").unwrap());
            assert_eq!(line, expected);
        }
        for given in [
            r#"[{"path":{"regex":"/a|/b"}}]"#,
            r#"[{"grpc":{"method":"Add"}}]"#,
            r#"[{"graphql":{"operation":"Cart"}}]"#,
        ] {
            assert_eq!(curl_arguments(&matchers(given), "http://web"), None);
        }
    }

    #[test]
    fn such_a_request_matches() {
        let matchers = matchers(
            r#"[{"header":{"name":"x-user","exact":"ada"}},{"path":{"prefix":"/api"}},{"query":{"name":"q","exact":"a b"}},
                {"baggage":{"name":"u","exact":"a,b"}}]"#,
        );

        let words = curl_arguments(&matchers, "http://web").unwrap();

        let fields: Vec<_> = words
            .windows(2)
            .filter(|pair| pair[0] == "-H")
            .map(|pair| pair[1].split_once(": ").unwrap())
            .map(|(name, value)| (name.as_bytes(), value.as_bytes()))
            .collect();
        let target = words.last().unwrap().as_bytes();
        let head = RequestHead::new("GET", target, fields);
        assert_eq!(matchers.matches(&head, None), Verdict::Mine);
    }
}
