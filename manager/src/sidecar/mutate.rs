//! What a new pod gets: a pod in, a JSON patch (RFC 6902) out. Pure.
//!
//! The label of the pod names ports. Each moves its *name* from the application's container to the agent's, so that Services
//! that look for the name find the agent; the application keeps its number, and probes that used the name get that. A pod
//! that has the agent already needs nothing, so a second call changes nothing.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt as _;
use serde_json::{Value, json};
use tp_manager_api::{SIDECAR, SIDECAR_LABEL};

use super::container::{Blueprint, NO_TOKEN, Taken};
use crate::intercepts::pod::{is_windows, mesh};

/// First port on which an agent listens in place of an application.
const LISTEN_FIRST: u16 = 15100;

/// Why a pod is left as it is.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Left {
    /// It has no label, or the agent already.
    #[error("nothing is to be done")]
    AsItIs,
    #[error("it uses its node's network, processes or IPC")]
    HostNamespaces,
    #[error("it runs on Windows")]
    Windows,
    #[error("it has the proxy of {0}")]
    Mesh(&'static str),
    #[error("no container has a TCP port named {0:?}")]
    NoPort(String),
    #[error("several containers have a port named {0:?}")]
    TwoPorts(String),
    #[error("its containers end, and an agent before Kubernetes 1.32 would keep it from ending")]
    Ends,
}

/// The patch of a pod that asks for the agent.
pub(super) fn patch(pod: &Pod, blueprint: &Blueprint<'_>, seed: &str) -> Result<Vec<Value>, Left> {
    let asked = pod.labels().get(SIDECAR_LABEL).ok_or(Left::AsItIs)?;
    let spec = pod.spec.as_ref().ok_or(Left::AsItIs)?;
    check(spec, blueprint.native)?;
    let mut patch = Vec::new();
    let mut taken = Vec::new();
    for name in asked.split('.').collect::<BTreeSet<_>>() {
        let (container, port, app) = find(spec, name)?;
        let listen = free_port(spec, &taken);
        patch.push(
            json!({ "op": "remove", "path": format!("/spec/containers/{container}/ports/{port}/name") }),
        );
        patch.extend(numbered(container, &spec.containers[container], name, app));
        taken.push(Taken {
            name: name.to_owned(),
            app,
            listen,
        });
    }
    let volume = json!({ "name": NO_TOKEN, "emptyDir": { "sizeLimit": "1Mi" } });
    let volumes = spec.volumes.as_deref().unwrap_or_default();
    patch.push(append("volumes", volumes.is_empty(), volume));
    let agent = blueprint.container(&taken, seed);
    patch.push(match blueprint.native {
        true => {
            let first = spec.init_containers.as_deref().unwrap_or_default();
            append("initContainers", first.is_empty(), agent)
        }
        false => append("containers", false, agent),
    });
    Ok(patch)
}

fn check(spec: &PodSpec, native: bool) -> Result<(), Left> {
    let mut containers = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten());
    if containers.any(|container| container.name == SIDECAR) {
        return Err(Left::AsItIs);
    }
    let host = [spec.host_network, spec.host_pid, spec.host_ipc];
    if host.contains(&Some(true)) {
        return Err(Left::HostNamespaces);
    }
    if is_windows(spec) {
        return Err(Left::Windows);
    }
    if let Some(mesh) = mesh(spec) {
        return Err(Left::Mesh(mesh));
    }
    let stays = spec.restart_policy.as_deref().is_none_or(|p| p == "Always");
    match native || stays {
        true => Ok(()),
        false => Err(Left::Ends),
    }
}

/// Index of the container, index of its port, and the port's number.
fn find(spec: &PodSpec, name: &str) -> Result<(usize, usize, u16), Left> {
    let mut found = spec
        .containers
        .iter()
        .enumerate()
        .flat_map(|(at, container)| {
            let ports = container.ports.iter().flatten().enumerate();
            let named = ports.filter(|(_, port)| {
                port.name.as_deref() == Some(name)
                    && port
                        .protocol
                        .as_deref()
                        .is_none_or(|protocol| protocol == "TCP")
            });
            named.filter_map(move |(index, port)| {
                let number = u16::try_from(port.container_port).ok()?;
                Some((at, index, number))
            })
        });
    let first = found.next().ok_or_else(|| Left::NoPort(name.to_owned()))?;
    match found.next() {
        None => Ok(first),
        Some(_) => Err(Left::TwoPorts(name.to_owned())),
    }
}

