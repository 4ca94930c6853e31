//! The name of a GraphQL operation, from a request's body or query.
//!
//! The convention of GraphQL over HTTP: `operationName` decides; where it is absent, the document's only operation does.
//! Of a batch (a JSON array) no operation is taken, since one answer serves all of it.

use serde::Deserialize;

/// Bytes of a body that a matcher may ask for.
pub const BODY_MAX: usize = 64 * 1024;

/// The operation that a request asks for, if it says so. Made once for a request, whatever the number of matchers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Operation(Option<String>);

/// As GraphQL over HTTP has it; other members are not looked at.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    #[serde(default)]
    operation_name: Option<String>,
    #[serde(default)]
    query: Option<String>,
}

impl Operation {
    /// From a body, which is JSON or the document itself (`application/graphql`): what begins as JSON has no operation as a
    /// document. Anything else has none.
    pub fn of_body(body: &[u8]) -> Self {
        let Ok(body) = serde_json::from_slice::<Body>(body) else {
            return Self(std::str::from_utf8(body).ok().and_then(only_operation));
        };
        let named = body.operation_name.filter(|name| !name.is_empty());
        Self(named.or_else(|| only_operation(body.query.as_deref()?)))
    }

    /// From the parameters of a GET.
    pub(super) fn of_parameters(name: Option<&[u8]>, document: Option<&[u8]>) -> Self {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
        let named = name.and_then(text).filter(|name| !name.is_empty());
        Self(named.or_else(|| only_operation(&text(document?)?)))
    }

    /// The name.
    pub fn name(&self) -> Option<&str> {
        self.0.as_deref()
    }
}

/// The name of the document's operation, if it has exactly one and that has a name.
fn only_operation(document: &str) -> Option<String> {
    let mut names = Vec::new();
    let mut place = Place::Outside;
    let mut depth = 0usize;
    for token in Tokens(document.as_bytes()) {
        match (&token, place) {
            (Token::Name("query" | "mutation" | "subscription"), Place::Outside) => {
                names.push(None);
                place = Place::Keyword;
            }
            (Token::Name(name), Place::Keyword) => {
                names.pop();
                names.push(Some((*name).to_owned()));
                place = Place::Head;
            }
            (Token::Name(_), Place::Outside) | (Token::Other, Place::Keyword) => {
                place = Place::Head;
            }
            // Braces inside of parentheses are default values.
            (Token::Open(b'{'), _) if depth == 0 => {
                // A selection without a keyword is an operation without a name.
                if place == Place::Outside {
                    names.push(None);
                }
                place = Place::Selection;
                depth = 1;
            }
            (Token::Open(_), _) => {
                depth += 1;
                if place == Place::Keyword {
                    place = Place::Head;
                }
            }
            (Token::Close, Place::Selection) if depth == 1 => {
                place = Place::Outside;
                depth = 0;
            }
            (Token::Close, _) => depth = depth.saturating_sub(1),
            (Token::Name(_) | Token::Other, _) => {}
        }
    }
    match <[_; 1]>::try_from(names) {
        Ok([name]) => name,
        Err(_) => None,
    }
}

/// Where in a document the search stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Between definitions.
    Outside,
    /// After `query`, `mutation` or `subscription`.
    Keyword,
    /// Before a definition's selection.
    Head,
    /// In the selection.
    Selection,
}

/// As much of GraphQL's lexical grammar as the search for operations needs. Parentheses count as braces, so that what
/// stands in arguments and variables is inside.
enum Token<'a> {
    Name(&'a str),
    Open(u8),
    Close,
    Other,
}

struct Tokens<'a>(&'a [u8]);

impl<'a> Iterator for Tokens<'a> {
    type Item = Token<'a>;

    fn next(&mut self) -> Option<Token<'a>> {
        loop {
            let first = *self.0.first()?;
            let size = match first {
                b'#' => self.until(|byte| byte == b'\n'),
                b'"' => self.string(),
                b'_' | b'a'..=b'z' | b'A'..=b'Z' => {
                    self.until(|byte| !(byte == b'_' || byte.is_ascii_alphanumeric()))
                }
                _ => 1,
            };
            let (token, rest) = self.0.split_at(size);
            self.0 = rest;
            return Some(match first {
                b' ' | b'\t' | b'\r' | b'\n' | b',' | b'#' => continue,
                b'{' | b'(' => Token::Open(first),
                b'}' | b')' => Token::Close,
                b'_' | b'a'..=b'z' | b'A'..=b'Z' => {
                    Token::Name(std::str::from_utf8(token).unwrap_or_default())
                }
                _ => Token::Other,
            });
        }
    }
}

impl Tokens<'_> {
    fn until(&self, end: impl Fn(u8) -> bool) -> usize {
        let at = self.0.iter().position(|byte| end(*byte));
        at.unwrap_or(self.0.len())
    }

    /// Size of the string or block string at the front.
    fn string(&self) -> usize {
        let quote: &[u8] = match self.0.starts_with(b"\"\"\"") {
            true => b"\"\"\"",
            false => b"\"",
        };
        let mut at = quote.len();
        while at < self.0.len() && !self.0[at..].starts_with(quote) {
            at += if self.0[at] == b'\\' { 2 } else { 1 };
        }
        (at + quote.len()).min(self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(body: serde_json::Value) -> Option<String> {
        Operation::of_body(body.to_string().as_bytes()).0
    }

    #[test]
    fn the_name_comes_from_the_member_or_from_the_only_operation() {
        use serde_json::json;
        let cart = Some("GetCart".to_owned());
        assert_eq!(of(json!({"operationName": "GetCart"})), cart);
        assert_eq!(of(json!({"query": "query GetCart { cart { id } }"})), cart);
        assert_eq!(
            of(
                json!({"query": "# query Not\nmutation GetCart($a: Int = 1, $q: S = \"{query X\") @d(x: {b: 1}) { a }"})
            ),
            cart
        );
        assert_eq!(
            of(
                json!({"query": "fragment F on query { a }\nquery GetCart { ...F }", "operationName": null})
            ),
            cart
        );
        assert_eq!(of(json!({"query": "query A { a } query B { b }"})), None);
        assert_eq!(of(json!({"query": "{ a } query B { b }"})), None);
        assert_eq!(of(json!({"query": "{ query GetCart }"})), None);
        assert_eq!(of(json!([{"operationName": "GetCart"}])), None);
        assert_eq!(of(json!("GetCart")), None);
        assert_eq!(of(json!([{"query": "query GetCart { a }"}])), None);
        assert_eq!(Operation::of_body(b"\xff").0, None);
        // `application/graphql`.
        assert_eq!(Operation::of_body(b"query GetCart { a }").0, cart);
        assert_eq!(Operation::of_body(b"{ a }").0, None);
        assert_eq!(
            Operation::of_body(b"{\"query\": \"query GetCart { a }\"").0,
            None
        );
    }

    #[test]
    fn an_open_string_and_a_deep_document_end() {
        for document in ["query A { b(c: \"", "\"\"\" \\", "\\", &"{".repeat(60_000)] {
            only_operation(document);
        }
        assert_eq!(Operation::of_body("[".repeat(60_000).as_bytes()).0, None);
    }
}
