//! Keeps the kernel from backing small heaps with 2 MiB pages.
//!
//! With them an idle connection holds 16 MiB of memory, of which it uses 2. The kernel hands the refusal on to programs
//! that a process starts (prctl(2), `PR_SET_THP_DISABLE`), which is why it is lifted for the user's own.

/// From now on, for this process.
pub(crate) fn refuse() {
    set(true);
}

/// Lifts the refusal for what `start` starts.
pub(crate) fn allowed<T>(start: impl FnOnce() -> T) -> T {
    let refused = are_refused();
    if refused {
        set(false);
    }
    let started = start();
    if refused {
        set(true);
    }
    started
}

#[cfg(target_os = "linux")]
fn set(refused: bool) {
    if let Err(error) = rustix::thread::disable_transparent_huge_pages(refused) {
        tracing::debug!(%error, "the kernel may use huge pages");
    }
}

#[cfg(target_os = "linux")]
fn are_refused() -> bool {
    rustix::thread::transparent_huge_pages_are_disabled().unwrap_or(false)
}

#[cfg(not(target_os = "linux"))]
fn set(_refused: bool) {}

#[cfg(not(target_os = "linux"))]
fn are_refused() -> bool {
    false
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::process::{Command, Output};

    use super::*;

    fn read_own_state() -> std::io::Result<Output> {
        Command::new("grep")
            .args(["THP_enabled", "/proc/self/status"])
            .output()
    }

    /// One test, since the state is the whole process's.
    #[test]
    fn a_program_of_the_user_does_not_inherit_the_refusal() {
        refuse();
        let inherited = read_own_state().unwrap();
        let lifted = allowed(read_own_state).unwrap();

        assert!(String::from_utf8_lossy(&inherited.stdout).ends_with("0\n"));
        assert!(String::from_utf8_lossy(&lifted.stdout).ends_with("1\n"));
        assert!(are_refused());
    }
}
