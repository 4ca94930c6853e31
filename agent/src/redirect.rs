//! The packet filter's rule that brings connections to the worker, by netlink and without forking.
//!
//! ```text
//! table inet tp-agent {
//!     set live { type inet_service; flags timeout; }
//!     map live-udp { type inet_service : inet_service; flags timeout; }
//!     chain inbound {
//!         type nat hook prerouting priority dstnat;
//!         tcp flags syn / fin,syn,rst,ack tcp dport @live redirect to :PORT
//!         redirect to :udp dport map @live-udp
//!     }
//! }
//! ```
//!
//! Nothing is redirected unless its port is in `live`, and what is in `live` vanishes after [`LIFE`] unless it is
//! refreshed: whatever dies, the kernel sends new connections to the application again. The flags are there because the
//! kernel begins to track connections only when the table comes: the next segment of one that is older would look new,
//! and be redirected into a reset. A datagram does not say where it wanted to go, so each UDP port has a port of its own
//! that it comes to; the kernel gives answers from there the first one again. Connections that a pod opens to
//! itself do not pass this hook, so the worker's own connections to the application are never redirected.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, recv, send, socket_with,
    sockopt,
};

use crate::heartbeat::Ports;

/// How long a port is redirected without being refreshed.
pub const LIFE: Duration = Duration::from_secs(3);

/// How long the kernel may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);

const TABLE: &str = "tp-agent";
const CHAIN: &str = "inbound";
const SET: &str = "live";
const MAP: &str = "live-udp";

/// The rule, and the right to change what it applies to. Dropping it leaves the rule behind; its ports run out.
#[derive(Debug)]
pub struct Redirect {
    netlink: OwnedFd,
    sequence: u32,
}

impl Redirect {
    /// Makes the table anew, with no port in it. Needs CAP_NET_ADMIN in the network namespace.
    pub fn install(to: u16) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let netlink = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            flags,
            Some(NETFILTER),
        )?;
        connect(&netlink, &SocketAddrNetlink::new(0, 0))?;
        sockopt::set_socket_timeout(&netlink, sockopt::Timeout::Recv, Some(PATIENCE))?;
        let mut redirect = Self {
            netlink,
            sequence: 0,
        };
        redirect.commit(|batch| {
            // Adding comes first, since deleting what is not there is an error.
            for kind in [message::NEWTABLE, message::DELTABLE, message::NEWTABLE] {
                batch.message(kind, |attributes| attributes.text(1, TABLE));
            }
            batch.message(message::NEWCHAIN, inbound_chain);
            batch.message(message::NEWSET, live_set);
            batch.message(message::NEWSET, live_map);
            batch.message(message::NEWRULE, |attributes| tcp_rule(attributes, to));
            batch.message(message::NEWRULE, udp_rule);
        })?;
        Ok(redirect)
    }

    /// Redirects these ports and no others, for [`LIFE`].
    pub fn refresh(&mut self, ports: &Ports) -> io::Result<()> {
        let tcp: Vec<_> = ports.tcp.iter().map(|port| (*port, None)).collect();
        let udp = ports.udp.iter().map(|(port, own)| (*port, Some(*own)));
        let udp: Vec<_> = udp.collect();
        self.commit(|batch| {
            for (set, ports) in [(SET, tcp), (MAP, udp)] {
                // Without elements it empties the set; both take effect at once.
                batch.message(message::DELSETELEM, |attributes| {
                    attributes.text(1, TABLE);
                    attributes.text(2, set);
                });
                if !ports.is_empty() {
                    batch.message(message::NEWSETELEM, |attributes| {
                        elements(attributes, set, &ports)
                    });
                }
            }
        })
    }

    /// Removes the table.
    pub fn remove(mut self) -> io::Result<()> {
        self.commit(|batch| {
            batch.message(message::DELTABLE, |attributes| attributes.text(1, TABLE));
        })
    }

    /// Sends one transaction and waits for the kernel's word on each of its messages.
    fn commit(&mut self, fill: impl FnOnce(&mut Batch)) -> io::Result<()> {
        let mut batch = Batch::begin(self.sequence);
        fill(&mut batch);
        self.sequence = batch.end();
        let (first, mut waiting) = (batch.first, batch.messages);
        send(&self.netlink, &batch.bytes, SendFlags::empty())?;
        let mut buffer = vec![0; 16 * 1024];
        while waiting > 0 {
            let (size, _) = recv(&self.netlink, buffer.as_mut_slice(), RecvFlags::empty())?;
            for (sequence, error) in acknowledgements(&buffer[..size]) {
                if error != 0 {
                    return Err(io::Error::from_raw_os_error(-error));
                }
                // Late words on an earlier transaction are not ours.
                if sequence.wrapping_sub(first) < batch.messages + 1 {
                    waiting = waiting.saturating_sub(1);
                }
            }
        }
        Ok(())
    }
}

