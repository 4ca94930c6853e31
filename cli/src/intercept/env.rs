//! The environment of a workload's container, as a program on the workstation gets it.
//!
//! It is read by running `cat /proc/self/environ` in the container, with the user's own right to do so (`create
//! pods/exec`): so it holds what the image sets as well, and nobody gets more than `kubectl exec` would give. What would
//! change how the workstation's own tools run is left out.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{AttachParams, ListParams};
use kube::{Api, ResourceExt};
use tokio::io::AsyncReadExt as _;
use tp_manager_api::intercept::WorkloadKind;

use super::workload::{self, Found, is_ready};
use crate::kubeconfig::{Cluster, Right};
use crate::report::{Failure, OrFail};

/// Names and values, in the order they came.
pub type Variables = Vec<(String, String)>;

/// Names that stay the workstation's own: where programs and their parts are looked for, and what code they load.
const DENIED: [&str; 18] = [
    "PATH",
    "HOME",
    "SHELL",
    "BASH_ENV",
    "ENV",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONSTARTUP",
    "NODE_OPTIONS",
    "JAVA_TOOL_OPTIONS",
    "_JAVA_OPTIONS",
    "JDK_JAVA_OPTIONS",
    "RUBYOPT",
    "PERL5OPT",
    "GIT_SSH_COMMAND",
    "PWD",
    "OLDPWD",
    "SHLVL",
];

/// Longest environment that is read.
const LONGEST: u64 = 4 * 1024 * 1024;

/// The container's variables without those that stay the workstation's own, unless their names are in `allowed`.
#[must_use]
pub fn without_denied(variables: Variables, allowed: &[String]) -> Variables {
    let allowed: BTreeSet<&str> = allowed.iter().map(String::as_str).collect();
    let stays = |name: &str| allowed.contains(name) || !is_denied(name);
    variables
        .into_iter()
        .filter(|(name, _)| stays(name))
        .collect()
}

fn is_denied(name: &str) -> bool {
    DENIED.contains(&name)
        || name.starts_with("LD_")
        || name.starts_with("DYLD_")
        || name.to_ascii_lowercase().ends_with("_proxy")
}

/// What tells a program that it handles an intercept, under our names and under Telepresence's.
#[must_use]
pub fn of_intercept(id: &str, container: Option<&str>) -> Variables {
    let container = container.map(|name| told("CONTAINER", name));
    let id = told("INTERCEPT_ID", id);
    id.into_iter()
        .chain(container.into_iter().flatten())
        .collect()
}

fn told(name: &str, value: &str) -> [(String, String); 2] {
    ["TELEPRESENCE_", "TP_"].map(|prefix| (format!("{prefix}{name}"), value.to_owned()))
}

/// What a program gets that is to run as the workload's container does.
///
/// # Errors
/// There is no such workload or container, or its environment cannot be read.
pub async fn of_workload(
    cluster: &Cluster,
    namespace: &str,
    workload: &str,
    container: Option<&str>,
    allowed: &[String],
) -> Result<Variables, Failure> {
    let found = workload::find(cluster, namespace, workload).await?;
    let container = found.container(container, None)?;
    let variables = of_container(cluster, namespace, &found, &container).await?;
    let mut given = without_denied(variables, allowed);
    given.extend(told("CONTAINER", &container));
    Ok(given)
}

/// The variables of a process in the container of one of the workload's pods.
///
/// # Errors
/// The user may not run a program there, no pod runs, or its image has no `cat`.
pub async fn of_container(
    cluster: &Cluster,
    namespace: &str,
    found: &Found,
    container: &str,
) -> Result<Variables, Failure> {
    let cannot = || format!("cannot read the environment of {}", found.workload);
    may_exec(cluster, namespace)
        .await
        .map_err(|failure| failure.within(cannot()))?;
    let pod = running_pod(cluster, namespace, found).await?;
    let environment = environ(cluster, namespace, &pod, container).await;
    let bytes = environment.map_err(|failure| {
        failure
            .within(cannot())
            .hint_or("it is read with `cat` of the container's image; without one, `kubectl describe` shows what is set")
    })?;
    Ok(parsed(&bytes))
}

async fn may_exec(cluster: &Cluster, namespace: &str) -> Result<(), Failure> {
    let right = Right {
        verb: "create",
        group: "",
        resource: "pods",
        subresource: "exec",
    };
    match cluster.may(&right, Some(namespace)).await? {
        true => Ok(()),
        false => Err(Failure::new(format!(
            "you may not create pods/exec in namespace {namespace}"
        ))
        .hint("ask for that right; it is the same power")),
    }
}

