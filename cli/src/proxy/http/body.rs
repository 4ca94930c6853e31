//! Bodies of requests: taken out of the client's framing, and handed to the connection to the origin.
//!
//! The [`Decoder`] is pure and strict; trailers are dropped, as RFC 9110 §6.5.1 allows. The rest moves data through a
//! channel of one frame, so a slow origin slows the client down.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use hyper::body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::sync::mpsc;

use super::head::Framing;

/// Takes one body out of its framing.
#[derive(Debug)]
pub struct Decoder(State);

#[derive(Clone, Copy, Debug)]
enum State {
    /// So many bytes of data, then the end.
    Length(u64),
    ChunkSize,
    /// So many bytes of this chunk.
    ChunkData(u64),
    ChunkEnd,
    /// So many bytes of trailers may still come.
    Trailers(usize),
    Done,
}

/// What the decoder found at the start of the buffer.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Bytes of the body, taken out of the buffer.
    Data(Bytes),
    /// Nothing to be had without more bytes.
    NeedMore,
    /// The body is over; what is left in the buffer follows it.
    End,
}

/// The framing is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request body is framed wrongly")]
pub struct BadFraming;

/// Longest line with a chunk's size: 16 digits, and an extension of 256 bytes that nobody uses.
const SIZE_LINE_MAX: usize = 16 + 256;

/// Most bytes of trailers.
const TRAILERS_MAX: usize = 8 * 1024;

impl Decoder {
    /// A decoder for the body of one request.
    pub fn new(framing: Framing) -> Self {
        Self(match framing {
            Framing::None | Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::ChunkSize,
        })
    }

    /// Takes the next piece out of `buffer`.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Step, BadFraming> {
        loop {
            match self.0 {
                State::Done => return Ok(Step::End),
                State::Length(left) | State::ChunkData(left) => {
                    if buffer.is_empty() {
                        return Ok(Step::NeedMore);
                    }
                    return Ok(Step::Data(self.take(left, buffer)));
                }
                State::ChunkSize => {
                    let Some(line) = take_line(buffer, SIZE_LINE_MAX)? else {
                        return Ok(Step::NeedMore);
                    };
                    self.0 = match parse_size(&line)? {
                        0 => State::Trailers(TRAILERS_MAX),
                        size => State::ChunkData(size),
                    };
                }
                State::ChunkEnd => {
                    let Some(line) = take_line(buffer, 0)? else {
                        return Ok(Step::NeedMore);
                    };
                    debug_assert!(line.is_empty(), "the limit of 0 was checked");
                    self.0 = State::ChunkSize;
                }
                State::Trailers(left) => {
                    let Some(line) = take_line(buffer, left)? else {
                        return Ok(Step::NeedMore);
                    };
                    self.0 = match line.len() {
                        0 => State::Done,
                        used => State::Trailers(left - used),
                    };
                }
            }
        }
    }

    fn take(&mut self, left: u64, buffer: &mut BytesMut) -> Bytes {
        let now = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let after = left - now as u64;
        self.0 = match (self.0, after) {
            (State::ChunkData(_), 0) => State::ChunkEnd,
            (State::ChunkData(_), left) => State::ChunkData(left),
            (_, 0) => State::Done,
            (_, left) => State::Length(left),
        };
        buffer.split_to(now).freeze()
    }
}

/// A line of at most `max` bytes without its CR LF. A CR or LF alone is refused.
fn take_line(buffer: &mut BytesMut, max: usize) -> Result<Option<Bytes>, BadFraming> {
    let window = &buffer[..buffer.len().min(max + 2)];
    let Some(end) = window.iter().position(|byte| matches!(byte, b'\r' | b'\n')) else {
        return if window.len() > max {
            Err(BadFraming)
        } else {
            Ok(None)
        };
    };
    match (window[end], window.get(end + 1)) {
        (b'\r', None) if end <= max => Ok(None),
        (b'\r', Some(b'\n')) => {
            let line = buffer.split_to(end).freeze();
            buffer.advance(2);
            Ok(Some(line))
        }
        _ => Err(BadFraming),
    }
}

