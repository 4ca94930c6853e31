//! What ends the tests' processes when the tests themselves cannot: killed, or gone before their values were dropped.
//!
//! Every process of a test runs as one of the uids that belong to its runner. One guard a runner holds the reading end of
//! a pipe whose other end only the runner has, so the kernel tells it when the runner is gone, however that came.

use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use crate::cluster::kubectl_program;

/// How many laptops one runner can have at a time.
pub(crate) const UIDS: u32 = 100;

/// The first of this runner's uids.
pub(crate) fn first_uid() -> u32 {
    20_000 + (std::process::id() % 10_000) * UIDS
}

/// Starts the guard of this process, once. A session of its own keeps it out of Ctrl-C's reach.
pub(crate) fn start() {
    static GUARD: OnceLock<Child> = OnceLock::new();
    GUARD.get_or_init(|| {
        let (first, last) = (first_uid(), first_uid() + UIDS - 1);
        let arguments = [first, last, std::process::id()].map(|number| number.to_string());
        let (kubectl, kubeconfig) = kubectl_program();
        Command::new("setsid")
            .args(["sh", "-c", SCRIPT, "tests-guard"])
            .args(arguments)
            .args([kubectl, kubeconfig])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("setsid is part of util-linux")
    });
}

/// Reads until the runner is gone, then ends processes until none is left, and removes folders and namespaces.
const SCRIPT: &str = r#"
cat > /dev/null
first=$1 last=$2 runner=$3 kubectl=$4 kubeconfig=$5
ours() {
  cat /proc/[0-9]*/status 2>/dev/null | awk -v first="$first" -v last="$last" \
    '$1 == "State:" { dead = $2 == "Z" } $1 == "Pid:" { pid = $2 } $1 == "Uid:" && !dead && $2 >= first && $2 <= last { print pid }'
}
while pids=$(ours) && [ -n "$pids" ]; do kill -9 $pids 2>/dev/null; done
rm -rf "${TMPDIR:-/tmp}/tp-laptop-$runner-"*
[ -z "$TP_TEST_KEEP" ] || exit 0
left=$("$kubectl" --kubeconfig "$kubeconfig" get namespaces -o name 2>/dev/null | grep -E -- "-$runner-[0-9]+$")
[ -z "$left" ] || "$kubectl" --kubeconfig "$kubeconfig" delete --wait=false --ignore-not-found $left
"#;
