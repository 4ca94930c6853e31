//! HTTP/2 through the agent: each stream to whom it belongs, with its trailers and resets.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod common;

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Agent, Server, ada, agent_with, frame, soon};
use h2::client::SendRequest;
use h2::{Reason, RecvStream};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tp_agent::budget::STREAMS;
use tp_manager_api::sighting::AnsweredBy;

/// Answers `NAME METHOD TARGET SIZE-OF-BODY`, with the trailer `grpc-status`. `/reset` is reset, `/early` is answered
/// before its body, `/deaf` never, and its body is not read; answers to `/many` and `/large` have more before that line.
async fn h2_server(name: &'static str) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = Server::at(listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(serve(tcp, name));
        }
    });
    server
}

async fn serve(tcp: TcpStream, name: &'static str) {
    let Ok(mut connection) = h2::server::handshake(tcp).await else {
        return;
    };
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        tokio::spawn(async move {
            let (head, body) = request.into_parts();
            if head.uri.path() == "/reset" {
                return respond.send_reset(Reason::ENHANCE_YOUR_CALM);
            }
            let size = match head.uri.path() {
                "/early" => 0,
                "/deaf" => std::future::pending().await,
                _ => collect(body).await.unwrap().0.len(),
            };
            let forwarded = head.headers["x-forwarded-for"].to_str().unwrap();
            let text = format!(
                "{name} {} {} {size} for {forwarded}",
                head.method,
                head.uri.path()
            );
            let response = Response::builder()
                .header("x-served-by", name)
                .body(())
                .unwrap();
            let mut stream = respond.send_response(response, false).unwrap();
            if head.uri.path() == "/many" {
                for n in 0..MANY {
                    let word = format!("{n:07} ");
                    stream.send_data(word.into(), false).unwrap();
                }
            }
            if head.uri.path() == "/large" {
                stream.send_data(vec![b'x'; LARGE].into(), false).unwrap();
            }
            stream.send_data(text.into(), false).unwrap();
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            stream.send_trailers(trailers).unwrap();
        });
    }
}

/// Short messages of a stream, more than one window has room for.
const MANY: usize = 20_000;

/// A body that is larger than a window.
const LARGE: usize = 100_000;

async fn collect(mut body: RecvStream) -> Result<(Vec<u8>, Option<HeaderMap>), h2::Error> {
    let mut all = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        all.extend_from_slice(&data);
        let _ = body.flow_control().release_capacity(data.len());
    }
    Ok((all, body.trailers().await?))
}

async fn agent() -> Agent {
    let (app, local) = (h2_server("app").await, h2_server("local").await);
    let agent = agent_with(app, local, Duration::from_secs(15)).await;
    agent.push(ada(false)).await;
    agent
}

async fn client(address: SocketAddr) -> SendRequest<Bytes> {
    let tcp = TcpStream::connect(address).await.unwrap();
    let (requests, connection) = h2::client::handshake(tcp).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    requests.ready().await.unwrap()
}

fn request(path: &str, user: &str) -> Request<()> {
    Request::builder()
        .method(Method::POST)
        .uri(format!("http://web{path}"))
        .header("x-tp-user", user)
        .header("te", "trailers")
        .body(())
        .unwrap()
}

/// The answer's text, after its trailers were checked.
async fn call(requests: &SendRequest<Bytes>, path: &str, user: &str, body: &[u8]) -> String {
    let mut requests = requests.clone().ready().await.unwrap();
    let (response, mut stream) = requests.send_request(request(path, user), false).unwrap();
    for piece in body.chunks(10_000) {
        stream
            .send_data(Bytes::copy_from_slice(piece), false)
            .unwrap();
    }
    stream.send_data(Bytes::new(), true).unwrap();
    let response = soon(response).await.unwrap();
    let fallback = response.headers().get("x-tp-fallback").is_some();
    let (text, trailers) = soon(collect(response.into_body())).await.unwrap();
    assert_eq!(trailers.unwrap()["grpc-status"], "0");
    let mark = if fallback { " fallback" } else { "" };
    String::from_utf8(text).unwrap() + mark
}

#[tokio::test]
async fn interleaved_streams_go_each_to_whom_they_belong() {
    let agent = agent().await;
    let requests = client(agent.address).await;
    let calls = (0..60).map(|n| {
        let requests = requests.clone();
        tokio::spawn(async move {
            let (user, who) = if n % 3 == 0 {
                ("ada", "local")
            } else {
                ("adam", "app")
            };
            let body = vec![b'x'; n * 4_000];
            let answer = call(&requests, &format!("/{n}"), user, &body).await;
            assert_eq!(
                answer,
                format!("{who} POST /{n} {} for 127.0.0.1", body.len())
            );
        })
    });
    for call in calls.collect::<Vec<_>>() {
        soon(call).await.unwrap();
    }
}

