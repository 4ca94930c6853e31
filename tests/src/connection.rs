//! A running `tp connect`, and clients that use its proxy.

use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;
use std::{io::BufRead as _, io::BufReader};

use serde_json::Value;

use crate::laptop::{Laptop, binary};
use crate::process::{LIMIT, Run};

/// One connection of one laptop. Dropping it ends it.
#[derive(Debug)]
pub struct Connection<'a> {
    /// Where its proxy listens, as `127.0.0.1:port`.
    pub proxy: String,
    laptop: &'a Laptop,
}

impl Laptop {
    /// `tp connect --proxy` on a free port, with more arguments; panics when it fails.
    #[track_caller]
    pub fn connect(&self, arguments: &[&str]) -> Connection<'_> {
        let run = self
            .tp(&[
                &["connect", "--proxy", "--listen", "127.0.0.1:0"],
                arguments,
            ]
            .concat())
            .ok();
        self.connection()
            .unwrap_or_else(|status| panic!("status names no proxy: {status}\n{}", run.report()))
    }

    /// The laptop's one connection, however it was made; the whole status where there is none.
    pub fn connection(&self) -> Result<Connection<'_>, Value> {
        let status = self.status();
        match status["connections"][0]["proxy"]["address"].as_str() {
            Some(proxy) => Ok(Connection {
                proxy: proxy.to_owned(),
                laptop: self,
            }),
            None => Err(status),
        }
    }
}

impl Connection<'_> {
    /// The laptop it runs on.
    pub fn laptop(&self) -> &Laptop {
        self.laptop
    }

    /// Runs curl through SOCKS5, with names resolved by the proxy.
    pub fn curl(&self, arguments: &[&str]) -> Run {
        self.curl_through("socks5h", arguments)
    }

    /// Runs curl through the proxy in one of its protocols: `socks5h`, `socks5` or `http`.
    pub fn curl_through(&self, scheme: &str, arguments: &[&str]) -> Run {
        let proxy = format!("{scheme}://{}", self.proxy);
        let base = [
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            "55",
            "--proxy",
            &proxy,
        ];
        self.laptop.run("curl", &[&base[..], arguments].concat())
    }

    /// The body that curl gets through SOCKS5; panics when there is none.
    #[track_caller]
    pub fn get(&self, url: &str) -> String {
        self.curl(&[url]).ok().out()
    }

    /// Runs a command of our probe client; `PROXY` in the arguments is replaced.
    pub fn probe(&self, arguments: &[&str]) -> Run {
        self.probe_with(arguments, b"", LIMIT)
    }

    /// The same with input and limit.
    pub fn probe_with(&self, arguments: &[&str], input: &[u8], limit: Duration) -> Run {
        let arguments: Vec<&str> = arguments
            .iter()
            .map(|a| if *a == "PROXY" { &self.proxy } else { *a })
            .collect();
        self.laptop
            .run_with(&binary("probe"), &arguments, input, limit)
    }

    /// Starts a probe client that runs until its stdin ends, such as held flows.
    pub fn spawn_probe(&self, arguments: &[&str]) -> Probe {
        let arguments: Vec<&str> = arguments
            .iter()
            .map(|a| if *a == "PROXY" { &self.proxy } else { *a })
            .collect();
        let mut command = self.laptop.command(&binary("probe"), &arguments);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the probe starts");
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        Probe {
            child,
            stdin,
            stdout,
        }
    }

    /// The SOCKS5 reply code of a TCP connect; 0 is success.
    #[track_caller]
    pub fn socks_reply(&self, host: &str, port: u16) -> u64 {
        let run = self.probe(&["tcp", "PROXY", host, &port.to_string()]);
        if run.succeeded() {
            return 0;
        }
        run.json()["reply"]
            .as_u64()
            .unwrap_or_else(|| panic!("no SOCKS5 reply\n{}", run.report()))
    }

    /// What the HTTP proxy answers to `CONNECT authority`: its status code and its `Proxy-Status`.
    #[track_caller]
    pub fn http_connect(&self, authority: &str) -> (u16, String) {
        let request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n");
        self.http(request.as_bytes())
    }

    /// What the HTTP proxy answers to these bytes: its status code and its `Proxy-Status`.
    #[track_caller]
    pub fn http(&self, request: &[u8]) -> (u16, String) {
        let run = self
            .laptop
            .run_with(
                &binary("probe"),
                &["raw", &self.proxy, "head"],
                request,
                LIMIT,
            )
            .ok();
        let result = run.json();
        let text = result["text"].as_str().unwrap_or_default();
        let status = text.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status =
            status.unwrap_or_else(|| panic!("no HTTP answer to {:?}: {result}", lossy(request)));
        let header = text.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("proxy-status")
                .then(|| value.trim().to_owned())
        });
        (status, header.unwrap_or_default())
    }

    /// This connection's entry in `tp status`.
    #[track_caller]
    pub fn status(&self) -> Value {
        let status = self.laptop.status();
        let ours = |entry: &&Value| entry["proxy"]["address"] == self.proxy.as_str();
        let entry = status["connections"]
            .as_array()
            .and_then(|all| all.iter().find(ours));
        entry
            .unwrap_or_else(|| panic!("{} is not in {status}", self.proxy))
            .clone()
    }
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            drop(self.laptop.tp(&["quit", "--all"]));
        }
    }
}

/// A probe client that is still running. Dropping it kills it.
#[derive(Debug)]
pub struct Probe {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Probe {
    /// Its next line of output, as JSON.
    #[track_caller]
    pub fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stdout
            .read_line(&mut line)
            .expect("the probe's stdout is a pipe");
        serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("the probe said {line:?}: {error}"))
    }

    /// Sends it bytes.
    pub fn send(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("stdin is still open");
        std::io::Write::write_all(stdin, bytes).expect("the probe reads its stdin");
    }

    /// Ends its stdin.
    pub fn end_input(&mut self) {
        self.stdin = None;
    }

    /// Waits for its end: the rest of its stdout, and its stderr.
    pub fn finish(mut self) -> (Vec<u8>, String) {
        self.end_input();
        self.wait()
    }

    /// Waits for its end without ending its stdin.
    pub fn wait(mut self) -> (Vec<u8>, String) {
        use std::io::Read as _;
        let (mut out, mut err) = (Vec::new(), String::new());
        let _ = self.stdout.read_to_end(&mut out);
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut err);
        }
        let _ = self.child.wait();
        (out, err)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
