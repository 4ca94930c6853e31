//! UDP of a workload by an intercept that takes everything: datagrams reach the laptop, answers come back to whoever asked.

use std::time::Duration;

use tp_tests::process::LIMIT;
use tp_tests::{Cluster, Connection, Laptop, Program, User, eventually};

/// A program of the laptop that answers each datagram with its name before it; a question of DNS it answers as one.
const PROGRAM: &str = r#"
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    data, peer = server.recvfrom(65535)
    is_dns = b"\x07example" in data
    answer = data[:2] + bytes([data[2] | 0x80]) + data[3:] if is_dns else b"laptop " + data
    server.sendto(answer, peer)
"#;

/// Says what is answered to its argument.
const ASK: &str = r#"
import socket, sys
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(float(sys.argv[3]))
client.connect(("127.0.0.1", int(sys.argv[1])))
client.send(sys.argv[2].encode())
try: print(client.recv(65535).decode())
except TimeoutError: print("silence")
"#;

/// What is answered to a datagram to port 7 of the Service, by a client whose port is new to it.
fn answer(tp: &Connection<'_>, text: &str, patience: &str) -> String {
    let mut forward = tp.spawn_probe(&["udp-forward", "PROXY", "127.0.0.1:0", "web", "7"]);
    let listening = forward.line()["listening"]
        .as_str()
        .expect("an address")
        .to_owned();
    let (_, port) = listening.split_once(':').expect("an address");
    let asked = tp
        .laptop()
        .run("python3", &["-c", ASK, port, text, patience]);
    asked.ok().out().trim_end().to_owned()
}

#[test]
fn datagrams_reach_the_laptop_and_the_application_when_nobody_is_there() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("udp-intercept");
    namespace.probe("web");
    let user = User::who_intercepts(&cluster, "ada", &namespace);
    let laptop = Laptop::of(&cluster, &user);
    let program = Program::start(&laptop, PROGRAM, &[]);
    let tp = laptop.connect(&[]);
    assert_eq!(answer(&tp, "x", "5"), "x");
    let port = format!("{}:7/udp", program.port);
    let intercept = ["intercept", "web", "-w", "pod/web", "-p", &port];

    let refused = laptop.tp(&intercept).exits(2);
    assert!(refused.err().contains("--global"), "{}", refused.report());
    let run = laptop.tp(&[&intercept[..], &["--global"]].concat()).ok();

    assert!(
        run.out().contains("port 7/udp of pod/web"),
        "{}",
        run.report()
    );
    for n in 0..10 {
        assert_eq!(answer(&tp, &n.to_string(), "5"), format!("laptop {n}"));
    }
    std::thread::scope(|scope| {
        for n in 10..20 {
            let tp = &tp;
            scope.spawn(move || assert_eq!(answer(tp, &n.to_string(), "5"), format!("laptop {n}")));
        }
    });
    // TCP of the same number is another port.
    let echoed = tp
        .probe_with(&["tcp", "PROXY", "web", "7"], b"tcp", LIMIT)
        .ok();
    assert_eq!(echoed.out(), "tcp");
    let mut forward = tp.spawn_probe(&["udp-forward", "PROXY", "127.0.0.1:0", "web", "7"]);
    let listening = forward.line()["listening"]
        .as_str()
        .expect("an address")
        .to_owned();
    let (_, port) = listening.split_once(':').expect("an address");
    let dig = laptop.run(
        "dig",
        &["@127.0.0.1", "-p", port, "+tries=1", "+time=5", "example"],
    );
    assert!(dig.ok().out().contains("status: NOERROR"));
    let status = tp.status();
    assert_eq!(status["intercepts"][0]["protocol"], "UDP", "{status}");

    // The port is closed now: new clients are the application's at once, and so is who was served before, after a datagram
    // that is lost to find that out.
    drop(program);
    assert_eq!(answer(&tp, "x", "5"), "x");
    eventually("the application answers", Duration::from_secs(10), || {
        let asked = laptop.run("python3", &["-c", ASK, port, "x", "0.5"]);
        (asked.out() == "x\n").then_some(())
    });

    laptop.tp(&["leave", "web"]).ok();
    eventually("nothing is redirected", Duration::from_secs(10), || {
        (answer(&tp, "x", "0.5") == "x").then_some(())
    });
}
