//! The stack against a smoltcp host over a simulated link: no kernel, no real time, repeatable by seed.
#![allow(clippy::unwrap_used, reason = "a test that is surprised panics")]

mod support;

use std::time::Duration;

use smoltcp::socket::tcp::State;
use support::{Impairment, Owner, Program, World};
use tp_netstack::{Config, DialOutcome, Event, LONGEST_PACKET, Offload, Unreachable};

const MINUTES: Duration = Duration::from_secs(600);

fn world() -> World {
    World::new(
        Config {
            seed: 3,
            ..Config::default()
        },
        1,
        Impairment::default(),
    )
}

/// Runs one program and the owner until both have ended; panics if they do not.
fn run(world: &mut World, owner: &mut Owner, program: &mut Program) {
    let over = world.run(MINUTES, |world| {
        owner.serve(world);
        program.pump(world);
        owner.flows.iter().any(|flow| flow.closed || flow.reset) && program.is_over(world)
    });
    assert!(
        over,
        "still running: {:?} {program:?} in {:?}",
        owner.flows,
        program.state(world)
    );
}

#[test]
fn bytes_go_both_ways_and_both_ends_close() {
    let mut world = world();
    let mut owner = Owner::new(3_000_000);
    let mut program = Program::connect(&mut world, 80, 2_000_000, 65_536, 65_536);

    run(&mut world, &mut owner, &mut program);

    assert_eq!(program.received, 3_000_000);
    assert_eq!(owner.flows[0].received, 2_000_000);
    assert!(owner.flows[0].closed && owner.flows[0].peer_finished);
    assert_eq!(world.stack.flow_count(), 0);
}

#[test]
fn half_close_by_the_program_still_delivers_the_reply() {
    let mut world = world();
    let mut owner = Owner::new(1_000_000);
    owner.waits_for_fin = true;
    let mut program = Program::connect(&mut world, 80, 10, 65_536, 65_536);

    run(&mut world, &mut owner, &mut program);

    assert_eq!((program.received, owner.flows[0].received), (1_000_000, 10));
}

#[test]
fn half_close_by_the_owner_still_delivers_the_request() {
    let mut world = world();
    let mut owner = Owner::new(10);
    let mut program = Program::connect(&mut world, 80, 1_000_000, 65_536, 65_536);
    program.waits_for_fin = true;

    run(&mut world, &mut owner, &mut program);

    assert_eq!((program.received, owner.flows[0].received), (10, 1_000_000));
}

#[test]
fn a_refused_port_is_reset_before_any_syn_ack() {
    let mut world = world();
    let mut owner = Owner::new(0);
    owner.outcome = DialOutcome::Refused;
    let mut program = Program::connect(&mut world, 80, 1, 4096, 4096);
    let start = world.now;

    let over = world.run(MINUTES, |world| {
        owner.serve(world);
        program.pump(world);
        program.is_over(world)
    });

    assert!(
        over && world.now - start < Duration::from_secs(1),
        "not before the SYN was repeated"
    );
    assert_eq!(program.sent, 0);
    assert_eq!(world.stack.flow_count(), 0);
}

#[test]
fn a_syn_is_held_without_a_timer_until_the_dial_settles() {
    let mut world = world();
    let program = Program::connect(&mut world, 80, 1, 4096, 4096);
    world.exchange();
    let Some(Event::FlowOpened {
        id, destination, ..
    }) = world.stack.poll_event()
    else {
        panic!("no flow")
    };

    assert_eq!(destination, "198.51.100.7:80".parse().unwrap());
    assert_eq!(program.state(&mut world), State::SynSent);
    assert_eq!(world.stack.poll_timeout(), None);

    world
        .stack
        .dialed(id, DialOutcome::Accepted, world.now)
        .unwrap();
    world.exchange();
    assert_eq!(program.state(&mut world), State::Established);
    assert_eq!(world.stack.poll_event(), Some(Event::Writable(id)));
}

