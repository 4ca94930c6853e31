//! A developer's own server on the laptop, in Python.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};

use crate::Laptop;

/// A program that listens on a port of the kernel's choice. Dropping it ends it.
#[derive(Debug)]
pub struct Program {
    child: Child,
    /// Where it listens on the laptop's loopback.
    pub port: String,
}

impl Program {
    /// Runs a script of Python whose first line of output is its port.
    #[track_caller]
    pub fn start(laptop: &Laptop, script: &str, arguments: &[&str]) -> Self {
        let mut command = laptop.command("python3", &[&["-c", script], arguments].concat());
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("python3 starts");
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let mut port = String::new();
        let read = BufReader::new(stdout).read_line(&mut port);
        assert!(read.is_ok_and(|len| len > 1), "python3 said no port");
        let port = port.trim().to_owned();
        Self { child, port }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
