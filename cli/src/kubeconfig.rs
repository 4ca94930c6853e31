//! From kubectl's flags and files to a client of one cluster.
//!
//! Reads what kubectl reads (`--kubeconfig`, `KUBECONFIG`, `~/.kube/config`, every selector flag, credential plugins,
//! proxies) and nothing else: there is no fallback to a ServiceAccount. Knows nothing of tp in the cluster. Selectors
//! can be serialised, so that a daemon can load the same cluster again in another process.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{SelfSubjectReview, UserInfo};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::Client;
use kube::api::{Api, PostParams};
use serde::{Deserialize, Serialize};

use crate::report::{self, Failure};

mod files;
mod merge;
mod proxy;
mod transport;
pub mod websocket;

pub use transport::Unreachable;

/// How long a question that the API server answers from memory may take.
const ANSWER_WITHIN: Duration = Duration::from_millis(4500);

/// Which cluster, as whom, and how to reach it: kubectl's flags with kubectl's meaning.
#[derive(clap::Args, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[command(next_help_heading = "Cluster (as kubectl)")]
#[serde(default, rename_all = "camelCase")]
pub struct Selectors {
    /// Kubeconfig file, in place of KUBECONFIG and ~/.kube/config
    #[arg(long, value_name = "FILE", value_parser = absolute)]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// Cluster of the kubeconfig
    #[arg(long, value_name = "NAME")]
    pub cluster: Option<String>,
    /// User of the kubeconfig
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    /// Address of the API server
    #[arg(short = 's', long, value_name = "URL")]
    pub server: Option<String>,
    /// Bearer token; takes the place of every other credential
    #[arg(long, value_name = "TOKEN")]
    pub token: Option<Secret>,
    /// Act as this user
    #[arg(long = "as", value_name = "USER")]
    pub as_user: Option<String>,
    /// Act as a member of this group; repeatable
    #[arg(long, value_name = "GROUP", requires = "as_user")]
    pub as_group: Vec<String>,
    /// Act with this user id
    #[arg(long, value_name = "UID", requires = "as_user")]
    pub as_uid: Option<String>,
    /// Act with this extra attribute; repeatable
    #[arg(long, value_name = "KEY=VALUE", requires = "as_user", value_parser = key_value)]
    pub as_user_extra: Vec<(String, String)>,
    /// Certificate authority of the API server, PEM
    #[arg(long, value_name = "FILE", value_parser = absolute)]
    pub certificate_authority: Option<PathBuf>,
    /// Client certificate, PEM
    #[arg(long, value_name = "FILE", value_parser = absolute)]
    pub client_certificate: Option<PathBuf>,
    /// Key of the client certificate, PEM
    #[arg(long, value_name = "FILE", value_parser = absolute)]
    pub client_key: Option<PathBuf>,
    /// Do not check the API server's certificate: insecure
    #[arg(long)]
    pub insecure_skip_tls_verify: bool,
    /// Name to expect in the API server's certificate
    #[arg(long, value_name = "NAME")]
    pub tls_server_name: Option<String>,
    /// Longest wait for the API server to connect or to answer, as `5s` or `1m`; 0 = no limit
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub request_timeout: Option<Duration>,
}

impl Selectors {
    /// Reads the kubeconfig, applies the flags, runs the credential plugin if there is one, and builds the client.
    /// The API server is not asked yet; see [`Cluster::identity`].
    ///
    /// # Errors
    /// No kubeconfig, a name that it does not hold, a file that cannot be read, or a plugin that failed.
    pub async fn load(&self) -> Result<Cluster, Failure> {
        let chosen = merge::choose(self, files::read(self)?)?;
        let mut config = merge::config(&chosen)?;
        config.connect_timeout = Some(self.answer_within().unwrap_or(transport::CONNECT_TIMEOUT));
        let server = config.cluster_url.to_string();
        let address = transport::address(&config.cluster_url);
        let client = transport::client(config).await?;
        Ok(Cluster {
            client,
            namespace: chosen.namespace,
            context: chosen.context,
            server: server.trim_end_matches('/').to_owned(),
            address,
            refused: Arc::default(),
            answer_within: self.answer_within().unwrap_or(ANSWER_WITHIN),
        })
    }

