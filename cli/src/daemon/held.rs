//! How a command asks a connection's daemon for an intercept, on a socket that it keeps.
//!
//! The daemon says once what came of it. A command that goes away before takes its wish back, and a held intercept ends
//! with the socket, however the command ends; the daemon then closes the socket when the intercept is removed.

use std::io;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use super::control::read_line;
use super::status::InterceptStatus;
use crate::report::Failure;

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "intercept", content = "value", rename_all = "snake_case")]
pub(super) enum Answer {
    Ready(Vec<InterceptStatus>),
    Failed(Failure),
}

/// The other side says nothing more, so whatever can be read is its end.
pub(super) async fn hung_up(stream: &mut BufReader<UnixStream>) {
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
    /// As [`super::intercepts::Intercepts::make`], or the daemon has gone.
    pub async fn wait(
        mut stream: BufReader<UnixStream>,
    ) -> io::Result<Result<(Self, Vec<InterceptStatus>), Failure>> {
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
