//! The webhook: pods that ask for it are made with the agent beside their application.
//!
//! A process of its own, with an account that has no right and no token: whoever reaches it, or breaks it, gets none. It
//! knows what is in its pod's folders (certificate, manager's locator) and in the review that it is sent; which pod gets
//! what is decided by `mutate.rs`, from nothing else. The API server goes on without it when it does not answer.

pub(crate) mod container;
mod mutate;
mod review;
mod tls;

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tp_manager_api::locator::LOCATOR_ENTRY;
use tp_manager_api::{
    AGENT_IMAGE, ManagerLocator, NATIVE_SIDECARS, WEBHOOK_LOCATOR, WEBHOOK_PATH, WEBHOOK_PORT,
    WEBHOOK_TLS,
};
use tp_tunnel::KeyHash;

use self::container::Blueprint;
use self::tls::Certificates;
use crate::guarded_http;
use crate::temporary::listen_everywhere;

/// What the environment says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `TP_AGENT_IMAGE`.
    pub image: String,
    /// `TP_NATIVE_SIDECARS`.
    pub native: bool,
}

impl Options {
    /// Reads the variables that the Deployment sets.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let image = variable(AGENT_IMAGE).filter(|image| !image.is_empty());
        Ok(Self {
            image: image.ok_or_else(|| format!("{AGENT_IMAGE} is not set"))?,
            native: variable(NATIVE_SIDECARS).is_some_and(|native| native == "true"),
        })
    }
}

/// Serves until `shutdown`.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<()> {
    let listener = listen_everywhere(WEBHOOK_PORT).await?;
    let webhook = Arc::new(Webhook {
        options,
        certificates: Certificates::new(WEBHOOK_TLS.as_ref()),
    });
    // Said at start; each connection looks again, since both may be replaced.
    webhook.certificates.acceptor()?;
    let key = webhook.manager_key()?;
    tracing::info!(port = WEBHOOK_PORT, manager = %key, "webhook");
    let serving = guarded_http::each(listener, |stream| {
        let webhook = Arc::clone(&webhook);
        async move { webhook.connection(stream).await }
    });
    tokio::select! {
        never = serving => match never {},
        () = shutdown => Ok(()),
    }
}

/// Largest review. The API server takes objects of at most 1.5 MiB, and pods are a few KiB.
const REVIEW_MAX: usize = 1 << 20;

struct Webhook {
    options: Options,
    certificates: Certificates,
}

impl Webhook {
    async fn connection(&self, stream: TcpStream) {
        let acceptor = match self.certificates.acceptor() {
            Ok(acceptor) => acceptor,
            Err(error) => {
                tracing::error!("no certificate: {error:#}");
                return;
            }
        };
        let Ok(stream) = acceptor.accept(stream).await else {
            return;
        };
        let service = service_fn(|request| self.answer(request));
        // A stranger's broken HTTP is the stranger's business.
        let _ = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .keep_alive(false)
            .max_headers(64)
            .max_buf_size(64 * 1024)
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, std::convert::Infallible> {
        let answer = match (request.method(), request.uri().path()) {
            (&Method::GET, "/readyz") => match self.manager_key() {
                Ok(_) => (StatusCode::OK, Bytes::from_static(b"ok\n")),
                Err(_) => (StatusCode::SERVICE_UNAVAILABLE, Bytes::new()),
            },
            (&Method::POST, WEBHOOK_PATH) => self.review(request.into_body()).await,
            (_, "/readyz" | WEBHOOK_PATH) => (StatusCode::METHOD_NOT_ALLOWED, Bytes::new()),
            _ => (StatusCode::NOT_FOUND, Bytes::new()),
        };
        Ok(response(answer))
    }

    async fn review(&self, body: Incoming) -> (StatusCode, Bytes) {
        let Ok(body) = Limited::new(body, REVIEW_MAX).collect().await else {
            return (StatusCode::PAYLOAD_TOO_LARGE, Bytes::new());
        };
        let manager_key = match self.manager_key() {
            Ok(key) => key,
            Err(error) => {
                tracing::error!("{error:#}");
                return (StatusCode::SERVICE_UNAVAILABLE, Bytes::new());
            }
        };
        let blueprint = Blueprint {
            image: &self.options.image,
            manager_key,
            native: self.options.native,
        };
        match review::answer(&body.to_bytes(), &blueprint, &container::random_seed()) {
            Ok(answer) => (StatusCode::OK, answer.into()),
            Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n").into()),
        }
    }

    /// The hash by which agents know their manager, as the manager last said it.
    fn manager_key(&self) -> Result<KeyHash> {
        let path = Path::new(WEBHOOK_LOCATOR).join(LOCATOR_ENTRY);
        let text = std::fs::read(&path).with_context(|| format!("cannot read {path:?}"))?;
        let locator: ManagerLocator =
            serde_json::from_slice(&text).with_context(|| format!("cannot use {path:?}"))?;
        let key = locator.key_hash.parse();
        key.with_context(|| format!("{path:?} has no key"))
    }
}

fn response((status, body): (StatusCode, Bytes)) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let kind = http::HeaderValue::from_static("application/json");
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_comes_from_the_deployment_alone() {
        let variable = |name: &str| match name {
            "TP_AGENT_IMAGE" => Some("tp:1".to_owned()),
            "TP_NATIVE_SIDECARS" => Some("true".to_owned()),
            _ => None,
        };

        let options = Options::from_env(variable).unwrap();

        assert_eq!((options.image.as_str(), options.native), ("tp:1", true));
        assert!(Options::from_env(|_| None).is_err());
    }
}
