//! Where a connection leaves its socket, lock and log, and who holds a name.
//!
//! One of three folders, the first that can be used: so a read-only home or a full disk costs nothing but a warning.
//! A name is held by a file lock, which the kernel drops with its process: what `kill -9` leaves behind is free for
//! the next one. Knows nothing of what is said on the socket.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::report::Failure;

/// A folder that belongs to this user and that nobody else can look into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder(PathBuf);

/// A name that this process holds for as long as this value lives.
#[derive(Debug)]
pub struct Claim {
    /// The connection's name.
    pub name: String,
    /// Where its socket, lock and log are.
    pub folder: Folder,
    /// Why a better folder could not be used, to be said once.
    pub passed_over: Vec<String>,
    _lock: File,
}

/// Why a name could not be had.
#[derive(Debug)]
pub enum NotClaimed {
    /// Another process holds it; its socket is, or soon will be, here.
    Held(PathBuf),
    /// No folder can be used.
    Failed(Failure),
}

impl Folder {
    /// The folder at `path`, when it is there and safe.
    ///
    /// # Errors
    /// Not there, not a folder, another owner, or open to others.
    pub fn open(path: &Path) -> io::Result<Self> {
        let found = fs::symlink_metadata(path)?;
        let refused = |why| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        if !found.is_dir() {
            return refused("it is not a folder");
        }
        if found.uid() != rustix::process::getuid().as_raw() {
            return refused("it belongs to another user");
        }
        if found.mode() & 0o077 != 0 {
            return refused("others have access to it (expected mode 0700)");
        }
        Ok(Self(path.to_owned()))
    }

    /// As [`Folder::open`], and makes it first where it is missing.
    fn open_or_create(path: &Path) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Self::open(path),
        }
    }

    /// The control socket of the connection `name`.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.sock"))
    }

    /// The log of the connection `name`.
    pub fn log(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.log"))
    }

    /// Why the connection `name` ended by itself, until it is connected again or quit.
    pub fn obituary(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.ended"))
    }

    /// What it said there, if it can be read.
    pub fn last_word(&self, name: &str) -> Option<Failure> {
        let text = fs::read(self.obituary(name)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    fn lock(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.lock"))
    }

    /// Names that have a socket here, alive or not, sorted.
    pub fn names(&self) -> Vec<String> {
        self.names_with(".sock")
    }

    /// Names that have an obituary here, sorted.
    pub fn ended(&self) -> Vec<String> {
        self.names_with(".ended")
    }

    fn names_with(&self, ending: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.0) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(ending)?.to_owned()))
            .filter(|name| valid_name(name))
            .collect();
        names.sort();
        names
    }

    /// Whether a living process holds `name`. Leaves no trace.
    pub fn is_held(&self, name: &str) -> bool {
        File::open(self.lock(name))
            .is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
    }

    /// Forgets connections of programs that have ended, but for the logs of the newest `kept`.
    fn forget_programs(&self, kept: usize) {
        let ended = |name: &String| program_of(name).is_some_and(|pid| !is_alive(pid));
        let written = |name: &String| {
            fs::metadata(self.log(name))
                .and_then(|log| log.modified())
                .ok()
        };
        let mut names = self.names_with(".lock");
        names.retain(ended);
        names.sort_by_key(|name| std::cmp::Reverse(written(name)));
        for name in names.iter().skip(kept) {
            self.forget(name);
        }
    }

    /// Removes every trace of a name that nobody holds, or that nobody will use again.
    fn forget(&self, name: &str) {
        let log = self.log(name);
        for path in [log.with_extension("log.1"), log, self.lock(name)] {
            // It need not be there.
            let _ = fs::remove_file(path);
        }
    }

    /// Takes `name`, and removes what a killed holder left behind. `None` when a living process holds it.
    fn claim(&self, name: &str) -> io::Result<Option<File>> {
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.lock(name))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            locked => locked?,
        }
        let _ = fs::remove_file(self.obituary(name));
        match fs::remove_file(self.socket(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(Some(lock)),
        }
    }
}

impl Claim {
    /// Takes `name` in the first folder that can be used.
    ///
    /// # Errors
    /// [`NotClaimed`].
    pub fn try_new(name: &str) -> Result<Self, NotClaimed> {
        Self::try_new_in(&candidates(), name)
    }

    fn try_new_in(candidates: &[PathBuf], name: &str) -> Result<Self, NotClaimed> {
        if let Some(holder) = existing(candidates).find(|folder| folder.is_held(name)) {
            return Err(NotClaimed::Held(holder.socket(name)));
        }
        let mut passed_over = Vec::new();
        for path in candidates {
            let claimed = short_enough(path, name)
                .and_then(|()| Folder::open_or_create(path))
                .and_then(|folder| Ok((folder.claim(name)?, folder)));
            match claimed {
                Ok((Some(lock), folder)) => {
                    return Ok(Self {
                        name: name.to_owned(),
                        folder,
                        passed_over,
                        _lock: lock,
                    });
                }
                Ok((None, folder)) => return Err(NotClaimed::Held(folder.socket(name))),
                Err(error) => {
                    passed_over.push(format!("{} cannot be used: {error}", path.display()));
                }
            }
        }
        let failure = Failure::new("there is no folder for the connection's control socket");
        let failure = passed_over.into_iter().fold(failure, Failure::because);
        Err(NotClaimed::Failed(failure.hint(
            "set XDG_RUNTIME_DIR to a folder that you can write to",
        )))
    }

