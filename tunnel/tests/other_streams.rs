//! UDP, DNS, control resources, and peers that are not ours.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod common;

use std::io::ErrorKind;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::{
    Loopback, connection, connection_with, ends, eventually, listener, pattern, soon, target,
    through,
};
use futures::{SinkExt, StreamExt};
use h2::Reason;
use http::{Method, Request, Response, StatusCode, Uri};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::UdpSocket;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role as WsRole;
use tp_tunnel::carrier::port_forward::{PortForwardStream, Subprotocol};
use tp_tunnel::carrier::tls::{TlsError, accept_tls, connect_tls};
use tp_tunnel::{Identity, OpenError, Settings, Tunnel, serve};

async fn udp_echo() -> tp_tunnel::Target {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let to = target(socket.local_addr().unwrap());
    tokio::spawn(async move {
        let mut buffer = vec![0; 65_535];
        loop {
            let (size, from) = socket.recv_from(&mut buffer).await.unwrap();
            let _ = socket.send_to(&buffer[..size], from).await;
        }
    });
    to
}

#[tokio::test]
async fn datagrams_of_every_size_come_back_whole() {
    let connection = connection().await;
    let mut flow = soon(connection.tunnel.associate(&udp_echo().await))
        .await
        .unwrap();
    for size in [0, 1, 512, 1472, 9000, 32_768, 65_507] {
        let datagram = Bytes::from(pattern(size as u64, size));
        assert!(flow.send(datagram.clone()).unwrap());
        assert_eq!(
            soon(flow.recv()).await.unwrap(),
            Some(datagram),
            "{size} bytes"
        );
    }
    assert!(
        !flow.send(Bytes::from(vec![0; 65_536])).unwrap(),
        "larger than UDP allows"
    );
}

#[tokio::test]
async fn an_idle_udp_flow_expires_and_an_active_one_does_not() {
    let settings = Settings {
        datagram_idle: Duration::from_millis(200),
        ..Settings::default()
    };
    let connection = connection_with(settings).await;
    let mut flow = soon(connection.tunnel.associate(&udp_echo().await))
        .await
        .unwrap();
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        flow.send(Bytes::from_static(b"alive")).unwrap();
        assert_eq!(soon(flow.recv()).await.unwrap().unwrap(), "alive");
    }
    assert_eq!(soon(flow.recv()).await.unwrap(), None);
    drop(flow);
    eventually("the flow is forgotten", || {
        connection.tunnel.traffic().flows == 0
    })
    .await;
}

#[tokio::test]
async fn datagrams_to_a_stuck_peer_are_dropped_and_not_queued() {
    let (ours, wire) = duplex(4096);
    let (far, theirs) = duplex(4096);
    let (cut, was_cut) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(async move {
        let (mut wire, mut far) = (wire, far);
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut wire, &mut far) => {}
            _ = was_cut => {}
        }
        std::future::pending::<()>().await;
    });
    let connection = common::over(ours, theirs, Settings::default()).await;
    let mut flow = soon(connection.tunnel.associate(&udp_echo().await))
        .await
        .unwrap();
    cut.send(()).unwrap();
    let mut sent = 0;
    for _ in 0..1000 {
        sent += usize::from(flow.send(Bytes::from(vec![0; 1000])).unwrap());
        tokio::task::yield_now().await;
    }
    assert!(
        (1..300).contains(&sent),
        "{sent} of 1000 datagrams were taken"
    );
}

