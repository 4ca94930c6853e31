//! `tp explain`: who would answer a request, and what each matcher on the way says of it.

use std::process::ExitCode;

use serde::Serialize;
use tp_manager_api::intercept::{InterceptSpec, Workload};
use tp_manager_api::matcher::{Finding, Outcome, Verdict};
use tp_manager_api::{Intercept, Matchers};

use super::list;
use super::place::Place;
use crate::intercept::request::{self, Request};
use crate::intercept::workload;
use crate::kubeconfig::Cluster;
use crate::report::{self, Failure, Output, escaped};

/// Say who would answer a request, and what each intercept on its way says of it
///
/// Nothing is sent: the intercepts are read from the cluster, and matched here as the agents match.
#[derive(clap::Args, Debug, Clone)]
#[command(after_help = "\
Examples:
  tp explain http://web/
  tp explain -H 'x-user: ada' -X POST http://web.shop/api
")]
pub struct Args {
    /// Where.
    #[command(flatten)]
    pub place: Place,
    /// The request, as arguments of curl; put `--` before them when the first one is also a flag of tp
    #[arg(
        value_name = "REQUEST",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub request: Vec<String>,
}

#[derive(Debug, Serialize, PartialEq)]
struct Explained {
    request: String,
    /// One a workload that the Service leads to.
    ways: Vec<Way>,
}

#[derive(Debug, Serialize, PartialEq)]
struct Way {
    workload: String,
    port: u16,
    /// The oldest first: the first one that matches and is ready gets the request.
    intercepts: Vec<OnTheWay>,
    /// Name of the intercept whose workstation answers; `null`: the application does.
    answered_by: Option<String>,
}

#[derive(Debug, Serialize, PartialEq)]
struct OnTheWay {
    name: String,
    user: String,
    host: String,
    ready: bool,
    reason: Option<String>,
    /// Connections that were open before it and bypass it until they end.
    open_before: Option<u32>,
    matches: bool,
    findings: Vec<Finding>,
}

/// Explains a request.
///
/// # Errors
/// It is none, there is no such Service, or the API server cannot be asked.
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    let request = Request::of_curl(&args.request)?;
    let (cluster, own) = args.place.find().await?;
    let looking = look(&cluster, &own, &request);
    let (explained, me) = report::step("asking the cluster", looking).await?;
    output.print(&explained, || told(&explained, &me))?;
    Ok(ExitCode::SUCCESS)
}

async fn look(
    cluster: &Cluster,
    own: &str,
    request: &Request,
) -> Result<(Explained, String), Failure> {
    let (service, namespace) = request::service_of(&request.host, own).ok_or_else(|| {
        Failure::new(format!("{} is no name of a Service", request.host))
            .hint("a request is explained by the Service that it goes to: `web`, `web.shop` or `web.shop.svc`")
    })?;
    let (found, services, intercepts, me) = futures::try_join!(
        workload::list(cluster, namespace),
        workload::services(cluster, namespace),
        list::intercepts(cluster, namespace),
        cluster.identity(),
    )?;
    let wanted = Some((service.to_owned(), request.port));
    let leads_to = found.workloads.iter().filter_map(|found| {
        let mut targets = found.scene(&services).targets().into_iter();
        let target = targets.find(|target| target.service == wanted)?;
        Some((&found.workload, target.port))
    });
    let ways: Vec<_> = leads_to
        .map(|(workload, port)| way(workload, port, &intercepts, request))
        .collect();
    if ways.is_empty() {
        let what = format!(
            "no Service {service} with port {} leads to a workload of namespace {namespace}",
            request.port
        );
        return Err(Failure::new(what).hint(format!(
            "`tp list -n {namespace}` shows Services and their ports"
        )));
    }
    let explained = Explained {
        request: request.line(),
        ways,
    };
    Ok((explained, me.username.unwrap_or_default()))
}

fn way(workload: &Workload, port: u16, intercepts: &[Intercept], request: &Request) -> Way {
    let of_port = intercepts
        .iter()
        .filter(|intercept| intercept.spec.workload == *workload && intercept.spec.port == port);
    let intercepts: Vec<_> = of_port
        .map(|intercept| on_the_way(intercept, request))
        .collect();
    let mut taking = intercepts.iter().filter(|one| one.matches && one.ready);
    Way {
        workload: workload.to_string(),
        port,
        answered_by: taking.next().map(|one| one.name.clone()),
        intercepts,
    }
}

fn on_the_way(intercept: &Intercept, request: &Request) -> OnTheWay {
    let InterceptSpec {
        name,
        user,
        client,
        matchers,
        ..
    } = &intercept.spec;
    let status = intercept.status.as_ref();
    let (head, operation) = (request.head(), request.operation());
    // What cannot be used matches nothing; the reason says so.
    let matchers = Matchers::try_new(matchers.iter().cloned()).ok();
    OnTheWay {
        name: name.clone(),
        user: user.clone(),
        host: client.host.clone(),
        ready: intercept.is_ready(),
        reason: status
            .and_then(|status| status.ready())
            .map(|ready| ready.reason.clone()),
        open_before: status.and_then(|status| status.open_before),
        matches: matchers
            .as_ref()
            .is_some_and(|matchers| matchers.matches(&head, Some(&operation)) == Verdict::Mine),
        findings: matchers
            .map(|matchers| matchers.explain(&head, Some(&operation)))
            .unwrap_or_default(),
    }
}

