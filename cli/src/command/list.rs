//! `tp list`: the workloads of a namespace, whether they can be intercepted, and what is, by whom.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
use serde::Serialize;
use tp_manager_api::{Intercept, Matcher};

use super::place::Place;
use super::status::CLEAR;
use crate::intercept::workload::{self, Found};
use crate::kubeconfig::Cluster;
use crate::report::{self, Failure, Output, escaped, is_denial};

/// Time between two looks of `--watch`.
const INTERVAL: Duration = Duration::from_secs(2);

/// List workloads: whether they can be intercepted, and what is, by whom
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// Only workloads that are intercepted
    #[arg(long, short)]
    pub intercepts: bool,
    /// Look again every two seconds, until Ctrl-C
    #[arg(long)]
    pub watch: bool,
    /// Where.
    #[command(flatten)]
    pub place: Place,
}

#[derive(Debug, Serialize, PartialEq)]
struct Listing {
    namespace: String,
    workloads: Vec<Entry>,
    /// Why something may be missing.
    warnings: Vec<String>,
}

#[derive(Debug, Serialize, PartialEq)]
struct Entry {
    /// Kind and name, as in `deployment/web`.
    workload: String,
    /// Pods that are ready.
    ready: u32,
    ports: Vec<Port>,
    /// Why it cannot be intercepted, as far as can be seen from here.
    obstacle: Option<String>,
    intercepts: Vec<Intercepted>,
}

/// A port as clients know it.
#[derive(Debug, Serialize, PartialEq)]
struct Port {
    /// The container's port.
    port: u16,
    service: Option<String>,
    service_port: Option<u16>,
}

#[derive(Debug, Serialize, PartialEq)]
struct Intercepted {
    name: String,
    user: String,
    host: String,
    port: u16,
    matchers: Vec<Matcher>,
    ready: bool,
    reason: Option<String>,
    /// Connections that were open before it and bypass it until they end.
    open_before: Option<u32>,
}

/// Prints the list.
///
/// # Errors
/// The API server cannot be asked, or lets the user see nothing.
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    let (cluster, namespace) = args.place.find().await?;
    if !args.watch {
        let looking = look(&cluster, &namespace, args.intercepts);
        let listing = report::step("asking the cluster", looking).await?;
        warn(&listing);
        output.print(&listing, || told(&listing))?;
        return Ok(ExitCode::SUCCESS);
    }
    let clear = match std::io::stdout().is_terminal() {
        true => CLEAR,
        false => "",
    };
    loop {
        let listing = look(&cluster, &namespace, args.intercepts).await?;
        output.print_next(&listing, || format!("{clear}{}", told(&listing)))?;
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn look(cluster: &Cluster, namespace: &str, intercepted: bool) -> Result<Listing, Failure> {
    let (found, services, intercepts) = futures::try_join!(
        workload::list(cluster, namespace),
        workload::services(cluster, namespace),
        intercepts(cluster, namespace),
    )?;
    let entry = |found: &Found| {
        let targets = found.scene(&services).targets();
        Entry {
            workload: found.workload.to_string(),
            ready: found.ready,
            ports: targets
                .into_iter()
                .map(|target| Port {
                    port: target.port,
                    service_port: target.service.as_ref().map(|(_, port)| *port),
                    service: target.service.map(|(name, _)| name),
                })
                .collect(),
            obstacle: found.obstacle(namespace).map(str::to_owned),
            intercepts: intercepts
                .iter()
                .filter(|intercept| intercept.spec.workload == found.workload)
                .map(intercepted_by)
                .collect(),
        }
    };
    let mut workloads: Vec<Entry> = found.workloads.iter().map(entry).collect();
    workloads.retain(|entry| !intercepted || !entry.intercepts.is_empty());
    Ok(Listing {
        namespace: namespace.to_owned(),
        workloads,
        warnings: found.denied.iter().map(Failure::one_line).collect(),
    })
}

/// The intercepts of a namespace, the oldest first; none where the cluster does not know the kind, or the user may not
/// see them.
pub(super) async fn intercepts(
    cluster: &Cluster,
    namespace: &str,
) -> Result<Vec<Intercept>, Failure> {
    let api: Api<Intercept> = Api::namespaced(cluster.client.clone(), namespace);
    let everything = ListParams::default();
    let asked = async { Ok(api.list(&everything).await) };
    let mut intercepts = match cluster.in_time(asked).await? {
        Err(kube::Error::Api(status)) if status.code == 404 => Vec::new(),
        Err(denied) if is_denial(&denied) => Vec::new(),
        answer => answer?.items,
    };
    intercepts.sort_by_key(|intercept| (intercept.creation_timestamp(), intercept.uid()));
    Ok(intercepts)
}

fn intercepted_by(intercept: &Intercept) -> Intercepted {
    let ready = intercept.status.as_ref().and_then(|status| status.ready());
    Intercepted {
        name: intercept.spec.name.clone(),
        user: intercept.spec.user.clone(),
        host: intercept.spec.client.host.clone(),
        port: intercept.spec.port,
        matchers: intercept.spec.matchers.clone(),
        ready: intercept.is_ready(),
        reason: ready.map(|ready| ready.reason.clone()),
        open_before: intercept
            .status
            .as_ref()
            .and_then(|status| status.open_before),
    }
}

fn warn(listing: &Listing) {
    for warning in &listing.warnings {
        report::note(&format!("warning: {warning}"));
    }
}

fn told(listing: &Listing) -> String {
    if listing.workloads.is_empty() {
        return format!(
            "nothing to show in namespace {}\n",
            escaped(&listing.namespace)
        );
    }
    let rows: Vec<[String; 4]> = listing.workloads.iter().map(row).collect();
    let heads = ["WORKLOAD", "READY", "PORTS", "STATE"];
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([heads[column].len()]).max().unwrap_or(0)
    };
    let (first, second, third) = (width(0), width(1), width(2));
    let line = |[workload, ready, ports, state]: [&str; 4]| {
        format!("{workload:first$}  {ready:second$}  {ports:third$}  {state}\n")
    };
    let mut text = line(heads);
    for (entry, row) in listing.workloads.iter().zip(&rows) {
        text += &line(row.each_ref().map(String::as_str));
        for intercept in &entry.intercepts {
            text += &format!("  {}\n", escaped(&by(intercept)));
        }
    }
    text
}