#[tokio::test]
async fn dns_and_control_are_answered() {
    let tunnel = connection().await.tunnel;
    assert_eq!(
        soon(tunnel.dns_query(Bytes::from_static(b"query")))
            .await
            .unwrap(),
        "yreuq"
    );
    let long = Bytes::from(pattern(1, 65_535));
    assert_eq!(
        soon(tunnel.dns_query(long.clone())).await.unwrap().len(),
        long.len()
    );

    let get = |path: &'static str| tunnel.control(Method::GET, path, Bytes::new());
    assert_eq!(
        soon(get("/v1/health")).await.unwrap().body(),
        "{\"replica\":\"test\"}"
    );
    assert_eq!(
        soon(get("/v1/cluster?after=7")).await.unwrap().body(),
        "GET https://tp/v1/cluster?after=7 0"
    );
    let posted = tunnel.control(Method::POST, "/v1/x", Bytes::from(vec![0; 65_536]));
    assert_eq!(
        soon(posted).await.unwrap().body(),
        "POST https://tp/v1/x 65536"
    );
}

#[tokio::test]
async fn bad_requests_get_their_status_and_bounds_hold() {
    let tunnel = connection().await.tunnel;
    let cases = [
        (Method::GET, "/", 0, StatusCode::NOT_FOUND),
        (Method::GET, "/v2/health", 0, StatusCode::NOT_FOUND),
        (Method::GET, "/dns-query", 0, StatusCode::METHOD_NOT_ALLOWED),
        (
            Method::POST,
            "/dns-query",
            10,
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
        ),
        (
            Method::OPTIONS,
            "/v1/health",
            0,
            StatusCode::METHOD_NOT_ALLOWED,
        ),
        (Method::POST, "/v1/x", 65_537, StatusCode::PAYLOAD_TOO_LARGE),
        (
            Method::POST,
            "/v1/x",
            8 << 20,
            StatusCode::PAYLOAD_TOO_LARGE,
        ),
    ];
    for (method, path, size, status) in cases {
        let response = soon(tunnel.control(method.clone(), path, Bytes::from(vec![0; size])))
            .await
            .unwrap();
        assert_eq!(
            response.status(),
            status,
            "{method} {path} with {size} bytes"
        );
    }
    let large = soon(tunnel.control(Method::GET, "/v1/large", Bytes::new())).await;
    assert!(
        matches!(large, Err(OpenError::Answer(_))),
        "an answer above 4 MiB was taken"
    );
    assert!(
        soon(tunnel.dns_query(Bytes::from_static(b"after")))
            .await
            .is_ok()
    );
}

/// Another HTTP/2 client sends at once what we would send only after the 200.
#[tokio::test]
async fn data_sent_before_the_200_is_not_lost() {
    let (ours, theirs) = duplex(1 << 16);
    tokio::spawn(serve(
        theirs,
        Arc::new(Loopback::default()),
        std::future::pending(),
    ));
    let (requests, connection) = h2::client::handshake(ours).await.unwrap();
    tokio::spawn(connection);
    let (listener, address) = listener().await;
    let uri = Uri::builder()
        .authority(format!("late.test:{}", address.port()))
        .build()
        .unwrap();
    let request = Request::connect(uri).body(()).unwrap();
    let mut requests = requests.ready().await.unwrap();
    let (response, mut stream) = requests.send_request(request, false).unwrap();
    stream
        .send_data(Bytes::from_static(b"early "), false)
        .unwrap();
    stream.send_data(Bytes::from_static(b"bird"), true).unwrap();
    let (mut server, _) = soon(listener.accept()).await.unwrap();
    let mut received = String::new();
    soon(server.read_to_string(&mut received)).await.unwrap();
    assert_eq!(received, "early bird");
    assert_eq!(soon(response).await.unwrap().status(), StatusCode::OK);
}