    /// The contexts of the kubeconfig that these selectors lead to, in its order.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn contexts(&self) -> Result<Vec<Context>, Failure> {
        Ok(merge::contexts(self, files::read(self)?))
    }

    /// kubectl's 0 means no limit; a day is as good, and keeps one path.
    fn answer_within(&self) -> Option<Duration> {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        self.request_timeout
            .map(|limit| if limit.is_zero() { DAY } else { limit })
    }
}

/// One context of a kubeconfig.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Context {
    /// Its name.
    pub name: String,
    /// Whether it is used when the command line names none.
    pub current: bool,
    /// Name of its cluster.
    pub cluster: String,
    /// Name of its user; empty without one.
    pub user: String,
    /// Its namespace; `default` where it has none.
    pub namespace: String,
}

/// One cluster as one user.
#[derive(Clone)]
pub struct Cluster {
    /// The client; cheap to clone.
    pub client: Client,
    /// The context's namespace, `default` where it has none.
    pub namespace: String,
    /// Name of the context; empty where flags alone describe the cluster.
    pub context: String,
    /// URL of the API server, without a slash at the end.
    pub server: String,
    address: String,
    /// The API server has answered 401; shared by clones.
    refused: Arc<AtomicBool>,
    answer_within: Duration,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("context", &self.context)
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}

impl Cluster {
    /// Who the API server takes this client for. The cheapest proof that it can be reached and accepts the
    /// credentials; answers or fails within 5 s.
    ///
    /// # Errors
    /// As a [`Failure`] that names the server, or what is wrong with the credentials.
    pub async fn identity(&self) -> Result<UserInfo, Failure> {
        let api: Api<SelfSubjectReview> = Api::all(self.client.clone());
        let review = SelfSubjectReview::default();
        let answer = self
            .in_time(api.create(&PostParams::default(), &review))
            .await?;
        Ok(answer
            .status
            .and_then(|status| status.user_info)
            .unwrap_or_default())
    }

    /// Whether this user holds a right; `namespace` `None` asks for every namespace.
    ///
    /// # Errors
    /// When the API server cannot be asked.
    pub async fn may(&self, right: &Right<'_>, namespace: Option<&str>) -> Result<bool, Failure> {
        let api: Api<SelfSubjectAccessReview> = Api::all(self.client.clone());
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(right.attributes(namespace)),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let answer = self
            .in_time(api.create(&PostParams::default(), &review))
            .await?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }

    /// Whether the API server has refused these credentials (401). They will not get better: load the cluster anew.
    pub fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    /// For requests that do not go through [`Cluster::in_time`].
    pub fn set_refused(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    /// Waits for one answer of the API server, at most `--request-timeout`, by default 5 s.
    ///
    /// # Errors
    /// The request's own, or that no answer came.
    pub async fn in_time<T>(
        &self,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(self.answer_within, request).await {
            Ok(answer) => answer.map_err(|error| {
                if report::status_of(&error) == Some(401) {
                    self.set_refused();
                }
                error.into()
            }),
            Err(elapsed) => Err(transport::no_answer(&self.address, elapsed)),
        }
    }
}

/// A verb on a resource, as RBAC knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Right<'a> {
    /// `get`, `create`, …
    pub verb: &'a str,
    /// API group; empty for the core.
    pub group: &'a str,
    /// Plural resource.
    pub resource: &'a str,
    /// Subresource; empty for none.
    pub subresource: &'a str,
}

impl Right<'_> {
    fn attributes(&self, namespace: Option<&str>) -> ResourceAttributes {
        let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        ResourceAttributes {
            verb: given(self.verb),
            group: given(self.group),
            resource: given(self.resource),
            subresource: given(self.subresource),
            namespace: namespace.map(str::to_owned),
            ..ResourceAttributes::default()
        }
    }
}

