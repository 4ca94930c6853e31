//! What a packet costs in the core alone: no device, no root. The figures that matter are ratios: a packet of one flow
//! among thousands against a packet of the only flow.

#![allow(
    missing_docs,
    reason = "criterion's macros make public functions without"
)]
#![allow(clippy::unwrap_used, reason = "a benchmark that is surprised panics")]

#[path = "support/mod.rs"]
mod support;

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use support::{Bench, PROMISED, header};

fn flows(criterion: &mut Criterion) {
    for count in [1, 100, 10_000, 50_000] {
        let mut bench = Bench::new(count);
        for _ in 0..count * 2 {
            bench.echo();
        }
        criterion.bench_function(&format!("echo_64_bytes/{count}_flows"), |bencher| {
            bencher.iter(|| bench.echo())
        });
        criterion.bench_function(&format!("acknowledgement/{count}_flows"), |bencher| {
            bencher.iter(|| bench.acknowledge())
        });
    }
}

fn bulk(criterion: &mut Criterion) {
    let len = 65_480;
    let payload = vec![7; len];
    let mut group = criterion.benchmark_group("bulk_one_flow");
    group.throughput(Throughput::Bytes(len as u64));
    let mut bench = Bench::new(1);
    group.bench_function("receive_64k", |bencher| bencher.iter(|| bench.receive(len)));
    let mut bench = Bench::new(1);
    group.bench_function("transmit_64k", |bencher| {
        bencher.iter(|| bench.transmit(len, &payload))
    });
}

fn connections(criterion: &mut Criterion) {
    for count in [0, 10_000] {
        let mut bench = Bench::new(count);
        let mut number = 100_000;
        criterion.bench_function(&format!("syn_to_accept/beside_{count}_flows"), |bencher| {
            bencher.iter(|| {
                number += 1;
                bench.accept(number);
            });
        });
    }
}

fn datagrams(criterion: &mut Criterion) {
    let mut bench = Bench::new(0);
    let mut packet = header();
    packet[9] = 17;
    packet.extend([0, 72, 0, 0]);
    packet.resize(20 + 72, 0x33);
    packet[2..4].copy_from_slice(&92u16.to_be_bytes());
    let sum: u32 = packet[..20]
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let sum = (sum & 0xFFFF) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    criterion.bench_function("udp_echo_64_bytes", |bencher| {
        bencher.iter(|| {
            bench.stack.handle_packet(bench.now, &packet, PROMISED);
            while let Some(event) = bench.stack.poll_event() {
                black_box(event);
            }
            let mut payload = [0; 64];
            let id = bench.stack.recv_datagram(|id, bytes| {
                payload.copy_from_slice(bytes);
                id
            });
            bench.stack.send_datagram(id.unwrap(), &payload).unwrap();
            black_box(bench.stack.poll_packet(bench.now, &mut bench.buffer)).unwrap();
        });
    });
}

criterion_group!(benches, flows, bulk, connections, datagrams);
criterion_main!(benches);