/// `NFT_MSG_*` of linux/netfilter/nf_tables.h, each with `NLM_F_CREATE` where it makes something.
mod message {
    pub(super) const NEWTABLE: (u8, u16) = (0, 0x400);
    pub(super) const DELTABLE: (u8, u16) = (2, 0);
    pub(super) const NEWCHAIN: (u8, u16) = (3, 0x400);
    pub(super) const NEWRULE: (u8, u16) = (6, 0x400 | 0x800);
    pub(super) const NEWSET: (u8, u16) = (9, 0x400);
    pub(super) const NEWSETELEM: (u8, u16) = (12, 0x400);
    pub(super) const DELSETELEM: (u8, u16) = (14, 0);
}

/// `NFTA_CHAIN_*`, `NFTA_HOOK_*`.
fn inbound_chain(attributes: &mut Attributes<'_>) {
    attributes.text(1, TABLE);
    attributes.text(3, CHAIN);
    attributes.nested(4, |hook| {
        hook.number(1, 0); // NF_INET_PRE_ROUTING
        hook.number(2, -100i32 as u32); // dstnat
    });
    attributes.text(7, "nat");
}

/// `NFTA_SET_*`.
fn live_set(attributes: &mut Attributes<'_>) {
    attributes.text(1, TABLE);
    attributes.text(2, SET);
    attributes.number(3, 0x10); // NFT_SET_TIMEOUT
    attributes.number(4, 13); // inet_service, for `nft list`
    attributes.number(5, 2);
    attributes.number(10, 1); // names it inside of this transaction
}

/// The same from one port to another.
fn live_map(attributes: &mut Attributes<'_>) {
    attributes.text(1, TABLE);
    attributes.text(2, MAP);
    attributes.number(3, 0x10 | 0x08); // NFT_SET_TIMEOUT, NFT_SET_MAP
    attributes.number(4, 13);
    attributes.number(5, 2);
    attributes.number(6, 13);
    attributes.number(7, 2);
    attributes.number(10, 2);
}

/// `NFTA_SET_ELEM_LIST_*`, `NFTA_SET_ELEM_*`: ports, and for a map what each leads to.
fn elements(attributes: &mut Attributes<'_>, set: &str, ports: &[(u16, Option<u16>)]) {
    attributes.text(1, TABLE);
    attributes.text(2, set);
    let life = u64::try_from(LIFE.as_millis()).unwrap_or(u64::MAX);
    attributes.nested(3, |list| {
        for (port, to) in ports {
            list.nested(1, |element| {
                element.nested(1, |key| key.bytes(1, &port.to_be_bytes()));
                if let Some(to) = to {
                    element.nested(2, |data| data.bytes(1, &to.to_be_bytes()));
                }
                element.bytes(4, &life.to_be_bytes());
            });
        }
    });
}

