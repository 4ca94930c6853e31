//! Header fields that concern one connection only, and what replaces them on the next.
//!
//! Pure.

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use tp_tunnel::{Host, Target};

use super::body::RequestBody;
use super::head::{Framing, Head, has_token, tokens};

/// The request for the origin: origin-form, Host from the URL, framing rebuilt by whoever sends it.
pub(super) fn forwarded(
    head: &Head,
    target: &Target,
    path: &http::uri::PathAndQuery,
    body: RequestBody,
) -> Request<RequestBody> {
    let mut request = Request::new(body);
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = Uri::from(path.clone());
    let mut rest = head.headers.clone();
    let upgrade = wants_upgrade(head)
        .then(|| rest.get(UPGRADE).cloned())
        .flatten();
    strip(&mut rest);
    rest.remove(HOST);
    rest.remove(CONTENT_LENGTH);
    let headers = request.headers_mut();
    headers.insert(HOST, host(target));
    headers.extend(rest);
    if let Some(upgrade) = upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, upgrade);
    }
    request
}

/// Whether the client asks to switch protocols. Not together with a body, whose end would then be in doubt.
pub(super) fn wants_upgrade(head: &Head) -> bool {
    let bodyless = matches!(head.body, Framing::None | Framing::Length(0));
    head.http11
        && bodyless
        && head.headers.contains_key(UPGRADE)
        && has_token(&head.headers, &CONNECTION, "upgrade")
}

/// How a response's body is framed for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// There is none, whatever Content-Length says.
    None,
    Length(u64),
    Chunked,
    /// By closing the connection.
    Close,
}

/// Chooses the framing; `length` is that of the origin's body where it is known.
pub(super) fn ending(
    method: &Method,
    status: StatusCode,
    length: Option<u64>,
    http11: bool,
) -> Ending {
    let bodyless = status.is_informational()
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    match length {
        _ if bodyless || method == Method::HEAD => Ending::None,
        Some(length) => Ending::Length(length),
        None if http11 => Ending::Chunked,
        None => Ending::Close,
    }
}

