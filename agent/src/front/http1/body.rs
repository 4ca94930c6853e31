//! Bodies of HTTP/1 messages: read in whatever pieces arrive, written anew with the same sizes of chunks.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::head::{Doubt, Framing, field, put_field};

/// What is left of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body(State);

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Done,
    Length(u64),
    ChunkSize,
    Chunk(u64),
    ChunkEnd,
    Trailers,
    UntilClose,
}

/// Bytes of a chunk's size with its extensions, which are not passed on.
const SIZE_LINE_MAX: usize = 16 + 256;

/// Bytes of all trailers.
const TRAILERS_MAX: usize = 16 * 1024;

/// Fields that would change how the message is read; none of them may come late (RFC 9110 §6.5.1).
const NEVER_TRAILERS: [&str; 6] = [
    "connection",
    "content-length",
    "host",
    "te",
    "transfer-encoding",
    "upgrade",
];

impl Body {
    /// A body that has not begun.
    pub fn new(framing: Framing) -> Self {
        Self(match framing {
            Framing::None | Framing::Length(0) => State::Done,
            Framing::Length(size) => State::Length(size),
            Framing::Chunked => State::ChunkSize,
            Framing::UntilClose => State::UntilClose,
        })
    }

    /// Whether all of it was written.
    pub fn is_done(&self) -> bool {
        self.0 == State::Done
    }

    /// Whether the end of the connection is its end.
    pub fn ends_with_connection(&self) -> bool {
        self.0 == State::UntilClose
    }

    /// Takes what can be understood from `input` and appends it to `out`, as it is to be sent. What is left over after the
    /// body's end is the next message. Returns whether the body is complete.
    pub fn transcode(&mut self, input: &mut BytesMut, out: &mut BytesMut) -> Result<bool, Doubt> {
        loop {
            let next = match self.0 {
                State::Done => return Ok(true),
                State::Length(left) => match take(left, input, out) {
                    0 => State::Done,
                    left => State::Length(left),
                },
                State::UntilClose => {
                    take(u64::MAX, input, out);
                    State::UntilClose
                }
                State::ChunkSize => match line(input, SIZE_LINE_MAX)? {
                    None => return Ok(false),
                    Some(line) => {
                        let size = chunk_size(&line)?;
                        out.put_slice(format!("{size:x}\r\n").as_bytes());
                        match size {
                            0 => State::Trailers,
                            size => State::Chunk(size),
                        }
                    }
                },
                State::Chunk(left) => match take(left, input, out) {
                    0 => State::ChunkEnd,
                    left => State::Chunk(left),
                },
                State::ChunkEnd => match input.get(..2) {
                    None if input.first().is_none_or(|byte| *byte == b'\r') => return Ok(false),
                    Some(b"\r\n") => {
                        input.advance(2);
                        out.put_slice(b"\r\n");
                        State::ChunkSize
                    }
                    None | Some(_) => {
                        return Err(Doubt::Malformed("a chunk that is longer than its size"));
                    }
                },
                State::Trailers => match trailers(input)? {
                    None => return Ok(false),
                    Some(trailers) => {
                        write_trailers(&trailers, out)?;
                        State::Done
                    }
                },
            };
            let blocked = matches!(next, State::Length(_) | State::Chunk(_) | State::UntilClose);
            self.0 = next;
            if blocked && input.is_empty() {
                return Ok(false);
            }
        }
    }
}

/// The payload of a complete, chunked body as [`Body::transcode`] wrote it.
pub fn payload(mut written: &[u8], framing: Framing) -> Vec<u8> {
    if framing != Framing::Chunked {
        return written.to_vec();
    }
    let mut payload = Vec::new();
    while let Some(end) = memchr::memchr(b'\r', written) {
        let size = std::str::from_utf8(&written[..end]).ok();
        let size = size.and_then(|size| usize::from_str_radix(size, 16).ok());
        let (Some(size @ 1..), Some(rest)) = (size, written.get(end + 2..)) else {
            break;
        };
        let Some(chunk) = rest.get(..size) else { break };
        payload.extend_from_slice(chunk);
        written = rest.get(size + 2..).unwrap_or_default();
    }
    payload
}

