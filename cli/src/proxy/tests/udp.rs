//! SOCKS5 UDP ASSOCIATE.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::rig::Rig;

struct Association {
    control: TcpStream,
    relay: SocketAddr,
}

async fn associate(rig: &Rig) -> Association {
    let mut control = rig.client().await;
    control
        .write_all(&[5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0, 0, 0])
        .await
        .unwrap();
    let mut reply = [0; 12];
    control.read_exact(&mut reply).await.unwrap();
    assert_eq!(reply[..6], [5, 0, 5, 0, 0, 1]);
    let address = [reply[6], reply[7], reply[8], reply[9]];
    let port = u16::from_be_bytes([reply[10], reply[11]]);
    Association {
        control,
        relay: (address, port).into(),
    }
}

fn named(name: &str, port: u16) -> Vec<u8> {
    [
        &[0, 0, 0, 3, name.len() as u8],
        name.as_bytes(),
        &port.to_be_bytes(),
    ]
    .concat()
}

async fn receive(socket: &UdpSocket) -> Option<Vec<u8>> {
    let mut buffer = [0; 2048];
    let received = timeout(Duration::from_millis(500), socket.recv(&mut buffer)).await;
    received
        .ok()
        .map(|length| buffer[..length.unwrap()].to_vec())
}

#[tokio::test]
async fn each_destination_answers_under_the_name_it_was_asked_by() {
    let mut rig = Rig::start().await;
    rig.udp_echo("web.shop:53", b"name:").await;
    rig.udp_echo("10.96.0.9:53", b"addr:").await;
    let association = associate(&rig).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(association.relay).await.unwrap();

    let by_name = named("Web.Shop", 53);
    let by_address = vec![0, 0, 0, 1, 10, 96, 0, 9, 0, 53];
    for (header, answer) in [
        (&by_name, &b"name:x"[..]),
        (&by_address, b"addr:x"),
        (&by_name, b"name:x"),
    ] {
        socket.send(&[header, &b"x"[..]].concat()).await.unwrap();
        assert_eq!(receive(&socket).await.unwrap(), [header, answer].concat());
    }
    assert_eq!(rig.counters.snapshot().udp, 2);
}

#[tokio::test]
async fn fragments_garbage_and_other_sources_are_dropped() {
    let mut rig = Rig::start().await;
    rig.udp_echo("web:53", b"").await;
    let association = associate(&rig).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(association.relay).await.unwrap();
    let mut fragment = [named("web", 53), b"x".to_vec()].concat();
    fragment[2] = 1;
    socket.send(&fragment).await.unwrap();
    socket.send(b"garbage").await.unwrap();
    assert_eq!(receive(&socket).await, None);

    let datagram = [named("web", 53), b"x".to_vec()].concat();
    socket.send(&datagram).await.unwrap();
    assert_eq!(receive(&socket).await.unwrap(), datagram);
    let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    stranger.connect(association.relay).await.unwrap();
    stranger.send(&datagram).await.unwrap();
    assert_eq!(receive(&stranger).await, None);
    assert_eq!(receive(&socket).await, None);
}

#[tokio::test]
async fn the_association_ends_with_its_control_connection() {
    let mut rig = Rig::start().await;
    rig.udp_echo("web:53", b"").await;
    let association = associate(&rig).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(association.relay).await.unwrap();
    let datagram = [named("web", 53), b"x".to_vec()].concat();
    socket.send(&datagram).await.unwrap();
    assert!(receive(&socket).await.is_some());

    drop(association.control);

    let gone = timeout(Duration::from_secs(5), async {
        while socket.send(&datagram).await.is_ok() {
            tokio::task::yield_now().await;
        }
    });
    gone.await
        .expect("the relay socket is closed, which a connected sender is told");
    let closed = timeout(Duration::from_secs(5), async {
        while rig.counters.snapshot().flows_open > 0 {
            tokio::task::yield_now().await;
        }
    });
    closed.await.expect("the flows are closed too");
}

#[tokio::test]
async fn more_destinations_than_the_limit_push_out_the_oldest() {
    let mut rig = Rig::start().await;
    let association = associate(&rig).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(association.relay).await.unwrap();
    for port in 1..=300_u16 {
        rig.udp_echo(&format!("web:{port}"), b"").await;
        let datagram = [named("web", port), b"x".to_vec()].concat();
        socket.send(&datagram).await.unwrap();
        assert_eq!(receive(&socket).await.unwrap(), datagram, "{port}");
    }
    let counted = rig.counters.snapshot();
    assert_eq!(counted.udp, 300);
    assert!(counted.flows_open <= 256, "{counted:?}");
}
