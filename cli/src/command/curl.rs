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
    let variables = variables(args.name.as_deref())
        .await
        .map_err(|failure| failure.exit(BEFORE_COMMAND))?;
    let program = OsString::from("curl");
    let error = Command::new(&program)
        .envs(through_socks(&variables)?)
        .args(args.arguments)
        .exec();
    Err(child::not_started(&program, &error))
}

async fn variables(name: Option<&str>) -> Result<Vec<(String, String)>, Failure> {
    peers::one(name)?.variables().await
}

/// The variables with SOCKS for every scheme, so that one way serves all. They may hold a password, which every user
/// of the machine could read among curl's arguments.
fn through_socks(variables: &[(String, String)]) -> Result<Vec<(String, String)>, Failure> {
    let socks = variables.iter().find(|(name, _)| name == "ALL_PROXY");
    let (_, url) = socks.ok_or_else(|| Failure::new("the daemon names no proxy"))?;
    let routed = |(name, value): &(String, String)| {
        let value = match name.eq_ignore_ascii_case("NO_PROXY") {
            true => value,
            false => url,
        };
        (name.clone(), value.clone())
    };
    Ok(variables.iter().map(routed).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scheme_takes_socks_and_loopback_stays_direct() {
        let given = [
            ("ALL_PROXY", "socks5h://ada:secret@127.0.0.1:1080"),
            ("http_proxy", "http://ada:secret@127.0.0.1:1080"),
            ("no_proxy", "localhost"),
        ];
        let given = given.map(|(name, value)| (name.to_owned(), value.to_owned()));

        let routed = through_socks(&given).unwrap();

        let values: Vec<_> = routed.iter().map(|(_, value)| value.as_str()).collect();
        assert_eq!(values, [given[0].1.as_str(), &given[0].1, "localhost"]);
    }
}
