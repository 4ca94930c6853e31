//! `tp install`: puts the manager into the cluster and waits until it works.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Serialize;
use tp_manager_api::MANAGER_NAMESPACE;

use crate::install::webhook::{self, Certificate};
use crate::install::{Settings, VERSION, apply, manifests, rollout};
use crate::kubeconfig::{self, Cluster, Selectors};
use crate::report::{self, Failure, Output};

/// Put the manager into the cluster: once, by an administrator
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// Image of the manager [default: the one of this release]
    #[arg(long, value_name = "IMAGE")]
    pub image: Option<String>,
    /// Replicas of the manager
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub replicas: u16,
    /// Namespace of the manager
    #[arg(long, value_name = "NAMESPACE", default_value = MANAGER_NAMESPACE)]
    pub manager_namespace: String,
    /// Secret in that namespace with which nodes pull the image; repeatable
    #[arg(long, value_name = "SECRET")]
    pub pull_secret: Vec<String>,
    /// Let the manager add agents to pods of these namespaces only, separated by commas [default: of all that do not
    /// opt out]
    #[arg(long, value_name = "NAMESPACES", value_delimiter = ',')]
    pub namespaces: Vec<String>,
    /// Print the manifests and change nothing; needs no cluster
    #[arg(long)]
    pub dry_run: bool,
    /// How long to wait until the manager works, as `30s` or `5m`
    #[arg(long, value_name = "TIME", default_value = "120s", value_parser = kubeconfig::duration)]
    pub timeout: Duration,
    /// Which cluster, and as whom.
    #[command(flatten)]
    pub selectors: Selectors,
}

/// What was installed, for programs.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) struct Report<'a> {
    pub(super) version: &'a str,
    pub(super) namespace: &'a str,
    pub(super) image: &'a str,
    pub(super) replicas: u16,
    pub(super) server: &'a str,
    pub(super) seconds: f32,
}

/// Installs, or prints what would be installed.
///
/// # Errors
/// What the API server refuses, or what keeps the manager from running.
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    let mut settings = Settings {
        namespace: args.manager_namespace,
        image: args.image,
        replicas: args.replicas,
        pull_secrets: args.pull_secret,
        namespaces: args.namespaces,
        ..Settings::default()
    };
    if args.dry_run {
        settings.certificate = Some(Certificate::generate(&settings.namespace)?);
        return print_manifests(&settings, *output);
    }
    let begun = Instant::now();
    let cluster = args.selectors.load().await?;
    report::step("asking the cluster", prepare(&cluster, &mut settings)).await?;
    make_it_so(&cluster, &settings, args.timeout).await?;
    let report = Report {
        version: VERSION,
        namespace: &settings.namespace,
        image: settings.image(),
        replicas: settings.replicas,
        server: &cluster.server,
        seconds: begun.elapsed().as_secs_f32(),
    };
    output.print(&report, || installed(&report))?;
    Ok(ExitCode::SUCCESS)
}

/// Applies the settings and waits for the manager; shared with `tp upgrade`.
pub(super) async fn make_it_so(
    cluster: &Cluster,
    settings: &Settings,
    within: Duration,
) -> Result<(), Failure> {
    let applying = async {
        let applied = tokio::time::timeout(within, apply::all(cluster, settings)).await;
        applied.unwrap_or_else(|_| Err(too_slow(within)))
    };
    let generation = report::step("applying the manifests", applying).await?;
    let ready = rollout::wait(cluster, settings, generation, within);
    report::step("waiting until the manager works", ready).await?;
    let ready = rollout::webhook(cluster, settings, within);
    report::step("waiting until the webhook answers", ready).await
}

fn too_slow(within: Duration) -> Failure {
    let seconds = within.as_secs();
    Failure::new(format!(
        "the API server did not take the manifests within {seconds} s"
    ))
    .hint("an admission webhook may be slow or down; `--timeout` waits longer")
}

async fn prepare(cluster: &Cluster, settings: &mut Settings) -> Result<(), Failure> {
    cluster.identity().await?;
    if let Some(other) = apply::installed_elsewhere(cluster, &settings.namespace).await? {
        return Err(Failure::new(format!("tp is already installed in namespace {other}"))
            .because("a cluster has one manager")
            .hint(format!(
                "use `tp upgrade --manager-namespace {other}`, or `tp uninstall --manager-namespace {other}` first"
            )));
    }
    learn(cluster, settings).await
}

/// What depends on the API server, and on an installation that may be there.
pub(super) async fn learn(cluster: &Cluster, settings: &mut Settings) -> Result<(), Failure> {
    settings.ranges_by_dry_run = apply::lacks_service_cidrs(cluster).await?;
    settings.native_sidecars = apply::has_native_sidecars(cluster).await?;
    settings.certificate = Some(webhook::certificate(cluster, &settings.namespace).await?);
    Ok(())
}

/// For people and for `kubectl apply` the documents themselves; for programs that asked for JSON a `List`.
fn print_manifests(settings: &Settings, output: Output) -> Result<ExitCode, Failure> {
    let objects: Vec<_> = manifests::all(settings)
        .into_iter()
        .map(|manifest| manifest.object)
        .collect();
    if output == Output::Json {
        let list = serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        output.print(&list, String::new)?;
        return Ok(ExitCode::SUCCESS);
    }
    let documents = objects
        .iter()
        .map(report::yaml)
        .collect::<Result<Vec<_>, _>>()?;
    report::write_out(&documents.join("---\n"))?;
    Ok(ExitCode::SUCCESS)
}

fn installed(report: &Report<'_>) -> String {
    let Report {
        version,
        namespace,
        image,
        replicas,
        seconds,
        ..
    } = report;
    let replicas = report::counted(*replicas, "replica");
    format!(
        "tp {version} works in namespace {namespace}: {replicas} of {image} ({seconds:.1} s)

To let a group connect to the namespace `shop`:
  kubectl create rolebinding tp-connect --role=tp-connect --group=devs -n {namespace}
  kubectl create rolebinding tp-user --clusterrole=tp-user --group=devs -n shop
"
    )
}
