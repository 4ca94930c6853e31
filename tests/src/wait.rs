//! Waiting for what happens elsewhere, with a limit and without a fixed sleep.

use std::time::{Duration, Instant};

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
