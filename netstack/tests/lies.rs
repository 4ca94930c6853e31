//! Packets that contradict themselves: each is counted under the right name, answered by nothing, and leaves nothing
//! behind. One row a lie.
#![allow(clippy::unwrap_used, reason = "a test that is surprised panics")]

mod support;

use std::time::Instant;

use smoltcp::wire::{IpProtocol, TcpControl, checksum};
use support::packets::{
    DESTINATION, DESTINATION_V6, PROGRAM, PROGRAM_V6, altered, answers, datagram, icmp, ip, say,
    segment,
};
use tp_netstack::{Checksum, Config, Counters, IpVersion, Offload, Segments, Stack};

fn syn() -> Vec<u8> {
    segment(TcpControl::Syn, 1, None, &[])
}

/// Changes the transport of a packet, and makes its checksum right again.
fn resealed(packet: Vec<u8>, at: usize, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    altered(packet, |packet| {
        let transport = &mut packet[20..];
        change(transport);
        transport[at..at + 2].fill(0);
        let protocol = if at == 16 {
            IpProtocol::Tcp
        } else {
            IpProtocol::Udp
        };
        let pseudo = checksum::pseudo_header(
            &PROGRAM.into(),
            &DESTINATION.into(),
            protocol,
            transport.len() as u32,
        );
        let sum = !checksum::combine(&[pseudo, checksum::data(transport)]);
        transport[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    })
}

const TCP_SUM: usize = 16;
const UDP_SUM: usize = 6;

/// A SYN with four bytes of options after the MSS.
fn with_options(options: [u8; 4]) -> Vec<u8> {
    let longer = altered(syn(), |packet| {
        packet.extend_from_slice(&options);
        let total = packet.len() as u16;
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        packet[32] += 0x10;
    });
    resealed(longer, TCP_SUM, |_| {})
}

fn fragment(offset: u16, more: bool, length: usize) -> Vec<u8> {
    let whole = ip(PROGRAM, DESTINATION, IpProtocol::Udp, &vec![7; length]);
    altered(whole, |packet| {
        let field = (offset / 8) | if more { 0x2000 } else { 0 };
        packet[4..6].copy_from_slice(&[9, 9]);
        packet[6..8].copy_from_slice(&field.to_be_bytes());
    })
}

fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
    ip(PROGRAM_V6, DESTINATION_V6, IpProtocol::from(next), payload)
}

/// What counts a packet.
type Count = fn(&Counters) -> u64;

