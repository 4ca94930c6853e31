//! Messages with descriptors between two processes, without blocking a thread.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::run::{passing, sys};

/// One end of a socket that keeps messages apart.
pub(super) struct Channel(AsyncFd<OwnedFd>);

impl Channel {
    /// Takes over one end of [`passing::pair`].
    ///
    /// # Errors
    /// It cannot be watched.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self(sys::watch(socket)?))
    }

    /// Sends one message. Cancel safe: it was sent as a whole or not at all.
    pub(super) async fn send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        self.0
            .async_io(Interest::WRITABLE, |socket| {
                passing::send(socket, message, descriptors)
            })
            .await
    }

    /// The next message with its descriptors, or `None` at the end. Cancel safe.
    pub(super) async fn receive<T: DeserializeOwned>(
        &self,
    ) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        self.0
            .async_io(Interest::READABLE, |socket| passing::receive(socket))
            .await
    }
}
