//! Against a WebSocket server in memory.

use futures::{FutureExt, SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_tungstenite::tungstenite::protocol::Role;

use super::*;

const DATA: u8 = channels::DATA;
const ERROR: u8 = 1;
const PORT: u16 = 8443;
const PORT_BYTES: [u8; 2] = PORT.to_le_bytes();

async fn pair(
    buffer: usize,
) -> (
    PortForwardStream<DuplexStream>,
    WebSocketStream<DuplexStream>,
) {
    let (ours, theirs) = duplex(buffer);
    let ours = WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
    let theirs = WebSocketStream::from_raw_socket(theirs, Role::Server, None).await;
    let ours = PortForwardStream::open(ours, Subprotocol::Channels, PORT);
    (ours.await.unwrap(), theirs)
}

fn message(channel: u8, data: &[u8]) -> Message {
    Message::Binary([&[channel], data].concat().into())
}

async fn open_channels(server: &mut WebSocketStream<DuplexStream>) {
    server.send(message(DATA, &PORT_BYTES)).await.unwrap();
    server.send(message(ERROR, &PORT_BYTES)).await.unwrap();
}

#[tokio::test]
async fn bytes_arrive_both_ways_in_large_messages() {
    let (mut stream, mut server) = pair(1 << 20).await;
    open_channels(&mut server).await;
    server.send(message(DATA, b"hello ")).await.unwrap();
    server.send(message(DATA, b"world")).await.unwrap();
    let mut greeting = [0; 11];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"hello world");

    let sent: Vec<u8> = (0..200_000_u32).map(|n| n as u8).collect();
    stream.write_all(&sent).await.unwrap();
    stream.flush().await.unwrap();
    let reading = tokio::spawn(async move { stream.read_u8().await });
    let mut received = Vec::new();
    let mut sizes = Vec::new();
    while received.len() < sent.len() {
        let Message::Binary(data) = server.next().await.unwrap().unwrap() else {
            panic!("not binary")
        };
        assert_eq!(data[0], DATA);
        sizes.push(data.len() - 1);
        received.extend_from_slice(&data[1..]);
    }
    assert_eq!(received, sent);
    assert_eq!(sizes, [66_560, 66_560, 66_560, 320]);
    reading.abort();
}

