//! Which cluster and namespace a command looks at: those of a connection, unless flags say others.

use crate::daemon::peers;
use crate::kubeconfig::{Cluster, Selectors};
use crate::report::Failure;

/// Flags that say where.
#[derive(clap::Args, Debug, Clone)]
pub struct Place {
    /// Namespace [default: the connection's, else the context's]
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// Where this connection leads [default: the only one, if there is one]
    #[arg(long, value_name = "NAME")]
    pub connection: Option<String>,
    /// Which cluster, and as whom.
    #[command(flatten)]
    pub selectors: Selectors,
}

impl Place {
    /// The cluster and the namespace.
    ///
    /// # Errors
    /// There is no such connection, or it is not clear which, or the kubeconfig cannot be used.
    pub async fn find(&self) -> Result<(Cluster, String), Failure> {
        let is_given = self.selectors != Selectors::default();
        let (selectors, namespace) = match (&self.connection, peers::all().len()) {
            (None, 0) => (self.selectors.clone(), None),
            (None, _) if is_given => (self.selectors.clone(), None),
            (name, _) => {
                let (selectors, namespace) = peers::one(name.as_deref())?.login().await?;
                (selectors, Some(namespace))
            }
        };
        let cluster = selectors.load().await?;
        let namespace = self.namespace.clone().or(namespace);
        let namespace = namespace.unwrap_or_else(|| cluster.namespace.clone());
        Ok((cluster, namespace))
    }
}
