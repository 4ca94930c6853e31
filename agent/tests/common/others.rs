//! The scripts of `tests/others`: servers that print their port, and clients of them.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::soon;

/// Debian's, whose packages `make packages` installs.
pub const PYTHON: &str = "/usr/bin/python3";

/// One of them, run by `program`.
pub fn script(program: &str, name: &str, arguments: &[&str]) -> Command {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/others");
    let mut command = Command::new(program);
    command
        .arg(folder.join(name))
        .args(arguments)
        .env("NO_PROXY", "*")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

/// Starts one that serves on loopback.
pub async fn serve(program: &str, name: &str, arguments: &[&str]) -> (SocketAddr, Child) {
    let mut command = script(program, name, arguments);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let port = soon(lines.next_line()).await.unwrap().unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap()));
    (address, child)
}
