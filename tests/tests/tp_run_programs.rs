//! Programs that people use, unmodified, under `tp run`: each one's own check of what it moved.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tp_tests::laptop::binary;
use tp_tests::process::{LIMIT, tool};
use tp_tests::{Cluster, Laptop, Namespace, Run, User};

/// A laptop whose user may use the namespace, with a connection that is up.
fn connected(cluster: &Cluster, namespace: &Namespace<'_>) -> Laptop {
    let laptop = Laptop::of(cluster, &User::of_namespace(cluster, "ada", namespace));
    laptop
        .tp(&["connect", "--proxy", "--listen", "127.0.0.1:0"])
        .ok();
    laptop
}

/// The probe as Service `web`.
fn with_probe(test: impl FnOnce(&Laptop, &Namespace<'_>)) {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("programs");
    namespace.probe("web");
    test(&connected(&cluster, &namespace), &namespace);
}

/// The servers of developers' tools as Service `tools`, and a user whom sshd there lets in.
fn with_tools(test: impl FnOnce(&Laptop, &Namespace<'_>)) {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("programs");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let key = folder.path().join("key");
    tool(
        Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "ada", "-f"])
            .arg(&key),
    );
    let read = |path: &Path| std::fs::read_to_string(path).expect("ssh-keygen wrote it");
    namespace.tools("tools", &read(&key.with_extension("pub")));
    let laptop = connected(&cluster, &namespace);
    laptop.write_file("home/key", &read(&key));
    test(&laptop, &namespace);
}

/// Runs a program under `tp run`.
fn under(laptop: &Laptop, program: &[&str]) -> Run {
    laptop.tp(&[&["run", "--"], program].concat())
}

/// Runs a shell script under `tp run`, on a laptop that knows its user's name, as ssh wants it, and whose administrator
/// has written a line for ssh into /etc.
fn with_ssh(laptop: &Laptop, script: &str, input: &[u8]) -> Run {
    let (uid, home) = (laptop.uid(), laptop.path("home"));
    let passwd = format!("ada:x:{uid}:{uid}::{}:/bin/sh\n", home.display());
    laptop.write_file("home/passwd", &passwd);
    let administrator = format!(
        "chmod 644 passwd; mount --bind passwd /etc/passwd
         mount -t tmpfs -o mode=755 none /etc/ssh/ssh_config.d
         printf 'Host tools\\n  User root\\n  IdentityFile {home}/key\\n  StrictHostKeyChecking accept-new\\n' > /etc/ssh/ssh_config.d/ours.conf
         exec \"$@\"",
        home = home.display()
    );
    let as_user = laptop.command(&binary("tp"), &["run", "--", "sh", "-ec", script]);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &administrator, "sh"]);
    command.arg(as_user.get_program()).args(as_user.get_args());
    command.current_dir(home);
    Run::new(command, input, LIMIT)
}

#[test]
fn ssh_logs_in_carries_bytes_both_ways_and_passes_the_exit_code() {
    with_tools(|laptop, namespace| {
        let sent: Vec<u8> = (0..8_000_000_u32).flat_map(u32::to_ne_bytes).collect();

        let back = with_ssh(laptop, "ssh tools 'tee /srv/copy'", &sent).ok();
        let failed = with_ssh(laptop, "ssh tools exit 7", b"");

        assert!(back.stdout == sent, "{} bytes came", back.stdout.len());
        let there = namespace.exec("tools", &["sh", "-c", "wc -c < /srv/copy"]);
        assert_eq!(there.trim(), sent.len().to_string());
        failed.exits(7);
    });
}

#[test]
fn git_pushes_over_ssh_and_clones_from_a_git_daemon() {
    with_tools(|laptop, namespace| {
        let script = "
            export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
            git init -q -b main work; cd work
            head -c 4000000 /dev/urandom > noise
            git add noise; git commit -q -m noise
            git push -q tools:/srv/repo.git main
            cd ..; git clone -q git://tools/repo.git copy
            cmp work/noise copy/noise
            git -C copy rev-parse HEAD";

        let pushed = with_ssh(laptop, script, b"").ok();

        let there = ["git", "-C", "/srv/repo.git", "rev-parse", "main"];
        assert_eq!(pushed.out(), namespace.exec("tools", &there));
    });
}

#[test]
fn iperf3_measures_both_directions_and_datagrams() {
    const BYTES: u64 = 64 << 20;
    // Its control connection may overtake what is on its way; the receiver counts until then.
    const ON_THE_WAY: u64 = 16 << 20;
    with_tools(|laptop, _| {
        for direction in [&[][..], &["--reverse"]] {
            let amount = BYTES.to_string();
            let base = ["iperf3", "--client", "tools", "--json", "--bytes", &amount];
            let report = under(laptop, &[&base[..], direction].concat()).ok().json();
            let end = |side: &str| report["end"][side]["bytes"].as_u64();
            assert!(end("sum_sent") >= Some(BYTES), "{report}");
            assert!(end("sum_received") >= Some(BYTES - ON_THE_WAY), "{report}");
            assert!(end("sum_received") <= end("sum_sent"), "{report}");
        }
        let udp = [
            "--udp",
            "--bitrate",
            "20M",
            "--length",
            "1200",
            "--bytes",
            "2M",
            "--json",
        ];
        let base = ["iperf3", "--client", "tools"];
        let report = under(laptop, &[&base[..], &udp].concat()).ok().json();
        let sum = &report["end"]["sum"];
        let [packets, lost] = ["packets", "lost_packets"].map(|name| sum[name].as_u64());
        assert!(packets > Some(1000) && lost < packets, "{report}");
    });
}

