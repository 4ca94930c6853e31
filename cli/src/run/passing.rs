//! Messages between the processes of one `tp run`, with descriptors beside them (`SCM_RIGHTS`).
//!
//! One message is one JSON value. Knows nothing of what is said.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest message.
const LONGEST: usize = 64 * 1024;

/// Descriptors in one message: the device, and one listener for each forwarded port and IP version.
pub(super) const DESCRIPTORS: usize = 128;

/// Two ends that keep messages apart. Both are closed when another program starts.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags,
        None,
    )?)
}

/// Sends one message. A line break ends it, for sockets that do not keep messages apart.
pub(super) fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut text = serde_json::to_vec(message)?;
    text.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    rustix::net::sendmsg(
        socket,
        &[IoSlice::new(&text)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// The next message with its descriptors, or `None` at the end.
pub(super) fn receive<T: DeserializeOwned>(
    socket: impl AsFd,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut text = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut text)];
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(
            socket.as_fd(),
            &mut slices,
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(&text[..received.bytes])?;
    Ok(Some((message, descriptors)))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_message_arrives_with_its_descriptors_and_the_end_is_seen() {
        let (ours, theirs) = pair().unwrap();
        let (mut reader, mut writer) = std::io::pipe().unwrap();

        send(&ours, &"take this", &[writer.as_fd()]).unwrap();
        writer.write_all(b"one ").unwrap();
        drop(writer);
        let (text, mut descriptors) = receive::<String>(&theirs).unwrap().unwrap();
        let mut writer = std::fs::File::from(descriptors.remove(0));
        writer.write_all(b"two").unwrap();
        drop((writer, ours));

        let mut written = String::new();
        reader.read_to_string(&mut written).unwrap();
        assert_eq!((text.as_str(), written.as_str()), ("take this", "one two"));
        assert!(receive::<String>(&theirs).unwrap().is_none());
    }
}
