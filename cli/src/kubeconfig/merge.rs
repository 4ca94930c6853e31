//! Choosing context, cluster and user, laying the flags over them, and turning the result into a client's settings.
//!
//! Pure but for reading the files that the kubeconfig names. A name that is not there is answered with those that are.

use std::path::{Path, PathBuf};

use kube::Config;
use kube::config::{AuthInfo, Cluster, Context, ExecAuthCluster, Kubeconfig, NamedContext};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::{Chosen, Selectors, gathered, proxy, unusable};
use crate::report::{Failure, OrFail};

/// Applies the selectors to the files' content.
pub(super) fn choose(selectors: &Selectors, files: Kubeconfig) -> Result<Chosen, Failure> {
    let (name, context) = context(selectors, &files)?;
    let mut cluster = cluster(selectors, &files, &context)?;
    let mut user = user(selectors, &files, &context)?;
    override_cluster(selectors, &mut cluster);
    override_user(selectors, &mut user);
    Ok(Chosen {
        context: name,
        namespace: namespace(context.namespace),
        cluster,
        user,
    })
}

/// What the files list, as kubectl reads it.
pub(super) fn contexts(selectors: &Selectors, files: Kubeconfig) -> Vec<super::Context> {
    let current = selectors.context.clone().or(files.current_context);
    let described = |named: NamedContext| {
        let context = named.context.unwrap_or_default();
        super::Context {
            current: current.as_ref() == Some(&named.name),
            name: named.name,
            cluster: context.cluster,
            user: context.user.unwrap_or_default(),
            namespace: namespace(context.namespace),
        }
    };
    files.contexts.into_iter().map(described).collect()
}

fn namespace(given: Option<String>) -> String {
    given
        .filter(|namespace| !namespace.is_empty())
        .unwrap_or_else(|| "default".to_owned())
}

fn context(selectors: &Selectors, files: &Kubeconfig) -> Result<(String, Context), Failure> {
    let current = files
        .current_context
        .clone()
        .filter(|name| !name.is_empty());
    let name = match selectors.context.clone().or(current) {
        Some(name) => name,
        // kubectl, too, needs no context when the flags say where to go.
        None if selectors.server.is_some() || selectors.cluster.is_some() => {
            return Ok(Default::default());
        }
        None => {
            let names = files.contexts.iter().map(|context| context.name.as_str());
            return Err(Failure::new("the kubeconfig has no current context")
                .because(existing("contexts", names))
                .hint("choose one with `--context NAME` or `kubectl config use-context NAME`"));
        }
    };
    let found = files.contexts.iter().find(|context| context.name == name);
    match found.and_then(|found| found.context.clone()) {
        Some(context) => Ok((name, context)),
        None => Err(absent(
            "context",
            &name,
            files.contexts.iter().map(|context| context.name.as_str()),
        )),
    }
}

fn cluster(
    selectors: &Selectors,
    files: &Kubeconfig,
    context: &Context,
) -> Result<Cluster, Failure> {
    let name = selectors.cluster.as_deref().unwrap_or(&context.cluster);
    let found = files.clusters.iter().find(|cluster| cluster.name == name);
    match found.and_then(|found| found.cluster.clone()) {
        Some(cluster) => Ok(cluster),
        None if selectors.cluster.is_none() && selectors.server.is_some() => Ok(Cluster::default()),
        None => Err(absent(
            "cluster",
            name,
            files.clusters.iter().map(|cluster| cluster.name.as_str()),
        )),
    }
}

/// A context without a user, or whose user is missing, is anonymous, as with kubectl; a `--user` must exist.
fn user(selectors: &Selectors, files: &Kubeconfig, context: &Context) -> Result<AuthInfo, Failure> {
    let Some(name) = selectors.user.as_ref().or(context.user.as_ref()) else {
        return Ok(AuthInfo::default());
    };
    let found = files.auth_infos.iter().find(|user| user.name == *name);
    match found.and_then(|found| found.auth_info.clone()) {
        Some(user) => Ok(user),
        None if selectors.user.is_none() => Ok(AuthInfo::default()),
        None => Err(absent(
            "user",
            name,
            files.auth_infos.iter().map(|user| user.name.as_str()),
        )),
    }
}

fn absent<'a>(kind: &str, name: &str, there: impl Iterator<Item = &'a str>) -> Failure {
    Failure::new(format!("the kubeconfig has no {kind} named {name}"))
        .because(existing(&format!("{kind}s"), there))
        .hint(format!(
            "choose one with `--{kind}`; `kubectl config view` shows all"
        ))
}

fn existing<'a>(kinds: &str, names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.collect();
    match names.as_slice() {
        [] => format!("it has no {kinds} at all"),
        names => format!("its {kinds} are {}", names.join(", ")),
    }
}

