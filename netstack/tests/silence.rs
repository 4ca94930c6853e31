//! A program's machine that vanishes without a word.
#![allow(clippy::unwrap_used, reason = "a test that is surprised panics")]

mod support;

use std::time::Duration;

use support::{Impairment, Owner, Program, World};
use tp_netstack::Config;

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
