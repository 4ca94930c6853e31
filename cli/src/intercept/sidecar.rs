//! A workload whose pods have the agent beside their application: what its pod template has to say, and making its pods
//! anew, which is done as the user and only when the user says so.
//!
//! The agent takes the *name* of a port over, so that a Service which leads there by name finds it. [`label`] is pure.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams};
use kube::runtime::wait::await_condition;
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};
use tp_manager_api::intercept::WorkloadKind;
use tp_manager_api::{Intercept, SIDECAR, SIDECAR_LABEL};

use super::ports::Target;
use super::workload::Found;
use crate::install::FIELD_MANAGER;
use crate::kubeconfig::Cluster;
use crate::report::{self, Failure};

/// How long a rollout may take.
const ROLLOUT: Duration = Duration::from_secs(180);

/// Longest value of a label.
const LABEL_MAX: usize = 63;

/// Makes sure that the pods of a workload have the agent before these ports. Bare pods are the manager's to look at.
///
/// # Errors
/// They have not, and the user does not want them made anew, or they cannot be.
pub async fn make_sure(
    cluster: &Cluster,
    namespace: &str,
    found: &Found,
    services: &[Service],
    targets: &[&Target],
    restart: bool,
) -> Result<(), Failure> {
    if found.workload.kind == WorkloadKind::Pod {
        return Ok(());
    }
    let wanted = label(found, services, targets)?;
    let labelled = found.labels.get(SIDECAR_LABEL) == Some(&wanted);
    if labelled && all_have_it(cluster, namespace, found).await? {
        return Ok(());
    }
    if !restart {
        return Err(without(found, &wanted));
    }
    let template = match labelled {
        // As `kubectl rollout restart` does.
        true => json!({ "annotations": { RESTARTED: Timestamp::now().to_string() } }),
        false => json!({ "labels": { SIDECAR_LABEL: wanted } }),
    };
    let rolling = roll(cluster, namespace, found, template);
    report::step(
        &format!("making the pods of {} anew", found.workload),
        rolling,
    )
    .await
}

/// Whether the pod template, which asks for the agent, asks for it before these ports.
///
/// # Errors
/// It does not, or it cannot. No other agent goes into such pods.
pub fn check(found: &Found, services: &[Service], targets: &[&Target]) -> Result<(), Failure> {
    if found.workload.kind == WorkloadKind::Pod {
        return Ok(());
    }
    let wanted = label(found, services, targets)?;
    match found.labels.get(SIDECAR_LABEL) == Some(&wanted) {
        true => Ok(()),
        false => Err(without(found, &wanted)),
    }
}

fn without(found: &Found, wanted: &str) -> Failure {
    let what = format!(
        "the pods of {} were made without the agent before that port",
        found.workload
    );
    Failure::new(what)
        .because(format!("it goes into new pods with the label {SIDECAR_LABEL}={wanted}"))
        .hint("`--attach sidecar --restart-pods` puts the label into the pod template and makes the pods anew; or have it in your manifests")
}

/// The label with which pods get an agent before these ports, besides those that they have it before already: the one that
/// is there, if that will do.
///
/// # Errors
/// A port has no name, or the Service leads there by number.
pub fn label(found: &Found, services: &[Service], targets: &[&Target]) -> Result<String, Failure> {
    let there = found.labels.get(SIDECAR_LABEL);
    let before: BTreeSet<&str> = there.iter().flat_map(|label| label.split('.')).collect();
    let mut names = before.clone();
    for target in targets {
        names.insert(name_of(found, target.port)?);
        if let Some((service, port)) = &target.service
            && leads_by_number(services, service, *port)
        {
            return Err(by_number(found, service, *port, target.port));
        }
    }
    if let Some(there) = there.filter(|_| names == before) {
        return Ok(there.clone());
    }
    let label = names.into_iter().collect::<Vec<_>>().join(".");
    match label.len() {
        ..=LABEL_MAX => Ok(label),
        _ => Err(Failure::new(format!(
            "a sidecar cannot stand before so many ports: {label}"
        ))),
    }
}

/// Datagrams need a redirect.
pub fn no_udp(found: &Found) -> Failure {
    Failure::new(format!("no sidecar can stand before a UDP port of {}", found.workload)).hint(format!(
        "pods without the label {SIDECAR_LABEL} get an agent that takes UDP, where the namespace allows NET_ADMIN"
    ))
}

fn name_of(found: &Found, number: u16) -> Result<&str, Failure> {
    let containers = found.spec.containers.iter();
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    let named = ports.find(|port| {
        port.container_port == i32::from(number)
            && port
                .protocol
                .as_deref()
                .is_none_or(|protocol| protocol == "TCP")
    });
    let name = named.and_then(|port| port.name.as_deref());
    name.ok_or_else(|| {
        Failure::new(format!("no sidecar can stand before port {number} of {}", found.workload))
            .because("the port has no name, and an agent without NET_ADMIN gets what a Service leads to a name")
            .hint(format!(
                "name it in the pod template, `ports: [{{name: http, containerPort: {number}}}]`, and give the Service `targetPort: http`"
            ))
    })
}

