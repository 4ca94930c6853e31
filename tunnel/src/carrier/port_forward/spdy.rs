//! `SPDY/3.1+portforward.k8s.io`: SPDY frames inside the messages, as `kubectl port-forward` speaks since Kubernetes 1.31.
//!
//! A forwarded port is a pair of streams, one for errors and one for data, that name the port in their headers. The API
//! server passes the frames on; the container runtime's end ignores SPDY's flow control (`moby/spdystream`), so there is
//! none here. Data that overtakes the reply to its stream is dropped there, hence [`Spdy::is_open`].
//!
//! Header blocks are sent as stored blocks of zlib (RFC 1950, RFC 1951 §3.2.4), which need no compressor, and received
//! ones are passed over. Source: SPDY draft 3.1 §2; KEP-4006. Pure: pieces of the stream in, data or an error out.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{ERROR_TEXT_MAX, PortForwardError};

/// The state of both streams, and of the frame being received.
#[derive(Debug)]
pub struct Spdy {
    /// Control frames to be sent.
    owed: Vec<u8>,
    replied: bool,
    /// Of the error stream and of the data stream: the server ended it.
    ended: [bool; 2],
    input: Bytes,
    /// The head of the frame being received, as far as it is here.
    head: Vec<u8>,
    frame: Option<Frame>,
}

/// A frame whose payload is being received.
#[derive(Debug)]
struct Frame {
    kind: Kind,
    flags: u8,
    /// Bytes of payload to come.
    left: usize,
    /// The first bytes of a payload that is no data.
    kept: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data,
    ErrorText,
    Reply,
    Reset,
    Ping,
    GoAway,
    /// SETTINGS, HEADERS, WINDOW_UPDATE: nothing that changes what is done here.
    PassedOver,
}

const ERROR_STREAM: u32 = 1;
const DATA_STREAM: u32 = 3;

const CONTROL: u32 = 0x8003_0000;
const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const FLAG_FIN: u8 = 1;

/// CMF and FLG with a preset dictionary, and the Adler-32 of SPDY/3's one, which stored blocks do not refer to.
const ZLIB_HEADER: [u8; 6] = [0x78, 0x20, 0xe3, 0xc6, 0xa7, 0xc2];

/// An empty stored block: everything before it can be taken (`Z_SYNC_FLUSH`). Go's reader waits for that.
const SYNC_FLUSH: [u8; 5] = [0, 0, 0, 0xff, 0xff];

impl Spdy {
    /// Bytes of a frame's head.
    pub const HEAD: usize = 8;

    /// Both streams asked for, and neither replied to.
    pub fn new(port: u16) -> Self {
        let mut owed = Vec::new();
        let (error, data) = (header_block("error", port), header_block("data", port));
        // Nothing is ever sent on the error stream, so it is half-closed from the start.
        syn_stream(
            &mut owed,
            ERROR_STREAM,
            FLAG_FIN,
            &[&ZLIB_HEADER, &error[..]].concat(),
        );
        syn_stream(&mut owed, DATA_STREAM, 0, &data);
        Self {
            owed,
            replied: false,
            ended: [false; 2],
            input: Bytes::new(),
            head: Vec::with_capacity(Self::HEAD),
            frame: None,
        }
    }

    /// Whether control frames wait to be sent.
    pub fn owes(&self) -> bool {
        !self.owed.is_empty()
    }

    /// Whether data may be sent: the data stream has its reply.
    pub fn is_open(&self) -> bool {
        self.replied
    }

    /// Makes a message of [`Spdy::HEAD`] bytes of room and a payload, and adds the frames that wait. Without a payload
    /// there are only these.
    pub fn complete(&mut self, message: &mut BytesMut) {
        match message.len() - Self::HEAD {
            0 => message.clear(),
            size => {
                let size = u32::try_from(size).expect("a message is much smaller than 16 MiB");
                let mut head = &mut message[..Self::HEAD];
                head.put_u32(DATA_STREAM);
                head.put_u32(size);
            }
        }
        message.put_slice(&self.owed);
        self.owed.clear();
    }

    /// Takes one piece of the stream. What earlier ones held must have been taken.
    pub fn receive(&mut self, piece: Bytes) {
        debug_assert!(self.input.is_empty(), "input is taken before more comes");
        self.input = piece;
    }

