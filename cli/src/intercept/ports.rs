//! Which port of a workload is meant: from `-p LOCAL[:REMOTE]` and the Services before it to a port of its pods. Pure.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use k8s_openapi::api::core::v1::{Container, PodSpec, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;
use tp_manager_api::route_table::Protocol;

use crate::report::Failure;

/// `LOCAL[:REMOTE][/udp]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortFlag {
    /// Port on the workstation.
    pub local: u16,
    /// Name or number of a Service's port, or of a container's.
    pub remote: Option<String>,
    /// What is carried to it.
    pub protocol: Protocol,
}

impl FromStr for PortFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            "expected LOCAL or LOCAL:REMOTE, such as 8080, 8080:80, 8080:http or 5353:53/udp"
                .to_owned()
        };
        let (text, protocol) = match text.rsplit_once('/') {
            Some((text, udp)) if udp.eq_ignore_ascii_case("udp") => (text, Protocol::Udp),
            Some((text, tcp)) if tcp.eq_ignore_ascii_case("tcp") => (text, Protocol::Tcp),
            Some(_) => return Err(expected()),
            None => (text, Protocol::Tcp),
        };
        let (local, remote) = match text.split_once(':') {
            Some((local, remote)) => (local, Some(remote)),
            None => (text, None),
        };
        let local = local.parse().ok().filter(|port| *port != 0);
        if remote.is_some_and(|remote| remote.is_empty() || remote.contains([':', '/'])) {
            return Err(expected());
        }
        Ok(Self {
            local: local.ok_or_else(expected)?,
            remote: remote.map(str::to_owned),
            protocol,
        })
    }
}

/// One port of a workload's pods, and how it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The container's port.
    pub port: u16,
    /// Service and port by which it is reached, where there is one.
    pub service: Option<(String, u16)>,
    /// Name of the port, as the Service or the container has it.
    name: Option<String>,
    /// Container that declares the port.
    pub container: Option<String>,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.service, &self.name) {
            (Some((service, port)), Some(name)) => {
                write!(f, "{port} ({name}) of Service {service}")
            }
            (Some((service, port)), None) => write!(f, "{port} of Service {service}"),
            (None, Some(name)) => write!(f, "{} ({name}) of its container", self.port),
            (None, None) => write!(f, "{} of its container", self.port),
        }
    }
}

/// What is known of a workload's pods and of the Services before them.
#[derive(Debug, Clone, Copy)]
pub struct Scene<'a> {
    /// Labels of the pods.
    pub labels: &'a BTreeMap<String, String>,
    /// The pods.
    pub spec: &'a PodSpec,
    /// Services of the namespace.
    pub services: &'a [Service],
}

