//! The head of a request, parsed strictly.
//!
//! Pure. `httparse` does the grammar; this adds what it leaves to its caller: line ends, what a proxy may be asked for,
//! and how the body is framed. Where two readers could disagree about the framing, the request is refused.

use std::str::FromStr as _;

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use tp_tunnel::Target;

/// A request that a proxy can be asked.
#[derive(Clone, Debug)]
pub struct Head {
    /// As sent.
    pub method: Method,
    /// What is asked of whom.
    pub form: Form,
    /// Whether the client speaks HTTP/1.1; else 1.0.
    pub http11: bool,
    /// As sent, also those that are not forwarded.
    pub headers: HeaderMap,
    /// What follows the head.
    pub body: Framing,
}

/// The form of the request target (RFC 9112 §3.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// `CONNECT host:port`.
    Connect(Target),
    /// `GET http://host/path`: the origin, and path with query for it.
    Absolute(Target, PathAndQuery),
    /// `GET /path`: meant for the proxy itself.
    Origin(String),
}

/// How the body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    None,
    /// So many bytes.
    Length(u64),
    /// At the chunk of size 0.
    Chunked,
}

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// More bytes or fields than any client needs: status 431.
    #[error("the header block is too large")]
    TooLarge,
    /// Status 400.
    #[error("{0}")]
    Bad(&'static str),
}

/// Largest header block, in bytes.
pub const HEAD_MAX: usize = 64 * 1024;

/// Most header fields.
pub const FIELDS_MAX: usize = 128;

impl Head {
    /// Parses the head at the start of `bytes`; `None` while it is incomplete.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, HeadError> {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let mut request = httparse::Request::new(&mut fields);
        let bounded = &bytes[..bytes.len().min(HEAD_MAX)];
        if bounded.starts_with(b"\r") || bounded.starts_with(b"\n") {
            return Err(HeadError::Bad("the request starts with an empty line"));
        }
        let parsed = request.parse(bounded).map_err(|error| match error {
            httparse::Error::TooManyHeaders => HeadError::TooLarge,
            httparse::Error::HeaderName
            | httparse::Error::HeaderValue
            | httparse::Error::NewLine
            | httparse::Error::Status
            | httparse::Error::Token
            | httparse::Error::Version => HeadError::Bad("this is not an HTTP/1 request"),
        })?;
        match parsed {
            httparse::Status::Partial => {
                check_lines(bounded)?;
                if bytes.len() >= HEAD_MAX {
                    return Err(HeadError::TooLarge);
                }
                Ok(None)
            }
            httparse::Status::Complete(used) => {
                check_lines(&bounded[..used])?;
                Ok(Some((Self::try_new(&request)?, used)))
            }
        }
    }

    fn try_new(request: &httparse::Request<'_, '_>) -> Result<Self, HeadError> {
        let method = request
            .method
            .and_then(|method| Method::from_str(method).ok());
        let method = method.ok_or(HeadError::Bad("the method is not valid"))?;
        let http11 = request.version == Some(1);
        let headers = collect(request.headers)?;
        let form = Form::parse(&method, request.path.unwrap_or_default())?;
        let body = framing(&headers, http11)?;
        check_host(&headers, http11, &form)?;
        if method == Method::CONNECT && !matches!(body, Framing::None | Framing::Length(0)) {
            return Err(HeadError::Bad("CONNECT has no body"));
        }
        Ok(Self {
            method,
            form,
            http11,
            headers,
            body,
        })
    }

    /// Whether the client keeps the connection open. HTTP/1.0 never does: its `keep-alive` cannot be relied on through
    /// proxies (RFC 9112 §9.3).
    pub fn keeps_alive(&self) -> bool {
        self.http11 && !has_token(&self.headers, &CONNECTION, "close")
    }
}

/// Whether a list-valued field holds `token`.
pub(super) fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    tokens(headers, name).any(|found| found.eq_ignore_ascii_case(token))
}

