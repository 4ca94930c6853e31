//! From a packet's addresses and ports to the flow it belongs to.
//!
//! smoltcp would ask every socket in turn. Here a seeded hash of the 4-tuple finds the flow's index, so that a packet costs
//! the same with one flow as with fifty thousand. The seed keeps a hostile program from choosing ports that collide.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Source and destination of a flow, as its packets from the program carry them. IPv4 is kept in its v4-mapped form,
/// which no IPv6 packet may carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FlowKey {
    source: [u64; 2],
    destination: [u64; 2],
    ports: u32,
}

impl FlowKey {
    pub(crate) fn new(source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            source: words(source.ip()),
            destination: words(destination.ip()),
            ports: u32::from(source.port()) << 16 | u32::from(destination.port()),
        }
    }

    /// The program's end.
    pub(crate) fn source(&self) -> SocketAddr {
        SocketAddr::new(address(self.source), (self.ports >> 16) as u16)
    }

    pub(crate) fn is_ipv4(&self) -> bool {
        self.source[0] == 0 && self.source[1] >> 32 == 0xFFFF
    }

    /// The end that this stack stands for.
    pub(crate) fn destination(&self) -> SocketAddr {
        SocketAddr::new(address(self.destination), self.ports as u16)
    }
}

impl Hash for FlowKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for word in [
            self.source[0],
            self.source[1],
            self.destination[0],
            self.destination[1],
        ] {
            state.write_u64(word);
        }
        state.write_u64(u64::from(self.ports));
    }
}

fn words(ip: IpAddr) -> [u64; 2] {
    let bits = match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    [(bits >> 64) as u64, bits as u64]
}

fn address(words: [u64; 2]) -> IpAddr {
    Ipv6Addr::from_bits(u128::from(words[0]) << 64 | u128::from(words[1])).to_canonical()
}

/// 4-tuple to index.
pub(crate) struct Demux {
    table: HashMap<FlowKey, u32, Seeded>,
}

impl Demux {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            table: HashMap::with_hasher(Seeded(seed)),
        }
    }

    pub(crate) fn find(&self, key: &FlowKey) -> Option<u32> {
        self.table.get(key).copied()
    }

    pub(crate) fn insert(&mut self, key: FlowKey, index: u32) {
        self.table.insert(key, index);
    }

    /// Forgets `key`, provided it still leads to `index`.
    pub(crate) fn remove(&mut self, key: &FlowKey, index: u32) {
        if self.find(key) == Some(index) {
            self.table.remove(key);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }
}

/// Folded-multiply hash over 64-bit words: not cryptographic, but the seed is secret and a collision costs one compare.
#[derive(Clone, Copy)]
pub(crate) struct Seeded(pub(crate) u64);

impl BuildHasher for Seeded {
    type Hasher = Folded;

    fn build_hasher(&self) -> Folded {
        Folded(self.0 ^ 0x9E37_79B9_7F4A_7C15)
    }
}

/// The running state of [`Seeded`].
pub(crate) struct Folded(u64);

impl Hasher for Folded {
    fn write_u64(&mut self, word: u64) {
        // An odd constant with well spread bits (from wyhash); high and low half of the product are folded together.
        let product = u128::from(self.0 ^ word) * 0xA076_1D64_78BD_642F;
        self.0 = (product as u64 ^ (product >> 64) as u64)
            .rotate_left(23)
            .wrapping_add(0xE703_7ED1_A0B4_28DB);
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(source: &str, destination: &str) -> FlowKey {
        FlowKey::new(source.parse().unwrap(), destination.parse().unwrap())
    }

    #[test]
    fn a_key_gives_back_both_ends() {
        for (source, destination) in [
            ("10.0.0.1:1024", "192.0.2.7:443"),
            ("[fd00::1]:65535", "[2001:db8::2]:1"),
        ] {
            let key = key(source, destination);

            assert_eq!(key.source().to_string(), source);
            assert_eq!(key.destination().to_string(), destination);
        }
    }

    #[test]
    fn neighbouring_ports_spread_over_the_table() {
        let seeded = Seeded(7);
        let mut buckets = vec![0u32; 1024];
        for port in 0..10_240u32 {
            let source = format!("10.0.0.{}:{}", port / 4096, 1024 + port % 4096);
            buckets[(seeded.hash_one(key(&source, "10.1.2.3:80")) % 1024) as usize] += 1;
        }

        assert!(
            buckets.iter().all(|count| *count < 40),
            "longest chain {:?}",
            buckets.iter().max()
        );
    }

    #[test]
    fn removing_spares_a_newer_flow_with_the_same_ends() {
        let mut demux = Demux::new(1);
        let key = key("10.0.0.1:1", "10.0.0.2:2");
        demux.insert(key, 1);
        demux.insert(key, 2);

        demux.remove(&key, 1);

        assert_eq!(demux.find(&key), Some(2));
    }
}
