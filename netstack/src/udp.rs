//! UDP: a table of who talks to whom.
//!
//! A socket per association would buy nothing, as UDP has no state but the addresses. Payloads wait in one bounded queue
//! for the owner; what does not fit is dropped, as any network may. An association ends when it was idle for two minutes
//! (RFC 4787 §4.3), when a newer one needs its place, or when the program's kernel says that its socket is gone.

use std::collections::VecDeque;
use std::net::SocketAddr;

use smoltcp::wire::UdpPacket;

use crate::demux::{Demux, FlowKey};
use crate::ip::{Headers, protocol};
use crate::outbox::Outbox;
use crate::reply::{self, Unreachable};
use crate::slab::Slab;
use crate::timers::{Tick, Wheel};
use crate::{Event, FlowError, LONGEST_PACKET, Stack, fragments, offload};

/// Names one UDP association; never used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AssociationId {
    index: u32,
    generation: u32,
}

/// All associations and the payloads that wait for the owner.
pub(crate) struct Associations {
    slab: Slab<Association>,
    demux: Demux,
    wheel: Wheel,
    limit: usize,
    inbound: VecDeque<(AssociationId, Vec<u8>)>,
    bytes: usize,
    spare: Vec<Vec<u8>>,
    dropped: u64,
}

struct Association {
    key: FlowKey,
    used: Tick,
}

const IDLE: Tick = 120_000;
/// Payloads and bytes that may wait for the owner.
const WAITING: usize = 4096;
const WAITING_BYTES: usize = 4 << 20;
/// Buffers kept for reuse, and the size above which one is not kept.
const SPARE: usize = 256;
const SPARE_BYTES: usize = 4096;