fn row(entry: &Entry) -> [String; 4] {
    let state = match (&entry.obstacle, entry.intercepts.is_empty()) {
        (Some(obstacle), _) => format!("cannot be intercepted: {obstacle}"),
        (None, false) => "intercepted".to_owned(),
        (None, true) if entry.ports.is_empty() => {
            "can be intercepted; its port has to be said".to_owned()
        }
        (None, true) => "can be intercepted".to_owned(),
    };
    let ports: Vec<_> = entry.ports.iter().map(port).collect();
    let ports = match ports.is_empty() {
        true => "-".to_owned(),
        false => ports.join(","),
    };
    [
        escaped(&entry.workload),
        entry.ready.to_string(),
        escaped(&ports),
        state,
    ]
}

fn port(port: &Port) -> String {
    match (&port.service, port.service_port) {
        (Some(service), Some(number)) => format!("{service}:{number}"),
        _ => port.port.to_string(),
    }
}

/// Without the values: whoever knows one can send requests to that workstation.
fn by(intercept: &Intercepted) -> String {
    let Intercepted {
        name,
        user,
        host,
        port,
        ..
    } = intercept;
    let requests = match intercept.matchers.as_slice() {
        [] => "everything".to_owned(),
        matchers => {
            let shown: Vec<_> = matchers.iter().map(discreet).collect();
            shown.join(" and ")
        }
    };
    let state = match (intercept.ready, &intercept.reason) {
        (true, _) => String::new(),
        (false, Some(reason)) => format!(" ({reason})"),
        (false, None) => " (not ready)".to_owned(),
    };
    let before = bypassing(intercept.open_before);
    format!("{name}: {user} on {host}, port {port}, {requests}{state}{before}")
}

/// What an intercept does not see.
pub(super) fn bypassing(open_before: Option<u32>) -> String {
    match open_before {
        Some(open @ 1..) => {
            let what = report::counted(open, "connection");
            format!("; {what} from before bypass it")
        }
        Some(0) | None => String::new(),
    }
}

pub(super) fn discreet(matcher: &Matcher) -> String {
    match matcher {
        Matcher::Header(named) => format!("header {}", named.name),
        Matcher::Query(named) => format!("query {}", named.name),
        Matcher::Cookie(named) => format!("cookie {}", named.name),
        Matcher::Baggage(named) => format!("baggage {}", named.name),
        Matcher::Tracestate(named) => format!("tracestate {}", named.name),
        Matcher::Path(_) | Matcher::Method(_) | Matcher::Grpc(_) | Matcher::Graphql(_) => {
            matcher.to_string()
        }
    }
}

#[cfg(test)]
mod tests {
    use tp_manager_api::matcher::{NamedText, Text};

    use super::*;

    fn entry(workload: &str, obstacle: Option<&str>, intercepts: Vec<Intercepted>) -> Entry {
        Entry {
            workload: workload.into(),
            ready: 2,
            ports: vec![Port {
                port: 8080,
                service: Some("web".into()),
                service_port: Some(80),
            }],
            obstacle: obstacle.map(str::to_owned),
            intercepts,
        }
    }

    #[test]
    fn the_table_says_who_has_what_and_keeps_the_values() {
        let text = |exact: &str| Text {
            exact: Some(exact.to_owned()),
            ..Text::default()
        };
        let adas = Intercepted {
            name: "web".into(),
            user: "ada".into(),
            host: "lovelace".into(),
            port: 8080,
            matchers: vec![
                Matcher::Header(NamedText {
                    name: "x-user".into(),
                    value: text("secret"),
                }),
                Matcher::Path(text("/api")),
            ],
            ready: false,
            reason: Some("Attaching".into()),
            open_before: Some(2),
        };
        let listing = Listing {
            namespace: "shop".into(),
            workloads: vec![
                entry("deployment/web", None, vec![adas]),
                entry(
                    "daemonset/logs",
                    Some("its pods use their node's network"),
                    Vec::new(),
                ),
            ],
            warnings: Vec::new(),
        };

        assert_eq!(
            told(&listing),
            "WORKLOAD        READY  PORTS   STATE\n\
             deployment/web  2      web:80  intercepted\n  \
             web: ada on lovelace, port 8080, header x-user and path = /api (Attaching); 2 connections from before bypass it\n\
             daemonset/logs  2      web:80  cannot be intercepted: its pods use their node's network\n"
        );
    }

    #[test]
    fn nothing_is_said_too() {
        let listing = Listing {
            namespace: "shop".into(),
            workloads: Vec::new(),
            warnings: Vec::new(),
        };
        assert_eq!(told(&listing), "nothing to show in namespace shop\n");
    }
}
