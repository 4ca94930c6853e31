//! What a replica of the manager tells an agent: which requests of which ports belong to which intercept.
//!
//! Each replica pushes only the intercepts whose sessions it holds, on its own connection; the agent merges the tables.
//! Who comes first is decided by the API server (creation time, then uid), so every agent decides alike.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::matcher::Matchers;

/// `PUT` with a [`RouteTable`] pushes it and renews its lease; the answer is 204, or 400 with one line of why.
pub const ROUTES_PATH: &str = "/v1/routes";

/// `GET` answers [`OpenConnections`]; `DELETE` first resets those that have been idle for longer than a second, of the ports
/// that this replica has pushed, and answers what is left.
pub const CONNECTIONS_PATH: &str = "/v1/connections";

/// `DELETE` leaves the pod to another agent, which may be added once the answer is 204: nothing is redirected by this one any
/// more, what it has goes on for a while, and then it ends.
pub const AGENT_PATH: &str = "/v1/agent";

/// How long a pushed table holds unless it is pushed again.
pub const LEASE: Duration = Duration::from_secs(15);

/// Largest number of ports in one table.
pub const PORTS_MAX: usize = 32;

/// Largest number of intercepts in one table, all ports together.
pub const INTERCEPTS_MAX: usize = 256;

/// All that one replica has for one agent. An empty one makes the agent dormant for that replica.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteTable {
    /// The ports that are intercepted.
    pub ports: Vec<PortRoutes>,
}

/// What is carried to a port.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize,
)]
#[cfg_attr(feature = "kube", derive(schemars::JsonSchema))]
pub enum Protocol {
    /// Connections.
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    /// Datagrams.
    #[serde(rename = "UDP")]
    Udp,
}

/// A port and what is carried to it.
pub type Listen = (Protocol, u16);

/// One intercepted port.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortRoutes {
    /// What is carried to it. Intercepts of UDP ports take everything.
    #[serde(default)]
    pub protocol: Protocol,
    /// Port that clients of the pod connect to.
    pub listen: u16,
    /// Port that the application listens on; the same one where the kernel redirects.
    pub app: u16,
    /// In any order: [`merge`] sorts them.
    pub intercepts: Vec<Route>,
}

/// One intercept of one port.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    /// Uid of the `Intercept`; it comes back when the agent answers an accept stream.
    pub id: String,
    /// Milliseconds since 1970 of its creation, by the API server's clock.
    pub created: i64,
    /// Which requests. None: every connection, whatever it speaks.
    #[serde(default)]
    pub matchers: Matchers,
    /// Whether a workstation that does not answer is an error instead of the application's turn.
    #[serde(default)]
    pub strict: bool,
    /// Id of the [`crate::tls::Credential`] by which requests inside of TLS are its, too. None: TLS passes it unparsed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<String>,
}

/// Connections that an intercepted application had before the agent came: the kernel redirects new ones only, so these
/// bypass the agent until they end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenConnections {
    /// The intercepted ports that have some.
    pub ports: Vec<PortConnections>,
}

/// Those of one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortConnections {
    /// Port that they connect to.
    pub port: u16,
    /// How many there are.
    pub open: u32,
    /// How many of them have said nothing for longer than a second, in either direction.
    pub idle: u32,
}

/// Why a table is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// A bound of this module.
    #[error("{0} {1} are more than {2}")]
    TooMany(usize, &'static str, usize),
    /// A port of zero, or one that is listed twice.
    #[error("port {0} cannot stand in a table, or stands there twice")]
    Port(u16),
    /// An id that cannot travel in a header.
    #[error("{0:?} is no uid")]
    Id(String),
}

