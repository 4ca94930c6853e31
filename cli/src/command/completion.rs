//! `tp completion`: the script that makes a shell complete our commands and flags.

use std::process::ExitCode;

use clap_complete::{Shell, generate};

use crate::report::{self, Failure, Output};

/// Print a completion script
///
/// For bash: `source <(tp completion bash)` in ~/.bashrc. For fish: `tp completion fish | source`.
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// The shell
    #[arg(value_enum)]
    pub shell: Shell,
}

/// Prints the script of `command`, the whole command line as clap knows it.
///
/// # Errors
/// When stdout cannot be written.
pub async fn run(
    args: Args,
    _output: &Output,
    mut command: clap::Command,
) -> Result<ExitCode, Failure> {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    generate(args.shell, &mut command, name, &mut script);
    report::write_out(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}
