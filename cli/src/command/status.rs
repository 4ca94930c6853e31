//! `tp status`: what an end-to-end probe sees now.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::daemon::peers;
use crate::daemon::status::{CarrierStatus, ConnectionStatus, Cut, InterceptStatus, State};
use crate::report::{Failure, Output, counted, escaped};

/// Time between two looks of `--watch`.
const INTERVAL: Duration = Duration::from_secs(1);

/// Clears the screen and moves the cursor to its corner.
pub(super) const CLEAR: &str = "\u{1b}[H\u{1b}[2J";

/// Show the connections, each after an end-to-end probe
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// Only this connection
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Look again every second, until Ctrl-C
    #[arg(long, short)]
    pub watch: bool,
}

#[derive(Serialize)]
struct Listing {
    connections: Vec<ConnectionStatus>,
}

/// Shows the connections.
///
/// # Errors
/// The named one does not exist, or stdout cannot be written.
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    if !args.watch {
        let listing = look(args.name.as_deref()).await?;
        output.print(&listing, || told(&listing))?;
        return Ok(ExitCode::SUCCESS);
    }
    let clear = if std::io::stdout().is_terminal() {
        CLEAR
    } else {
        ""
    };
    loop {
        let listing = look(args.name.as_deref()).await?;
        output.print_next(&listing, || format!("{clear}{}", told(&listing)))?;
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn look(name: Option<&str>) -> Result<Listing, Failure> {
    let mut ended = peers::ended();
    ended.retain(|dead| name.is_none_or(|name| name == dead.name));
    let peers = match name {
        Some(_) if !ended.is_empty() => Vec::new(),
        Some(name) => vec![peers::one(Some(name))?],
        None => peers::all(),
    };
    let mut connections = peers::statuses(&peers).await;
    connections.extend(ended);
    Ok(Listing { connections })
}

fn told(listing: &Listing) -> String {
    if listing.connections.is_empty() {
        return "not connected\n".to_owned();
    }
    let blocks: Vec<String> = listing.connections.iter().map(block).collect();
    blocks.join("\n")
}

fn block(status: &ConnectionStatus) -> String {
    let mut text = headline(status) + "\n";
    for (name, value) in lines(status) {
        text += &format!("  {name:<9} {}\n", escaped(&value));
    }
    text
}

fn headline(status: &ConnectionStatus) -> String {
    let probe = match (&status.probe.error, status.probe.took_ms) {
        (Some(error), _) => format!(" (probe failed: {})", escaped(error)),
        (None, Some(took)) => format!(" (probe {took:.1} ms)"),
        (None, None) => String::new(),
    };
    format!("{}: {}{probe}", status.name, status.state)
}

fn lines(status: &ConnectionStatus) -> Vec<(&'static str, String)> {
    if matches!(status.state, State::Unresponsive | State::Ended) {
        let error = status.error.clone().unwrap_or_default();
        return vec![("error", error), ("log", status.log.display().to_string())];
    }
    let mut lines = Vec::new();
    if let Some(context) = &status.context {
        lines.push((
            "cluster",
            format!("{context}, namespace {}", status.namespace),
        ));
    }
    if let Some(manager) = &status.manager {
        let namespace = manager
            .namespace
            .as_ref()
            .map(|namespace| format!(" in {namespace}"))
            .unwrap_or_default();
        lines.push((
            "manager",
            format!("{}{namespace}, version {}", manager.name, manager.version),
        ));
    }
    lines.push((
        "proxy",
        format!("{} (SOCKS5 and HTTP)", status.proxy.address),
    ));
    lines.extend(
        status
            .carriers
            .iter()
            .map(|carrier| ("carrier", carrier_line(carrier))),
    );
    let (up, down) = (bytes(status.bytes_up), bytes(status.bytes_down));
    lines.push((
        "traffic",
        format!("{} flows, {up} up, {down} down", status.flows),
    ));
    lines.extend(
        status
            .intercepts
            .iter()
            .map(|intercept| ("intercept", intercept_line(intercept))),
    );
    lines.extend(
        status
            .last_cut
            .iter()
            .map(|cut| ("last cut", cut_line(cut))),
    );
    lines.extend(status.error.iter().map(|error| ("error", error.clone())));
    lines.extend(status.hint.iter().map(|hint| ("hint", hint.clone())));
    lines.extend(
        status
            .warnings
            .iter()
            .map(|warning| ("warning", warning.clone())),
    );
    lines.push(("log", status.log.display().to_string()));
    lines
}

fn carrier_line(carrier: &CarrierStatus) -> String {
    let round_trip = carrier
        .round_trip_ms
        .map(|ms| format!(", round trip {ms:.1} ms"))
        .unwrap_or_default();
    let up = span(carrier.up_since, Timestamp::now());
    format!(
        "{} to {}{round_trip}, up for {up}",
        carrier.kind, carrier.peer
    )
}

fn intercept_line(intercept: &InterceptStatus) -> String {
    let InterceptStatus {
        name,
        port,
        workload,
        local,
        ..
    } = intercept;
    let state = match (intercept.ready, &intercept.message, &intercept.reason) {
        (true, _, _) => format!("{} of {} pods", intercept.pods_attached, intercept.pods),
        (false, Some(message), _) => message.clone(),
        (false, None, Some(reason)) => reason.clone(),
        (false, None, None) => "the manager has not looked at it".to_owned(),
    };
    let refused = match intercept.refused {
        0 => String::new(),
        refused => format!(", {refused} refused by {local}"),
    };
    let flows = counted(intercept.flows, "connection");
    format!("{name}: port {port} of {workload} to {local}, {state}; {flows}{refused}")
}

fn cut_line(cut: &Cut) -> String {
    let at = cut.at.strftime("%Y-%m-%d %H:%M:%SZ");
    match cut.restored_at {
        Some(restored) => format!(
            "{at}, back after {} ({})",
            span(cut.at, restored),
            cut.reason
        ),
        None => format!("{at} ({})", cut.reason),
    }
}

/// Coarser the longer it is.
fn span(from: Timestamp, to: Timestamp) -> String {
    let seconds = to.duration_since(from).as_secs_f64().max(0.0);
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} days", s / 86_400.0),
    }
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut shown = format!("{count} B");
    for unit in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        shown = format!("{value:.1} {unit}");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_connected_says_so() {
        assert_eq!(
            told(&Listing {
                connections: Vec::new()
            }),
            "not connected\n"
        );
    }

    #[test]
    fn a_silent_daemon_is_named_with_its_log() {
        let status = ConnectionStatus::unresponsive("shop", "/run/x.log".into());

        let text = block(&status);

        assert!(text.starts_with("shop: unresponsive\n"), "{text}");
        assert!(text.contains("log       /run/x.log"), "{text}");
    }

    #[test]
    fn a_reconnecting_connection_shows_the_cut_and_never_claims_more() {
        let cut = Cut {
            at: Timestamp::UNIX_EPOCH,
            reason: "no pong".into(),
            restored_at: None,
        };
        let mut status = ConnectionStatus::unresponsive("shop", "/x".into());
        status.state = State::Reconnecting;
        status.last_cut = Some(cut);
        status.error = Some("the API\u{1b} is away".into());
        status.hint = Some("is the cluster up?".into());

        let text = block(&status);

        assert!(text.starts_with("shop: reconnecting\n"), "{text}");
        assert!(
            text.contains("last cut  1970-01-01 00:00:00Z (no pong)"),
            "{text}"
        );
        assert!(text.contains("  hint      is the cluster up?\n"), "{text}");
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn an_intercept_shows_where_it_leads_and_what_is_wrong() {
        let ready = InterceptStatus {
            name: "web".into(),
            workload: "deployment/web".into(),
            port: 8080,
            local: "localhost:3000".into(),
            ready: true,
            pods: 2,
            pods_attached: 2,
            flows: 1,
            ..InterceptStatus::default()
        };
        let stuck = InterceptStatus {
            ready: false,
            message: Some("no pod runs".into()),
            refused: 3,
            ..ready.clone()
        };

        assert_eq!(
            intercept_line(&ready),
            "web: port 8080 of deployment/web to localhost:3000, 2 of 2 pods; 1 connection"
        );
        assert_eq!(
            intercept_line(&stuck),
            "web: port 8080 of deployment/web to localhost:3000, no pod runs; 1 connection, 3 refused by localhost:3000"
        );
    }

    #[test]
    fn sizes_and_spans_are_readable() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(5 * 1024 * 1024 * 1024), "5.0 GiB");
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        assert_eq!(span(at(0), at(1)), "1.0 s");
        assert_eq!(span(at(0), at(600)), "10 min");
        assert_eq!(span(at(5), at(0)), "0.0 s");
    }
}