/// One that no container declares. What is not declared is not known, hence a range that few use.
fn free_port(spec: &PodSpec, taken: &[Taken]) -> u16 {
    let containers = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten());
    let declared: Vec<i32> = containers
        .flat_map(|container| container.ports.iter().flatten())
        .map(|port| port.container_port)
        .collect();
    let is_free = |port: &u16| {
        !declared.contains(&i32::from(*port)) && taken.iter().all(|other| other.listen != *port)
    };
    let free = (LISTEN_FIRST..=u16::MAX).find(is_free);
    free.expect("a pod of 1 MiB does not declare fifty thousand ports")
}

/// Probes and hooks of the container that use the name of the port get its number.
fn numbered(at: usize, container: &Container, name: &str, app: u16) -> impl Iterator<Item = Value> {
    let probes = [
        ("livenessProbe", container.liveness_probe.as_ref()),
        ("readinessProbe", container.readiness_probe.as_ref()),
        ("startupProbe", container.startup_probe.as_ref()),
    ];
    let probes = probes.into_iter().flat_map(|(kind, probe)| {
        let (http, tcp) = probe.map_or((None, None), probe_ports);
        [
            (kind.to_owned(), "httpGet", http),
            (kind.to_owned(), "tcpSocket", tcp),
        ]
    });
    let lifecycle = container.lifecycle.as_ref();
    let hooks = [
        (
            "postStart",
            lifecycle.and_then(|hooks| hooks.post_start.as_ref()),
        ),
        (
            "preStop",
            lifecycle.and_then(|hooks| hooks.pre_stop.as_ref()),
        ),
    ];
    let hooks = hooks.into_iter().flat_map(|(kind, hook)| {
        let http = hook
            .and_then(|hook| hook.http_get.as_ref())
            .map(|http| &http.port);
        let tcp = hook
            .and_then(|hook| hook.tcp_socket.as_ref())
            .map(|tcp| &tcp.port);
        let kind = format!("lifecycle/{kind}");
        [(kind.clone(), "httpGet", http), (kind, "tcpSocket", tcp)]
    });
    let by_name: Vec<_> = probes
        .chain(hooks)
        .filter(|(_, _, port)| matches!(port, Some(IntOrString::String(port)) if port == name))
        .map(|(kind, handler, _)| {
            let path = format!("/spec/containers/{at}/{kind}/{handler}/port");
            json!({ "op": "replace", "path": path, "value": app })
        })
        .collect();
    by_name.into_iter()
}

fn probe_ports(probe: &Probe) -> (Option<&IntOrString>, Option<&IntOrString>) {
    let http = probe.http_get.as_ref().map(|http| &http.port);
    let tcp = probe.tcp_socket.as_ref().map(|tcp| &tcp.port);
    (http, tcp)
}

