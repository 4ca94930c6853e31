//! `tp leave`: ends intercepts, and returns when their objects are gone.

use std::collections::BTreeSet;
use std::process::ExitCode;

use serde::Serialize;

use crate::daemon::peers::{self, Peer};
use crate::report::{self, Failure, Output};

/// End an intercept: its requests go to the application again
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// The intercept
    #[arg(value_name = "NAME", required_unless_present = "all")]
    pub name: Option<String>,
    /// Every intercept
    #[arg(long, conflicts_with = "name")]
    pub all: bool,
    /// Only of this connection
    #[arg(long, value_name = "NAME")]
    pub connection: Option<String>,
}

#[derive(Serialize)]
struct Left {
    /// Names of the intercepts that were ended.
    left: BTreeSet<String>,
}

/// Ends them.
///
/// # Errors
/// There is none of that name, or an object could not be removed.
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    let peers = match &args.connection {
        Some(name) => vec![peers::one(Some(name))?],
        None => peers::all(),
    };
    let mut left = BTreeSet::new();
    for peer in &peers {
        left.extend(leave(peer, args.name.as_deref()).await?);
    }
    if let (true, Some(name)) = (left.is_empty(), &args.name) {
        return Err(Failure::new(format!("there is no intercept named {name}"))
            .hint("`tp status` shows yours; `tp list -i` shows everybody's"));
    }
    let left = Left { left };
    output.print(&left, || told(&left))?;
    Ok(ExitCode::SUCCESS)
}

/// The named one of a connection, or all.
async fn leave(peer: &Peer, name: Option<&str>) -> Result<Vec<String>, Failure> {
    let names: BTreeSet<String> = match name {
        Some(name) => [name.to_owned()].into(),
        None => {
            let intercepts = peer.status().await.intercepts;
            intercepts
                .into_iter()
                .map(|intercept| intercept.name)
                .collect()
        }
    };
    let mut left = Vec::new();
    for name in names {
        if report::step("leaving", peer.leave(&name)).await? {
            left.push(name);
        }
    }
    Ok(left)
}

fn told(left: &Left) -> String {
    match left.left.is_empty() {
        true => "no intercepts\n".to_owned(),
        false => {
            let names: Vec<&str> = left.left.iter().map(String::as_str).collect();
            format!("left {}\n", names.join(", "))
        }
    }
}
