//! Whose request is this? Pure: the intercepts of a port against the head of a request, and its body where asked.

use tp_manager_api::matcher::graphql::Operation;
use tp_manager_api::matcher::{RequestHead, Verdict};
use tp_manager_api::tls::PublicKey;

use crate::book::{Live, Port};

/// Where a request goes.
#[derive(Debug)]
pub enum Decision<'a, W> {
    /// To the application.
    App,
    /// To this intercept's workstation.
    Mine(&'a Live<W>),
    /// An intercept wants the operation in the body.
    NeedsBody,
}

/// What a connection needs before anything of it can be sent on.
#[derive(Debug)]
pub enum Need<'a, W> {
    /// Nothing: it is the application's.
    App,
    /// Nothing: it is this intercept's, whatever it speaks.
    Mine(&'a Live<W>),
    /// Some intercept looks at requests.
    Protocol,
}

/// What a connection's bytes are inside of. What TLS protects is only for intercepts of who could have decrypted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// Nothing.
    Plain,
    /// TLS that passes unparsed.
    Sealed,
    /// TLS that the agent has ended with the application's key.
    Decrypted(PublicKey),
}

impl Via {
    /// Whether the agent has ended TLS.
    pub fn is_decrypted(self) -> bool {
        matches!(self, Self::Decrypted(_))
    }
}

impl<W> Live<W> {
    /// Whether a connection's bytes may be this intercept's. One that named a Secret never gets what is still encrypted.
    fn may_have(&self, via: Via) -> bool {
        match (via, &self.tls) {
            (Via::Plain, _) | (Via::Sealed, None) => true,
            (Via::Sealed, Some(_)) | (Via::Decrypted(_), None) => false,
            (Via::Decrypted(key), Some(credential)) => credential.public_key() == key,
        }
    }
}

/// Asks the intercepts in their order; the first that matches has the request. `body` as in
/// [`tp_manager_api::Matchers::matches`].
pub fn decide<'a, W>(
    port: Option<&'a Port<W>>,
    via: Via,
    head: &RequestHead<'_>,
    body: Option<&Operation>,
) -> Decision<'a, W> {
    let intercepts = port.into_iter().flat_map(|port| &port.intercepts);
    for live in intercepts.filter(|live| live.may_have(via)) {
        match live.route.matchers.matches(head, body) {
            Verdict::Mine => return Decision::Mine(live),
            Verdict::NotMine => {}
            Verdict::NeedsBody => return Decision::NeedsBody,
        }
    }
    Decision::App
}

/// What to do with a new connection. The oldest intercept decides alone if it takes everything.
pub fn need<W>(port: Option<&Port<W>>) -> Need<'_, W> {
    match port.and_then(|port| port.intercepts.first()) {
        None => Need::App,
        Some(live) if live.route.matchers.is_empty() && live.tls.is_none() => Need::Mine(live),
        Some(_) => Need::Protocol,
    }
}

/// Whose a connection is that speaks no HTTP: the oldest intercept's that takes everything.
pub fn unparsed<W>(port: Option<&Port<W>>, via: Via) -> Option<&Live<W>> {
    let mut intercepts = port.into_iter().flat_map(|port| &port.intercepts);
    intercepts.find(|live| live.route.matchers.is_empty() && live.may_have(via))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tp_manager_api::Matchers;
    use tp_manager_api::route_table::Route;
    use tp_manager_api::tls::Credential;

    fn port(matchers: &[&str]) -> Port<()> {
        let intercepts = matchers.iter().enumerate().map(|(place, json)| Live {
            route: Route {
                id: place.to_string(),
                created: 0,
                matchers: serde_json::from_str::<Matchers>(json).unwrap(),
                strict: false,
                tls: None,
            },
            workstation: (),
            tls: None,
        });
        Port {
            app: 80,
            intercepts: intercepts.collect(),
        }
    }

    fn decided(port: &Port<()>, user: &str) -> String {
        let fields = [
            (&b"x-user"[..], user.as_bytes()),
            (&b"content-type"[..], &b"application/json"[..]),
        ];
        let head = RequestHead::new("POST", b"/", fields);
        match decide(Some(port), Via::Plain, &head, None) {
            Decision::App => "app".into(),
            Decision::Mine(live) => live.route.id.clone(),
            Decision::NeedsBody => "body".into(),
        }
    }

    const ADA: &str = r#"[{"header": {"name": "x-user", "exact": "ada"}}]"#;
    const BOB: &str = r#"[{"header": {"name": "x-user", "prefix": "b"}}]"#;
    const CART: &str = r#"[{"graphql": {"operation": "Cart"}}]"#;

    #[test]
    fn the_oldest_that_matches_has_the_request() {
        let both = port(&[ADA, BOB]);
        assert_eq!(decided(&both, "ada"), "0");
        assert_eq!(decided(&both, "bob"), "1");
        assert_eq!(decided(&both, "eve"), "app");
        // The body is read only when nobody older has the request.
        assert_eq!(decided(&port(&[ADA, CART]), "ada"), "0");
        assert_eq!(decided(&port(&[ADA, CART]), "eve"), "body");
        assert_eq!(decided(&port(&[ADA, "[]"]), "eve"), "1");
    }

    #[test]
    fn a_connection_waits_only_when_an_intercept_looks_at_requests() {
        assert!(matches!(need::<()>(None), Need::App));
        assert!(matches!(need(Some(&port(&[]))), Need::App));
        assert!(matches!(need(Some(&port(&["[]", ADA]))), Need::Mine(_)));
        assert!(matches!(need(Some(&port(&[ADA, "[]"]))), Need::Protocol));
        let both = port(&[ADA, "[]"]);
        assert_eq!(unparsed(Some(&both), Via::Plain).unwrap().route.id, "1");
        assert!(unparsed(Some(&port(&[ADA])), Via::Plain).is_none());
    }

    fn credential() -> Credential {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(["web".to_owned()]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Credential::try_new(certificate.pem(), key.serialize_pem()).unwrap()
    }

    #[test]
    fn what_was_decrypted_is_only_for_who_named_that_key() {
        let (of_app, other) = (credential(), credential());
        let mut port = port(&["[]", "[]", "[]"]);
        port.intercepts[1].tls = Some(other.clone());
        port.intercepts[2].tls = Some(of_app.clone());
        let found = |via| unparsed(Some(&port), via).unwrap().route.id.clone();
        assert_eq!(found(Via::Decrypted(of_app.public_key())), "2");
        assert_eq!(found(Via::Decrypted(other.public_key())), "1");
        assert_eq!(
            (found(Via::Sealed), found(Via::Plain)),
            ("0".into(), "0".into())
        );
        let head = RequestHead::new("GET", b"/", []);
        let via = Via::Decrypted(of_app.public_key());
        port.intercepts.truncate(2);
        assert!(matches!(
            decide(Some(&port), via, &head, None),
            Decision::App
        ));
        // With a credential even everything is not taken before it is known what is spoken.
        port.intercepts.remove(0);
        assert!(matches!(need(Some(&port)), Need::Protocol));
        assert!(unparsed(Some(&port), Via::Sealed).is_none());
    }
}
