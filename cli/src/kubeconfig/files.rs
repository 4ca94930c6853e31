//! Finding and merging kubeconfig files, by kubectl's rules.
//!
//! `--kubeconfig` must exist. Of the files in `KUBECONFIG` those that are missing are passed over; where none is left,
//! or `~/.kube/config` is missing, there is no kubeconfig, and that is an error only when the flags do not name a
//! server themselves.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use kube::config::{Kubeconfig, KubeconfigError};

use super::Selectors;
use crate::report::Failure;

/// Reads the kubeconfig that the selectors and the environment name.
pub(super) fn read(selectors: &Selectors) -> Result<Kubeconfig, Failure> {
    if let Some(path) = &selectors.kubeconfig {
        return read_one(path)?.ok_or_else(|| missing(std::slice::from_ref(path)));
    }
    let paths = candidates(std::env::var_os("KUBECONFIG"), home());
    match merged(&paths)? {
        Some(config) => Ok(config),
        None if selectors.server.is_some() => Ok(Kubeconfig::default()),
        None => Err(missing(&paths)),
    }
}

fn candidates(variable: Option<OsString>, home: Option<PathBuf>) -> Vec<PathBuf> {
    let listed: Vec<_> = std::env::split_paths(&variable.unwrap_or_default())
        .filter(|path| !path.as_os_str().is_empty())
        .collect();
    if listed.is_empty() {
        return home
            .into_iter()
            .map(|home| home.join(".kube/config"))
            .collect();
    }
    listed
}

fn home() -> Option<PathBuf> {
    std::env::home_dir().filter(|home| !home.as_os_str().is_empty())
}

fn merged(paths: &[PathBuf]) -> Result<Option<Kubeconfig>, Failure> {
    let mut merged: Option<Kubeconfig> = None;
    for path in paths {
        let Some(next) = read_one(path)? else {
            continue;
        };
        merged = Some(match merged {
            None => next,
            Some(first) => first
                .merge(next)
                .map_err(|error| unreadable(path, &error))?,
        });
    }
    Ok(merged)
}

/// `None` where there is no such file.
fn read_one(path: &Path) -> Result<Option<Kubeconfig>, Failure> {
    match Kubeconfig::read_from(path) {
        Ok(config) => Ok(Some(config)),
        Err(KubeconfigError::ReadConfig(error, _)) if error.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(KubeconfigError::ReadConfig(error, _)) => Err(unreadable(path, &error)),
        Err(error) => Err(unreadable(path, &error)),
    }
}

fn unreadable(path: &Path, error: &dyn std::error::Error) -> Failure {
    Failure::new(format!("cannot read the kubeconfig {}", path.display()))
        .caused_by(error)
        .hint("correct the file, or choose another with `--kubeconfig`")
}

fn missing(paths: &[PathBuf]) -> Failure {
    let listed: Vec<_> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    let failure = Failure::new("there is no kubeconfig");
    let failure = match listed.as_slice() {
        [] => failure.because("neither KUBECONFIG nor HOME is set"),
        [one] => failure.because(format!("{one} does not exist")),
        many => failure.because(format!("none of {} exists", many.join(", "))),
    };
    failure.hint("name one with `--kubeconfig FILE` or in KUBECONFIG")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_wins_over_the_home_directory() {
        let paths = candidates(Some("/a::/b".into()), Some("/home/ada".into()));

        assert_eq!(paths, [PathBuf::from("/a"), PathBuf::from("/b")]);
    }

    #[test]
    fn an_empty_variable_means_the_home_directory() {
        let paths = candidates(Some("".into()), Some("/home/ada".into()));

        assert_eq!(paths, [PathBuf::from("/home/ada/.kube/config")]);
    }

    #[test]
    fn no_kubeconfig_names_where_it_was_looked_for() {
        let failure = read(&Selectors {
            kubeconfig: Some("/nonexistent/kubeconfig".into()),
            ..Selectors::default()
        })
        .unwrap_err();

        assert_eq!(failure.why, ["/nonexistent/kubeconfig does not exist"]);
        assert!(failure.hint.is_some());
    }

    #[test]
    fn the_first_file_wins_and_missing_ones_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(
            &a,
            "current-context: one\nclusters: [{name: c, cluster: {server: 'https://first'}}]",
        )
        .unwrap();
        std::fs::write(&b, "current-context: two\nclusters: [{name: c, cluster: {server: 'https://second'}}, {name: d, cluster: {server: 'https://d'}}]").unwrap();

        let config = merged(&[dir.path().join("none"), a, b]).unwrap().unwrap();

        assert_eq!(config.current_context.as_deref(), Some("one"));
        let servers: Vec<_> = config
            .clusters
            .iter()
            .map(|c| c.cluster.as_ref().unwrap().server.clone().unwrap())
            .collect();
        assert_eq!(servers, ["https://first", "https://d"]);
    }

    #[test]
    fn a_broken_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("broken");
        std::fs::write(&path, "clusters: [}").unwrap();

        let failure = read_one(&path).unwrap_err();

        assert!(failure.what.ends_with("broken"), "{failure}");
        assert!(!failure.why.is_empty());
    }
}
