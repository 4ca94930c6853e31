//! TCP through a tunnel behaves as TCP: bytes, half-close, resets, refusals, in every order.

mod common;

use std::future::poll_fn;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Context;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{
    connection, connection_with, ends, eventually, listener, pattern, read_all, send_and_finish,
    soon, stalled_flow, target, through,
};
use futures::task::ArcWake;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::net::TcpListener;
use tp_tunnel::{DialErrorKind, Host, OpenError, Settings, Target, Tunnel, TunnelError};

#[tokio::test]
async fn bytes_arrive_unchanged_both_ways() {
    let connection = connection().await;
    let (mut app, mut server) = ends(&connection.tunnel).await;
    let (up, down) = (pattern(1, 20 << 20), pattern(2, 20 << 20));
    let (mut app_read, mut app_write) = app.split();
    let (mut server_read, mut server_write) = server.split();
    let (mut received_up, mut received_down) = (Vec::new(), Vec::new());
    soon(async {
        tokio::join!(
            async {
                app_write.write_all(&up).await.unwrap();
                app_write.shutdown().await.unwrap()
            },
            async {
                server_write.write_all(&down).await.unwrap();
                server_write.shutdown().await.unwrap()
            },
            async { server_read.read_to_end(&mut received_up).await.unwrap() },
            async { app_read.read_to_end(&mut received_down).await.unwrap() },
        )
    })
    .await;
    assert!(received_up == up, "upload differs");
    assert!(received_down == down, "download differs");
    let traffic = connection.tunnel.traffic();
    assert_eq!((traffic.bytes_up, traffic.bytes_down), (20 << 20, 20 << 20));
    eventually("the flow is forgotten", || {
        connection.tunnel.traffic().flows == 0
    })
    .await;
}

#[tokio::test]
async fn half_close_still_delivers_the_reply() {
    let connection = connection().await;
    let (mut app, mut server) = ends(&connection.tunnel).await;
    send_and_finish(&mut app, b"question").await;
    assert_eq!(soon(read_all(&mut server)).await.unwrap(), b"question");
    let reply = pattern(3, 8 << 20);
    let (received, ()) =
        soon(async { tokio::join!(read_all(&mut app), send_and_finish(&mut server, &reply)) })
            .await;
    assert!(received.unwrap() == reply, "the reply differs");
}

#[tokio::test]
async fn half_close_by_the_server_still_delivers_the_upload() {
    let connection = connection().await;
    let (mut app, mut server) = ends(&connection.tunnel).await;
    send_and_finish(&mut server, b"banner").await;
    assert_eq!(soon(read_all(&mut app)).await.unwrap(), b"banner");
    let upload = pattern(4, 8 << 20);
    let (received, ()) =
        soon(async { tokio::join!(read_all(&mut server), send_and_finish(&mut app, &upload)) })
            .await;
    assert!(received.unwrap() == upload, "the upload differs");
}

#[tokio::test]
async fn a_flow_without_a_byte_ends_with_fin_on_both_sides() {
    let connection = connection().await;
    for app_first in [true, false] {
        let (mut app, mut server) = ends(&connection.tunnel).await;
        let (first, second) = if app_first {
            (&mut app, &mut server)
        } else {
            (&mut server, &mut app)
        };
        first.shutdown().await.unwrap();
        assert_eq!(soon(read_all(second)).await.unwrap(), b"");
        second.shutdown().await.unwrap();
        assert_eq!(soon(read_all(first)).await.unwrap(), b"");
    }
    eventually("no flow is left", || connection.tunnel.traffic().flows == 0).await;
}

#[tokio::test]
async fn a_reset_arrives_as_a_reset_after_the_bytes_before_it() {
    let connection = connection().await;
    for by_app in [true, false] {
        let (app, server) = ends(&connection.tunnel).await;
        let (mut resetting, mut other) = if by_app { (app, server) } else { (server, app) };
        let data = pattern(5, 50_000);
        resetting.write_all(&data).await.unwrap();
        let mut received = vec![0; data.len()];
        soon(other.read_exact(&mut received)).await.unwrap();
        assert!(received == data, "bytes before the reset differ");
        resetting.set_zero_linger().unwrap();
        drop(resetting);
        let error = soon(other.read_u8()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "by_app: {by_app}");
    }
}

