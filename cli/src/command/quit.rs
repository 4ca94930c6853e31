//! `tp quit`: ends a connection, and returns when nothing is left of it.

use std::process::ExitCode;

use serde::Serialize;

use crate::daemon::peers::{self, Peer};
use crate::report::{self, Failure, Output};

/// End a connection
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// The connection [default: the only one]
    #[arg(value_name = "NAME", conflicts_with = "all")]
    pub name: Option<String>,
    /// Every connection
    #[arg(long)]
    pub all: bool,
}

#[derive(Serialize)]
struct Ended {
    /// Names of the connections that were ended.
    ended: Vec<String>,
}

/// Ends connections. Where there is none, and none was named, there is nothing to do.
///
/// # Errors
/// The named one does not exist, it is not clear which one is meant, or one does not end.
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    let living = peers::all();
    let forgotten = peers::forget_ended(args.name.as_deref());
    let meant = match (args.all, &args.name) {
        (false, None) if living.is_empty() => living,
        (true, _) => living,
        (false, Some(name)) if forgotten && living.iter().all(|peer| peer.name != *name) => {
            Vec::new()
        }
        (false, name) => vec![peers::one(name.as_deref())?],
    };
    let quitting = report::step("ending", quit_all(&meant)).await;
    quitting?;
    let ended = Ended {
        ended: meant.into_iter().map(|peer| peer.name).collect(),
    };
    output.print(&ended, || told(&ended))?;
    Ok(ExitCode::SUCCESS)
}

/// All at once, and all of them even when one fails.
async fn quit_all(peers: &[Peer]) -> Result<(), Failure> {
    let outcomes = futures::future::join_all(peers.iter().map(Peer::quit)).await;
    outcomes.into_iter().collect()
}

fn told(ended: &Ended) -> String {
    match ended.ended.as_slice() {
        [] => "not connected\n".to_owned(),
        names => format!("ended {}\n", names.join(", ")),
    }
}
