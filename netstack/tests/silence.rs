//! A program's machine that vanishes without a word, and one that has to be asked.
#![allow(clippy::unwrap_used, reason = "a test that is surprised panics")]

mod support;

use std::time::{Duration, Instant};

use smoltcp::wire::TcpControl;
use support::packets::{answers, say, segment, segment_with_window, tcp};
use support::{Impairment, Owner, Program, World};
use tp_netstack::{Config, DialOutcome, Event, Stack};

/// Longer than the user timeout, and not twice as long.
const LATE: Duration = Duration::from_secs(300);
const EARLY: Duration = Duration::from_secs(120);

fn world() -> World {
    World::new(Config::default(), 1, Impairment::default())
}

/// Runs until the program has received this much.
fn run_until(world: &mut World, owner: &mut Owner, program: &mut Program, received: u64) {
    let got_there = world.run(LATE, |world| {
        owner.serve(world);
        program.pump(world);
        program.received >= received
    });
    assert!(got_there, "only {} bytes", program.received);
}

fn run_for(world: &mut World, owner: &mut Owner, time: Duration) {
    world.run(time, |world| {
        owner.serve(world);
        owner.flows[0].reset
    });
}

#[test]
fn a_flow_whose_program_vanished_is_given_up_and_its_owner_told() {
    let mut world = world();
    let mut owner = Owner::new(3_000_000);
    let mut program = Program::connect(&mut world, 80, 10, 65_536, 65_536);
    run_until(&mut world, &mut owner, &mut program, 100_000);

    world.cut();
    run_for(&mut world, &mut owner, EARLY);
    assert!(!owner.flows[0].reset, "given up early");
    run_for(&mut world, &mut owner, LATE);

    assert!(owner.flows[0].reset);
    assert_eq!(world.stack.flow_count(), 0);
}

#[test]
fn a_flow_that_is_only_idle_is_kept() {
    let mut world = world();
    let mut owner = Owner::new(3_000);
    owner.waits_for_fin = true;
    let mut program = Program::connect(&mut world, 80, 10, 65_536, 65_536);
    program.waits_for_fin = true;
    run_until(&mut world, &mut owner, &mut program, 3_000);

    run_for(&mut world, &mut owner, 4 * LATE);

    assert!(!owner.flows[0].reset);
    assert_eq!(world.stack.flow_count(), 1);
}

/// An acknowledgement that was overtaken by a newer one closes the window again, and what was on its way is lost.
#[test]
fn a_window_that_was_closed_over_lost_bytes_is_asked_for() {
    let mut now = Instant::now();
    let mut stack = Stack::new(Config::default(), now);
    say(&mut stack, now, &segment(TcpControl::Syn, 0, None, &[]));
    let Some(Event::FlowOpened { id, .. }) = stack.poll_event() else {
        panic!("no flow")
    };
    stack.dialed(id, DialOutcome::Accepted, now).unwrap();
    let syn_ack = answers(&mut stack, now).remove(0);
    let first = (tcp(&syn_ack).seq_number() + 1).0 as u32;
    let acknowledges = |window| segment_with_window(TcpControl::None, 1, Some(first), window, &[]);
    say(&mut stack, now, &acknowledges(60_000));
    let sent = stack.send(id, |space| {
        space[..1000].fill(7);
        1000
    });
    assert_eq!(sent, Ok(1000));
    assert_eq!(
        answers(&mut stack, now).len(),
        1,
        "the bytes, which get lost"
    );

    say(&mut stack, now, &acknowledges(0));
    let mut asked = Vec::new();
    while asked.is_empty() {
        now = stack.poll_timeout().expect("something is due");
        stack.handle_timeout(now);
        asked = answers(&mut stack, now);
    }
    assert!(
        !stack
            .poll_event()
            .is_some_and(|event| matches!(event, Event::Reset(_)))
    );
    let again = say(&mut stack, now, &acknowledges(60_000));

    assert_eq!(tcp(&again[0]).payload(), &[7; 1000]);
}
