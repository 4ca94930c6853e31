//! What a program under `tp run` hears when something on its way fails: the truth, at once, and nothing that looks like
//! success.

use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use tp_tests::laptop::binary;
use tp_tests::process::{LIMIT, tool};
use tp_tests::{Cluster, Laptop, Link, Namespace, User, eventually};

/// What every script of these tests begins with.
const HEAD: &str = r#"
import errno, os, socket, subprocess, sys, time

def say(*words):
    print(*words, flush=True)

def reached(name):
    open(name, "w").close()

def wait(what, done):
    end = time.time() + 30
    while not done():
        if time.time() > end:
            sys.exit("waited for " + what)
        time.sleep(0.01)

def outcome(limit, call):
    begun = time.time()
    try:
        call()
        what = "worked"
    except socket.gaierror:
        what = "no name"
    except ConnectionError:
        what = "ended"
    except OSError as error:
        what = errno.errorcode.get(error.errno, repr(error))
    took = time.time() - begun
    say(what, "in time" if took < limit else "late: %.1f s" % took)

def tcp(host, port, timeout=20):
    return socket.create_connection((host, port), timeout=timeout)

flow = tcp("web", 7)
flow.sendall(b"x")
assert flow.recv(1) == b"x"
address = flow.getpeername()[0]
"#;

/// A namespace with the probe as `web`, and a laptop whose user may use it.
fn with_probe(cluster: &Cluster) -> (Namespace<'_>, Laptop) {
    let namespace = cluster.namespace("faults");
    namespace.probe("web");
    let laptop = Laptop::of(cluster, &User::of_namespace(cluster, "ada", &namespace));
    (namespace, laptop)
}

fn connect(laptop: &Laptop) {
    laptop
        .tp(&["connect", "--proxy", "--listen", "127.0.0.1:0"])
        .ok();
}

/// Starts a script under `tp run` and waits until it says that it is ready.
fn start(laptop: &Laptop, flags: &[&str], script: &str) -> Child {
    laptop.write_file("home/script.py", &format!("{HEAD}{script}"));
    let mut started = laptop.spawn_tp(&[&["run"], flags, &["--", "python3", "script.py"]].concat());
    let mut ready = || laptop.path("home/ready").exists() || ended(&mut started);
    eventually("the script is ready", LIMIT, || ready().then_some(()));
    started
}

fn ended(child: &mut Child) -> bool {
    child.try_wait().expect("it is our child").is_some()
}

/// What it wrote until its end, which must be in order.
#[track_caller]
fn finish(mut child: Child) -> (String, String) {
    eventually("the script ends", LIMIT, || ended(&mut child).then_some(()));
    let output = child.wait_with_output().expect("it is our child");
    let [out, err] =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{out}{err}");
    (out, err)
}

/// Waits to read, and after the end tries what programs try. A connection that has nothing to do with the cluster lives on.
const AFTER_THE_END: &str = r#"
listener = socket.create_server(("127.0.0.1", 0))
own = tcp(*listener.getsockname())
other, _ = listener.accept()
reached("ready")
outcome(20, lambda: flow.recv(1))
wait("the routes to go", lambda: len(open("/proc/net/route").readlines()) == 1)
outcome(1, lambda: socket.getaddrinfo("web", 80))
outcome(1, lambda: tcp(address, 80))
other.sendall(b"y")
say(own.recv(1).decode())
"#;

#[test]
fn after_the_connections_end_everything_fails_at_once() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster);
    let quit = || drop(laptop.tp(&["quit", "--all"]).ok());
    let kill = || {
        drop(tool(
            Command::new("kill").args(["-KILL", &laptop.daemon().to_string()]),
        ))
    };
    let ways: [(&str, &dyn Fn()); 2] = [("quit", &quit), ("killed", &kill)];
    for (way, end) in ways {
        connect(&laptop);
        let _ = std::fs::remove_file(laptop.path("home/ready"));
        let program = start(&laptop, &["--device", "veth"], AFTER_THE_END);
        end();
        let (out, err) = finish(program);
        assert_eq!(
            out, "ended in time\nno name in time\nENETUNREACH in time\ny\n",
            "{way}: {err}"
        );
        assert!(err.contains("no network any more"), "{way}: {err}");
        let _ = laptop.tp(&["quit", "--all"]);
    }
}

/// While there is no carrier: old flows are reset, names and connections fail within 5 s; afterwards all is as before.
const THROUGH_A_CUT: &str = r#"
reached("ready")
outcome(20, lambda: flow.recv(1))
def ask():
    asked = subprocess.run(["dig", "+tries=1", "+time=8", sys.argv[1]], capture_output=True, text=True).stdout
    say("SERVFAIL" if "status: SERVFAIL" in asked else asked)
outcome(5, ask)
outcome(6, lambda: tcp(address, 80))
reached("tried")
wait("the link", lambda: os.path.exists("healed"))
def again():
    try:
        return tcp("web", 7)
    except OSError:
        return None
flows = []
wait("the cluster", lambda: flows.append(again()) or flows[-1])
flows[-1].sendall(b"z")
say(flows[-1].recv(1).decode())
"#;

#[test]
fn while_the_link_is_cut_programs_hear_no_and_afterwards_yes() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (namespace, laptop) = with_probe(&cluster);
    let mut link = Link::before_api_server(&laptop, 1);
    connect(&laptop);
    let name = format!("web.{}.svc.cluster.local", namespace.name);
    let script = THROUGH_A_CUT.replace("sys.argv[1]", &format!("{name:?}"));
    let mut program = start(&laptop, &[], &script);

    link.order("cut rst");
    eventually("all was tried", LIMIT, || {
        (laptop.path("home/tried").exists() || ended(&mut program)).then_some(())
    });
    link.order("heal");
    laptop.write_file("home/healed", "");

    let (out, err) = finish(program);
    assert_eq!(
        out, "ended in time\nSERVFAIL\nworked in time\nENETUNREACH in time\nz\n",
        "{err}"
    );
}

