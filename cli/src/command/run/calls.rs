//! `tp run` by answering the program's system calls.

use std::process::ExitCode;

use super::Args;
use crate::command::child::{self, Signals};
use crate::command::connect::before_command;
use crate::report::{self, Failure, OrFail};
use crate::run::explain;
use crate::run::lease::From;
use crate::run::link::{Carrying, Link};
use crate::run::namespace::NotRun;
use crate::run::notify::program::{Kept, Starting};

/// Runs it this way or not at all.
pub(super) async fn run(args: &Args) -> Result<ExitCode, Failure> {
    if let Some(why) = args.unfit_for_calls() {
        return Err(
            Failure::new("`--method notify` cannot do what was asked for")
                .because(why)
                .exit(report::USAGE),
        );
    }
    let mut signals = Signals::watch()?;
    // At the same time as the connection.
    let starting = Starting::start(&args.command, &args.given, child::open_files())
        .or_fail(|| "cannot start a process".to_owned())?;
    let link = args.link(&mut signals).await?;
    match starting.ready() {
        Ok((kept, descriptors)) => live(args, link, kept, descriptors, &mut signals).await,
        Err(refused) => {
            link.end().await;
            Err(explain::failure(
                "the program's system calls cannot be answered here",
                &refused,
            ))
        }
    }
}

/// From the program's start until nothing is left of it.
pub(super) async fn live(
    args: &Args,
    link: Link,
    mut kept: Kept,
    descriptors: Vec<std::os::fd::OwnedFd>,
    signals: &mut Signals,
) -> Result<ExitCode, Failure> {
    let wanted = args.wanted(From::Calls {
        namespace: args.namespace.clone(),
    });
    let mut carrying = match link.carry(&wanted, descriptors).await {
        Ok(carrying) => carrying,
        Err(failure) => {
            kept.end().await;
            return Err(failure);
        }
    };
    let code = match kept.go().await {
        Ok(()) => attend(&kept, &mut carrying, signals).await,
        Err(NotRun::Program(error)) => Err(child::not_started(&args.command[0], &error)),
        Err(NotRun::Other(error)) => {
            Err(Failure::new("the program was not started").caused_by(&error))
        }
    };
    kept.end().await;
    carrying.end(child::ended_well(&code)).await;
    code.map_err(before_command)
}

/// Waits for the program. A connection that ends under it is said and is not its end.
async fn attend(
    kept: &Kept,
    carrying: &mut Carrying,
    signals: &mut Signals,
) -> Result<ExitCode, Failure> {
    let mut connected = true;
    loop {
        tokio::select! {
            // First, since a program may end because its connection did.
            biased;
            failure = carrying.ended(), if connected => {
                connected = false;
                failure.print();
                // Its flows are being reset, which takes no time worth saying.
                carrying.released().await;
            }
            ended = kept.ended() => {
                let (status, left) = ended.or_fail(|| "the process beside the program has gone".to_owned())?;
                child::note_left(left);
                return Ok(child::exit_code(status));
            }
            signal = signals.next() => {
                if !child::heard_already(signal) {
                    kept.signal(signal).await;
                }
            }
        }
    }
}