/// Moves at most `left` bytes; returns how many are left.
fn take(left: u64, input: &mut BytesMut, out: &mut BytesMut) -> u64 {
    let size = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
    if size == input.len() && out.is_empty() && size > 0 {
        // The common piece of a large body: no copy.
        std::mem::swap(input, out);
    } else {
        out.put_slice(&input[..size]);
        input.advance(size);
    }
    left - size as u64
}

/// The line at the front without its CRLF, or `None` while it is not complete.
fn line(input: &mut BytesMut, max: usize) -> Result<Option<Bytes>, Doubt> {
    let Some(end) = memchr::memchr(b'\n', &input[..input.len().min(max + 2)]) else {
        return match input.len() < max + 2 {
            true => Ok(None),
            false => Err(Doubt::Malformed("a chunk extension that is too long")),
        };
    };
    if end == 0 || input[end - 1] != b'\r' {
        return Err(Doubt::Malformed("a line that does not end with CR LF"));
    }
    let line = input.split_to(end + 1).freeze();
    Ok(Some(line.slice(..end - 1)))
}

/// `1*HEXDIG [ chunk-ext ]` (RFC 9112 §7.1), of at most 16 digits.
fn chunk_size(line: &[u8]) -> Result<u64, Doubt> {
    let digits = line
        .iter()
        .position(|byte| !byte.is_ascii_hexdigit())
        .unwrap_or(line.len());
    let extension = &line[digits..];
    let begins = extension.trim_ascii_start().first();
    let clean = !extension
        .iter()
        .any(|byte| (*byte < b' ' && *byte != b'\t') || *byte == 0x7f);
    let size = std::str::from_utf8(&line[..digits])
        .ok()
        .filter(|_| (1..=16).contains(&digits))
        .and_then(|size| u64::from_str_radix(size, 16).ok());
    match (size, begins) {
        (Some(size), None) if extension.is_empty() => Ok(size),
        (Some(size), Some(b';')) if clean => Ok(size),
        _ => Err(Doubt::Malformed("a chunk size that is none")),
    }
}

/// The trailer section with its empty line, or `None` while it is not complete.
fn trailers(input: &mut BytesMut) -> Result<Option<Bytes>, Doubt> {
    let mut start = 0;
    loop {
        let Some(end) = memchr::memchr(b'\n', &input[start..]).map(|at| at + start) else {
            return match input.len() < TRAILERS_MAX {
                true => Ok(None),
                false => Err(Doubt::TooLarge),
            };
        };
        if end == 0 || input[end - 1] != b'\r' {
            return Err(Doubt::Malformed("a line that does not end with CR LF"));
        }
        if end - 1 == start {
            return Ok(Some(input.split_to(end + 1).freeze()));
        }
        if end > TRAILERS_MAX {
            return Err(Doubt::TooLarge);
        }
        start = end + 1;
    }
}

