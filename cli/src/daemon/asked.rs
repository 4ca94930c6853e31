//! How a command asks a connection's daemon for an intercept, on a socket that it keeps.
//!
//! The daemon says once what came of it. A command that goes away before takes its wish back, and a held intercept ends
//! with the socket, however the command ends; the daemon then closes the socket when the intercept is removed.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::control::{read_line, write_line};
use super::intercepts::{Intercepts, Wanted};
use super::status::InterceptStatus;
use crate::report::Failure;

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "intercept", content = "value", rename_all = "snake_case")]
enum Answer {
    Ready(Vec<InterceptStatus>),
    Failed(Failure),
}

/// The daemon's end, until nothing is left to do.
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

/// The other side says nothing more, so whatever can be read is its end.
async fn hung_up(stream: &mut BufReader<UnixStream>) {
    let mut rest = [0; 64];
    while let Ok(1..) = stream.read(&mut rest).await {}
}

/// The command's end. A held intercept lives as long as this.
#[derive(Debug)]
pub struct Held(BufReader<UnixStream>);

impl Held {
    /// Waits for what comes of it. Dropping the future takes the wish back.
    ///
    /// # Errors
    /// As [`Intercepts::make`], or the daemon has gone.
    pub async fn wait(
        stream: UnixStream,
    ) -> io::Result<Result<(Self, Vec<InterceptStatus>), Failure>> {
        let mut stream = BufReader::new(stream);
        Ok(match read_line(&mut stream).await? {
            Answer::Ready(statuses) => Ok((Self(stream), statuses)),
            Answer::Failed(failure) => Err(failure),
        })
    }

    /// Waits until the daemon has gone, or gave a held intercept up. Cancel safe.
    pub async fn ended(&mut self) {
        hung_up(&mut self.0).await;
    }

    /// Ends a held intercept and waits until it is removed.
    pub async fn leave(mut self) {
        if self.0.shutdown().await.is_ok() {
            hung_up(&mut self.0).await;
        }
    }
}