impl Scene<'_> {
    /// Every TCP port: first those that Services lead to, in their order, then what containers declare besides.
    #[must_use]
    pub fn targets(&self) -> Vec<Target> {
        self.targets_of(Protocol::Tcp)
    }

    fn targets_of(&self, wanted: Protocol) -> Vec<Target> {
        let before = self
            .services
            .iter()
            .filter(|service| self.is_before(service));
        let mut targets: Vec<_> = before
            .flat_map(|service| self.of_service(service, wanted))
            .collect();
        for (container, declared) in self.declared(wanted) {
            let port = declared.0;
            if targets.iter().all(|target| target.port != port) {
                targets.push(Target {
                    port,
                    service: None,
                    name: declared.1,
                    container: Some(container.name.clone()),
                });
            }
        }
        targets
    }

    /// The one that is meant.
    ///
    /// # Errors
    /// None is, or several are; the ports that there are are named.
    pub fn choose(
        &self,
        service: Option<&str>,
        container: Option<&str>,
        remote: Option<&str>,
        protocol: Protocol,
    ) -> Result<Target, Failure> {
        let mut targets = self.targets_of(protocol);
        let known = listed(&targets);
        targets.retain(|target| {
            let of_service = service.is_none_or(|wanted| {
                target
                    .service
                    .as_ref()
                    .is_some_and(|(name, _)| name == wanted)
            });
            let of_container = container.is_none_or(|wanted| {
                target
                    .container
                    .as_deref()
                    .is_none_or(|name| name == wanted)
            });
            of_service && of_container
        });
        let mut meant = match remote {
            Some(remote) => named(&targets, remote),
            None => targets,
        };
        if meant.is_empty()
            && let (None, Some(Ok(port @ 1..))) = (service, remote.map(str::parse))
        {
            // Nothing need be declared for a container to listen.
            return Ok(Target {
                port,
                service: None,
                name: None,
                container: container.map(str::to_owned),
            });
        }
        meant.dedup_by_key(|target| target.port);
        match meant.len() {
            1 => Ok(meant.remove(0)),
            0 => Err(nothing(service, remote, protocol, &known)),
            _ => Err(Failure::new("it is not clear which port is meant")
                .because(format!("there is {}", listed(&meant)))
                .hint("say which: `-p LOCAL:PORT`, and `--service` where two Services have it")),
        }
    }

    /// A Service without a selector has no pods of its own.
    fn is_before(&self, service: &Service) -> bool {
        let selector = service
            .spec
            .as_ref()
            .and_then(|spec| spec.selector.as_ref());
        selector.is_some_and(|selector| {
            !selector.is_empty()
                && selector
                    .iter()
                    .all(|(key, value)| self.labels.get(key) == Some(value))
        })
    }

    fn of_service<'b>(
        &'b self,
        service: &'b Service,
        wanted: Protocol,
    ) -> impl Iterator<Item = Target> + 'b {
        let ports = service
            .spec
            .iter()
            .flat_map(|spec| spec.ports.iter().flatten());
        ports
            .filter(move |port| is(port.protocol.as_deref(), wanted))
            .filter_map(move |port| {
                let (target, container) = self.led_to(port, wanted)?;
                Some(Target {
                    port: target,
                    service: Some((service.name_any(), u16::try_from(port.port).ok()?)),
                    name: port.name.clone().filter(|name| !name.is_empty()),
                    container,
                })
            })
    }

    /// The container's port that a Service's port leads to, and the container that declares it.
    fn led_to(&self, port: &ServicePort, protocol: Protocol) -> Option<(u16, Option<String>)> {
        let container_of = |wanted: u16| {
            let mut declared = self.declared(protocol);
            declared
                .find(|(_, (port, _))| *port == wanted)
                .map(|(container, _)| container.name.clone())
        };
        match &port.target_port {
            None => u16::try_from(port.port)
                .ok()
                .map(|port| (port, container_of(port))),
            Some(IntOrString::Int(number)) => u16::try_from(*number)
                .ok()
                .map(|port| (port, container_of(port))),
            Some(IntOrString::String(name)) => {
                let mut declared = self.declared(protocol);
                declared
                    .find(|(_, (_, declared))| declared.as_ref() == Some(name))
                    .map(|(container, (port, _))| (port, Some(container.name.clone())))
            }
        }
    }

    /// Ports of the containers, native sidecars included, with their names.
    fn declared(
        &self,
        wanted: Protocol,
    ) -> impl Iterator<Item = (&Container, (u16, Option<String>))> {
        let sidecars = self.spec.init_containers.iter().flatten();
        let sidecars =
            sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
        self.spec
            .containers
            .iter()
            .chain(sidecars)
            .flat_map(move |container| {
                let ports = container.ports.iter().flatten();
                ports
                    .filter(move |port| is(port.protocol.as_deref(), wanted))
                    .filter_map(move |port| {
                        let number = u16::try_from(port.container_port).ok()?;
                        Some((container, (number, port.name.clone())))
                    })
            })
    }
}

fn is(protocol: Option<&str>, wanted: Protocol) -> bool {
    protocol.unwrap_or("TCP") == spelled(wanted)
}

/// As Kubernetes spells it.
fn spelled(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
    }
}

/// By a Service's name or number first, as clients know the port; only then by the container's.
fn named(targets: &[Target], remote: &str) -> Vec<Target> {
    let number = remote.parse::<u16>().ok();
    let by_service = |target: &&Target| match &target.service {
        Some((_, port)) => Some(*port) == number || target.name.as_deref() == Some(remote),
        None => false,
    };
    let by_container = |target: &&Target| {
        Some(target.port) == number
            || (target.service.is_none() && target.name.as_deref() == Some(remote))
    };
    let found: Vec<_> = targets.iter().filter(by_service).cloned().collect();
    match found.is_empty() {
        false => found,
        true => targets.iter().filter(by_container).cloned().collect(),
    }
}

fn nothing(
    service: Option<&str>,
    remote: Option<&str>,
    protocol: Protocol,
    known: &str,
) -> Failure {
    let kind = spelled(protocol);
    let what = match (service, remote) {
        (Some(service), Some(remote)) => {
            format!("no Service {service} leads to the workload by a {kind} port {remote}")
        }
        (Some(service), None) => format!("no Service {service} leads to the workload"),
        (None, Some(remote)) => format!("the workload has no {kind} port {remote}"),
        (None, None) => format!("the workload has no {kind} port that is known"),
    };
    match known {
        "" => Failure::new(what)
            .because("no Service leads to it, and its containers declare none")
            .hint("say which port it listens on: `-p LOCAL:PORT`"),
        known => Failure::new(what).because(format!("there is {known}")),
    }
}

