//! `tp-manager --standalone` as a process of its own: over IPv6, and with few descriptors at either end.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tp_tests::laptop::binary;
use tp_tests::process::tool;
use tp_tests::{Cluster, Laptop, eventually};

/// Addresses of the laptop's network for one test; gone when dropped. The product never dials loopback.
struct Addresses(Vec<String>);

impl Addresses {
    fn add(addresses: &[&str]) -> Self {
        let added = Self(addresses.iter().map(ToString::to_string).collect());
        added.each("add", &["nodad"]);
        added
    }

    fn each(&self, what: &str, options: &[&str]) {
        for address in &self.0 {
            let place = ["-n", "k8s-laptop", "addr", what, address, "dev", "lap0"];
            tool(Command::new("ip").args(place).args(options));
        }
    }
}

impl Drop for Addresses {
    fn drop(&mut self) {
        self.each("del", &[]);
    }
}

/// A manager, a key that it lists, and an HTTP server and an echo server beside it. Ends with its laptop.
struct Standalone {
    _manager: Child,
    _servers: Child,
    arguments: [String; 6],
}

/// What the servers answer on port 8080; port 7007 echoes.
const BODY: &str = "served beside the manager\n";

const SERVERS: &str = r#"
import http.server, socket, socketserver, sys, threading
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"served beside the manager\n")
    def log_message(self, *_): pass
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536): self.request.sendall(data)
def serve(kind, port, handler):
    kind.address_family, kind.allow_reuse_address, kind.request_queue_size = family, True, 1024
    threading.Thread(target=kind((sys.argv[1], port), handler).serve_forever).start()
serve(http.server.ThreadingHTTPServer, 8080, Page)
serve(socketserver.ThreadingTCPServer, 7007, Echo)
print("serving", flush=True)
"#;

impl Standalone {
    /// On `address` of the laptop, with the manager limited to this many descriptors.
    fn start(laptop: &Laptop, address: &str, range: &str, descriptors: u32) -> Self {
        let host = if address.contains(':') {
            format!("[{address}]")
        } else {
            address.to_owned()
        };
        let home = |name: &str| laptop.path("home").join(name).display().to_string();
        let mut servers = laptop.command("python3", &["-c", SERVERS, address]);
        let mut servers = servers
            .stdout(Stdio::piped())
            .spawn()
            .expect("python starts");
        let mut said = [0; 7];
        let mut output = servers.stdout.take().expect("stdout is a pipe");
        std::io::Read::read_exact(&mut output, &mut said).expect("they serve");
        let key = home("key.pem");
        let hash = laptop.tp(&["key", "new", "--file", &key]).ok().out();
        laptop.write_file("home/authorized", &hash);
        let listen = format!("{host}:8443");
        let limit = format!("--nofile={descriptors}:{descriptors}");
        let (program, own_key, listed) = (
            binary("tp-manager"),
            home("manager.pem"),
            home("authorized"),
        );
        let arguments = [
            &limit,
            &program,
            "--standalone",
            "--listen",
            &listen,
            "--key",
            &own_key,
            "--authorized-keys",
            &listed,
            "--range",
            range,
        ];
        let log = std::fs::File::create(laptop.path("manager.log")).expect("our folder");
        let mut manager = laptop.command("prlimit", &arguments);
        let manager = manager
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("prlimit starts");
        let (manager_key, _) =
            eventually("the manager shows its key", Duration::from_secs(5), || {
                let log = std::fs::read_to_string(laptop.path("manager.log")).ok()?;
                let at = log.find("sha256:")?;
                Some(log.get(at..at + 71)?.to_owned())
            });
        let arguments = [
            "--via",
            &listen,
            "--key",
            &key,
            "--manager-key",
            &manager_key,
        ];
        Self {
            _manager: manager,
            _servers: servers,
            arguments: arguments.map(str::to_owned),
        }
    }

    fn arguments(&self) -> Vec<&str> {
        self.arguments.iter().map(String::as_str).collect()
    }
}

