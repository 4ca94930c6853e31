//! `tp uninstall`: takes the manager, or everything, out of the cluster.

use std::convert::Infallible;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use tp_manager_api::MANAGER_NAMESPACE;

use crate::daemon;
use crate::install::{agents, remove};
use crate::kubeconfig::{self, Selectors};
use crate::report::{self, Failure, Output};

/// Take the manager out of the cluster
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// Leave nothing behind: sessions, definitions, policies, roles, the key and the namespace go as well, and your connections end
    #[arg(long)]
    pub everything: bool,
    /// Restart the workloads whose pods keep an agent, as `kubectl rollout restart` does; without it they are named
    #[arg(long, requires = "everything")]
    pub restart_pods: bool,
    /// Namespace of the manager
    #[arg(long, value_name = "NAMESPACE", default_value = MANAGER_NAMESPACE)]
    pub manager_namespace: String,
    /// How long to wait until all is gone, as `30s` or `5m`
    #[arg(long, value_name = "TIME", default_value = "120s", value_parser = kubeconfig::duration)]
    pub timeout: Duration,
    /// Which cluster, and as whom.
    #[command(flatten)]
    pub selectors: Selectors,
}

#[derive(Serialize)]
struct Gone {
    server: String,
    connections_ended: u64,
    removed: Vec<String>,
    agents_ended: usize,
    restarted: Vec<String>,
    pods_with_agents: Vec<String>,
    warnings: Vec<String>,
}

/// Removes, and waits until what was removed is gone.
///
/// # Errors
/// What the API server refuses, or an object that stays.
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    let cluster = args.selectors.load().await?;
    report::step("asking the cluster", cluster.identity()).await?;
    let connections_ended = if args.everything {
        daemon::quit_connections_to(&cluster.server).await? as u64
    } else {
        0
    };
    let removed = if args.everything {
        let work = remove::everything(&cluster, &args.manager_namespace, args.timeout);
        report::step("removing everything", work).await?
    } else {
        let work = remove::manager(&cluster, &args.manager_namespace, args.timeout);
        report::step("removing the manager", work).await?
    };
    let kept = match args.everything {
        true => report::step("looking for agents", agents::kept(&cluster)).await?,
        false => Vec::new(),
    };
    let ending = async { Ok::<_, Infallible>(agents::end(&cluster, &kept).await) };
    let Ok((agents_ended, left)) = report::step("ending agents", ending).await;
    let restarted = match args.restart_pods {
        true => report::step("restarting pods", agents::restart(&cluster, &kept)).await?,
        false => Vec::new(),
    };
    let named = kept
        .iter()
        .map(|kept| format!("{}/{}", kept.namespace, kept.pod));
    let gone = Gone {
        server: cluster.server,
        connections_ended,
        removed,
        agents_ended,
        restarted,
        pods_with_agents: named.collect(),
        warnings: left.iter().map(still_runs).collect(),
    };
    for warning in &gone.warnings {
        report::note(&format!("warning: {warning}"));
    }
    output.print(&gone, || told(&gone, args.everything))?;
    Ok(ExitCode::SUCCESS)
}

fn still_runs(left: &agents::Left) -> String {
    format!(
        "the agent in pod {} goes on: {}",
        left.pod,
        left.why.one_line()
    )
}

fn told(gone: &Gone, everything: bool) -> String {
    let mut lines: Vec<_> = gone
        .removed
        .iter()
        .map(|object| format!("removed {}", report::escaped(object)))
        .collect();
    if gone.connections_ended > 0 {
        lines.push(format!(
            "ended {}",
            report::counted(gone.connections_ended, "connection")
        ));
    }
    if gone.agents_ended > 0 {
        let agents = report::counted(gone.agents_ended as u64, "agent");
        lines.push(format!("ended {agents}"));
    }
    let restarted = gone.restarted.iter();
    lines.extend(restarted.map(|workload| format!("restarted {}", report::escaped(workload))));
    if !gone.pods_with_agents.is_empty() && gone.restarted.is_empty() {
        let pods = report::counted(gone.pods_with_agents.len() as u64, "pod");
        lines.push(format!(
            "{pods} keep the container of an agent until they are replaced (`--restart-pods` does that):"
        ));
        let pods = gone.pods_with_agents.iter();
        lines.extend(pods.map(|pod| format!("  {}", report::escaped(pod))));
    }
    match (lines.is_empty(), everything) {
        (true, _) => "there was nothing to remove".to_owned(),
        (false, true) => lines.join("\n"),
        (false, false) => {
            lines.push(
                "definitions, sessions, roles and the key stay; `--everything` removes them too"
                    .to_owned(),
            );
            lines.join("\n")
        }
    }
}
