//! OpenSSH as a peer: a server with keys and settings of its own, and clients of it.

use std::net::SocketAddr;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use crate::process::{Running, free_address, wait_for};

/// A server that lets one key in. It ends with this value.
pub struct Server {
    directory: tempfile::TempDir,
    address: SocketAddr,
    /// The listening process; each connection has one of its own.
    pub process: Running,
}

/// A local forwarding.
pub struct Forward {
    /// Where it listens.
    pub address: SocketAddr,
    /// The client that listens.
    pub client: Running,
}

impl Server {
    /// Starts it, or says aloud that OpenSSH's server is not installed and gives `None`.
    ///
    /// # Errors
    /// It is installed and does not start.
    pub fn start(address: SocketAddr) -> anyhow::Result<Option<Self>> {
        const SERVER: &str = "/usr/sbin/sshd";
        if !std::path::Path::new(SERVER).exists() {
            eprintln!("\nSKIPPED: {SERVER} is missing (Debian: apt-get install openssh-server)");
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
        let config = format!(
            "ListenAddress {address}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\nUsePAM no\n\
             PasswordAuthentication no\nPermitRootLogin prohibit-password\nLogLevel ERROR\n",
            at("host"),
            at("authorized"),
        );
        std::fs::write(at("config"), config)?;
        let sshd = Command::new(SERVER)
            .args(["-D", "-e", "-f", &at("config")])
            .spawn()
            .context("cannot start sshd")?;
        let process = Running(sshd);
        wait_for(address)?;
        Ok(Some(Self {
            directory,
            address,
            process,
        }))
    }

    /// A client's command line, up to and without the destination.
    pub fn client(&self) -> Vec<String> {
        let key = self.directory.path().join("user").display().to_string();
        let port = self.address.port().to_string();
        let mut command: Vec<String> = ["ssh", "-F", "none", "-i", &key, "-p", &port]
            .map(str::to_owned)
            .to_vec();
        for option in [
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
        ] {
            command.extend(["-o".to_owned(), option.to_owned()]);
        }
        command
    }

    /// `ssh -L` to `to`.
    ///
    /// # Errors
    /// It does not start.
    pub fn forward(&self, to: SocketAddr) -> anyhow::Result<Forward> {
        let address = free_address()?;
        let [program, arguments @ ..] = &self.client()[..] else {
            bail!("a command line has a program");
        };
        let client = Command::new(program)
            .args(arguments)
            .args(["-N", "-o", "ExitOnForwardFailure=yes"])
            .args(["-L", &format!("{address}:{to}")])
            .arg(format!("root@{}", self.address.ip()))
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start ssh")?;
        let client = Running(client);
        wait_for(address)?;
        Ok(Forward { address, client })
    }
}
