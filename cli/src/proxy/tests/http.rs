//! The HTTP proxy.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use super::super::http::head;
use super::rig::{Rig, quick, read_to_end, with_login};

/// A small server of HTTP/1.1 with keep-alive: answers with the request line's start and the Host.
pub(super) async fn hello(stream: TcpStream) {
    let mut stream = BufReader::new(stream);
    while let Some(head) = read_head(&mut stream).await {
        let path = head.split(' ').take(2).collect::<Vec<_>>().join(" ");
        let host = field(&head, "host").unwrap_or("nobody").to_owned();
        let body = format!("{path} for {host}");
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.get_mut().write_all(answer.as_bytes()).await.unwrap();
    }
}

async fn read_head(stream: &mut BufReader<TcpStream>) -> Option<String> {
    let mut head = String::new();
    loop {
        let read = stream.read_line(&mut head).await.ok()?;
        if read == 0 {
            return None;
        }
        if head.ends_with("\r\n\r\n") {
            return Some(head);
        }
    }
}

fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (found, value) = line.split_once(": ")?;
        found.eq_ignore_ascii_case(name).then_some(value)
    })
}

/// Reads a whole body by its framing and answers with its SHA-256 and how it was framed.
async fn hash_upload(stream: TcpStream) {
    let mut stream = BufReader::new(stream);
    while let Some(head) = read_head(&mut stream).await {
        if field(&head, "expect").is_some() {
            stream
                .get_mut()
                .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                .await
                .unwrap();
        }
        let mut hash = Sha256::new();
        let framing = match field(&head, "content-length") {
            Some(length) => {
                let mut body = vec![0; length.parse().unwrap()];
                stream.read_exact(&mut body).await.unwrap();
                hash.update(&body);
                "length"
            }
            None => {
                loop {
                    let mut line = String::new();
                    stream.read_line(&mut line).await.unwrap();
                    let size = usize::from_str_radix(line.trim(), 16).unwrap();
                    let mut chunk = vec![0; size + 2];
                    stream.read_exact(&mut chunk).await.unwrap();
                    hash.update(&chunk[..size]);
                    if size == 0 {
                        break;
                    }
                }
                "chunked"
            }
        };
        let body = format!("{framing} {:x}", hash.finalize());
        let answer = format!(
            "HTTP/1.1 201 Made\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.get_mut().write_all(answer.as_bytes()).await.unwrap();
    }
}

fn some_bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 % 251) as u8).collect()
}

#[tokio::test]
async fn curl_gets_pages_by_absolute_form_and_by_connect() {
    let mut rig = Rig::start().await;
    rig.server("web:80", hello).await;
    rig.server("web.shop:8080", hello).await;

    assert_eq!(
        rig.curl("http://", &["http://web/a?b"]).await.text(),
        "GET /a?b for web"
    );
    assert_eq!(
        rig.curl("http://", &["http://web.shop:8080"]).await.text(),
        "GET / for web.shop:8080"
    );
    assert_eq!(
        rig.curl("http://", &["-p", "http://web/c"]).await.text(),
        "GET /c for web"
    );
    let counted = rig.counters.snapshot();
    assert_eq!((counted.http_forward, counted.http_connect), (2, 1));
}

#[tokio::test]
async fn uploads_arrive_whole_in_both_framings() {
    let mut rig = Rig::start().await;
    rig.server("web:80", hash_upload).await;
    let body = some_bytes(3_000_000);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &body).unwrap();
    let hash = format!("{:x}", Sha256::digest(&body));
    let upload = format!("@{}", file.path().display());

    let by_length = rig
        .curl("http://", &["--data-binary", &upload, "http://web/"])
        .await
        .text();
    let chunked = [
        "-H",
        "Transfer-Encoding: chunked",
        "--data-binary",
        &upload,
        "http://web/",
    ];
    let chunked = rig.curl("http://", &chunked).await.text();
    let tunnelled = rig
        .curl("http://", &["-p", "--data-binary", &upload, "http://web/"])
        .await
        .text();

    assert_eq!(by_length, format!("length {hash}"));
    assert_eq!(chunked, format!("chunked {hash}"));
    assert_eq!(tunnelled, format!("length {hash}"));
    assert!(
        rig.counters.snapshot().bytes_up >= 2 * body.len() as u64,
        "{:?}",
        rig.counters.snapshot()
    );
}

