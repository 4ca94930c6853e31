//! How fast is our pump of a port-forward beside the one in `kube`? (B18)
//!
//! Both use the same client, the same pod (`peer`, which takes or sends bytes) and the same blocks, through the same API
//! server; rounds alternate. `PEER_POD` names the pod as namespace/pod; `BENCH_ROUNDS` sets the rounds. It measures the
//! carrier alone: no TLS of ours and no HTTP/2 run inside.

#![expect(clippy::print_stdout, reason = "a bench's table is its output")]

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tp_cli::kubeconfig::websocket;
use tp_tunnel::BoxedStream;
use tp_tunnel::carrier::port_forward::{PortForwardStream, Subprotocol};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const PORT: u16 = 7000;

/// Bytes of one round, about a second.
const BULK: u64 = 96 << 20;

/// Bytes that the program hands over, or takes, in one call.
const BLOCK: usize = 256 * 1024;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let pod = std::env::var("PEER_POD").context("PEER_POD names the pod, as namespace/pod")?;
    let (namespace, name) = pod.split_once('/').context("PEER_POD is namespace/pod")?;
    let rounds = match std::env::var("BENCH_ROUNDS") {
        Ok(rounds) => rounds.parse()?,
        Err(_) => 7,
    };
    let pod = Place {
        client: Client::try_default().await?,
        namespace: namespace.into(),
        name: name.into(),
    };
    println!("B18 one port-forward, MB/s (target: ours / kube >= 1.5 up)");
    for direction in [Direction::Up, Direction::Down] {
        let (mut spdy, mut channels, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            theirs.push(direction.measure(pod.kube().await?).await?);
            spdy.push(
                direction
                    .measure(pod.pump(Subprotocol::Spdy).await?)
                    .await?,
            );
            let stream = pod.pump(Subprotocol::Channels).await?;
            channels.push(direction.measure(stream).await?);
        }
        for (name, ours) in [("ours, SPDY", spdy), ("ours, v4", channels)] {
            let ratios = ours.iter().zip(&theirs).map(|(ours, kube)| ours / kube);
            print(direction, &format!("{name} / kube"), ratios.collect());
            print(direction, name, ours);
        }
        print(direction, "kube", theirs);
    }
    Ok(())
}

/// The pod at the far end.
struct Place {
    client: Client,
    namespace: String,
    name: String,
}

impl Place {
    async fn pump(&self, subprotocol: Subprotocol) -> Result<BoxedStream> {
        let pod = (self.namespace.as_str(), self.name.as_str());
        let offered = [subprotocol];
        let asked = websocket::port_forward(&self.client, pod, PORT, &offered);
        let (socket, chosen) = asked.await?;
        let stream = PortForwardStream::open(socket, chosen, PORT).await?;
        Ok(Box::new(stream))
    }

    async fn kube(&self) -> Result<BoxedStream> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let mut forwarder = api.portforward(&self.name, &[PORT]).await?;
        let stream = forwarder.take_stream(PORT).context("asked for this port")?;
        Ok(Box::new(stream))
    }
}

/// Which way the bytes go, seen from here.
#[derive(Clone, Copy, Debug)]
enum Direction {
    Up,
    Down,
}

impl Direction {
    /// MB/s from the request to the last confirmed byte; opening is not counted.
    async fn measure(self, mut stream: BoxedStream) -> Result<f64> {
        let command = match self {
            Self::Up => b'U',
            Self::Down => b'D',
        };
        let start = Instant::now();
        stream.write_u8(command).await?;
        stream.write_u64(BULK).await?;
        stream.flush().await?;
        match self {
            Self::Up => upload(&mut stream).await?,
            Self::Down => download(&mut stream).await?,
        }
        Ok(BULK as f64 / start.elapsed().as_secs_f64() / 1e6)
    }
}

async fn upload(stream: &mut BoxedStream) -> Result<()> {
    let block = vec![7; BLOCK];
    for _ in 0..BULK / BLOCK as u64 {
        stream.write_all(&block).await?;
    }
    stream.flush().await?;
    ensure!(
        stream.read_u8().await? == b'.',
        "the peer confirms what it took"
    );
    Ok(())
}

async fn download(stream: &mut BoxedStream) -> Result<()> {
    let mut block = vec![0; BLOCK];
    let mut left = BULK;
    while left > 0 {
        let size = stream.read(&mut block).await?;
        ensure!(size > 0, "the stream ended {left} bytes early");
        left -= size as u64;
    }
    Ok(())
}

fn print(direction: Direction, row: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    println!(
        "  {direction:?} {row:<18} median {:>8.2}  {:.2} .. {:.2}  ({} rounds)",
        values[values.len() / 2],
        values[0],
        values[values.len() - 1],
        values.len()
    );
}
