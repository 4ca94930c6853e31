//! A SOCKS5 client (RFC 1928) that reports the proxy's reply code as it came.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// The proxy answered with this reply code.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) u8);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the proxy refused with reply {}", self.0)
    }
}

impl std::error::Error for Refused {}

/// Opens a TCP flow to `host:port`; a host that is an address is sent as one.
pub(crate) async fn connect(proxy: &str, host: &str, port: u16) -> anyhow::Result<TcpStream> {
    let mut stream = greet(proxy).await?;
    request(&mut stream, 1, host, port).await?;
    Ok(stream)
}

/// Opens a UDP association. The stream must be kept: its end is the association's end.
pub(crate) async fn associate(proxy: &str) -> anyhow::Result<(TcpStream, SocketAddr)> {
    let mut stream = greet(proxy).await?;
    let relay = request(&mut stream, 3, "0.0.0.0", 0).await?;
    let ip = if relay.ip().is_unspecified() {
        stream.peer_addr()?.ip()
    } else {
        relay.ip()
    };
    Ok((stream, SocketAddr::new(ip, relay.port())))
}

/// `host:port` as SOCKS5 writes it: type, address, port.
pub(crate) fn address(host: &str, port: u16) -> anyhow::Result<Vec<u8>> {
    let mut bytes = match host.parse() {
        Ok(IpAddr::V4(ip)) => [&[1][..], &ip.octets()].concat(),
        Ok(IpAddr::V6(ip)) => [&[4][..], &ip.octets()].concat(),
        Err(_) => [&[3, u8::try_from(host.len())?][..], host.as_bytes()].concat(),
    };
    bytes.extend(port.to_be_bytes());
    Ok(bytes)
}

async fn greet(proxy: &str) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect(proxy)
        .await
        .with_context(|| format!("cannot reach the proxy {proxy}"))?;
    stream.set_nodelay(true)?;
    stream.write_all(&[5, 1, 0]).await?;
    let mut choice = [0; 2];
    stream
        .read_exact(&mut choice)
        .await
        .context("the proxy chose no method")?;
    ensure!(choice == [5, 0], "the proxy wants method {choice:?}");
    Ok(stream)
}

async fn request(
    stream: &mut TcpStream,
    command: u8,
    host: &str,
    port: u16,
) -> anyhow::Result<SocketAddr> {
    let request = [&[5, command, 0][..], &address(host, port)?].concat();
    stream.write_all(&request).await?;
    let mut reply = [0; 4];
    stream
        .read_exact(&mut reply)
        .await
        .context("the proxy closed without a reply")?;
    ensure!(reply[0] == 5, "the reply begins with {reply:?}");
    let ip: IpAddr = match reply[3] {
        1 => Ipv4Addr::from(stream.read_u32().await?).into(),
        4 => Ipv6Addr::from(stream.read_u128().await?).into(),
        other => bail!("the reply's address has type {other}"),
    };
    let port = stream.read_u16().await?;
    ensure!(reply[1] == 0, Refused(reply[1]));
    Ok(SocketAddr::new(ip, port))
}