/// The members of a list-valued field.
pub(super) fn tokens<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).into_iter();
    let texts = values.filter_map(|value| value.to_str().ok());
    texts.flat_map(|text| text.split(',')).map(str::trim)
}

/// CR and LF only together, and no NUL: readers differ in what they make of them alone. A CR at the very end may still
/// be followed by its LF.
fn check_lines(bytes: &[u8]) -> Result<(), HeadError> {
    let mut previous = 0;
    for &byte in bytes {
        match (previous, byte) {
            (b'\r', b'\n') => {}
            (b'\r', _) | (_, b'\n') => return Err(HeadError::Bad("a line does not end in CR LF")),
            (_, 0) => return Err(HeadError::Bad("a NUL byte in the head")),
            (_, _) => {}
        }
        previous = byte;
    }
    Ok(())
}

fn collect(fields: &[httparse::Header<'_>]) -> Result<HeaderMap, HeadError> {
    let mut headers = HeaderMap::with_capacity(fields.len());
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes());
        let value = HeaderValue::from_bytes(field.value);
        let (Ok(name), Ok(value)) = (name, value) else {
            return Err(HeadError::Bad("a header field is not valid"));
        };
        headers.append(name, value);
    }
    Ok(headers)
}

/// RFC 9112 §6, without its allowances for old peers.
fn framing(headers: &HeaderMap, http11: bool) -> Result<Framing, HeadError> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).into_iter();
    let mut codings = headers.get_all(TRANSFER_ENCODING).into_iter();
    match (lengths.next(), codings.next()) {
        (Some(_), Some(_)) => Err(HeadError::Bad("both Content-Length and Transfer-Encoding")),
        (None, None) => Ok(Framing::None),
        (Some(_), None) if lengths.next().is_some() => {
            Err(HeadError::Bad("more than one Content-Length"))
        }
        (Some(length), None) => parse_length(length.as_bytes()).map(Framing::Length),
        (None, Some(_)) if !http11 => Err(HeadError::Bad("Transfer-Encoding in HTTP/1.0")),
        (None, Some(_)) if codings.next().is_some() => {
            Err(HeadError::Bad("more than one Transfer-Encoding"))
        }
        (None, Some(coding)) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => {
            Ok(Framing::Chunked)
        }
        (None, Some(_)) => Err(HeadError::Bad("a Transfer-Encoding other than chunked")),
    }
}

/// Digits only: no sign, no list. 18 digits are more than any disk holds and cannot overflow.
fn parse_length(value: &[u8]) -> Result<u64, HeadError> {
    let digits = (1..=18).contains(&value.len()) && value.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(value).ok().filter(|_| digits);
    text.and_then(|text| text.parse().ok())
        .ok_or(HeadError::Bad("Content-Length is not a number"))
}

/// RFC 9112 §3.2. Some tools send CONNECT without it, which leaves nothing in doubt.
fn check_host(headers: &HeaderMap, http11: bool, form: &Form) -> Result<(), HeadError> {
    let needed = http11 && !matches!(form, Form::Connect(_));
    match headers.get_all(HOST).into_iter().count() {
        0 if needed => Err(HeadError::Bad("no Host field")),
        0 | 1 => Ok(()),
        _ => Err(HeadError::Bad("more than one Host field")),
    }
}

impl Form {
    fn parse(method: &Method, text: &str) -> Result<Self, HeadError> {
        if method == Method::CONNECT {
            let target = text
                .parse()
                .map_err(|_| HeadError::Bad("CONNECT needs host:port"))?;
            return Ok(Self::Connect(target));
        }
        if text.starts_with('/') || text == "*" {
            return Ok(Self::Origin(text.to_owned()));
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(HeadError::Bad("the request target is not a URL"));
        };
        match scheme.to_ascii_lowercase().as_str() {
            "http" | "ws" => absolute(method, rest),
            _ => Err(HeadError::Bad(
                "only http URLs are forwarded; others go through CONNECT",
            )),
        }
    }
}

