//! A request's head: as it is matched, and as the next hop gets it.

use std::net::IpAddr;

use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderName, HeaderValue, Request, Uri};
use tp_manager_api::matcher::RequestHead;

use crate::front::Place;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// The head as matchers look at it.
pub(super) fn to_match(head: &Parts) -> RequestHead<'_> {
    let target = head.uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let fields = head
        .headers
        .iter()
        .map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
    RequestHead::new(head.method.as_str(), target.as_bytes(), fields)
}

impl Place {
    /// The request as the next hop gets it: a workstation if `mine`, which does not see that there was TLS.
    pub(super) fn next_request(&self, mut head: Parts, mine: bool) -> Request<()> {
        append_forwarded_for(&mut head, self.peer.ip().to_canonical());
        if mine && self.via().is_decrypted() {
            let proto = head.headers.entry(FORWARDED_PROTO);
            proto.or_insert(HeaderValue::from_static("https"));
        }
        let mut uri = std::mem::take(&mut head.uri).into_parts();
        let host = head.headers.get(http::header::HOST);
        let host = host.and_then(|host| Authority::try_from(host.as_bytes()).ok());
        let app = || Authority::try_from(self.app.to_string()).ok();
        uri.authority = uri.authority.or(host).or_else(app);
        uri.scheme = uri.scheme.or(Some(Scheme::HTTP));
        uri.path_and_query
            .get_or_insert(PathAndQuery::from_static("/"));
        head.uri = Uri::from_parts(uri).unwrap_or_default();
        head.extensions.clear();
        Request::from_parts(head, ())
    }
}

fn append_forwarded_for(head: &mut Parts, peer: IpAddr) {
    let last = head.headers.get_all(FORWARDED_FOR).iter().next_back();
    let value = match last {
        Some(value) => [value.as_bytes(), b", ", peer.to_string().as_bytes()].concat(),
        None => peer.to_string().into_bytes(),
    };
    let Ok(value) = HeaderValue::from_bytes(&value) else {
        return;
    };
    match head.headers.entry(FORWARDED_FOR) {
        http::header::Entry::Vacant(entry) => drop(entry.insert(value)),
        http::header::Entry::Occupied(mut entry) => {
            if let Some(last) = entry.iter_mut().next_back() {
                *last = value;
            }
        }
    }
}
