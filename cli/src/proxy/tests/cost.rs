//! What a flow costs while nothing moves.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::super::dial::Dialer;
use super::super::waiting::Waiting;
use super::super::{Options, Shared, Split, Upstream, UserRules, connection};

#[tokio::test]
async fn the_task_of_a_connection_is_small() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let (_, tunnel) = watch::channel(None);
    let (_, split) = watch::channel(Arc::new(Split::new(<_>::default(), UserRules::default())));
    let dialer = Dialer {
        upstream: Upstream { tunnel, split },
        timeout: Duration::from_secs(1),
        own: Vec::new(),
        counters: Arc::default(),
    };
    let shared = Arc::new(Shared {
        options: Options::default(),
        dialer: Arc::new(dialer),
        waiting: Waiting::new(1),
    });
    let address = client.local_addr().unwrap();

    let task = connection(client, address, &shared);

    let size = size_of_val(&task);
    assert!(size <= 1024, "{size} bytes");
}

/// Not a bound to gate on, since it includes both ends of every socket and of the tunnel; run it alone.
#[tokio::test]
#[ignore = "measures the memory of the whole process"]
async fn memory_of_idle_flows() {
    const FLOWS: usize = 2000;
    let mut rig = super::rig::Rig::start().await;
    rig.server("web:7", super::rig::echo).await;
    let mut clients = Vec::new();
    let before = resident();
    for _ in 0..FLOWS {
        let mut client = rig.client().await;
        client
            .write_all(b"\x05\x01\x00\x05\x01\x00\x03\x03web\x00\x07")
            .await
            .unwrap();
        client.read_exact(&mut [0; 12]).await.unwrap();
        clients.push(client);
    }
    let each = resident().saturating_sub(before) / FLOWS;
    println!("{each} bytes a flow, all parties together");
    assert!(each < 32 * 1024);
}

fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}
