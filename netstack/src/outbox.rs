//! Packets that are ready and belong to no flow's own queue: resets, ICMP, datagrams, immediate acknowledgements.
//!
//! Bounded, and its buffers are used again. What does not fit is dropped and counted: each kind of packet here may be lost
//! on any network. It knows nothing of what it carries.

use std::collections::VecDeque;

/// A first-in first-out queue of packets without checksums.
pub(crate) struct Outbox {
    packets: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    bytes: usize,
    dropped: u64,
}

impl Outbox {
    /// Packets and bytes that may wait. The owner is expected to drain after each batch, so this is an emergency bound.
    pub(crate) const PACKETS: usize = 2048;
    pub(crate) const BYTES: usize = 4 << 20;
    /// Buffers kept for reuse, and the size above which one is not kept.
    const SPARE: usize = 64;
    const SPARE_BYTES: usize = 2048;

    pub(crate) fn new() -> Self {
        Self {
            packets: VecDeque::new(),
            spare: Vec::new(),
            bytes: 0,
            dropped: 0,
        }
    }

    /// Queues a packet of `len` bytes that `f` writes. `f` runs even when there is no room.
    pub(crate) fn push_with<R>(&mut self, len: usize, f: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut packet = self.spare.pop().unwrap_or_default();
        packet.clear();
        packet.resize(len, 0);
        let result = f(&mut packet);
        self.push(packet);
        result
    }

    fn push(&mut self, packet: Vec<u8>) {
        if !self.has_room(packet.len()) {
            self.dropped += 1;
            return self.recycle(packet);
        }
        self.bytes += packet.len();
        self.packets.push_back(packet);
    }

    pub(crate) fn has_room(&self, len: usize) -> bool {
        self.packets.len() < Self::PACKETS && self.bytes + len <= Self::BYTES
    }

    /// Copies the oldest packet to `buffer`; its length.
    pub(crate) fn pop_into(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let packet = self.packets.pop_front()?;
        let len = packet.len();
        self.bytes -= len;
        buffer[..len].copy_from_slice(&packet);
        self.recycle(packet);
        Some(len)
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    pub(crate) fn len(&self) -> usize {
        self.packets.len()
    }

    /// The newest packet.
    pub(crate) fn last(&self) -> Option<&[u8]> {
        self.packets.back().map(Vec::as_slice)
    }

    /// Bytes counted, and bytes that are there: for the invariants.
    pub(crate) fn count(&self) -> (usize, usize) {
        (self.bytes, self.packets.iter().map(Vec::len).sum())
    }

    fn recycle(&mut self, packet: Vec<u8>) {
        if self.spare.len() < Self::SPARE && packet.capacity() <= Self::SPARE_BYTES {
            self.spare.push(packet);
        }
    }
}