fn listed(targets: &[Target]) -> String {
    let shown: Vec<_> = targets.iter().map(ToString::to_string).collect();
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_port_flag_takes_numbers_and_names() {
        let parsed = |text: &str| {
            text.parse::<PortFlag>()
                .map(|port| (port.local, port.remote))
        };
        assert_eq!(parsed("8080"), Ok((8080, None)));
        assert_eq!(parsed("8080:80"), Ok((8080, Some("80".into()))));
        assert_eq!(parsed("8080:http"), Ok((8080, Some("http".into()))));
        for bad in ["", "0", "x", "80:", ":80", "70000", "1:2:3", "1:2/x"] {
            assert!(bad.parse::<PortFlag>().is_err(), "{bad}");
        }
        for (text, protocol) in [
            ("5353:53/udp", Protocol::Udp),
            ("5353:dns/UDP", Protocol::Udp),
            ("5353/udp", Protocol::Udp),
            ("80:80/tcp", Protocol::Tcp),
        ] {
            assert_eq!(text.parse::<PortFlag>().unwrap().protocol, protocol);
        }
    }

    fn chosen(
        services: Value,
        ports: Value,
        (service, container, remote): (Option<&str>, Option<&str>, Option<&str>),
    ) -> Result<Target, Failure> {
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        let services: Vec<Service> = serde_json::from_value(services).unwrap();
        let spec: PodSpec = serde_json::from_value(json!({ "containers": [
            { "name": "app", "ports": ports },
            { "name": "side", "ports": [{ "containerPort": 9000, "name": "admin" }] },
        ]}))
        .unwrap();
        let scene = Scene {
            labels: &labels,
            spec: &spec,
            services: &services,
        };
        scene.choose(service, container, remote, Protocol::Tcp)
    }

    fn service(name: &str, app: &str, ports: Value) -> Value {
        json!({ "metadata": { "name": name }, "spec": { "selector": { "app": app }, "ports": ports } })
    }

    #[test]
    fn a_port_is_found_as_clients_know_it() {
        let http = json!([{ "containerPort": 8080, "name": "http" }]);
        let web = service(
            "web",
            "web",
            json!([{ "name": "http", "port": 80, "targetPort": "http" }]),
        );
        let two = service(
            "two",
            "web",
            json!([{ "name": "a", "port": 1, "targetPort": 8080 }, { "name": "b", "port": 2, "targetPort": 9000 },
                   { "name": "dns", "port": 53, "protocol": "UDP" }]),
        );
        let other = service("other", "other", json!([{ "port": 80 }]));
        for (services, wanted, expected) in [
            (
                json!([web]),
                (None, None, Some("80")),
                "80 (http) of Service web",
            ),
            (
                json!([web]),
                (None, None, Some("http")),
                "80 (http) of Service web",
            ),
            (
                json!([web]),
                (None, None, Some("8080")),
                "80 (http) of Service web",
            ),
            (
                json!([web]),
                (Some("web"), None, None),
                "80 (http) of Service web",
            ),
            (
                json!([web]),
                (None, Some("app"), None),
                "80 (http) of Service web",
            ),
            (
                json!([web]),
                (None, None, Some("admin")),
                "9000 (admin) of its container",
            ),
            (json!([web]), (None, None, Some("7")), "7 of its container"),
            (
                json!([two]),
                (None, None, Some("2")),
                "2 (b) of Service two",
            ),
            (
                json!([web, two]),
                (Some("two"), None, Some("a")),
                "1 (a) of Service two",
            ),
            (
                json!([other]),
                (None, Some("app"), None),
                "8080 (http) of its container",
            ),
        ] {
            let target = chosen(services, http.clone(), wanted);
            let target = target.unwrap_or_else(|failure| panic!("{wanted:?}: {failure}"));
            assert_eq!(target.to_string(), expected, "{wanted:?}");
        }
        let target = chosen(json!([two]), http, (None, None, Some("b"))).unwrap();
        assert_eq!(
            (target.port, target.container.as_deref()),
            (9000, Some("side"))
        );
    }

    #[test]
    fn what_is_not_clear_is_asked_back_with_the_ports_that_there_are() {
        let http = json!([{ "containerPort": 8080, "name": "http" }]);
        let web = service("web", "web", json!([{ "port": 80, "targetPort": "http" }]));
        for (services, ports, wanted, part) in [
            (
                json!([web]),
                http.clone(),
                (None, None, None),
                "80 of Service web, 9000 (admin) of its container",
            ),
            (
                json!([web]),
                http.clone(),
                (None, None, Some("grpc")),
                "no TCP port grpc",
            ),
            (
                json!([web]),
                http.clone(),
                (Some("x"), None, None),
                "no Service x",
            ),
            (
                json!([web]),
                http,
                (Some("web"), None, Some("7")),
                "by a TCP port 7",
            ),
        ] {
            let failure = chosen(services, ports, wanted).unwrap_err();
            assert!(failure.to_string().contains(part), "{failure}");
        }
    }
}
