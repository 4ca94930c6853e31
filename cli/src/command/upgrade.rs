//! `tp upgrade`: brings an installed manager to this release, keeping what it was told.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Serialize;
use tp_manager_api::MANAGER_NAMESPACE;

use super::install::{Report, learn, make_it_so};
use crate::install::{Installed, Settings, VERSION, apply};
use crate::kubeconfig::{self, Cluster, Selectors};
use crate::report::{self, Failure, Output};

/// Bring the manager to this release, keeping its settings
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// Image of the manager [default: the one chosen before, else that of this release]
    #[arg(long, value_name = "IMAGE")]
    pub image: Option<String>,
    /// Replicas of the manager [default: as before]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub replicas: Option<u16>,
    /// Namespace of the manager
    #[arg(long, value_name = "NAMESPACE", default_value = MANAGER_NAMESPACE)]
    pub manager_namespace: String,
    /// Secret with which nodes pull the image; repeatable [default: as before]
    #[arg(long, value_name = "SECRET")]
    pub pull_secret: Vec<String>,
    /// Let the manager add agents to pods of these namespaces only, separated by commas; `*` for all [default: as before]
    #[arg(long, value_name = "NAMESPACES", value_delimiter = ',')]
    pub namespaces: Vec<String>,
    /// How long to wait until the manager works, as `30s` or `5m`
    #[arg(long, value_name = "TIME", default_value = "120s", value_parser = kubeconfig::duration)]
    pub timeout: Duration,
    /// Which cluster, and as whom.
    #[command(flatten)]
    pub selectors: Selectors,
}

#[derive(Serialize)]
struct Upgraded<'a> {
    from_version: &'a str,
    from_image: &'a str,
    #[serde(flatten)]
    now: Report<'a>,
}

/// Upgrades.
///
/// # Errors
/// That nothing is installed, what the API server refuses, or what keeps the new manager from running.
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    let begun = Instant::now();
    let cluster = args.selectors.load().await?;
    let before = report::step(
        "asking the cluster",
        find(&cluster, &args.manager_namespace),
    )
    .await?;
    let mut settings = changed(&before, &args);
    learn(&cluster, &mut settings).await?;
    make_it_so(&cluster, &settings, args.timeout).await?;
    let report = Upgraded {
        from_version: &before.version,
        from_image: &before.image,
        now: Report {
            version: VERSION,
            namespace: &settings.namespace,
            image: settings.image(),
            replicas: settings.replicas,
            server: &cluster.server,
            seconds: begun.elapsed().as_secs_f32(),
        },
    };
    output.print(&report, || upgraded(&report))?;
    Ok(ExitCode::SUCCESS)
}

async fn find(cluster: &Cluster, namespace: &str) -> Result<Installed, Failure> {
    if let Some(installed) = apply::installed(cluster, namespace).await? {
        return Ok(installed);
    }
    let failure = Failure::new(format!("tp is not installed in namespace {namespace}"));
    Err(
        match apply::installed_elsewhere(cluster, namespace).await? {
            Some(other) => failure.hint(format!(
                "it is in {other}: use `--manager-namespace {other}`"
            )),
            None => failure.hint("`tp install` puts it there"),
        },
    )
}

fn changed(before: &Installed, args: &Args) -> Settings {
    let kept = before.settings.clone();
    let or_kept = |given: &[String], kept| match given {
        [] => kept,
        given => given.to_vec(),
    };
    Settings {
        image: args.image.clone().or(kept.image),
        replicas: args.replicas.unwrap_or(kept.replicas),
        pull_secrets: or_kept(&args.pull_secret, kept.pull_secrets),
        namespaces: match args.namespaces.as_slice() {
            [all] if all == "*" => Vec::new(),
            given => or_kept(given, kept.namespaces),
        },
        ..kept
    }
}

fn upgraded(report: &Upgraded<'_>) -> String {
    let Report {
        version,
        namespace,
        image,
        replicas,
        seconds,
        ..
    } = &report.now;
    let replicas = report::counted(*replicas, "replica");
    let versions = match report.from_version {
        from if from == *version => from.to_owned(),
        from => format!("{from} -> {version}"),
    };
    let image = if report.from_image == *image {
        format!("{image} as before")
    } else {
        format!("{image} (was {})", report.from_image)
    };
    format!(
        "tp {versions} works in namespace {namespace}: {replicas} of {image} ({seconds:.1} s)\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn before() -> Installed {
        Installed {
            settings: Settings {
                namespace: "tools".into(),
                image: Some("mirror.example/tp:1".into()),
                replicas: 3,
                pull_secrets: vec!["regcred".into()],
                namespaces: vec!["shop".into()],
                ..Settings::default()
            },
            image: "mirror.example/tp:1".into(),
            version: "0.0.9".into(),
        }
    }

    fn after(line: &str) -> Settings {
        let args: Args = crate::command::parse_args(line).unwrap();
        changed(&before(), &args)
    }

    #[test]
    fn what_is_not_said_stays() {
        assert_eq!(after(""), before().settings);
    }

    #[test]
    fn what_is_said_changes_alone() {
        let settings = after("--image mirror.example/tp:2 --replicas 1");

        assert_eq!(settings.image(), "mirror.example/tp:2");
        assert_eq!(
            (settings.replicas, settings.namespace.as_str()),
            (1, "tools")
        );
        assert_eq!(settings.pull_secrets, ["regcred"]);
        assert_eq!(settings.namespaces, ["shop"]);
        assert_eq!(after("--namespaces a,b").namespaces, ["a", "b"]);
        assert_eq!(after("--namespaces *").namespaces, [""; 0]);
    }
}
