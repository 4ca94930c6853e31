//! Capsules (RFC 9297 §3.2) that carry the datagrams of one UDP flow (RFC 9298 §5).
//!
//! Pure: bytes in, datagrams out. A DATAGRAM capsule holds a context id and a payload; context 0 is UDP. Everything else
//! is skipped as it passes, without being kept, so that extensions do no harm.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Largest UDP payload. A datagram capsule that claims more breaks the framing.
pub const PAYLOAD_MAX: usize = 65_535;

/// Why the bytes are no capsules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CapsuleError {
    /// A datagram capsule longer than any UDP datagram.
    #[error("a datagram of more than 65535 bytes")]
    TooLarge,
    /// A datagram capsule too short for its context id.
    #[error("a datagram without a context id")]
    NoContext,
}

/// Finds datagrams in a stream of capsules that arrives in any pieces.
#[derive(Debug, Default)]
pub struct Decoder {
    /// What is not decoded yet: less than one datagram capsule plus what was pushed last.
    rest: BytesMut,
    /// Bytes of an unwanted capsule still to come.
    skip: u64,
}

/// One datagram as a capsule. Longer payloads than UDP allows are the caller's mistake and are cut.
pub fn encode(payload: &[u8]) -> Bytes {
    let payload = &payload[..payload.len().min(PAYLOAD_MAX)];
    let mut out = BytesMut::with_capacity(payload.len() + 8);
    put_varint(&mut out, DATAGRAM);
    put_varint(&mut out, payload.len() as u64 + 1);
    put_varint(&mut out, CONTEXT_UDP);
    out.put_slice(payload);
    out.freeze()
}

impl Decoder {
    /// Takes the next piece. Call [`Decoder::next_datagram`] until it answers `None` before pushing more.
    pub fn push(&mut self, mut piece: Bytes) {
        skip(&mut self.skip, &mut piece);
        self.rest.extend_from_slice(&piece);
    }

    /// The next whole datagram, or `None` until more was pushed.
    pub fn next_datagram(&mut self) -> Result<Option<Bytes>, CapsuleError> {
        loop {
            skip(&mut self.skip, &mut self.rest);
            let mut head = &self.rest[..];
            let Some((kind, length)) = varint(&mut head).zip(varint(&mut head)) else {
                return Ok(None);
            };
            let header = self.rest.len() - head.len();
            if kind != DATAGRAM {
                self.rest.advance(header);
                self.skip = length;
                if self.rest.is_empty() && length > 0 {
                    return Ok(None);
                }
                continue;
            }
            if length > (PAYLOAD_MAX + CONTEXT_MAX) as u64 {
                return Err(CapsuleError::TooLarge);
            }
            let length = length as usize;
            if head.len() < length {
                return Ok(None);
            }
            self.rest.advance(header);
            let mut value = self.rest.split_to(length).freeze();
            match varint(&mut value).ok_or(CapsuleError::NoContext)? {
                CONTEXT_UDP if value.len() > PAYLOAD_MAX => return Err(CapsuleError::TooLarge),
                CONTEXT_UDP => return Ok(Some(value)),
                _unknown_context => {}
            }
        }
    }

    /// Whether the stream may end here: not inside a capsule.
    pub fn is_complete(&self) -> bool {
        self.rest.is_empty() && self.skip == 0
    }
}

const DATAGRAM: u64 = 0;
const CONTEXT_UDP: u64 = 0;

/// Bytes of the longest context id.
const CONTEXT_MAX: usize = 8;

fn skip(left: &mut u64, data: &mut impl Buf) {
    let now = usize::try_from(*left)
        .unwrap_or(usize::MAX)
        .min(data.remaining());
    data.advance(now);
    *left -= now as u64;
}

/// A variable-length integer (RFC 9000 §16), or `None` when it is not whole yet.
fn varint(data: &mut impl Buf) -> Option<u64> {
    let first = *data.chunk().first()?;
    let length = 1 << (first >> 6);
    if data.remaining() < length {
        return None;
    }
    let value = data.get_uint(length);
    Some(value & (u64::MAX >> (66 - 8 * length)))
}

fn put_varint(out: &mut BytesMut, value: u64) {
    match value {
        0..=0x3f => out.put_u8(value as u8),
        0x40..=0x3fff => out.put_u16(value as u16 | 0x4000),
        _ => out.put_u32(value as u32 | 0x8000_0000),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(stream: &[u8], piece: usize) -> Result<Vec<Bytes>, CapsuleError> {
        let mut decoder = Decoder::default();
        let mut datagrams = Vec::new();
        for piece in stream.chunks(piece.max(1)) {
            decoder.push(Bytes::copy_from_slice(piece));
            while let Some(datagram) = decoder.next_datagram()? {
                datagrams.push(datagram);
            }
        }
        Ok(datagrams)
    }

    #[test]
    fn varints_are_those_of_the_rfc() {
        let table: [(&[u8], u64); 5] = [
            (
                &[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c],
                151_288_809_941_952_652,
            ),
            (&[0x9d, 0x7f, 0x3e, 0x7d], 494_878_333),
            (&[0x7b, 0xbd], 15_293),
            (&[0x25], 37),
            (&[0x40, 0x25], 37),
        ];
        for (mut bytes, value) in table {
            assert_eq!(varint(&mut bytes), Some(value));
        }
    }

    #[test]
    fn other_capsules_are_skipped_without_being_kept() {
        let mut stream = vec![0x17, 0x80, 0x10, 0, 0];
        let mut decoder = Decoder::default();
        decoder.push(Bytes::copy_from_slice(&stream));
        for _ in 0..1024 {
            assert_eq!(decoder.next_datagram(), Ok(None));
            decoder.push(Bytes::from_static(&[7; 1024]));
            assert!(decoder.rest.len() <= 1024);
        }
        stream = encode(b"after").to_vec();
        decoder.push(Bytes::from(stream));
        assert_eq!(
            decoder.next_datagram(),
            Ok(Some(Bytes::from_static(b"after")))
        );
        assert!(decoder.is_complete());
    }

    #[test]
    fn an_unknown_context_is_dropped_and_an_oversized_claim_is_an_error() {
        assert_eq!(
            decode(&[0, 3, 2, 9, 9, 0, 2, 0, 5], 100),
            Ok(vec![Bytes::from_static(&[5])])
        );
        assert_eq!(
            decode(&[0, 0x80, 1, 0, 9, 0], 100),
            Err(CapsuleError::TooLarge)
        );
        assert_eq!(decode(&[0, 0], 100), Err(CapsuleError::NoContext));
        assert_eq!(decode(&[0, 1, 0], 1), Ok(vec![Bytes::new()]));
    }

    proptest! {
        #[test]
        fn datagrams_round_trip_in_any_pieces(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            piece in 1..700_usize,
        ) {
            let stream: Vec<u8> = payloads.iter().flat_map(|payload| encode(payload)).collect();
            prop_assert_eq!(decode(&stream, piece).unwrap(), payloads);
        }

        #[test]
        fn any_bytes_decode_without_panic(stream in prop::collection::vec(any::<u8>(), 0..600), piece in 1..40_usize) {
            let _ = decode(&stream, piece);
        }

        #[test]
        fn the_largest_datagrams_pass(size in PAYLOAD_MAX - 2..=PAYLOAD_MAX) {
            prop_assert_eq!(decode(&encode(&vec![1; size]), 16_384).unwrap()[0].len(), size);
        }
    }
}
