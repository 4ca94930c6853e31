//! What a connection speaks, by its first bytes.

/// How the bytes of a connection are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.0 or 1.1, well-formed or not.
    Http1,
    /// HTTP/2 by prior knowledge (RFC 9113 §3.3).
    Http2,
    /// TLS (RFC 8446 §5.1).
    Tls,
    /// Whatever else is not HTTP.
    Opaque,
}

/// RFC 9113 §3.4.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Methods by which a request is known even when the rest of its line is wrong; then it is refused, not passed on.
const METHODS: [&[u8]; 9] = [
    b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH",
];

/// Bytes within which a line that is no request must show it.
const LINE_MAX: usize = 4096;

/// What the connection speaks, or `None` while its first bytes do not say.
pub fn detect(bytes: &[u8]) -> Option<Protocol> {
    if bytes.is_empty() {
        return None;
    }
    if PREFACE.starts_with(&bytes[..bytes.len().min(PREFACE.len())]) {
        return (bytes.len() >= PREFACE.len()).then_some(Protocol::Http2);
    }
    if let Some(tls) = detect_tls(bytes) {
        return tls;
    }
    // An empty line before a request is allowed (RFC 9112 §2.2).
    let bytes = match bytes {
        [b'\r'] | [b'\r', b'\n'] => return None,
        [b'\r', b'\n', rest @ ..] => rest,
        bytes => bytes,
    };
    let word = bytes.iter().position(|byte| !byte.is_ascii_uppercase());
    match word {
        None if bytes.len() <= 20 => None,
        None | Some(0) => Some(Protocol::Opaque),
        Some(end) if !(matches!(bytes[end], b' ' | b'-' | b'_')) => Some(Protocol::Opaque),
        Some(end) if METHODS.contains(&&bytes[..end]) && bytes[end] == b' ' => {
            match bytes.get(end + 1) {
                None => None,
                Some(b'/' | b'*' | b'h' | b'H') => Some(Protocol::Http1),
                Some(_) => by_line(bytes),
            }
        }
        Some(_) => by_line(bytes),
    }
}

/// A record of a handshake, of whatever version; `None` where these bytes begin none.
fn detect_tls(bytes: &[u8]) -> Option<Option<Protocol>> {
    match bytes {
        [0x16] | [0x16, 3] => Some(None),
        [0x16, 3, 0..=4, ..] => Some(Some(Protocol::Tls)),
        _ => None,
    }
}

/// Whether these are the head of the SETTINGS frame that a server of HTTP/2 begins with (RFC 9113 §3.4, §6.5).
pub(crate) fn is_settings(head: &[u8; 9]) -> bool {
    let [0, 0, _, 4, 0, 0, 0, 0, 0] = head else {
        return false;
    };
    true
}

/// An unknown method makes a request only if the line names the protocol.
fn by_line(bytes: &[u8]) -> Option<Protocol> {
    match memchr::memchr(b'\n', bytes) {
        Some(end) if memchr::memmem::find(&bytes[..end], b" HTTP/").is_some() => {
            Some(Protocol::Http1)
        }
        Some(_) => Some(Protocol::Opaque),
        None if bytes.len() > LINE_MAX => Some(Protocol::Opaque),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_say_what_is_spoken() {
        for (bytes, expected) in [
            (&b"GET / HTTP/1.1\r\n"[..], Protocol::Http1),
            (b"GET /", Protocol::Http1),
            (b"\r\nPOST http://a/", Protocol::Http1),
            (b"PROPFIND /x HTTP/1.1\r\n", Protocol::Http1),
            (b"M-SEARCH * HTTP/1.1\r\n", Protocol::Http1),
            (b"GET / HTTP/9\n", Protocol::Http1),
            (PREFACE, Protocol::Http2),
            (b"\x16\x03\x01\x02\x00\x01", Protocol::Tls),
            (b"\x16\x04\x01", Protocol::Opaque),
            (b"GET key\r\n", Protocol::Opaque),
            (b"PING\r\n", Protocol::Opaque),
            (b"EHLO host\r\n", Protocol::Opaque),
            (b"*1\r\n$4\r\nPING\r\n", Protocol::Opaque),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Protocol::Opaque),
            (b"get key\r\n", Protocol::Opaque),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", Protocol::Opaque),
            (b"AAAAAAAAAAAAAAAAAAAAAAAAAAA", Protocol::Opaque),
        ] {
            assert_eq!(detect(bytes), Some(expected), "{}", bytes.escape_ascii());
            // Fewer bytes never say something else.
            for end in 0..bytes.len() {
                let early = detect(&bytes[..end]);
                assert!(
                    early.is_none_or(|early| early == expected),
                    "{} {early:?}",
                    bytes[..end].escape_ascii()
                );
            }
        }
    }
}