/// What a destination socket sees for each way in which the peer may end a stream.
#[tokio::test]
async fn every_reset_code_but_no_error_is_a_tcp_reset() {
    for code in 0..=13_u32 {
        let (ours, theirs) = duplex(1 << 16);
        let peer = tokio::spawn(async move {
            let mut connection = h2::server::handshake(theirs).await.unwrap();
            let (_request, mut respond) = connection.accept().await.unwrap().unwrap();
            let mut stream = respond.send_response(Response::new(()), false).unwrap();
            stream
                .send_data(Bytes::from_static(b"hello"), false)
                .unwrap();
            let driving = async { while connection.accept().await.is_some() {} };
            let ending = async {
                tokio::time::sleep(Duration::from_millis(50)).await;
                stream.send_reset(Reason::from(code));
                std::future::pending::<()>().await;
            };
            tokio::select! { () = driving => {}, () = ending => {} }
        });
        let (tunnel, driver) = Tunnel::establish(ours).await.unwrap();
        tokio::spawn(driver);
        let mut app = through(&tunnel, "localhost:1".parse().unwrap()).await;
        let mut hello = [0; 5];
        soon(app.read_exact(&mut hello)).await.unwrap();
        let end = soon(app.read_u8()).await.unwrap_err().kind();
        let expected = if code == 0 {
            ErrorKind::UnexpectedEof
        } else {
            ErrorKind::ConnectionReset
        };
        assert_eq!(end, expected, "{:?}", Reason::from(code));
        peer.abort();
    }
}

#[tokio::test]
async fn pinned_keys_carry_flows_and_others_are_refused() {
    let (manager, client) = (Identity::generate(), Identity::generate());
    let (ours, theirs) = duplex(1 << 16);
    let (accepted, connected) = soon(async {
        let pin = manager.key_hash();
        tokio::join!(
            accept_tls(theirs, &manager),
            connect_tls(ours, &client, &pin)
        )
    })
    .await;
    let (server_tls, key_hash) = accepted.unwrap();
    assert_eq!(key_hash, client.key_hash());
    tokio::spawn(serve(
        server_tls,
        Arc::new(Loopback::default()),
        std::future::pending(),
    ));
    let (tunnel, driver) = soon(Tunnel::establish(connected.unwrap())).await.unwrap();
    let driver = tokio::spawn(driver);
    let (mut app, mut server) = ends(&tunnel).await;
    server.write_all(b"through TLS").await.unwrap();
    let mut received = [0; 11];
    soon(app.read_exact(&mut received)).await.unwrap();
    assert_eq!(&received, b"through TLS");
    driver.abort();
    assert_eq!(
        soon(app.read_u8()).await.unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );

    let (ours, theirs) = duplex(1 << 16);
    let (pin, other) = (client.key_hash(), manager.key_hash());
    let (accepted, connected) = soon(async {
        tokio::join!(
            accept_tls(theirs, &manager),
            connect_tls(ours, &client, &pin)
        )
    })
    .await;
    assert!(accepted.is_err());
    assert!(
        matches!(connected, Err(TlsError::WrongKey { pinned, found }) if (pinned, found) == (pin, other))
    );
}

/// What an API server does for one port: messages on channel 0 to the pod's bytes and back.
async fn port_forward(ws: DuplexStream, pod: DuplexStream) {
    let ws = WebSocketStream::from_raw_socket(ws, WsRole::Server, None).await;
    let (mut to_client, mut from_client) = ws.split();
    let (mut pod_read, mut pod_write) = tokio::io::split(pod);
    for channel in 0..2_u8 {
        let begin = [&[channel], &8443_u16.to_le_bytes()[..]].concat();
        to_client.send(Message::Binary(begin.into())).await.unwrap();
    }
    let down = async {
        let mut message = vec![0; 32 * 1024];
        while let Ok(size @ 1..) = pod_read.read(&mut message[1..]).await {
            to_client
                .send(Message::Binary(Bytes::copy_from_slice(&message[..=size])))
                .await
                .unwrap();
        }
    };
    let up = async {
        while let Some(Ok(Message::Binary(message))) = from_client.next().await {
            assert_eq!(message[0], 0);
            pod_write.write_all(&message[1..]).await.unwrap();
        }
    };
    tokio::select! { () = down => {}, () = up => {} }
}