    /// The next data of the port; none needs another piece of the stream.
    ///
    /// # Errors
    /// The server broke the protocol, reported an error, or ended the port.
    pub fn next_data(&mut self) -> Result<Option<Bytes>, PortForwardError> {
        while let Some(mut frame) = self.next_frame()? {
            let here = frame.left.min(self.input.len());
            let payload = self.input.split_to(here);
            frame.left -= here;
            if frame.kind != Kind::Data {
                let room = ERROR_TEXT_MAX - frame.kept.len();
                frame.kept.extend_from_slice(&payload[..here.min(room)]);
            }
            let is_data = frame.kind == Kind::Data && here > 0;
            if frame.left > 0 {
                self.frame = Some(frame);
                return Ok(is_data.then_some(payload));
            }
            if is_data {
                // The end of the port is told after its last data.
                if frame.flags & FLAG_FIN != 0 {
                    self.frame = Some(frame);
                }
                return Ok(Some(payload));
            }
            self.finish(&frame)?;
        }
        Ok(None)
    }

    /// The frame under way, or the one that begins in the input.
    fn next_frame(&mut self) -> Result<Option<Frame>, PortForwardError> {
        if let Some(frame) = self.frame.take() {
            return Ok(Some(frame));
        }
        let missing = (Self::HEAD - self.head.len()).min(self.input.len());
        self.head.extend_from_slice(&self.input.split_to(missing));
        if self.head.len() < Self::HEAD {
            return Ok(None);
        }
        let mut head = &self.head[..];
        let (word, flags_and_length) = (head.get_u32(), head.get_u32());
        self.head.clear();
        let [flags, ..] = flags_and_length.to_be_bytes();
        Ok(Some(Frame {
            kind: Kind::of(word)?,
            flags,
            left: (flags_and_length & 0x00ff_ffff) as usize,
            kept: Vec::new(),
        }))
    }

    /// The runtime ends the data stream first, and only then says what went wrong on the other one.
    fn end(&mut self, stream: u32) -> Result<(), PortForwardError> {
        let [error, data] = &mut self.ended;
        *error |= stream == ERROR_STREAM;
        *data |= stream == DATA_STREAM;
        match *error && *data {
            true => Err(PortForwardError::Ended),
            false => Ok(()),
        }
    }

    /// A frame is complete.
    fn finish(&mut self, frame: &Frame) -> Result<(), PortForwardError> {
        let id = || match frame.kept.first_chunk() {
            Some(id) => Ok(u32::from_be_bytes(*id)),
            None => Err(PortForwardError::Protocol("a frame too short for its kind")),
        };
        let ends = frame.flags & FLAG_FIN != 0;
        match frame.kind {
            Kind::ErrorText if !frame.kept.is_empty() => {
                Err(PortForwardError::reported(&frame.kept))
            }
            Kind::ErrorText if ends => self.end(ERROR_STREAM),
            Kind::Data if ends => self.end(DATA_STREAM),
            Kind::Reply => {
                let id = id()?;
                self.replied |= id == DATA_STREAM;
                match ends {
                    true => self.end(id),
                    false => Ok(()),
                }
            }
            Kind::Reset => self.end(id()?),
            Kind::GoAway => Err(PortForwardError::Ended),
            Kind::Ping => {
                let id = id()?;
                // Even numbers are the server's own pings; odd ones would answer ours.
                if id % 2 == 0 {
                    self.owed.put_u32(CONTROL | u32::from(PING));
                    self.owed.put_u32(4);
                    self.owed.put_u32(id);
                }
                match self.owed.len() > OWED_MAX {
                    true => Err(PortForwardError::Protocol("a flood of pings")),
                    false => Ok(()),
                }
            }
            Kind::ErrorText | Kind::Data | Kind::PassedOver => Ok(()),
        }
    }
}

/// Bytes of unsent answers to pings.
const OWED_MAX: usize = 4096;

impl Kind {
    fn of(word: u32) -> Result<Self, PortForwardError> {
        if word & 0x8000_0000 == 0 {
            return match word {
                DATA_STREAM => Ok(Self::Data),
                ERROR_STREAM => Ok(Self::ErrorText),
                _ => Err(PortForwardError::Protocol(
                    "data of a stream that was not opened",
                )),
            };
        }
        if word & 0xffff_0000 != CONTROL {
            return Err(PortForwardError::Protocol("another version of SPDY than 3"));
        }
        let [.., high, low] = word.to_be_bytes();
        match u16::from_be_bytes([high, low]) {
            SYN_STREAM => Err(PortForwardError::Protocol("a stream of the server's own")),
            SYN_REPLY => Ok(Self::Reply),
            RST_STREAM => Ok(Self::Reset),
            PING => Ok(Self::Ping),
            GOAWAY => Ok(Self::GoAway),
            _ => Ok(Self::PassedOver),
        }
    }
}

