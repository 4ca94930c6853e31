//! The port-forward pump against whatever a server sends: raw WebSocket frames, and what is inside them.
#![no_main]

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;
use tp_tunnel::carrier::port_forward::{Channels, PortForwardStream, Spdy, Subprotocol};

/// A server that sends these bytes and then nothing, and takes everything.
struct Script<'a>(&'a [u8]);

impl AsyncRead for Script<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let size = self.0.len().min(buf.remaining());
        buf.put_slice(&self.0[..size]);
        self.0 = &self.0[size..];
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Script<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Reads until the stream ends, which it must do with an error: a carrier never ends cleanly by itself.
fn read_to_end(input: &[u8], subprotocol: Subprotocol) {
    let mut cx = Context::from_waker(Waker::noop());
    let ws = std::pin::pin!(WebSocketStream::from_raw_socket(
        Script(input),
        Role::Client,
        None
    ));
    let Poll::Ready(ws) = ws.poll(&mut cx) else {
        panic!("taking over a socket waits for nothing")
    };
    let open = std::pin::pin!(PortForwardStream::open(ws, subprotocol, 8443));
    let mut stream = match open.poll(&mut cx) {
        Poll::Ready(Ok(stream)) => stream,
        Poll::Ready(Err(_)) => return,
        Poll::Pending => panic!("the script always answers"),
    };
    let mut total = 0;
    loop {
        let mut storage = [0; 512];
        let mut buf = ReadBuf::new(&mut storage);
        match Pin::new(&mut stream).poll_read(&mut cx, &mut buf) {
            Poll::Ready(Ok(())) => {
                assert!(!buf.filled().is_empty(), "an end without an error");
                total += buf.filled().len();
                assert!(total <= input.len());
            }
            Poll::Ready(Err(_)) => return,
            Poll::Pending => panic!("the script always answers"),
        }
    }
}

/// The same bytes as messages, cut where a byte says so.
fn messages(mut input: &[u8]) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || {
        let (size, after) = input.split_first()?;
        let (message, after) = after.split_at(after.len().min(usize::from(*size)));
        input = after;
        Some(Bytes::copy_from_slice(message))
    })
}

fuzz_target!(|input: &[u8]| {
    for subprotocol in Subprotocol::ALL {
        read_to_end(input, subprotocol);
    }
    let mut channels = Channels::new(0x2020);
    for message in messages(input) {
        if channels.receive(message).is_err() {
            break;
        }
        channels.next_data();
    }
    let mut spdy = Spdy::new(0x2020);
    'ended: for message in messages(input) {
        let mut left = message.len();
        spdy.receive(message);
        loop {
            match spdy.next_data() {
                Ok(Some(data)) => left = left.checked_sub(data.len()).expect("data out of nowhere"),
                Ok(None) => break,
                Err(_) => break 'ended,
            }
        }
    }
});