fn leads_by_number(services: &[Service], name: &str, port: u16) -> bool {
    let service = services.iter().find(|service| service.name_any() == name);
    let spec = service.and_then(|service| service.spec.as_ref());
    let mut ports = spec
        .into_iter()
        .flat_map(|spec| spec.ports.iter().flatten());
    let found = ports.find(|entry| entry.port == i32::from(port));
    found.is_some_and(|port| !matches!(port.target_port, Some(IntOrString::String(_))))
}

fn by_number(found: &Found, service: &str, port: u16, number: u16) -> Failure {
    Failure::new(format!(
        "no sidecar can stand before port {number} of {}",
        found.workload
    ))
    .because(format!(
        "Service {service} leads there by the number, past the sidecar"
    ))
    .hint(format!(
        "give port {port} of the Service the container port's name as `targetPort`"
    ))
}

/// Whether every pod that stays was made with it.
async fn all_have_it(cluster: &Cluster, namespace: &str, found: &Found) -> Result<bool, Failure> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace);
    let labels = found.labels.iter();
    let labels: Vec<_> = labels
        .filter(|(key, _)| *key != SIDECAR_LABEL)
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    let params = ListParams::default().labels(&labels.join(","));
    let pods = cluster.in_time(pods.list(&params)).await?;
    let staying = pods.items.iter().filter(|pod| stays(pod));
    Ok(staying.into_iter().all(has_it))
}

fn stays(pod: &Pod) -> bool {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    pod.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Succeeded" | "Failed"))
}

fn has_it(pod: &Pod) -> bool {
    let spec = pod.spec.iter();
    let mut containers = spec.flat_map(|spec| {
        spec.containers
            .iter()
            .chain(spec.init_containers.iter().flatten())
    });
    containers.any(|container| container.name == SIDECAR)
}

/// Takes the label out of the pod template again, and makes the pods anew without the agent. Whether there was one.
///
/// # Errors
/// Somebody still intercepts the workload, or its pods cannot be made anew.
pub async fn take_out(cluster: &Cluster, namespace: &str, found: &Found) -> Result<bool, Failure> {
    if !found.labels.contains_key(SIDECAR_LABEL) {
        return Ok(false);
    }
    let intercepts: Api<Intercept> = Api::namespaced(cluster.client.clone(), namespace);
    let all = cluster
        .in_time(intercepts.list(&ListParams::default()))
        .await?;
    let mut others = all.items.iter().map(|intercept| &intercept.spec);
    if let Some(other) = others.find(|spec| spec.workload == found.workload) {
        let what = format!("the pods of {} keep the agent", found.workload);
        return Err(Failure::new(what)
            .because(format!("{} intercepts it as {}", other.user, other.name))
            .hint("try again after that"));
    }
    let template = json!({ "labels": { SIDECAR_LABEL: null } });
    let rolling = roll(cluster, namespace, found, template);
    report::step(
        &format!("making the pods of {} anew", found.workload),
        rolling,
    )
    .await?;
    Ok(true)
}

/// Changes the metadata of the pod template, and waits until the workload has rolled.
async fn roll(
    cluster: &Cluster,
    namespace: &str,
    found: &Found,
    template: Value,
) -> Result<(), Failure> {
    let kind = found.workload.kind;
    if matches!(kind, WorkloadKind::ReplicaSet | WorkloadKind::Pod) {
        let what = format!("the pods of {} cannot be made anew", found.workload);
        return Err(Failure::new(what)
            .because("nothing rolls them out")
            .hint(format!(
                "change the label {SIDECAR_LABEL} where they are defined, and delete them"
            )));
    }
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("apps", "v1", kind.as_str()));
    let api: Api<DynamicObject> =
        Api::namespaced_with(cluster.client.clone(), namespace, &resource);
    let patch = Patch::Merge(json!({ "spec": { "template": { "metadata": template } } }));
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let name = &found.workload.name;
    let patched = cluster.in_time(api.patch(name, &params, &patch)).await?;
    let generation = patched.metadata.generation.unwrap_or_default();
    let rolled = await_condition(api, name, |object: Option<&DynamicObject>| {
        object.is_some_and(|object| has_rolled(kind, generation, &object.data))
    });
    match tokio::time::timeout(ROLLOUT, rolled).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => {
            let what = format!("cannot see how the rollout of {} goes", found.workload);
            Err(Failure::new(what).caused_by(&error))
        }
        Err(_) => Err(Failure::new(format!(
            "{} has not rolled within {ROLLOUT:?}",
            found.workload
        ))
        .because("its new pods are not available, or it does not replace them by itself")
        .hint(format!(
            "`kubectl rollout status {} -n {namespace}` shows how it goes",
            found.workload
        ))),
    }
}