/// The head of the response for the client.
pub(super) fn response_head<B>(
    response: &Response<B>,
    ending: Ending,
    keep_alive: bool,
) -> Vec<u8> {
    let mut headers = response.headers().clone();
    let upgrade = headers.get(UPGRADE).cloned();
    strip(&mut headers);
    if ending != Ending::None {
        headers.remove(CONTENT_LENGTH);
    }
    match ending {
        Ending::Length(length) => drop(headers.insert(CONTENT_LENGTH, HeaderValue::from(length))),
        Ending::Chunked => {
            drop(headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked")))
        }
        Ending::None | Ending::Close => {}
    }
    if let Some(upgrade) = upgrade.filter(|_| response.status() == StatusCode::SWITCHING_PROTOCOLS)
    {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, upgrade);
    } else if !keep_alive && !response.status().is_informational() {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let reason = response.extensions().get::<hyper::ext::ReasonPhrase>();
    write_head(
        response.status(),
        reason.map(hyper::ext::ReasonPhrase::as_bytes),
        &headers,
    )
}

/// A status line and fields on the wire.
pub(super) fn write_head(
    status: StatusCode,
    reason: Option<&[u8]>,
    headers: &HeaderMap,
) -> Vec<u8> {
    let standard = status.canonical_reason().unwrap_or_default().as_bytes();
    let mut bytes = format!("HTTP/1.1 {} ", status.as_u16()).into_bytes();
    bytes.extend_from_slice(reason.unwrap_or(standard));
    bytes.extend_from_slice(b"\r\n");
    for (name, value) in headers {
        bytes.extend_from_slice(name.as_str().as_bytes());
        bytes.extend_from_slice(b": ");
        bytes.extend_from_slice(value.as_bytes());
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"\r\n");
    bytes
}

/// Removes what concerns one connection only (RFC 9110 §7.6.1), and whatever `Connection` names.
pub(super) fn strip(headers: &mut HeaderMap) {
    let listed: Vec<HeaderName> = tokens(headers, &CONNECTION)
        .filter_map(|token| token.parse().ok())
        .collect();
    let proxy: Vec<HeaderName> = headers
        .keys()
        .filter(|name| is_proxy_field(name))
        .cloned()
        .collect();
    for name in
        listed
            .iter()
            .chain(&proxy)
            .chain(&[CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE])
    {
        // Two that describe the message itself; they are rebuilt, not dropped on request.
        if *name != HOST && *name != CONTENT_LENGTH {
            headers.remove(name);
        }
    }
    headers.remove("keep-alive");
}

/// `Proxy-Status` tells of other proxies on the way, and is for the client.
fn is_proxy_field(name: &HeaderName) -> bool {
    name.as_str().starts_with("proxy-") && name.as_str() != "proxy-status"
}

/// As browsers write it: without the default port.
fn host(target: &Target) -> HeaderValue {
    let text = match (&target.host, target.port) {
        (Host::Ip(std::net::IpAddr::V6(address)), 80) => format!("[{address}]"),
        (host, 80) => host.to_string(),
        _ => target.to_string(),
    };
    HeaderValue::from_str(&text).expect("host names and addresses are visible ASCII")
}

#[cfg(test)]
mod tests {
    use super::super::body;
    use super::super::head::Form;
    use super::*;

    fn forward(text: &str) -> Request<RequestBody> {
        let (head, _) = Head::parse(text.as_bytes()).unwrap().unwrap();
        let Form::Absolute(target, path) = &head.form else {
            panic!("{:?}", head.form);
        };
        let (_, body) = body::channel(head.body);
        forwarded(&head, target, path, body)
    }

    #[test]
    fn only_end_to_end_fields_are_forwarded_and_host_is_the_urls() {
        let request = forward(
            "GET http://web:81/x?y HTTP/1.1\r\nHost: evil\r\nConnection: close, X-Mine, Host\r\nX-Mine: 1\r\n\
             Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic x\r\nKeep-Alive: 1\r\nTE: trailers\r\n\
             Upgrade: h2c\r\nAccept: a\r\nAccept: b\r\nCookie: c\r\n\r\n",
        );
        let fields: Vec<_> = request
            .headers()
            .iter()
            .map(|(n, v)| format!("{n}: {}", v.to_str().unwrap()))
            .collect();
        let mut sorted = fields.clone();
        sorted[1..].sort();
        assert_eq!(request.uri(), "/x?y");
        assert_eq!(fields[0], "host: web:81");
        assert_eq!(
            sorted,
            ["host: web:81", "accept: a", "accept: b", "cookie: c"]
        );
    }

    #[test]
    fn an_upgrade_is_forwarded_as_one() {
        let request = forward(
            "GET http://web/ HTTP/1.1\r\nHost: web\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n",
        );
        assert_eq!(request.headers()[CONNECTION], "upgrade");
        assert_eq!(request.headers()[UPGRADE], "websocket");
        assert_eq!(request.headers()[HOST], "web");
    }

    #[test]
    fn each_response_gets_a_framing_that_its_client_understands() {
        let (get, head) = (Method::GET, Method::HEAD);
        let table = [
            (&get, 200, Some(5), true, Ending::Length(5)),
            (&get, 200, None, true, Ending::Chunked),
            (&get, 200, None, false, Ending::Close),
            (&head, 200, Some(0), true, Ending::None),
            (&get, 204, Some(0), true, Ending::None),
            (&get, 304, Some(0), true, Ending::None),
        ];
        for (method, status, length, http11, expected) in table {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(
                ending(method, status, length, http11),
                expected,
                "{method} {status} {length:?} {http11}"
            );
        }
    }

    #[test]
    fn a_response_is_framed_anew_and_says_when_it_is_the_last() {
        let response = Response::builder()
            .header("content-length", "9")
            .header("transfer-encoding", "chunked")
            .header("connection", "x-hop")
            .header("x-hop", "1")
            .header("set-cookie", "a")
            .header("set-cookie", "b")
            .body(())
            .unwrap();
        let text = String::from_utf8(response_head(&response, Ending::Chunked, false)).unwrap();
        assert_eq!(
            text,
            "HTTP/1.1 200 OK\r\nset-cookie: a\r\nset-cookie: b\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        );
    }
}
