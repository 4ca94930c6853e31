//! The daemon's log: JSON lines in a file that cannot fill a disk.
//!
//! Two files of at most `LARGEST` each: when the newer is full it takes the older one's place. What cannot be written
//! is dropped; a full disk must not stop traffic.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::report;

/// Size at which a log file is put aside: some 5,000 lines.
const LARGEST: u64 = 1024 * 1024;

/// What is logged unless `TP_LOG` says otherwise. Failed requests are reported by whoever made them, once.
const DEFAULT_FILTER: &str =
    "warn,tp_cli=info,tp_tunnel=info,kube_client=off,rustls_platform_verifier=off";

/// Sends this process's events to the file at `path`. When that cannot be written it is said once, and all goes on.
pub fn to_file(path: &Path) {
    let log = BoundedLog::new(path.to_owned(), LARGEST);
    let subscriber = tracing_subscriber::fmt()
        .json()
        .with_env_filter(filter())
        .with_writer(log.clone());
    let _ = subscriber.try_init();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "starting");
    if let Some(error) = log.trouble() {
        let path = path.display();
        report::note(&format!(
            "warning: the log {path} cannot be written: {error}"
        ));
    }
}

/// Sends this process's events to stderr, for people.
pub fn to_stderr() {
    let subscriber = tracing_subscriber::fmt()
        .compact()
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .with_env_filter(filter())
        .with_writer(io::stderr);
    let _ = subscriber.try_init();
}

fn filter() -> EnvFilter {
    EnvFilter::try_from_env("TP_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER))
}

#[derive(Clone)]
struct BoundedLog(Arc<Mutex<Open>>);

struct Open {
    path: PathBuf,
    largest: u64,
    file: Option<File>,
    written: u64,
    trouble: Option<io::Error>,
}

impl BoundedLog {
    fn new(path: PathBuf, largest: u64) -> Self {
        let mut open = Open {
            path,
            largest,
            file: None,
            written: 0,
            trouble: None,
        };
        open.reopen();
        Self(Arc::new(Mutex::new(open)))
    }

    /// Why the last event was not written, if it was not.
    fn trouble(&self) -> Option<String> {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.trouble.as_ref().map(ToString::to_string)
    }
}

impl Open {
    fn reopen(&mut self) {
        let opened = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&self.path);
        match opened {
            Ok(file) => self.file = Some(file),
            Err(error) => {
                self.file = None;
                self.trouble = Some(error);
            }
        }
        self.written = self
            .file
            .as_ref()
            .and_then(|file| file.metadata().ok())
            .map_or(0, |found| found.len());
    }

    fn write_event(&mut self, event: &[u8]) {
        if self.written >= self.largest {
            let _ = fs::rename(&self.path, self.path.with_extension("log.1"));
            self.reopen();
        }
        // Counted even when it fails: a full disk is tried again only once per file.
        self.written += event.len() as u64;
        if let Some(file) = &mut self.file {
            self.trouble = file.write_all(event).err();
        }
    }
}

/// The subscriber hands over one whole event per call.
impl Write for BoundedLog {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_event(event);
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for BoundedLog {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_log_never_outgrows_two_files_and_is_private() {
        let folder = std::env::temp_dir().join(format!("tp-log-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let path = folder.join("a.log");
        let mut log = BoundedLog::new(path.clone(), 100);

        for line in 0..100 {
            writeln!(log, "line {line:03}").unwrap();
        }

        let sizes: u64 = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(sizes <= 2 * 110, "{sizes}");
        assert!(fs::read_to_string(&path).unwrap().ends_with("line 099\n"));
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_log_that_cannot_be_written_stops_nobody_and_is_known() {
        for path in ["/proc/a.log", "/dev/full"] {
            let mut log = BoundedLog::new(path.into(), 100);
            assert!(log.write_all(b"x").is_ok(), "{path}");
            assert!(log.trouble().is_some(), "{path}");
        }
    }
}