/// 1 to 16 hexadecimal digits, then at most an extension, which is ignored.
fn parse_size(line: &[u8]) -> Result<u64, BadFraming> {
    let digits = line
        .iter()
        .take_while(|byte| byte.is_ascii_hexdigit())
        .count();
    let (size, extension) = line.split_at(digits);
    let extension_ok = match extension.first() {
        None => true,
        Some(b';') => extension
            .iter()
            .all(|&byte| byte == b'\t' || (b' '..=b'~').contains(&byte)),
        Some(_) => false,
    };
    if !(1..=16).contains(&digits) || !extension_ok {
        return Err(BadFraming);
    }
    let text = std::str::from_utf8(size).map_err(|_| BadFraming)?;
    u64::from_str_radix(text, 16).map_err(|_| BadFraming)
}

/// Why an upload did not come to its end.
#[derive(Debug)]
pub(super) enum UploadError {
    Framing(BadFraming),
    /// The client is gone.
    Gone,
}

/// The largest piece read at once.
const READ: usize = 32 * 1024;

/// Moves one body from the client into `body_tx` and counts it in `moved`. Bytes behind it stay in `buffer`.
pub(super) async fn upload(
    client: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
    framing: Framing,
    body_tx: BodySender,
    moved: &AtomicU64,
) -> Result<(), UploadError> {
    let mut decoder = Decoder::new(framing);
    loop {
        match decoder.decode(buffer).map_err(UploadError::Framing)? {
            Step::End => {
                body_tx.send(Piece::End).await;
                return Ok(());
            }
            Step::Data(data) => {
                moved.fetch_add(data.len() as u64, Ordering::Relaxed);
                body_tx.send(Piece::Data(data)).await;
            }
            Step::NeedMore => {
                buffer.reserve(READ);
                if client
                    .read_buf(buffer)
                    .await
                    .map_err(|_| UploadError::Gone)?
                    == 0
                {
                    return Err(UploadError::Gone);
                }
            }
        }
    }
}

/// A body whose pieces come from [`upload`].
pub(super) struct RequestBody {
    pieces: Option<mpsc::Receiver<Piece>>,
    length: Option<u64>,
    failed: bool,
}

/// Feeds a [`RequestBody`]. Dropped before the end it makes the body an error, so that a cut upload never looks whole.
pub(super) struct BodySender(Option<mpsc::Sender<Piece>>);

enum Piece {
    Data(Bytes),
    End,
}

impl BodySender {
    /// Waits for the origin. A piece for an origin that no longer listens is dropped.
    async fn send(&self, piece: Piece) {
        if let Some(pieces) = &self.0 {
            let _ = pieces.send(piece).await;
        }
    }
}

