//! A link of bad quality between one laptop and the API server; see `tests/impair`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use crate::laptop::{Laptop, binary};

/// A running `impair` in the laptop's network. Dropping it ends it.
#[derive(Debug)]
pub struct Link {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    /// Where it listens, on the laptop's loopback.
    pub address: String,
}

impl Link {
    /// Puts a link before the API server and makes the laptop's kubeconfig use it. `seed` repeats its jitter.
    pub fn before_api_server(laptop: &Laptop, seed: u64) -> Self {
        let mut command = laptop.command(
            &binary("impair"),
            &["127.0.0.1:0", "node-1:6443", &seed.to_string()],
        );
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("impair starts");
        let stdin = child.stdin.take().expect("stdin is a pipe");
        let stdout = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let mut link = Self {
            child,
            stdin,
            stdout,
            address: String::new(),
        };
        let said = link.line();
        link.address = said
            .strip_prefix("listening ")
            .unwrap_or_else(|| panic!("impair said {said:?}"))
            .to_owned();

        let kubeconfig =
            std::fs::read_to_string(laptop.kubeconfig()).expect("the laptop has a kubeconfig");
        let through = format!(
            r#"server: "https://{}", tls-server-name: node-1"#,
            link.address
        );
        let changed = kubeconfig.replace(r#"server: "https://node-1:6443""#, &through);
        assert_ne!(changed, kubeconfig, "the kubeconfig names node-1");
        laptop.write_file("home/.kube/config", &changed);
        link
    }

    /// Gives a command, such as `delay 20` or `cut silent`; panics when it is not understood.
    #[track_caller]
    pub fn order(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").expect("impair runs");
        assert_eq!(self.line(), "ok", "{command}");
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("impair runs");
        line.trim().to_owned()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
