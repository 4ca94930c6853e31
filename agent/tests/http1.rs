//! HTTP/1 through the agent: each request to whom it belongs, and what is in doubt to nobody.

mod common;

use std::time::{Duration, Instant};

use common::{ADA, Client, ada, agent, agent_with, expect, scripted, server, soon};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tp_manager_api::sighting::AnsweredBy;

#[tokio::test]
async fn requests_of_one_connection_go_each_to_whom_they_belong() {
    let agent = agent().await;
    let mut client = agent.connect().await;
    for turn in 0..3 {
        let mine = client.get(&format!("/mine/{turn}"), ADA).await;
        assert!(
            mine.ends_with(&format!("local GET /mine/{turn} 0")),
            "{mine}"
        );
        let other = client
            .get(&format!("/other/{turn}"), "x-tp-user: adam\r\n")
            .await;
        assert!(
            other.ends_with(&format!("app GET /other/{turn} 0")),
            "{other}"
        );
    }
    assert_eq!((agent.app.requests(), agent.local.requests()), (3, 3));
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_their_order() {
    let agent = agent().await;
    let mut client = agent.connect().await;
    let mut all = String::new();
    for turn in 0..20 {
        let fields = if turn % 3 == 0 { ADA } else { "" };
        all +=
            &format!("POST /{turn} HTTP/1.1\r\nHost: web\r\n{fields}Content-Length: 3\r\n\r\nabc");
    }
    client.send(&all).await;
    for turn in 0..20 {
        let who = if turn % 3 == 0 { "local" } else { "app" };
        let answer = client.answer().await;
        assert!(
            answer.ends_with(&format!("{who} POST /{turn} 3")),
            "{answer}"
        );
    }
}

/// What was added to requests on their way; answers are as they were.
const ADDED: &str = "X-Forwarded-For: 127.0.0.1\r\n";

#[tokio::test]
async fn an_unmatched_request_and_its_answer_are_what_they_would_be_without_the_agent() {
    let agent = agent().await;
    for request in [
        "GET /a?b=c HTTP/1.1\r\nHOST: web\r\nx-Odd-CASE: 1\r\naccept: */*\r\nX-odd-case: 2\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\n\r\nhello",
        "PUT /c HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\nX-Sum: 7\r\n\r\n",
        "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        "DELETE http://web/x HTTP/1.1\r\nHost: web\r\nCookie: a=b; c=d\r\nCookie: e=f\r\n\r\n",
    ] {
        let mut direct = Client::to(agent.app.address).await;
        direct.send(request).await;
        let expected_answer = direct.answer().await;
        let expected = agent.app.received();
        agent.app.forget();

        let mut client = agent.connect().await;
        client.send(request).await;
        assert_eq!(client.answer().await, expected_answer);
        let received = agent.app.received();
        assert_eq!(received.matches(ADDED).count(), 1, "{received}");
        assert_eq!(received.replace(ADDED, ""), expected);
        agent.app.forget();
    }
    assert_eq!(agent.local.requests(), 0);
}

#[tokio::test]
async fn a_request_may_be_split_at_every_byte() {
    let agent = agent().await;
    for fields in [ADA, ""] {
        let who = if fields.is_empty() { "app" } else { "local" };
        let request = format!(
            "POST /s HTTP/1.1\r\nHost: web\r\n{fields}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-T: 1\r\n\r\n"
        );
        let mut client = agent.connect().await;
        for at in 1..request.len() {
            client.send(&request[..at]).await;
            // The second half arrives in another segment.
            tokio::task::yield_now().await;
            client.send(&request[at..]).await;
            let answer = client.answer().await;
            assert!(
                answer.ends_with(&format!("{who} POST /s 23")),
                "{at}: {answer}"
            );
        }
        let mut client = agent.connect().await;
        for byte in request.split_inclusive(|_: char| true) {
            client.send(byte).await;
            tokio::task::yield_now().await;
        }
        assert!(client.answer().await.contains(who));
    }
}

#[tokio::test]
async fn hostile_requests_are_refused_and_reach_nobody() {
    let agent = agent().await;
    let post =
        |fields: &str, body: &str| format!("POST / HTTP/1.1\r\nHost: web\r\n{fields}\r\n{body}");
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: web\r\n\r\n";
    let large = format!("X-Large: {}\r\n", "a".repeat(70_000));
    let many = "a: b\r\n".repeat(300);
    for (request, status) in [
        (
            post(
                "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
                &format!("0\r\n\r\n{smuggled}"),
            ),
            400,
        ),
        (
            post("Content-Length: 4\r\nContent-Length: 44\r\n", smuggled),
            400,
        ),
        (post("Content-Length: 4, 4\r\n", smuggled), 400),
        (
            post(
                "Transfer-Encoding: chunked, identity\r\n",
                &format!("0\r\n\r\n{smuggled}"),
            ),
            400,
        ),
        (
            post(
                "Transfer-Encoding: xchunked\r\n",
                &format!("0\r\n\r\n{smuggled}"),
            ),
            400,
        ),
        (
            post(
                "Transfer-Encoding:\x0bchunked\r\n",
                &format!("0\r\n\r\n{smuggled}"),
            ),
            400,
        ),
        (
            post(
                "Transfer-Encoding : chunked\r\n",
                &format!("0\r\n\r\n{smuggled}"),
            ),
            400,
        ),
        (
            post(
                "X: a\r\n Transfer-Encoding: chunked\r\n",
                &format!("0\r\n\r\n{smuggled}"),
            ),
            400,
        ),
        (post("X: a\0\r\n", ""), 400),
        (post("Host: other\r\n", ""), 400),
        (post(&large, ""), 431),
        (post(&many, ""), 431),
        (
            format!("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}"),
            400,
        ),
        ("GET / HTTP/1.1\nHost: web\n\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nHost: web\nX: y\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1 x\r\nHost: web\r\n\r\n".to_owned(), 400),
        ("GET /\r\n\r\n".to_owned(), 400),
    ] {
        for fields in ["", ADA] {
            let request = request.replacen("Host: web\r\n", &format!("Host: web\r\n{fields}"), 1);
            let mut client = agent.connect().await;
            // The agent may close while we still write.
            let _ = client.tcp.write_all(request.as_bytes()).await;
            let answer = client.rest().await.unwrap();
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{request:?}: {answer:?}"
            );
            assert_eq!(answer.matches("HTTP/1.1").count(), 1);
        }
    }
    assert_eq!(agent.app.received() + &agent.local.received(), "");
}

