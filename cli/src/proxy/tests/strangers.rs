//! Clients that speak nothing, garbage, or half of something.

use std::time::{Duration, Instant};

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::process::Stdio;

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::process::Command;

use super::super::Options;
use super::rig::{Rig, echo, quick, read_to_end, with_login};

#[tokio::test]
async fn silent_and_slow_handshakes_are_closed_in_time_and_others_are_served() {
    let mut rig = Rig::with(quick()).await;
    rig.server("web:80", super::http::hello).await;
    let beginnings: [&[u8]; 6] = [
        b"",
        b"\x05",
        b"\x05\x01\x00\x05\x01\x00\x03\x10half",
        b"GET http://web/ HTTP/1.1\r\nHost: w",
        b"CONNECT web:8",
        b"\x05\x02\x00",
    ];
    let start = Instant::now();
    let mut clients = Vec::new();
    for beginning in beginnings {
        let mut client = rig.client().await;
        client.write_all(beginning).await.unwrap();
        clients.push(client);
    }

    let page = rig.curl("http://", &["http://web/"]).await.text();

    assert_eq!(page, "GET / for web");
    for (client, beginning) in clients.iter_mut().zip(beginnings) {
        let answer = read_to_end(client).await;
        assert!(answer.len() <= 2, "{beginning:?}: {answer:?}");
    }
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn a_client_that_drips_bytes_does_not_win_time() {
    let rig = Rig::with(quick()).await;
    let mut client = rig.client().await;
    let start = Instant::now();
    let head = b"GET http://web/ HTTP/1.1\r\nX: "
        .iter()
        .chain(std::iter::repeat_n(&b'a', 10_000));
    for byte in head {
        if client.write_all(&[*byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn garbage_is_answered_or_closed_at_once_and_nothing_else_suffers() {
    let mut rig = Rig::start().await;
    rig.server("web:7", echo).await;
    let start = Instant::now();
    let garbage: [&[u8]; 6] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00\x00\x00\x00",
        b"\xff\xff\xff\xff",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"GET\0\0\0\0",
        b"\r\n\r\n\r\n",
    ];
    for bytes in garbage {
        let answer = rig.say(bytes).await;
        assert!(
            answer.starts_with(b"HTTP/1.1 400 "),
            "{bytes:?}: {:?}",
            String::from_utf8_lossy(&answer)
        );
    }
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_flood_of_silent_connections_does_not_keep_others_out() {
    let mut rig = Rig::start().await;
    rig.server("web:80", super::http::hello).await;
    let mut silent = Vec::new();
    for _ in 0..1500 {
        silent.push(rig.client().await);
    }

    let page = rig.curl("http://", &["http://web/"]).await.text();

    assert_eq!(page, "GET / for web");
    assert_eq!(
        read_to_end(&mut silent[0]).await,
        b"",
        "the oldest gave way"
    );
}

#[tokio::test]
async fn another_user_of_this_machine_is_turned_away() {
    if !rustix::process::geteuid().is_root() {
        eprintln!(
            "SKIPPED another_user_of_this_machine_is_turned_away: only root can become another user"
        );
        return;
    }
    let mut rig = Rig::start().await;
    rig.server("web:80", super::http::hello).await;
    for scheme in ["socks5h", "http"] {
        let proxy = format!("{scheme}://{}", rig.proxy);
        let curl = [
            "curl",
            "--silent",
            "--max-time",
            "10",
            "-x",
            &proxy,
            "http://web/",
        ];
        let as_nobody = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .args(curl)
            .stdin(Stdio::null())
            .output()
            .await
            .unwrap();

        assert_eq!(as_nobody.stdout, b"", "{scheme}");
        assert!(
            matches!(as_nobody.status.code(), Some(52 | 56 | 97)),
            "{scheme}: {as_nobody:?}"
        );
        assert_eq!(
            rig.curl(&format!("{scheme}://"), &["http://web/"])
                .await
                .text(),
            "GET / for web"
        );
    }
    assert_eq!(rig.counters.snapshot().flows_total, 2);
}

#[tokio::test]
async fn other_machines_are_served_only_with_allow_lan_and_a_login() {
    let Some(address) = own_address() else {
        eprintln!(
            "SKIPPED other_machines_are_served_only_with_allow_lan_and_a_login: no address but loopback"
        );
        return;
    };
    for (options, served) in [
        (Options::default(), false),
        (
            Options {
                allow_lan: true,
                ..Options::default()
            },
            false,
        ),
        (with_login(), false),
        (
            Options {
                allow_lan: true,
                ..with_login()
            },
            true,
        ),
    ] {
        let allow_lan = options.allow_lan;
        let rig = Rig::on((address, 0).into(), options).await;
        let answer = rig
            .say(b"GET http://web/ HTTP/1.1\r\nHost: web\r\n\r\n")
            .await;
        assert_eq!(
            answer.starts_with(b"HTTP/1.1 407 "),
            served,
            "allow_lan {allow_lan}"
        );
        assert!(served || answer.is_empty());
    }
}

/// An address of this machine that others reach. Nothing is sent.
fn own_address() -> Option<std::net::IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

#[tokio::test]
async fn direct_flows_are_dialled_from_here() {
    let Some(address) = own_address() else {
        eprintln!("SKIPPED direct_flows_are_dialled_from_here: no address but loopback");
        return;
    };
    let mut rig = Rig::without_tunnel(Options::default()).await;
    let origin = rig.listen((address, 0).into(), super::http::hello).await;
    for scheme in ["socks5h://", "http://"] {
        let page = rig
            .curl(scheme, &[&format!("http://{origin}/x")])
            .await
            .text();
        assert_eq!(page, format!("GET /x for {origin}"), "{scheme}");
    }
    let itself = rig
        .curl("http://", &["-i", &format!("http://{}/", rig.proxy)])
        .await
        .text();
    assert!(itself.starts_with("HTTP/1.1 403 "), "{itself}");
}

/// Runs the test below in a process of its own that may open few descriptors.
#[tokio::test]
async fn running_out_of_descriptors_passes_and_does_not_spin() {
    let child = Command::new("prlimit")
        .arg("--nofile=96")
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--ignored",
            "proxy::tests::strangers::with_few_descriptors",
        ])
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && output.contains("1 passed"),
        "{output}"
    );
}

#[tokio::test]
#[ignore = "run by running_out_of_descriptors_passes_and_does_not_spin"]
async fn with_few_descriptors() {
    let mut rig = Rig::start().await;
    rig.server("web:80", super::http::hello).await;
    let stat = File::open("/proc/self/stat").unwrap();
    let mut silent = Vec::new();
    while let Ok(client) = TcpStream::connect(rig.proxy).await {
        silent.push(client);
        assert!(silent.len() < 200, "the limit is in force");
    }
    let busy = cpu_ticks(&stat);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let busy = cpu_ticks(&stat) - busy;

    silent.truncate(silent.len() / 2);
    let answer = rig
        .say(b"GET http://web/ HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")
        .await;

    assert!(
        busy < 30,
        "{busy} of 100 ticks while there was nothing to do"
    );
    assert!(
        answer.ends_with(b"GET / for web"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
}

/// User and system time of this process, in hundredths of a second. The file is open before descriptors run out.
fn cpu_ticks(stat: &File) -> u64 {
    let mut text = [0; 1024];
    let length = stat.read_at(&mut text, 0).unwrap();
    let text = std::str::from_utf8(&text[..length]).unwrap();
    let (_, fields) = text.rsplit_once(") ").unwrap();
    let times = fields.split(' ').skip(11).take(2);
    times.map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}
