//! What `tp run` found on this machine, in words: what was tried and chosen, what will not work, and the cure.
//!
//! Everything was probed by doing it. Settings are read only to name the one that stands in the way.

use std::fmt::Write as _;
use std::fs;

use super::plan::{Made, Refused};
use crate::report::Failure;

/// What holds in every namespace, however it is made.
const LIMITS: [&str; 3] = [
    "setuid programs (sudo, su, a setuid ping) do not gain rights in there; ping without setuid works",
    "files of other users show the owner `nobody`",
    "a ping is answered if its destination accepts or refuses TCP; round trips are those of a connection",
];

/// One line for each finding.
pub fn told(made: &Result<Made, Refused>, connection: &Result<String, String>) -> String {
    let mut text = String::new();
    let mut line = |name: &str, what: &str| {
        let _ = writeln!(text, "{name:<12}{what}");
    };
    match connection {
        Ok(connection) => line("connection", connection),
        Err(why) => line("connection", &format!("none to use: {why}")),
    }
    match made {
        Ok(made) => {
            line("method", "netns: a network of its own for the program");
            for (kind, why) in &made.passed_over {
                line("device", &format!("{kind} cannot be made here: {why}"));
            }
            line("device", &format!("{} is used", made.device));
            for note in &made.notes {
                line("missing", note);
            }
            for limit in LIMITS {
                line("limit", limit);
            }
        }
        Err(refused) => {
            line(
                "netns",
                &format!("refused when {}: {}", refused.step, refused.why),
            );
            line("cure", &cure(refused));
            line(
                "method",
                "proxy-env: only for programs that heed proxy variables",
            );
        }
    }
    text
}

/// The same as an error.
pub fn failure(refused: &Refused) -> Failure {
    Failure::new("the program cannot get a network of its own here")
        .because(format!("{}: {}", refused.step, refused.why))
        .hint(cure(refused))
}

fn cure(refused: &Refused) -> String {
    if !refused.by_policy {
        return "`tp run --method proxy-env` needs no namespace".to_owned();
    }
    let setting = |path: &str| fs::read_to_string(path).unwrap_or_default();
    cure_of(
        setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").trim(),
        setting("/proc/sys/kernel/unprivileged_userns_clone").trim(),
        setting("/proc/sys/user/max_user_namespaces").trim(),
        &own_path(),
    )
}

fn own_path() -> String {
    let path = std::env::current_exe().unwrap_or_else(|_| "/usr/local/bin/tp".into());
    path.display().to_string()
}

/// The first setting that forbids it names the cure.
fn cure_of(apparmor: &str, clone: &str, limit: &str, program: &str) -> String {
    if apparmor == "1" {
        return format!(
            "AppArmor wants a profile: write `abi <abi/4.0>, include <tunables/global> profile tp {program} \
             flags=(unconfined) {{ userns, }}` to /etc/apparmor.d/tp and run `sudo apparmor_parser -r /etc/apparmor.d/tp`"
        );
    }
    if clone == "0" {
        return "allow user namespaces with `sudo sysctl kernel.unprivileged_userns_clone=1`"
            .to_owned();
    }
    if limit == "0" {
        return "allow user namespaces with `sudo sysctl user.max_user_namespaces=10000`"
            .to_owned();
    }
    "a sandbox around this shell forbids it, such as a container's seccomp profile; outside of it this works, and \
     `--method proxy-env` works here"
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::device::Kind;

    fn made() -> Made {
        Made {
            device: Kind::Veth,
            passed_over: vec![(Kind::Tun, "Permission denied".into())],
            listeners: Vec::new(),
            notes: vec!["a note".into()],
        }
    }

    #[test]
    fn what_was_tried_and_what_was_chosen_are_a_line_each() {
        let text = told(&Ok(made()), &Ok("the one named lab".into()));

        assert!(
            text.contains("tun cannot be made here: Permission denied\n"),
            "{text}"
        );
        assert!(text.contains("veth is used\n"), "{text}");
        assert!(text.contains("missing     a note\n"), "{text}");
    }

    #[test]
    fn the_setting_that_forbids_it_names_the_cure() {
        assert!(cure_of("1", "", "", "/bin/tp").contains("profile tp /bin/tp"));
        assert!(cure_of("0", "0", "", "").contains("unprivileged_userns_clone=1"));
        assert!(cure_of("", "1", "0", "").contains("max_user_namespaces"));
        assert!(cure_of("", "", "9", "").contains("seccomp"));
    }
}