/// Fetches, and sends 8 MiB to an echo, by the event loop of Node.
const NODE: &str = r#"
const net = require('net'), { randomBytes, createHash } = require('crypto');
(async () => {
  for (const host of process.argv.slice(2)) process.stdout.write(await (await fetch(`http://${host}/`)).text());
  const sent = randomBytes(8 << 20), got = createHash('sha256');
  const socket = net.connect({ port: 7, host: 'web', allowHalfOpen: true });
  socket.end(sent);
  for await (const piece of socket) got.update(piece);
  console.log(got.digest('hex') === createHash('sha256').update(sent).digest('hex'));
})();
"#;

#[test]
fn node_fetches_by_name_and_streams() {
    with_probe(|laptop, namespace| {
        laptop.write_file("home/client.js", NODE);
        let long = format!("web.{}.svc.cluster.local", namespace.name);

        let run = under(laptop, &["node", "client.js", "web", &long]).ok();

        assert_eq!(run.out(), "hello-from-probe\nhello-from-probe\ntrue\n");
    });
}

#[test]
fn programs_without_our_libraries_in_them_are_served() {
    with_probe(|laptop, _| {
        // Static, in Go, with a resolver of its own.
        let kubectl = laptop.kubectl_program();
        let get = [kubectl.as_str(), "--server=http://web", "get", "--raw", "/"];
        assert_eq!(under(laptop, &get).ok().out(), "hello-from-probe\n");

        // Every socket call through io_uring.
        let ring = under(laptop, &[&binary("probe"), "ring", "web:7", "3000000"]).ok();
        assert_eq!(ring.json()["echoed"], 3_000_000);

        // Not setuid, and without the capability that its file has.
        let ping = under(laptop, &["ping", "-c", "2", "-i", "0.2", "-W", "5", "web"]).ok();
        assert!(
            ping.out().contains("2 received, 0% packet loss"),
            "{}",
            ping.report()
        );
    });
}

/// Connects so many sockets before any is connected, then has every one echo its number.
const MANY: &str = r#"
import resource, select, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
address, number = (socket.gethostbyname("web"), 7), int(sys.argv[1])
sockets = {}
for _ in range(number):
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex(address)
    sockets[s.fileno()] = s
def when(event, do):
    poll, waiting = select.poll(), set(sockets)
    for fd in sockets:
        poll.register(fd, event)
    while waiting:
        ready = poll.poll(20000)
        if not ready:
            sys.exit("%d of %d still wait" % (len(waiting), number))
        for fd, _ in ready:
            poll.unregister(fd)
            waiting.remove(fd)
            do(fd)
when(select.POLLOUT, lambda fd: sockets[fd].send(b"%d" % fd))
same = []
when(select.POLLIN, lambda fd: same.append(sockets[fd].recv(100) == b"%d" % fd))
print(sum(same))
"#;

#[test]
fn a_thousand_sockets_at_once_are_connected_and_kept_apart() {
    with_probe(|laptop, _| {
        laptop.write_file("home/many.py", MANY);

        let run = under(laptop, &["python3", "many.py", "1000"]).ok();

        assert_eq!(run.out(), "1000\n", "{}", run.report());
        assert!(run.took < Duration::from_secs(20), "{:?}", run.took);
    });
}

/// Becomes a daemon as the textbook says, heeds no signal that it can refuse, and says its process id.
const DAEMON: &str = r#"
import os, signal, time
if os.fork():
    os.wait()
    raise SystemExit
os.setsid()
if os.fork():
    os._exit(0)
os.chdir("/")
for fd in range(3):
    os.dup2(os.open(os.devnull, os.O_RDWR), fd)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
time.sleep(300)
"#;

#[test]
fn daemons_are_ended_even_in_namespaces_of_their_own() {
    with_probe(|laptop, _| {
        laptop.write_file("home/daemon.py", DAEMON);
        let before = laptop.processes();
        let script = "python3 daemon.py
                      unshare --user --map-root-user --net --mount python3 daemon.py
                      mkfifo ready; setsid unshare --user --net sh -c 'echo > ready; exec sleep 301' & read line < ready
                      echo started";

        let run = under(laptop, &["sh", "-ec", script]).ok();

        assert_eq!(run.out(), "started\n");
        assert_eq!(laptop.processes(), before, "{}", run.report());
    });
}