fn write_trailers(section: &[u8], out: &mut BytesMut) -> Result<(), Doubt> {
    for line in section.split(|byte| *byte == b'\n') {
        let Some(line) = line.strip_suffix(b"\r").filter(|line| !line.is_empty()) else {
            continue;
        };
        if line.contains(&b'\r') {
            return Err(Doubt::Malformed("a CR without a LF"));
        }
        let (name, value) = field(line)?;
        let name = &line[..name];
        if NEVER_TRAILERS
            .iter()
            .any(|never| name.eq_ignore_ascii_case(never.as_bytes()))
        {
            return Err(Doubt::Malformed("a trailer that must not be one"));
        }
        put_field(out, name, &[&line[value]]);
    }
    out.put_slice(b"\r\n");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds the pieces one after the other.
    fn feed(framing: Framing, pieces: &[&[u8]]) -> Result<(Vec<u8>, bool, Vec<u8>), Doubt> {
        let (mut body, mut input, mut all) = (Body::new(framing), BytesMut::new(), Vec::new());
        let mut done = body.is_done();
        for piece in pieces {
            input.extend_from_slice(piece);
            let mut out = BytesMut::new();
            done = body.transcode(&mut input, &mut out)?;
            all.extend_from_slice(&out);
        }
        Ok((all, done, input.to_vec()))
    }

    const CHUNKED: &[u8] =
        b"5;a=\"b\"\r\nhello\r\n0A\r\n0123456789\r\n000\r\nX-Sum:  1\r\nY: 2\r\n\r\nGET / HTTP/1.1";

    #[test]
    fn chunks_keep_their_sizes_and_trailers_their_values() {
        let (out, done, rest) = feed(Framing::Chunked, &[CHUNKED]).unwrap();
        assert!(done);
        assert_eq!(
            String::from_utf8(out.clone()).unwrap(),
            "5\r\nhello\r\na\r\n0123456789\r\n0\r\nX-Sum: 1\r\nY: 2\r\n\r\n"
        );
        assert_eq!(rest, b"GET / HTTP/1.1");
        assert_eq!(payload(&out, Framing::Chunked), b"hello0123456789");
    }

    #[test]
    fn hostile_chunks_are_refused() {
        for bad in [
            &b"\r\n"[..],
            b"5\nhello\r\n",
            b"5 \r\nhello\r\n",
            b" 5\r\nhello\r\n",
            b"+5\r\nhello\r\n",
            b"0x5\r\nhello\r\n",
            b"-1\r\n",
            b"11111111111111111\r\n",
            b"5;a\rb\r\nhello\r\n",
            b"5\r\nhelloX\r\n",
            b"5\r\nhello\n",
            b"5\r\nhello\rX",
            b"0\r\n\n",
            b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"0\r\nContent-Length: 5\r\n\r\n",
            b"0\r\nX : 5\r\n\r\n",
            b"0\r\n X: 5\r\n\r\n",
            b"0\r\nX: a\rb\r\n\r\n",
        ] {
            assert!(feed(Framing::Chunked, &[bad]).is_err(), "{bad:?}");
        }
        let long = [b"5;", &[b'a'; 400][..]].concat();
        assert!(feed(Framing::Chunked, &[&long]).is_err());
        let endless = [b"0\r\n", &b"a: b\r\n".repeat(4000)[..]].concat();
        assert_eq!(feed(Framing::Chunked, &[&endless]), Err(Doubt::TooLarge));
    }

    #[test]
    fn a_length_leaves_the_next_message_alone() {
        let (out, done, rest) = feed(Framing::Length(3), &[b"ab", b"cGET"]).unwrap();
        assert_eq!(
            (&out[..], done, &rest[..]),
            (&b"abc"[..], true, &b"GET"[..])
        );
        let (_, done, _) = feed(Framing::Length(3), &[b"ab"]).unwrap();
        assert!(!done);
        let (out, done, _) = feed(Framing::UntilClose, &[b"ab", b"c"]).unwrap();
        assert_eq!((&out[..], done), (&b"abc"[..], false));
        assert!(Body::new(Framing::Length(0)).is_done());
    }

    proptest! {
        #[test]
        fn pieces_change_nothing(cuts in proptest::collection::vec(0..CHUNKED.len(), 0..8)) {
            let mut cuts = cuts;
            cuts.extend([0, CHUNKED.len()]);
            cuts.sort_unstable();
            let pieces: Vec<_> = cuts.windows(2).map(|cut| &CHUNKED[cut[0]..cut[1]]).collect();
            prop_assert_eq!(feed(Framing::Chunked, &pieces), feed(Framing::Chunked, &[CHUNKED]));
        }

        #[test]
        fn what_was_written_is_read_alike(input in proptest::collection::vec(
            prop_oneof![Just(b'\r'), Just(b'\n'), Just(b'1'), Just(b'0'), Just(b';'), Just(b'a'), Just(b':')], 0..40,
        )) {
            if let Ok((out, true, _)) = feed(Framing::Chunked, &[&input]) {
                let (again, done, rest) = feed(Framing::Chunked, &[&out]).unwrap();
                prop_assert_eq!(again, out);
                prop_assert!(done && rest.is_empty());
            }
        }
    }
}
