//! `tp leave`: ends intercepts, and returns when their objects are gone.

use std::collections::BTreeSet;
use std::process::ExitCode;

use serde::Serialize;

use crate::daemon::peers::{self, Peer};
use crate::intercept::{sidecar, workload};
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
    /// Take the label that asks for the agent out of the workload's pod template, and make its pods anew without it
    #[arg(long)]
    pub restart_pods: bool,
    /// Only of this connection
    #[arg(long, value_name = "NAME")]
    pub connection: Option<String>,
}

#[derive(Serialize, Default)]
struct Left {
    /// Names of the intercepts that were ended.
    left: BTreeSet<String>,
    /// Workloads whose pods were made anew, as in `deployment/web`.
    restarted: BTreeSet<String>,
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
    let mut gone = Left::default();
    for peer in &peers {
        leave(peer, &args, &mut gone).await?;
    }
    if let (true, Some(name)) = (gone.left.is_empty(), &args.name) {
        return Err(Failure::new(format!("there is no intercept named {name}"))
            .hint("`tp status` shows yours; `tp list -i` shows everybody's"));
    }
    output.print(&gone, || told(&gone))?;
    Ok(ExitCode::SUCCESS)
}

/// The named one of a connection, or all.
async fn leave(peer: &Peer, args: &Args, gone: &mut Left) -> Result<(), Failure> {
    let intercepts = peer.status().await.intercepts;
    let mut names: BTreeSet<String> = args.name.iter().cloned().collect();
    if args.name.is_none() {
        names.extend(intercepts.iter().map(|intercept| intercept.name.clone()));
    }
    for name in names {
        if report::step("leaving", peer.leave(&name)).await? {
            gone.left.insert(name);
        }
    }
    if args.restart_pods {
        let left = intercepts.iter();
        let left = left.filter(|intercept| gone.left.contains(&intercept.name));
        let workloads: BTreeSet<&str> = left.map(|intercept| &*intercept.workload).collect();
        restart(peer, workloads, gone).await?;
    }
    Ok(())
}

async fn restart(peer: &Peer, workloads: BTreeSet<&str>, gone: &mut Left) -> Result<(), Failure> {
    let (selectors, namespace) = peer.login().await?;
    let cluster = selectors.load().await?;
    for name in workloads {
        let found = workload::find(&cluster, &namespace, name).await?;
        if sidecar::take_out(&cluster, &namespace, &found).await? {
            gone.restarted.insert(name.to_owned());
        }
    }
    Ok(())
}

fn told(left: &Left) -> String {
    match left.left.is_empty() {
        true => "no intercepts\n".to_owned(),
        false => {
            let names: Vec<&str> = left.left.iter().map(String::as_str).collect();
            let restarted = left.restarted.iter();
            let restarted = restarted.map(|workload| format!("made the pods of {workload} anew\n"));
            format!(
                "left {}\n{}",
                names.join(", "),
                restarted.collect::<String>()
            )
        }
    }
}
