//! Heads as they are read, and as they are written.

use super::*;

fn parse(head: &str) -> Result<Request, Doubt> {
    Request::parse(Bytes::copy_from_slice(head.as_bytes()))
}

fn written(head: &str) -> String {
    let passage = Passage {
        peer: [10, 0, 0, 9].into(),
        continued: false,
        decrypted: false,
    };
    let mut out = BytesMut::new();
    parse(head).unwrap().write(passage, &mut out);
    String::from_utf8(out.to_vec()).unwrap()
}

#[test]
fn a_head_is_complete_at_its_empty_line_however_it_arrives() {
    let head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nmore";
    for end in 0..head.len() {
        let expected = (end >= 27).then_some(27);
        for seen in 0..=end.min(26) {
            assert_eq!(complete(&head[..end], seen), Ok(expected), "{seen} {end}");
        }
    }
    assert!(complete(b"GET / HTTP/1.1\nHost: a\n\n", 0).is_err());
    assert_eq!(complete(&[b'a'; HEAD_MAX], 0), Err(Doubt::TooLarge));
}

#[test]
fn names_values_and_order_are_kept() {
    let text = written("GET /a?b HTTP/1.1\r\nHOST:a\r\nx-B:  1 \t\r\nX-a:\r\nx-b: \u{e4}\r\n\r\n");
    assert_eq!(
        text,
        "GET /a?b HTTP/1.1\r\nHOST: a\r\nx-B: 1\r\nX-a: \r\nx-b: \u{e4}\r\nX-Forwarded-For: 10.0.0.9\r\n\r\n"
    );
}

#[test]
fn whom_it_came_from_is_appended() {
    let text = written(
        "GET / HTTP/1.0\r\nX-Forwarded-For: 1.1.1.1\r\nForwarded: for=1.1.1.1\r\nx-forwarded-for: 2.2.2.2\r\n\r\n",
    );
    assert!(text.contains("X-Forwarded-For: 1.1.1.1\r\n"), "{text}");
    assert!(
        text.contains("Forwarded: for=1.1.1.1, for=10.0.0.9\r\n"),
        "{text}"
    );
    assert!(
        text.ends_with("x-forwarded-for: 2.2.2.2, 10.0.0.9\r\n\r\n"),
        "{text}"
    );
}

#[test]
fn an_offer_of_http2_is_left_out_and_websocket_is_not() {
    let h2c = "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n";
    assert!(!parse(h2c).unwrap().upgrades());
    assert_eq!(
        written(h2c),
        "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 10.0.0.9\r\n\r\n"
    );
    let both = h2c
        .replace("h2c", "h2c, websocket")
        .replace("Upgrade, H", "keep-alive, Upgrade, H");
    assert!(parse(&both).unwrap().upgrades());
    let text = written(&both);
    assert!(
        text.contains("Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"),
        "{text}"
    );
}

#[test]
fn every_framing_doubt_is_refused() {
    let hosted = |rest: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{rest}\r\n");
    for bad in [
        hosted("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"),
        hosted("Content-Length: 1\r\nContent-Length: 2\r\n"),
        hosted("Content-Length: 1\r\nContent-Length: 1\r\n"),
        hosted("Content-Length: 1, 1\r\n"),
        hosted("Content-Length: +1\r\n"),
        hosted("Content-Length: -1\r\n"),
        hosted("Content-Length: 0x1\r\n"),
        hosted("Content-Length: \r\n"),
        hosted("Content-Length: 99999999999999999999\r\n"),
        hosted("Transfer-Encoding: gzip, chunked\r\n"),
        hosted("Transfer-Encoding: chunked, identity\r\n"),
        hosted("Transfer-Encoding: identity\r\n"),
        hosted("Transfer-Encoding: xchunked\r\n"),
        hosted("Transfer-Encoding: \"chunked\"\r\n"),
        hosted("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"),
        hosted("Transfer-Encoding : chunked\r\n"),
        hosted(" Transfer-Encoding: chunked\r\n"),
        hosted("X: a\r\n Transfer-Encoding: chunked\r\n"),
        hosted("X: a\r\n\tb\r\n"),
        hosted("X: a\rb\r\n"),
        hosted("X: a\0b\r\n"),
        hosted("X\0: a\r\n"),
        hosted("X\r\n"),
        hosted(": a\r\n"),
        hosted("Host: b\r\n"),
        "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
        "GET / HTTP/1.1\r\n\r\n".into(),
        "GET  / HTTP/1.1\r\nHost: a\r\n\r\n".into(),
        "GET / HTTP/1.1 \r\nHost: a\r\n\r\n".into(),
        "GET /\t HTTP/1.1\r\nHost: a\r\n\r\n".into(),
        "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n".into(),
        "GET / HTTP/1.2\r\nHost: a\r\n\r\n".into(),
        "GET / http/1.1\r\nHost: a\r\n\r\n".into(),
        "GET /\r\n\r\n".into(),
        "G@T / HTTP/1.1\r\nHost: a\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost: a\r\n\r\nX: y\r\n\r\n".into(),
    ] {
        assert!(parse(&bad).is_err(), "{bad:?}");
    }
    let many = hosted(&"a: b\r\n".repeat(FIELDS_MAX));
    assert_eq!(parse(&many).unwrap_err(), Doubt::TooLarge);
}

#[test]
fn the_framing_of_answers_follows_rfc_9112() {
    let framing = |head: &str, method| {
        Response::parse(Bytes::copy_from_slice(head.as_bytes()))
            .and_then(|response| response.framing(method))
    };
    let cases = [
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
            "GET",
            Ok(Framing::Length(5)),
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
            "HEAD",
            Ok(Framing::None),
        ),
        (
            "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
            "GET",
            Ok(Framing::None),
        ),
        (
            "HTTP/1.1 200\r\nTransfer-Encoding: Chunked\r\nContent-Length: 5\r\n\r\n",
            "GET",
            Ok(Framing::Chunked),
        ),
        ("HTTP/1.0 200 \r\n\r\n", "GET", Ok(Framing::UntilClose)),
    ];
    for (head, method, expected) in cases {
        assert_eq!(framing(head, method), expected, "{head:?}");
    }
    for bad in [
        "HTTP/1.1 2000 OK\r\n\r\n",
        "HTTP/1.1 20 OK\r\n\r\n",
        "HTTP/1.1 abc OK\r\n\r\n",
        "HTTP/1.1\r\n\r\n",
        "ICY 200 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ] {
        assert!(framing(bad, "GET").is_err(), "{bad:?}");
    }
}
