//! By what right and by which way a connection gets to its manager, and what has to be undone in the cluster after it.

use std::sync::Arc;

use tp_manager_api::TUNNEL_PORT;
use tp_tunnel::Identity;

use super::carrier::{CarrierDialer, Direct, Finder, Place, PortForward};
use super::key_file;
use super::parameters::{Parameters, Way};
use super::session::SessionLease;
use super::supervisor::one_line;
use crate::kubeconfig::Cluster;
use crate::report::Failure;
use crate::temporary::{self, TemporaryManager};

/// See the module.
pub struct Access {
    identity: Identity,
    cluster: Option<Cluster>,
    namespace: String,
    manager_namespace: Option<String>,
    lease: Option<Arc<SessionLease>>,
    temporary: Option<TemporaryManager>,
}

impl Access {
    /// Reads what is needed on this machine. The cluster is not asked yet.
    ///
    /// # Errors
    /// The kubeconfig or the key file cannot be used.
    pub async fn new(parameters: &Parameters) -> Result<Self, Failure> {
        let (identity, cluster) = match &parameters.way {
            Way::Standalone { key, .. } => (key_file::read(key)?, None),
            Way::PortForward | Way::Direct { .. } | Way::Temporary { .. } => (
                Identity::generate(),
                Some(parameters.selectors.load().await?),
            ),
        };
        let namespace = match (&parameters.namespace, &cluster) {
            (Some(namespace), _) => namespace.clone(),
            (None, Some(cluster)) => cluster.namespace.clone(),
            (None, None) => String::new(),
        };
        let admitted_by_session = matches!(parameters.way, Way::PortForward | Way::Direct { .. });
        let lease = cluster.clone().filter(|_| admitted_by_session);
        let lease = lease.map(|cluster| {
            Arc::new(SessionLease::new(
                cluster,
                namespace.clone(),
                identity.key_hash(),
            ))
        });
        let manager_namespace = match &parameters.way {
            Way::PortForward | Way::Direct { .. } => Some(parameters.manager_namespace.clone()),
            Way::Temporary { .. } => Some(namespace.clone()),
            Way::Standalone { .. } => None,
        };
        Ok(Self {
            identity,
            cluster,
            namespace,
            manager_namespace,
            lease,
            temporary: None,
        })
    }

    /// The key that the manager is to know.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The cluster, where there is one.
    pub fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_ref()
    }

    /// Its context's name; empty without.
    pub fn context(&self) -> &str {
        self.cluster.as_ref().map_or("", |cluster| &cluster.context)
    }

    /// Its API server's URL; empty without.
    pub fn server(&self) -> &str {
        self.cluster.as_ref().map_or("", |cluster| &cluster.server)
    }

    /// The namespace connected to; empty without Kubernetes.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The manager's namespace, with Kubernetes.
    pub fn manager_namespace(&self) -> Option<String> {
        self.manager_namespace.clone()
    }

    /// The Session that lets the key in, where one does.
    pub fn lease(&self) -> Option<Arc<SessionLease>> {
        self.lease.clone()
    }

    /// The way to the manager; starts the temporary one first where that was asked for.
    ///
    /// # Errors
    /// The temporary manager did not start.
    pub async fn dialer(
        &mut self,
        parameters: &Parameters,
    ) -> Result<Box<dyn CarrierDialer>, Failure> {
        let finder = |cluster: &Cluster| Finder {
            cluster: cluster.clone(),
            namespace: parameters.manager_namespace.clone(),
        };
        let way: Box<dyn CarrierDialer> = match (&parameters.way, &self.cluster) {
            (
                Way::Standalone {
                    address,
                    manager_key,
                    ..
                },
                _,
            ) => Box::new(Direct::pinned(address.clone(), *manager_key)),
            (Way::Direct { address }, Some(cluster)) => {
                Box::new(Direct::found(address.clone(), finder(cluster)))
            }
            (Way::PortForward, Some(cluster)) => Box::new(PortForward::installed(finder(cluster))),
            (Way::Temporary { image }, Some(cluster)) => {
                let cluster = cluster.clone();
                let manager =
                    temporary::start(&cluster, &self.namespace, image, self.identity.key_hash())
                        .await?;
                let place = Place {
                    name: manager.pod.clone(),
                    port: TUNNEL_PORT,
                    key: manager.key_hash,
                };
                self.temporary = Some(manager);
                Box::new(PortForward::to_pod(cluster, self.namespace.clone(), place))
            }
            (Way::Direct { .. } | Way::PortForward | Way::Temporary { .. }, None) => {
                unreachable!("every way but the standalone one loads a cluster")
            }
        };
        Ok(way)
    }

    /// Undoes what was made in the cluster. What cannot be undone now ends by its own expiry, and is logged.
    pub async fn end(&mut self) {
        if let Some(lease) = &self.lease
            && let Err(failure) = lease.end().await
        {
            tracing::warn!(
                error = one_line(&failure),
                "session not deleted; it will expire"
            );
        }
        if let (Some(manager), Some(cluster)) = (self.temporary.take(), &self.cluster)
            && let Err(failure) = manager.stop(cluster, &self.namespace).await
        {
            tracing::warn!(
                error = one_line(&failure),
                "temporary manager not deleted; it will end by itself"
            );
        }
    }
}