/// `NFTA_RULE_*`: packets of one protocol that pass `matches` go to the port that it leaves in the register.
fn rule(attributes: &mut Attributes<'_>, protocol: u8, matches: impl FnOnce(&mut Attributes<'_>)) {
    attributes.text(1, TABLE);
    attributes.text(2, CHAIN);
    attributes.nested(4, |list| {
        expression(list, "meta", |meta| {
            meta.number(1, REGISTER);
            meta.number(2, 16); // NFT_META_L4PROTO
        });
        equal(list, protocol);
        matches(list);
        expression(list, "redir", |redir| {
            redir.number(1, REGISTER);
            redir.number(3, 2); // NF_NAT_RANGE_PROTO_SPECIFIED
        });
    });
}

/// tcp flags syn / fin,syn,rst,ack tcp dport @live redirect to :`to`.
fn tcp_rule(attributes: &mut Attributes<'_>, to: u16) {
    const IPPROTO_TCP: u8 = 6;
    rule(attributes, IPPROTO_TCP, |list| {
        // Of the flags' byte FIN, SYN, RST and ACK, of which only SYN is set.
        transport(list, 13, 1);
        expression(list, "bitwise", |bitwise| {
            bitwise.number(1, REGISTER);
            bitwise.number(2, REGISTER);
            bitwise.number(3, 1); // size
            bitwise.nested(4, |mask| mask.bytes(1, &[0x17]));
            bitwise.nested(5, |xor| xor.bytes(1, &[0]));
        });
        equal(list, 0x02);
        destination_port(list);
        expression(list, "lookup", |lookup| {
            lookup.text(1, SET);
            lookup.number(2, REGISTER);
            lookup.number(4, 1); // the set's name inside of this transaction
        });
        expression(list, "immediate", |immediate| {
            immediate.number(1, REGISTER);
            immediate.nested(2, |data| data.bytes(1, &to.to_be_bytes()));
        });
    });
}

/// redirect to :udp dport map @live-udp
fn udp_rule(attributes: &mut Attributes<'_>) {
    const IPPROTO_UDP: u8 = 17;
    rule(attributes, IPPROTO_UDP, |list| {
        destination_port(list);
        expression(list, "lookup", |lookup| {
            lookup.text(1, MAP);
            lookup.number(2, REGISTER);
            lookup.number(3, REGISTER); // where it leads
            lookup.number(4, 2);
        });
    });
}

/// TCP and UDP have it in the same place.
fn destination_port(list: &mut Attributes<'_>) {
    transport(list, 2, 2);
}

const REGISTER: u32 = 1;

/// Loads bytes of the TCP or UDP header.
fn transport(list: &mut Attributes<'_>, offset: u32, size: u32) {
    expression(list, "payload", |payload| {
        payload.number(1, REGISTER);
        payload.number(2, 2); // NFT_PAYLOAD_TRANSPORT_HEADER
        payload.number(3, offset);
        payload.number(4, size);
    });
}

/// Goes on only if the byte that was loaded is this one.
fn equal(list: &mut Attributes<'_>, byte: u8) {
    expression(list, "cmp", |cmp| {
        cmp.number(1, REGISTER);
        cmp.number(2, 0); // NFT_CMP_EQ
        cmp.nested(3, |data| data.bytes(1, &[byte]));
    });
}

/// `NFTA_LIST_ELEM` with `NFTA_EXPR_NAME` and `NFTA_EXPR_DATA`.
fn expression(list: &mut Attributes<'_>, name: &str, data: impl FnOnce(&mut Attributes<'_>)) {
    list.nested(1, |expression| {
        expression.text(1, name);
        expression.nested(2, data);
    });
}

/// Messages of one transaction (linux/netfilter/nfnetlink.h).
struct Batch {
    bytes: Vec<u8>,
    /// Sequence number of the opening message.
    first: u32,
    sequence: u32,
    /// Messages that will be acknowledged.
    messages: u32,
}

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const INET: u8 = 1;

impl Batch {
    fn begin(sequence: u32) -> Self {
        let mut batch = Self {
            bytes: Vec::new(),
            first: sequence,
            sequence,
            messages: 0,
        };
        batch.raw(BATCH_BEGIN, REQUEST, 0, SUBSYSTEM, |_| {});
        batch
    }

