//! `tp env`: the variables that make programs use a connection's proxy.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::ValueEnum;

use crate::daemon::peers;
use crate::report::{Failure, Output};

/// Print the proxy variables: `eval "$(tp env)"`
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// The connection [default: the only one]
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// For which shell
    #[arg(long, value_enum, default_value_t = Syntax::Sh)]
    pub syntax: Syntax,
}

/// How a shell sets a variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Syntax {
    /// sh, bash, zsh
    Sh,
    /// fish
    Fish,
    /// PowerShell
    Powershell,
    /// NAME=value lines, as docker --env-file reads them
    Docker,
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
    output.print(&map, || script(&variables, args.syntax))?;
    Ok(ExitCode::SUCCESS)
}

fn script(variables: &[(String, String)], syntax: Syntax) -> String {
    let line = |(name, value): &(String, String)| match syntax {
        Syntax::Sh => format!("export {name}='{}'\n", value.replace('\'', r"'\''")),
        Syntax::Fish => format!(
            "set -gx {name} '{}'\n",
            value.replace('\\', r"\\").replace('\'', r"\'")
        ),
        Syntax::Powershell => format!("$Env:{name} = '{}'\n", value.replace('\'', "''")),
        Syntax::Docker => format!("{name}={value}\n"),
    };
    variables.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_leave_its_quotes() {
        let variables = [("A".to_owned(), r"it's \".to_owned())];

        assert_eq!(script(&variables, Syntax::Sh), "export A='it'\\''s \\'\n");
        assert_eq!(
            script(&variables, Syntax::Fish),
            "set -gx A 'it\\'s \\\\'\n"
        );
        assert_eq!(
            script(&variables, Syntax::Powershell),
            "$Env:A = 'it''s \\'\n"
        );
        assert_eq!(script(&variables, Syntax::Docker), "A=it's \\\n");
    }

    #[test]
    fn a_shell_reads_back_what_was_written() {
        let value = "a'b\"c $HOME `x` \\ *";
        let script = script(
            &[("TP_TEST_VALUE".to_owned(), value.to_owned())],
            Syntax::Sh,
        );

        let read = std::process::Command::new("sh")
            .args(["-c", &format!("{script}printf %s \"$TP_TEST_VALUE\"")])
            .output()
            .unwrap();

        assert_eq!(String::from_utf8(read.stdout).unwrap(), value);
    }
}
