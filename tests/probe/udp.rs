//! UDP through a SOCKS5 UDP ASSOCIATE (RFC 1928 §7).

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::json;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpStream, UdpSocket};

use crate::pattern::Pattern;
use crate::{say, socks};

/// One association: the socket towards the proxy and the connection that keeps it alive.
struct Association {
    _lease: TcpStream,
    socket: UdpSocket,
    header: Vec<u8>,
}

impl Association {
    async fn open(proxy: &str, host: &str, port: u16) -> anyhow::Result<Self> {
        let (lease, relay) = socks::associate(proxy).await?;
        let socket = UdpSocket::bind(if relay.is_ipv4() {
            "127.0.0.1:0"
        } else {
            "[::1]:0"
        })
        .await?;
        socket.connect(relay).await?;
        let header = [&[0, 0, 0][..], &socks::address(host, port)?].concat();
        Ok(Self {
            _lease: lease,
            socket,
            header,
        })
    }

    async fn send(&self, payload: &[u8]) -> anyhow::Result<()> {
        self.socket.send(&[&self.header, payload].concat()).await?;
        Ok(())
    }

    /// The payload of the next datagram.
    async fn receive(&self) -> anyhow::Result<Vec<u8>> {
        let mut datagram = vec![0; 65_536];
        let len = self.socket.recv(&mut datagram).await?;
        datagram.truncate(len);
        ensure!(
            len >= 10 && datagram[..3] == [0, 0, 0],
            "no SOCKS5 header in {len} bytes"
        );
        let address = match datagram[3] {
            1 => 4,
            4 => 16,
            _ => 1 + usize::from(datagram[4]),
        };
        ensure!(len >= 6 + address, "half a SOCKS5 header in {len} bytes");
        Ok(datagram.split_off(6 + address))
    }
}

/// Sends `count` datagrams of `size` bytes one after the other and compares each echo; UDP may lose, so each is tried
/// three times.
pub(crate) async fn echo(
    proxy: &str,
    host: &str,
    port: u16,
    count: u64,
    size: usize,
) -> anyhow::Result<()> {
    let association = Association::open(proxy, host, port).await?;
    let (start, mut resent) = (Instant::now(), 0);
    for seed in 0..count {
        let payload = Pattern::bytes(seed, size);
        let mut tries = 0;
        while !exchange(&association, &payload).await? {
            tries += 1;
            ensure!(
                tries < 3,
                "datagram {seed} of {size} bytes was never answered"
            );
            resent += 1;
        }
    }
    say(
        &json!({ "echoed": count, "resent": resent, "ms": u64::try_from(start.elapsed().as_millis())? }),
    );
    Ok(())
}

/// One try: whether the right echo came within 2 s.
async fn exchange(association: &Association, payload: &[u8]) -> anyhow::Result<bool> {
    association.send(payload).await?;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(2);
    loop {
        match tokio::time::timeout_at(deadline, association.receive()).await {
            Ok(received) if received.as_ref().is_ok_and(|bytes| bytes == payload) => {
                return Ok(true);
            }
            // An echo of an earlier try.
            Ok(received) => drop(received?),
            Err(_) => return Ok(false),
        }
    }
}

/// Makes a UDP port of the laptop stand for `host:port` of the cluster, until stdin ends.
pub(crate) async fn forward(
    proxy: &str,
    listen: &str,
    host: &str,
    port: u16,
) -> anyhow::Result<()> {
    let association = Association::open(proxy, host, port).await?;
    let local = UdpSocket::bind(listen)
        .await
        .with_context(|| format!("cannot listen on {listen}"))?;
    say(&json!({ "listening": local.local_addr()?.to_string() }));
    let (mut peer, mut buffer, mut stdin) = (None, vec![0; 65_536], tokio::io::stdin());
    loop {
        let mut byte = [0];
        tokio::select! {
            received = local.recv_from(&mut buffer) => {
                let (len, from) = received?;
                peer = Some(from);
                association.send(&buffer[..len]).await?;
            }
            answer = association.receive() => {
                if let Some(peer) = peer {
                    local.send_to(&answer?, peer).await?;
                }
            }
            read = stdin.read(&mut byte) => if read? == 0 { return Ok(()) },
        }
    }
}