#[tokio::test]
async fn a_body_that_turns_hostile_ends_both_connections() {
    let agent = agent().await;
    for fields in ["", ADA] {
        let mut client = agent.connect().await;
        client.send(&format!("POST / HTTP/1.1\r\nHost: web\r\n{fields}Transfer-Encoding: chunked\r\n\r\n3\r\nabcX")).await;
        client
            .send("\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: web\r\n\r\n")
            .await;
        let answer = client.rest().await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    }
    let all = agent.app.received() + &agent.local.received();
    assert!(!all.contains("smuggled"), "{all}");
}

#[tokio::test]
async fn when_the_local_port_is_closed_the_application_answers_and_says_so() {
    let closed = server("local").await;
    let address = closed.address;
    drop(closed);
    let local = common::Server::at(address);
    let agent = agent_with(server("app").await, local, Duration::from_secs(15)).await;
    agent.push(ada(false)).await;
    let mut client = agent.connect().await;
    for body in ["", "hello"] {
        let fields = format!("{ADA}Content-Length: {}\r\n", body.len());
        client
            .send(&format!(
                "POST /f HTTP/1.1\r\nHost: web\r\n{fields}\r\n{body}"
            ))
            .await;
        let answer = client.answer().await;
        assert!(answer.contains("\r\nx-tp-fallback: 1\r\n"), "{answer}");
        assert!(
            answer.ends_with(&format!("app POST /f {}", body.len())),
            "{answer}"
        );
    }
    assert!(!client.get("/", "").await.contains("x-tp-fallback"));

    agent.push(ada(true)).await;
    let answer = client.get("/strict", ADA).await;
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
    assert!(!agent.app.received().contains("/strict"));
}

#[tokio::test]
async fn who_watches_is_told_of_each_request_of_theirs_and_of_no_other() {
    let agent = agent().await;
    let mut sightings = agent.watch();
    let mut client = agent.connect().await;
    let secret = format!("{ADA}authorization: Bearer secret\r\n");
    client.get("/first?a=b", &secret).await;
    client.get("/others", "x-tp-user: eve\r\n").await;
    client.get("/second", ADA).await;

    for target in ["/first?a=b", "/second"] {
        let seen = soon(sightings.recv()).await.unwrap();
        assert_eq!(
            (seen.method.as_str(), seen.target.as_str()),
            ("GET", target)
        );
        assert_eq!((seen.by, seen.status), (AnsweredBy::Workstation, Some(200)));
        assert!(!format!("{seen:?}").contains("secret"), "{seen:?}");
    }
}

