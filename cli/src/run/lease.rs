//! How a connection's daemon comes to carry the packets of a namespace that another process made.
//!
//! `tp run` passes the device's descriptor over the control socket. The daemon puts a [`Bridge`] on it for as long as
//! that socket is open: however `tp run` ends, the bridge ends with it. And if the daemon ends, `tp run` sees it here.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, Interest};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::bridge::{Bridge, Config};
use super::device::Kind;
use super::passing;
use crate::proxy::{Rule, Upstream, UserRules};

/// What comes with the descriptors: the device's, then the listeners'.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Wanted {
    /// The kind of device.
    pub device: Kind,
    /// Where each listener leads on the workstation's loopback.
    pub forwards: Vec<u16>,
    /// Only the cluster is reached.
    pub offline: bool,
    /// Everything goes to the cluster.
    pub all: bool,
    /// Rules for what goes there besides.
    pub also_proxy: Vec<String>,
    /// Rules for what never goes there.
    pub never_proxy: Vec<String>,
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

/// The command's end. While it lives, the daemon carries the packets.
#[derive(Debug)]
pub struct Lease(UnixStream);

impl Lease {
    /// Hands a namespace over.
    ///
    /// # Errors
    /// The daemon cannot carry it, or has gone.
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

    /// Returns when the daemon is about to carry nothing any more, or has gone. Cancel safe.
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

    /// A bridge for these descriptors.
    ///
    /// # Errors
    /// They are not what was promised, or cannot be used.
    pub fn bridge(&self, descriptors: Vec<OwnedFd>, upstream: Upstream) -> io::Result<Bridge> {
        let mut descriptors = descriptors.into_iter();
        let descriptor = descriptors
            .next()
            .ok_or_else(|| io::Error::other("no device came with it"))?;
        let listeners = descriptors.map(TcpListener::from);
        Bridge::start(Config {
            device: self.device,
            descriptor,
            forwards: listeners.zip(self.forwards.iter().copied()).collect(),
            upstream,
            rules: self.rules()?,
            offline: self.offline,
        })
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
    let (answer, bridge) = match wanted.bridge(descriptors, upstream) {
        Ok(bridge) => (Answer::Carrying, Some(bridge)),
        Err(error) => {
            let reason = error.to_string();
            (Answer::Refused { reason }, None)
        }
    };
    let told = stream.async_io(Interest::WRITABLE, || passing::send(&stream, &answer, &[]));
    if let (Ok(()), Some(mut bridge)) = (told.await, bridge) {
        tracing::info!(device = %wanted.device, "carrying a namespace");
        tokio::select! {
            () = gone(&mut stream) => {}
            () = stop.cancelled() => {}
            error = bridge.ended() => tracing::warn!(%error, "a namespace is not carried any more"),
        }
        // The command hears of the end before its program does, which may end at once when its flows are reset.
        let ending = stream.async_io(Interest::WRITABLE, || {
            passing::send(&stream, &Answer::Ending, &[])
        });
        let _ = ending.await;
        // Its thread resets the flows first.
        let _ = tokio::task::spawn_blocking(move || drop(bridge)).await;
        drop(stream);
        tracing::info!("namespace given back");
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