    /// Returns the next sequence number.
    fn end(&mut self) -> u32 {
        self.raw(BATCH_END, REQUEST, 0, SUBSYSTEM, |_| {});
        self.sequence
    }

    fn message(&mut self, (kind, flags): (u8, u16), fill: impl FnOnce(&mut Attributes<'_>)) {
        self.messages += 1;
        let kind = SUBSYSTEM << 8 | u16::from(kind);
        self.raw(kind, REQUEST | ACK | flags, INET, 0, fill);
    }

    /// `nlmsghdr` and `nfgenmsg`, then attributes.
    fn raw(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        resource: u16,
        fill: impl FnOnce(&mut Attributes<'_>),
    ) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&self.sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        fill(&mut Attributes(&mut self.bytes));
        let size = u32::try_from(self.bytes.len() - start).unwrap_or(u32::MAX);
        self.bytes[start..start + 4].copy_from_slice(&size.to_ne_bytes());
        self.sequence = self.sequence.wrapping_add(1);
    }
}

/// Attributes of a message: size, kind, value, padding to four bytes.
struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.put(kind, |bytes| bytes.extend_from_slice(value));
    }

    fn text(&mut self, kind: u16, value: &str) {
        self.put(kind, |bytes| {
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        });
    }

    /// Numbers of nf_tables are big-endian.
    fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes<'_>)) {
        const NESTED: u16 = 0x8000;
        self.put(kind | NESTED, |bytes| fill(&mut Attributes(bytes)));
    }

    fn put(&mut self, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        fill(self.0);
        let size = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        self.0[start..start + 2].copy_from_slice(&size.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// Sequence number and error of each `NLMSG_ERROR`; an error of zero is an acknowledgement.
fn acknowledgements(mut bytes: &[u8]) -> Vec<(u32, i32)> {
    const ERROR: u16 = 2;
    let mut found = Vec::new();
    while let Some(size) = bytes.first_chunk::<4>() {
        let size = u32::from_ne_bytes(*size) as usize;
        let Some(message) = bytes.get(..size).filter(|_| size >= 16) else {
            break;
        };
        let word = |at: usize| message.get(at..at + 4)?.first_chunk::<4>().copied();
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        if let (ERROR, Some(sequence), Some(error)) = (kind, word(8), word(16)) {
            found.push((u32::from_ne_bytes(sequence), i32::from_ne_bytes(error)));
        }
        bytes = bytes.get(size.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_their_sizes_are_not() {
        let mut bytes = Vec::new();
        let mut attributes = Attributes(&mut bytes);
        attributes.nested(3, |inner| inner.bytes(1, &[7]));
        attributes.number(2, 258);
        let little = [
            12, 0, 3, 0x80, 5, 0, 1, 0, 7, 0, 0, 0, 8, 0, 2, 0, 0, 0, 1, 2,
        ];
        if cfg!(target_endian = "little") {
            assert_eq!(bytes, little);
        }
    }

    #[test]
    fn answers_of_the_kernel_are_read_and_broken_ones_end_the_reading() {
        let mut answer = Vec::new();
        for (sequence, error) in [(5u32, 0i32), (6, -17)] {
            answer.extend_from_slice(&36u32.to_ne_bytes());
            answer.extend_from_slice(&2u16.to_ne_bytes());
            answer.extend_from_slice(&[0; 2]);
            answer.extend_from_slice(&sequence.to_ne_bytes());
            answer.extend_from_slice(&[0; 4]);
            answer.extend_from_slice(&error.to_ne_bytes());
            answer.extend_from_slice(&[0; 16]);
        }
        assert_eq!(acknowledgements(&answer), [(5, 0), (6, -17)]);
        for end in 0..answer.len() {
            assert!(acknowledgements(&answer[..end]).len() <= 1);
        }
        assert_eq!(acknowledgements(&[0; 64]), []);
    }
}
