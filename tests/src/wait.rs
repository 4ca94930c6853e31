//! Waiting for what happens elsewhere, with a limit and without a fixed sleep.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::process::tool;

/// Asks `probe` every 50 ms until it gives `Some`, and says how long that took. Panics with `what` after `limit`.
pub fn eventually<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Option<T>,
) -> (T, Duration) {
    let start = Instant::now();
    loop {
        if let Some(value) = probe() {
            return (value, start.elapsed());
        }
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The time in `seconds` from now, as Kubernetes writes it. By `date`: the tests need no calendar of their own.
pub fn time_in(seconds: u32) -> String {
    let date = format!("+{seconds} seconds");
    tool(Command::new("date").args(["-u", "-d", &date, "+%Y-%m-%dT%H:%M:%SZ"]))
        .trim()
        .to_owned()
}
