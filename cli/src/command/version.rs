//! `tp version`: this program's version, and the manager's where one can be asked.

use std::process::ExitCode;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use serde::Serialize;
use tp_manager_api::locator::{LOCATOR_ENTRY, Skew};
use tp_manager_api::{MANAGER_NAME, MANAGER_NAMESPACE, ManagerLocator, OLDEST_PROTOCOL, PROTOCOL};

use crate::install::VERSION;
use crate::kubeconfig::Selectors;
use crate::report::{Failure, Output, escaped};

/// A version is not worth a longer wait.
const PATIENCE: Duration = Duration::from_secs(2);

/// Print this version, and the manager's if the cluster answers
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// Do not ask the cluster
    #[arg(long)]
    pub client: bool,
    /// Namespace of the manager
    #[arg(long, value_name = "NAMESPACE", default_value = MANAGER_NAMESPACE)]
    pub manager_namespace: String,
    /// Which cluster, and as whom.
    #[command(flatten)]
    pub selectors: Selectors,
}

#[derive(Serialize)]
struct Versions {
    client: Side,
    /// Absent where it was not asked for, or did not answer.
    manager: Option<Side>,
    /// Why `manager` is absent.
    manager_unknown: Option<String>,
}

#[derive(Serialize)]
struct Side {
    version: String,
    protocol: u32,
}

/// Prints the versions; a manager that cannot be asked is no failure.
///
/// # Errors
/// When stdout cannot be written.
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    let manager = if args.client {
        None
    } else {
        Some(ask(&args).await)
    };
    let skew = manager
        .as_ref()
        .and_then(|manager| manager.as_ref().ok())
        .map(skew_of);
    let versions = Versions {
        client: Side {
            version: VERSION.to_owned(),
            protocol: PROTOCOL,
        },
        manager_unknown: manager
            .as_ref()
            .and_then(|manager| manager.as_ref().err())
            .map(|failure| failure.what.clone()),
        manager: manager.and_then(Result::ok).map(|locator| Side {
            version: locator.version,
            protocol: locator.protocol,
        }),
    };
    output.print(&versions, || told(&versions, skew))?;
    Ok(ExitCode::SUCCESS)
}

async fn ask(args: &Args) -> Result<ManagerLocator, Failure> {
    let too_long = |_| Failure::new("the cluster did not answer");
    tokio::time::timeout(PATIENCE, locator(args))
        .await
        .map_err(too_long)?
}

async fn locator(args: &Args) -> Result<ManagerLocator, Failure> {
    let cluster = args.selectors.load().await?;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), &args.manager_namespace);
    let map = cluster.in_time(maps.get_opt(MANAGER_NAME)).await?;
    let data = map.and_then(|map| map.data).unwrap_or_default();
    let absent = || {
        Failure::new(format!(
            "not installed in namespace {}",
            args.manager_namespace
        ))
    };
    let text = data.get(LOCATOR_ENTRY).ok_or_else(absent)?;
    serde_json::from_str(text)
        .map_err(|error| Failure::new("it describes itself in no way we know").caused_by(&error))
}

fn skew_of(locator: &ManagerLocator) -> Skew {
    locator.skew(OLDEST_PROTOCOL, PROTOCOL)
}

fn told(versions: &Versions, skew: Option<Skew>) -> String {
    let mut text = format!(
        "client:  {} (protocol {})\n",
        versions.client.version, versions.client.protocol
    );
    if let Some(manager) = &versions.manager {
        text += &format!(
            "manager: {} (protocol {})\n",
            escaped(&manager.version),
            manager.protocol
        );
    }
    if let Some(why) = &versions.manager_unknown {
        text += &format!("manager: unknown ({})\n", escaped(why));
    }
    text += match skew {
        None | Some(Skew::None) => "",
        Some(Skew::WorkstationTooOld) => {
            "the manager is newer than this client understands: upgrade the client\n"
        }
        Some(Skew::ManagerTooOld) => {
            "the manager is older than this client understands: run `tp upgrade`\n"
        }
    };
    text
}