impl Associations {
    pub(crate) fn new(seed: u64, limit: usize, now: Tick) -> Self {
        let mut wheel = Wheel::new();
        wheel.expire(now);
        Self {
            slab: Slab::new(),
            demux: Demux::new(seed),
            wheel,
            limit: limit.max(1),
            inbound: VecDeque::new(),
            bytes: 0,
            spare: Vec::new(),
            dropped: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.slab.len()
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    pub(crate) fn contains(&self, id: AssociationId) -> bool {
        self.slab.resolve(id.index, id.generation).is_some()
    }

    /// When the first association may have been idle for too long.
    pub(crate) fn next_expiry(&self) -> Option<Tick> {
        self.wheel.next()
    }

    /// An association that was idle for too long; it is gone with the answer.
    pub(crate) fn expire(&mut self, now: Tick) -> Option<AssociationId> {
        self.wheel.expire(now);
        while let Some(index) = self.wheel.pop_due() {
            let Some(association) = self.slab.get(index) else {
                continue;
            };
            let due = association.used + IDLE;
            if due <= now {
                return Some(self.remove(index));
            }
            self.wheel.arm(index, due);
        }
        None
    }

    /// The association of `key`, and whether it is new.
    fn find_or_open(&mut self, key: FlowKey, now: Tick) -> (AssociationId, bool) {
        if let Some(index) = self.demux.find(&key) {
            if let Some(association) = self.slab.get_mut(index) {
                association.used = now;
            }
            return (self.id(index), false);
        }
        let (index, generation) = self.slab.insert(Association { key, used: now });
        self.demux.insert(key, index);
        self.wheel.arm(index, now + IDLE);
        (AssociationId { index, generation }, true)
    }

    /// Takes out the association longest unused, if there is no place for another.
    fn make_room(&mut self) -> Option<AssociationId> {
        if self.slab.len() < self.limit {
            return None;
        }
        let (index, _) = self
            .slab
            .iter()
            .min_by_key(|(_, association)| association.used)?;
        Some(self.remove(index))
    }

    fn queue(&mut self, id: AssociationId, payload: &[u8]) {
        if self.inbound.len() == WAITING || self.bytes + payload.len() > WAITING_BYTES {
            self.dropped += 1;
            return;
        }
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(payload);
        self.bytes += payload.len();
        self.inbound.push_back((id, buffer));
    }

    fn pop(&mut self) -> Option<(AssociationId, Vec<u8>)> {
        let (id, payload) = self.inbound.pop_front()?;
        self.bytes -= payload.len();
        Some((id, payload))
    }

    fn recycle(&mut self, payload: Vec<u8>) {
        if self.spare.len() < SPARE && payload.capacity() <= SPARE_BYTES {
            self.spare.push(payload);
        }
    }

    fn remove(&mut self, index: u32) -> AssociationId {
        let id = self.id(index);
        if let Some(association) = self.slab.remove(index) {
            self.demux.remove(&association.key, index);
        }
        self.wheel.disarm(index);
        id
    }

    fn id(&self, index: u32) -> AssociationId {
        AssociationId {
            index,
            generation: self.slab.generation(index),
        }
    }

    /// Panics if the tables contradict each other.
    pub(crate) fn check(&self) {
        assert_eq!(
            self.slab.len(),
            self.demux.len(),
            "one hash entry per association"
        );
        assert!(
            self.slab.len() <= self.limit,
            "associations within their limit"
        );
        for (index, association) in self.slab.iter() {
            assert_eq!(
                self.demux.find(&association.key),
                Some(index),
                "an association is found by its key"
            );
            assert!(
                self.wheel.deadline(index).is_some(),
                "an association expires"
            );
        }
        let waiting: usize = self.inbound.iter().map(|(_, payload)| payload.len()).sum();
        assert_eq!(self.bytes, waiting, "bytes of waiting datagrams");
        assert!(
            waiting <= WAITING_BYTES && self.inbound.len() <= WAITING,
            "waiting datagrams within bounds"
        );
    }
}

impl Stack {
    /// Lends the next payload that a program sent to `f`; `None` if there is none. The association may already be gone.
    pub fn recv_datagram<R>(&mut self, f: impl FnOnce(AssociationId, &[u8]) -> R) -> Option<R> {
        let (id, payload) = self.associations.pop()?;
        let result = f(id, &payload);
        self.associations.recycle(payload);
        Some(result)
    }

    /// Sends `payload` to the program. Cut into fragments if it is longer than the MTU, dropped and counted if too many
    /// packets wait.
    ///
    /// # Panics
    /// When the payload does not fit an IP packet: 65,507 bytes over IPv4.
    pub fn send_datagram(&mut self, id: AssociationId, payload: &[u8]) -> Result<(), FlowError> {
        let now = self.wheel.now();
        let index = self
            .associations
            .slab
            .resolve(id.index, id.generation)
            .ok_or(FlowError::Gone)?;
        let association = self
            .associations
            .slab
            .get_mut(index)
            .ok_or(FlowError::Gone)?;
        association.used = now;
        let (from, to) = (association.key.destination(), association.key.source());
        let headers = if from.is_ipv4() {
            self.v4.headers
        } else {
            self.v6.headers
        } - TCP_OVER_UDP;
        assert!(
            headers + payload.len() <= LONGEST_PACKET,
            "a datagram of {} bytes",
            payload.len()
        );
        if headers + payload.len() <= usize::from(self.config.mtu) {
            reply::short_datagram(&mut self.outbox, from, to, payload);
        } else {
            self.send_in_pieces(reply::datagram(from, to, payload));
        }
        Ok(())
    }

    /// Forgets an association. No event follows; the program's next datagram opens a new one.
    pub fn close_association(&mut self, id: AssociationId) {
        if let Some(index) = self.associations.slab.resolve(id.index, id.generation) {
            self.associations.remove(index);
        }
    }

    /// Tells the program that its datagrams do not arrive, and forgets the association.
    pub fn association_unreachable(&mut self, id: AssociationId, why: Unreachable) {
        let Some(index) = self.associations.slab.resolve(id.index, id.generation) else {
            return;
        };
        let Some(association) = self.associations.slab.get(index) else {
            return;
        };
        let (source, destination) = (association.key.source(), association.key.destination());
        let mut transport = [0; 8];
        transport[..2].copy_from_slice(&source.port().to_be_bytes());
        transport[2..4].copy_from_slice(&destination.port().to_be_bytes());
        transport[4..6].copy_from_slice(&8u16.to_be_bytes());
        let quoted = reply::quote(source, destination, protocol::UDP, transport, 8);
        reply::unreachable(
            &mut self.outbox,
            destination.ip(),
            source.ip(),
            why,
            &quoted,
        );
        self.associations.remove(index);
    }

    /// Queues a packet of ours that is longer than the MTU, its checksums made first.
    pub(crate) fn send_in_pieces(&mut self, mut packet: Vec<u8>) {
        offload::complete(&mut packet, &Default::default(), LONGEST_PACKET);
        self.fragment_id = self.fragment_id.wrapping_add(1);
        let outbox: &mut Outbox = &mut self.outbox;
        fragments::split(
            &packet,
            usize::from(self.config.mtu),
            self.fragment_id,
            |piece| {
                outbox.push_with(piece.len(), |bytes| bytes.copy_from_slice(piece));
            },
        );
    }

    pub(crate) fn handle_datagram(&mut self, packet: &[u8], headers: &Headers) {
        let Ok(udp) = UdpPacket::new_checked(&packet[headers.payload..headers.end]) else {
            return self.counters.malformed += 1;
        };
        if udp.dst_port() == 0 {
            return self.counters.malformed += 1;
        }
        let source = SocketAddr::new(headers.source, udp.src_port());
        let destination = SocketAddr::new(headers.destination, udp.dst_port());
        let key = FlowKey::new(source, destination);
        if self.associations.demux.find(&key).is_none()
            && let Some(oldest) = self.associations.make_room()
        {
            self.events.push_back(Event::AssociationClosed(oldest));
        }
        let (id, new) = self.associations.find_or_open(key, self.wheel.now());
        if new {
            self.events.push_back(Event::AssociationOpened {
                id,
                source,
                destination,
            });
        }
        self.associations.queue(id, udp.payload());
    }

    /// Forgets the association whose answer the program's kernel refused.
    pub(crate) fn handle_refused_datagram(&mut self, key: &FlowKey) {
        if let Some(index) = self.associations.demux.find(key) {
            let id = self.associations.remove(index);
            self.events.push_back(Event::AssociationClosed(id));
        }
    }
}

/// A UDP header is this much shorter than TCP's.
const TCP_OVER_UDP: usize = 12;
