//! What broken and hostile programs send to the proxy's port: answered or closed within ten seconds, at the cost of
//! bounded memory, and felt by nobody else.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tp_tests::laptop::binary;
use tp_tests::process::resident_memory;
use tp_tests::{Cluster, Connection, Laptop, User};

fn send(tp: &Connection<'_>, bytes: &[u8]) -> Value {
    let limit = Duration::from_secs(30);
    let run = tp
        .laptop()
        .run_with(&binary("probe"), &["raw", &tp.proxy, "14"], bytes, limit);
    run.ok().json()
}

#[test]
fn garbage_and_half_a_handshake_are_closed_within_ten_seconds() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("bad-input");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let long_header = format!(
        "GET http://web/ HTTP/1.1\r\nHost: web\r\nX: {}\r\n\r\n",
        "y".repeat(1 << 20)
    );
    let cases: [(&str, Vec<u8>); 14] = [
        ("nothing", b"".to_vec()),
        ("zeroes", vec![0; 4096]),
        (
            "noise",
            (0..4096_u32)
                .map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8)
                .collect(),
        ),
        (
            "a TLS hello",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        ),
        (
            "SOCKS4",
            b"\x04\x01\x00\x50\x0a\x00\x00\x01user\x00".to_vec(),
        ),
        ("SOCKS5, half a greeting", b"\x05\x02\x00".to_vec()),
        ("SOCKS5, no request", b"\x05\x01\x00".to_vec()),
        (
            "SOCKS5, half a request",
            b"\x05\x01\x00\x05\x01\x00\x03\x20we".to_vec(),
        ),
        ("SOCKS5, no method", b"\x05\x00".to_vec()),
        ("SOCKS5, unknown method", b"\x05\x01\x80".to_vec()),
        (
            "SOCKS5, address type 9",
            b"\x05\x01\x00\x05\x01\x00\x09\x00\x00\x00\x00\x00\x50".to_vec(),
        ),
        (
            "SOCKS5, empty name",
            b"\x05\x01\x00\x05\x01\x00\x03\x00\x00\x50".to_vec(),
        ),
        ("HTTP, half a request line", b"GET http://we".to_vec()),
        ("HTTP, a header of 1 MiB", long_header.into_bytes()),
    ];

    std::thread::scope(|scope| {
        let sent: Vec<_> = cases
            .iter()
            .map(|(name, bytes)| (name, scope.spawn(|| send(&tp, bytes))))
            .collect();
        // Beside all of them, a well-behaved client notices nothing.
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            let start = Instant::now();
            assert_eq!(tp.get("http://web/"), "hello-from-probe\n");
            assert!(
                start.elapsed() < Duration::from_secs(2),
                "{:?}",
                start.elapsed()
            );
        }
        for (name, sent) in sent {
            let answer = sent.join().unwrap();
            assert_ne!(answer["end"], "open", "{name}: {answer}");
            assert!(answer["ms"].as_u64() < Some(11_000), "{name}: {answer}");
        }
    });
}

