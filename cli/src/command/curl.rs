//! `tp curl`: curl through a connection's proxy.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use super::child;
use crate::daemon::peers;
use crate::report::{BEFORE_COMMAND, Failure, Output};

/// Run curl through a connection
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// The connection [default: the only one]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Arguments of curl; put `--` before them when the first one is also a flag of tp
    #[arg(
        value_name = "ARGUMENTS",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub arguments: Vec<OsString>,
}

/// Becomes curl: its exit code, signals and terminal are its own.
///
/// # Errors
/// There is no such connection, or no curl.
pub async fn run(args: Args, _output: &Output) -> Result<ExitCode, Failure> {
    let proxy = socks_url(args.name.as_deref())
        .await
        .map_err(|failure| failure.exit(BEFORE_COMMAND))?;
    let program = OsString::from("curl");
    let error = Command::new(&program)
        .arg("--proxy")
        .arg(proxy)
        .args(args.arguments)
        .exec();
    Err(child::not_started(&program, &error))
}

async fn socks_url(name: Option<&str>) -> Result<String, Failure> {
    let variables = peers::one(name)?.variables().await?;
    let socks = variables.into_iter().find(|(name, _)| name == "ALL_PROXY");
    let (_, url) = socks.ok_or_else(|| Failure::new("the daemon names no proxy"))?;
    Ok(url)
}
