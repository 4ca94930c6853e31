//! Heads and bodies of proxy requests: no panic, the same meaning however the bytes are cut, and no head that two
//! readers could frame differently.

#![no_main]

// By path: the package `tp` pulls in Kubernetes, which takes minutes to build with a sanitizer.
#[path = "../../cli/src/proxy/http/body.rs"]
#[allow(dead_code, unreachable_pub, reason = "only the decoder is fuzzed")]
mod body;
#[path = "../../cli/src/proxy/http/head.rs"]
#[allow(dead_code, unreachable_pub, reason = "only the parser is fuzzed")]
mod head;

use body::{Decoder, Step};
use bytes::BytesMut;
use head::{Framing, HEAD_MAX, Head};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (cut, data) = data
        .split_first()
        .map_or((1, data), |(cut, rest)| (usize::from(*cut).max(1), rest));
    match Head::parse(data) {
        Ok(Some((head, used))) => {
            check_head(&data[..used], &head);
            check_body(head.body, &data[used..], cut);
        }
        Ok(None) => assert!(data.len() < HEAD_MAX),
        Err(_) => {}
    }
    check_body(Framing::Chunked, data, cut);
});

fn check_head(bytes: &[u8], head: &Head) {
    assert!(bytes.ends_with(b"\r\n\r\n"));
    let line_feeds = bytes.iter().filter(|byte| **byte == b'\n').count();
    let line_ends = bytes.windows(2).filter(|pair| pair == b"\r\n").count();
    assert_eq!(line_feeds, line_ends, "a bare LF");
    assert!(!bytes.contains(&0));
    let lengths = head.headers.get_all("content-length").iter().count();
    let codings = head.headers.get_all("transfer-encoding").iter().count();
    match head.body {
        Framing::None => assert_eq!((lengths, codings), (0, 0)),
        Framing::Length(_) => assert_eq!((lengths, codings), (1, 0)),
        Framing::Chunked => assert_eq!((lengths, codings, head.http11), (0, 1, true)),
    }
}

/// The whole at once and in pieces of `cut` bytes must give the same.
fn check_body(framing: Framing, data: &[u8], cut: usize) {
    let whole = decode(framing, data, data.len().max(1));
    let pieces = decode(framing, data, cut);
    assert_eq!(whole, pieces);
}

/// The body and what follows it; `None` when it is not complete.
type Decoded = Option<(Vec<u8>, Vec<u8>)>;

fn decode(framing: Framing, data: &[u8], cut: usize) -> Result<Decoded, body::BadFraming> {
    let mut decoder = Decoder::new(framing);
    let mut buffer = BytesMut::new();
    let mut pieces = data.chunks(cut);
    let mut decoded = Vec::new();
    loop {
        match decoder.decode(&mut buffer)? {
            Step::Data(data) => decoded.extend_from_slice(&data),
            Step::NeedMore => match pieces.next() {
                Some(piece) => buffer.extend_from_slice(piece),
                None => return Ok(None),
            },
            Step::End => {
                let rest = [buffer.to_vec(), pieces.flatten().copied().collect()].concat();
                return Ok(Some((decoded, rest)));
            }
        }
    }
}