/// A value that `Debug` does not show.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The value itself.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(value: &str) -> Self {
        Self(value.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Paths become absolute at once, so that a daemon in another directory reads the same files.
fn absolute(path: &str) -> Result<PathBuf, std::io::Error> {
    std::path::absolute(path)
}

fn key_value(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| "expected KEY=VALUE".to_owned())
}

/// Reads a time as kubectl does: plain seconds, or a duration such as `1m30s`.
///
/// # Errors
/// What would have been understood.
pub fn duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    text.parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok())
        .ok_or_else(|| "expected a time such as `5s`, `2m` or `0`".to_owned())
}

/// Extra attributes, gathered by key as impersonation sends them.
fn gathered(pairs: &[(String, String)]) -> BTreeMap<String, Vec<String>> {
    let mut gathered: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (key, value) in pairs {
        gathered.entry(key.clone()).or_default().push(value.clone());
    }
    gathered
}

/// What the flags and the files come to.
struct Chosen {
    context: String,
    namespace: String,
    cluster: kube::config::Cluster,
    user: kube::config::AuthInfo,
}

/// Used where a client cannot be built for a reason that names its file.
fn unusable(what: &str, error: &dyn std::error::Error) -> Failure {
    Failure::new(format!("cannot use the kubeconfig's {what}")).caused_by(error)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        selectors: Selectors,
    }

    fn parse(line: &str) -> Selectors {
        Line::try_parse_from(std::iter::once("tp").chain(line.split_whitespace()))
            .map(|line| line.selectors)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn kubectls_flags_are_taken() {
        let selectors = parse(
            "--kubeconfig k --context c --cluster cl --user u -s https://h --token t --as a --as-group g --as-group h \
             --as-uid 7 --as-user-extra k=v --certificate-authority ca --client-certificate cc --client-key ck \
             --insecure-skip-tls-verify --tls-server-name n --request-timeout 1m",
        );

        assert_eq!(selectors.as_group, ["g", "h"]);
        assert_eq!(selectors.request_timeout, Some(Duration::from_secs(60)));
        assert!(selectors.kubeconfig.is_some_and(|path| path.is_absolute()));
    }

    #[test]
    fn a_daemon_gets_the_same_selectors() {
        let selectors =
            parse("--context c --token secret --as a --as-group g --request-timeout 5s");

        let sent = serde_json::to_string(&selectors).unwrap();

        assert_eq!(serde_json::from_str::<Selectors>(&sent).unwrap(), selectors);
    }

    #[test]
    fn a_token_is_never_shown() {
        assert!(!format!("{:?}", parse("--token hunter2")).contains("hunter2"));
    }

    #[test]
    fn times_read_as_kubectls() {
        for (text, expected) in [("5", 5), ("0", 0), ("90s", 90), ("2m", 120), ("1m30s", 90)] {
            assert_eq!(
                duration(text).unwrap(),
                Duration::from_secs(expected),
                "{text}"
            );
        }
        assert!(duration("soon").is_err());
        assert!(duration("-5s").is_err());
    }

    #[tokio::test]
    async fn a_server_that_never_answers_is_named_in_time() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap();
        let selectors = Selectors {
            server: Some(format!("http://{address}")),
            kubeconfig: None,
            request_timeout: Some(Duration::from_millis(200)),
            ..Selectors::default()
        };
        let chosen = merge::choose(&selectors, kube::config::Kubeconfig::default()).unwrap();
        let client = transport::client(merge::config(&chosen).unwrap())
            .await
            .unwrap();
        let cluster = Cluster {
            client,
            namespace: chosen.namespace,
            context: chosen.context,
            server: format!("http://{address}"),
            address: address.to_string(),
            refused: Arc::default(),
            answer_within: Duration::from_millis(200),
        };

        let failure = cluster.identity().await.unwrap_err();

        assert_eq!(
            failure.what,
            format!("cannot reach the API server at {address}")
        );
        assert_eq!(failure.why, ["it did not answer in time"]);
    }
}
