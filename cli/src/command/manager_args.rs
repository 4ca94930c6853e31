//! Where the manager of a connection is, as flags say it.

use std::path::PathBuf;

use tp_manager_api::MANAGER_NAMESPACE;
use tp_tunnel::KeyHash;

use crate::daemon::parameters::Way;
use crate::install::DEFAULT_IMAGE;

/// The flags that lead to a manager other than the one that is installed in the usual place.
#[derive(clap::Args, Debug, Clone)]
pub struct ManagerArgs {
    /// Reach the manager at this address instead of through the API server
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    pub via: Option<String>,
    /// Key that a manager without Kubernetes lists (see `tp key new`)
    #[arg(long, value_name = "FILE", requires_all = ["via", "manager_key"], value_parser = absolute)]
    pub key: Option<PathBuf>,
    /// Hash of that manager's own key
    #[arg(long, value_name = "sha256:…", requires = "key")]
    pub manager_key: Option<KeyHash>,
    /// Needs no installed manager: runs one for this connection only, as a Job in the namespace, and reaches that one
    #[arg(long, conflicts_with = "via")]
    pub temporary: bool,
    /// Image of the temporary manager [default: the one of this release]
    #[arg(long, value_name = "IMAGE", requires = "temporary")]
    pub image: Option<String>,
    /// Namespace of the manager
    #[arg(long, value_name = "NAMESPACE", default_value = MANAGER_NAMESPACE)]
    pub manager_namespace: String,
}

impl ManagerArgs {
    /// Whether another manager than the installed one, or another way to it, was asked for.
    pub fn is_given(&self) -> bool {
        self.via.is_some() || self.temporary
    }

    /// How to get to the manager.
    pub fn way(&self) -> Way {
        match (&self.via, &self.key, self.manager_key) {
            _ if self.temporary => Way::Temporary {
                image: self
                    .image
                    .clone()
                    .unwrap_or_else(|| DEFAULT_IMAGE.to_owned()),
            },
            (Some(address), Some(key), Some(manager_key)) => Way::Standalone {
                address: address.clone(),
                key: key.clone(),
                manager_key,
            },
            (Some(address), ..) => Way::Direct {
                address: address.clone(),
            },
            (None, ..) => Way::PortForward,
        }
    }
}

fn host_port(text: &str) -> Result<String, String> {
    let expected = || "expected HOST:PORT".to_owned();
    let (host, port) = text.rsplit_once(':').ok_or_else(expected)?;
    let unclosed = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
    match port.parse::<u16>() {
        Ok(1..) if !host.is_empty() && !unclosed => Ok(text.to_owned()),
        Ok(_) | Err(_) => Err(expected()),
    }
}

/// What a connection was asked to be must not depend on the folder it was asked in.
fn absolute(text: &str) -> Result<PathBuf, std::io::Error> {
    std::path::absolute(text)
}