fn override_cluster(selectors: &Selectors, cluster: &mut Cluster) {
    if let Some(server) = &selectors.server {
        cluster.server = Some(server.clone());
    }
    if let Some(path) = &selectors.certificate_authority {
        cluster.certificate_authority = Some(text(path));
        cluster.certificate_authority_data = None;
    }
    if let Some(name) = &selectors.tls_server_name {
        cluster.tls_server_name = Some(name.clone());
    }
    if selectors.insecure_skip_tls_verify {
        cluster.insecure_skip_tls_verify = Some(true);
        cluster.certificate_authority = None;
        cluster.certificate_authority_data = None;
    }
}

fn override_user(selectors: &Selectors, user: &mut AuthInfo) {
    if let Some(token) = &selectors.token {
        *user = keeping_impersonation(user);
        user.token = Some(token.reveal().to_owned().into());
    }
    if let Some(path) = &selectors.client_certificate {
        user.client_certificate = Some(text(path));
        user.client_certificate_data = None;
    }
    if let Some(path) = &selectors.client_key {
        user.client_key = Some(text(path));
        user.client_key_data = None;
    }
    impersonate(selectors, user);
}

/// A token on the command line replaces every credential: next to a client certificate the API server would not
/// even look at it.
fn keeping_impersonation(user: &AuthInfo) -> AuthInfo {
    AuthInfo {
        impersonate: user.impersonate.clone(),
        impersonate_uid: user.impersonate_uid.clone(),
        impersonate_groups: user.impersonate_groups.clone(),
        impersonate_user_extra: user.impersonate_user_extra.clone(),
        ..AuthInfo::default()
    }
}

fn impersonate(selectors: &Selectors, user: &mut AuthInfo) {
    let Some(name) = &selectors.as_user else {
        return;
    };
    user.impersonate = Some(name.clone());
    user.impersonate_uid = selectors.as_uid.clone();
    user.impersonate_groups = Some(selectors.as_group.clone());
    user.impersonate_user_extra = Some(gathered(&selectors.as_user_extra).into_iter().collect());
}

/// Turns the choice into a client's settings. Reads certificate files; runs nothing.
pub(super) fn config(chosen: &Chosen) -> Result<Config, Failure> {
    let cluster = &chosen.cluster;
    let url = url(cluster)?;
    let mut config = Config::new(url);
    config.default_namespace = chosen.namespace.clone();
    config.root_cert = authorities(cluster)?;
    config.accept_invalid_certs = cluster.insecure_skip_tls_verify.unwrap_or(false);
    config.tls_server_name = cluster
        .tls_server_name
        .clone()
        .filter(|name| !name.is_empty());
    config.proxy_url = proxy::of(cluster, &config.cluster_url)?;
    config.disable_compression = true;
    config.default_retry = false;
    config.auth_info = chosen.user.clone();
    tell_plugin_the_cluster(&mut config.auth_info, cluster)?;
    Ok(config)
}

fn url(cluster: &Cluster) -> Result<http::Uri, Failure> {
    let server = cluster.server.as_deref().unwrap_or_default();
    // kubectl reads a bare host as http://; nobody means that, so the scheme must be said.
    let parsed = server
        .parse::<http::Uri>()
        .or_fail(|| format!("the API server's address `{server}` is not a URL"))?;
    match (parsed.scheme_str(), parsed.host()) {
        (Some("https" | "http"), Some(_)) => Ok(parsed),
        _ => Err(
            Failure::new(format!("the API server's address `{server}` is not a URL"))
                .hint("it reads like `https://host:6443`"),
        ),
    }
}

fn authorities(cluster: &Cluster) -> Result<Option<Vec<Vec<u8>>>, Failure> {
    // Reads inline data as well as files, which the type's own loader, not public, does as well.
    let read = ExecAuthCluster::try_from(cluster)
        .map_err(|error| unusable("certificate authority", &error))?;
    let Some(pem) = read.certificate_authority_data else {
        return Ok(None);
    };
    let certificates =
        CertificateDer::pem_slice_iter(&pem).map(|found| found.map(|der| der.to_vec()));
    match certificates.collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if certificates.is_empty() => Err(Failure::new(
            "the kubeconfig's certificate authority holds no certificate",
        )),
        Ok(certificates) => Ok(Some(certificates)),
        Err(error) => Err(unusable("certificate authority", &error)),
    }
}

fn tell_plugin_the_cluster(user: &mut AuthInfo, cluster: &Cluster) -> Result<(), Failure> {
    if let Some(exec) = user.exec.as_mut().filter(|exec| exec.provide_cluster_info) {
        let told = ExecAuthCluster::try_from(cluster)
            .map_err(|error| unusable("certificate authority", &error))?;
        exec.cluster = Some(told);
    }
    Ok(())
}