    /// Its control socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.socket(&self.name)
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.folder.log(&self.name)
    }

    /// Leaves word of why the connection ended by itself. Best effort: the log has it too.
    pub fn leave_word(&self, failure: &Failure) {
        let text = serde_json::to_string(failure).expect("plain data has a JSON form");
        let _ = fs::write(self.folder.obituary(&self.name), text);
    }

    /// Removes the socket. The log stays, for whoever asks why it ended, and so does the empty lock file: a lock on
    /// a file that was removed and made again would be two locks.
    pub fn release(self) {
        let _ = fs::remove_file(self.socket());
    }

    /// Ends the name of [`program_name`], which nobody will use again: the log stays only where the program did not end
    /// `well`, and of those that stay only the newest few.
    pub fn release_program(self, well: bool) {
        let _ = fs::remove_file(self.socket());
        if well {
            self.folder.forget(&self.name);
        }
        // This one's process is alive.
        self.folder.forget_programs(PROGRAM_LOGS - 1);
    }
}

/// The folders that exist and are safe, best first.
pub fn folders() -> Vec<Folder> {
    existing(&candidates()).collect()
}

fn existing(candidates: &[PathBuf]) -> impl Iterator<Item = Folder> {
    candidates.iter().filter_map(|path| Folder::open(path).ok())
}

fn candidates() -> Vec<PathBuf> {
    let folder = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let state =
        folder("XDG_STATE_HOME").or_else(|| folder("HOME").map(|home| home.join(".local/state")));
    candidates_from(
        folder("XDG_RUNTIME_DIR"),
        state,
        rustix::process::getuid().as_raw(),
    )
}

fn candidates_from(runtime: Option<PathBuf>, state: Option<PathBuf>, uid: u32) -> Vec<PathBuf> {
    let own = [runtime, state]
        .into_iter()
        .flatten()
        .map(|path| path.join("tp"));
    own.chain([PathBuf::from(format!("/tmp/tp-{uid}"))])
        .collect()
}

/// `sockaddr_un` holds 108 bytes, the closing NUL included.
fn short_enough(folder: &Path, name: &str) -> io::Result<()> {
    let length = Folder(folder.to_owned()).socket(name).as_os_str().len();
    if length < 108 {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "its path is too long for a socket",
    ))
}

/// Logs of programs that did not end well.
const PROGRAM_LOGS: usize = 5;

/// The name of a connection that this process makes for one program.
pub fn program_name() -> String {
    format!("run-{}", std::process::id())
}

/// The process that such a name stands for.
fn program_of(name: &str) -> Option<rustix::process::Pid> {
    rustix::process::Pid::from_raw(name.strip_prefix("run-")?.parse().ok()?)
}

/// Also if it is another user's by now.
fn is_alive(process: rustix::process::Pid) -> bool {
    rustix::process::test_kill_process(process) != Err(rustix::io::Errno::SRCH)
}

/// Longest name of a connection, so that its socket's path stays short.
const LONGEST_NAME: usize = 48;

/// Whether `name` can name a connection: letters, digits, `-`, `_` and `.`, and it cannot leave its folder.
pub fn valid_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty()
        && name.len() <= LONGEST_NAME
        && !name.starts_with(['.', '-'])
        && name.chars().all(plain)
}

