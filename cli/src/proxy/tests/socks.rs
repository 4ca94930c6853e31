//! SOCKS5 CONNECT.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::rig::{Rig, echo, quick, read_to_end, with_login};

/// The request of a client that offers no authentication and does not wait for answers.
fn connect_to(name: &str, port: u16) -> Vec<u8> {
    let mut bytes = vec![5, 1, 0, 5, 1, 0, 3, name.len() as u8];
    bytes.extend_from_slice(name.as_bytes());
    bytes.extend_from_slice(&port.to_be_bytes());
    bytes
}

async fn read_exactly<const N: usize>(client: &mut TcpStream) -> [u8; N] {
    let mut bytes = [0; N];
    client.read_exact(&mut bytes).await.unwrap();
    bytes
}

const SUCCESS: [u8; 12] = [5, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0];

#[tokio::test]
async fn bytes_reach_the_service_and_come_back_and_half_close_is_kept() {
    let mut rig = Rig::start().await;
    rig.server("web.shop:7", async |mut stream: TcpStream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        all.reverse();
        stream.write_all(&all).await.unwrap();
    })
    .await;
    let mut client = rig.client().await;

    client.write_all(&connect_to("web.shop", 7)).await.unwrap();
    assert_eq!(read_exactly(&mut client).await, SUCCESS);
    client.write_all(b"abc").await.unwrap();
    client.shutdown().await.unwrap();

    assert_eq!(read_to_end(&mut client).await, b"cba");
}

#[tokio::test]
async fn early_bytes_follow_the_dial() {
    let mut rig = Rig::start().await;
    rig.server("web:7", echo).await;
    let mut client = rig.client().await;

    client
        .write_all(&[connect_to("web", 7), b"early".to_vec()].concat())
        .await
        .unwrap();

    assert_eq!(read_exactly(&mut client).await, SUCCESS);
    assert_eq!(&read_exactly::<5>(&mut client).await, b"early");
}

#[tokio::test]
async fn failed_dials_have_their_reply_and_never_a_success_before() {
    let rig = Rig::with(quick()).await;
    let table = [
        ("refused.x.svc", 5),
        ("unreachable.x.svc", 4),
        ("filtered.x.svc", 4),
        ("unknown.x.svc", 4),
        ("forbidden.x.svc", 2),
        ("localhost", 2),
        ("127.0.0.1", 2),
    ];
    for (name, reply) in table {
        let answer = rig.say(&connect_to(name, 80)).await;
        assert_eq!(answer, [5, 0, 5, reply, 0, 1, 0, 0, 0, 0, 0, 0], "{name}");
    }
    assert_eq!(rig.counters.snapshot().refused, table.len() as u64);
}

#[tokio::test]
async fn bind_other_address_types_and_socks4_are_refused_by_their_codes() {
    let rig = Rig::start().await;
    assert_eq!(
        rig.say(&[5, 1, 0, 5, 2, 0, 1, 10, 96, 0, 1, 0, 80]).await[3],
        7
    );
    assert_eq!(rig.say(&[5, 1, 0, 5, 1, 0, 9]).await[3], 8);
    assert_eq!(rig.say(&[5, 1, 1]).await, [5, 0xff]);
    assert_eq!(
        rig.say(b"\x04\x01\x00\x50\x0a\x60\x00\x01\x00").await,
        [0, 0x5b, 0, 0, 0, 0, 0, 0]
    );
}

#[tokio::test]
async fn a_flow_waits_for_the_tunnel_and_says_so_when_none_comes() {
    let mut rig = Rig::without_tunnel(quick()).await;
    assert_eq!(rig.say(&connect_to("web", 7)).await[3], 1);

    rig.server("web:7", echo).await;
    let mut client = rig.client().await;
    client.write_all(&connect_to("web", 7)).await.unwrap();
    rig.connect_tunnel().await;
    assert_eq!(read_exactly(&mut client).await, SUCCESS);

    rig.lose_tunnel();
    rig.connect_tunnel().await;
    let mut client = rig.client().await;
    client.write_all(&connect_to("web", 7)).await.unwrap();
    assert_eq!(read_exactly(&mut client).await, SUCCESS);
}

#[tokio::test]
async fn a_password_is_asked_for_and_checked() {
    let mut rig = Rig::with(with_login()).await;
    rig.server("web:7", echo).await;
    let login = |password: &str| {
        let mut bytes = vec![5, 2, 0, 2, 1, 3];
        bytes.extend_from_slice(b"ada");
        bytes.push(password.len() as u8);
        bytes.extend_from_slice(password.as_bytes());
        bytes.extend_from_slice(&connect_to("web", 7)[3..]);
        bytes
    };

    assert_eq!(
        rig.say(&connect_to("web", 7)).await,
        [5, 0xff],
        "without a login"
    );
    assert_eq!(rig.say(&login("wrong")).await, [5, 2, 1, 1]);
    let mut client = rig.client().await;
    client.write_all(&login("love lace")).await.unwrap();
    assert_eq!(
        read_exactly(&mut client).await,
        [5, 2, 1, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    );
}

#[tokio::test]
async fn a_reset_of_the_service_is_a_reset_of_the_client() {
    let mut rig = Rig::start().await;
    rig.server("web:7", async |stream: TcpStream| {
        socket2::SockRef::from(&stream)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
    })
    .await;
    let mut client = rig.client().await;

    client.write_all(&connect_to("web", 7)).await.unwrap();
    read_exactly::<12>(&mut client).await;
    let error = client.read(&mut [0; 8]).await.unwrap_err();

    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn curl_gets_a_page_by_name_and_by_address() {
    let mut rig = Rig::start().await;
    for name in ["web.shop:80", "10.96.0.7:80"] {
        rig.server(name, super::http::hello).await;
    }

    assert_eq!(
        rig.curl("socks5h://", &["http://web.shop/a"]).await.text(),
        "GET /a for web.shop"
    );
    assert_eq!(
        rig.curl("socks5h://", &["http://10.96.0.7/"]).await.text(),
        "GET / for 10.96.0.7"
    );
    assert_eq!(
        rig.curl("socks5://", &["http://10.96.0.7/"]).await.text(),
        "GET / for 10.96.0.7"
    );
    let refused = rig.curl("socks5h://", &["http://refused.x.svc/"]).await;
    assert_eq!(refused.code, Some(97), "{}", refused.stderr);
    assert_eq!(rig.counters.snapshot().socks, 3);
}
