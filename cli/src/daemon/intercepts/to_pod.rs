//! `--to-pod`: ports of an intercepted pod, on this machine's loopback; of a helper beside the application, say.
//!
//! A connection goes to a pod that the intercept is attached to, through the tunnel as to any pod. The loopback belongs to
//! all users of the machine, so connections of others are closed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tp_manager_api::intercept::Reason;
use tp_tunnel::{Flow, Host, Target, Tunnel, relay, set_up_flow_socket};

use super::super::login::Login;
use super::Seen;
use crate::proxy::peer::{Protocol, is_same_user};
use crate::report::{Failure, OrFail};

/// How long a client waits for the pod's answer, and before for a tunnel.
const DIAL: Duration = Duration::from_secs(5);

/// How long accepting rests without descriptors.
const REST: Duration = Duration::from_millis(50);

/// A port of this machine that leads to the port of that number of a pod.
pub(super) struct Forward {
    listener: TcpListener,
    port: u16,
}

/// Finds an attached pod.
pub(super) struct Pods {
    pub(super) login: Login,
    pub(super) namespace: String,
    pub(super) seen_rx: watch::Receiver<Seen>,
    pub(super) tunnel: watch::Receiver<Option<Tunnel>>,
}

/// Listens, before anything is made in the cluster.
///
/// # Errors
/// A port is taken, or not this user's to use.
pub(super) async fn listen(ports: &[u16]) -> Result<Vec<Forward>, Failure> {
    let mut forwards = Vec::new();
    for port in ports {
        let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).await;
        let listener = bound.or_fail(|| format!("cannot listen on port {port} for `--to-pod`"))?;
        forwards.push(Forward {
            listener,
            port: *port,
        });
    }
    Ok(forwards)
}

/// Serves until it is dropped, which cuts every connection.
pub(super) async fn serve(forwards: Vec<Forward>, pods: Pods) {
    let pods = Arc::new(pods);
    let mut listeners = JoinSet::new();
    for forward in forwards {
        listeners.spawn(serve_one(forward, Arc::clone(&pods)));
    }
    while listeners.join_next().await.is_some() {}
}

async fn serve_one(Forward { listener, port }: Forward, pods: Arc<Pods>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, peer)) => {
                    connections.spawn(connection(client, peer, port, Arc::clone(&pods)));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections for the moment");
                    tokio::time::sleep(REST).await;
                }
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn connection(client: TcpStream, peer: SocketAddr, port: u16, pods: Arc<Pods>) {
    let own = client.local_addr();
    if !own.is_ok_and(|own| is_same_user(Protocol::Tcp, peer, own)) {
        tracing::debug!(%peer, "another user: not served");
        return;
    }
    set_up_flow_socket(&client);
    match pods.open(port).await {
        Ok(flow) => drop(relay(flow, client).await),
        Err(failure) => {
            tracing::info!(port, error = failure.one_line(), "no connection to a pod");
            // Nobody has answered. Fails only on a socket that is already gone.
            let _ = client.set_zero_linger();
        }
    }
}

impl Pods {
    async fn open(&self, port: u16) -> Result<Flow, Failure> {
        let address = self.address().await?;
        let target = Target::new(Host::Ip(address), port);
        let mut tunnels = self.tunnel.clone();
        let dialled = tokio::time::timeout(DIAL, async {
            let up = tunnels.wait_for(Option::is_some).await;
            let tunnel = up.ok().and_then(|up| up.clone());
            match tunnel {
                Some(tunnel) => Some(tunnel.connect(&target).await),
                None => None,
            }
        });
        match dialled.await {
            Ok(Some(dialled)) => dialled.or_fail(|| format!("cannot reach {target}")),
            Ok(None) | Err(_) => Err(Failure::new(format!("{target} did not answer"))),
        }
    }

    /// Asked for each connection: pods come and go.
    async fn address(&self) -> Result<IpAddr, Failure> {
        let Some(name) = attached(&self.seen_rx.borrow()) else {
            return Err(Failure::new("no pod is attached"));
        };
        let cluster = self.login.cluster().await?;
        let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), &self.namespace);
        let pod = cluster.in_time(pods.get(&name)).await?;
        let address = pod.status.and_then(|status| status.pod_ip);
        let address = address.and_then(|address| address.parse().ok());
        address.ok_or_else(|| Failure::new(format!("pod {name} has no address")))
    }
}

/// The first of them, so that a client that connects twice meets the same one.
fn attached(seen: &Seen) -> Option<String> {
    let Seen::There(object) = seen else {
        return None;
    };
    let pods = object.status.as_ref()?.pods.iter();
    let mut attached = pods.filter(|pod| pod.reason == Reason::Attached.as_str());
    attached.next().map(|pod| pod.name.clone())
}
