//! The two small HTTP ports: health for the kubelet, metrics for who may read them.
//!
//! Strangers reach both, so they get hyper's defaults, one request a connection, 64 connections at a time and five
//! seconds each; with one more the oldest is dropped, so that silent ones do not keep the kubelet's probe waiting. Health says two constant words. Metrics asks the API server who the bearer is and whether RBAC grants
//! `get` on the path `/metrics`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{
    NonResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

use crate::metrics::Metrics;
use crate::reach::review_access;

/// Answers one request.
pub trait Page: Send + Sync + 'static {
    /// Status and text. Requests have no body that anybody reads.
    fn answer<'a>(&'a self, request: &'a Request<Incoming>) -> BoxFuture<'a, (StatusCode, String)>;
}

/// Serves for ever.
pub async fn serve(listener: TcpListener, page: Arc<dyn Page>) -> Infallible {
    each(listener, |stream| answer(stream, Arc::clone(&page))).await
}

/// Answers each connection of strangers in a task of its own, for ever.
pub(crate) async fn each<F>(listener: TcpListener, answer: impl Fn(TcpStream) -> F) -> Infallible
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    let mut in_order: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                while connections.try_join_next().is_some() {}
                in_order.retain(|connection| !connection.is_finished());
                if in_order.len() >= MOST_CONNECTIONS
                    && let Some(oldest) = in_order.pop_front()
                {
                    oldest.abort();
                }
                let answered = tokio::time::timeout(CONNECTION, answer(stream));
                in_order.push_back(connections.spawn(async move {
                    let _ = answered.await;
                }));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

const MOST_CONNECTIONS: usize = 64;

/// From accept to the last byte.
const CONNECTION: Duration = Duration::from_secs(5);

async fn answer(stream: TcpStream, page: Arc<dyn Page>) {
    let service = service_fn(|request: Request<Incoming>| {
        let page = Arc::clone(&page);
        async move {
            let (status, text) = match *request.method() {
                Method::GET => page.answer(&request).await,
                _ => (StatusCode::METHOD_NOT_ALLOWED, String::new()),
            };
            Ok::<_, Infallible>(response(status, text))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(CONNECTION)
        .keep_alive(false)
        .max_headers(64)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    // A stranger's broken HTTP is the stranger's business.
    let _ = connection.await;
}

fn response(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let kind = http::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    if status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(
            header::WWW_AUTHENTICATE,
            http::HeaderValue::from_static("Bearer"),
        );
    }
    response
}

/// `/healthz` and `/readyz`.
pub struct HealthPage<F> {
    /// Whether sessions may come here.
    pub ready: F,
}

impl<F: Fn() -> bool + Send + Sync + 'static> Page for HealthPage<F> {
    fn answer<'a>(&'a self, request: &'a Request<Incoming>) -> BoxFuture<'a, (StatusCode, String)> {
        let answer = match request.uri().path() {
            "/healthz" => (StatusCode::OK, "ok\n"),
            "/readyz" if (self.ready)() => (StatusCode::OK, "ok\n"),
            "/readyz" => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
            _ => (StatusCode::NOT_FOUND, ""),
        };
        Box::pin(std::future::ready((answer.0, answer.1.to_owned())))
    }
}

/// `/metrics`, for bearers that RBAC grants it to.
pub struct MetricsPage {
    /// What is shown.
    pub metrics: Arc<Metrics>,
    /// As the manager's account.
    pub client: Client,
}

impl Page for MetricsPage {
    fn answer<'a>(&'a self, request: &'a Request<Incoming>) -> BoxFuture<'a, (StatusCode, String)> {
        Box::pin(async move {
            if request.uri().path() != METRICS_PATH {
                return (StatusCode::NOT_FOUND, String::new());
            }
            match self.admit(bearer(request.headers())).await {
                Ok(()) => (StatusCode::OK, self.metrics.render()),
                Err(status) => (status, String::new()),
            }
        })
    }
}

const METRICS_PATH: &str = "/metrics";

fn bearer(headers: &http::HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then_some(token.trim())
}

impl MetricsPage {
    async fn admit(&self, token: Option<&str>) -> Result<(), StatusCode> {
        let token = token.ok_or(StatusCode::UNAUTHORIZED)?;
        let user = self.who_is(token).await?;
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: user.username,
                groups: user.groups,
                uid: user.uid,
                extra: user.extra,
                non_resource_attributes: Some(NonResourceAttributes {
                    path: Some(METRICS_PATH.to_owned()),
                    verb: Some("get".to_owned()),
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        match review_access(self.client.clone(), review).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(StatusCode::FORBIDDEN),
            Err(_) => Err(StatusCode::SERVICE_UNAVAILABLE),
        }
    }

    async fn who_is(&self, token: &str) -> Result<UserInfo, StatusCode> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                ..TokenReviewSpec::default()
            },
            ..TokenReview::default()
        };
        let api = Api::<TokenReview>::all(self.client.clone());
        let answer = api.create(&PostParams::default(), &review).await;
        let status = answer.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?.status;
        let verified = status
            .filter(|status| status.authenticated == Some(true))
            .and_then(|status| status.user);
        verified.ok_or(StatusCode::UNAUTHORIZED)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn ask(page: Arc<dyn Page>, request: &str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, page));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        server.abort();
        answer
    }

    #[tokio::test]
    async fn silent_strangers_do_not_keep_a_probe_waiting() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, Arc::new(HealthPage { ready: || true })));
        let mut silent = Vec::new();
        for _ in 0..MOST_CONNECTIONS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }

        let probe = async {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream
                .write_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
                .await
                .unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let answer = tokio::time::timeout(CONNECTION / 2, probe).await.unwrap();

        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(
            silent[0].read(&mut [0; 1]).await.unwrap_or(0),
            0,
            "the oldest made room"
        );
        server.abort();
    }

    #[tokio::test]
    async fn health_says_two_words_and_closes() {
        let page = |ready| {
            Arc::new(HealthPage {
                ready: move || ready,
            })
        };

        let ready = ask(page(true), "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(
            ready.starts_with("HTTP/1.1 200") && ready.ends_with("ok\n"),
            "{ready}"
        );
        let waiting = ask(page(false), "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(waiting.starts_with("HTTP/1.1 503"), "{waiting}");
        assert!(
            ask(page(false), "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 200")
        );
        assert!(
            ask(page(true), "POST /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 405")
        );
        assert!(
            ask(page(true), "GET /debug HTTP/1.1\r\nHost: x\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 404")
        );
    }

    #[test]
    fn a_bearer_token_is_read_from_its_header_only() {
        let headers = |value: &str| {
            let mut headers = http::HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            headers
        };

        assert_eq!(bearer(&headers("Bearer abc")), Some("abc"));
        assert_eq!(bearer(&headers("bearer abc")), Some("abc"));
        assert_eq!(bearer(&headers("Basic abc")), None);
        assert_eq!(bearer(&http::HeaderMap::new()), None);
    }
}
