//! A DATA payload that tells when h2 has written or dropped it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Buf, Bytes};

use crate::flow_control::turns::Slot;

/// What this crate gives to h2 as the payload of one DATA frame.
pub(crate) struct Frame {
    bytes: Bytes,
    _ticket: Ticket,
}

/// What comes back when the frame is gone.
enum Ticket {
    /// The frame of an ended flow carries nothing and waits for nobody.
    None,
    Slot(#[expect(dead_code, reason = "held for its Drop")] Slot),
    Allowance(Allowance, usize),
}

/// Bytes of one UDP flow inside h2. Datagrams do not wait for turns; this bounds them instead.
#[derive(Clone, Default)]
pub(crate) struct Allowance(Arc<AtomicUsize>);

impl Frame {
    pub(crate) fn empty() -> Self {
        Self {
            bytes: Bytes::new(),
            _ticket: Ticket::None,
        }
    }

    pub(crate) fn in_slot(bytes: Bytes, slot: Slot) -> Self {
        Self {
            bytes,
            _ticket: Ticket::Slot(slot),
        }
    }

    /// `None` when more than `limit` bytes would be inside h2.
    pub(crate) fn in_allowance(bytes: Bytes, allowance: &Allowance, limit: usize) -> Option<Self> {
        let size = bytes.len();
        if allowance.0.load(Ordering::Relaxed) + size > limit {
            return None;
        }
        allowance.0.fetch_add(size, Ordering::Relaxed);
        Some(Self {
            bytes,
            _ticket: Ticket::Allowance(allowance.clone(), size),
        })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Self::Allowance(allowance, size) = self {
            allowance.0.fetch_sub(*size, Ordering::Relaxed);
        }
    }
}

impl Buf for Frame {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
    }
}
