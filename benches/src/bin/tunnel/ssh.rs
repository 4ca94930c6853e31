//! The peer: OpenSSH's local forwarding on loopback, with a server, keys and settings of its own.

use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use crate::ends::{Path, Running, free_address, wait_for};

/// `ssh -L` to the far peer, or `None`, said aloud, where OpenSSH's server is not installed.
pub(crate) fn forward(to: &Path) -> anyhow::Result<Option<Path>> {
    const SERVER: &str = "/usr/sbin/sshd";
    if !std::path::Path::new(SERVER).exists() {
        eprintln!("\nSKIPPED B12: {SERVER} is missing (Debian: apt-get install openssh-server)");
        return Ok(None);
    }
    // sshd insists on this directory when it is started by root.
    let _ = std::fs::create_dir_all("/run/sshd");
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name).display().to_string();
    for key in ["host", "user"] {
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f", &at(key)])
            .status()?;
        if !made.success() {
            bail!("ssh-keygen failed");
        }
    }
    std::fs::copy(at("user.pub"), at("authorized"))?;
    let (server, forward) = (free_address()?, free_address()?);
    let config = format!(
        "ListenAddress {server}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\nUsePAM no\n\
         PasswordAuthentication no\nPermitRootLogin prohibit-password\nLogLevel ERROR\n",
        at("host"),
        at("authorized"),
    );
    std::fs::write(at("config"), config)?;
    let sshd = Command::new(SERVER)
        .args(["-D", "-e", "-f", &at("config")])
        .spawn()
        .context("cannot start sshd")?;
    let sshd = Running(sshd);
    wait_for(server)?;
    let ssh = Command::new("ssh")
        .args([
            "-N",
            "-F",
            "none",
            "-i",
            &at("user"),
            "-p",
            &server.port().to_string(),
        ])
        .args([
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "LogLevel=ERROR",
        ])
        .args([
            "-o",
            "ExitOnForwardFailure=yes",
            "-L",
            &format!("{forward}:{}", to.address),
        ])
        .arg("root@127.0.0.1")
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start ssh")?;
    let ssh = Running(ssh);
    wait_for(forward)?;
    Ok(Some(Path {
        address: forward,
        processes: vec![ssh, sshd],
    }))
}
