//! The HTTP client of the API server: built off the async threads, and with errors that name the server.

use std::error::Error;
use std::io;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::{HeaderValue, Request, Response, Uri};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::rt::{Read, Write};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use hyper_util::client::legacy::connect::{Connection, HttpConnector};
use hyper_util::rt::TokioExecutor;
use kube::client::{AuthError, Body, ClientBuilder, ConfigExt, DynBody};
use kube::config::ExecConfig;
use kube::{Client, Config};
use percent_encoding::percent_decode_str;
use tower::util::{BoxService, MapErrLayer};
use tower::{BoxError, Service, ServiceBuilder, ServiceExt};

use crate::report::{Failure, OrFail};

/// TCP and TLS together. Below 5 s, within which every failure to reach the server is to be reported.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);

/// The API server could not be spoken to; the source says why.
#[derive(Debug, thiserror::Error)]
#[error("cannot reach the API server at {address}")]
pub struct Unreachable {
    address: String,
    #[source]
    source: BoxError,
}

/// Builds the client. A credential plugin runs here, as long as it needs: it may be waiting for a person to log in.
pub(super) async fn client(config: Config) -> Result<Client, Failure> {
    let built = tokio::task::spawn_blocking(move || build(config)).await;
    built.or_fail(|| "building the client of the API server was interrupted".to_owned())?
}

fn build(config: Config) -> Result<Client, Failure> {
    let plugin = config.auth_info.exec.clone();
    let address = route(&config);
    let builder = on_quick_socket(config);
    match builder {
        Ok(builder) => {
            let named = MapErrLayer::new(move |error| name_server(&address, error));
            Ok(builder.with_layer(&named).build())
        }
        Err(kube::Error::Auth(AuthError::AuthExecStart(error))) => Err(not_started(plugin, error)),
        Err(error) => Err(error.into()),
    }
}

/// A socket without Nagle's algorithm, to the server or to the proxy before it: a carrier writes small frames, and each
/// would wait until the one before it was acknowledged, which the other end delays by 40 ms.
fn on_quick_socket(config: Config) -> kube::Result<ClientBuilder<ApiService>> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    let Some(proxy) = config.proxy_url.clone() else {
        return stack(config, tcp);
    };
    match proxy.scheme_str() {
        Some("socks5") => stack(config, SocksV5::new(proxy, tcp)),
        Some("http") => stack(config, tunnel(proxy, tcp)),
        Some("https") => {
            let tls = config.rustls_https_connector_with_connector(tcp)?;
            stack(config, tunnel(proxy, tls))
        }
        Some(_) | None => Err(kube::Error::ProxyProtocolUnsupported {
            proxy_url: Box::new(proxy),
        }),
    }
}

/// CONNECT through an HTTP proxy, with the credentials of its URL, which are percent-encoded there (RFC 3986 §3.2.1).
fn tunnel<C>(proxy: Uri, connector: C) -> Tunnel<C> {
    let authority = proxy.authority().map(ToString::to_string);
    let tunnel = Tunnel::new(proxy, connector);
    let Some((user, _)) = authority.as_deref().and_then(|text| text.rsplit_once('@')) else {
        return tunnel;
    };
    let user: Vec<u8> = percent_decode_str(user).collect();
    let basic = format!("Basic {}", BASE64_STANDARD.encode(user));
    tunnel.with_auth(HeaderValue::try_from(basic).expect("base64 is a header's value"))
}

