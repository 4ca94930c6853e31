//! Heads of HTTP/1 messages, parsed strictly and written anew.
//!
//! Two parsers that disagree on where a message ends let one request hide in another. So whatever could be read in two
//! ways is a [`Doubt`] and not a message, and nothing is forwarded as it came: names, values and their order are kept,
//! everything between them is ours.

use std::net::IpAddr;
use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};
use tp_manager_api::matcher;

/// Bytes of a head, its first line included.
pub const HEAD_MAX: usize = 64 * 1024;

/// Fields of one head.
const FIELDS_MAX: usize = 256;

/// Why a message is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Doubt {
    /// It can be read in two ways, or in none.
    #[error("{0}")]
    Malformed(&'static str),
    /// It is larger than what is read.
    #[error("the header is larger than {HEAD_MAX} bytes or has more than {FIELDS_MAX} fields")]
    TooLarge,
}

/// Minor version of HTTP/1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.0.
    V10,
    /// HTTP/1.1.
    V11,
}

/// Where a message's body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// It has none.
    None,
    /// After this many bytes.
    Length(u64),
    /// After the last chunk and its trailers.
    Chunked,
    /// With the connection; responses only.
    UntilClose,
}

/// A request's head.
#[derive(Clone, Debug)]
pub struct Request {
    fields: Fields,
    method: Range<usize>,
    target: Range<usize>,
    /// Its version.
    pub version: Version,
    /// Where its body ends.
    pub framing: Framing,
}

/// A response's head.
#[derive(Clone, Debug)]
pub struct Response {
    fields: Fields,
    reason: Range<usize>,
    /// Its status code.
    pub status: u16,
    /// Its version.
    pub version: Version,
}

/// What is changed in a request on its way.
#[derive(Clone, Copy, Debug)]
pub struct Passage {
    /// Whom the request came from.
    pub peer: IpAddr,
    /// The client has been told to continue already.
    pub continued: bool,
    /// It came inside of TLS, and goes on without.
    pub decrypted: bool,
}

/// The fields of a head, as places in its bytes.
#[derive(Clone, Debug)]
struct Fields {
    raw: Bytes,
    places: Vec<(Range<usize>, Range<usize>)>,
}

/// The size of the head at the front of `buf`, or `None` while it is not complete. `seen` bytes were looked at before.
///
/// # Errors
/// A line that does not end with CRLF, and a head that grows too large, are found before the head is complete.
pub fn complete(buf: &[u8], seen: usize) -> Result<Option<usize>, Doubt> {
    // The last bytes seen may be the beginning of the end.
    let start = seen.saturating_sub(3);
    for at in memchr::memchr_iter(b'\n', &buf[start..]).map(|at| at + start) {
        if at == 0 || buf[at - 1] != b'\r' {
            return Err(Doubt::Malformed("a line that does not end with CR LF"));
        }
        if at >= 3 && &buf[at - 3..at] == b"\r\n\r" {
            return match at < HEAD_MAX {
                true => Ok(Some(at + 1)),
                false => Err(Doubt::TooLarge),
            };
        }
    }
    match buf.len() < HEAD_MAX {
        true => Ok(None),
        false => Err(Doubt::TooLarge),
    }
}

impl Request {
    /// Parses a complete head.
    pub fn parse(raw: Bytes) -> Result<Self, Doubt> {
        let line = first_line(&raw)?;
        let mut words = raw[..line].split(|byte| *byte == b' ');
        let (Some(method), Some(target), Some(version), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(Doubt::Malformed("a request line is three words"));
        };
        if method.is_empty() || !method.iter().copied().all(is_token) {
            return Err(Doubt::Malformed("a method that is none"));
        }
        if target.is_empty() || target.iter().any(|byte| *byte <= b' ' || *byte == 0x7f) {
            return Err(Doubt::Malformed("a target that is none"));
        }
        let version = version_of(version)?;
        let (method, target) = (
            0..method.len(),
            method.len() + 1..method.len() + 1 + target.len(),
        );
        let fields = Fields::parse(raw, line + 2)?;
        let hosts = fields.values("host").count();
        if hosts > 1 || (hosts == 0 && version == Version::V11) {
            return Err(Doubt::Malformed("not exactly one Host"));
        }
        let framing = fields.request_framing(version)?;
        Ok(Self {
            fields,
            method,
            target,
            version,
            framing,
        })
    }

