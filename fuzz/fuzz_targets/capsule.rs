//! Capsules of a UDP flow: the same datagrams in whatever pieces they arrive, and no panic.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tp_tunnel::streams::capsule::{CapsuleError, Decoder, PAYLOAD_MAX, encode};

fn decode(stream: &[u8], piece: usize) -> (Vec<Bytes>, Option<CapsuleError>, bool) {
    let mut decoder = Decoder::default();
    let mut datagrams = Vec::new();
    for piece in stream.chunks(piece.max(1)) {
        decoder.push(Bytes::copy_from_slice(piece));
        loop {
            match decoder.next_datagram() {
                Ok(Some(datagram)) => datagrams.push(datagram),
                Ok(None) => break,
                Err(error) => return (datagrams, Some(error), false),
            }
        }
    }
    let complete = decoder.is_complete();
    (datagrams, None, complete)
}

fuzz_target!(|input: (usize, &[u8])| {
    let (piece, stream) = input;
    let whole = decode(stream, stream.len());
    assert_eq!(decode(stream, piece % 64), whole);
    assert!(whole.0.iter().all(|datagram| datagram.len() <= PAYLOAD_MAX));
    let again: Vec<u8> = whole
        .0
        .iter()
        .flat_map(|datagram| encode(datagram))
        .collect();
    assert_eq!(decode(&again, piece % 1000), (whole.0, None, true));
});