fn text(path: &Path) -> String {
    PathBuf::from(path).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIXTURE: &str = r"
apiVersion: v1
kind: Config
current-context: dev
contexts:
- {name: dev, context: {cluster: near, user: cert, namespace: shop}}
- {name: prod, context: {cluster: far, user: plugin}}
clusters:
- {name: near, cluster: {server: 'https://127.0.0.1:6443'}}
- {name: far, cluster: {server: 'https://far.example:443', proxy-url: 'http://proxy:3128', tls-server-name: kubernetes}}
users:
- {name: cert, user: {client-certificate-data: YQ==, client-key-data: YQ==}}
- {name: plugin, user: {exec: {apiVersion: client.authentication.k8s.io/v1, command: get-token, provideClusterInfo: true}}}
";

    fn files() -> Kubeconfig {
        Kubeconfig::from_yaml(FIXTURE).unwrap()
    }

    #[test]
    fn the_current_context_decides_without_flags() {
        let chosen = choose(&Selectors::default(), files()).unwrap();

        assert_eq!(
            (chosen.context.as_str(), chosen.namespace.as_str()),
            ("dev", "shop")
        );
        assert_eq!(
            chosen.cluster.server.as_deref(),
            Some("https://127.0.0.1:6443")
        );
        assert!(chosen.user.client_certificate_data.is_some());
    }

    #[test]
    fn every_context_is_listed_and_the_one_in_use_marked() {
        let listed = |selectors: &Selectors| {
            let contexts = contexts(selectors, files());
            contexts
                .into_iter()
                .map(|context| (context.name, context.current, context.namespace))
                .collect::<Vec<_>>()
        };
        let (dev, prod) = ("dev".to_owned(), "prod".to_owned());
        let (shop, default) = ("shop".to_owned(), "default".to_owned());

        assert_eq!(
            listed(&Selectors::default()),
            [
                (dev.clone(), true, shop.clone()),
                (prod.clone(), false, default.clone())
            ]
        );
        let chosen = Selectors {
            context: Some(prod.clone()),
            ..Selectors::default()
        };
        assert_eq!(listed(&chosen), [(dev, false, shop), (prod, true, default)]);
    }

    #[test]
    fn a_wrong_context_names_those_that_exist() {
        let selectors = Selectors {
            context: Some("stage".into()),
            ..Selectors::default()
        };

        let failure = choose(&selectors, files()).err().unwrap();

        assert_eq!(failure.what, "the kubeconfig has no context named stage");
        assert_eq!(failure.why, ["its contexts are dev, prod"]);
    }

    #[test]
    fn a_proxy_and_a_server_name_are_honoured() {
        let selectors = Selectors {
            context: Some("prod".into()),
            ..Selectors::default()
        };

        let config = config(&choose(&selectors, files()).unwrap()).unwrap();

        assert_eq!(config.proxy_url.unwrap().to_string(), "http://proxy:3128/");
        assert_eq!(config.tls_server_name.as_deref(), Some("kubernetes"));
        assert_eq!(
            config
                .auth_info
                .exec
                .unwrap()
                .cluster
                .unwrap()
                .server
                .as_deref(),
            Some("https://far.example:443")
        );
    }

    #[test]
    fn cluster_and_user_can_be_chosen_apart() {
        let selectors = Selectors {
            cluster: Some("far".into()),
            user: Some("cert".into()),
            ..Selectors::default()
        };

        let chosen = choose(&selectors, files()).unwrap();

        assert_eq!(
            chosen.cluster.server.as_deref(),
            Some("https://far.example:443")
        );
        assert!(chosen.user.exec.is_none());
    }

    #[test]
    fn a_token_replaces_the_certificate() {
        let selectors = Selectors {
            token: Some("t".into()),
            ..Selectors::default()
        };

        let chosen = choose(&selectors, files()).unwrap();

        assert!(chosen.user.client_certificate_data.is_none());
        assert!(chosen.user.token.is_some());
    }

    #[test]
    fn impersonation_carries_groups_and_extras() {
        let selectors = Selectors {
            as_user: Some("ada".into()),
            as_group: vec!["devs".into(), "qa".into()],
            as_user_extra: vec![("scope".into(), "a".into()), ("scope".into(), "b".into())],
            ..Selectors::default()
        };

        let user = choose(&selectors, files()).unwrap().user;

        assert_eq!(user.impersonate.as_deref(), Some("ada"));
        assert_eq!(user.impersonate_groups.unwrap(), ["devs", "qa"]);
        assert_eq!(user.impersonate_user_extra.unwrap()["scope"], ["a", "b"]);
    }

    #[test]
    fn a_server_needs_no_kubeconfig() {
        let selectors = Selectors {
            server: Some("https://h:1".into()),
            token: Some("t".into()),
            ..Selectors::default()
        };

        let chosen = choose(&selectors, Kubeconfig::default()).unwrap();

        assert_eq!(
            config(&chosen).unwrap().cluster_url.to_string(),
            "https://h:1/"
        );
        assert_eq!(chosen.namespace, "default");
    }

    #[test]
    fn a_server_without_a_scheme_is_refused() {
        let selectors = Selectors {
            server: Some("h:1".into()),
            ..Selectors::default()
        };

        let failure = config(&choose(&selectors, files()).unwrap()).err().unwrap();

        assert!(failure.hint.unwrap().contains("https://"));
    }
}