    /// Its method.
    pub fn method(&self) -> &str {
        // A token is ASCII.
        std::str::from_utf8(&self.fields.raw[self.method.clone()]).unwrap_or_default()
    }

    fn target(&self) -> &[u8] {
        &self.fields.raw[self.target.clone()]
    }

    /// What matchers see.
    pub fn to_match(&self) -> matcher::RequestHead<'_> {
        matcher::RequestHead::new(self.method(), self.target(), self.fields.iter())
    }

    /// Whether the connection may serve another request after this one.
    pub fn persists(&self) -> bool {
        self.fields.persists(self.version)
    }

    /// Whether the client waits for a 100 before it sends the body.
    pub fn expects_continue(&self) -> bool {
        self.version == Version::V11
            && self
                .fields
                .values("expect")
                .any(|value| value.eq_ignore_ascii_case(b"100-continue"))
    }

    /// Whether it asks for another protocol than HTTP/2, which is not offered.
    pub fn upgrades(&self) -> bool {
        self.fields.has_token("connection", b"upgrade")
            && tokens(self.fields.values("upgrade")).any(|token| !is_h2c(token))
    }

    /// Whether repeating it changes nothing (RFC 9110 §9.2.1) and it has no body.
    pub fn is_safe(&self) -> bool {
        matches!(self.method(), "GET" | "HEAD" | "OPTIONS") && self.framing == Framing::None
    }

    /// Writes it for the next hop: `X-Forwarded-For`, and `Forwarded` where there is one, say whom it came from; an offer to
    /// speak HTTP/2 is left out.
    pub fn write(&self, passage: Passage, out: &mut BytesMut) {
        let fields = &self.fields;
        out.reserve(fields.raw.len() + 128);
        for part in [self.method().as_bytes(), b" ", self.target(), b" "] {
            out.put_slice(part);
        }
        out.put_slice(self.version.text());
        out.put_slice(b"\r\n");
        let offers_h2c = tokens(fields.values("upgrade")).any(is_h2c);
        let last = |name| fields.iter().rposition(|(found, _)| is(found, name));
        let (forwarded_for, forwarded) = (last("x-forwarded-for"), last("forwarded"));
        for (place, (name, value)) in fields.iter().enumerate() {
            if Some(place) == forwarded_for {
                put_field(out, name, &[value, b", ", self.peer(passage).as_bytes()]);
            } else if Some(place) == forwarded {
                let element = forwarded_element(passage.peer);
                put_field(out, name, &[value, b", ", element.as_bytes()]);
            } else if offers_h2c && is(name, "upgrade") {
                put_list(out, name, value, |token| !is_h2c(token));
            } else if offers_h2c && is(name, "connection") {
                let upgrades = self.upgrades();
                put_list(out, name, value, |token| {
                    !is(token, "http2-settings") && (upgrades || !is(token, "upgrade"))
                });
            } else if !(is(name, "http2-settings") || (passage.continued && is(name, "expect"))) {
                put_field(out, name, &[value]);
            }
        }
        if forwarded_for.is_none() {
            put_field(out, b"X-Forwarded-For", &[self.peer(passage).as_bytes()]);
        }
        if passage.decrypted && last("x-forwarded-proto").is_none() {
            put_field(out, b"X-Forwarded-Proto", &[b"https"]);
        }
        out.put_slice(b"\r\n");
    }

    fn peer(&self, passage: Passage) -> String {
        passage.peer.to_canonical().to_string()
    }
}

impl Response {
    /// Parses a complete head.
    pub fn parse(raw: Bytes) -> Result<Self, Doubt> {
        let line = first_line(&raw)?;
        let doubt = Err(Doubt::Malformed("a status line that is none"));
        let Some((version, rest)) = raw[..line].split_at_checked(8) else {
            return doubt;
        };
        let version = version_of(version)?;
        match rest {
            [b' ', a, b, c, b' ', ..] => {
                Self::with_status(&[*a, *b, *c], version, 13..line, raw, line)
            }
            [b' ', a, b, c] => Self::with_status(&[*a, *b, *c], version, line..line, raw, line),
            _ => doubt,
        }
    }

    fn with_status(
        digits: &[u8; 3],
        version: Version,
        reason: Range<usize>,
        raw: Bytes,
        line: usize,
    ) -> Result<Self, Doubt> {
        if !digits.iter().all(u8::is_ascii_digit) || digits[0] == b'0' {
            return Err(Doubt::Malformed("a status that is none"));
        }
        if raw[reason.clone()].iter().copied().any(is_control) {
            return Err(Doubt::Malformed("a control character in a status line"));
        }
        let status = digits
            .iter()
            .fold(0, |status, digit| status * 10 + u16::from(digit - b'0'));
        Ok(Self {
            fields: Fields::parse(raw, line + 2)?,
            reason,
            status,
            version,
        })
    }