#[tokio::test]
async fn resets_and_early_answers_pass_with_their_codes() {
    let agent = agent().await;
    let mut requests = client(agent.address).await;
    for user in ["ada", "eve"] {
        let (response, _stream) = requests
            .send_request(request("/reset", user), false)
            .unwrap();
        let error = soon(response).await.unwrap_err();
        assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM));
        // The connection and its other streams are unharmed.
        assert!(
            call(&requests, "/", user, b"abc")
                .await
                .contains(" POST / 3 ")
        );
        requests = requests.ready().await.unwrap();
        // The answer does not wait for the request's body.
        let (response, mut stream) = requests
            .send_request(request("/early", user), false)
            .unwrap();
        stream
            .send_data(Bytes::from_static(b"begun"), false)
            .unwrap();
        let response = soon(response).await.unwrap();
        let (text, trailers) = soon(collect(response.into_body())).await.unwrap();
        assert!(String::from_utf8(text).unwrap().contains("/early"));
        assert!(trailers.is_some());
        requests = requests.ready().await.unwrap();
    }
}

#[tokio::test]
async fn when_the_local_port_is_closed_the_application_answers_and_says_so() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let local = Server::at(closed.local_addr().unwrap());
    drop(closed);
    let agent = agent_with(h2_server("app").await, local, Duration::from_secs(15)).await;
    agent.push(ada(false)).await;
    let requests = client(agent.address).await;
    let answer = call(&requests, "/f", "ada", b"hello").await;
    assert_eq!(answer, "app POST /f 5 for 127.0.0.1 fallback");
    assert!(!call(&requests, "/f", "eve", b"").await.contains("fallback"));

    agent.push(ada(true)).await;
    let mut requests = requests.ready().await.unwrap();
    let (response, _) = requests
        .send_request(request("/strict", "ada"), true)
        .unwrap();
    assert_eq!(
        soon(response).await.unwrap().status(),
        StatusCode::BAD_GATEWAY
    );
}

#[tokio::test]
async fn who_watches_is_told_of_each_stream_of_theirs_and_of_no_other() {
    let agent = agent().await;
    let mut sightings = agent.watch();
    let requests = client(agent.address).await;
    for (path, user) in [("/first", "ada"), ("/others", "eve"), ("/second", "ada")] {
        call(&requests, path, user, b"").await;
    }

    for target in ["/first", "/second"] {
        let seen = soon(sightings.recv()).await.unwrap();
        assert_eq!(seen.target, target);
        assert_eq!((seen.by, seen.status), (AnsweredBy::Workstation, Some(200)));
    }
}

#[tokio::test]
async fn a_vanished_workstation_is_a_502_within_three_seconds() {
    // It takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let local = Server::at(silent.local_addr().unwrap());
    let agent = agent_with(h2_server("app").await, local, Duration::from_secs(15)).await;
    agent.push(ada(false)).await;
    let mut requests = client(agent.address).await;
    let (response, _) = requests
        .send_request(request("/once", "ada"), true)
        .unwrap();
    let (taken, _) = soon(silent.accept()).await.unwrap();
    // Not before the request has reached the workstation: until then it would fall open.
    let mut local = h2::server::handshake(taken).await.unwrap();
    let _executed = soon(local.accept()).await.unwrap().unwrap();
    let start = Instant::now();
    agent.cut_manager();
    assert_eq!(
        soon(response).await.unwrap().status(),
        StatusCode::BAD_GATEWAY
    );
    assert!(start.elapsed() < Duration::from_secs(3));
    // The next one falls open, until the routes run out.
    let answer = call(&requests, "/next", "ada", b"").await;
    assert_eq!(answer, "app POST /next 0 for 127.0.0.1 fallback");
}