const RESTARTED: &str = "kubectl.kubernetes.io/restartedAt";

/// Whether all pods of this generation, or a later one, are there and available, and no others.
fn has_rolled(kind: WorkloadKind, generation: i64, object: &Value) -> bool {
    let (spec, status) = (&object["spec"], &object["status"]);
    let count = |field: &str| status[field].as_i64().unwrap_or(0);
    let observed = status["observedGeneration"].as_i64().unwrap_or(0) >= generation;
    let wanted = spec["replicas"].as_i64().unwrap_or(1);
    observed
        && match kind {
            WorkloadKind::DaemonSet => {
                let wanted = count("desiredNumberScheduled");
                count("updatedNumberScheduled") == wanted && count("numberAvailable") == wanted
            }
            WorkloadKind::Deployment
            | WorkloadKind::StatefulSet
            | WorkloadKind::ReplicaSet
            | WorkloadKind::Pod => ["replicas", "updatedReplicas", "availableReplicas"]
                .into_iter()
                .all(|field| count(field) == wanted),
        }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tp_manager_api::intercept::Workload;
    use tp_manager_api::route_table::Protocol;

    use super::*;

    fn found(label: Option<&str>) -> Found {
        let mut labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        labels.extend(label.map(|label| (SIDECAR_LABEL.to_owned(), label.to_owned())));
        let spec = json!({ "containers": [{ "name": "app", "ports": [
            { "name": "http", "containerPort": 8080 }, { "containerPort": 9090 },
            { "name": "dns", "containerPort": 5353, "protocol": "UDP" } ] }] });
        let workload = Workload {
            kind: WorkloadKind::Deployment,
            name: "web".into(),
        };
        Found::new(workload, labels, serde_json::from_value(spec).unwrap())
    }

    fn services(target: Value) -> Vec<Service> {
        let service = json!({ "metadata": { "name": "web" }, "spec": {
            "selector": { "app": "web" }, "ports": [{ "port": 80, "targetPort": target }] } });
        vec![serde_json::from_value(service).unwrap()]
    }

    fn asked(found: &Found, services: &[Service], remote: &str) -> Result<String, Failure> {
        let target = found
            .scene(services)
            .choose(None, None, Some(remote), Protocol::Tcp)?;
        label(found, services, &[&target])
    }

    #[test]
    fn the_label_names_the_port_and_keeps_others() {
        let by_name = services(json!("http"));
        assert_eq!(asked(&found(None), &by_name, "80").unwrap(), "http");
        for there in ["http", "http.admin"] {
            assert_eq!(asked(&found(Some(there)), &by_name, "80").unwrap(), there);
        }
        assert_eq!(
            asked(&found(Some("admin")), &by_name, "80").unwrap(),
            "admin.http"
        );
    }

    #[test]
    fn a_port_without_a_name_or_a_service_that_leads_by_number_is_refused_with_the_cure() {
        for (services, remote) in [
            (services(json!(8080)), "80"),
            (services(Value::Null), "9090"),
            (services(json!("http")), "9090"),
        ] {
            let failure = asked(&found(None), &services, remote).unwrap_err();
            let hint = failure.hint.clone().unwrap();
            assert!(
                failure.what.contains("no sidecar") && hint.contains("targetPort"),
                "{failure}"
            );
        }
    }

    #[test]
    fn a_rollout_is_over_when_all_pods_are_new_and_available() {
        let status = |observed: i64, updated: i64, available: i64| {
            json!({ "spec": { "replicas": 2 }, "status": { "observedGeneration": observed, "replicas": 2,
                "updatedReplicas": updated, "availableReplicas": available } })
        };
        let rolled = |object: &Value| has_rolled(WorkloadKind::Deployment, 3, object);
        assert!(rolled(&status(3, 2, 2)) && rolled(&status(4, 2, 2)));
        assert!(
            !rolled(&status(2, 2, 2)) && !rolled(&status(3, 1, 2)) && !rolled(&status(3, 2, 1))
        );
        let daemon = json!({ "status": { "observedGeneration": 3, "desiredNumberScheduled": 1,
            "updatedNumberScheduled": 1, "numberAvailable": 1 } });
        assert!(has_rolled(WorkloadKind::DaemonSet, 3, &daemon));
    }

    #[test]
    fn only_pods_that_stay_have_to_have_it() {
        let pod = |change: Value| -> Pod {
            let mut pod = json!({ "metadata": { "name": "web-1" },
                "spec": { "containers": [], "initContainers": [{ "name": SIDECAR }] } });
            pod["status"] = change;
            serde_json::from_value(pod).unwrap()
        };
        let running = pod(json!({ "phase": "Running" }));
        assert!(stays(&running) && has_it(&running));
        assert!(!stays(&pod(json!({ "phase": "Failed" }))));
        assert!(!has_it(&Pod::default()));
    }
}