/// Stream 0 is associated, priority and slot are 0.
fn syn_stream(to: &mut Vec<u8>, id: u32, flags: u8, block: &[u8]) {
    let length = u32::try_from(10 + block.len()).expect("three short headers");
    to.put_u32(CONTROL | u32::from(SYN_STREAM));
    to.put_u32(u32::from(flags) << 24 | length);
    to.put_u32(id);
    to.put_bytes(0, 6);
    to.put_slice(block);
}

/// The headers of one stream of the pair, as one stored block and a flush.
fn header_block(stream_type: &str, port: u16) -> Vec<u8> {
    let port = port.to_string();
    let headers = [
        ("streamtype", stream_type),
        ("port", &port),
        ("requestid", "0"),
    ];
    let mut pairs = Vec::new();
    pairs.put_u32(3);
    for text in headers.into_iter().flat_map(|(name, value)| [name, value]) {
        pairs.put_u32(u32::try_from(text.len()).expect("short"));
        pairs.put_slice(text.as_bytes());
    }
    let length = u16::try_from(pairs.len()).expect("three short headers");
    let mut block = vec![0];
    block.put_u16_le(length);
    block.put_u16_le(!length);
    block.put_slice(&pairs);
    block.put_slice(&SYNC_FLUSH);
    block
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(word: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        frame.put_u32(word);
        frame.put_u32(u32::from(flags) << 24 | payload.len() as u32);
        frame.put_slice(payload);
        frame
    }

    fn control(kind: u16, payload: &[u8]) -> Vec<u8> {
        frame(CONTROL | u32::from(kind), 0, payload)
    }

    fn reply(stream: u32) -> Vec<u8> {
        // A header block that is not looked at.
        control(
            SYN_REPLY,
            &[&stream.to_be_bytes()[..], &[0x78, 0xbb, 9]].concat(),
        )
    }

    /// All data of a stream that comes in pieces of this size, and why it ended.
    fn received(
        spdy: &mut Spdy,
        stream: &[u8],
        piece: usize,
    ) -> (Vec<u8>, Option<PortForwardError>) {
        let mut data = Vec::new();
        for piece in stream.chunks(piece) {
            spdy.receive(Bytes::copy_from_slice(piece));
            loop {
                match spdy.next_data() {
                    Ok(Some(more)) => data.extend_from_slice(&more),
                    Ok(None) => break,
                    Err(error) => return (data, Some(error)),
                }
            }
        }
        (data, None)
    }

    /// As `framer.ReadFrame` of moby/spdystream 0.5.1 reads it: two streams with these headers.
    #[test]
    fn the_first_message_asks_for_both_streams() {
        let mut spdy = Spdy::new(8443);
        let mut message = BytesMut::zeroed(Spdy::HEAD);
        spdy.complete(&mut message);

        let error = &message[..8 + 87];
        let data = &message[8 + 87..];
        assert_eq!(error[..12], [0x80, 3, 0, 1, 1, 0, 0, 87, 0, 0, 0, 1]);
        assert_eq!(data[..12], [0x80, 3, 0, 1, 0, 0, 0, 80, 0, 0, 0, 3]);
        assert_eq!(error[18..24], ZLIB_HEADER);
        let block = b"\0\x3c\0\xc3\xff\0\0\0\x03\0\0\0\x0astreamtype\0\0\0\x04data\0\0\0\x04port\0\0\0\x048443\
                      \0\0\0\x09requestid\0\0\0\x010\0\0\0\xff\xff";
        assert_eq!(data[18..], block[..]);
        assert!(!spdy.owes() && !spdy.is_open());
    }

    #[test]
    fn a_payload_becomes_one_frame_of_the_data_stream() {
        let mut spdy = Spdy::new(1);
        spdy.owed.clear();
        let mut message = BytesMut::from(&b"________hello"[..]);
        spdy.complete(&mut message);
        assert_eq!(&message[..], b"\0\0\0\x03\0\0\0\x05hello");
    }

    #[test]
    fn it_is_open_once_the_data_stream_has_its_reply() {
        let mut spdy = Spdy::new(1);
        assert_eq!(
            received(&mut spdy, &reply(ERROR_STREAM), 100),
            (vec![], None)
        );
        assert!(!spdy.is_open());
        assert_eq!(received(&mut spdy, &reply(DATA_STREAM), 1), (vec![], None));
        assert!(spdy.is_open());
    }

    #[test]
    fn a_port_has_ended_with_both_its_streams_and_after_its_data() {
        let data = frame(DATA_STREAM, 0, b"hello");
        let data_ends = [
            frame(DATA_STREAM, FLAG_FIN, b""),
            frame(DATA_STREAM, FLAG_FIN, b"!"),
            control(RST_STREAM, &[0, 0, 0, 3, 0, 0, 0, 5]),
        ];
        let error_ends = [
            frame(ERROR_STREAM, FLAG_FIN, b""),
            control(RST_STREAM, &[0, 0, 0, 1, 0, 0, 0, 5]),
        ];
        for (data_end, error_end) in data_ends
            .iter()
            .flat_map(|d| error_ends.iter().map(move |e| (d, e)))
        {
            for [first, last] in [[data_end, error_end], [error_end, data_end]] {
                let mut spdy = Spdy::new(1);
                let (received, error) = self::received(&mut spdy, &[&data[..], first].concat(), 3);
                assert!(
                    received.starts_with(b"hello") && error.is_none(),
                    "{first:?}"
                );
                let (_, error) = self::received(&mut spdy, last, 3);
                assert_eq!(error, Some(PortForwardError::Ended), "{last:?}");
            }
        }
        let (_, error) = received(&mut Spdy::new(1), &control(GOAWAY, &[0; 8]), 100);
        assert_eq!(error, Some(PortForwardError::Ended));
    }

    #[test]
    fn an_error_text_is_reported_whole_and_bounded() {
        let text = frame(ERROR_STREAM, 0, b"dial tcp4 127.0.0.1:1: refused\n");
        let (_, error) = received(&mut Spdy::new(1), &text, 4);
        let refused = "dial tcp4 127.0.0.1:1: refused".to_owned();
        assert_eq!(error, Some(PortForwardError::Reported(refused)));

        let long = frame(ERROR_STREAM, 0, &[b'x'; 100_000]);
        let (_, error) = received(&mut Spdy::new(1), &long, 1000);
        let kept = PortForwardError::Reported("x".repeat(ERROR_TEXT_MAX));
        assert_eq!(error, Some(kept));
    }

    #[test]
    fn the_servers_pings_are_answered_and_a_flood_of_them_is_an_error() {
        let mut spdy = Spdy::new(1);
        spdy.owed.clear();
        let ping = control(PING, &[0, 0, 0, 2]);
        let odd = control(PING, &[0, 0, 0, 1]);
        assert_eq!(
            received(&mut spdy, &[&odd[..], &ping].concat(), 5),
            (vec![], None)
        );
        let mut message = BytesMut::zeroed(Spdy::HEAD);
        spdy.complete(&mut message);
        assert_eq!(message, ping);

        let (_, error) = received(&mut spdy, &ping.repeat(1000), 100);
        assert_eq!(error, Some(PortForwardError::Protocol("a flood of pings")));
    }

    #[test]
    fn what_was_not_opened_or_is_no_spdy_3_is_a_protocol_error() {
        let bad = [
            frame(5, 0, b"x"),
            frame(0x8002_0001, 0, b""),
            control(SYN_STREAM, &[0; 10]),
            control(SYN_REPLY, &[0, 0]),
            b"HTTP/1.1 400 Bad Request\r\n".to_vec(),
        ];
        for bad in bad {
            let (_, error) = received(&mut Spdy::new(1), &bad, 100);
            assert!(
                matches!(error, Some(PortForwardError::Protocol(_))),
                "{bad:?}: {error:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn data_survives_any_cut_into_frames_and_messages(
            data in prop::collection::vec(any::<u8>(), 0..500), size in 1..100_usize, piece in 1..100_usize,
        ) {
            let settings = control(4, &[0; 12]);
            let frames = data.chunks(size).map(|chunk| [frame(DATA_STREAM, 0, chunk), settings.clone()].concat());
            let stream = frames.collect::<Vec<_>>().concat();
            prop_assert_eq!(received(&mut Spdy::new(1), &stream, piece), (data, None));
        }
    }
}
