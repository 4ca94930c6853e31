//! The WebSocket of `pods/portforward`.
//!
//! kube's own `connect` offers the subprotocols of `exec` and no other, hence this. The checks are those of RFC 6455
//! §4.1.

use http::header::{
    CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use kube::Client;
use kube::client::{Body, UpgradeConnectionError};
use kube::core::{Request, Status};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;
use tp_tunnel::carrier::port_forward::{Subprotocol, websocket_config};

/// A connection to the API server that became a WebSocket's.
pub type Socket = TokioIo<Upgraded>;

/// Asks for one port of a pod. Returns the WebSocket and which of `offered` the server chose, best first.
///
/// # Errors
/// The API server refused, or does not speak any of them.
///
/// Cancel safe in the sense that dropping it closes the connection, and the port with it.
pub async fn port_forward(
    client: &Client,
    (namespace, pod): (&str, &str),
    port: u16,
    offered: &[Subprotocol],
) -> kube::Result<(WebSocketStream<Socket>, Subprotocol)> {
    let pods = format!("/api/v1/namespaces/{namespace}/pods");
    let request = Request::new(pods).portforward(pod, &[port]);
    let mut request = request
        .expect("an object's name and a port make a valid request")
        .map(Body::from);
    let key = generate_key();
    ask(request.headers_mut(), &key, offered);
    let response = accepted(client.send(request).await?).await?;
    let chosen = verify(response.status(), response.headers(), &key, offered)
        .map_err(kube::Error::UpgradeConnection)?;
    let upgraded = hyper::upgrade::on(response).await;
    let upgraded = upgraded.map_err(|error| {
        kube::Error::UpgradeConnection(UpgradeConnectionError::GetPendingUpgrade(error))
    })?;
    let (socket, config) = (TokioIo::new(upgraded), websocket_config());
    let socket = WebSocketStream::from_raw_socket(socket, Role::Client, Some(config)).await;
    Ok((socket, chosen))
}

fn ask(headers: &mut HeaderMap, key: &str, offered: &[Subprotocol]) {
    let names: Vec<_> = offered.iter().map(|protocol| protocol.name()).collect();
    let valid = |text: &str| HeaderValue::from_str(text).expect("names and base64 are valid");
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    headers.insert(SEC_WEBSOCKET_KEY, valid(key));
    // API servers read the first header of this name only.
    headers.insert(SEC_WEBSOCKET_PROTOCOL, valid(&names.join(", ")));
}

/// A refusal is a `Status`, or what some proxy before the API server wrote.
async fn accepted(response: Response<Body>) -> kube::Result<Response<Body>> {
    let code = response.status();
    if !code.is_client_error() && !code.is_server_error() {
        return Ok(response);
    }
    let body = response.into_body().collect().await?.to_bytes();
    let status = serde_json::from_slice(&body).unwrap_or_else(|_| {
        let text = String::from_utf8_lossy(&body);
        Status::failure(text.trim(), "NotAStatus").with_code(code.as_u16())
    });
    Err(kube::Error::Api(status.boxed()))
}

fn verify(
    status: StatusCode,
    headers: &HeaderMap,
    key: &str,
    offered: &[Subprotocol],
) -> Result<Subprotocol, UpgradeConnectionError> {
    let is = |name: HeaderName, value: &str| {
        let found = headers.get(name).and_then(|found| found.to_str().ok());
        found.is_some_and(|found| found.eq_ignore_ascii_case(value))
    };
    if status != StatusCode::SWITCHING_PROTOCOLS {
        return Err(UpgradeConnectionError::ProtocolSwitch(status));
    }
    if !is(UPGRADE, "websocket") {
        return Err(UpgradeConnectionError::MissingUpgradeWebSocketHeader);
    }
    if !is(CONNECTION, "Upgrade") {
        return Err(UpgradeConnectionError::MissingConnectionUpgradeHeader);
    }
    let accept = derive_accept_key(key.as_bytes());
    if headers.get(SEC_WEBSOCKET_ACCEPT).map(HeaderValue::as_bytes) != Some(accept.as_bytes()) {
        return Err(UpgradeConnectionError::SecWebSocketAcceptKeyMismatch);
    }
    let chosen = offered
        .iter()
        .find(|protocol| is(SEC_WEBSOCKET_PROTOCOL, protocol.name()));
    chosen
        .copied()
        .ok_or(UpgradeConnectionError::SecWebSocketProtocolMismatch)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

    fn answer(changes: &[(HeaderName, Option<&'static str>)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(UPGRADE, HeaderValue::from_static("WebSocket"));
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        // RFC 6455 §1.3 has this pair.
        let accept = HeaderValue::from_static("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
        let chosen = HeaderValue::from_static("v4.channel.k8s.io");
        headers.insert(SEC_WEBSOCKET_PROTOCOL, chosen);
        for (name, value) in changes {
            headers.remove(name);
            if let Some(value) = value {
                headers.insert(name, HeaderValue::from_static(value));
            }
        }
        headers
    }

    fn verified(headers: &HeaderMap) -> Result<Subprotocol, UpgradeConnectionError> {
        let switching = StatusCode::SWITCHING_PROTOCOLS;
        verify(switching, headers, KEY, &Subprotocol::ALL)
    }

    #[test]
    fn the_servers_choice_is_taken_and_nothing_that_was_not_offered() {
        let spdy = [(SEC_WEBSOCKET_PROTOCOL, Some("SPDY/3.1+portforward.k8s.io"))];

        assert_eq!(verified(&answer(&[])).unwrap(), Subprotocol::Channels);
        assert_eq!(verified(&answer(&spdy)).unwrap(), Subprotocol::Spdy);
        for other in [None, Some("v5.channel.k8s.io")] {
            let error = verified(&answer(&[(SEC_WEBSOCKET_PROTOCOL, other)])).unwrap_err();
            let mismatch = UpgradeConnectionError::SecWebSocketProtocolMismatch;
            assert_eq!(error.to_string(), mismatch.to_string());
        }
    }

    #[test]
    fn an_answer_that_is_no_websocket_is_refused() {
        for (name, value) in [
            (UPGRADE, None),
            (UPGRADE, Some("SPDY/3.1")),
            (CONNECTION, Some("close")),
            (SEC_WEBSOCKET_ACCEPT, None),
            (SEC_WEBSOCKET_ACCEPT, Some("AAAAAAAAAAAAAAAAAAAAAAAAAAA=")),
        ] {
            assert!(
                verified(&answer(&[(name.clone(), value)])).is_err(),
                "{name}: {value:?}"
            );
        }
        let ok = verify(StatusCode::OK, &answer(&[]), KEY, &Subprotocol::ALL);
        assert!(ok.is_err());
    }
}
