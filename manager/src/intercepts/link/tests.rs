use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use futures::future::BoxFuture;
use http::Request;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::mpsc;
use tp_manager_api::route_table::{PortRoutes, Route};
use tp_manager_api::tls::Credential;
use tp_tunnel::carrier::tls::accept_tls;
use tp_tunnel::{DialError, Dialed, Service, Target};

use super::super::secret::tests::credential;
use super::*;

/// An agent that only hears what it is told, and how often it was asked to yield.
struct Hearing(
    mpsc::UnboundedSender<(Method, RouteTable)>,
    Gave,
    Arc<AtomicUsize>,
);

/// Ids of the credentials that were given, each time.
type Gave = Arc<Mutex<Vec<String>>>;

impl Service for Hearing {
    fn dial(&self, _: Target) -> BoxFuture<'_, Result<Dialed<TcpStream>, DialError>> {
        unreachable!("nothing is dialled")
    }

    fn associate(&self, _: Target) -> BoxFuture<'_, Result<Dialed<UdpSocket>, DialError>> {
        unreachable!("nothing is dialled")
    }

    fn resolve(&self, _: Bytes) -> BoxFuture<'_, Bytes> {
        unreachable!("nothing is resolved")
    }

    fn control(&self, request: Request<Bytes>) -> BoxFuture<'_, Response<Bytes>> {
        Box::pin(async move {
            let mut answer = Response::new(Bytes::new());
            match request.uri().path() {
                CONNECTIONS_PATH => {
                    let counted = r#"{"ports":[{"port":80,"open":3,"idle":1}]}"#;
                    *answer.body_mut() = Bytes::from_static(counted.as_bytes());
                }
                FINDINGS_PATH => {
                    let found = r#"{"ports":[{"intercept":"a","found":"noTls"}]}"#;
                    *answer.body_mut() = Bytes::from_static(found.as_bytes());
                }
                CREDENTIALS_PATH => {
                    let credential: Credential = serde_json::from_slice(request.body()).unwrap();
                    lock(&self.1).push(credential.id().to_owned());
                    *answer.status_mut() = StatusCode::NO_CONTENT;
                }
                AGENT_PATH => {
                    assert_eq!(request.method(), Method::DELETE);
                    // Its parent is slow the first time.
                    *answer.status_mut() = match self.2.fetch_add(1, Relaxed) {
                        0 => StatusCode::SERVICE_UNAVAILABLE,
                        _ => StatusCode::NO_CONTENT,
                    };
                }
                _ => {
                    let table = serde_json::from_slice(request.body()).unwrap();
                    self.0.send((request.method().clone(), table)).unwrap();
                    *answer.status_mut() = StatusCode::NO_CONTENT;
                }
            }
            answer
        })
    }
}

/// Listens as an agent with this key does, for ever.
async fn agent(identity: Identity) -> (SocketAddr, mpsc::UnboundedReceiver<(Method, RouteTable)>) {
    agent_that_gets(identity, Gave::default()).await
}

async fn agent_that_gets(
    identity: Identity,
    gave: Gave,
) -> (SocketAddr, mpsc::UnboundedReceiver<(Method, RouteTable)>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (heard_tx, heard_rx) = mpsc::unbounded_channel();
    let asked = Arc::new(AtomicUsize::new(0));
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (identity, heard_tx) = (identity.clone(), heard_tx.clone());
            let service = Arc::new(Hearing(heard_tx, Arc::clone(&gave), Arc::clone(&asked)));
            tokio::spawn(async move {
                if let Ok((stream, _)) = accept_tls(tcp, &identity).await {
                    let never = std::future::pending();
                    let _ = tp_tunnel::serve(stream, service, never).await;
                }
            });
        }
    });
    (address, heard_rx)
}

fn orders(ids: &[&str]) -> Orders {
    let route = |id: &&str| Route {
        id: (*id).to_owned(),
        created: 1,
        matchers: Default::default(),
        strict: false,
        tls: None,
    };
    let port = PortRoutes {
        protocol: Default::default(),
        listen: 80,
        app: 80,
        intercepts: ids.iter().map(route).collect(),
    };
    Orders {
        table: RouteTable { ports: vec![port] },
        ..Orders::default()
    }
}

fn start(address: SocketAddr, key: KeyHash, orders: Orders) -> (Link, watch::Receiver<()>) {
    let changed = watch::channel(()).0;
    let news = changed.subscribe();
    let (link, ends) = Link::new("tp-agent-1".into(), orders, changed);
    let agent = Agent {
        address,
        key,
        identity: Identity::generate(),
    };
    let workstations = Arc::new(Workstations::new(Arc::default()));
    tokio::spawn(serve(agent, ends, workstations));
    (link, news)
}

