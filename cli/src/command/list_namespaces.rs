//! `tp list-namespaces`: the namespaces that are there, and those one may connect to.

use std::process::ExitCode;

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use serde::Serialize;
use tp_manager_api::{GROUP, SESSIONS};

use crate::kubeconfig::{Cluster, Right, Selectors};
use crate::report::{self, Failure, Output, escaped, is_denial};

/// Questions to the API server under way at a time.
const AT_ONCE: usize = 16;

/// List namespaces and whether you may connect to them
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// Only those that you may connect to
    #[arg(long)]
    pub allowed: bool,
    /// Which cluster, and as whom.
    #[command(flatten)]
    pub selectors: Selectors,
}

#[derive(Debug, Serialize, PartialEq, Eq)]
struct Entry {
    name: String,
    /// May create Sessions there.
    connect: bool,
    /// May leave the cluster through the manager from there.
    egress: bool,
}

#[derive(Serialize)]
struct Listing {
    namespaces: Vec<Entry>,
}

/// Prints the list.
///
/// # Errors
/// When the API server cannot be asked, or refuses to list namespaces.
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    let cluster = args.selectors.load().await?;
    let mut namespaces = report::step("asking the cluster", entries(&cluster)).await?;
    if args.allowed {
        namespaces.retain(|entry| entry.connect);
    }
    let listing = Listing { namespaces };
    output.print(&listing, || table(&listing.namespaces))?;
    Ok(ExitCode::SUCCESS)
}

async fn entries(cluster: &Cluster) -> Result<Vec<Entry>, Failure> {
    let api: Api<Namespace> = Api::all(cluster.client.clone());
    let everything = ListParams::default();
    let list = match cluster
        .in_time(async { Ok(api.list(&everything).await) })
        .await?
    {
        Err(denied) if is_denial(&denied) => return own(cluster, denied).await,
        listed => listed?,
    };
    let names = list.items.iter().map(ResourceExt::name_any);
    stream::iter(names)
        .map(|name| entry(cluster, name))
        .buffered(AT_ONCE)
        .try_collect()
        .await
}

/// Who may not list namespaces may still know one: that of the context.
async fn own(cluster: &Cluster, denied: kube::Error) -> Result<Vec<Entry>, Failure> {
    let entry = entry(cluster, cluster.namespace.clone()).await?;
    if entry.connect {
        Ok(vec![entry])
    } else {
        Err(denied.into())
    }
}

async fn entry(cluster: &Cluster, name: String) -> Result<Entry, Failure> {
    let right = |subresource| Right {
        verb: "create",
        group: GROUP,
        resource: SESSIONS,
        subresource,
    };
    let (create, leave) = (right(""), right(tp_manager_api::EGRESS));
    let connect = cluster.may(&create, Some(&name));
    let egress = cluster.may(&leave, Some(&name));
    let (connect, egress) = futures::try_join!(connect, egress)?;
    Ok(Entry {
        name,
        connect,
        egress,
    })
}

fn table(entries: &[Entry]) -> String {
    let yes = |allowed| if allowed { "yes" } else { "no" };
    let width = entries
        .iter()
        .map(|entry| entry.name.len())
        .max()
        .unwrap_or(0)
        .max("NAMESPACE".len());
    let mut text = format!("{:width$}  CONNECT  EGRESS\n", "NAMESPACE");
    for Entry {
        name,
        connect,
        egress,
    } in entries
    {
        text += &format!(
            "{:width$}  {:7}  {}\n",
            escaped(name),
            yes(*connect),
            yes(*egress)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lines_up() {
        let entry = |name: &str, connect| Entry {
            name: name.into(),
            connect,
            egress: false,
        };

        let text = table(&[entry("a", true), entry("kube-system", false)]);

        assert_eq!(
            text,
            "NAMESPACE    CONNECT  EGRESS\na            yes      no\nkube-system  no       no\n"
        );
    }
}
