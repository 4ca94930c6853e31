//! The processes of one path: the far peer, and the two ends of a tunnel to it.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use tokio::net::{TcpStream, UdpSocket};
use tp_benches::process::{Running, wait_for};
use tp_tunnel::carrier::{self, ReadAhead, tls};
use tp_tunnel::{
    BoxedStream, DialError, DialErrorKind, Dialed, Host, Identity, Service, Target, Tunnel, relay,
    serve,
};

/// What runs under HTTP/2.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    Plain,
    Tls,
}

/// Where to connect, and the processes that serve it; they end with it.
pub(crate) struct Path {
    pub(crate) address: SocketAddr,
    /// The near end first.
    pub(crate) processes: Vec<Running>,
}

impl Path {
    /// The far peer itself.
    pub(crate) fn direct() -> anyhow::Result<Self> {
        let address = free_pair()?;
        let peer = std::env::current_exe()?.with_file_name("peer");
        let child = Command::new(&peer)
            .arg(address.port().to_string())
            .spawn()
            .with_context(|| format!("cannot start {}", peer.display()))?;
        wait_for(address)?;
        Ok(Self {
            address,
            processes: vec![Running(child)],
        })
    }

    /// An entry whose every connection leaves at an exit that dials `to`.
    pub(crate) fn tunnel(to: &Self, carrier: Carrier) -> anyhow::Result<Self> {
        let (manager, client) = (Identity::generate(), Identity::generate());
        let kind = if carrier == Carrier::Tls {
            "tls"
        } else {
            "plain"
        };
        let (exit, wire) = start(&["exit", kind], &manager)?;
        let pin = manager.key_hash().to_string();
        let (entry, address) = start(
            &[
                "entry",
                kind,
                &wire.to_string(),
                &to.address.to_string(),
                &pin,
            ],
            &client,
        )?;
        Ok(Self {
            address,
            processes: vec![entry, exit],
        })
    }
}

/// Starts this program in a role; the role's first line says where it listens.
fn start(arguments: &[&str], identity: &Identity) -> anyhow::Result<(Running, SocketAddr)> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(arguments)
        .env("BENCH_IDENTITY", identity.to_pem())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("stdout is piped")?).read_line(&mut line)?;
    Ok((
        Running(child),
        line.trim().parse().context("the role did not start")?,
    ))
}

/// The peer takes its port and the one after it. They lie below the range from which the kernel takes source ports.
fn free_pair() -> anyhow::Result<SocketAddr> {
    let start = 20_000 + (std::process::id() % 5_000) as u16 * 2;
    (start..32_000)
        .step_by(2)
        .find(|port| {
            [*port, port + 1]
                .iter()
                .all(|port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_ok())
        })
        .map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
        .context("no two free ports side by side")
}

/// Runs one role in this process, on one thread.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<()> {
    let identity = Identity::from_pem(&std::env::var("BENCH_IDENTITY")?)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .event_interval(carrier::EVENT_INTERVAL)
        .build()?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["exit", kind] => runtime.block_on(exit(kind == "tls", identity)),
        ["entry", kind, wire, to, pin] => runtime.block_on(entry(
            kind == "tls",
            wire.parse()?,
            to.parse()?,
            pin,
            identity,
        )),
        _ => bail!("not a role: {arguments:?}"),
    }
}

#[expect(clippy::print_stdout, reason = "the parent reads it")]
async fn listen() -> anyhow::Result<tokio::net::TcpListener> {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    println!("{}", listener.local_addr()?);
    Ok(listener)
}

async fn exit(tls: bool, identity: Identity) -> anyhow::Result<()> {
    let listener = listen().await?;
    let (tcp, _) = listener.accept().await?;
    carrier::tune(&tcp)?;
    let io: BoxedStream = match tls {
        true => Box::new(tls::accept_tls(tcp, &identity).await?.0),
        false => Box::new(tcp),
    };
    Ok(serve(io, Arc::new(Anywhere), std::future::pending()).await?)
}

async fn entry(
    tls: bool,
    wire: SocketAddr,
    to: SocketAddr,
    pin: &str,
    identity: Identity,
) -> anyhow::Result<()> {
    let tcp = TcpStream::connect(wire).await?;
    carrier::tune(&tcp)?;
    let io: BoxedStream = match tls {
        true => Box::new(tls::connect_tls(ReadAhead::new(tcp), &identity, &pin.parse()?).await?),
        false => Box::new(tcp),
    };
    let (tunnel, driver) = Tunnel::establish(io).await?;
    tokio::spawn(driver);
    let listener = listen().await?;
    let target = Target::new(Host::Ip(to.ip()), to.port());
    loop {
        let (tcp, _) = listener.accept().await?;
        let (tunnel, target) = (tunnel.clone(), target.clone());
        tokio::spawn(async move {
            match tunnel.connect(&target).await {
                Ok(flow) => drop(relay(flow, tcp).await),
                Err(error) => eprintln!("cannot open a flow: {error}"),
            }
        });
    }
}

/// Dials every address.
struct Anywhere;

impl Service for Anywhere {
    fn dial(&self, target: Target) -> BoxFuture<'_, Result<Dialed<TcpStream>, DialError>> {
        Box::pin(async move {
            match target.host {
                Host::Ip(ip) => Ok(TcpStream::connect((ip, target.port)).await?.into()),
                Host::Name(name) => Err(DialError::new(DialErrorKind::Dns, name)),
            }
        })
    }

    fn associate(&self, _: Target) -> BoxFuture<'_, Result<Dialed<UdpSocket>, DialError>> {
        Box::pin(async { Err(DialError::new(DialErrorKind::Forbidden, "no UDP here")) })
    }

    fn resolve(&self, query: Bytes) -> BoxFuture<'_, Bytes> {
        Box::pin(async { query })
    }

    fn control(&self, _: Request<Bytes>) -> BoxFuture<'_, Response<Bytes>> {
        Box::pin(async { Response::default() })
    }
}
