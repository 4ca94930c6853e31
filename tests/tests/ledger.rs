//! The ledgers find what they are there for: a relay that does one of everything wrong stands between real processes.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tp_tests::eventually;
use tp_tests::laptop::binary;
use tp_tests::ledger::{
    Class, Expectation, INSTANCE_HEADER, Label, REQUEST_HEADER, join, read_all,
};

const HEADER: &str = "x-mine: yes";

#[test]
fn one_fault_of_each_class_is_found_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let app = Process::serve(path, "app");
    let laptop = Process::serve(path, "laptop");
    let relay = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = relay.local_addr().unwrap().to_string();
    let (to_app, to_laptop) = (app.line.clone(), laptop.line.clone());
    std::thread::spawn(move || {
        for client in relay.incoming() {
            let (app, laptop) = (to_app.clone(), to_laptop.clone());
            // Where the client hung up, the thread is done.
            std::thread::spawn(move || relay_requests(client.unwrap(), &app, &laptop));
        }
    });

    let load = Process::start(&["load", path, &address, "11", "0", "4", "200", "h1", HEADER]);
    let deadline = Duration::from_secs(3);
    eventually(
        "the last fault is over its deadline",
        Duration::from_secs(60),
        || {
            let records = read_all(folder.path()).unwrap();
            let last = records.iter().map(|record| record.at).max()?;
            let hangs = records
                .iter()
                .find(|record| (record.id.flow, record.id.seq) == (0, LAST))?;
            (last - hangs.at > 2 * deadline.as_millis() as u64).then_some(())
        },
    );

    drop(load);

    let records = read_all(folder.path()).unwrap();
    let expected = Expectation {
        mine: "laptop".into(),
        others: "app".into(),
        deadline,
        excused: Vec::new(),
    };
    let mut found: BTreeMap<Class, Vec<_>> = BTreeMap::new();
    for finding in join(records, &expected).findings {
        // What was on its way when its client was killed has no end.
        if finding.class != Class::Hung || finding.id.flow == 0 {
            found
                .entry(finding.class)
                .or_default()
                .push((finding.id.flow, finding.id.seq));
        }
    }
    let planted: BTreeMap<Class, Vec<_>> = FAULTS
        .iter()
        .map(|(seq, class)| (*class, vec![(0, *seq)]))
        .collect();
    assert_eq!(found, planted);
}

/// Requests of flow 0 that something happens to.
const FAULTS: [(u32, Class); 6] = [
    (10, Class::CleanError),
    (12, Class::SilentLoss),
    (14, Class::Duplicate),
    (16, Class::Misrouted),
    (18, Class::Corrupt),
    (LAST, Class::Hung),
];
/// The one that hangs keeps its flow for 30 s, so it comes last.
const LAST: u32 = 20;

/// HTTP/1.1 with lengths, which is all that `ledger` speaks here; one request after the other.
fn relay_requests(client: TcpStream, app: &str, laptop: &str) -> Option<()> {
    let mut from_client = BufReader::new(client.try_clone().ok()?);
    let mut to_client = client;
    loop {
        let request = message(&mut from_client)?;
        let head = String::from_utf8_lossy(&request).to_lowercase();
        let label: Label = value(&head, REQUEST_HEADER)?.parse().ok()?;
        let fault = FAULTS
            .iter()
            .find(|(seq, _)| label.id.flow == 0 && label.id.seq == *seq);
        let (right, wrong) = match value(&head, "x-mine") {
            Some(_) => (laptop, app),
            None => (app, laptop),
        };
        let mut reply = match fault.map(|(_, class)| *class) {
            Some(Class::CleanError) => {
                b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n".to_vec()
            }
            Some(Class::Hung) => {
                // Until the client has had enough and hangs up.
                message(&mut from_client);
                return None;
            }
            Some(Class::Misrouted) => exchange(wrong, &request)?,
            Some(Class::SilentLoss) => signed_by_nobody_who_had_it(label, right == app),
            Some(Class::Duplicate) => {
                exchange(right, &request)?;
                exchange(right, &request)?
            }
            Some(Class::Ok | Class::Corrupt) | None => exchange(right, &request)?,
        };
        if fault.is_some_and(|(_, class)| *class == Class::Corrupt) {
            *reply.last_mut()? ^= 1;
        }
        to_client.write_all(&reply).ok()?;
    }
}

fn signed_by_nobody_who_had_it(label: Label, app: bool) -> Vec<u8> {
    let body = label.plan.exchange(label.id).reply;
    let instance = if app { "app" } else { "laptop" };
    let head = format!(
        "HTTP/1.1 200 OK\r\n{INSTANCE_HEADER}: {instance}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.into_bytes(), body].concat()
}

fn exchange(server: &str, request: &[u8]) -> Option<Vec<u8>> {
    let mut server = TcpStream::connect(server).ok()?;
    server.write_all(request).ok()?;
    message(&mut BufReader::new(server))
}

/// One message with its body.
fn message(from: &mut BufReader<TcpStream>) -> Option<Vec<u8>> {
    let mut message = Vec::new();
    while !message.ends_with(b"\r\n\r\n") {
        (from.read_until(b'\n', &mut message).ok()? > 0).then_some(())?;
    }
    let head = String::from_utf8_lossy(&message).to_lowercase();
    let mut body =
        vec![0; value(&head, "content-length").map_or(Some(0), |text| text.parse().ok())?];
    from.read_exact(&mut body).ok()?;
    message.extend(body);
    Some(message)
}

fn value<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
}

/// A `ledger` of this test; killed when dropped.
struct Process {
    child: Child,
    /// The first line it said.
    line: String,
}

impl Process {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(binary("ledger"));
        let command = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        Self {
            child: command.spawn().expect("it starts"),
            line: String::new(),
        }
    }

    fn serve(folder: &str, instance: &str) -> Self {
        let mut process = Self::start(&["serve", folder, "127.0.0.1:0", instance]);
        let stdout = process.child.stdout.take().expect("a pipe");
        BufReader::new(stdout)
            .read_line(&mut process.line)
            .expect("a pipe");
        process.line.truncate(process.line.trim_end().len());
        process
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