impl RouteTable {
    /// Checks the bounds of this module.
    pub fn check(&self) -> Result<(), TableError> {
        let intercepts = self.ports.iter().map(|port| port.intercepts.len()).sum();
        for (number, what, most) in [
            (self.ports.len(), "ports", PORTS_MAX),
            (intercepts, "intercepts", INTERCEPTS_MAX),
        ] {
            if number > most {
                return Err(TableError::TooMany(number, what, most));
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        for port in &self.ports {
            if port.listen == 0 || port.app == 0 || !seen.insert((port.protocol, port.listen)) {
                return Err(TableError::Port(port.listen));
            }
        }
        let mut ids = self.ports.iter().flat_map(|port| &port.intercepts);
        match ids.find(|route| !is_uid(&route.id)) {
            Some(route) => Err(TableError::Id(route.id.clone())),
            None => Ok(()),
        }
    }
}

pub(crate) fn is_uid(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
}

/// The tables of all replicas as one: by port, the oldest intercept first, equal ages by uid. Where replicas disagree on
/// a port's application the first table wins; an intercept that two replicas push stands there once.
pub fn merge<'a>(tables: impl IntoIterator<Item = &'a RouteTable>) -> BTreeMap<Listen, PortRoutes> {
    let mut merged: BTreeMap<Listen, PortRoutes> = BTreeMap::new();
    for port in tables.into_iter().flat_map(|table| &table.ports) {
        merged
            .entry((port.protocol, port.listen))
            .or_insert_with(|| PortRoutes {
                intercepts: Vec::new(),
                ..*port
            })
            .intercepts
            .extend(port.intercepts.iter().cloned());
    }
    for port in merged.values_mut() {
        port.intercepts
            .sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        port.intercepts.dedup_by(|a, b| a.id == b.id);
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(id: &str, created: i64) -> Route {
        Route {
            id: id.into(),
            created,
            matchers: Matchers::default(),
            strict: false,
            tls: None,
        }
    }

    fn table(port: u16, routes: &[(&str, i64)]) -> RouteTable {
        RouteTable {
            ports: vec![PortRoutes {
                protocol: Protocol::Tcp,
                listen: port,
                app: port,
                intercepts: routes.iter().map(|(id, at)| route(id, *at)).collect(),
            }],
        }
    }

    #[test]
    fn merged_tables_have_one_order_whoever_pushed_first() {
        let (a, b) = (
            table(80, &[("d", 2), ("b", 1)]),
            table(80, &[("c", 1), ("b", 1)]),
        );
        let ids = |merged: BTreeMap<Listen, PortRoutes>| -> Vec<String> {
            merged[&(Protocol::Tcp, 80)]
                .intercepts
                .iter()
                .map(|route| route.id.clone())
                .collect()
        };
        assert_eq!(ids(merge([&a, &b])), ["b", "c", "d"]);
        assert_eq!(ids(merge([&b, &a])), ["b", "c", "d"]);
        assert!(merge([]).is_empty());
    }

    #[test]
    fn a_table_reads_as_the_manager_writes_it() {
        let text = r#"{"ports":[{"listen":80,"app":8080,"intercepts":[
            {"id":"u-1","created":5,"matchers":[{"header":{"name":"x-tp-user","exact":"ada"}}],"strict":true},
            {"id":"u-2","created":6}]}]}"#;
        let table: RouteTable = serde_json::from_str(text).unwrap();
        assert_eq!(table.check(), Ok(()));
        assert!(table.ports[0].intercepts[0].strict);
        assert!(table.ports[0].intercepts[1].matchers.is_empty());
        let again = serde_json::to_string(&table).unwrap();
        assert_eq!(serde_json::from_str::<RouteTable>(&again).unwrap(), table);
        let bad = text.replace("\"exact\"", "\"regex\"").replace("ada", "(");
        assert!(serde_json::from_str::<RouteTable>(&bad).is_err());
    }

    #[test]
    fn tables_out_of_bounds_are_refused() {
        let mut twice = table(80, &[]);
        twice.ports.extend(table(80, &[]).ports);
        twice.ports[1].protocol = Protocol::Udp;
        assert_eq!(twice.check(), Ok(()), "a port of UDP is another one");
        twice.ports[1].protocol = Protocol::Tcp;
        assert_eq!(twice.check(), Err(TableError::Port(80)));
        assert_eq!(table(0, &[]).check(), Err(TableError::Port(0)));
        assert_eq!(
            table(80, &[("a\r\nb", 1)]).check(),
            Err(TableError::Id("a\r\nb".into()))
        );
        assert!(matches!(
            table(80, &vec![("a", 1); 257]).check(),
            Err(TableError::TooMany(257, "intercepts", 256))
        ));
    }
}