    /// Where the body ends, for an answer to this method (RFC 9112 §6.3).
    pub fn framing(&self, method: &str) -> Result<Framing, Doubt> {
        if method == "HEAD" || self.status < 200 || matches!(self.status, 204 | 304) {
            return Ok(Framing::None);
        }
        let codings: Vec<_> = tokens(self.fields.values("transfer-encoding")).collect();
        match codings.as_slice() {
            [] => {}
            [only] if only.eq_ignore_ascii_case(b"chunked") && self.version == Version::V11 => {
                return Ok(Framing::Chunked);
            }
            _ => return Err(Doubt::Malformed("a transfer coding that is not chunked")),
        }
        Ok(self
            .fields
            .length()?
            .map_or(Framing::UntilClose, Framing::Length))
    }

    /// Whether the connection may serve another request after this answer, as far as its fields say.
    pub fn persists(&self) -> bool {
        self.fields.persists(self.version)
    }

    /// Writes it for the client. Beside `Transfer-Encoding` a length says nothing and is left out (RFC 9112 §6.3).
    pub fn write(&self, marks: &[(&str, &str)], out: &mut BytesMut) {
        let fields = &self.fields;
        out.reserve(fields.raw.len() + 64);
        out.put_slice(self.version.text());
        out.put_slice(format!(" {} ", self.status).as_bytes());
        out.put_slice(&fields.raw[self.reason.clone()]);
        out.put_slice(b"\r\n");
        let chunked = fields.values("transfer-encoding").next().is_some();
        for (name, value) in fields.iter() {
            if !(chunked && is(name, "content-length")) {
                put_field(out, name, &[value]);
            }
        }
        for (name, value) in marks {
            put_field(out, name.as_bytes(), &[value.as_bytes()]);
        }
        out.put_slice(b"\r\n");
    }
}

impl Version {
    fn text(self) -> &'static [u8] {
        match self {
            Self::V10 => b"HTTP/1.0",
            Self::V11 => b"HTTP/1.1",
        }
    }
}

impl Fields {
    /// Parses the lines from `at` to the empty one.
    fn parse(raw: Bytes, mut at: usize) -> Result<Self, Doubt> {
        let mut places = Vec::with_capacity(16);
        loop {
            let size = memchr::memchr(b'\r', &raw[at..])
                .ok_or(Doubt::Malformed("a line that does not end"))?;
            if raw.get(at + size + 1) != Some(&b'\n') {
                return Err(Doubt::Malformed("a CR without a LF"));
            }
            if size == 0 {
                return match at + 2 == raw.len() {
                    true => Ok(Self { raw, places }),
                    false => Err(Doubt::Malformed("an empty line inside of a header")),
                };
            }
            let (name, value) = field(&raw[at..at + size])?;
            if places.len() == FIELDS_MAX {
                return Err(Doubt::TooLarge);
            }
            places.push((at..at + name, at + value.start..at + value.end));
            at += size + 2;
        }
    }

    fn iter(&self) -> impl DoubleEndedIterator<Item = (&[u8], &[u8])> + ExactSizeIterator {
        self.places
            .iter()
            .map(|(name, value)| (&self.raw[name.clone()], &self.raw[value.clone()]))
    }

    fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.iter()
            .filter(move |(found, _)| is(found, name))
            .map(|(_, value)| value)
    }

    fn has_token(&self, name: &str, token: &[u8]) -> bool {
        tokens(self.values(name)).any(|found| found.eq_ignore_ascii_case(token))
    }

    fn persists(&self, version: Version) -> bool {
        match version {
            Version::V11 => !self.has_token("connection", b"close"),
            Version::V10 => self.has_token("connection", b"keep-alive"),
        }
    }

    /// RFC 9112 §6.1-6.3, of which every exception is a doubt here.
    fn request_framing(&self, version: Version) -> Result<Framing, Doubt> {
        let mut codings = self.values("transfer-encoding");
        let coding = codings.next();
        if codings.next().is_some() {
            return Err(Doubt::Malformed("Transfer-Encoding twice"));
        }
        let length = self.length()?;
        match (coding, length) {
            (None, None) => Ok(Framing::None),
            (None, Some(length)) => Ok(Framing::Length(length)),
            (Some(_), Some(_)) => Err(Doubt::Malformed(
                "both Content-Length and Transfer-Encoding",
            )),
            (Some(_), None) if version == Version::V10 => {
                Err(Doubt::Malformed("Transfer-Encoding in HTTP/1.0"))
            }
            (Some(coding), None) if coding.eq_ignore_ascii_case(b"chunked") => Ok(Framing::Chunked),
            (Some(_), None) => Err(Doubt::Malformed("a transfer coding that is not chunked")),
        }
    }

    fn length(&self) -> Result<Option<u64>, Doubt> {
        let mut lengths = self.values("content-length");
        let Some(length) = lengths.next() else {
            return Ok(None);
        };
        if lengths.next().is_some() {
            return Err(Doubt::Malformed("Content-Length twice"));
        }
        let digits = !length.is_empty() && length.iter().all(u8::is_ascii_digit);
        let number = std::str::from_utf8(length).ok().filter(|_| digits);
        match number.and_then(|number| number.parse().ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(Doubt::Malformed("a Content-Length that is no number")),
        }
    }
}

/// Parses one field line without its end: the size of the name and the place of the value.
pub(super) fn field(line: &[u8]) -> Result<(usize, Range<usize>), Doubt> {
    let colon = memchr::memchr(b':', line).ok_or(Doubt::Malformed("a field without a colon"))?;
    // This refuses folded lines and a space before the colon, too.
    if colon == 0 || !line[..colon].iter().copied().all(is_token) {
        return Err(Doubt::Malformed("a field name that is none"));
    }
    let value = &line[colon + 1..];
    if value.iter().copied().any(is_control) {
        return Err(Doubt::Malformed("a control character in a field"));
    }
    let is_space = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = value.iter().position(|byte| !is_space(byte));
    let start = colon + 1 + start.unwrap_or(value.len());
    let end = line[start..]
        .iter()
        .rposition(|byte| !is_space(byte))
        .map_or(start, |last| start + last + 1);
    Ok((colon, start..end))
}

pub(super) fn put_field(out: &mut BytesMut, name: &[u8], value: &[&[u8]]) {
    out.put_slice(name);
    out.put_slice(b": ");
    value.iter().for_each(|part| out.put_slice(part));
    out.put_slice(b"\r\n");
}

/// A field whose list keeps some of its members; an empty list is no field.
fn put_list(out: &mut BytesMut, name: &[u8], value: &[u8], keep: impl Fn(&[u8]) -> bool) {
    let kept: Vec<_> = tokens([value].into_iter())
        .filter(|token| keep(token))
        .collect();
    if !kept.is_empty() {
        put_field(out, name, &[&kept.join(&b", "[..])]);
    }
}

fn forwarded_element(peer: IpAddr) -> String {
    match peer.to_canonical() {
        IpAddr::V4(ip) => format!("for={ip}"),
        IpAddr::V6(ip) => format!("for=\"[{ip}]\""),
    }
}

fn first_line(raw: &[u8]) -> Result<usize, Doubt> {
    let size = memchr::memchr(b'\r', raw).ok_or(Doubt::Malformed("a line that does not end"))?;
    match raw.get(size + 1) {
        Some(b'\n') => Ok(size),
        _ => Err(Doubt::Malformed("a CR without a LF")),
    }
}

fn version_of(text: &[u8]) -> Result<Version, Doubt> {
    match text {
        b"HTTP/1.1" => Ok(Version::V11),
        b"HTTP/1.0" => Ok(Version::V10),
        _ => Err(Doubt::Malformed("a version that is not HTTP/1")),
    }
}

fn tokens<'a>(values: impl Iterator<Item = &'a [u8]>) -> impl Iterator<Item = &'a [u8]> {
    values
        .flat_map(|value| value.split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|token| !token.is_empty())
}

fn is(name: &[u8], wanted: &str) -> bool {
    name.eq_ignore_ascii_case(wanted.as_bytes())
}

fn is_h2c(token: &[u8]) -> bool {
    token.eq_ignore_ascii_case(b"h2c") || token.eq_ignore_ascii_case(b"h2")
}

/// `tchar` of RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn is_control(byte: u8) -> bool {
    (byte < b' ' && byte != b'\t') || byte == 0x7f
}

#[cfg(test)]
mod tests;
