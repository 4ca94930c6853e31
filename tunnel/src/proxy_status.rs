//! Why a dial failed, and how that travels: the `Proxy-Status` field of RFC 9209.
//!
//! The text in `details` comes from resolvers and kernels, so it is cut and escaped when written, and whatever a peer
//! sent is read with bounds. It knows nothing of sockets.

use std::fmt::Write as _;

use http::{HeaderMap, HeaderValue, StatusCode};

/// The name of the field.
pub const PROXY_STATUS: &str = "proxy-status";

/// A dial that did not succeed, as the side that dialled saw it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {detail}", kind.as_str())]
pub struct DialError {
    /// What a SOCKS reply code or HTTP status is chosen by.
    pub kind: DialErrorKind,
    /// One line for a person; at most 256 bytes travel.
    pub detail: String,
}

/// The causes a capture side can tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DialErrorKind {
    /// The destination answered with a reset.
    Refused,
    /// Nothing answered within the dial timeout.
    TimedOut,
    /// The name does not exist or could not be resolved.
    Dns,
    /// No route to the destination, or the dial failed in another way.
    Unreachable,
    /// Policy or missing rights.
    Forbidden,
}

impl DialErrorKind {
    const ALL: [Self; 5] = [
        Self::Refused,
        Self::TimedOut,
        Self::Dns,
        Self::Unreachable,
        Self::Forbidden,
    ];

    /// The error type registered in RFC 9209 §2.3.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "connection_refused",
            Self::TimedOut => "connection_timeout",
            Self::Dns => "dns_error",
            Self::Unreachable => "destination_ip_unroutable",
            Self::Forbidden => "destination_ip_prohibited",
        }
    }

    /// The HTTP status this failure is answered with.
    pub fn status(self) -> StatusCode {
        match self {
            Self::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::Refused | Self::Dns | Self::Unreachable => StatusCode::BAD_GATEWAY,
        }
    }

    fn from_status(status: StatusCode) -> Self {
        match status {
            StatusCode::GATEWAY_TIMEOUT => Self::TimedOut,
            StatusCode::FORBIDDEN => Self::Forbidden,
            _ => Self::Unreachable,
        }
    }
}

impl DialError {
    /// A failure with a text for a person.
    pub fn new(kind: DialErrorKind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            detail: detail.into(),
        }
    }

    /// The field value, for example `tp; error=dns_error; details="no such name"`. Always valid: what an sf-string
    /// cannot hold (RFC 8941 §3.3.3) becomes `?`.
    pub fn to_header(&self) -> HeaderValue {
        let mut value = format!("tp; error={}", self.kind.as_str());
        if !self.detail.is_empty() {
            let _ = write!(value, "; details=\"{}\"", escape(&self.detail));
        }
        HeaderValue::from_str(&value).expect("only visible ASCII and spaces were written")
    }

    /// Reads a failed response. An absent or foreign field falls back to what the status says, so any HTTP/2 proxy can
    /// stand on the other side.
    pub fn from_response(status: StatusCode, headers: &HeaderMap) -> Self {
        let field = headers
            .get(PROXY_STATUS)
            .and_then(|value| value.to_str().ok())
            .map(parse)
            .unwrap_or_default();
        let kind = field
            .error
            .and_then(|name| {
                DialErrorKind::ALL
                    .into_iter()
                    .find(|kind| kind.as_str() == name)
            })
            .unwrap_or_else(|| DialErrorKind::from_status(status));
        let detail = field
            .details
            .unwrap_or_else(|| format!("status {}", status.as_u16()));
        Self { kind, detail }
    }
}

impl From<std::io::Error> for DialError {
    /// Maps what `connect(2)` reports; anything not listed is [`DialErrorKind::Unreachable`].
    fn from(error: std::io::Error) -> Self {
        #[expect(clippy::wildcard_enum_match_arm, reason = "std's enum, and it is open")]
        let kind = match error.kind() {
            std::io::ErrorKind::ConnectionRefused => DialErrorKind::Refused,
            std::io::ErrorKind::TimedOut => DialErrorKind::TimedOut,
            std::io::ErrorKind::PermissionDenied => DialErrorKind::Forbidden,
            _ => DialErrorKind::Unreachable,
        };
        Self::new(kind, error.to_string())
    }
}