fn append(list: &str, is_empty: bool, item: Value) -> Value {
    match is_empty {
        true => json!({ "op": "add", "path": format!("/spec/{list}"), "value": [item] }),
        false => json!({ "op": "add", "path": format!("/spec/{list}/-"), "value": item }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tp_tunnel::Identity;

    fn object() -> Value {
        json!({
            "metadata": { "generateName": "web-", "labels": { "app": "web", "tp.dev/sidecar": "http" } },
            "spec": {
                "containers": [
                    { "name": "log", "image": "log", "ports": [{ "name": "http", "containerPort": 53, "protocol": "UDP" }] },
                    { "name": "app", "image": "app",
                      "ports": [{ "name": "admin", "containerPort": 15100 }, { "name": "http", "containerPort": 8080 }],
                      "readinessProbe": { "httpGet": { "path": "/", "port": "http" } },
                      "livenessProbe": { "tcpSocket": { "port": "admin" } },
                      "startupProbe": { "tcpSocket": { "port": 8080 } },
                      "lifecycle": { "preStop": { "httpGet": { "path": "/stop", "port": "http" } } } },
                ],
            },
        })
    }

    fn decide(object: &Value, native: bool) -> Result<Vec<Value>, Left> {
        let blueprint = Blueprint {
            image: "tp:1",
            manager_key: Identity::generate().key_hash(),
            native,
        };
        let pod: Pod = serde_json::from_value(object.clone()).unwrap();
        patch(&pod, &blueprint, &"00".repeat(32))
    }

    fn patched(object: &Value, native: bool) -> Value {
        let mut object = object.clone();
        let patch = json!(decide(&object, native).unwrap());
        let patch: json_patch::Patch = serde_json::from_value(patch).unwrap();
        json_patch::patch(&mut object, &patch).unwrap();
        object
    }

    #[test]
    fn the_name_moves_and_the_number_stays() {
        let pod = patched(&object(), true);

        let app = &pod["spec"]["containers"][1];
        assert_eq!(app["ports"][1], json!({ "containerPort": 8080 }));
        assert_eq!(app["ports"][0]["name"], "admin");
        assert_eq!(app["readinessProbe"]["httpGet"]["port"], 8080);
        assert_eq!(app["lifecycle"]["preStop"]["httpGet"]["port"], 8080);
        assert_eq!(app["livenessProbe"]["tcpSocket"]["port"], "admin");
        // UDP is another port of the same name.
        assert_eq!(
            pod["spec"]["containers"][0],
            object()["spec"]["containers"][0]
        );
        let agent = &pod["spec"]["initContainers"][0];
        // 15100 is the application's.
        let own = json!([{ "name": "http", "containerPort": 15101, "protocol": "TCP" }]);
        assert_eq!(agent["ports"], own);
        assert_eq!(agent["restartPolicy"], "Always");
        assert!(agent["args"].to_string().contains("[::]:15101=8080"));
        let (volume, mount) = (&pod["spec"]["volumes"][0], &agent["volumeMounts"][0]);
        assert_eq!(volume["name"], mount["name"]);
    }

    #[test]
    fn a_second_call_changes_nothing() {
        for native in [true, false] {
            let once = patched(&object(), native);
            assert_eq!(decide(&once, native), Err(Left::AsItIs));
        }
    }

    #[test]
    fn what_is_there_stays_in_its_place() {
        let mut crowded = object();
        crowded["spec"]["initContainers"] = json!([{ "name": "first", "image": "x" }]);
        crowded["spec"]["volumes"] = json!([{ "name": "data", "emptyDir": {} }]);

        let pod = patched(&crowded, true);

        assert_eq!(pod["spec"]["initContainers"][0]["name"], "first");
        assert_eq!(pod["spec"]["initContainers"][1]["name"], SIDECAR);
        assert_eq!(pod["spec"]["volumes"][0]["name"], "data");
        // Before 1.32 Services do not find ports of native sidecars.
        let pod = patched(&crowded, false);
        assert_eq!(pod["spec"]["initContainers"].as_array().unwrap().len(), 1);
        assert_eq!(pod["spec"]["containers"][2]["name"], SIDECAR);
        assert!(pod["spec"]["containers"][2]["restartPolicy"].is_null());
    }

    #[test]
    fn several_ports_go_to_one_agent() {
        let mut both = object();
        both["metadata"]["labels"][SIDECAR_LABEL] = json!("http.admin.http");

        let pod = patched(&both, true);

        let ports = &pod["spec"]["initContainers"][0]["ports"];
        let named = |name: &str, port: u16| json!({ "name": name, "containerPort": port, "protocol": "TCP" });
        assert_eq!(*ports, json!([named("admin", 15101), named("http", 15102)]));
        let probe = &pod["spec"]["containers"][1]["livenessProbe"];
        assert_eq!(probe["tcpSocket"]["port"], 15100);
    }

    #[test]
    fn what_the_agent_does_not_belong_into_is_left_as_it_is() {
        let plain = || json!({ "name": "istio-proxy", "image": "x" });
        for (change, expected) in [
            (json!({ "hostNetwork": true }), Left::HostNamespaces),
            (json!({ "hostPID": true }), Left::HostNamespaces),
            (json!({ "hostIPC": true }), Left::HostNamespaces),
            (json!({ "os": { "name": "windows" } }), Left::Windows),
            (json!({ "initContainers": [plain()] }), Left::Mesh("Istio")),
            (json!({ "containers": [] }), Left::NoPort("http".into())),
        ] {
            let mut pod = object();
            for (field, value) in change.as_object().unwrap() {
                pod["spec"][field] = value.clone();
            }
            assert_eq!(decide(&pod, true), Err(expected), "{change}");
        }
        let mut two = object();
        two["spec"]["containers"][0]["ports"][0]["protocol"] = json!("TCP");
        assert_eq!(decide(&two, true), Err(Left::TwoPorts("http".into())));
        let mut job = object();
        job["spec"]["restartPolicy"] = json!("Never");
        assert_eq!(decide(&job, false), Err(Left::Ends));
        assert!(decide(&job, true).is_ok());
        let mut unlabelled = object();
        unlabelled["metadata"]["labels"] = json!({});
        assert_eq!(decide(&unlabelled, true), Err(Left::AsItIs));
    }

    #[test]
    fn nothing_of_the_pod_chooses_the_image() {
        let mut pod = object();
        pod["metadata"]["annotations"] =
            json!({ "tp.dev/image": "evil", "tp.dev/sidecar-image": "evil" });
        assert!(
            !json!(decide(&pod, true).unwrap())
                .to_string()
                .contains("evil")
        );
    }
}