/// kube's own layers over a connector.
fn stack<C>(config: Config, connector: C) -> kube::Result<ClientBuilder<ApiService>>
where
    C: Service<Uri> + Clone + Send + Sync + 'static,
    C::Response: Connection + Read + Write + Send + Unpin + 'static,
    C::Future: Send + 'static,
    C::Error: Error + Send + Sync + 'static,
{
    let mut connector =
        TimeoutConnector::new(config.rustls_https_connector_with_connector(connector)?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(hyper_util::client::legacy::Builder::new(TokioExecutor::new()).build(connector))
        .map_response(|response| response.map(boxed))
        .boxed();
    Ok(ClientBuilder::new(service, config.default_namespace))
}

fn boxed(body: Incoming) -> Box<DynBody> {
    Box::new(body.map_err(BoxError::from))
}

/// What [`ClientBuilder`] wraps when kube builds it.
type ApiService = BoxService<Request<Body>, Response<Box<DynBody>>, BoxError>;

fn not_started(plugin: Option<ExecConfig>, error: io::Error) -> Failure {
    let plugin = plugin.unwrap_or_default();
    let command = plugin.command.unwrap_or_default();
    let install = plugin.install_hint.filter(|hint| !hint.trim().is_empty());
    Failure::new(format!("the credential plugin {command} cannot be started"))
        .because(error.to_string())
        .hint(install.unwrap_or_else(|| format!("install {command}, or put it on PATH")))
}

/// The server, and the proxy before it without its credentials.
fn route(config: &Config) -> String {
    let server = address(&config.cluster_url);
    match &config.proxy_url {
        Some(proxy) => format!("{server} through the proxy {}", address(proxy)),
        None => server,
    }
}

/// Where requests go, as `host:port`.
pub(super) fn address(url: &Uri) -> String {
    let default = if url.scheme_str() == Some("http") {
        80
    } else {
        443
    };
    let port = url.port_u16().unwrap_or(default);
    format!("{}:{port}", url.host().unwrap_or_default())
}

/// No answer came in time.
pub(super) fn no_answer(address: &str, elapsed: tokio::time::error::Elapsed) -> Failure {
    let source = io::Error::new(io::ErrorKind::TimedOut, elapsed);
    kube::Error::Service(unreachable(address, source.into())).into()
}

fn name_server(address: &str, error: BoxError) -> BoxError {
    if about_credentials(&*error) {
        error
    } else {
        unreachable(address, error)
    }
}

fn unreachable(address: &str, source: BoxError) -> BoxError {
    Box::new(Unreachable {
        address: address.to_owned(),
        source,
    })
}

fn about_credentials(error: &(dyn Error + 'static)) -> bool {
    std::iter::successors(Some(error), |&error| error.source()).any(|error| error.is::<AuthError>())
}

#[cfg(test)]
mod tests {
    use kube::config::ExecInteractiveMode;

    use super::*;

    #[test]
    fn an_address_has_the_port_that_the_scheme_implies() {
        assert_eq!(address(&"https://h".parse().unwrap()), "h:443");
        assert_eq!(
            address(&"https://[::1]:6443/x".parse().unwrap()),
            "[::1]:6443"
        );
    }

    #[tokio::test]
    async fn a_proxy_is_named_without_its_password() {
        let mut config = Config::new("https://127.0.0.1:6443".parse().unwrap());
        config.proxy_url = Some("http://ada:secret@127.0.0.1:1".parse().unwrap());

        let client = client(config).await.unwrap();
        let failure = Failure::from(client.apiserver_version().await.unwrap_err());

        assert_eq!(
            failure.what,
            "cannot reach the API server at 127.0.0.1:6443 through the proxy 127.0.0.1:1"
        );
    }

    #[tokio::test]
    async fn a_missing_plugin_is_named_with_its_own_hint() {
        let mut config = Config::new("https://127.0.0.1:1".parse().unwrap());
        config.auth_info.exec = Some(ExecConfig {
            command: Some("/nonexistent/plugin".into()),
            install_hint: Some("get it from example.com".into()),
            ..ExecConfig::default()
        });

        let failure = client(config).await.err().unwrap();

        assert_eq!(
            failure.what,
            "the credential plugin /nonexistent/plugin cannot be started"
        );
        assert_eq!(failure.hint.as_deref(), Some("get it from example.com"));
    }

    #[tokio::test]
    async fn a_plugin_that_fails_is_named_with_its_last_words() {
        let mut config = Config::new("https://127.0.0.1:1".parse().unwrap());
        config.auth_info.exec = Some(ExecConfig {
            command: Some("sh".into()),
            args: Some(vec![
                "-c".into(),
                "echo trace >&2; echo session expired >&2; exit 3".into(),
            ]),
            interactive_mode: Some(ExecInteractiveMode::Never),
            ..ExecConfig::default()
        });

        let failure = client(config).await.err().unwrap();

        assert_eq!(failure.what, "the credential plugin sh failed");
        assert_eq!(failure.why, ["exit status: 3", "session expired"]);
    }

    #[tokio::test]
    async fn a_closed_port_is_named_with_its_cause() {
        let config = Config::new("https://127.0.0.1:1".parse().unwrap());

        let client = client(config).await.unwrap();
        let failure = Failure::from(client.apiserver_version().await.unwrap_err());

        assert_eq!(failure.what, "cannot reach the API server at 127.0.0.1:1");
        assert!(failure.why[0].contains("refused"), "{failure}");
    }
}
