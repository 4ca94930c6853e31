//! The daemon's end of a command that asked for an intercept; the command's is `held.rs`.

use std::sync::Arc;

use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::control::write_line;
use super::held::{Answer, hung_up};
use super::intercepts::Intercepts;
use super::wanted::Wanted;
use crate::report::Failure;

/// Makes the intercept, says what came of it, and removes a held one after the command, until nothing is left to do.
pub async fn serve(
    stream: UnixStream,
    wanted: Wanted,
    intercepts: Arc<Intercepts>,
    stop: CancellationToken,
) {
    let mut stream = BufReader::new(stream);
    let made = intercepts.make(&wanted).await;
    let ready = tokio::select! {
        biased;
        ready = async { made?; intercepts.ready(&wanted.name).await } => ready,
        () = hung_up(&mut stream) => Err(Failure::new("the command was interrupted")),
        () = stop.cancelled() => Err(Failure::new("the connection is being ended")),
    };
    let held = wanted.held && ready.is_ok();
    let answer = match ready {
        Ok(statuses) => Answer::Ready(statuses),
        Err(failure) => Answer::Failed(failure),
    };
    let failed = matches!(answer, Answer::Failed(_));
    if failed {
        leave(&intercepts, &wanted.name).await;
    }
    let told = write_line(&mut stream, &answer).await;
    if held && told.is_ok() {
        tokio::select! {
            () = hung_up(&mut stream) => {}
            () = stop.cancelled() => {}
        }
    }
    if !failed && (held || told.is_err()) {
        leave(&intercepts, &wanted.name).await;
    }
}

async fn leave(intercepts: &Intercepts, name: &str) {
    if let Err(failure) = intercepts.leave(name).await {
        tracing::warn!(error = failure.one_line(), "intercept not removed");
    }
}