/// Twenty connects to a port that drops SYNs.
const HANGING_DIALS: &str = r#"
sockets = [socket.socket() for _ in range(20)]
for s in sockets:
    s.setblocking(False)
    assert s.connect_ex((address, 15)) == errno.EINPROGRESS
reached("ready")
wait("the end of the measurement", lambda: os.path.exists("measured"))
say(sum(s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0 for s in sockets))
flow.sendall(b"y")
say(flow.recv(1).decode())
"#;

#[test]
fn dials_that_hang_take_no_processor_time_and_other_flows_go_on() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster);
    connect(&laptop);
    let program = start(&laptop, &[], HANGING_DIALS);
    let (daemon, command) = (laptop.daemon(), program.id());
    let spent = || processor_time(daemon) + processor_time(command);

    let before = spent();
    // The measurement itself: as long as a dial may take.
    std::thread::sleep(Duration::from_secs(5));
    let during = spent() - before;
    laptop.write_file("home/measured", "");

    let (out, err) = finish(program);
    assert_eq!(out, "20\ny\n", "{err}");
    // Two of a hundred ticks a second: renewals and heartbeats of the connection, and the end of the dials.
    assert!(during <= Duration::from_millis(100), "{during:?} in 5 s");
}

/// User and system time of a process, in steps of 10 ms (`/proc/PID/stat`, fields 14 and 15).
fn processor_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"))
        .unwrap_or_else(|error| panic!("process {pid}: {error}"));
    let (_, fields) = stat.rsplit_once(')').expect("the name is in brackets");
    let ticks = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().expect("a number of ticks"));
    Duration::from_millis(ticks.sum::<u64>() * 10)
}

#[test]
fn starting_takes_a_moment() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster);
    connect(&laptop);
    let mut took: Vec<Duration> = (0..9)
        .map(|_| laptop.tp(&["run", "--", "true"]).ok().took)
        .collect();
    took.sort();

    eprintln!(
        "tp run -- true: {:?} to {:?}, half of them below {:?}",
        took[0], took[8], took[4]
    );
    // The goal is 60 ms on an idle machine; this one may be busy with other tests.
    assert!(took[4] < Duration::from_millis(500), "{took:?}");
}

/// Opens more connections than `tp` has descriptors for, in several processes, which have no more either; `SERVER` echoes,
/// outside of the cluster.
const TOO_MANY: &str = r#"
def echoes(s, text):
    s.sendall(text)
    return s.recv(len(text), socket.MSG_WAITALL) == text

def hundred(orders, answers):
    alive, failed = [], set()
    for number in range(100):
        begun = time.time()
        try:
            s = tcp(*SERVER)
            assert echoes(s, b"%03d" % number)
            alive.append(s)
        except OSError as error:
            failed.add(errno.errorcode[error.errno])
            assert time.time() - begun < 1, error
    os.write(answers, " ".join([str(len(alive)), *failed]).encode())
    os.read(orders, 1)
    assert all(echoes(s, b"still there") for s in alive)
    os.write(answers, b"same")
    os.read(orders, 1)

class Process:
    def __init__(self):
        orders, self.orders = os.pipe()
        self.answers, answers = os.pipe()
        self.id = os.fork()
        if self.id == 0:
            try:
                hundred(orders, answers)
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os.close(answers)

    def hear(self):
        return os.read(self.answers, 100).decode()

    def order(self):
        os.write(self.orders, b"x")

alive, failed, processes = 0, set(), []
for _ in range(4):
    processes.append(Process())
    count, *errors = processes[-1].hear().split()
    alive += int(count)
    failed.update(errors)
assert 50 < alive < 256, alive
say(*failed)
for process in processes:
    process.order()
    assert process.hear() == "same"
assert echoes(flow, b"still there")
say("old ones go on")
for process in processes:
    process.order()
    assert os.waitpid(process.id, 0)[1] == 0
def again():
    try:
        return echoes(tcp(*SERVER), b"new")
    except OSError:
        return False
wait("a free descriptor", again)
say("new ones work again")
"#;

const ECHO_SERVER: &str = r#"
import asyncio
async def echo(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()
async def main():
    server = await asyncio.start_server(echo, "10.99.0.2", 0)
    open("port.new", "w").write(str(server.sockets[0].getsockname()[1]))
    import os
    os.rename("port.new", "port")
    await server.serve_forever()
asyncio.run(main())
"#;

#[test]
fn without_a_free_descriptor_new_connections_are_refused_and_old_ones_go_on() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let (_namespace, laptop) = with_probe(&cluster);
    let mut server = laptop
        .command(
            "prlimit",
            &["--nofile=1024:1024", "python3", "-c", ECHO_SERVER],
        )
        .spawn()
        .expect("python3 starts");
    let port = eventually("the server's port", LIMIT, || {
        std::fs::read_to_string(laptop.path("home/port")).ok()
    });
    let script = TOO_MANY.replace("SERVER", &format!("(\"10.99.0.2\", {})", port.0));
    laptop.write_file("home/many.py", &format!("{HEAD}{script}"));

    let tp = binary("tp");
    let few = ["--nofile=256:256", &tp, "run", "--", "python3", "many.py"];
    let run = laptop.run("prlimit", &few);
    server.kill().expect("it is our child");
    server.wait().expect("it is our child");

    let out = run.ok().out();
    assert_eq!(out, "EHOSTUNREACH\nold ones go on\nnew ones work again\n");
}
