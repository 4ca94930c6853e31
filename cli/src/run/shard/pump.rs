//! Moves packets between a device and the stack.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tp_netstack::Offload;

use super::super::device::{BUFFER, Device, HEADROOM};
use super::super::sys;
use super::{Shared, now};

/// Packets read or written before tasks get their turn, and bytes: what is read shall still be in the cache when it is
/// passed on.
const BATCH: usize = 64;
const BATCH_BYTES: usize = 256 * 1024;

/// Moves packets. Nothing happens unless [`Pump::run`] is polled.
pub struct Pump {
    device: Box<dyn Device>,
    descriptor: AsyncFd<OwnedFd>,
    shared: Rc<Shared>,
    inbound: Vec<u8>,
    outbound: Vec<u8>,
    /// A packet that the device did not take yet.
    waiting: Option<(usize, Offload)>,
}

impl Pump {
    pub(super) fn new(
        device: Box<dyn Device>,
        descriptor: OwnedFd,
        shared: Rc<Shared>,
    ) -> io::Result<Self> {
        Ok(Self {
            device,
            descriptor: sys::watch(descriptor)?,
            shared,
            inbound: vec![0; BUFFER],
            outbound: vec![0; BUFFER],
            waiting: None,
        })
    }

    /// Runs until the device fails, which is when its namespace has gone.
    pub async fn run(&mut self) -> io::Error {
        loop {
            if let Err(error) = self.turn().await {
                return error;
            }
        }
    }

    /// Sends what the stack has to say last, such as the resets of flows that were dropped. Never waits.
    pub fn flush(&mut self) {
        while let Ok(Sent::Batch) = self.write_batch(now()) {}
    }

    async fn turn(&mut self) -> io::Result<()> {
        let begun = now();
        let more_to_read = self.read_batch(begun)?;
        self.shared.tell();
        let sent = self.write_batch(begun)?;
        self.shared.tell();
        if more_to_read || sent == Sent::Batch {
            tokio::task::yield_now().await;
            return Ok(());
        }
        let due = self.shared.stack.borrow().poll_timeout();
        let timer = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        let blocked = sent == Sent::Blocked;
        tokio::select! {
            ready = self.descriptor.readable() => drop(ready?),
            ready = self.descriptor.writable(), if blocked => drop(ready?),
            () = self.shared.touched.notified(), if !blocked => {}
            () = timer => {}
        }
        Ok(())
    }

    /// Whether there may be more.
    fn read_batch(&mut self, now: Instant) -> io::Result<bool> {
        let mut stack = self.shared.stack.borrow_mut();
        let mut bytes = 0;
        for _ in 0..BATCH {
            if bytes >= BATCH_BYTES {
                break;
            }
            let read = self.descriptor.try_io(Interest::READABLE, |from| {
                self.device.receive(from.as_fd(), &mut self.inbound)
            });
            match read {
                Ok((place, offload)) => {
                    bytes += place.len();
                    stack.handle_packet(now, &self.inbound[place], offload);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                // A header that makes no sense concerns one packet.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn write_batch(&mut self, now: Instant) -> io::Result<Sent> {
        let mut stack = self.shared.stack.borrow_mut();
        for _ in 0..BATCH {
            let next = match self.waiting.take() {
                Some(waiting) => Some(waiting),
                None => stack.poll_packet(now, &mut self.outbound[HEADROOM..]),
            };
            let Some((length, offload)) = next else {
                return Ok(Sent::All);
            };
            let written = self.descriptor.try_io(Interest::WRITABLE, |to| {
                self.device
                    .send(to.as_fd(), &mut self.outbound, length, offload)
            });
            match written {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.waiting = Some((length, offload));
                    return Ok(Sent::Blocked);
                }
                // Lost, as on any link; TCP sends it again.
                Err(error) => tracing::debug!(%error, length, "a packet was not taken"),
            }
        }
        Ok(Sent::Batch)
    }
}

/// How far a batch got.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sent {
    All,
    Batch,
    Blocked,
}