#[tokio::test]
async fn flows_run_through_tls_through_a_port_forward() {
    let (manager, client) = (Identity::generate(), Identity::generate());
    let (ours, theirs) = duplex(1 << 16);
    let (pod, pod_end) = duplex(1 << 16);
    let forwarding = tokio::spawn(port_forward(theirs, pod));
    let manager_key = manager.key_hash();
    tokio::spawn(async move {
        let (tls, _) = accept_tls(pod_end, &manager).await.unwrap();
        serve(tls, Arc::new(Loopback::default()), std::future::pending()).await
    });
    let ws = WebSocketStream::from_raw_socket(ours, WsRole::Client, None).await;
    let carrier = PortForwardStream::open(ws, Subprotocol::Channels, 8443);
    let carrier = soon(carrier).await.unwrap();
    let tls = soon(connect_tls(carrier, &client, &manager_key))
        .await
        .unwrap();
    let (tunnel, driver) = soon(Tunnel::establish(tls)).await.unwrap();
    tokio::spawn(driver);
    let (mut app, mut server) = ends(&tunnel).await;
    let (up, down) = (pattern(1, 5 << 20), pattern(2, 5 << 20));
    let (mut app_read, mut app_write) = app.split();
    let (mut server_read, mut server_write) = server.split();
    let (mut received_up, mut received_down) = (vec![0; up.len()], vec![0; down.len()]);
    soon(async {
        tokio::join!(
            async { app_write.write_all(&up).await.unwrap() },
            async { server_write.write_all(&down).await.unwrap() },
            async { server_read.read_exact(&mut received_up).await.unwrap() },
            async { app_read.read_exact(&mut received_down).await.unwrap() },
        )
    })
    .await;
    assert!(received_up == up && received_down == down, "bytes differ");
    forwarding.abort();
    assert_eq!(
        soon(app.read_u8()).await.unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    soon(tunnel.closed()).await;
}

/// `openssl s_client` and `curl` are HTTP and TLS of other authors.
#[tokio::test(flavor = "multi_thread")]
async fn curl_speaks_to_the_server_with_a_key_and_not_without() {
    let (manager, client) = (Identity::generate(), Identity::generate());
    let (listener, address) = listener().await;
    let expected = client.key_hash();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let manager = manager.clone();
            tokio::spawn(async move {
                if let Ok((tls, key_hash)) = accept_tls(tcp, &manager).await
                    && key_hash == expected
                {
                    let _ = serve(tls, Arc::new(Loopback::default()), std::future::pending()).await;
                }
            });
        }
    });
    let directory = std::env::temp_dir().join(format!("tp-tunnel-curl-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let key = directory.join("client.pem");
    std::fs::write(&key, client.to_pem()).unwrap();
    let url = format!("https://{address}/v1/health");
    let curl = |arguments: Vec<String>| {
        let mut command = tokio::process::Command::new("curl");
        command
            .args(["-sk", "--max-time", "10"])
            .args(arguments)
            .stdin(Stdio::null());
        async move { command.output().await }
    };
    let key = key.to_str().unwrap().to_owned();
    let with_key = curl(vec![
        "--http2".into(),
        "--cert".into(),
        key.clone(),
        "-w".into(),
        " %{http_version}".into(),
        url.clone(),
    ])
    .await;
    let Ok(with_key) = with_key else {
        return eprintln!("SKIPPED: curl is not installed");
    };
    let without_key = curl(vec!["--http2".into(), url.clone()]).await.unwrap();
    let http1 = curl(vec![
        "--http1.1".into(),
        "--cert".into(),
        key.clone(),
        url.clone(),
    ])
    .await
    .unwrap();
    let tls12 = curl(vec![
        "--tls-max".into(),
        "1.2".into(),
        "--cert".into(),
        key,
        url,
    ])
    .await
    .unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    assert_eq!(
        String::from_utf8_lossy(&with_key.stdout),
        "{\"replica\":\"test\"} 2",
        "{with_key:?}"
    );
    for refused in [without_key, http1, tls12] {
        assert!(!refused.status.success(), "{refused:?}");
        assert!(refused.stdout.is_empty(), "{refused:?}");
    }
}