#[tokio::test]
async fn a_blocked_writer_does_not_stop_the_reader() {
    let (mut stream, mut server) = pair(4096).await;
    let server = tokio::spawn(async move {
        open_channels(&mut server).await;
        for _ in 0..100 {
            server.send(message(DATA, &[7; 1000])).await.unwrap();
        }
        server
    });
    // The server reads nothing, so this fills every buffer on the way.
    let filled = async {
        loop {
            stream.write_all(&[0; 65_536]).await.unwrap();
            stream.flush().await.unwrap();
        }
    };
    tokio::time::timeout(std::time::Duration::from_millis(100), filled)
        .await
        .unwrap_err();
    let mut data = vec![0; 100_000];
    stream.read_exact(&mut data).await.unwrap();
    assert!(data.iter().all(|byte| *byte == 7));
    drop(server.await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_message_leaves_with_its_flush_unless_it_follows_another() {
    let (mut stream, mut server) = pair(4096).await;
    for wait in [Duration::ZERO, CLOSE_TOGETHER] {
        tokio::time::advance(wait).await;
        stream.write_all(b"question").await.unwrap();
        stream.flush().await.unwrap();
        let received = server.next().now_or_never().expect("it has left");
        assert_eq!(received.unwrap().unwrap(), message(DATA, b"question"));
    }

    for part in [b"part", b"rest"] {
        stream.write_all(part).await.unwrap();
        assert!(server.next().now_or_never().is_none(), "it waits for more");
        stream.flush().await.unwrap();
    }
    let received = server.next().now_or_never().expect("both have left");
    assert_eq!(received.unwrap().unwrap(), message(DATA, b"partrest"));
}

#[tokio::test(start_paused = true)]
async fn a_flushed_message_leaves_while_its_writer_waits_for_the_answer() {
    let (mut stream, mut server) = pair(4096).await;
    stream.write_all(b".").await.unwrap();
    stream.flush().await.unwrap();
    let received = server.next().await.unwrap();
    assert_eq!(received.unwrap(), message(DATA, b"."));
    stream.write_all(&[7; 60_000]).await.unwrap();
    stream.flush().await.unwrap();
    let asking = tokio::spawn(async move { stream.read_u8().await });
    // The request meets a full pipe first.
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    let receiving = tokio::time::timeout(std::time::Duration::from_secs(5), server.next());
    let received = receiving.await.expect("the request arrives").unwrap();
    assert_eq!(received.unwrap().into_data().len(), 1 + 60_000);
    open_channels(&mut server).await;
    server.send(message(DATA, b".")).await.unwrap();
    assert_eq!(asking.await.unwrap().unwrap(), b'.');
}

#[tokio::test]
async fn the_error_channel_ends_the_stream_with_its_text() {
    let (mut stream, mut server) = pair(1 << 20).await;
    open_channels(&mut server).await;
    server
        .send(message(
            ERROR,
            b"an error occurred forwarding 8443\x1b[2J\n",
        ))
        .await
        .unwrap();
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the port-forward failed: an error occurred forwarding 8443\\u{1b}[2J",
    );
}

#[tokio::test]
async fn no_end_is_a_clean_end() {
    for close in [true, false] {
        let (mut stream, mut server) = pair(1 << 20).await;
        open_channels(&mut server).await;
        server.send(message(DATA, b"x")).await.unwrap();
        if close {
            server.close(None).await.unwrap();
        } else {
            drop(server);
        }
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
        let error = stream.read_u8().await.unwrap_err();
        assert!(
            matches!(error.kind(), io::ErrorKind::UnexpectedEof)
                || error.to_string().contains("without closing handshake"),
            "{error:?}",
        );
    }
}

#[tokio::test]
async fn a_ping_is_answered_while_reading() {
    let (mut stream, mut server) = pair(1 << 20).await;
    server
        .send(Message::Ping(Bytes::from_static(b"alive?")))
        .await
        .unwrap();
    open_channels(&mut server).await;
    server.send(message(DATA, b"x")).await.unwrap();
    stream.read_u8().await.unwrap();
    let reading = tokio::spawn(async move { stream.read_u8().await });
    assert_eq!(
        server.next().await.unwrap().unwrap(),
        Message::Pong(Bytes::from_static(b"alive?"))
    );
    reading.abort();
}

/// Serves the container runtime's side: replies to both streams, then sends these frames.
async fn spdy_server(mut server: WebSocketStream<DuplexStream>, frames: &'static [u8]) -> Vec<u8> {
    let asked = server.next().await.unwrap().unwrap().into_data();
    assert!(asked.windows(10).any(|text| text == b"streamtype"));
    let replies = [1, 3].map(|stream| [0x80, 3, 0, 2, 0, 0, 0, 4, 0, 0, 0, stream]);
    let replies = Message::Binary(Bytes::from(replies.concat()));
    server.send(replies).await.unwrap();
    server.send(Message::Binary(frames.into())).await.unwrap();
    let mut received = Vec::new();
    while let Some(Ok(Message::Binary(message))) = server.next().await {
        received.extend_from_slice(&message);
    }
    received
}

#[tokio::test]
async fn spdy_carries_bytes_both_ways_and_answers_a_ping() {
    let (ours, theirs) = duplex(4096);
    let ours = WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
    let theirs = WebSocketStream::from_raw_socket(theirs, Role::Server, None).await;
    let frames =
        b"\0\0\0\x03\0\0\0\x05hello\x80\x03\0\x06\0\0\0\x04\0\0\0\x02\0\0\0\x03\0\0\0\x01!";
    let server = tokio::spawn(spdy_server(theirs, frames));
    let mut stream = PortForwardStream::open(ours, Subprotocol::Spdy, PORT)
        .await
        .unwrap();

    let mut greeting = [0; 6];
    stream.read_exact(&mut greeting).await.unwrap();
    stream.write_all(b"hi").await.unwrap();
    stream.shutdown().await.unwrap();

    assert_eq!(&greeting, b"hello!");
    let received = server.await.unwrap();
    let ping = b"\x80\x03\0\x06\0\0\0\x04\0\0\0\x02";
    let data = b"\0\0\0\x03\0\0\0\x02hi";
    // The answer may leave with the data or before it.
    let with = [&data[..], ping].concat();
    let before = [&ping[..], data].concat();
    assert!(received == with || received == before, "{received:?}");
}

#[tokio::test]
async fn a_refusal_while_opening_is_reported() {
    let (ours, theirs) = duplex(4096);
    let ours = WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
    let mut theirs = WebSocketStream::from_raw_socket(theirs, Role::Server, None).await;
    let text = Bytes::from_static(b"\0\0\0\x01\0\0\0\x07no pod\n");
    theirs.send(Message::Binary(text)).await.unwrap();

    let error = PortForwardStream::open(ours, Subprotocol::Spdy, PORT).await;

    let text = error.err().unwrap().to_string();
    assert_eq!(text, "the port-forward failed: no pod");
}
