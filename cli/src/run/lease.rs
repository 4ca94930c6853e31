//! How a connection's daemon comes to serve a program that another process runs.
//!
//! `tp run` passes descriptors over the control socket: a network device, or a keeper's channel. The daemon puts a
//! [`Worker`] on them for as long as that socket is open: however `tp run` ends, the worker ends with it. And if the daemon ends, `tp run` sees it here.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, Interest};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::bridge;
use super::device::Kind;
use super::notify::opener;
use super::passing;
use super::worker::Worker;
use crate::proxy::{Rule, Upstream, UserRules};

/// What comes with the descriptors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Wanted {
    /// How the program's connections arrive.
    pub from: From,
    /// Everything goes to the cluster.
    pub all: bool,
    /// Rules for what goes there besides.
    pub also_proxy: Vec<String>,
    /// Rules for what never goes there.
    pub never_proxy: Vec<String>,
}

/// How a program's connections arrive.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum From {
    /// As packets. The device's descriptor comes first, then the listeners'.
    Device {
        /// Its kind.
        kind: Kind,
        /// Where each listener leads on the workstation's loopback.
        forwards: Vec<u16>,
        /// Only the cluster is reached.
        offline: bool,
    },
    /// As system calls that a keeper answers. Its channel comes first, then the sockets that get questions for names.
    Calls {
        /// Namespace whose short names resolve, instead of the connection's.
        namespace: Option<String>,
    },
}

/// What comes of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "lent", rename_all = "snake_case")]
enum Answer {
    Carrying,
    Refused {
        reason: String,
    },
    /// After `Carrying`: flows are being reset, then the socket closes.
    Ending,
}

/// The command's end. While it lives, the daemon serves the program.
#[derive(Debug)]
pub struct Lease(UnixStream);

impl Lease {
    /// Hands a program over.
    ///
    /// # Errors
    /// The daemon cannot serve it, or has gone.
    pub async fn take(
        mut stream: UnixStream,
        wanted: &Wanted,
        descriptors: &[OwnedFd],
    ) -> io::Result<Self> {
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        stream
            .async_io(Interest::WRITABLE, || {
                passing::send(&stream, wanted, &descriptors)
            })
            .await?;
        match next(&mut stream).await? {
            Some((Answer::Carrying, _)) => Ok(Self(stream)),
            Some((Answer::Refused { reason }, _)) => Err(io::Error::other(reason)),
            Some((Answer::Ending, _)) | None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Returns when the daemon is about to serve nothing any more, or has gone. Cancel safe.
    pub async fn ended(&mut self) {
        // It says nothing else; what cannot be read is an end too.
        let _ = next::<Answer>(&mut self.0).await;
    }

    /// Returns when the daemon has reset all flows, or has gone. Cancel safe.
    pub async fn released(&mut self) {
        gone(&mut self.0).await;
    }
}

impl Wanted {
    /// The rules, if they are all rules.
    ///
    /// # Errors
    /// One is none.
    pub fn rules(&self) -> io::Result<UserRules> {
        let parse = |texts: &[String]| -> io::Result<Vec<Rule>> {
            let rule = |text: &String| text.parse().map_err(io::Error::other);
            texts.iter().map(rule).collect()
        };
        Ok(UserRules {
            all: self.all,
            also_proxy: parse(&self.also_proxy)?,
            never_proxy: parse(&self.never_proxy)?,
        })
    }

    /// What serves the program behind these descriptors.
    ///
    /// # Errors
    /// They are not what was promised, or cannot be used.
    pub fn serve(&self, descriptors: Vec<OwnedFd>, upstream: Upstream) -> io::Result<Worker> {
        let mut descriptors = descriptors.into_iter();
        let first = descriptors
            .next()
            .ok_or_else(|| io::Error::other("no descriptor came with it"))?;
        let rules = self.rules()?;
        match &self.from {
            From::Device {
                kind,
                forwards,
                offline,
            } => bridge::start(bridge::Config {
                device: *kind,
                descriptor: first,
                forwards: descriptors
                    .map(TcpListener::from)
                    .zip(forwards.iter().copied())
                    .collect(),
                upstream,
                rules,
                offline: *offline,
            }),
            From::Calls { namespace } => opener::start(opener::Config {
                channel: first,
                resolvers: descriptors.collect(),
                upstream,
                rules,
                namespace: namespace.clone(),
            }),
        }
    }
}

/// The daemon's end, from the moment it was asked until the command has gone or `stop`.
pub async fn serve(mut stream: UnixStream, upstream: Upstream, stop: CancellationToken) {
    let wanted = tokio::select! {
        wanted = next::<Wanted>(&mut stream) => wanted,
        () = stop.cancelled() => return,
    };
    let Ok(Some((wanted, descriptors))) = wanted else {
        return;
    };
    let (answer, worker) = match wanted.serve(descriptors, upstream) {
        Ok(worker) => (Answer::Carrying, Some(worker)),
        Err(error) => {
            let reason = error.to_string();
            (Answer::Refused { reason }, None)
        }
    };
    let told = stream.async_io(Interest::WRITABLE, || passing::send(&stream, &answer, &[]));
    if let (Ok(()), Some(mut worker)) = (told.await, worker) {
        tracing::info!(from = ?wanted.from, "serving a program");
        tokio::select! {
            () = gone(&mut stream) => {}
            () = stop.cancelled() => {}
            error = worker.ended() => tracing::warn!(%error, "a program is not served any more"),
        }
        // The command hears of the end before its program does, which may end at once when its flows are reset.
        let ending = stream.async_io(Interest::WRITABLE, || {
            passing::send(&stream, &Answer::Ending, &[])
        });
        let _ = ending.await;
        // Its thread resets the flows first.
        let _ = tokio::task::spawn_blocking(move || drop(worker)).await;
        drop(stream);
        tracing::info!("a program has ended");
    }
}

async fn next<T: serde::de::DeserializeOwned>(
    stream: &mut UnixStream,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    stream
        .async_io(Interest::READABLE, || passing::receive(&*stream))
        .await
}

async fn gone(stream: &mut UnixStream) {
    let mut byte = [0];
    while !matches!(stream.read(&mut byte).await, Ok(0) | Err(_)) {}
}
