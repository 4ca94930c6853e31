//! Ending an agent from a command that runs in its container: an ephemeral container cannot be removed or stopped from
//! outside of it, so `tp uninstall --everything` runs this there.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use rustix::process::{Pid, Signal, kill_process};

/// Asks the agents that run the same program as this process to stop, and gives how many there were. They drain their
/// connections, remove their rule and end.
///
/// A container of a pod with `shareProcessNamespace` sees the processes of all others, and its own is not number 1: an agent is
/// known by its program.
///
/// # Errors
/// `/proc` cannot be read, or an agent may not be asked.
pub fn retire() -> io::Result<usize> {
    let own = fs::metadata("/proc/self/exe")?;
    let mut asked = 0;
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let Some(process) = number.and_then(Pid::from_raw) else {
            continue;
        };
        // Others' programs may not be looked at, and a process may have ended meanwhile.
        let Ok(program) = fs::metadata(entry.path().join("exe")) else {
            continue;
        };
        let same = (program.dev(), program.ino()) == (own.dev(), own.ino());
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if same && is_parent(&line) {
            kill_process(process, Signal::TERM)?;
            asked += 1;
        }
    }
    Ok(asked)
}

/// Whether the arguments of a process, each with a zero byte behind it, are those of an agent's parent: the worker ends with it.
fn is_parent(line: &[u8]) -> bool {
    let mut arguments = line.split(|byte| *byte == 0);
    let has = |name: &str| {
        arguments
            .clone()
            .any(|argument| argument == name.as_bytes())
    };
    let helper = has("--worker") || has("--end");
    arguments.any(|argument| argument.starts_with(b"--redirected")) && !helper
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_parents_are_asked() {
        let parent = "/tp-agent\0--manager-key\0sha256:00\0--redirected\0[::]:15006\0";

        assert!(is_parent(parent.as_bytes()));
        for other in [
            format!("{parent}--worker\0"),
            format!("{parent}--end\07\0"),
            "/tp-agent\0retire\0".to_owned(),
            String::new(),
        ] {
            assert!(!is_parent(other.as_bytes()), "{other:?}");
        }
    }
}
