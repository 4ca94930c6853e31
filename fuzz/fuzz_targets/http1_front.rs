//! The agent's HTTP/1 parser: whatever a client sends, what goes on is read alike again, and pieces change nothing.
#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use tp_agent::front::http1::body::Body;
use tp_agent::front::http1::head::{Doubt, Passage, Request, complete};

/// One request as the next hop gets it, its body's end included, and what is left over.
fn forwarded(input: &[u8], piece: usize) -> Result<Option<(Vec<u8>, Vec<u8>)>, Doubt> {
    let (mut buf, mut seen, mut pieces) = (BytesMut::new(), 0, input.chunks(piece.max(1)));
    let raw: Bytes = loop {
        match complete(&buf, seen)? {
            Some(size) => break buf.split_to(size).freeze(),
            None => seen = buf.len(),
        }
        match pieces.next() {
            Some(piece) => buf.extend_from_slice(piece),
            None => return Ok(None),
        }
    };
    let request = Request::parse(raw)?;
    let passage = Passage {
        peer: [10, 0, 0, 9].into(),
        continued: false,
        decrypted: false,
    };
    let (mut all, mut body) = (BytesMut::new(), Body::new(request.framing));
    request.write(passage, &mut all);
    loop {
        let mut out = BytesMut::new();
        let done = body.transcode(&mut buf, &mut out)?;
        all.extend_from_slice(&out);
        match (done, pieces.next()) {
            (true, rest) => {
                buf.extend_from_slice(rest.unwrap_or_default());
                pieces.for_each(|piece| buf.extend_from_slice(piece));
                return Ok(Some((all.to_vec(), buf.to_vec())));
            }
            (false, Some(piece)) => buf.extend_from_slice(piece),
            (false, None) => return Ok(None),
        }
    }
}

// The first byte says how large the pieces are.
fuzz_target!(|input: &[u8]| {
    let Some((piece, bytes)) = input.split_first() else {
        return;
    };
    let piece = usize::from(piece % 64);
    let whole = forwarded(bytes, bytes.len());
    assert_eq!(forwarded(bytes, piece).ok(), whole.clone().ok());
    if let Ok(Some((out, _))) = whole {
        // It is exactly one request, and in no doubt for whoever parses it next.
        match forwarded(&out, out.len()) {
            Ok(Some((_, rest))) => assert!(rest.is_empty()),
            // The field that we add was one too many.
            Err(Doubt::TooLarge) => {}
            Ok(None) | Err(Doubt::Malformed(_)) => panic!("{} is in doubt", out.escape_ascii()),
        }
    }
});