#[tokio::test]
async fn a_continue_is_passed_on_before_the_body() {
    let mut rig = Rig::start().await;
    rig.server("web:80", hash_upload).await;
    let mut client = rig.client().await;

    let head = b"POST http://web/ HTTP/1.1\r\nHost: web\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n";
    client.write_all(head).await.unwrap();
    let mut client = BufReader::new(client);
    assert_eq!(
        read_head(&mut client).await.unwrap(),
        "HTTP/1.1 100 Continue\r\n\r\n"
    );
    client.get_mut().write_all(b"abc").await.unwrap();

    assert!(
        read_head(&mut client)
            .await
            .unwrap()
            .starts_with("HTTP/1.1 201 Made\r\n")
    );
}

#[tokio::test]
async fn one_connection_serves_many_requests_and_several_origins() {
    let mut rig = Rig::start().await;
    rig.server("web:80", hello).await;
    rig.server("db:80", hello).await;

    let urls = [
        "http://web/1",
        "http://web/2",
        "http://db/3",
        "http://web/4",
    ];
    let format = ["--write-out", "%{num_connects},"];
    let output = rig
        .curl("http://", &[&format[..], &urls].concat())
        .await
        .text();

    assert_eq!(
        output,
        "GET /1 for web1,GET /2 for web0,GET /3 for db0,GET /4 for web0,"
    );
    assert_eq!(
        rig.counters.snapshot().http_forward,
        3,
        "the second request used the first one's connection"
    );
}

#[tokio::test]
async fn an_origin_that_closes_a_kept_connection_costs_no_request() {
    let mut rig = Rig::start().await;
    let served = Arc::new(AtomicUsize::new(0));
    let count = served.clone();
    rig.server("web:80", move |stream: TcpStream| {
        let count = count.clone();
        async move {
            let mut stream = BufReader::new(stream);
            read_head(&mut stream).await;
            count.fetch_add(1, Ordering::Relaxed);
            // Says keep-alive and closes.
            stream
                .get_mut()
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                .await
                .unwrap();
        }
    })
    .await;

    let output = rig
        .curl("http://", &["http://web/1", "http://web/2", "http://web/3"])
        .await
        .text();

    assert_eq!(output, "okokok");
    assert_eq!(served.load(Ordering::Relaxed), 3);
}

