//! Whose request is this? Pure: the intercepts of a port against the head of a request, and its body where asked.

use tp_manager_api::matcher::graphql::Operation;
use tp_manager_api::matcher::{RequestHead, Verdict};

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

/// Asks the intercepts in their order; the first that matches has the request. `body` as in
/// [`tp_manager_api::Matchers::matches`].
pub fn decide<'a, W>(
    port: Option<&'a Port<W>>,
    head: &RequestHead<'_>,
    body: Option<&Operation>,
) -> Decision<'a, W> {
    for live in port.into_iter().flat_map(|port| &port.intercepts) {
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
        Some(live) if live.route.matchers.is_empty() => Need::Mine(live),
        Some(_) => Need::Protocol,
    }
}

/// Whose a connection is that speaks no HTTP: the oldest intercept's that takes everything.
pub fn unparsed<W>(port: Option<&Port<W>>) -> Option<&Live<W>> {
    let mut intercepts = port.into_iter().flat_map(|port| &port.intercepts);
    intercepts.find(|live| live.route.matchers.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tp_manager_api::Matchers;
    use tp_manager_api::route_table::Route;

    fn port(matchers: &[&str]) -> Port<()> {
        let intercepts = matchers.iter().enumerate().map(|(place, json)| Live {
            route: Route {
                id: place.to_string(),
                created: 0,
                matchers: serde_json::from_str::<Matchers>(json).unwrap(),
                strict: false,
            },
            workstation: (),
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
        match decide(Some(port), &head, None) {
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
        assert_eq!(unparsed(Some(&port(&[ADA, "[]"]))).unwrap().route.id, "1");
        assert!(unparsed(Some(&port(&[ADA]))).is_none());
    }
}
