//! UDP of an intercepted port, in a network namespace of its own: redirected, answered from where it was sent, and open when
//! everything dies.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod common;

use std::io;
use std::time::Duration;

use common::pod::{Pod, dial, in_a_pod, until};
use http::{Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;
use tp_tunnel::{Identity, Refusal, Tunnel, relay_datagrams};

/// Answers each datagram with who answers, whom it came from, and what it was.
const APP: &str = "
import socket
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.bind(('::', 5353))
while True:
    data, peer = server.recvfrom(65535)
    server.sendto(f'app for {peer[0].removeprefix(\"::ffff:\")} '.encode() + data, peer)
";

const V4: &str = "10.77.0.2:5353";
const V6: &str = "[fd77::2]:5353";

/// The answer to a datagram from a new port. Answers from elsewhere than where it went are the kernel's to drop.
async fn ask(to: &str, data: &[u8]) -> io::Result<Vec<u8>> {
    let any = if to == V4 { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(to).await?;
    ask_again(&socket, data).await
}

async fn ask_again(socket: &UdpSocket, data: &[u8]) -> io::Result<Vec<u8>> {
    socket.send(data).await?;
    let mut answer = vec![0; 65_535];
    let size = tokio::time::timeout(Duration::from_secs(5), socket.recv(&mut answer)).await??;
    answer.truncate(size);
    Ok(answer)
}

async fn says(to: &str, data: &str) -> String {
    let answer = ask(to, data.as_bytes()).await;
    answer.map_or_else(
        |error| error.to_string(),
        |answer| String::from_utf8(answer).unwrap(),
    )
}

/// A server of the workstation. A question of DNS is answered as one, with nothing in it.
async fn local() -> UdpSocket {
    UdpSocket::bind("127.0.0.1:0").await.unwrap()
}

async fn serve(socket: UdpSocket) {
    let mut data = vec![0; 65_535];
    loop {
        let (size, peer) = socket.recv_from(&mut data).await.unwrap();
        let answer = match data[..size].windows(8).any(|name| name == b"\x07example") {
            true => [&data[..2], &[data[2] | 0x80], &data[3..size]].concat(),
            false => [b"local ", &data[..size]].concat(),
        };
        socket.send_to(&answer, peer).await.unwrap();
    }
}

/// Takes every flow for the local server.
fn workstation(tunnel: &Tunnel, local: std::net::SocketAddr) -> JoinHandle<()> {
    let tunnel = tunnel.clone();
    tokio::spawn(async move {
        let mut flows = tokio::task::JoinSet::new();
        while let Ok(incoming) = tunnel.accept().await {
            assert_eq!(incoming.intercept(), "uid-dns");
            flows.spawn(async move {
                let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
                socket.connect(local).await.unwrap();
                let flow = incoming.opened().await.unwrap().into_datagrams();
                let idle = Duration::from_secs(60);
                relay_datagrams(flow, socket, idle, Refusal::IsLost).await;
            });
        }
    })
}

async fn push(tunnel: &Tunnel, ports: Value) {
    let table = json!({ "ports": ports }).to_string();
    let answer = tunnel.control(Method::PUT, "/v1/routes", table.into());
    let answer = answer.await.unwrap();
    assert_eq!(answer.status(), StatusCode::NO_CONTENT, "{answer:?}");
}

fn port() -> Value {
    json!([{
        "protocol": "UDP", "listen": 5353, "app": 5353,
        "intercepts": [{"id": "uid-dns", "created": 1}]
    }])
}

#[test]
fn datagrams_reach_the_workstation_and_the_application_when_it_does_not_take_them() {
    in_a_pod("udp", datagrams);
}

const DIRECT: &str = "app for 10.77.0.1 x";
const PASSED: &str = "app for 10.77.0.2 x";

async fn datagrams(pod: &mut Pod) {
    let mut python = pod.command("python3");
    python.args(["-c", APP]);
    pod.start(python);
    let limit = Duration::from_secs(10);
    until("the application answers", limit, async || {
        says(V4, "x").await == DIRECT
    })
    .await;
    let manager = Identity::generate();
    let agent = pod.start_agent(&manager);
    let tunnel = dial(&manager).await;
    let server = local().await;
    let taking = workstation(&tunnel, server.local_addr().unwrap());
    tokio::spawn(serve(server));
    let before = UdpSocket::bind("0.0.0.0:0").await.unwrap();
    before.connect(V4).await.unwrap();
    ask_again(&before, b"x").await.unwrap();

    push(&tunnel, port()).await;

    // From the moment that the push is answered, over both versions and in every size.
    for to in [V4, V6] {
        assert_eq!(says(to, "x").await, "local x");
        for size in [0, 1, 512, 1_472, 9_000, 60_000] {
            let data = vec![b'y'; size];
            let answer = ask(to, &data).await.unwrap();
            assert_eq!(answer, [b"local ", &data[..]].concat(), "{to} {size}");
        }
    }
    let many = (0..100).map(|n| tokio::spawn(async move { says(V4, &n.to_string()).await }));
    for (n, answer) in futures::future::join_all(many)
        .await
        .into_iter()
        .enumerate()
    {
        assert_eq!(answer.unwrap(), format!("local {n}"));
    }
    let dig = format!(
        "netns exec {}-c dig @10.77.0.2 -p 5353 +tries=1 +time=5 example",
        pod.name
    );
    let dig = tokio::process::Command::new("ip")
        .args(dig.split(' '))
        .output();
    let said = String::from_utf8(dig.await.unwrap().stdout).unwrap();
    assert!(
        said.contains("status: NOERROR") && said.contains("10.77.0.2#5353"),
        "{said}"
    );

    // One client goes on with one flow; others that nobody takes are the application's.
    let kept = UdpSocket::bind("0.0.0.0:0").await.unwrap();
    kept.connect(V4).await.unwrap();
    assert_eq!(ask_again(&kept, b"1").await.unwrap(), b"local 1");
    taking.abort();
    assert!(taking.await.unwrap_err().is_cancelled());
    assert_eq!(says(V4, "x").await, PASSED);
    assert_eq!(ask_again(&kept, b"x").await.unwrap(), PASSED.as_bytes());

    push(&tunnel, json!([])).await;
    let direct = async || {
        let asked = tokio::time::timeout(Duration::from_millis(200), says(V4, "x"));
        asked.await.is_ok_and(|answer| answer == DIRECT)
    };
    until("nothing is redirected", limit, direct).await;
    push(&tunnel, port()).await;
    assert_eq!(says(V4, "x").await, PASSED);
    kill_process(
        Pid::from_raw(agent.try_into().unwrap()).unwrap(),
        Signal::KILL,
    )
    .unwrap();
    let took = until("the kernel lets go", limit, direct).await;
    assert!(took < Duration::from_secs(4), "{took:?}");
}
