//! The workstation side of `tp`: commands, daemon, capture.
//!
//! [`run()`] is the whole program but for its exit code.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

pub mod command;
pub mod daemon;
pub mod env_syntax;
mod huge_pages;
pub mod install;
pub mod intercept;
pub mod kubeconfig;
pub mod proxy;
pub mod report;
#[cfg(target_os = "linux")]
pub mod run;
pub mod temporary;

use command::CommandLine;
use report::{Failure, OrFail};

/// Threads that carry traffic: one for the tunnel's end, one for the local programs'.
const WORKERS: usize = 2;

/// Runs one command line, the program's name first.
///
/// # Errors
/// What the command could not do. A wrong command line ends the process here, as clap does it.
pub fn run(arguments: Vec<OsString>) -> Result<ExitCode, Failure> {
    let is_daemon = arguments
        .get(1)
        .is_some_and(|first| first == daemon::background::COMMAND);
    if is_daemon {
        daemon::sys::close_inherited();
    }
    #[cfg(target_os = "linux")]
    if arguments
        .get(1)
        .is_some_and(|first| first == run::inside::COMMAND)
    {
        return Ok(run::inside::run(&arguments[2..]));
    }
    #[cfg(target_os = "linux")]
    if arguments
        .get(1)
        .is_some_and(|first| first == run::notify::keeper::COMMAND)
    {
        return Ok(run::notify::keeper::run(&arguments[2..]));
    }
    let line = parse(arguments);
    let mut runtime = if line.carries_traffic() {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime
            .worker_threads(WORKERS)
            .event_interval(tp_tunnel::carrier::EVENT_INTERVAL);
        runtime
    } else {
        tokio::runtime::Builder::new_current_thread()
    };
    let runtime = runtime
        .enable_all()
        .build()
        .or_fail(|| "cannot start".to_owned())?;
    runtime.block_on(line.run())
}

/// As `kubectl-tp` it is kubectl's plugin, and its usage reads `kubectl tp`.
fn parse(arguments: Vec<OsString>) -> CommandLine {
    let program = arguments
        .first()
        .map(std::path::Path::new)
        .and_then(std::path::Path::file_stem);
    let mut command = CommandLine::command();
    if program.is_some_and(|name| name == "kubectl-tp") {
        command = command.bin_name("kubectl tp");
    }
    let matches = command.get_matches_from(arguments);
    CommandLine::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}