#[test]
fn ipv6_goes_all_the_way() {
    let Some(cluster) = Cluster::exclusive() else {
        return;
    };
    let _addresses = Addresses::add(&["fd99:7470::1/128"]);
    let laptop = Laptop::admin(&cluster);
    let manager = Standalone::start(&laptop, "fd99:7470::1", "fd99:7470::/64", 1024);

    // The laptop is on that network itself, so it takes the user's word to send it away.
    let arguments = [manager.arguments(), vec!["--also-proxy", "fd99:7470::/64"]].concat();
    let tp = laptop.connect(&arguments);

    assert_eq!(tp.get("http://[fd99:7470::1]:8080/"), BODY);
    let carrier = &tp.status()["carriers"][0];
    assert_eq!(carrier["peer"], "[fd99:7470::1]:8443", "{carrier}");
    // A port where nobody listens is refused by name, and loopback stays out of reach.
    assert_eq!(tp.socks_reply("fd99:7470::1", 81), 5);
    assert_eq!(tp.socks_reply("::1", 8080), 2);
}

/// Opens more flows than there are descriptors for, and checks what became of them, of new ones and of those after.
fn exhaust(tp: &tp_tests::Connection<'_>, host: &str, refuses: impl Fn() -> bool) {
    let mut flows = tp.spawn_probe(&["flows", "PROXY", host, "7007", "100", "4096", "hold"]);
    let opened = flows.line();
    let (open, failed) = (count(&opened, "open"), count(&opened, "failed"));
    assert!(open >= 8 && failed >= 8 && open + failed == 100, "{opened}");

    // What was being refused held descriptors for a moment itself. They are free now, and are taken by flows as well.
    let mut more = Vec::new();
    let took = loop {
        let start = Instant::now();
        if refuses() {
            break start.elapsed();
        }
        assert!(more.len() < 64, "one more is refused at some time");
        let mut flow = tp.spawn_probe(&["flows", "PROXY", host, "7007", "1", "4096", "hold"]);
        flow.line();
        more.push(flow);
    };
    assert!(took < Duration::from_secs(2), "at once: {took:?}");
    assert_eq!(
        tp.status()["state"],
        "connected",
        "the connection itself is well"
    );

    flows.end_input();
    let checked = flows.line();
    assert_eq!(
        count(&checked, "alive"),
        open,
        "every flow that was open went on: {checked}"
    );
    drop((flows, more));
    eventually("new flows work again", Duration::from_secs(5), || {
        tp.curl(&[&format!("http://{host}:8080/")])
            .succeeded()
            .then_some(())
    });
}

fn count(said: &Value, what: &str) -> u64 {
    said[what]
        .as_u64()
        .unwrap_or_else(|| panic!("no {what} in {said}"))
}

#[test]
fn a_workstation_without_descriptors_refuses_new_flows_and_keeps_old_ones() {
    let Some(cluster) = Cluster::exclusive() else {
        return;
    };
    let _addresses = Addresses::add(&["10.71.0.1/32"]);
    let laptop = Laptop::admin(&cluster);
    let manager = Standalone::start(&laptop, "10.71.0.1", "10.71.0.0/24", 1024);
    let listen = [
        "--nofile=64:64",
        &binary("tp"),
        "connect",
        "--listen",
        "127.0.0.1:0",
    ];
    let also = vec!["--also-proxy", "10.71.0.0/24"];
    let connect = [listen.to_vec(), manager.arguments(), also].concat();

    laptop.run("prlimit", &connect).ok();
    let tp = laptop.connection().expect("it is connected");

    let one_more = || !tp.curl(&["http://10.71.0.1:8080/"]).succeeded();
    exhaust(&tp, "10.71.0.1", one_more);
}

#[test]
fn a_manager_without_descriptors_refuses_new_flows_and_keeps_old_ones() {
    let Some(cluster) = Cluster::exclusive() else {
        return;
    };
    let _addresses = Addresses::add(&["10.71.0.1/32"]);
    let laptop = Laptop::admin(&cluster);
    let manager = Standalone::start(&laptop, "10.71.0.1", "10.71.0.0/24", 64);
    let arguments = [manager.arguments(), vec!["--also-proxy", "10.71.0.0/24"]].concat();
    let tp = laptop.connect(&arguments);

    let said_why = || {
        let (status, details) = tp.http_connect("10.71.0.1:8080");
        status == 502 && details.contains("too many flows")
    };
    exhaust(&tp, "10.71.0.1", said_why);
}
