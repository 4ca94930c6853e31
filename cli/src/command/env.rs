//! `tp env`: the variables that make programs use a connection's proxy.

use std::collections::BTreeMap;
use std::process::ExitCode;

use crate::daemon::peers;
use crate::env_syntax::EnvSyntax;
use crate::report::{Failure, Output};

/// Print the proxy variables: `eval "$(tp env)"`
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// The connection [default: the only one]
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// For which shell or program
    #[arg(long, value_enum, default_value_t = EnvSyntax::Sh)]
    pub syntax: EnvSyntax,
}

/// Prints the variables.
///
/// # Errors
/// There is no such connection, or it does not answer.
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    let variables = peers::one(args.name.as_deref())?.variables().await?;
    let map: BTreeMap<&str, &str> = variables
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    output.print(&map, || args.syntax.write(&variables).text)?;
    Ok(ExitCode::SUCCESS)
}
