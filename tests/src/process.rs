//! Running a program to its end: its output, its exit code, its time, and a limit that makes a hang a failure.

use std::io::{Read, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// What a program did.
#[derive(Debug)]
pub struct Run {
    /// The command line, for messages.
    pub command: String,
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Everything it wrote to stdout.
    pub stdout: Vec<u8>,
    /// Everything it wrote to stderr.
    pub stderr: Vec<u8>,
    /// From start to exit.
    pub took: Duration,
}

/// How long a program may take that nobody gave a limit.
pub const LIMIT: Duration = Duration::from_secs(60);

impl Run {
    /// Runs `command` with `input` on stdin. Panics when it takes longer than `limit`, or when something it left
    /// running still holds its output: then a script that captures that output would hang.
    pub fn new(mut command: Command, input: &[u8], limit: Duration) -> Self {
        let text = format!("{command:?}");
        let start = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {text}: {error}"));
        feed(&mut child, input.to_vec());
        let stdout = drain(child.stdout.take());
        let stderr = drain(child.stderr.take());
        let status = loop {
            if let Some(status) = child.try_wait().expect("the child is ours") {
                break status;
            }
            if start.elapsed() > limit {
                let _ = child.kill();
                let _ = child.wait();
                let (out, _) = collect(&stdout, Duration::from_millis(200));
                let (err, _) = collect(&stderr, Duration::from_millis(200));
                panic!(
                    "not ended after {limit:?}: {text}\nstdout: {}\nstderr: {}",
                    lossy(&out),
                    lossy(&err)
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let took = start.elapsed();
        let (stdout, stdout_closed) = collect(&stdout, Duration::from_secs(2));
        let (stderr, stderr_closed) = collect(&stderr, Duration::from_secs(2));
        assert!(
            stdout_closed && stderr_closed,
            "{text} has ended, and something it started still holds its stdout or stderr\nstdout: {}\nstderr: {}",
            lossy(&stdout),
            lossy(&stderr)
        );
        Self {
            command: text,
            code: status.code(),
            stdout,
            stderr,
            took,
        }
    }

    /// Itself, when it ended with 0; panics with everything it said otherwise.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    /// Itself, when it ended with `code`; panics with everything it said otherwise.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert!(
            self.code == Some(code),
            "expected exit code {code}\n{}",
            self.report()
        );
        self
    }

    /// Whether it ended with 0.
    pub fn succeeded(&self) -> bool {
        self.code == Some(0)
    }

    /// Its stdout as text.
    pub fn out(&self) -> String {
        lossy(&self.stdout)
    }

    /// Its stderr as text.
    pub fn err(&self) -> String {
        lossy(&self.stderr)
    }

    /// Its stdout as JSON; panics when it is none.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("no JSON: {error}\n{}", self.report()))
    }

    /// Everything about it, for a failure message.
    pub fn report(&self) -> String {
        let Self {
            command,
            code,
            took,
            ..
        } = self;
        format!(
            "command: {command}\nexit code: {code:?} after {took:?}\nstdout: {}\nstderr: {}",
            self.out(),
            self.err()
        )
    }
}

/// Resident memory of a process, in bytes.
pub fn resident_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_else(|| panic!("no process {pid}")) * 1024
}

/// How many descriptors a process has open.
pub fn open_descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap_or_else(|error| panic!("process {pid}: {error}"))
        .count()
}

/// Runs a tool of the harness itself, as root, outside the laptop; panics when it fails.
#[track_caller]
pub fn tool(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        lossy(&output.stdout),
        lossy(&output.stderr)
    );
    lossy(&output.stdout)
}

fn feed(child: &mut Child, input: Vec<u8>) {
    let mut stdin = child.stdin.take().expect("stdin is a pipe");
    // A program need not read all its input.
    std::thread::spawn(move || drop(stdin.write_all(&input)));
}

/// Reads in a thread of its own, since the pipe may be held open by a process that outlives the program.
fn drain(pipe: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (piece_tx, piece_rx) = channel();
    let mut pipe = pipe.expect("the output is a pipe");
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(len @ 1..) = pipe.read(&mut buffer) {
            if piece_tx.send(buffer[..len].to_vec()).is_err() {
                return;
            }
        }
    });
    piece_rx
}

/// What was read, and whether the pipe was closed within `patience` after the last piece.
fn collect(pieces: &Receiver<Vec<u8>>, patience: Duration) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    loop {
        match pieces.recv_timeout(patience) {
            Ok(piece) => all.extend(piece),
            Err(error) => return (all, error == RecvTimeoutError::Disconnected),
        }
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