/// A valid name that resembles `text` (a context's, say), or `default` where nothing of it can be kept.
pub fn name_from(text: &str) -> String {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || matches!(c, '_' | '.') {
            c
        } else {
            '-'
        }
    };
    let name: String = text.chars().map(plain).collect();
    // Clouds put what tells contexts apart at the end: `arn:aws:eks:eu-west-1:123:cluster/shop`.
    let kept = &name[name.len().saturating_sub(LONGEST_NAME)..];
    match kept.trim_matches(['.', '-']) {
        "" => "default".to_owned(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("tp-folder-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        DirBuilder::new().mode(0o700).create(&path).unwrap();
        path
    }

    #[test]
    fn the_first_folder_that_can_be_used_is_taken_and_the_others_are_named() {
        let scratch = scratch("first");
        let blocked = scratch.join("file");
        fs::write(&blocked, "").unwrap();
        let good = scratch.join("good/tp");

        let claim = Claim::try_new_in(&[blocked.join("tp"), good.clone()], "a").unwrap();

        assert_eq!(claim.folder, Folder(good.clone()));
        assert_eq!(claim.passed_over.len(), 1);
        assert_eq!(fs::metadata(&good).unwrap().mode() & 0o777, 0o700);
        fs::remove_dir_all(scratch).unwrap();
    }

    #[test]
    fn the_last_word_keeps_its_hint_until_the_name_is_taken_again() {
        let scratch = scratch("word");
        let candidates = [scratch.join("tp")];
        let claim = Claim::try_new_in(&candidates, "a").unwrap();
        let folder = Folder(candidates[0].clone());
        let failure = Failure::new("the Session was deleted").hint("connect again");

        claim.leave_word(&failure);
        claim.release();

        assert_eq!(folder.last_word("a"), Some(failure));
        Claim::try_new_in(&candidates, "a").unwrap().release();
        assert_eq!(folder.last_word("a"), None);
        fs::remove_dir_all(scratch).unwrap();
    }

    #[test]
    fn a_held_name_is_refused_and_a_stale_socket_is_not() {
        let scratch = scratch("held");
        let candidates = [scratch.join("tp")];
        let first = Claim::try_new_in(&candidates, "a").unwrap();
        fs::write(first.socket(), "").unwrap();

        let held = Claim::try_new_in(&candidates, "a");
        assert!(matches!(held, Err(NotClaimed::Held(socket)) if socket == first.socket()));
        assert!(Claim::try_new_in(&candidates, "b").is_ok());

        let socket = first.socket();
        drop(first);
        assert!(socket.exists(), "dropping stands for kill -9 here");
        let second = Claim::try_new_in(&candidates, "a").unwrap();
        assert!(!socket.exists());
        second.release();
        fs::remove_dir_all(scratch).unwrap();
    }

    #[test]
    fn what_programs_leave_does_not_grow_and_what_connections_leave_stays() {
        let scratch = scratch("programs");
        let candidates = [scratch.join("tp")];
        // No process has such a number (PID_MAX_LIMIT).
        let names = (0..12).map(|number| format!("run-{}", 5_000_000 + number));
        for name in names.chain(["run-alone".to_owned(), "lab".to_owned()]) {
            let claim = Claim::try_new_in(&candidates, &name).unwrap();
            fs::write(claim.log(), "why").unwrap();
            claim.release();
        }
        let well = Claim::try_new_in(&candidates, &program_name()).unwrap();
        fs::write(well.log(), "fine").unwrap();
        let (folder, log) = (well.folder.clone(), well.log());

        well.release_program(true);

        assert!(!log.exists());
        let logs = folder.names_with(".log");
        assert_eq!(logs.len(), PROGRAM_LOGS - 1 + 2, "{logs:?}");
        assert_eq!(folder.names_with(".lock"), logs);
        assert!(folder.log("lab").exists() && folder.log("run-alone").exists());
        let ill = Claim::try_new_in(&candidates, &program_name()).unwrap();
        fs::write(ill.log(), "why").unwrap();
        ill.release_program(false);
        assert_eq!(folder.names_with(".log").len(), PROGRAM_LOGS + 2);
        fs::remove_dir_all(scratch).unwrap();
    }

    #[test]
    fn a_name_held_in_a_worse_folder_is_found() {
        let scratch = scratch("worse");
        let (better, worse) = (scratch.join("better"), scratch.join("worse"));
        let _holder = Claim::try_new_in(std::slice::from_ref(&worse), "a").unwrap();

        let second = Claim::try_new_in(&[better, worse], "a");

        assert!(matches!(second, Err(NotClaimed::Held(_))));
        fs::remove_dir_all(scratch).unwrap();
    }

    #[test]
    fn a_folder_that_others_can_enter_is_refused() {
        let scratch = scratch("open");
        let open = scratch.join("tp");
        DirBuilder::new().mode(0o755).create(&open).unwrap();

        let refused = Claim::try_new_in(std::slice::from_ref(&open), "a");

        assert!(
            matches!(refused, Err(NotClaimed::Failed(failure)) if failure.why[0].contains("others have access"))
        );
        fs::remove_dir_all(scratch).unwrap();
    }

    #[test]
    fn folders_are_tried_from_the_most_fitting_to_the_last_resort() {
        let found = candidates_from(
            Some("/run/user/7".into()),
            Some("/home/a/.local/state".into()),
            7,
        );

        let expected = ["/run/user/7/tp", "/home/a/.local/state/tp", "/tmp/tp-7"];
        assert_eq!(found, expected.map(PathBuf::from));
        assert_eq!(candidates_from(None, None, 7), [PathBuf::from("/tmp/tp-7")]);
    }

    #[test]
    fn names_of_contexts_become_valid_names() {
        let long = "arn:aws:eks:eu-west-1:123456789012:cluster/with-a-rather-long-name";
        for (text, expected) in [
            ("kind-kind", "kind-kind"),
            ("ada@prod/eu", "ada-prod-eu"),
            ("../../etc", "etc"),
            ("", "default"),
            ("日本", "default"),
            (long, "456789012-cluster-with-a-rather-long-name"),
        ] {
            let name = name_from(text);
            assert!(valid_name(&name), "{name}");
            assert!(name.ends_with(expected), "{text}: {name}");
        }
        for bad in ["", ".", "..", "a/b", "-x", "a b", &"x".repeat(49)] {
            assert!(!valid_name(bad), "{bad}");
        }
    }
}