/// Serves one fixed response per connection and closes.
async fn fixed(rig: &mut Rig, name: &str, response: &'static [u8]) {
    rig.server(name, move |stream: TcpStream| async move {
        let mut stream = BufReader::new(stream);
        read_head(&mut stream).await;
        stream.get_mut().write_all(response).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn responses_keep_their_content_whatever_their_framing() {
    let mut rig = Rig::start().await;
    fixed(
        &mut rig,
        "web:1",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
    )
    .await;
    fixed(&mut rig, "web:2", b"HTTP/1.0 200 OK\r\n\r\nabcde").await;
    fixed(
        &mut rig,
        "web:3",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    )
    .await;
    fixed(
        &mut rig,
        "web:4",
        b"HTTP/1.1 299 Odd Reason\r\nContent-Length: 0\r\nX-Own: 1\r\nKeep-Alive: 5\r\n\r\n",
    )
    .await;

    for (port, body) in [(1, "abcde"), (2, "abcde"), (3, "")] {
        let url = format!("http://web:{port}/");
        assert_eq!(rig.curl("http://", &[&url]).await.text(), body, "{port}");
        assert_eq!(
            rig.curl("http://", &["-0", &url]).await.text(),
            body,
            "{port} for HTTP/1.0"
        );
    }
    let head = rig.curl("http://", &["-i", "http://web:4/"]).await.text();
    assert_eq!(
        head,
        "HTTP/1.1 299 Odd Reason\r\nx-own: 1\r\ncontent-length: 0\r\n\r\n"
    );
}

#[tokio::test]
async fn a_cut_response_never_looks_whole() {
    let mut rig = Rig::start().await;
    fixed(
        &mut rig,
        "web:1",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
    )
    .await;
    fixed(
        &mut rig,
        "web:2",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    )
    .await;
    for port in [1, 2] {
        let output = rig.curl("http://", &[&format!("http://web:{port}/")]).await;
        assert!(matches!(output.code, Some(18 | 56)), "{output:?}");
    }
    let empty = rig
        .curl("http://", &["-i", "http://refused.x.svc/"])
        .await
        .text();
    assert!(empty.starts_with("HTTP/1.1 502 "), "{empty}");
}

#[tokio::test]
async fn failed_dials_have_their_status_and_a_reason_in_both_forms() {
    let rig = Rig::with(quick()).await;
    let table = [
        ("refused.x.svc", 502, "connection_refused"),
        ("unknown.x.svc", 502, "dns_error"),
        ("unreachable.x.svc", 502, "destination_ip_unroutable"),
        ("filtered.x.svc", 504, "connection_timeout"),
        ("forbidden.x.svc", 403, "destination_ip_prohibited"),
        ("localhost", 403, "destination_ip_prohibited"),
    ];
    for (name, status, error) in table {
        for request in [
            format!("CONNECT {name}:80 HTTP/1.1\r\nHost: {name}\r\n\r\n"),
            format!("GET http://{name}/ HTTP/1.1\r\nHost: {name}\r\n\r\n"),
        ] {
            let answer = String::from_utf8(rig.say(request.as_bytes()).await).unwrap();
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{request}{answer}"
            );
            assert!(
                answer.contains(&format!("\r\nproxy-status: tp; error={error}; details=\"")),
                "{answer}"
            );
            assert!(answer.contains("\r\n\r\ntp: "), "{answer}");
        }
    }
    rig.lose_tunnel();
    let answer = rig.say(b"CONNECT web:80 HTTP/1.1\r\n\r\n").await;
    let answer = String::from_utf8(answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.contains("being re-established"),
        "{answer}"
    );
}

#[tokio::test]
async fn the_proxy_does_not_connect_to_itself() {
    let rig = Rig::start().await;
    for host in [
        rig.proxy.to_string(),
        format!("localhost:{}", rig.proxy.port()),
    ] {
        let answer = rig
            .say(format!("CONNECT {host} HTTP/1.1\r\n\r\n").as_bytes())
            .await;
        assert!(
            answer.starts_with(b"HTTP/1.1 403 "),
            "{}",
            String::from_utf8_lossy(&answer)
        );
    }
}

#[tokio::test]
async fn hostile_requests_are_refused_and_nothing_reaches_a_server() {
    let mut rig = Rig::start().await;
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    rig.server("web:80", move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        async {}
    })
    .await;
    for request in head::tests::HOSTILE {
        let smuggled =
            format!("{request}0\r\n\r\nGET http://web/smuggled HTTP/1.1\r\nHost: web\r\n\r\n");
        let answer = String::from_utf8_lossy(&rig.say(smuggled.as_bytes()).await).into_owned();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{request:?}: {answer}");
        assert_eq!(
            answer.matches("HTTP/1.1").count(),
            1,
            "{request:?}: {answer}"
        );
    }
    let long = format!(
        "GET http://web/ HTTP/1.1\r\nHost: web\r\nX: {}\r\n\r\n",
        "a".repeat(70_000)
    );
    assert!(rig.say(long.as_bytes()).await.starts_with(b"HTTP/1.1 431 "));
    assert_eq!(seen.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_body_framed_wrongly_is_refused_and_the_origin_sees_no_second_request() {
    let mut rig = Rig::start().await;
    let heads = Arc::new(AtomicUsize::new(0));
    let count = heads.clone();
    rig.server("web:80", move |stream: TcpStream| {
        let count = count.clone();
        async move {
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            while stream.read_line(&mut line).await.is_ok_and(|read| read > 0) {
                if line.contains("HTTP/1.1") {
                    count.fetch_add(1, Ordering::Relaxed);
                }
                line.clear();
            }
        }
    })
    .await;
    let head = "POST http://web/ HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n";
    for body in [
        "5\nhello\r\n0\r\n\r\n",
        "5 \r\nhello\r\n0\r\n\r\n",
        "zz\r\n",
        "1\r\nab\r\nGET / HTTP/1.1\r\n\r\n",
    ] {
        let answer = rig.say(format!("{head}{body}").as_bytes()).await;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{body:?}: {answer}");
    }
    assert!(heads.load(Ordering::Relaxed) <= 4, "one head a connection");
}

#[tokio::test]
async fn credentials_are_asked_for_in_both_forms() {
    let mut rig = Rig::with(with_login()).await;
    rig.server("web:80", hello).await;

    for flags in [&["http://web/"][..], &["-p", "http://web/"]] {
        assert_eq!(
            rig.curl("http://ada:love%20lace@", flags).await.text(),
            "GET / for web"
        );
    }
    assert_eq!(
        rig.curl("socks5h://ada:love%20lace@", &["http://web/"])
            .await
            .text(),
        "GET / for web"
    );
    for request in [
        "GET http://web/ HTTP/1.1\r\nHost: web\r\n\r\n",
        "CONNECT web:80 HTTP/1.1\r\n\r\n",
    ] {
        let answer = String::from_utf8(rig.say(request.as_bytes()).await).unwrap();
        assert!(answer.starts_with("HTTP/1.1 407 "), "{answer}");
        assert!(
            answer.contains("\r\nproxy-authenticate: Basic realm=\"tp\""),
            "{answer}"
        );
    }
    assert_eq!(rig.counters.snapshot().flows_total, 3);
}

#[tokio::test]
async fn an_upgraded_connection_carries_bytes_both_ways() {
    let mut rig = Rig::start().await;
    rig.server("web:80", async |stream: TcpStream| {
        let mut stream = BufReader::new(stream);
        let head = read_head(&mut stream).await.unwrap();
        assert_eq!(field(&head, "upgrade"), Some("websocket"));
        let answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\nserver first";
        stream.get_mut().write_all(answer).await.unwrap();
        let mut word = [0; 4];
        stream.read_exact(&mut word).await.unwrap();
        word.reverse();
        stream.get_mut().write_all(&word).await.unwrap();
    })
    .await;
    let mut client = rig.client().await;

    let request = b"GET http://web/ HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nping";
    client.write_all(request).await.unwrap();
    let all = String::from_utf8(read_to_end(&mut client).await).unwrap();

    assert!(
        all.starts_with("HTTP/1.1 101 Switching Protocols\r\n"),
        "{all}"
    );
    assert!(
        all.contains("\r\nupgrade: websocket\r\n") && all.contains("\r\nconnection: upgrade\r\n"),
        "{all}"
    );
    assert!(all.ends_with("\r\n\r\nserver firstgnip"), "{all}");
}

#[tokio::test]
async fn an_origin_that_speaks_no_http_is_a_502() {
    let mut rig = Rig::start().await;
    fixed(&mut rig, "web:80", b"SSH-2.0-OpenSSH\r\n").await;
    fixed(
        &mut rig,
        "web:81",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    )
    .await;
    for port in [80, 81] {
        let answer = rig
            .curl("http://", &["-i", &format!("http://web:{port}/")])
            .await
            .text();
        assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
        assert!(
            answer.contains("\r\nproxy-status: tp; error=http_protocol_error"),
            "{answer}"
        );
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let mut rig = Rig::start().await;
    rig.server("web:80", hello).await;
    let one = |path: &str| format!("GET http://web/{path} HTTP/1.1\r\nHost: web\r\n\r\n");
    let last = "GET http://web/3 HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";

    let answer = rig
        .say(format!("{}{}{last}", one("1"), one("2")).as_bytes())
        .await;

    let answer = String::from_utf8(answer).unwrap();
    let bodies: Vec<_> = answer
        .split("\r\n\r\n")
        .skip(1)
        .map(|part| part.split("HTTP/").next().unwrap())
        .collect();
    assert_eq!(
        bodies,
        ["GET /1 for web", "GET /2 for web", "GET /3 for web"]
    );
    tokio::time::timeout(Duration::from_secs(5), async {
        while rig.counters.snapshot().flows_open > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("nothing stays open");
}