#[test]
fn malformed_http_is_refused_and_never_passed_on() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("bad-input");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);

    for (name, request) in [
        (
            "both lengths",
            "POST http://web/ HTTP/1.1\r\nHost: web\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "two lengths",
            "POST http://web/ HTTP/1.1\r\nHost: web\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        ),
        (
            "a space before the colon",
            "GET http://web/ HTTP/1.1\r\nHost : web\r\n\r\n",
        ),
        (
            "NUL in a value",
            "GET http://web/ HTTP/1.1\r\nHost: web\r\nX: a\0b\r\n\r\n",
        ),
        ("origin form", "GET / HTTP/1.1\r\nHost: web\r\n\r\n"),
        (
            "origin form to the proxy",
            "GET /status HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        ),
        (
            "CONNECT without a port",
            "CONNECT web HTTP/1.1\r\nHost: web\r\n\r\n",
        ),
        (
            "CONNECT to port 0",
            "CONNECT web:0 HTTP/1.1\r\nHost: web\r\n\r\n",
        ),
        (
            "CONNECT to port 65536",
            "CONNECT web:65536 HTTP/1.1\r\nHost: web\r\n\r\n",
        ),
        (
            "another scheme",
            "GET ftp://web/ HTTP/1.1\r\nHost: web\r\n\r\n",
        ),
        (
            "a name that is none",
            "CONNECT we_b!.%2e:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        ),
    ] {
        let (status, _) = tp.http(request.as_bytes());
        assert_eq!(status, 400, "{name}");
    }
}

#[test]
fn the_pac_file_is_for_programs_on_this_machine_only() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("bad-input");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let get = |headers: &str| {
        tp.http(format!("GET /proxy.pac HTTP/1.1\r\n{headers}\r\n").as_bytes())
            .0
    };
    let host = format!("Host: {}\r\n", tp.proxy);

    assert_eq!(get(&host), 200);
    assert_eq!(get(&format!("{host}Sec-Fetch-Site: none\r\n")), 200);
    assert_eq!(get(&format!("{host}Sec-Fetch-Site: cross-site\r\n")), 400);
    assert_eq!(get(&format!("{host}Sec-Fetch-Site: same-origin\r\n")), 400);
    assert_eq!(get("Host: rebound.example\r\n"), 400);
    assert_eq!(get(""), 400);
}

#[test]
fn another_user_of_the_machine_is_refused() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("bad-input");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let other = Laptop::admin(&cluster);

    assert_eq!(tp.get("http://web/"), "hello-from-probe\n");
    let stolen = other.run(
        "curl",
        &[
            "-sS",
            "--max-time",
            "5",
            "-x",
            &format!("socks5h://{}", tp.proxy),
            "http://web/",
        ],
    );
    assert!(!stolen.succeeded(), "{}", stolen.report());
    let proxy = [
        "-sS",
        "--max-time",
        "5",
        "-x",
        &format!("http://{}", tp.proxy),
        "http://web/",
    ];
    let stolen = other.run("curl", &proxy);
    assert!(!stolen.out().contains("hello"), "{}", stolen.report());
    // And it listens on loopback only.
    let port = tp.proxy.rsplit(':').next().unwrap();
    let url = format!("http://10.99.0.2:{port}/proxy.pac");
    assert!(
        !laptop
            .run("curl", &["-sS", "--max-time", "2", &url])
            .succeeded()
    );
}

#[test]
fn a_slow_loris_gets_no_memory_and_no_time() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("bad-input");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let daemon = laptop.daemon();
    tp.get("http://web/");
    let before = resident_memory(daemon);
    // A thousand connections, each with one byte a second and no end.
    let loris = r#"
import socket, sys, time
host, port = sys.argv[1].split(":")
peers = [socket.create_connection((host, int(port))) for _ in range(1000)]
print("open", flush=True)
start, closed = time.time(), 0
text = b"GET http://web/ HTTP/1.1\r\nHost: web\r\nX: " + b"y" * 100
for byte in text[:14]:
    for peer in peers:
        try: peer.send(bytes([byte]))
        except OSError: pass
    time.sleep(1)
for peer in peers:
    peer.setblocking(False)
    try:
        while peer.recv(65536): pass
        closed += 1
    except BlockingIOError: pass
    except OSError: closed += 1
print(closed, flush=True)
"#;
    let mut command: Command = laptop.command("python3", &["-c", loris, &tp.proxy]);
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let mut largest = 0;
    while start.elapsed() < Duration::from_secs(9) {
        let start = Instant::now();
        assert_eq!(tp.get("http://web/"), "hello-from-probe\n");
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "{:?}",
            start.elapsed()
        );
        largest = largest.max(resident_memory(daemon));
    }
    let output = child.wait_with_output().unwrap();

    assert_eq!(String::from_utf8_lossy(&output.stdout), "open\n1000\n");
    let grown = largest.saturating_sub(before);
    assert!(
        grown < 32 << 20,
        "1,000 half-sent requests took {grown} bytes"
    );
}
