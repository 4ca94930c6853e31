//! What the replicas of the manager have pushed, as one table.
//!
//! Each replica pushes on its own connection and renews within the lease. A connection that has ended keeps its routes
//! until their lease is over: its intercepts fall open (or fail, if strict) in the same way as with a workstation that
//! does not answer. They are asked after those of connections that live, so that one that was made anew meanwhile has its
//! requests.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tp_manager_api::route_table::{Listen, PortRoutes, Protocol, Route, RouteTable, merge};
use tp_manager_api::tls::Credential;

/// Names the connection that pushed a table.
pub type ConnectionId = u64;

/// By their ids.
pub type Credentials = BTreeMap<String, Credential>;

/// All tables. `W` is where matched requests of a connection's intercepts go.
#[derive(Debug)]
pub struct Book<W> {
    inner: RwLock<Inner<W>>,
    lease: Duration,
}

#[derive(Debug)]
struct Inner<W> {
    pushed: BTreeMap<ConnectionId, Pushed<W>>,
    ports: BTreeMap<Listen, Arc<Port<W>>>,
}

#[derive(Debug)]
struct Pushed<W> {
    table: RouteTable,
    /// Those that the table names, and no others.
    credentials: Credentials,
    workstation: W,
    until: Instant,
    ended: bool,
}

/// One intercepted port, its oldest intercept first.
#[derive(Debug)]
pub struct Port<W> {
    /// Where the application listens.
    pub app: u16,
    /// Intercepts in the order in which they are asked.
    pub intercepts: Vec<Live<W>>,
}

/// An intercept and where its requests go.
#[derive(Clone, Debug)]
pub struct Live<W> {
    /// The intercept.
    pub route: Route,
    /// Where its requests go.
    pub workstation: W,
    /// What opens TLS for it.
    pub tls: Option<Credential>,
}

impl<W: Clone> Book<W> {
    /// An empty book.
    pub fn new(lease: Duration) -> Self {
        let inner = Inner {
            pushed: BTreeMap::new(),
            ports: BTreeMap::new(),
        };
        Self {
            inner: RwLock::new(inner),
            lease,
        }
    }

    /// Replaces what this connection pushed before, and begins its lease anew. `credentials` are those that the table names.
    pub fn push(
        &self,
        connection: ConnectionId,
        (table, credentials): (RouteTable, Credentials),
        workstation: W,
        now: Instant,
    ) {
        let until = now + self.lease;
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        match inner.pushed.get_mut(&connection) {
            Some(pushed) if pushed.table == table => pushed.until = until,
            Some(_) | None => {
                let pushed = Pushed {
                    table,
                    credentials,
                    workstation,
                    until,
                    ended: false,
                };
                inner.pushed.insert(connection, pushed);
                inner.rebuild();
            }
        }
    }

    /// The connection has ended; its lease goes on.
    pub fn ended(&self, connection: ConnectionId) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(pushed) = inner.pushed.get_mut(&connection) {
            pushed.ended = true;
            inner.rebuild();
        }
    }

    /// Drops what has run out. Called often; an intercept may live that much longer than its lease.
    pub fn expire(&self, now: Instant) {
        let stale = |inner: &Inner<W>| inner.pushed.values().any(|pushed| pushed.until <= now);
        if !stale(&self.inner.read().unwrap_or_else(PoisonError::into_inner)) {
            return;
        }
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        inner.pushed.retain(|_, pushed| pushed.until > now);
        inner.rebuild();
    }

    /// The intercepts of a TCP port, if it has any.
    pub fn port(&self, listen: u16) -> Option<Arc<Port<W>>> {
        self.port_of((Protocol::Tcp, listen))
    }

    /// The intercepts of a UDP port, if it has any.
    pub fn udp_port(&self, listen: u16) -> Option<Arc<Port<W>>> {
        self.port_of((Protocol::Udp, listen))
    }

    fn port_of(&self, listen: Listen) -> Option<Arc<Port<W>>> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.ports.get(&listen).cloned()
    }

    /// The TCP ports that have intercepts of this connection.
    pub fn ports_of(&self, connection: ConnectionId) -> Vec<u16> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let pushed = inner.pushed.get(&connection).into_iter();
        let ports = pushed.flat_map(|pushed| &pushed.table.ports);
        let wanted =
            ports.filter(|port| port.protocol == Protocol::Tcp && !port.intercepts.is_empty());
        wanted.map(|port| port.listen).collect()
    }

    /// The TCP ports that have intercepts.
    pub fn ports(&self) -> Vec<u16> {
        self.listens(Protocol::Tcp)
    }

    /// The UDP ports that have intercepts.
    pub fn udp_ports(&self) -> Vec<u16> {
        self.listens(Protocol::Udp)
    }

    fn listens(&self, wanted: Protocol) -> Vec<u16> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let of_protocol = inner
            .ports
            .keys()
            .filter(|(protocol, _)| *protocol == wanted);
        of_protocol.map(|(_, port)| *port).collect()
    }
}