#[test]
fn a_dial_that_timed_out_is_silence_and_the_next_syn_tries_again() {
    let mut world = world();
    world.record = true;
    let program = Program::connect(&mut world, 80, 1, 4096, 4096);
    let mut owner = Owner::new(0);
    owner.outcome = DialOutcome::TimedOut;

    world.run(Duration::from_secs(4), |world| {
        owner.serve(world);
        false
    });

    assert!(owner.flows.len() >= 2, "{} dials", owner.flows.len());
    assert!(
        world.seen.iter().all(|(up, _)| *up),
        "the stack sent something"
    );
    assert_eq!(program.state(&mut world), State::SynSent);
}

#[test]
fn an_unreachable_destination_is_told_by_icmp_that_quotes_the_syn() {
    let mut world = world();
    world.record = true;
    let _program = Program::connect(&mut world, 80, 1, 4096, 4096);
    let mut owner = Owner::new(0);
    owner.outcome = DialOutcome::Unreachable(Unreachable::Host);

    world.exchange();
    owner.serve(&mut world);
    world.exchange();

    let syn = world.seen.iter().find(|(up, _)| *up).unwrap().1.clone();
    let icmp = world.seen.iter().find(|(up, _)| !*up).unwrap().1.clone();
    assert_eq!(
        (icmp[9], icmp[20], icmp[21]),
        (1, 3, 1),
        "destination unreachable, host"
    );
    assert_eq!(
        icmp[28 + 12..28 + 28],
        syn[12..28],
        "addresses, ports and sequence number of the SYN"
    );
}

#[test]
fn a_reset_by_the_program_reaches_the_owner_after_the_bytes_before_it() {
    let mut world = world();
    let mut owner = Owner::new(0);
    owner.waits_for_fin = true;
    let mut program = Program::connect(&mut world, 80, 5_000, 65_536, 65_536);
    program.waits_for_fin = true;
    assert!(world.run(MINUTES, |world| {
        program.pump(world);
        if program.sent == 5_000 {
            return true;
        }
        owner.serve(world);
        false
    }));
    world.exchange();
    world.host.socket(program.handle).abort();
    world.exchange();

    let mut bytes = 0;
    while let Some(event) = world.stack.poll_event() {
        let Event::Reset(id) = event else { continue };
        while let Ok(tp_netstack::Received::Data(taken)) = world.stack.recv(id, <[u8]>::len) {
            bytes += taken;
        }
        assert!(world.stack.recv(id, <[u8]>::len).is_err());
        world.stack.reset(id);
    }
    assert_eq!(bytes as u64 + owner.flows[0].received, 5_000);
    assert_eq!(world.stack.flow_count(), 0);
}

#[test]
fn a_reset_by_the_owner_reaches_the_program() {
    let mut world = world();
    let mut owner = Owner::new(1000);
    owner.waits_for_fin = true;
    let mut program = Program::connect(&mut world, 80, 1, 4096, 4096);
    program.waits_for_fin = true;
    assert!(world.run(MINUTES, |world| {
        owner.serve(world);
        program.pump(world);
        program.received == 1000
    }));

    world.stack.reset(owner.flows[0].id);
    world.exchange();

    assert_eq!(program.state(&mut world), State::Closed);
    assert_eq!(world.stack.flow_count(), 0);
}

#[test]
fn a_slow_owner_closes_the_window_and_loses_nothing() {
    let mut world = world();
    let mut owner = Owner::new(0);
    owner.waits_for_fin = true;
    owner.paused = true;
    let mut program = Program::connect(&mut world, 80, 2_000_000, 4096, 65_536);
    world.run(Duration::from_secs(30), |world| {
        owner.serve(world);
        program.pump(world);
        false
    });
    assert!(
        program.sent < 1_000_000,
        "the window is open: {}",
        program.sent
    );

    owner.paused = false;
    run(&mut world, &mut owner, &mut program);

    assert_eq!(owner.flows[0].received, 2_000_000);
}

#[test]
fn a_slow_program_holds_the_owner_back_and_gets_everything() {
    let mut world = world();
    let mut owner = Owner::new(2_000_000);
    let mut program = Program::connect(&mut world, 80, 0, 3_000, 4096);
    program.paused = true;
    program.waits_for_fin = true;
    world.run(Duration::from_secs(200), |world| {
        owner.serve(world);
        program.pump(world);
        false
    });
    assert!(owner.flows[0].sent < 1_000_000, "{}", owner.flows[0].sent);

    program.paused = false;
    run(&mut world, &mut owner, &mut program);

    assert_eq!(program.received, 2_000_000);
}