/// Longest `details` written or kept, in bytes before escaping.
const DETAILS_MAX: usize = 256;

/// Longest field value looked at. A peer's longer one is cut: the error type comes first in ours.
const FIELD_MAX: usize = 2048;

fn escape(detail: &str) -> String {
    let mut out = String::with_capacity(detail.len().min(DETAILS_MAX) + 8);
    for c in detail.chars().take(DETAILS_MAX) {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            ' '..='~' => out.push(c),
            _ => out.push('?'),
        }
    }
    out
}

#[derive(Default)]
struct Field {
    error: Option<String>,
    details: Option<String>,
}

/// Reads the parameters of the first list member; later members are proxies nearer to the origin than our peer, and
/// a tunnel has none. A doubt ends the parse and keeps what was read.
fn parse(value: &str) -> Field {
    let mut field = Field::default();
    let end = value
        .char_indices()
        .map(|(at, _)| at)
        .take_while(|at| *at <= FIELD_MAX)
        .last()
        .unwrap_or(0);
    let value = if value.len() <= FIELD_MAX {
        value
    } else {
        &value[..end]
    };
    let Some(mut rest) = value.find([';', ',']).map(|at| &value[at..]) else {
        return field;
    };
    while let Some(parameter) = rest.strip_prefix(';') {
        let parameter = parameter.trim_start_matches(' ');
        let Some((name, after)) = parameter.split_once('=') else {
            return field;
        };
        let Some((text, after)) = parse_item(after) else {
            return field;
        };
        match name {
            "error" => field.error = Some(text),
            "details" => field.details = Some(text.chars().take(DETAILS_MAX).collect()),
            _ => {}
        }
        rest = after.trim_start_matches(' ');
    }
    field
}

/// A quoted string or a token, and what follows it.
fn parse_item(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([';', ',', ' ']).unwrap_or(text.len());
        let (token, rest) = text.split_at(end);
        return Some((token.to_owned(), rest));
    };
    let mut out = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((out, &quoted[at + 1..])),
            '\\' => out.push(chars.next()?.1),
            _ => out.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(value: &str, status: u16) -> DialError {
        let mut headers = HeaderMap::new();
        headers.insert(PROXY_STATUS, HeaderValue::from_str(value).unwrap());
        DialError::from_response(StatusCode::from_u16(status).unwrap(), &headers)
    }

    #[test]
    fn a_failure_is_written_as_the_rfc_says() {
        let error = DialError::new(DialErrorKind::Dns, "no \"such\" name\n");
        assert_eq!(
            error.to_header(),
            r#"tp; error=dns_error; details="no \"such\" name?""#
        );
    }

    #[test]
    fn foreign_fields_fall_back_to_the_status() {
        assert_eq!(
            read("envoy; error=tls_protocol_error", 504).kind,
            DialErrorKind::TimedOut
        );
        assert_eq!(read("nonsense", 403).kind, DialErrorKind::Forbidden);
        assert_eq!(
            read("\"a b\";received-status=200; error=dns_error", 502).kind,
            DialErrorKind::Dns
        );
        assert_eq!(
            read("p; error=connection_refused, q; error=dns_error", 502).kind,
            DialErrorKind::Refused
        );
    }

    proptest! {
        #[test]
        fn printable_details_round_trip(detail in "[ -~]{1,256}", kind in 0..5_usize) {
            let error = DialError::new(DialErrorKind::ALL[kind], detail);
            let mut headers = HeaderMap::new();
            headers.insert(PROXY_STATUS, error.to_header());
            prop_assert_eq!(DialError::from_response(error.kind.status(), &headers), error);
        }

        #[test]
        fn any_detail_makes_a_bounded_valid_field(detail in ".{0,2000}") {
            let value = DialError::new(DialErrorKind::Refused, detail).to_header();
            prop_assert!(value.len() < 2 * DETAILS_MAX + 64);
        }

        #[test]
        fn reading_never_panics(value in "[ -~]{0,3000}") {
            let error = read(&value, 502);
            prop_assert!(error.detail.len() <= 4 * DETAILS_MAX);
        }
    }
}
