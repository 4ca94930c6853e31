//! How long a transfer takes over links from good to bad, in simulated time, as a table in `sweep.txt`. A change of TCP's
//! behaviour shows as a readable diff. `UPDATE_SNAPSHOT=1 cargo test -p tp-netstack --test sweep` writes it anew.

#![allow(clippy::unwrap_used, reason = "a test that is surprised panics")]

mod support;

use std::fmt::Write;
use std::time::Duration;

use support::{Impairment, Owner, Program, World};
use tp_netstack::Config;

const BYTES: u64 = 400_000;

/// Milliseconds until all bytes have gone down (to the program) or up.
fn transfer(loss: u64, delay: u64, window: usize, down: bool) -> u128 {
    let impairment = Impairment {
        loss,
        duplicate: loss,
        reorder: loss,
        delay: Duration::from_millis(delay),
    };
    let mut world = World::new(
        Config {
            seed: 7,
            ..Config::default()
        },
        7 + loss + delay,
        impairment,
    );
    let mut owner = Owner::new(if down { BYTES } else { 0 });
    owner.waits_for_fin = true;
    let mut program =
        Program::connect(&mut world, 80, if down { 0 } else { BYTES }, window, window);
    program.finished = true;
    let start = world.now;
    let done = world.run(Duration::from_secs(3600), |world| {
        owner.serve(world);
        program.pump(world);
        owner
            .flows
            .iter()
            .any(|flow| program.received + flow.received == BYTES)
    });
    assert!(
        done,
        "loss {loss} %, delay {delay} ms, window {window}: {:?} {program:?}",
        owner.flows
    );
    (world.now - start).as_millis()
}

#[test]
fn transfers_take_as_long_as_they_did() {
    let mut table =
        String::from("400 kB, simulated ms; loss = duplication = reordering; delay one way\n");
    writeln!(
        table,
        "{:>6} {:>6} {:>7} {:>9} {:>9}",
        "loss %", "delay", "window", "down", "up"
    )
    .unwrap();
    for loss in [0, 1, 4] {
        for delay in [0, 5, 40] {
            for window in [8_192, 65_536, 1_000_000] {
                let (down, up) = (
                    transfer(loss, delay, window, true),
                    transfer(loss, delay, window, false),
                );
                writeln!(table, "{loss:>6} {delay:>6} {window:>7} {down:>9} {up:>9}").unwrap();
            }
        }
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sweep.txt");
    if std::env::var_os("UPDATE_SNAPSHOT").is_some() {
        std::fs::write(path, &table).unwrap();
    }
    assert_eq!(table, std::fs::read_to_string(path).unwrap_or_default());
}