#[test]
fn unread_bytes_outlive_time_wait() {
    let mut world = world();
    let mut owner = Owner::new(0);
    owner.paused = true;
    let mut program = Program::connect(&mut world, 80, 5_000, 4096, 65_536);

    world.run(Duration::from_secs(60), |world| {
        owner.serve(world);
        program.pump(world);
        false
    });
    assert!(program.is_over(&mut world));
    owner.paused = false;
    owner.serve(&mut world);
    owner.serve(&mut world);

    assert_eq!(owner.flows[0].received, 5_000);
    assert!(owner.flows[0].closed);
}

#[test]
fn a_reply_that_is_finished_early_does_not_wait_for_window_probes() {
    let mut world = world();
    let mut owner = Owner::new(400_000);
    owner.waits_for_fin = true;
    let mut program = Program::connect(&mut world, 80, 100, 16_384, 16_384);
    let start = world.now;

    run(&mut world, &mut owner, &mut program);

    assert_eq!(program.received, 400_000);
    assert!(
        world.now - start < Duration::from_secs(1),
        "{:?}",
        world.now - start
    );
}

#[test]
fn a_flow_limit_refuses_the_next_flow_and_spares_the_others() {
    let mut world = World::new(
        Config {
            flows: 2,
            ..Config::default()
        },
        1,
        Impairment::default(),
    );
    let mut owner = Owner::new(500_000);
    owner.waits_for_fin = true;
    let mut programs: Vec<Program> = (0..3)
        .map(|port| Program::connect(&mut world, 80 + port, 100, 65_536, 65_536))
        .collect();

    world.run(Duration::from_secs(5), |world| {
        owner.serve(world);
        programs.iter_mut().for_each(|program| program.pump(world));
        false
    });

    assert_eq!(
        programs
            .iter()
            .map(|program| program.received)
            .collect::<Vec<_>>(),
        [500_000, 500_000, 0]
    );
    assert_eq!(world.stack.counters().refused, 1);
    assert_eq!(programs[2].state(&mut world), State::Closed);
}

#[test]
fn a_lossy_link_delays_bytes_and_loses_none() {
    for seed in 0..8 {
        let delay = Duration::from_millis(2);
        let impairment = Impairment {
            loss: 3,
            duplicate: 2,
            reorder: 5,
            delay,
        };
        let mut world = World::new(
            Config {
                seed,
                ..Config::default()
            },
            seed,
            impairment,
        );
        let mut owner = Owner::new(200_000);
        let mut program = Program::connect(&mut world, 80, 200_000, 65_536, 65_536);

        // The host is smoltcp as it comes, which may forget its own FIN: only ours has to arrive.
        let ended = world.run(MINUTES, |world| {
            owner.serve(world);
            program.pump(world);
            let finished = !world.host.socket(program.handle).may_recv();
            finished && owner.flows.iter().any(|flow| flow.received == 200_000)
        });

        assert!(
            ended,
            "seed {seed}: {:?} {program:?} in {:?}",
            owner.flows,
            program.state(&mut world)
        );
        assert_eq!(
            (program.received, owner.flows[0].received),
            (200_000, 200_000),
            "seed {seed}"
        );
    }
}

/// Hands a packet of the host's to the stack once more; what the stack says to it.
fn repeat(world: &mut World, packet: &[u8]) -> Option<Vec<u8>> {
    world
        .stack
        .handle_packet(world.now, packet, Offload::default());
    let mut buffer = vec![0; LONGEST_PACKET];
    let (len, _) = world.stack.poll_packet(world.now, &mut buffer)?;
    Some(buffer[..len].to_vec())
}

const FIN: u8 = 1;
const RST: u8 = 4;

