//! The command line: one file a command, and the list of them.

mod child;
pub mod completion;
pub mod connect;
pub mod curl;
pub mod env;
pub mod explain;
pub mod install;
pub mod intercept;
pub mod key;
pub mod leave;
pub mod list;
pub mod list_contexts;
pub mod list_namespaces;
mod manager_args;
mod place;
pub mod quit;
#[cfg(target_os = "linux")]
pub mod run;
pub mod status;
pub mod uninstall;
pub mod upgrade;
pub mod version;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::daemon::background;
use crate::report::{Failure, Output};

/// Work on one service as if it ran inside a Kubernetes cluster, without root
#[derive(Parser, Debug, Clone)]
#[command(
    name = "tp",
    version,
    propagate_version = true,
    disable_help_subcommand = true
)]
pub struct CommandLine {
    /// Form of what goes to stdout
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Text)]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug, Clone)]
enum Command {
    Connect(connect::Args),
    #[cfg(target_os = "linux")]
    Run(run::Args),
    Intercept(intercept::Args),
    #[command(visible_alias = "detach")]
    Leave(leave::Args),
    List(list::Args),
    Explain(explain::Args),
    Status(status::Args),
    Quit(quit::Args),
    Env(env::Args),
    Curl(curl::Args),
    ListNamespaces(list_namespaces::Args),
    ListContexts(list_contexts::Args),
    Install(install::Args),
    Upgrade(upgrade::Args),
    Uninstall(uninstall::Args),
    Key(key::Args),
    Version(version::Args),
    Completion(completion::Args),
    /// The process behind `tp connect`.
    #[command(name = background::COMMAND, hide = true)]
    Daemon,
}

impl CommandLine {
    /// Whether it carries traffic, rather than asking and going away.
    pub fn carries_traffic(&self) -> bool {
        match self.command {
            #[cfg(target_os = "linux")]
            Command::Run(_) => true,
            _ => matches!(self.command, Command::Connect(_) | Command::Daemon),
        }
    }

    /// Does it.
    ///
    /// # Errors
    /// The command's.
    pub async fn run(self) -> Result<ExitCode, Failure> {
        let output = &self.output;
        match self.command {
            Command::Connect(args) => connect::run(args, output).await,
            #[cfg(target_os = "linux")]
            Command::Run(args) => run::run(args, output).await,
            Command::Intercept(args) => intercept::run(args, output).await,
            Command::Leave(args) => leave::run(args, output).await,
            Command::List(args) => list::run(args, output).await,
            Command::Explain(args) => explain::run(args, output).await,
            Command::Status(args) => status::run(args, output).await,
            Command::Quit(args) => quit::run(args, output).await,
            Command::Env(args) => env::run(args, output).await,
            Command::Curl(args) => curl::run(args, output).await,
            Command::ListNamespaces(args) => list_namespaces::run(args, output).await,
            Command::ListContexts(args) => list_contexts::run(args, output).await,
            Command::Install(args) => install::run(args, output).await,
            Command::Upgrade(args) => upgrade::run(args, output).await,
            Command::Uninstall(args) => uninstall::run(args, output).await,
            Command::Key(args) => key::run(args, output).await,
            Command::Version(args) => version::run(args, output).await,
            Command::Completion(args) => completion::run(args, output, Self::command()).await,
            Command::Daemon => background::run().await.map(|()| ExitCode::SUCCESS),
        }
    }
}

/// The arguments of one command, from what stands after its name.
#[cfg(test)]
fn parse_args<A: clap::Args>(line: &str) -> Result<A, clap::Error> {
    #[derive(Parser)]
    struct Line<A: clap::Args> {
        #[command(flatten)]
        args: A,
    }
    let words = std::iter::once("tp").chain(line.split_whitespace());
    Line::try_parse_from(words).map(|line| line.args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        CommandLine::command().debug_assert();
    }
}