#[test]
fn each_lie_is_counted_by_its_name_and_answered_by_nothing() {
    let malformed: Count = |counters| counters.malformed;
    let bad_checksum: Count = |counters| counters.bad_checksum;
    let bad_fragment: Count = |counters| counters.bad_fragment;
    let group: Count = |counters| counters.group;
    let rows: Vec<(&str, Count, Vec<Vec<u8>>)> = vec![
        ("nothing", malformed, vec![vec![]]),
        ("no IP", malformed, vec![vec![0x75; 60]]),
        ("half a header", malformed, vec![syn()[..19].to_vec()]),
        (
            "a header longer than the packet",
            malformed,
            vec![altered(syn(), |p| p[0] = 0x4F)],
        ),
        (
            "a header shorter than any",
            malformed,
            vec![altered(syn(), |p| p[0] = 0x44)],
        ),
        (
            "a length past the bytes",
            malformed,
            vec![altered(syn(), |p| p[3] = 255)],
        ),
        (
            "a length before the header's end",
            malformed,
            vec![altered(syn(), |p| p[3] = 19)],
        ),
        (
            "a header's wrong sum",
            bad_checksum,
            vec![{
                let mut p = syn();
                p[8] ^= 1;
                p
            }],
        ),
        (
            "from nowhere",
            malformed,
            vec![altered(syn(), |p| p[12..16].fill(0))],
        ),
        (
            "from loopback",
            malformed,
            vec![altered(syn(), |p| {
                p[12..16].copy_from_slice(&[127, 0, 0, 1])
            })],
        ),
        (
            "from everybody",
            malformed,
            vec![altered(syn(), |p| p[12..16].fill(255))],
        ),
        (
            "to everybody",
            group,
            vec![altered(syn(), |p| p[16..20].fill(255))],
        ),
        (
            "TCP with a wrong sum",
            bad_checksum,
            vec![altered(syn(), |p| p[27] ^= 1)],
        ),
        (
            "a data offset past the segment",
            bad_checksum,
            vec![resealed(syn(), TCP_SUM, |t| t[12] = 0xF0)],
        ),
        (
            "a data offset inside the header",
            bad_checksum,
            vec![resealed(syn(), TCP_SUM, |t| t[12] = 0x40)],
        ),
        (
            "half a TCP header",
            bad_checksum,
            vec![ip(PROGRAM, DESTINATION, IpProtocol::Tcp, &syn()[20..30])],
        ),
        (
            "port 0",
            malformed,
            vec![resealed(syn(), TCP_SUM, |t| t[2..4].fill(0))],
        ),
        (
            "an option of no length",
            malformed,
            vec![with_options([3, 0, 7, 1])],
        ),
        (
            "an option longer than the header",
            malformed,
            vec![with_options([3, 40, 7, 1])],
        ),
        (
            "an MSS of the wrong length",
            malformed,
            vec![with_options([2, 3, 9, 1])],
        ),
        (
            "UDP with a wrong sum",
            bad_checksum,
            vec![altered(datagram(b"ask"), |p| p[30] ^= 1)],
        ),
        (
            "UDP longer than its packet",
            bad_checksum,
            vec![resealed(datagram(b"ask"), UDP_SUM, |t| t[5] = 99)],
        ),
        (
            "UDP shorter than its header",
            bad_checksum,
            vec![resealed(datagram(b"ask"), UDP_SUM, |t| t[5] = 7)],
        ),
        (
            "half a UDP header",
            bad_checksum,
            vec![ip(PROGRAM, DESTINATION, IpProtocol::Udp, &[0, 1, 0])],
        ),
        (
            "a ping's wrong sum",
            bad_checksum,
            vec![altered(icmp(8, 0, [0; 4], b"x"), |p| p[28] ^= 1)],
        ),
        (
            "half a ping",
            malformed,
            vec![ip(
                PROGRAM,
                DESTINATION,
                IpProtocol::Icmp,
                &[8, 0, 0xF7, 0xFF],
            )],
        ),
        (
            "a fragment that overlaps",
            bad_fragment,
            vec![fragment(0, true, 64), fragment(56, true, 64)],
        ),
        (
            "a fragment past the longest packet",
            bad_fragment,
            vec![fragment(65_528, false, 64)],
        ),
        (
            "a middle fragment of odd length",
            bad_fragment,
            vec![fragment(0, true, 63)],
        ),
        (
            "fragments with two ends",
            bad_fragment,
            vec![fragment(64, false, 8), fragment(128, false, 8)],
        ),
        (
            "IPv6 with a length past the bytes",
            malformed,
            vec![{
                let mut p = v6(17, &[0; 8]);
                p[5] = 99;
                p
            }],
        ),
        (
            "an extension header past the end",
            malformed,
            vec![v6(0, &[17, 9, 0, 0, 0, 0, 0, 0])],
        ),
        (
            "extension headers without end",
            malformed,
            vec![v6(0, &[[0; 8]; 20].concat())],
        ),
        (
            "half a fragment header",
            malformed,
            vec![v6(44, &[17, 0, 0, 1])],
        ),
        (
            "UDP over IPv6 without a sum",
            bad_checksum,
            vec![v6(17, &[1, 2, 3, 4, 0, 8, 0, 0])],
        ),
        (
            "IPv4 in IPv6's clothes",
            malformed,
            vec![ip(
                "::ffff:10.0.0.1".parse().unwrap(),
                DESTINATION_V6,
                IpProtocol::Udp,
                &[0; 8],
            )],
        ),
    ];
    for (lie, count, packets) in rows {
        let now = Instant::now();
        let mut stack = Stack::new(Config::default(), now);
        for packet in &packets {
            assert_eq!(say(&mut stack, now, packet), Vec::<Vec<u8>>::new(), "{lie}");
            stack.check();
        }
        assert_eq!(count(&stack.counters()), 1, "{lie}: {:?}", stack.counters());
        assert_eq!(stack.poll_event(), None, "{lie}");
        assert_eq!(
            (stack.flow_count(), stack.association_count()),
            (0, 0),
            "{lie}"
        );
    }
}

#[test]
fn a_device_that_lies_about_its_offload_is_not_believed() {
    let partial = |start, offset| Offload {
        checksum: Checksum::Partial { start, offset },
        segments: None,
    };
    let segments = Segments {
        version: IpVersion::V4,
        size: 0,
        header: 40,
    };
    let none = Offload {
        checksum: Checksum::Verified,
        segments: Some(segments),
    };
    for offload in [
        partial(u16::MAX, 16),
        partial(20, u16::MAX),
        partial(40, 4),
        none,
    ] {
        let now = Instant::now();
        let mut stack = Stack::new(Config::default(), now);

        stack.handle_packet(now, &syn(), offload);

        assert_eq!(stack.counters().malformed, 1, "{offload:?}");
        assert!(answers(&mut stack, now).is_empty() && stack.flow_count() == 0);
    }
}

#[test]
fn a_lying_segment_of_a_live_flow_does_not_disturb_it() {
    let now = Instant::now();
    let mut stack = Stack::new(Config::default(), now);
    say(&mut stack, now, &syn());
    assert_eq!(stack.flow_count(), 1);
    while stack.poll_event().is_some() {}

    for lie in [with_options([3, 0, 7, 1]), altered(syn(), |p| p[27] ^= 1)] {
        assert!(say(&mut stack, now, &lie).is_empty());
        assert_eq!(stack.poll_event(), None);
    }

    assert_eq!(stack.flow_count(), 1);
    assert_eq!(
        (stack.counters().malformed, stack.counters().bad_checksum),
        (1, 1)
    );
    stack.check();
}