#[test]
fn a_fin_repeated_after_the_end_is_acknowledged_for_ten_seconds_and_then_refused() {
    let mut world = world();
    world.record = true;
    let mut owner = Owner::new(10);
    let mut program = Program::connect(&mut world, 80, 10, 4096, 4096);
    program.waits_for_fin = true;
    run(&mut world, &mut owner, &mut program);
    let fin = world
        .seen
        .iter()
        .rev()
        .find(|(up, packet)| *up && packet[33] & FIN != 0)
        .unwrap()
        .1
        .clone();
    let last = world
        .seen
        .iter()
        .rev()
        .find(|(up, _)| !*up)
        .unwrap()
        .1
        .clone();
    assert_eq!(world.stack.flow_count(), 0);

    let answer = repeat(&mut world, &fin).unwrap();
    assert_eq!(
        answer[24..34],
        last[24..34],
        "the last acknowledgement once more"
    );

    world.now += Duration::from_secs(11);
    assert_eq!(repeat(&mut world, &fin).unwrap()[33] & RST, RST);
}

#[test]
fn memory_that_is_spent_refuses_new_flows_and_spares_the_old() {
    let config = Config {
        memory: 96 << 10,
        ..Config::default()
    };
    let mut world = World::new(config, 1, Impairment::default());
    let mut owner = Owner::new(100_000);
    owner.waits_for_fin = true;
    let mut programs: Vec<Program> = (0..5)
        .map(|port| Program::connect(&mut world, 80 + port, 100_000, 65_536, 65_536))
        .collect();

    world.run(Duration::from_secs(30), |world| {
        owner.serve(world);
        programs.iter_mut().for_each(|program| program.pump(world));
        false
    });

    let received: Vec<u64> = programs.iter().map(|program| program.received).collect();
    assert_eq!(received, [100_000, 100_000, 100_000, 0, 0]);
    assert_eq!(world.stack.counters().refused, 2);
}

#[test]
fn packets_that_lie_are_counted_and_dropped() {
    let mut world = world();
    world.record = true;
    let _program = Program::connect(&mut world, 80, 1, 4096, 4096);
    world.exchange();
    let syn = world.seen[0].1.clone();
    let flows = world.stack.flow_count();
    let lie = |at: usize, value: u8, sealed: bool| {
        let mut packet = syn.clone();
        packet[at] = value;
        if sealed {
            packet[10..12].fill(0);
            let sum = !smoltcp::wire::checksum::data(&packet[..20]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        packet
    };
    let before = world.stack.counters();

    for packet in [
        vec![],
        vec![0x45],
        lie(0, 0x4F, true),
        lie(0, 0x75, false),
        lie(3, 255, true),
        syn[..30].to_vec(),
    ] {
        assert_eq!(repeat(&mut world, &packet), None);
    }
    assert_eq!(world.stack.counters().malformed, before.malformed + 6);

    // The IPv4 header's checksum, TCP's own, and a data offset past the segment.
    for packet in [lie(8, 1, false), lie(27, 9, false), lie(32, 0xF0, false)] {
        assert_eq!(repeat(&mut world, &packet), None);
    }
    assert_eq!(world.stack.counters().bad_checksum, before.bad_checksum + 3);
    assert_eq!(world.stack.flow_count(), flows);
    world.stack.check();
}

#[test]
fn a_segment_of_no_flow_is_refused_and_a_reset_is_not_answered() {
    let mut world = world();
    world.record = true;
    let mut owner = Owner::new(10);
    let mut program = Program::connect(&mut world, 80, 10, 4096, 4096);
    run(&mut world, &mut owner, &mut program);
    let data = world
        .seen
        .iter()
        .find(|(up, packet)| *up && packet.len() > 40 && packet[33] & 2 == 0)
        .unwrap()
        .1
        .clone();
    let mut other = World::new(Config::default(), 1, Impairment::default());

    let answer = repeat(&mut other, &data).unwrap();
    assert_eq!(answer[33] & RST, RST);
    assert_eq!(
        answer[24..28],
        data[28..32],
        "sequence number = what the segment acknowledged"
    );
    let mut turned = answer.clone();
    turned[12..16].copy_from_slice(&answer[16..20]);
    turned[16..20].copy_from_slice(&answer[12..16]);
    assert_eq!(repeat(&mut other, &turned), None);
    assert_eq!(other.stack.counters().stray, 2);
}