#[tokio::test]
async fn a_stop_takes_no_new_stream_and_lets_the_others_finish() {
    let mut agent = agent().await;
    let tcp = TcpStream::connect(agent.address).await.unwrap();
    let (requests, connection) = h2::client::handshake(tcp).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut requests = requests.ready().await.unwrap();
    // The application's answer waits for the end of the body.
    let (response, mut stream) = requests.send_request(request("/", "eve"), false).unwrap();
    stream
        .send_data(Bytes::from_static(b"begun"), false)
        .unwrap();
    assert!(call(&requests, "/", "ada", b"").await.starts_with("local"));
    agent.stop();
    soon(async {
        while requests.clone().ready().await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    stream
        .send_data(Bytes::from_static(b", ended"), true)
        .unwrap();
    let (text, _) = soon(collect(soon(response).await.unwrap().into_body()))
        .await
        .unwrap();
    assert_eq!(text, b"app POST / 12 for 127.0.0.1");
    drop(requests);
    soon(connection).await.unwrap().unwrap();
}

#[tokio::test]
async fn short_messages_pass_in_thousands_both_ways() {
    let agent = agent().await;
    let words: String = (0..MANY).map(|n| format!("{n:07} ")).collect();
    for (user, who) in [("ada", "local"), ("eve", "app")] {
        let requests = client(agent.address).await;
        let mut requests = requests.ready().await.unwrap();
        let (response, mut stream) = requests
            .send_request(request("/many", user), false)
            .unwrap();
        for word in words.as_bytes().chunks(8) {
            stream
                .send_data(Bytes::copy_from_slice(word), false)
                .unwrap();
        }
        stream.send_data(Bytes::new(), true).unwrap();
        let response = soon(response).await.unwrap();
        let (text, trailers) = soon(collect(response.into_body())).await.unwrap();
        let text = String::from_utf8(text).unwrap();
        let said = format!("{who} POST /many {} for 127.0.0.1", words.len());
        assert!(text == format!("{words}{said}"), "{} bytes", text.len());
        assert_eq!(trailers.unwrap()["grpc-status"], "0");
    }
}

#[tokio::test]
async fn bodies_that_nobody_takes_keep_no_other_stream_waiting() {
    let agent = agent().await;
    let requests = client(agent.address).await;
    let mut stuck = Vec::new();
    for _ in 0..8 {
        let mut requests = requests.clone().ready().await.unwrap();
        let request = request("/deaf", "ada");
        let (response, mut body) = requests.send_request(request, false).unwrap();
        body.send_data(vec![b'x'; LARGE].into(), false).unwrap();
        stuck.push((response, body));
    }
    for _ in 0..8 {
        let text = call(&requests, "/", "eve", &vec![b'x'; LARGE]).await;
        assert_eq!(text, format!("app POST / {LARGE} for 127.0.0.1"));
    }
}

#[tokio::test]
async fn answers_that_nobody_reads_keep_no_other_stream_waiting() {
    let agent = agent().await;
    let tcp = TcpStream::connect(agent.address).await.unwrap();
    let mut client = h2::client::Builder::new();
    // It may have all of them waiting, as long as each stays within its own window.
    client.initial_connection_window_size(1 << 30);
    let (requests, connection) = client.handshake(tcp).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    for (user, who) in [("ada", "local"), ("eve", "app")] {
        let mut stuck = Vec::new();
        for _ in 0..40 {
            let mut requests = requests.clone().ready().await.unwrap();
            let request = request("/large", user);
            let (response, _) = requests.send_request(request, true).unwrap();
            stuck.push(soon(response).await.unwrap());
        }
        let text = call(&requests, "/large", user, b"x").await;
        let line = format!("{who} POST /large 1 for 127.0.0.1");
        assert_eq!(text.trim_start_matches('x'), line);
        assert_eq!(text.len(), LARGE + line.len());
    }
}

#[tokio::test]
async fn what_is_sent_after_an_early_answer_harms_no_other_stream() {
    let agent = agent().await;
    let tcp = TcpStream::connect(agent.address).await.unwrap();
    let mut client = h2::client::Builder::new();
    // The answer has to wait for its reader, and its stream is open as long.
    client.initial_window_size(1);
    let (requests, connection) = client.handshake(tcp).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    let mut requests = requests.ready().await.unwrap();
    let (response, mut body) = requests
        .send_request(request("/early", "eve"), false)
        .unwrap();
    let response = soon(response).await.unwrap();
    for _ in 0..20 {
        for _ in 0..100 {
            body.send_data("x".into(), false).unwrap();
        }
        assert!(call(&requests, "/", "eve", b"x").await.starts_with("app"));
    }
    let (text, _) = soon(collect(response.into_body())).await.unwrap();
    assert_eq!(text, b"app POST /early 0 for 127.0.0.1");
}

/// Opens so many streams that are never answered. They last as long as what is returned.
async fn deaf(requests: &SendRequest<Bytes>, streams: usize) -> impl Sized + use<> {
    let mut open = Vec::new();
    for _ in 0..streams {
        let mut requests = requests.clone().ready().await.unwrap();
        let sent = requests.send_request(request("/deaf", "eve"), false);
        open.push(sent.unwrap());
    }
    open
}

#[tokio::test]
async fn where_too_many_streams_are_open_each_connection_goes_on_with_a_few() {
    let agent = agent().await;
    let mut many = Vec::new();
    for _ in 0..STREAMS / 100 + 2 {
        let requests = client(agent.address).await;
        many.push((deaf(&requests, 100).await, requests));
    }
    let requests = client(agent.address).await;
    let _three = deaf(&requests, 3).await;
    for _ in 0..20 {
        let text = call(&requests, "/", "eve", b"x").await;
        assert_eq!(text, "app POST / 1 for 127.0.0.1");
    }
    let fourth = deaf(&requests, 1).await;
    let waits = call(&requests, "/", "eve", b"x");
    tokio::pin!(waits);
    let early = tokio::time::timeout(Duration::from_millis(200), &mut waits).await;
    assert!(early.is_err(), "{early:?}");
    drop(many);
    assert_eq!(soon(waits).await, "app POST / 1 for 127.0.0.1");
    drop(fourth);
}

#[tokio::test]
async fn a_graphql_operation_in_the_body_decides() {
    let agent = agent().await;
    agent.push(json!([{"id": "uid-1", "created": 1, "matchers": [{"graphql": {"operation": "GetCart"}}]}])).await;
    let mut requests = client(agent.address).await;
    for (operation, who) in [("GetCart", "local"), ("Other", "app")] {
        let mut request = request("/graphql", "eve");
        let kind = "application/json".parse().unwrap();
        request.headers_mut().insert("content-type", kind);
        let (response, mut stream) = requests.send_request(request, false).unwrap();
        let body = json!({ "operationName": operation }).to_string();
        let size = body.len();
        stream.send_data(body.into(), true).unwrap();
        let (text, _) = soon(collect(soon(response).await.unwrap().into_body()))
            .await
            .unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(
            text.starts_with(&format!("{who} POST /graphql {size} ")),
            "{text}"
        );
        requests = requests.ready().await.unwrap();
    }
}

#[tokio::test]
async fn a_client_that_is_not_ours_is_served() {
    let agent = agent().await;
    for (user, who) in [("ada", "local"), ("eve", "app")] {
        let curl = Command::new("curl")
            .args([
                "-sS",
                "--max-time",
                "20",
                "--http2-prior-knowledge",
                "-d",
                "hello",
            ])
            .args(["-H", &format!("x-tp-user: {user}")])
            .arg(format!("http://{}/curl", agent.address))
            .stdin(Stdio::null())
            .output();
        let output = soon(curl).await.unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text, format!("{who} POST /curl 5 for 127.0.0.1"));
    }
}

/// RFC 9113 §6.5.2, §8.1: what a stranger may not do ends its connection and nobody else's.
#[tokio::test]
async fn floods_end_their_own_connection() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let agent = agent().await;
    let neighbour = client(agent.address).await;
    assert!(call(&neighbour, "/", "eve", b"").await.starts_with("app"));
    // HEADERS of GET http://a/ in HPACK's static table, ended at once.
    let headers = [0x82, 0x86, 0x84, 0x41, 0x01, b'a'];
    let rapid_reset = |n: u32| {
        let stream = 2 * n + 1;
        [
            frame(1, 5, stream, &headers),
            frame(3, 0, stream, &8u32.to_be_bytes()),
        ]
        .concat()
    };
    let continuation = |n: u32| match n {
        0 => frame(1, 1, 1, &headers),
        _ => frame(9, 0, 1, &[0u8; 16_000]),
    };
    let empty_data = |n: u32| match n {
        0 => frame(1, 4, 1, &headers),
        _ => frame(0, 0, 1, &[]),
    };
    let floods: [&dyn Fn(u32) -> Vec<u8>; 3] = [&rapid_reset, &continuation, &empty_data];
    for flood in floods {
        let mut tcp = TcpStream::connect(agent.address).await.unwrap();
        let (mut rx, mut tx) = tcp.split();
        tx.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .await
            .unwrap();
        tx.write_all(&frame(4, 0, 0, &[])).await.unwrap();
        let ended = async {
            for n in 0..200_000 {
                if tx.write_all(&flood(n)).await.is_err() {
                    return true;
                }
            }
            false
        };
        let read = async {
            let mut sink = Vec::new();
            // GOAWAY, then the end or a reset.
            let _ = rx.read_to_end(&mut sink).await;
        };
        let (ended, ()) = soon(async { tokio::join!(ended, read) }).await;
        assert!(ended, "the flood went on to its end");
        assert!(call(&neighbour, "/", "eve", b"").await.starts_with("app"));
    }
}