#[tokio::test]
async fn what_a_vanished_workstation_was_sent_is_not_executed_again() {
    let local = scripted(|_, _| String::new()).await;
    let agent = agent_with(server("app").await, local, Duration::from_secs(15)).await;
    agent.push(ada(false)).await;
    let start = Instant::now();
    let mut client = agent.connect().await;
    client
        .send(&format!(
            "POST /once HTTP/1.1\r\nHost: web\r\n{ADA}Content-Length: 1\r\n\r\nx"
        ))
        .await;
    let answer = client.answer().await;
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
    assert!(start.elapsed() < Duration::from_secs(3));
    assert_eq!((agent.local.requests(), agent.app.requests()), (1, 0));
}

#[tokio::test]
async fn a_truncated_answer_of_a_workstation_ends_with_a_reset() {
    let local = scripted(|_, _| {
        "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nhalf".into()
    })
    .await;
    let agent = agent_with(server("app").await, local, Duration::from_secs(15)).await;
    agent.push(ada(false)).await;
    let mut client = agent.connect().await;
    client
        .send(&format!("GET / HTTP/1.1\r\nHost: web\r\n{ADA}\r\n"))
        .await;
    let mut head = vec![0; 60];
    soon(client.tcp.read_exact(&mut head)).await.unwrap();
    // The local application waits for the next request; its end comes with the workstation's.
    agent.cut_manager();
    assert!(client.rest().await.is_err());
}

#[tokio::test]
async fn interim_answers_trailers_and_early_answers_pass() {
    let app = scripted(|head, _| match head.contains("/trailers") {
        true => "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 9\r\n\r\n".into(),
        false => "HTTP/1.1 204 No Content\r\n\r\n".into(),
    })
    .await;
    let agent = agent_with(app, server("local").await, Duration::from_secs(15)).await;
    agent.push(ada(false)).await;
    let mut client = agent.connect().await;
    client.send("GET /trailers HTTP/1.1\r\nHost: web\r\n\r\nHEAD / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").await;
    let all = client.rest().await.unwrap();
    assert_eq!(
        all,
        "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 9\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"
    );
}

#[tokio::test]
async fn a_client_that_waits_for_100_gets_it_from_who_answers() {
    for fields in ["", ADA] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let by_hand = common::Server::at(listener.local_addr().unwrap());
        let (app, local) = match fields {
            "" => (by_hand, server("local").await),
            _ => (server("app").await, by_hand),
        };
        let agent = agent_with(app, local, Duration::from_secs(15)).await;
        agent.push(ada(false)).await;
        let mut client = agent.connect().await;
        client.send(&format!("PUT / HTTP/1.1\r\nHost: web\r\n{fields}Expect: 100-continue\r\nContent-Length: 4\r\n\r\n")).await;
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        expect(&mut server, "\r\n\r\n").await;
        server
            .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
            .await
            .unwrap();
        expect(&mut client.tcp, "100 Continue\r\n\r\n").await;
        client.send("body").await;
        expect(&mut server, "body").await;
        server
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            .await
            .unwrap();
        assert!(client.answer().await.starts_with("HTTP/1.1 200 "));
    }
}

#[tokio::test]
async fn an_upgraded_connection_carries_bytes_both_ways() {
    for fields in ["", ADA] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let by_hand = common::Server::at(listener.local_addr().unwrap());
        let (app, local) = match fields {
            "" => (by_hand, server("local").await),
            _ => (server("app").await, by_hand),
        };
        let agent = agent_with(app, local, Duration::from_secs(15)).await;
        agent.push(ada(false)).await;
        let mut client = agent.connect().await;
        // The client does not wait for the 101.
        client.send(&format!("GET /chat HTTP/1.1\r\nHost: web\r\n{fields}Connection: Upgrade\r\nUpgrade: websocket\r\n\r\nearly")).await;
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        let head = expect(&mut server, "\r\n\r\n").await;
        assert!(head.contains("Upgrade: websocket\r\n"), "{head}");
        server.write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello").await.unwrap();
        expect(&mut client.tcp, "\r\n\r\nhello").await;
        expect(&mut server, "early").await;
        client.send("\0\r\n\n GET").await;
        expect(&mut server, "\0\r\n\n GET").await;
        // Half-close passes.
        client.tcp.shutdown().await.unwrap();
        assert_eq!(soon(server.read(&mut [0; 9])).await.unwrap(), 0);
        server.write_all(b"last").await.unwrap();
        drop(server);
        assert_eq!(client.rest().await.unwrap(), "last");
    }
}