fn told(explained: &Explained, me: &str) -> String {
    let mut text = format!("{}\n", escaped(&explained.request));
    for way in &explained.ways {
        text += &format!("{}, port {}\n", escaped(&way.workload), way.port);
        for one in &way.intercepts {
            text += &format!("  {}\n", escaped(&headline(one)));
            for finding in &one.findings {
                text += &format!("    {}\n", escaped(&found(finding, one.user == me)));
            }
        }
        text += &format!("  answered by {}\n", escaped(&answerer(way)));
    }
    text
}

fn headline(one: &OnTheWay) -> String {
    let OnTheWay {
        name, user, host, ..
    } = one;
    let verdict = match (one.matches, one.ready, &one.reason) {
        (true, true, _) => "matches".to_owned(),
        (true, false, Some(reason)) => format!("matches, and is not ready: {reason}"),
        (true, false, None) => "matches, and is not ready".to_owned(),
        (false, _, _) => "does not match".to_owned(),
    };
    let before = list::bypassing(one.open_before);
    format!("{name}, of {user} on {host}: {verdict}{before}")
}

/// Other people's values are not shown: whoever knows one can send requests to their workstation.
fn found(finding: &Finding, is_mine: bool) -> String {
    let matcher = match is_mine {
        true => finding.matcher.to_string(),
        false => list::discreet(&finding.matcher),
    };
    let outcome = match finding.outcome {
        Outcome::Matches => "matches",
        Outcome::Differs => "differs",
        Outcome::Absent => "is not there",
        Outcome::NeedsBody => "needs the body",
    };
    format!("{matcher}: {outcome}")
}

fn answerer(way: &Way) -> String {
    let mut intercepts = way.intercepts.iter();
    let taking = way
        .answered_by
        .as_ref()
        .and_then(|name| intercepts.find(|one| one.name == *name && one.matches && one.ready));
    match taking {
        Some(one) => format!("the workstation {} of {}", one.host, one.user),
        None => "the application".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tp_manager_api::intercept::WorkloadKind;

    use super::*;

    fn intercept(name: &str, user: &str, matchers: Value, ready: bool) -> Intercept {
        serde_json::from_value(json!({
            "apiVersion": "tp.dev/v1alpha1", "kind": "Intercept",
            "metadata": { "name": name, "generation": 1 },
            "spec": {
                "name": name, "user": user, "session": "tp-1", "port": 8080, "matchers": matchers,
                "workload": { "kind": "Deployment", "name": "web" }, "client": { "host": "lovelace", "version": "1" },
            },
            "status": { "openBefore": 3, "conditions": [{
                "type": "Ready", "status": if ready { "True" } else { "False" }, "reason": if ready { "Attached" } else { "Attaching" },
                "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1,
            }]},
        }))
        .unwrap()
    }

    fn explained(words: &[&str], intercepts: &[Intercept]) -> Explained {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let request = Request::of_curl(&words).unwrap();
        let workload = Workload {
            kind: WorkloadKind::Deployment,
            name: "web".into(),
        };
        Explained {
            request: request.line(),
            ways: vec![way(&workload, 8080, intercepts, &request)],
        }
    }

    fn header(value: &str) -> Value {
        json!([{ "header": { "name": "x-user", "exact": value } }])
    }

    #[test]
    fn each_matcher_says_what_it_found_and_the_first_that_matches_answers() {
        let intercepts = [
            intercept("a", "ada", header("ada"), true),
            intercept("b", "bob", header("bob"), true),
            intercept("c", "bob", json!([]), true),
        ];

        let text = told(
            &explained(&["-H", "x-user: bob", "web"], &intercepts),
            "ada",
        );

        assert_eq!(
            text,
            "GET http://web/\ndeployment/web, port 8080\n  \
             a, of ada on lovelace: does not match; 3 connections from before bypass it\n    \
             header x-user = ada: differs\n  \
             b, of bob on lovelace: matches; 3 connections from before bypass it\n    \
             header x-user: matches\n  \
             c, of bob on lovelace: matches; 3 connections from before bypass it\n  \
             answered by the workstation lovelace of bob\n"
        );
    }

    #[test]
    fn what_nobody_wants_or_nobody_can_have_yet_is_the_applications() {
        let of_ada = |ready| [intercept("a", "ada", header("ada"), ready)];

        let none = explained(&["web"], &of_ada(true));
        let later = explained(&["-H", "x-user: ada", "web"], &of_ada(false));

        assert!(
            told(&none, "ada")
                .contains("header x-user = ada: is not there\n  answered by the application")
        );
        assert!(told(&later, "ada").contains("matches, and is not ready: Attaching"));
        assert_eq!(later.ways[0].answered_by, None);
    }
}
