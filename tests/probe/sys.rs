//! A TCP client that makes every call through io_uring, as programs do that no hook of `connect(2)` would see.

#![expect(
    unsafe_code,
    reason = "io_uring is handed pointers to what it reads and writes"
)]

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;

use io_uring::{IoUring, opcode, squeue, types};
use socket2::{Domain, SockAddr, Socket, Type};

/// One connection whose calls go through a ring, one at a time.
pub(crate) struct RingStream {
    ring: IoUring,
    socket: Socket,
}

impl RingStream {
    /// Connects.
    pub(crate) fn connect(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        let mut stream = Self {
            ring: IoUring::new(4)?,
            socket,
        };
        let address = SockAddr::from(address);
        let connect = opcode::Connect::new(stream.fd(), address.as_ptr().cast(), address.len());
        // SAFETY: the address lives until the call has ended.
        unsafe { stream.call(&connect.build()) }?;
        Ok(stream)
    }

    /// Sends some of these bytes, and says how many.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let send = opcode::Send::new(self.fd(), bytes.as_ptr(), length);
        // SAFETY: the bytes live until the call has ended.
        unsafe { self.call(&send.build()) }
    }

    /// Receives what is there, at least one byte unless it is the end.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        let receive = opcode::Recv::new(self.fd(), buffer.as_mut_ptr(), length);
        // SAFETY: the buffer is borrowed until the call has ended, and nobody else writes to it.
        unsafe { self.call(&receive.build()) }
    }

    fn fd(&self) -> types::Fd {
        types::Fd(self.socket.as_raw_fd())
    }

    /// Makes one call and waits for its end.
    ///
    /// # Safety
    /// Whatever the entry points to must be valid until this returns.
    unsafe fn call(&mut self, entry: &squeue::Entry) -> io::Result<usize> {
        // SAFETY: as the caller says; and no call is left behind, since this waits for each.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)?;
        loop {
            self.ring.submit_and_wait(1)?;
            if let Some(done) = self.ring.completion().next() {
                let result = done.result();
                return usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            }
        }
    }
}
