//! Programs reach the cluster's Services through the proxy, in each protocol, with every byte in place.

use std::time::Duration;

use tp_tests::laptop::binary;
use tp_tests::{Cluster, Laptop, Run, User, eventually};

const LONG: Duration = Duration::from_secs(180);

#[test]
fn curl_gets_a_page_by_name_in_every_protocol() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("reach");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let by_name = format!("http://web.{}/", namespace.name);
    let by_address = format!("http://{}/", namespace.value("svc/web", ".spec.clusterIP"));
    let by_pod = format!("http://{}/", namespace.value("pod/web", ".status.podIP"));

    assert_eq!(tp.curl(&[&by_name]).ok().out(), "hello-from-probe\n");
    assert_eq!(
        tp.curl_through("http", &[&by_name]).ok().out(),
        "hello-from-probe\n"
    );
    assert_eq!(
        tp.curl_through("http", &["--proxytunnel", &by_name])
            .ok()
            .out(),
        "hello-from-probe\n"
    );
    for url in [&by_address, &by_pod] {
        assert_eq!(
            tp.curl_through("socks5", &[url]).ok().out(),
            "hello-from-probe\n"
        );
        assert_eq!(
            tp.curl_through("http", &[url]).ok().out(),
            "hello-from-probe\n"
        );
    }
    // Without the proxy there is no way: the tunnel carried all of this.
    let direct = laptop.run("curl", &["--silent", "--max-time", "2", &by_address]);
    assert!(!direct.succeeded(), "{}", direct.report());
}

#[test]
fn large_bodies_arrive_whole_both_ways_and_http2_passes() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("reach");
    namespace.server("web", "nginx", &[80, 443]);
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let sum = |text: String| {
        text.split_whitespace()
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    let big = sum(namespace.exec("web", &["sha256sum", "/srv/www/big"]));

    for scheme in ["socks5h", "http"] {
        let download = format!(
            "set -o pipefail; curl -sS --fail --max-time 170 -x {scheme}://{} http://web/big | tee >(wc -c >&2) | sha256sum",
            tp.proxy
        );
        let run = laptop.run_with("bash", &["-c", &download], b"", LONG).ok();
        assert_eq!(sum(run.out()), big, "{scheme}: {}", run.report());
        assert_eq!(run.err().trim(), "268435456");
    }

    let upload = format!(
        "set -o pipefail; head -c 67108864 /dev/urandom > noise; sha256sum noise; \
         curl -sS --fail --max-time 170 -x socks5h://{} -T noise http://web/upload/noise",
        tp.proxy
    );
    let run = laptop.run_with("bash", &["-c", &upload], b"", LONG).ok();
    assert_eq!(
        sum(run.out()),
        sum(namespace.exec("web", &["sha256sum", "/srv/www/upload/noise"]))
    );

    laptop.write_file(
        "home/ca.crt",
        &namespace.exec("web", &["cat", "/srv/www/ca.crt"]),
    );
    let url = format!("https://web.{}.svc.cluster.local/", namespace.name);
    for scheme in ["socks5h", "http"] {
        let arguments = [
            "--http2",
            "--cacert",
            "ca.crt",
            "-w",
            "HTTP/%{http_version}",
            &url,
        ];
        let run = tp.curl_through(scheme, &arguments).ok();
        assert_eq!(run.out(), "hello-from-nginx\nHTTP/2", "{scheme}");
    }
    // Many requests of one HTTP/2 connection at once, each with its body.
    let urls: Vec<&str> = std::iter::repeat_n(url.as_str(), 50).collect();
    let arguments = [&["--http2", "--cacert", "ca.crt", "--parallel"][..], &urls].concat();
    assert_eq!(
        tp.curl(&arguments).ok().out(),
        "hello-from-nginx\n".repeat(50)
    );
}

#[test]
fn each_end_of_a_connection_is_passed_on_as_it_is() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("reach");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let flow = |port: &str, input: &[u8]| -> Run {
        tp.probe_with(&["tcp", "PROXY", "web", port], input, LONG)
            .ok()
    };

    // Echo, FIN from us first.
    let echoed = flow("7", b"over there and back");
    assert_eq!(
        (echoed.out().as_str(), echoed.err().trim()),
        ("over there and back", "end=fin")
    );

    // Half-close: the answer comes after our FIN, and depends on every byte before it.
    let noise: Vec<u8> = (0..5_000_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    laptop.write_file("home/expected", "");
    std::fs::write(laptop.path("home/expected"), &noise).unwrap();
    let expected = laptop.run("sha256sum", &["expected"]).ok().out();
    let digest = flow("9", &noise);
    let hash = expected.split_whitespace().next().unwrap();
    assert_eq!(
        (digest.out(), digest.err().trim()),
        (format!("5000000 {hash}\n"), "end=fin")
    );

    // The server speaks first; its reset arrives as a reset, after its last bytes.
    assert_eq!(flow("13", b"x").out(), "hello\nx");
    let reset = flow("14", b"x");
    assert_eq!(
        (reset.out().as_str(), reset.err().trim()),
        ("bye", "end=rst")
    );
}

#[test]
fn a_reset_of_the_client_is_a_reset_for_the_server() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("reach");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let script = r#"
import socket, socks, struct, sys
host, port = sys.argv[1].split(":")
for i in range(10):
    s = socks.socksocket()
    s.set_proxy(socks.SOCKS5, host, int(port), rdns=True)
    s.connect(("web", 7))
    s.sendall(b"x")
    assert s.recv(1) == b"x"
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()
"#;
    laptop.run("python3", &["-c", script, &tp.proxy]).ok();

    let (_, took) = eventually("the server saw ten resets", Duration::from_secs(5), || {
        let ends = tp.get("http://web/ends");
        (ends == "open 0 fin 0 rst 10\n").then_some(())
    });
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[test]
fn a_program_that_knows_no_proxy_works_through_proxychains() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("reach");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let (host, port) = tp.proxy.split_once(':').unwrap();
    let configuration = format!("strict_chain\nproxy_dns\n[ProxyList]\nsocks5 {host} {port}\n");
    laptop.write_file("home/proxychains.conf", &configuration);

    let arguments = ["-q", "-f", "proxychains.conf", "nc", "-N", "web", "7"];
    let run = laptop
        .run_with("proxychains4", &arguments, b"one line\n", LONG)
        .ok();

    assert_eq!(run.out(), "one line\n");
}

#[test]
fn tp_curl_and_the_variables_of_tp_env_reach_the_service() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("reach");
    namespace.probe("web");
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let _tp = laptop.connect(&[]);

    assert_eq!(
        laptop.tp(&["curl", "--", "-sS", "http://web/"]).ok().out(),
        "hello-from-probe\n"
    );
    let script = format!(
        r#"eval "$({} env)"; exec curl -sS --fail http://web/"#,
        binary("tp")
    );
    assert_eq!(
        laptop.run("sh", &["-euc", &script]).ok().out(),
        "hello-from-probe\n"
    );
}
