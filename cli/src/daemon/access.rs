//! By what right and by which way a connection gets to its manager, and what has to be undone in the cluster after it.

use std::sync::Arc;

use tp_manager_api::TUNNEL_PORT;
use tp_tunnel::Identity;

use super::carrier::{CarrierDialer, Direct, Finder, Place, PortForward};
use super::key_file;
use super::login::Login;
use super::parameters::{Parameters, Way};
use super::session::SessionLease;
use crate::kubeconfig::Cluster;
use crate::report::Failure;
use crate::temporary::{self, TemporaryManager};

/// By what the manager lets a connection in.
#[derive(Clone, Debug)]
pub enum Admission {
    /// A key that it was told of.
    Key(Identity),
    /// The key that a Session lists.
    Session(Arc<SessionLease>),
}

/// See the module.
pub struct Access {
    admission: Admission,
    login: Option<Login>,
    namespace: String,
    manager_namespace: Option<String>,
    temporary: Option<TemporaryManager>,
}

impl Access {
    /// Reads what is needed on this machine. The cluster is not asked yet.
    ///
    /// # Errors
    /// The kubeconfig or the key file cannot be used.
    pub async fn new(parameters: &Parameters) -> Result<Self, Failure> {
        let login = match &parameters.way {
            Way::Standalone { .. } => None,
            Way::PortForward | Way::Direct { .. } | Way::Temporary { .. } => {
                Some(Login::new(&parameters.selectors).await?)
            }
        };
        let namespace = match (&parameters.namespace, &login) {
            (Some(namespace), _) => namespace.clone(),
            (None, Some(login)) => login.last().namespace,
            (None, None) => String::new(),
        };
        let admission = match (&parameters.way, &login) {
            (Way::Standalone { key, .. }, _) => Admission::Key(key_file::read(key)?),
            (Way::PortForward | Way::Direct { .. }, Some(login)) => {
                let lease = SessionLease::new(login.clone(), namespace.clone());
                Admission::Session(Arc::new(lease))
            }
            (Way::PortForward | Way::Direct { .. } | Way::Temporary { .. }, _) => {
                Admission::Key(Identity::generate())
            }
        };
        let manager_namespace = match &parameters.way {
            Way::PortForward | Way::Direct { .. } => Some(parameters.manager_namespace.clone()),
            Way::Temporary { .. } => Some(namespace.clone()),
            Way::Standalone { .. } => None,
        };
        Ok(Self {
            admission,
            login,
            namespace,
            manager_namespace,
            temporary: None,
        })
    }

    /// What lets the connection in.
    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    /// The user's access to the cluster, where there is one.
    pub fn login(&self) -> Option<&Login> {
        self.login.as_ref()
    }

    /// The cluster, where there is one.
    pub fn cluster(&self) -> Option<Cluster> {
        self.login.as_ref().map(Login::last)
    }

    /// Its context's name; empty without.
    pub fn context(&self) -> String {
        self.cluster()
            .map_or_else(String::new, |cluster| cluster.context)
    }

    /// Its API server's URL; empty without.
    pub fn server(&self) -> String {
        self.cluster()
            .map_or_else(String::new, |cluster| cluster.server)
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
        match &self.admission {
            Admission::Key(_) => None,
            Admission::Session(lease) => Some(Arc::clone(lease)),
        }
    }

    /// The way to the manager; starts the temporary one first where that was asked for.
    ///
    /// # Errors
    /// The temporary manager did not start.
    pub async fn dialer(
        &mut self,
        parameters: &Parameters,
    ) -> Result<Box<dyn CarrierDialer>, Failure> {
        let finder = |login: &Login| Finder {
            login: login.clone(),
            namespace: parameters.manager_namespace.clone(),
        };
        let way: Box<dyn CarrierDialer> = match (&parameters.way, &self.login, &self.admission) {
            (
                Way::Standalone {
                    address,
                    manager_key,
                    ..
                },
                _,
                _,
            ) => Box::new(Direct::pinned(address.clone(), *manager_key)),
            (Way::Direct { address }, Some(login), _) => {
                Box::new(Direct::found(address.clone(), finder(login)))
            }
            (Way::PortForward, Some(login), _) => Box::new(PortForward::installed(finder(login))),
            (Way::Temporary { image }, Some(login), Admission::Key(identity)) => {
                let login = login.clone();
                let cluster = login.cluster().await?;
                let key = identity.key_hash();
                let manager = temporary::start(&cluster, &self.namespace, image, key).await?;
                let place = Place {
                    name: manager.pod.clone(),
                    port: TUNNEL_PORT,
                    key: manager.key_hash,
                };
                self.temporary = Some(manager);
                Box::new(PortForward::to_pod(login, self.namespace.clone(), place))
            }
            (Way::Direct { .. } | Way::PortForward | Way::Temporary { .. }, _, _) => {
                unreachable!(
                    "every way but the standalone one loads a cluster, and a temporary manager is told a key"
                )
            }
        };
        Ok(way)
    }

    /// Undoes what was made in the cluster. What cannot be undone now ends by its own expiry, and is logged.
    pub async fn end(&mut self) {
        if let Admission::Session(lease) = &self.admission
            && let Err(failure) = lease.end().await
        {
            tracing::warn!(
                error = failure.one_line(),
                "session not deleted; it will expire"
            );
        }
        if let (Some(manager), Some(login)) = (self.temporary.take(), &self.login)
            && let Err(failure) = stop(&manager, login, &self.namespace).await
        {
            tracing::warn!(
                error = failure.one_line(),
                "temporary manager not deleted; it will end by itself"
            );
        }
    }
}

async fn stop(manager: &TemporaryManager, login: &Login, namespace: &str) -> Result<(), Failure> {
    manager.stop(&login.cluster().await?, namespace).await
}