#[tokio::test]
async fn a_graphql_operation_in_the_body_decides() {
    let agent = agent().await;
    agent.push(json!([{"id": "uid-1", "created": 1, "matchers": [{"graphql": {"operation": "GetCart"}}]}])).await;
    let mut client = agent.connect().await;
    let large = "x".repeat(70_000);
    for (document, who) in [
        ("query GetCart { cart }", "local"),
        ("query Other { cart }", "app"),
        ("query GetCart { cart }", "local"),
        (large.as_str(), "app"),
    ] {
        let body = json!({ "query": document }).to_string();
        let size = body.len();
        client.send(&format!("POST /graphql HTTP/1.1\r\nHost: web\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n{body}")).await;
        let answer = client.answer().await;
        assert!(
            answer.ends_with(&format!("{who} POST /graphql {size}")),
            "{answer}"
        );
    }
    // In chunks, and only after a 100.
    client.send("POST /c HTTP/1.1\r\nHost: web\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    expect(&mut client.tcp, "HTTP/1.1 100 Continue\r\n\r\n").await;
    client
        .send("9\r\n{\"operati\r\n14\r\nonName\": \"GetCart\" }\r\n0\r\n\r\n")
        .await;
    assert!(client.answer().await.contains("local POST /c"));
    assert!(!agent.local.received().contains("100-continue"));
}

#[tokio::test]
async fn two_users_of_one_port_work_side_by_side() {
    let agent = agent().await;
    let route = |id: &str, user: &str| {
        json!({
            "id": id, "created": 1, "matchers": [{"header": {"name": "x-tp-user", "exact": user}}]
        })
    };
    agent
        .push(json!([route("uid-ada", "ada"), route("uid-bob", "bob")]))
        .await;
    let mut client = agent.connect().await;
    for (fields, who) in [
        (ADA, "local"),
        ("x-tp-user: bob\r\n", "local"),
        ("x-tp-user: eve\r\n", "app"),
    ] {
        assert!(
            client
                .get("/", fields)
                .await
                .contains(&format!("x-Served-By: {who}"))
        );
    }
}

#[tokio::test]
async fn routes_without_renewal_run_out_and_open_connections_go_on() {
    let agent = agent_with(
        server("app").await,
        server("local").await,
        Duration::from_secs(1),
    )
    .await;
    agent.push(ada(false)).await;
    let mut client = agent.connect().await;
    assert!(client.get("/", ADA).await.contains("local"));
    let deadline = Instant::now() + Duration::from_secs(5);
    while !client.get("/", ADA).await.contains("x-Served-By: app") {
        assert!(Instant::now() < deadline, "the lease did not end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    agent.push(ada(false)).await;
    assert!(client.get("/", ADA).await.contains("local"));
}

#[tokio::test]
async fn a_bad_table_is_refused_and_the_old_one_stays() {
    let agent = agent().await;
    let (status, why) = agent.try_push(json!([{"id": "a b", "created": 1}])).await;
    assert_eq!((status.as_u16(), why.as_str()), (400, "\"a b\" is no uid"));
    assert!(agent.connect().await.get("/", ADA).await.contains("local"));
}

#[tokio::test]
async fn a_peer_without_the_managers_key_gets_no_byte() {
    use tp_tunnel::{Identity, Tunnel, TunnelError, carrier::tls::connect_tls};
    let agent = agent().await;
    let key = Identity::from_seed(common::SEED).unwrap().key_hash();
    let tcp = TcpStream::connect(agent.control).await.unwrap();
    let tls = connect_tls(tcp, &Identity::generate(), &key).await.unwrap();
    let refused = soon(Tunnel::establish(tls)).await;
    assert!(
        matches!(
            refused,
            Err(TunnelError::NotAdmitted | TunnelError::Carrier(_))
        ),
        "{refused:?}"
    );
    let mut plain = TcpStream::connect(agent.control).await.unwrap();
    plain
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    let mut got = Vec::new();
    let _ = soon(plain.read_to_end(&mut got)).await;
    // At most a TLS alert.
    assert!(
        got.len() <= 7 && got.first().is_none_or(|first| *first == 0x15),
        "{got:?}"
    );
}

#[tokio::test]
async fn the_applications_close_and_refusal_are_the_clients() {
    let app =
        scripted(|_, _| "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end".into()).await;
    let agent = agent_with(app, server("local").await, Duration::from_secs(15)).await;
    agent.push(ada(false)).await;
    let mut client = agent.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
    let mut head = [0; 20];
    soon(client.tcp.read_exact(&mut head)).await.unwrap();
    let mut agent = agent;
    let app = agent.app.address;
    agent.app = common::Server::at(app);
    // The server above is gone with its connections.
    assert!(client.rest().await.unwrap().ends_with("until the end"));
    let mut client = agent.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
    assert_eq!(
        client.rest().await.unwrap_err().kind(),
        std::io::ErrorKind::ConnectionReset
    );
    // An intercept serves all the same.
    assert!(agent.connect().await.get("/", ADA).await.contains("local"));
}

#[tokio::test]
async fn servers_that_speak_first_are_not_delayed() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = common::Server::at(listener.local_addr().unwrap());
    let agent = agent_with(app, server("local").await, Duration::from_secs(15)).await;
    for intercepts in [json!([]), ada(false)] {
        agent.push(intercepts).await;
        let start = Instant::now();
        let mut client = agent.connect().await;
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        server.write_all(b"220 smtp\r\n").await.unwrap();
        expect(&mut client.tcp, "220 smtp\r\n").await;
        assert!(
            start.elapsed() < Duration::from_millis(500),
            "{:?}",
            start.elapsed()
        );
        client.send("EHLO a\r\n").await;
        expect(&mut server, "EHLO a\r\n").await;
    }
    // What does not say whether it is HTTP, to a server that says nothing, is passed on after two seconds.
    let start = Instant::now();
    let mut client = agent.connect().await;
    client.send("GE").await;
    let (mut server, _) = soon(listener.accept()).await.unwrap();
    expect(&mut server, "GE").await;
    let took = start.elapsed();
    assert!(
        took > Duration::from_secs(1) && took < Duration::from_secs(4),
        "{took:?}"
    );
    server.write_all(b"late\r\n").await.unwrap();
    drop(server);
    assert_eq!(client.rest().await.unwrap(), "late\r\n");
}

#[tokio::test]
async fn an_unfiltered_intercept_takes_whatever_is_spoken() {
    let agent = agent().await;
    agent.push(json!([{"id": "uid-1", "created": 1}])).await;
    let mut client = agent.connect().await;
    client.send("anything at all\r\n\r\n").await;
    assert!(client.answer().await.contains("local"));
    // Behind a filtered one it gets what is nobody else's, HTTP or not.
    let both = json!([
        {"id": "uid-0", "created": 0, "matchers": [{"header": {"name": "x-tp-user", "exact": "eve"}}]},
        {"id": "uid-1", "created": 1}
    ]);
    agent.push(both).await;
    let mut client = agent.connect().await;
    client.send("\x16anything at all\r\n\r\n").await;
    assert!(client.answer().await.contains("local"));
    assert!(agent.connect().await.get("/", "").await.contains("local"));
}

#[tokio::test]
async fn the_clients_fin_is_the_local_applications() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let local = common::Server::at(listener.local_addr().unwrap());
    let agent = agent_with(server("app").await, local, Duration::from_secs(15)).await;
    agent.push(ada(false)).await;
    let mut client = agent.connect().await;
    client
        .send(&format!("GET / HTTP/1.1\r\nHost: web\r\n{ADA}\r\n"))
        .await;
    let (mut server, _) = soon(listener.accept()).await.unwrap();
    expect(&mut server, "\r\n\r\n").await;
    server
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        .await
        .unwrap();
    assert!(client.answer().await.starts_with("HTTP/1.1 200 "));
    drop(client);
    assert_eq!(soon(server.read(&mut [0; 9])).await.unwrap(), 0);
}

#[tokio::test]
async fn large_bodies_pass_both_ways() {
    let echo = scripted(|_, body| {
        let text = std::str::from_utf8(body).unwrap();
        format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}",
            text.len()
        )
    });
    let other = scripted(|_, body| {
        let text = std::str::from_utf8(body).unwrap();
        format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}",
            text.len()
        )
    });
    let agent = agent_with(echo.await, other.await, Duration::from_secs(15)).await;
    agent.push(ada(false)).await;
    let body: String = (0..400_000).map(|n| format!("{n:06x}")).collect();
    for fields in ["", ADA] {
        let mut client = agent.connect().await;
        let request = format!(
            "POST / HTTP/1.1\r\nHost: web\r\n{fields}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        client.send(&request).await;
        let answer = client.answer().await;
        assert!(answer.ends_with(&body), "{} bytes", answer.len());
    }
}