/// A body for a request that is framed so.
pub(super) fn channel(framing: Framing) -> (BodySender, RequestBody) {
    let length = match framing {
        Framing::None => Some(0),
        Framing::Length(length) => Some(length),
        Framing::Chunked => None,
    };
    if length == Some(0) {
        let body = RequestBody {
            pieces: None,
            length,
            failed: false,
        };
        return (BodySender(None), body);
    }
    let (piece_tx, piece_rx) = mpsc::channel(1);
    let body = RequestBody {
        pieces: Some(piece_rx),
        length,
        failed: false,
    };
    (BodySender(Some(piece_tx)), body)
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let Some(pieces) = &mut self.pieces else {
            return Poll::Ready(None);
        };
        match ready!(pieces.poll_recv(cx)) {
            Some(Piece::Data(data)) => Poll::Ready(Some(Ok(Frame::data(data)))),
            Some(Piece::End) => {
                self.pieces = None;
                Poll::Ready(None)
            }
            None => {
                self.pieces = None;
                self.failed = true;
                Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_none() && !self.failed
    }

    fn size_hint(&self) -> SizeHint {
        self.length
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// Frames a chunk for a client.
pub(super) fn chunk(data: Bytes) -> impl bytes::Buf {
    Bytes::from(format!("{:x}\r\n", data.len()))
        .chain(data)
        .chain(Bytes::from_static(b"\r\n"))
}

/// The end of a chunked body.
pub(super) const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The body, and what is left behind it.
    type Decoded = (Vec<u8>, Vec<u8>);

    /// Decodes `wire` in pieces of `step` bytes; `None` when it is not whole.
    fn decode(framing: Framing, wire: &[u8], step: usize) -> Result<Option<Decoded>, BadFraming> {
        let mut decoder = Decoder::new(framing);
        let mut buffer = BytesMut::new();
        let mut pieces = wire.chunks(step.max(1));
        let mut body = Vec::new();
        loop {
            match decoder.decode(&mut buffer)? {
                Step::Data(data) => body.extend_from_slice(&data),
                Step::NeedMore => match pieces.next() {
                    Some(piece) => buffer.extend_from_slice(piece),
                    None => return Ok(None),
                },
                Step::End => {
                    let rest = [buffer.to_vec(), pieces.flatten().copied().collect()].concat();
                    return Ok(Some((body, rest)));
                }
            }
        }
    }

    #[test]
    fn bodies_end_where_their_framing_says() {
        let table = [
            (Framing::None, "GET", "", "GET"),
            (Framing::Length(3), "abcdef", "abc", "def"),
            (Framing::Chunked, "3\r\nabc\r\n0\r\n\r\nGET", "abc", "GET"),
            (
                Framing::Chunked,
                "0a;x=\"y\"\r\n0123456789\r\n1\r\n!\r\n000\r\n\r\n",
                "0123456789!",
                "",
            ),
            (
                Framing::Chunked,
                "1\r\na\r\n0\r\nX-Sum: 1\r\nY: 2\r\n\r\nrest",
                "a",
                "rest",
            ),
        ];
        for (framing, wire, body, rest) in table {
            for step in [1, 2, 3, 1000] {
                let expected = Some((body.as_bytes().to_vec(), rest.as_bytes().to_vec()));
                assert_eq!(
                    decode(framing, wire.as_bytes(), step),
                    Ok(expected),
                    "{wire:?} by {step}"
                );
            }
        }
    }

    #[test]
    fn chunks_that_two_readers_could_read_differently_are_refused() {
        let long_extension = format!("1;{}\r\na\r\n0\r\n\r\n", "x".repeat(300));
        let long_trailer = format!("0\r\nX: {}\r\n\r\n", "x".repeat(TRAILERS_MAX));
        let hostile = [
            "\r\n",
            "g\r\n",
            "-1\r\n",
            "+1\r\na\r\n",
            "0x1\r\na\r\n",
            " 1\r\na\r\n",
            "1 \r\na\r\n",
            "1\na\r\n",
            "1\r\na\n",
            "1\r\nab\r\n",
            "1\r\na0\r\n\r\n",
            "1\r\na\r0",
            "10000000000000000\r\n",
            "1;\0\r\n",
            "ffffffffffffffffff\r\n",
            "1;a\nb\r\n",
            "0\r\nX: y\n\r\n",
            &long_extension,
            &long_trailer,
        ];
        for wire in hostile {
            for step in [1, 1000] {
                assert_eq!(
                    decode(Framing::Chunked, wire.as_bytes(), step),
                    Err(BadFraming),
                    "{wire:?} by {step}"
                );
            }
        }
    }

    #[tokio::test]
    async fn a_cut_upload_is_an_error_to_the_origin_and_never_a_shorter_body() {
        for (framing, wire) in [
            (Framing::Length(10), "abc"),
            (Framing::Chunked, "3\r\nabc\r\n"),
        ] {
            let (body_tx, body) = channel(framing);
            let mut client = wire.as_bytes();
            let mut buffer = BytesMut::new();
            let moved = AtomicU64::new(0);

            let collected = http_body_util::BodyExt::collect(body);
            let (uploaded, collected) = tokio::join!(
                upload(&mut client, &mut buffer, framing, body_tx, &moved),
                collected
            );

            assert_eq!(moved.into_inner(), 3);
            assert!(matches!(uploaded, Err(UploadError::Gone)));
            assert!(collected.is_err());
        }
    }

    proptest! {
        #[test]
        fn chunking_reads_back(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..50), 0..6), step in 1..60_usize) {
            let mut wire = Vec::new();
            for piece in &pieces {
                let mut framed = chunk(Bytes::copy_from_slice(piece));
                wire.extend_from_slice(&framed.copy_to_bytes(framed.remaining()));
            }
            wire.extend_from_slice(LAST_CHUNK);
            prop_assert_eq!(decode(Framing::Chunked, &wire, step), Ok(Some((pieces.concat(), vec![]))));
        }

        #[test]
        fn decoding_never_panics(wire in proptest::collection::vec(any::<u8>(), 0..200), step in 1..50_usize) {
            let _ = decode(Framing::Chunked, &wire, step);
        }
    }
}
