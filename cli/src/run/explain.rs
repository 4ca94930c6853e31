//! What `tp run` found on this machine, in words: what was tried and chosen, what will not work, and the cure.
//!
//! Everything was probed by doing it. Settings are read only to name the one that stands in the way.

use std::fmt::Write as _;
use std::fs;

use super::method::Method;
use super::plan::{Made, Refused};
use crate::report::Failure;

/// What was tried.
pub struct Found {
    /// The method that would be used.
    pub chosen: Method,
    /// A namespace.
    pub made: Result<Made, Refused>,
    /// A process that answers system calls.
    pub kept: Result<(), Refused>,
}

/// What holds in every namespace, however it is made.
const IN_NAMESPACES: [&str; 3] = [
    "setuid programs (sudo, su, a setuid ping) do not gain rights in there; ping without setuid works",
    "files of other users show the owner `nobody`",
    "a ping is answered if its destination accepts or refuses TCP; round trips are those of a connection",
];

/// What holds where system calls are answered.
const BY_CALLS: [&str; 6] = [
    "TCP and names only: UDP to the cluster, ping and all else leave from this workstation and get lost",
    "names come from the cluster only where /etc/resolv.conf is heeded; musl's resolver rejects the answers, which do not \
     come from the nameserver's own address",
    "ports that the program listens on are this workstation's, and so is its localhost: no --publish, no --host-loopback",
    "setuid programs do not gain rights; 32-bit programs have no sockets; io_uring is not there",
    "a program that forbids to be looked at, as ssh-agent does, is left to this workstation's network",
    "getsockname shows a loopback address; getpeername shows the destination",
];

/// What holds for proxy variables.
const BY_VARIABLES: [&str; 2] = [
    "only programs that heed HTTP_PROXY or ALL_PROXY; others reach this workstation's network",
    "TCP only; --publish, --host-loopback and --offline are not there",
];

/// One line for each finding.
pub fn told(found: &Found, connection: &Result<String, String>) -> String {
    let mut text = String::new();
    let mut line = |name: &str, what: &str| {
        let _ = writeln!(text, "{name:<12}{what}");
    };
    match connection {
        Ok(connection) => line("connection", connection),
        Err(why) => line("connection", &format!("none to use: {why}")),
    }
    match &found.made {
        Ok(_) => line("netns", "works"),
        Err(refused) => {
            line("netns", &refusal(refused));
            line("cure", &cure(refused));
        }
    }
    match &found.kept {
        Ok(()) => line("notify", "works"),
        Err(refused) => line("notify", &refusal(refused)),
    }
    line("proxy-env", "works for programs that heed it");
    match found.chosen {
        Method::Netns | Method::Auto => {
            line("method", "netns: a network of its own for the program");
            if let Ok(made) = &found.made {
                devices(made, &mut line);
            }
            IN_NAMESPACES.iter().for_each(|limit| line("limit", limit));
        }
        Method::Notify => {
            line(
                "method",
                "notify: the program's connects and questions for names are answered",
            );
            BY_CALLS.iter().for_each(|limit| line("limit", limit));
        }
        Method::ProxyEnv => {
            line(
                "method",
                "proxy-env: only for programs that heed proxy variables",
            );
            BY_VARIABLES.iter().for_each(|limit| line("limit", limit));
        }
    }
    text
}

fn devices(made: &Made, line: &mut impl FnMut(&str, &str)) {
    for (kind, why) in &made.passed_over {
        line("device", &format!("{kind} cannot be made here: {why}"));
    }
    line("device", &format!("{} is used", made.device));
    for note in &made.notes {
        line("missing", note);
    }
}

fn refusal(refused: &Refused) -> String {
    format!("refused when {}: {}", refused.step, refused.why)
}

/// The same as an error, which says `what` cannot be.
pub fn failure(what: &str, refused: &Refused) -> Failure {
    Failure::new(what)
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
    "a sandbox around this shell forbids it, such as a container's seccomp profile; outside of it this works"
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

    fn refused(step: &str) -> Refused {
        Refused {
            step: step.into(),
            why: "Operation not permitted".into(),
            by_policy: true,
        }
    }

    #[test]
    fn what_was_tried_and_what_was_chosen_are_a_line_each() {
        let found = Found {
            chosen: Method::Netns,
            made: Ok(made()),
            kept: Err(refused("x")),
        };
        let text = told(&found, &Ok("the one named lab".into()));

        assert!(
            text.contains("tun cannot be made here: Permission denied\n"),
            "{text}"
        );
        assert!(text.contains("veth is used\n"), "{text}");
        assert!(text.contains("missing     a note\n"), "{text}");
        assert!(text.contains("notify      refused when x"), "{text}");
    }

    #[test]
    fn the_limits_are_those_of_the_method_that_was_chosen() {
        let found = |chosen| Found {
            chosen,
            made: Err(refused("making namespaces")),
            kept: Ok(()),
        };
        let text = |chosen| told(&found(chosen), &Ok(String::new()));

        assert!(text(Method::Notify).contains("method      notify"));
        assert!(text(Method::Notify).contains(BY_CALLS[0]));
        assert!(!text(Method::ProxyEnv).contains(BY_CALLS[0]));
        assert!(text(Method::ProxyEnv).contains("cure        "));
    }

    #[test]
    fn the_setting_that_forbids_it_names_the_cure() {
        assert!(cure_of("1", "", "", "/bin/tp").contains("profile tp /bin/tp"));
        assert!(cure_of("0", "0", "", "").contains("unprivileged_userns_clone=1"));
        assert!(cure_of("", "1", "0", "").contains("max_user_namespaces"));
        assert!(cure_of("", "", "9", "").contains("seccomp"));
    }
}
