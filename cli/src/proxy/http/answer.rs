//! What the proxy itself answers: refusals, and the PAC file.
//!
//! Never a CORS header: a page of the web must learn nothing here. Each of these ends the connection.

use http::{HeaderValue, StatusCode};

use super::super::dial::Refusal;
use super::head::HeadError;

/// A response of our own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    status: StatusCode,
    fields: Vec<(&'static str, HeaderValue)>,
    body: Option<(&'static str, String)>,
}

/// What a successful CONNECT is answered with (RFC 9110 §9.3.6: no framing fields).
pub(super) const CONNECTED: &[u8] = b"HTTP/1.1 200 Connection established\r\n\r\n";

impl Answer {
    /// A destination that was not reached.
    pub(super) fn refusal(refusal: &Refusal) -> Self {
        Self {
            status: refusal.status(),
            fields: vec![("proxy-status", refusal.proxy_status())],
            body: Some(("text/plain; charset=utf-8", format!("tp: {refusal}\n"))),
        }
    }

    /// A head that cannot be read, or a body framed wrongly.
    pub(super) fn bad(error: HeadError) -> Self {
        let status = match error {
            HeadError::TooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            HeadError::Bad(_) => StatusCode::BAD_REQUEST,
        };
        let field = HeaderValue::from_static("tp; error=http_request_error");
        Self {
            status,
            fields: vec![("proxy-status", field)],
            body: Some(("text/plain; charset=utf-8", format!("tp: {error}\n"))),
        }
    }

    /// Origin-form: says nothing at all, since a page behind a rebound name could read it.
    pub(super) fn not_a_server() -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            fields: Vec::new(),
            body: None,
        }
    }

    /// The origin broke off before it answered.
    pub(super) fn broken_origin(detail: &str) -> Self {
        let field = HeaderValue::from_static("tp; error=http_protocol_error");
        Self {
            status: StatusCode::BAD_GATEWAY,
            fields: vec![("proxy-status", field)],
            body: Some((
                "text/plain; charset=utf-8",
                format!("tp: the server did not answer properly: {detail}\n"),
            )),
        }
    }

    /// Credentials are missing or wrong.
    pub(super) fn unauthenticated() -> Self {
        let field = HeaderValue::from_static("Basic realm=\"tp\", charset=\"UTF-8\"");
        Self {
            status: StatusCode::PROXY_AUTHENTICATION_REQUIRED,
            fields: vec![("proxy-authenticate", field)],
            body: Some((
                "text/plain; charset=utf-8",
                "tp: this proxy needs a user name and a password\n".into(),
            )),
        }
    }

    /// The PAC file.
    pub(super) fn pac(script: String) -> Self {
        Self {
            status: StatusCode::OK,
            fields: vec![("cache-control", HeaderValue::from_static("no-store"))],
            body: Some(("application/x-ns-proxy-autoconfig", script)),
        }
    }

    /// On the wire; `with_body` is false for HEAD.
    pub(super) fn to_bytes(&self, with_body: bool) -> Vec<u8> {
        let reason = self.status.canonical_reason().unwrap_or_default();
        let mut bytes = format!("HTTP/1.1 {} {reason}\r\n", self.status.as_u16()).into_bytes();
        let mut field = |name: &str, value: &[u8]| {
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(b": ");
            bytes.extend_from_slice(value);
            bytes.extend_from_slice(b"\r\n");
        };
        for (name, value) in &self.fields {
            field(name, value.as_bytes());
        }
        let body = self.body.as_ref().map_or("", |(kind, body)| {
            field("content-type", kind.as_bytes());
            body
        });
        field("content-length", body.len().to_string().as_bytes());
        field("connection", b"close");
        bytes.extend_from_slice(b"\r\n");
        if with_body {
            bytes.extend_from_slice(body.as_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origin_form_is_told_nothing() {
        let bytes = Answer::not_a_server().to_bytes(true);
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(
            text,
            "HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
    }

    #[test]
    fn a_refusal_has_proxy_status_and_a_line_for_people() {
        let text = String::from_utf8(Answer::refusal(&Refusal::NoTunnel).to_bytes(true)).unwrap();
        assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
        assert!(
            text.contains("\r\nproxy-status: tp; error=destination_unavailable; details=\""),
            "{text}"
        );
        assert!(
            text.ends_with("\r\n\r\ntp: the connection to the cluster is being re-established\n"),
            "{text}"
        );
        assert!(!text.to_ascii_lowercase().contains("access-control"));
    }
}