#[tokio::test]
async fn a_reset_right_behind_the_bytes_does_not_overtake_them() {
    let connection = connection().await;
    let mut whole = 0;
    for round in 0..50 {
        let (mut app, mut server) = ends(&connection.tunnel).await;
        server.write_all(&pattern(round, 10_000)).await.unwrap();
        server.set_zero_linger().unwrap();
        drop(server);
        let mut received = Vec::new();
        let error = soon(app.read_to_end(&mut received)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        whole += usize::from(received == pattern(round, 10_000));
    }
    // The reset of the relayed socket may discard what its application has not read, as TCP allows; h2 must not.
    assert!(whole >= 25, "only {whole} of 50 got the bytes");
}

#[tokio::test]
async fn a_reset_is_seen_by_a_side_that_has_finished_sending() {
    let connection = connection().await;
    for app_finished in [true, false] {
        let (app, server) = ends(&connection.tunnel).await;
        let (mut finished, mut other) = if app_finished {
            (app, server)
        } else {
            (server, app)
        };
        finished.shutdown().await.unwrap();
        assert_eq!(soon(read_all(&mut other)).await.unwrap(), b"");
        other.set_zero_linger().unwrap();
        drop(other);
        assert_eq!(
            soon(finished.read_u8()).await.unwrap_err().kind(),
            ErrorKind::ConnectionReset
        );
    }
}

#[tokio::test]
async fn an_application_that_gives_up_while_the_server_reads_nothing_resets_it() {
    let connection = connection().await;
    let (mut app, mut server) = ends(&connection.tunnel).await;
    let filled = tokio::time::timeout(Duration::from_millis(500), async {
        loop {
            app.write_all(&[0; 65_536]).await.unwrap();
        }
    });
    filled.await.unwrap_err();
    app.set_zero_linger().unwrap();
    drop(app);
    eventually("the flow is forgotten", || {
        connection.tunnel.traffic().flows == 0
    })
    .await;
    let mut sink = Vec::new();
    assert_eq!(
        soon(server.read_to_end(&mut sink))
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::ConnectionReset
    );
}

#[tokio::test]
async fn failed_dials_say_why() {
    let connection = connection().await;
    let closed = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let cases = [
        (target(closed), DialErrorKind::Refused),
        ("timeout.test:80".parse().unwrap(), DialErrorKind::TimedOut),
        (
            "forbidden.test:80".parse().unwrap(),
            DialErrorKind::Forbidden,
        ),
        ("nowhere.test:80".parse().unwrap(), DialErrorKind::Dns),
    ];
    for (target, kind) in cases {
        for udp in [false, true] {
            if udp && kind == DialErrorKind::Refused {
                continue;
            }
            let error = match udp {
                false => soon(connection.tunnel.connect(&target)).await.err(),
                true => soon(connection.tunnel.associate(&target)).await.err(),
            };
            let Some(OpenError::Dial(error)) = error else {
                panic!("{target} gave {error:?}")
            };
            assert_eq!(error.kind, kind);
            assert!(!error.detail.is_empty());
        }
    }
    let Err(OpenError::Dial(error)) = connection
        .tunnel
        .connect(&"forbidden.test:80".parse().unwrap())
        .await
    else {
        panic!("not refused")
    };
    assert_eq!(error.detail, "namespace \"b\" is not yours");
}

#[tokio::test]
async fn a_cancelled_connect_cancels_the_dial() {
    let connection = connection().await;
    let target = "hang.test:80".parse().unwrap();
    {
        let connecting = connection.tunnel.connect(&target);
        tokio::time::timeout(Duration::from_millis(100), connecting)
            .await
            .unwrap_err();
    }
    eventually("the dial is dropped", || {
        connection.hanging.load(Ordering::SeqCst) == 0
    })
    .await;
    let hanging = tokio::spawn({
        let tunnel = connection.tunnel.clone();
        async move { tunnel.connect(&target).await.err() }
    });
    eventually("a dial hangs", || {
        connection.hanging.load(Ordering::SeqCst) == 1
    })
    .await;
    connection.driver.abort();
    assert!(matches!(
        soon(hanging).await.unwrap(),
        Some(OpenError::Closed(_))
    ));
    eventually("the dial is dropped", || {
        connection.hanging.load(Ordering::SeqCst) == 0
    })
    .await;
}

#[tokio::test]
async fn two_thousand_flows_at_once() {
    let connection = connection().await;
    let (listener, address) = listener().await;
    tokio::spawn(async move {
        loop {
            let (mut accepted, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = accepted.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    let mut apps = Vec::new();
    for batch in 0..40 {
        let opened = (0..50).map(|_| through(&connection.tunnel, target(address)));
        let opened = soon(futures::future::join_all(opened)).await;
        apps.extend(
            opened
                .into_iter()
                .enumerate()
                .map(|(at, app)| (batch * 50 + at as u64, app)),
        );
    }
    assert_eq!(connection.tunnel.traffic().flows, 2000);
    let echoes = apps.into_iter().map(|(seed, mut app)| async move {
        let data = pattern(seed, 3000);
        send_and_finish(&mut app, &data).await;
        read_all(&mut app).await.unwrap() == data
    });
    let equal = soon(futures::future::join_all(echoes)).await;
    assert_eq!(equal.iter().filter(|equal| **equal).count(), 2000);
}

#[tokio::test]
async fn unread_tiny_frames_on_many_flows_are_harmless() {
    let connection = connection().await;
    let mut flows = Vec::new();
    for _ in 0..100 {
        let (listener, address) = listener().await;
        let to = target(address);
        let (flow, accepted) = tokio::join!(connection.tunnel.connect(&to), listener.accept());
        let server = accepted.unwrap().0;
        server.set_nodelay(true).unwrap();
        flows.push((flow.unwrap(), server));
    }
    // More than 510 unread frames end a connection with h2's own limits.
    for byte in 0..20 {
        for (flow, server) in &mut flows {
            server.write_all(&[byte]).await.unwrap();
            flow.send(Bytes::copy_from_slice(&[byte])).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for (mut flow, mut server) in flows {
        let mut received = Vec::new();
        while received.len() < 20 {
            received.extend_from_slice(&soon(flow.recv()).await.unwrap().unwrap());
        }
        assert!(received.iter().copied().eq(0..20));
        let mut received = [0; 20];
        soon(server.read_exact(&mut received)).await.unwrap();
        assert!(received.iter().copied().eq(0..20));
    }
    assert!(!connection.tunnel.is_closed());
}

#[tokio::test]
async fn a_withdrawn_permission_resets_the_flows_that_stood_on_it_and_no_others() {
    let connection = connection().await;
    let (mut app, mut server) = ends(&connection.tunnel).await;
    let (serves, address) = listener().await;
    let own = Target::new(Host::Name("localhost".to_owned()), address.port());
    let mut other = through(&connection.tunnel, own).await;
    let (mut other_server, _) = serves.accept().await.unwrap();
    app.write_all(b"x").await.unwrap();
    assert_eq!(server.read_u8().await.unwrap(), b'x');

    connection.permit.cancel();

    for end in [&mut app, &mut server] {
        let error = soon(read_all(end)).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    other.write_all(b"y").await.unwrap();
    assert_eq!(soon(other_server.read_u8()).await.unwrap(), b'y');
}

#[tokio::test]
async fn stalled_readers_do_not_stall_others() {
    let connection = connection().await;
    let mut stalled = Vec::new();
    for _ in 0..20 {
        stalled.push(stalled_flow(&connection.tunnel).await);
    }
    for _ in 0..3 {
        let (mut app, mut server) = ends(&connection.tunnel).await;
        let data = pattern(9, 16 << 20);
        let (received, ()) =
            soon(async { tokio::join!(read_all(&mut app), send_and_finish(&mut server, &data)) })
                .await;
        assert!(received.unwrap() == data, "the active flow's bytes differ");
    }
    for (mut app, feeder) in stalled {
        assert_eq!(
            soon(app.read_u8()).await.unwrap(),
            1,
            "a stalled flow within the budget lives"
        );
        feeder.abort();
    }
}

#[tokio::test]
async fn beyond_the_budget_the_slowest_reader_is_reset() {
    let settings = Settings {
        held_max: 4 << 20,
        ..Settings::default()
    };
    let connection = connection_with(settings).await;
    let mut stalled = Vec::new();
    for _ in 0..8 {
        stalled.push(stalled_flow(&connection.tunnel).await);
    }
    eventually("the flows that were behind longest are reset", || {
        stalled[0].1.is_finished()
    })
    .await;
    assert!(
        !stalled[7].1.is_finished(),
        "the last one is within the budget"
    );
    let (mut app, mut server) = ends(&connection.tunnel).await;
    send_and_finish(&mut server, b"others go on").await;
    assert_eq!(soon(read_all(&mut app)).await.unwrap(), b"others go on");
    stalled.into_iter().for_each(|(_, feeder)| feeder.abort());
}

#[tokio::test]
async fn a_dead_carrier_resets_every_flow_and_never_finishes_one() {
    for server_dies in [true, false] {
        let connection = connection().await;
        let mut pairs = Vec::new();
        for _ in 0..10 {
            pairs.push(ends(&connection.tunnel).await);
        }
        // A half-closed flow is not complete either.
        pairs[0].0.shutdown().await.unwrap();
        assert_eq!(soon(read_all(&mut pairs[0].1)).await.unwrap(), b"");
        match server_dies {
            true => connection.server.abort(),
            false => connection.driver.abort(),
        }
        for (at, (mut app, mut server)) in pairs.into_iter().enumerate() {
            assert_eq!(
                soon(app.read_u8()).await.unwrap_err().kind(),
                ErrorKind::ConnectionReset
            );
            if at > 0 {
                assert_eq!(
                    soon(server.read_u8()).await.unwrap_err().kind(),
                    ErrorKind::ConnectionReset
                );
            }
        }
        soon(connection.tunnel.closed()).await;
        let Err(OpenError::Closed(_)) = connection
            .tunnel
            .connect(&"localhost:1".parse().unwrap())
            .await
        else {
            panic!("a dead tunnel opened a flow")
        };
    }
}

#[tokio::test]
async fn shutdown_drains_old_flows_and_refuses_new_ones() {
    let connection = connection().await;
    let (mut app, mut server) = ends(&connection.tunnel).await;
    connection.shutdown.send(()).unwrap();
    soon(connection.tunnel.closed()).await;
    assert!(matches!(
        connection
            .tunnel
            .connect(&"localhost:1".parse().unwrap())
            .await
            .err(),
        Some(OpenError::Closed(TunnelError::GoingAway)),
    ));
    app.write_all(b"still here").await.unwrap();
    let mut received = [0; 10];
    soon(server.read_exact(&mut received)).await.unwrap();
    assert_eq!(&received, b"still here");
    send_and_finish(&mut server, b"bye").await;
    assert_eq!(soon(read_all(&mut app)).await.unwrap(), b"bye");
    app.shutdown().await.unwrap();
    soon(connection.server).await.unwrap().unwrap();
    soon(connection.driver).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_silent_carrier_is_found_dead() {
    let settings = Settings {
        ping_interval: Duration::from_millis(50),
        ping_timeout: Duration::from_millis(200),
        ..Settings::default()
    };
    let (ours, wire) = duplex(1 << 16);
    let (far, theirs) = duplex(1 << 16);
    let (cut, was_cut) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(async move {
        let (mut wire, mut far) = (wire, far);
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut wire, &mut far) => {}
            _ = was_cut => {}
        }
        // From here on the link swallows everything and closes nothing.
        std::future::pending::<()>().await;
    });
    let connection = common::over(ours, theirs, settings).await;
    let (mut app, _server) = ends(&connection.tunnel).await;
    cut.send(()).unwrap();
    let cut = Instant::now();
    let ended = soon(connection.driver).await.unwrap();
    assert!(matches!(ended, Err(TunnelError::Silent(_))), "{ended:?}");
    assert!(cut.elapsed() < Duration::from_secs(2));
    assert_eq!(
        soon(app.read_u8()).await.unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
}

#[tokio::test]
async fn a_peer_that_answers_no_ping_is_found_dead() {
    let settings = Settings {
        ping_interval: Duration::from_millis(50),
        ping_timeout: Duration::from_millis(200),
        ..Settings::default()
    };
    let (ours, theirs) = duplex(1 << 16);
    let establishing = tokio::spawn(Tunnel::establish_with(ours, settings));
    let mut peer = soon(h2::server::handshake(theirs)).await.unwrap();
    // The peer works until it has answered the first ping, and then stops without closing.
    let _ = tokio::time::timeout(Duration::from_millis(20), peer.accept()).await;
    let (_tunnel, driver) = soon(establishing).await.unwrap().unwrap();
    let ended = soon(driver).await;
    assert!(matches!(ended, Err(TunnelError::Silent(_))), "{ended:?}");
}

/// Counts its wakes.
#[derive(Default)]
struct Woken(AtomicUsize);

impl ArcWake for Woken {
    fn wake_by_ref(woken: &Arc<Self>) {
        woken.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn a_sender_is_not_woken_for_room_that_is_there_and_still_hears_of_a_reset() {
    let connection = connection().await;
    let (listener, address) = listener().await;
    let flow = connection.tunnel.connect(&target(address)).await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    let (_reader, mut writer) = flow.into_io();
    let woken = Arc::new(Woken::default());
    let waker = futures::task::waker(Arc::clone(&woken));

    let waiting = writer.poll_reset(&mut Context::from_waker(&waker));
    assert!(waiting.is_pending());
    soon(writer.write_all(b"question")).await.unwrap();

    let mut question = [0; 8];
    soon(server.read_exact(&mut question)).await.unwrap();
    assert_eq!(
        (&question, woken.0.load(Ordering::SeqCst)),
        (b"question", 0)
    );
    server.set_zero_linger().unwrap();
    drop(server);
    soon(poll_fn(|cx| writer.poll_reset(cx))).await;
}