async fn running_pod(cluster: &Cluster, namespace: &str, found: &Found) -> Result<String, Failure> {
    if found.workload.kind == WorkloadKind::Pod {
        return Ok(found.workload.name.clone());
    }
    let api: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace);
    let labels: Vec<_> = found
        .labels
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    let of_workload = ListParams::default().labels(&labels.join(","));
    let pods = cluster.in_time(api.list(&of_workload)).await?;
    let ready = pods.items.iter().find(|pod| is_ready(pod));
    ready.map(ResourceExt::name_any).ok_or_else(|| {
        Failure::new(format!("no pod of {} is ready", found.workload))
            .hint("its environment is read from a running one")
    })
}

async fn environ(
    cluster: &Cluster,
    namespace: &str,
    pod: &str,
    container: &str,
) -> Result<Vec<u8>, Failure> {
    let api: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace);
    let how = AttachParams::default()
        .container(container)
        .stdin(false)
        .stdout(true)
        .stderr(false);
    let read = async {
        let mut process = api.exec(pod, ["cat", "/proc/self/environ"], &how).await?;
        let (stdout, status) = (process.stdout(), process.take_status());
        let mut bytes = Vec::new();
        if let Some(stdout) = stdout {
            let _ = stdout.take(LONGEST).read_to_end(&mut bytes).await;
        }
        let status = match status {
            Some(status) => status.await,
            None => None,
        };
        Ok((bytes, status))
    };
    let (bytes, status) = cluster.in_time(read).await?;
    match status {
        Some(status) if status.status.as_deref() == Some("Success") => Ok(bytes),
        Some(status) => Err(Failure::new(status.message.unwrap_or_default())),
        None => Err(Failure::new("the connection ended before it was read")),
    }
}

fn parsed(bytes: &[u8]) -> Variables {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
    bytes
        .split(|byte| *byte == 0)
        .filter_map(text)
        .filter_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            (!name.is_empty()).then(|| (name.to_owned(), value.to_owned()))
        })
        .collect()
}

/// Writes a file that only its user may read: the values may be secrets. `-` is stdout.
///
/// # Errors
/// It cannot be written.
pub fn write_private(path: &std::path::Path, text: &str) -> Result<(), Failure> {
    use std::io::Write as _;
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    if path.as_os_str() == "-" {
        return crate::report::write_out(text);
    }
    let write = || {
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(path)?;
        // One that was there before keeps its mode otherwise.
        if file.metadata()?.is_file() {
            file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
        }
        file.write_all(text.as_bytes())
    };
    write().or_fail(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> Variables {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn an_environment_is_read_whatever_its_values_hold() {
        let bytes = b"A=1\0B=two\nlines\0C==x=\0EMPTY=\0=bad\0bad\0D=\xff\0";

        assert_eq!(
            parsed(bytes),
            variables(&[("A", "1"), ("B", "two\nlines"), ("C", "=x="), ("EMPTY", "")])
        );
    }

    #[test]
    fn what_would_change_local_tools_is_left_out_unless_it_is_allowed() {
        let all = [
            "DATABASE_URL",
            "PATH",
            "LD_PRELOAD",
            "DYLD_LIBRARY_PATH",
            "NODE_OPTIONS",
            "http_proxy",
            "NO_PROXY",
            "ENV",
            "ENVIRONMENT",
            "HOSTNAME",
        ];
        let given: Vec<_> = all.iter().map(|name| (*name, "x")).collect();

        let left = without_denied(variables(&given), &["NODE_OPTIONS".to_owned()]);

        let names: Vec<_> = left.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            ["DATABASE_URL", "NODE_OPTIONS", "ENVIRONMENT", "HOSTNAME"]
        );
    }

    #[test]
    fn a_handler_is_told_under_both_names() {
        assert_eq!(
            of_intercept("u-1", Some("app")),
            variables(&[
                ("TELEPRESENCE_INTERCEPT_ID", "u-1"),
                ("TP_INTERCEPT_ID", "u-1"),
                ("TELEPRESENCE_CONTAINER", "app"),
                ("TP_CONTAINER", "app"),
            ])
        );
        assert_eq!(of_intercept("u-1", None).len(), 2);
    }

    #[test]
    fn a_file_with_secrets_is_its_users_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("env");
        std::fs::write(&path, "something longer that was there before").unwrap();

        write_private(&path, "A=1\n").unwrap();

        assert_eq!(std::fs::read_to_string(&path).unwrap(), "A=1\n");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