fn absolute(method: &Method, rest: &str) -> Result<Form, HeadError> {
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let with_port = match authority.rsplit_once(':') {
        Some((_, port)) if !port.ends_with(']') => authority.to_owned(),
        Some(_) | None => format!("{authority}:80"),
    };
    let target = with_port
        .parse()
        .map_err(|_| HeadError::Bad("the URL's host is not valid"))?;
    let path = match path.chars().next() {
        None if method == Method::OPTIONS => "*".to_owned(),
        None => "/".to_owned(),
        Some('?') => format!("/{path}"),
        Some(_) => path.to_owned(),
    };
    // http's parser would cut a fragment off silently.
    let path = Some(path).filter(|path| !path.contains('#'));
    let path = path.and_then(|path| PathAndQuery::try_from(path).ok());
    Ok(Form::Absolute(
        target,
        path.ok_or(HeadError::Bad("the URL's path is not valid"))?,
    ))
}

#[cfg(test)]
pub(in super::super) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Head, HeadError> {
        let (head, used) = Head::parse(text.as_bytes())?.expect("a whole head");
        assert_eq!(used, text.len());
        Ok(head)
    }

    #[test]
    fn the_forms_a_proxy_serves_are_read() {
        let table = [
            ("GET http://web/ HTTP/1.1", "web:80 /"),
            ("GET http://Web.Shop HTTP/1.1", "web.shop:80 /"),
            ("GET HTTP://web:8080/a?b=c HTTP/1.1", "web:8080 /a?b=c"),
            ("GET http://web?b HTTP/1.1", "web:80 /?b"),
            ("GET ws://[fd00::1]/x HTTP/1.1", "[fd00::1]:80 /x"),
            ("GET http://[fd00::1]:81/x HTTP/1.1", "[fd00::1]:81 /x"),
            ("OPTIONS http://web HTTP/1.1", "web:80 *"),
            ("OPTIONS http://web/ HTTP/1.1", "web:80 /"),
            ("CONNECT web.shop:443 HTTP/1.1", "web.shop:443"),
            ("CONNECT [fd00::1]:443 HTTP/1.0", "[fd00::1]:443"),
            ("GET /proxy.pac HTTP/1.1", "/proxy.pac"),
            ("OPTIONS * HTTP/1.1", "*"),
        ];
        for (line, expected) in table {
            let head = parse(&format!("{line}\r\nHost: ignored\r\n\r\n")).unwrap();
            let form = match head.form {
                Form::Connect(target) => target.to_string(),
                Form::Absolute(target, path) => format!("{target} {path}"),
                Form::Origin(path) => path,
            };
            assert_eq!(form, expected, "{line}");
        }
    }

    #[test]
    fn framing_is_read() {
        let table = [
            ("", Framing::None),
            ("Content-Length: 0\r\n", Framing::Length(0)),
            ("content-length: 42\r\n", Framing::Length(42)),
            ("Transfer-Encoding: Chunked\r\n", Framing::Chunked),
        ];
        for (fields, expected) in table {
            let head = parse(&format!(
                "POST http://web/ HTTP/1.1\r\nHost: web\r\n{fields}\r\n"
            ))
            .unwrap();
            assert_eq!(head.body, expected, "{fields}");
        }
    }

    /// Each of these could be read in two ways by two readers.
    pub(in super::super::super) const HOSTILE: &[&str] = &[
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nContent-Length: 5, 5\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nContent-Length: +5\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nContent-Length: 0x5\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nContent-Length: -1\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nContent-Length:\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nContent-Length: 99999999999999999999\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: xchunked\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked;q=1\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST http://web/ HTTP/1.1\r\nHost: web\r\nTransfer-Encoding:\r\n\r\n",
        "POST http://web/ HTTP/1.0\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n",
        "GET http://web/ HTTP/1.1\nHost: web\n\n",
        "GET http://web/ HTTP/1.1\r\nHost: web\nX: y\r\n\r\n",
        "GET http://web/ HTTP/1.1\r\nHost: web\r\n\n",
        "GET http://web/ HTTP/1.1\r\nHost: web\rX: y\r\n\r\n",
        "GET http://web/ HTTP/1.1\r\nHost: web\r\nX: a\r\n b\r\n\r\n",
        "GET http://web/ HTTP/1.1\r\n Host: web\r\n\r\n",
        "GET http://web/ HTTP/1.1\r\nHost : web\r\n\r\n",
        "GET http://web/ HTTP/1.1\r\nHost: web\r\nContent-Length : 5\r\n\r\n",
        "GET http://web/ HTTP/1.1\r\nHost: web\r\nX: a\0b\r\n\r\n",
        "GET http://we\0b/ HTTP/1.1\r\nHost: web\r\n\r\n",
        "GET http://web/ HTTP/1.1\r\nHost: web\r\nHost: other\r\n\r\n",
        "GET http://web/ HTTP/1.1\r\n\r\n",
        "GET http://web/ HTTP/1.2\r\nHost: web\r\n\r\n",
        "GET http://web/ HTTP/2.0\r\nHost: web\r\n\r\n",
        "GET  http://web/ HTTP/1.1\r\nHost: web\r\n\r\n",
        "GET http://web/#x HTTP/1.1\r\nHost: web\r\n\r\n",
        "GET http://user@web/ HTTP/1.1\r\nHost: web\r\n\r\n",
        "GET http:///x HTTP/1.1\r\nHost: web\r\n\r\n",
        "GET http://web:0/ HTTP/1.1\r\nHost: web\r\n\r\n",
        "GET https://web/ HTTP/1.1\r\nHost: web\r\n\r\n",
        "GET web/x HTTP/1.1\r\nHost: web\r\n\r\n",
        "CONNECT web HTTP/1.1\r\nHost: web\r\n\r\n",
        "CONNECT /x HTTP/1.1\r\nHost: web\r\n\r\n",
        "CONNECT web:80 HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\n",
        "CONNECT web:80 HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n",
        "\r\nGET http://web/ HTTP/1.1\r\nHost: web\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\x7c",
    ];

    #[test]
    fn every_doubt_about_the_framing_is_refused() {
        for text in HOSTILE {
            assert!(
                matches!(Head::parse(text.as_bytes()), Err(HeadError::Bad(_))),
                "{text:?}"
            );
        }
    }

    #[test]
    fn oversized_heads_are_told_apart() {
        let long = format!(
            "GET http://web/ HTTP/1.1\r\nHost: web\r\nX: {}",
            "a".repeat(HEAD_MAX)
        );
        let many = format!(
            "GET http://web/ HTTP/1.1\r\nHost: web\r\n{}\r\n",
            "X: y\r\n".repeat(FIELDS_MAX)
        );
        for text in [&long, &many] {
            assert_eq!(
                Head::parse(text.as_bytes()).err(),
                Some(HeadError::TooLarge)
            );
        }
    }

    #[test]
    fn a_head_in_pieces_means_the_same() {
        let text = "GET http://web/ HTTP/1.1\r\nHost: web\r\n\r\n";
        for cut in 0..text.len() {
            assert!(
                Head::parse(&text.as_bytes()[..cut]).unwrap().is_none(),
                "{cut}"
            );
        }
        let with_more = format!("{text}GET");
        assert_eq!(
            Head::parse(with_more.as_bytes()).unwrap().unwrap().1,
            text.len()
        );
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Head::parse(&bytes);
        }

        #[test]
        fn parsing_never_panics_near_valid_heads(text in "(GET|CONNECT|POST) (http://)?[a-z:/?\\[\\]@#.0-9]{0,30} HTTP/1\\.[01]\r\n([A-Za-z-]{1,12}: ?[ -~]{0,12}\r\n){0,4}\r\n") {
            let _ = Head::parse(text.as_bytes());
        }
    }
}
