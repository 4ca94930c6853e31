//! How a worker gets the sockets that listen: from the parent, through the pipe between them (`SCM_RIGHTS`, unix(7)).
//!
//! They stay the parent's, so a worker's death resets what it had accepted and nothing more: others wait in the kernel for
//! the next worker.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::parent::Sockets;

/// Descriptors of [`Sockets`].
const NUMBER: usize = 2;

/// Descriptors come with bytes; this is what they come with.
const WITH: [u8; 1] = [b'\n'];

/// Says them first of all.
pub(crate) fn give(pipe: impl AsFd, sockets: &Sockets) -> io::Result<()> {
    let descriptors = [sockets.redirected.as_fd(), sockets.control.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(NUMBER))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for descriptors"));
    }
    let said = [IoSlice::new(&WITH)];
    rustix::net::sendmsg(pipe, &said, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// What the parent said first. Blocks, but not for long: it said that before it started us.
pub fn take(pipe: impl AsFd) -> io::Result<Sockets> {
    let mut byte = [0; WITH.len()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(NUMBER))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut heard = [IoSliceMut::new(&mut byte)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(pipe.as_fd(), &mut heard, &mut control, flags)
    })?;
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    match <[OwnedFd; NUMBER]>::try_from(descriptors) {
        Ok([redirected, control]) => Ok(Sockets {
            redirected: redirected.into(),
            control: control.into(),
        }),
        Err(_) => Err(io::Error::other("the parent gave no sockets")),
    }
}
