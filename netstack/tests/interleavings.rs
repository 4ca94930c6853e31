//! Any interleaving of sends, receives, loss and time delivers exactly the bytes, in order, or a reset.

#![allow(clippy::unwrap_used, reason = "a test that is surprised panics")]

mod support;

use std::time::Duration;

use proptest::prelude::*;
use support::{Impairment, Owner, Program, World};
use tp_netstack::Config;

/// One thing that happens; streams and their checks are those of `Owner` and `Program`.
#[derive(Clone, Debug)]
enum Step {
    OwnerSends(u32),
    ProgramSends(u32),
    OwnerReads(usize),
    OwnerPauses(bool),
    ProgramPauses(bool),
    Exchange,
    Wait(u16),
    OwnerResets,
    ProgramResets,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u32..60_000).prop_map(Step::OwnerSends),
        4 => (0u32..60_000).prop_map(Step::ProgramSends),
        2 => (1usize..20_000).prop_map(Step::OwnerReads),
        2 => any::<bool>().prop_map(Step::OwnerPauses),
        2 => any::<bool>().prop_map(Step::ProgramPauses),
        8 => Just(Step::Exchange),
        4 => (1u16..1500).prop_map(Step::Wait),
    ]
}

/// At most one reset, as the last thing.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let reset = prop_oneof![6 => Just(None), 1 => Just(Some(Step::OwnerResets)), 1 => Just(Some(Step::ProgramResets))];
    (prop::collection::vec(step(), 1..40), reset).prop_map(|(mut steps, reset)| {
        steps.extend(reset);
        steps
    })
}

fn apply(world: &mut World, owner: &mut Owner, program: &mut Program, step: &Step) {
    match *step {
        Step::OwnerSends(more) => {
            owner.to_send += u64::from(more);
            for flow in &mut owner.flows {
                flow.to_send += u64::from(more);
            }
        }
        Step::ProgramSends(more) => program.to_send += u64::from(more),
        Step::OwnerReads(chunk) => owner.chunk = chunk,
        Step::OwnerPauses(paused) => owner.paused = paused,
        Step::ProgramPauses(paused) => program.paused = paused,
        Step::Exchange => {
            world.exchange();
        }
        Step::Wait(millis) => {
            let until = world.now + Duration::from_millis(millis.into());
            while world.now < until {
                world.exchange();
                world.step(until - world.now);
            }
        }
        Step::OwnerResets => {
            world.heal();
            for flow in &mut owner.flows {
                world.stack.reset(flow.id);
                flow.reset = true;
            }
            // A full window puts the reset at its right edge, which RFC 9293 §3.10.7.4 calls outside, and this peer obeys
            // where the kernels do not. Who did not hear it hears it when he speaks next.
            let socket = world.host.socket(program.handle);
            socket.set_keep_alive(Some(smoltcp::time::Duration::from_secs(1)));
        }
        Step::ProgramResets => {
            world.heal();
            world.host.socket(program.handle).abort();
        }
    }
    owner.serve(world);
    program.pump(world);
    world.stack.check();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn deliver_exactly_the_bytes_or_a_reset(
        steps in steps(),
        seed in any::<u64>(),
        loss in 0u64..6,
        duplicate in 0u64..6,
        reorder in 0u64..10,
        delay in 0u64..30,
        window in 600usize..100_000,
        mtu in prop::sample::select(vec![576u16, 1500, 65_520]),
    ) {
        let impairment = Impairment { loss, duplicate, reorder, delay: Duration::from_millis(delay) };
        let config = Config { seed, mtu, ..Config::default() };
        let mut world = World::new(config, seed, impairment);
        let mut owner = Owner::new(0);
        // Neither side ends before the script is over.
        owner.waits_for_fin = true;
        let mut program = Program::connect(&mut world, 80, 0, window, window);
        program.finished = true;
        for step in &steps {
            apply(&mut world, &mut owner, &mut program, step);
        }
        // An owner can only reset a flow that has reached it.
        let was_reset = matches!(steps.last(), Some(Step::ProgramResets))
            || (matches!(steps.last(), Some(Step::OwnerResets)) && !owner.flows.is_empty());
        owner.paused = false;
        program.paused = false;
        program.finished = was_reset;

        let settled = world.run(Duration::from_secs(3600), |world| {
            owner.serve(world);
            program.pump(world);
            let delivered = owner.flows.iter().any(|flow| {
                flow.received == program.to_send && program.received == flow.to_send && flow.sent == flow.to_send
            });
            let ended = owner.flows.iter().any(|flow| flow.reset) && !world.host.socket(program.handle).is_active();
            if was_reset { ended || owner.flows.is_empty() } else { delivered }
        });

        prop_assert!(settled, "{:?} {program:?} in {:?}", owner.flows, program.state(&mut world));
        if let Some(flow) = owner.flows.first() {
            prop_assert!(program.received <= flow.sent && flow.received <= program.sent);
        }
    }
}