impl<W: Clone> Inner<W> {
    fn rebuild(&mut self) {
        let merged = merge(self.pushed.values().map(|pushed| &pushed.table));
        self.ports = merged
            .into_iter()
            .filter(|(_, port)| !port.intercepts.is_empty())
            .map(|(listen, port)| (listen, Arc::new(self.live(port))))
            .collect();
    }

    fn live(&self, port: PortRoutes) -> Port<W> {
        let (mut intercepts, mut ended) = (Vec::new(), Vec::new());
        for route in port.intercepts {
            if let Some(pushed) = self.pushed_by(&route.id) {
                let workstation = pushed.workstation.clone();
                let tls = route.tls.as_ref();
                let tls = tls.and_then(|id| pushed.credentials.get(id).cloned());
                let live = Live {
                    route,
                    workstation,
                    tls,
                };
                match pushed.ended {
                    true => ended.push(live),
                    false => intercepts.push(live),
                }
            }
        }
        intercepts.append(&mut ended);
        Port {
            app: port.app,
            intercepts,
        }
    }

    /// After a session has moved to another replica, the newest connection knows where it is.
    fn pushed_by(&self, id: &str) -> Option<&Pushed<W>> {
        let has = |pushed: &&Pushed<W>| {
            let mut routes = pushed.table.ports.iter().flat_map(|port| &port.intercepts);
            routes.any(|route| route.id == id)
        };
        let newest_first = || self.pushed.values().rev().filter(has);
        let lives = newest_first().find(|pushed| !pushed.ended);
        lives.or_else(|| newest_first().next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(ids: &[&str]) -> (RouteTable, Credentials) {
        let intercepts = ids
            .iter()
            .map(|id| Route {
                id: (*id).to_owned(),
                created: 1,
                matchers: Default::default(),
                strict: false,
                tls: None,
            })
            .collect();
        let port = PortRoutes {
            protocol: Protocol::Tcp,
            listen: 80,
            app: 8080,
            intercepts,
        };
        let table = RouteTable { ports: vec![port] };
        (table, Credentials::new())
    }

    fn found(book: &Book<&'static str>) -> Vec<(String, &'static str)> {
        let port = book.port(80);
        let intercepts = port.iter().flat_map(|port| &port.intercepts);
        intercepts
            .map(|live| (live.route.id.clone(), live.workstation))
            .collect()
    }

    #[test]
    fn replicas_are_merged_and_each_lease_runs_by_itself() {
        let book = Book::new(Duration::from_secs(15));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        book.push(1, table(&["b"]), "first", at(0));
        book.push(2, table(&["a"]), "second", at(5));
        assert_eq!(
            found(&book),
            [("a".into(), "second"), ("b".into(), "first")]
        );
        assert_eq!((book.ports(), book.port(80).unwrap().app), (vec![80], 8080));
        // The first one renews, the second one does not.
        book.push(1, table(&["b"]), "first", at(10));
        book.expire(at(20));
        assert_eq!(found(&book), [("b".into(), "first")]);
        book.expire(at(25));
        assert!(book.ports().is_empty());
    }

    #[test]
    fn who_has_left_is_asked_last() {
        let book = Book::new(Duration::from_secs(15));
        let now = Instant::now();
        book.push(1, table(&["a"]), "gone", now);
        book.push(2, table(&["b"]), "here", now);
        book.push(3, table(&["b"]), "gone later", now);
        book.ended(1);
        book.ended(3);
        assert_eq!(found(&book), [("b".into(), "here"), ("a".into(), "gone")]);
        // Even nobody but who has left: the requests are still theirs, for the lease.
        book.ended(2);
        assert_eq!(
            found(&book),
            [("a".into(), "gone"), ("b".into(), "gone later")]
        );
    }

    #[test]
    fn an_intercept_that_moved_goes_to_the_newer_connection() {
        let book = Book::new(Duration::from_secs(15));
        let now = Instant::now();
        book.push(1, table(&["a"]), "old", now);
        book.push(2, table(&["a"]), "new", now);
        assert_eq!(found(&book), [("a".into(), "new")]);
        book.push(2, table(&[]), "new", now);
        assert_eq!(found(&book), [("a".into(), "old")]);
        book.push(1, table(&[]), "old", now);
        assert!(book.ports().is_empty());
    }
}