fn ids(table: &RouteTable) -> Vec<&str> {
    let routes = table.ports.iter().flat_map(|port| &port.intercepts);
    routes.map(|route| route.id.as_str()).collect()
}

#[tokio::test]
async fn routes_are_pushed_when_they_change_and_withdrawn_at_the_end() {
    let identity = Identity::generate();
    let (address, mut heard) = agent(identity.clone()).await;
    let (link, mut news) = start(address, identity.key_hash(), orders(&["a"]));

    let (method, table) = heard.recv().await.unwrap();
    assert_eq!((method, ids(&table)), (Method::PUT, vec!["a"]));
    let connected = |link: &Link| match link.state() {
        LinkState::Connected {
            routed,
            open_before,
            ..
        } => Some((routed.len(), open_before.get(&80).copied())),
        LinkState::Dialing { .. } | LinkState::Yielded => None,
    };
    while connected(&link).is_none() {
        news.changed().await.unwrap();
    }
    assert_eq!(connected(&link), Some((1, Some(3))));

    link.set(orders(&["a", "b"]));
    assert_eq!(ids(&heard.recv().await.unwrap().1), ["a", "b"]);
    drop(link);
    assert_eq!(heard.recv().await.unwrap().1, RouteTable::default());
}

#[tokio::test]
async fn an_agent_that_is_to_yield_is_asked_until_it_does_and_then_left_alone() {
    let identity = Identity::generate();
    let yields = Orders {
        yields: true,
        ..Orders::default()
    };
    let (address, mut heard) = agent(identity.clone()).await;
    let (link, mut news) = start(address, identity.key_hash(), yields);

    while !matches!(link.state(), LinkState::Yielded) {
        news.changed().await.unwrap();
    }
    // The task has ended, and with it who brings news.
    let ended = async { while news.changed().await.is_ok() {} };
    timeout(Duration::from_secs(10), ended).await.unwrap();
    assert!(matches!(link.state(), LinkState::Yielded));
    assert!(heard.try_recv().is_err(), "it got no routes");
}

#[tokio::test]
async fn a_credential_is_given_before_the_routes_that_name_it_and_once() {
    let (identity, gave) = (Identity::generate(), Gave::default());
    let (address, mut heard) = agent_that_gets(identity.clone(), Arc::clone(&gave)).await;
    let credential = credential();
    let opened = |ids: &[&str]| {
        let mut orders = orders(ids);
        orders.table.ports[0].intercepts[0].tls = Some(credential.id().to_owned());
        let known = (credential.id().to_owned(), credential.clone());
        orders.credentials = BTreeMap::from([known]);
        orders
    };
    let (link, mut news) = start(address, identity.key_hash(), opened(&["a"]));

    let (_, table) = heard.recv().await.unwrap();
    assert_eq!(
        table.ports[0].intercepts[0].tls,
        lock(&gave).first().cloned()
    );
    let unopened = |link: &Link| match link.state() {
        LinkState::Connected { unopened, .. } => unopened,
        LinkState::Dialing { .. } | LinkState::Yielded => BTreeMap::new(),
    };
    while unopened(&link).is_empty() {
        news.changed().await.unwrap();
    }
    assert_eq!(unopened(&link)["a"], Found::NoTls);

    link.set(opened(&["a", "b"]));
    heard.recv().await.unwrap();
    assert_eq!(lock(&gave).len(), 1);
    // The agent forgets it with the first table that does not name it.
    link.set(orders(&["a"]));
    heard.recv().await.unwrap();
    link.set(opened(&["a"]));
    heard.recv().await.unwrap();
    assert_eq!(lock(&gave).len(), 2);
}

#[tokio::test]
async fn who_shows_another_key_is_told_nothing() {
    let (address, mut heard) = agent(Identity::generate()).await;
    let expected = Identity::generate().key_hash();

    let (link, mut news) = start(address, expected, orders(&["a"]));

    loop {
        news.changed().await.unwrap();
        if let LinkState::Dialing {
            trouble: Some(Trouble::Other(why)),
            ..
        } = link.state()
        {
            assert!(why.contains("not the pinned"), "{why}");
            break;
        }
    }
    assert!(heard.try_recv().is_err());
}

#[tokio::test]
async fn a_port_where_nothing_listens_is_told_from_silence() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);

    let (link, mut news) = start(address, Identity::generate().key_hash(), orders(&["a"]));

    news.changed().await.unwrap();
    let LinkState::Dialing { trouble, .. } = link.state() else {
        panic!("connected to nobody");
    };
    assert_eq!(trouble, Some(Trouble::Refused));
}
