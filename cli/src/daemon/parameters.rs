//! What a connection was asked to be. It crosses from the command to its daemon as JSON, and never touches a disk.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tp_tunnel::KeyHash;

use super::screen::Source;
use crate::kubeconfig::{Secret, Selectors};

/// Everything `tp connect` can be told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameters {
    /// The connection's name, where one was given.
    pub name: Option<String>,
    /// Which cluster, as whom.
    pub selectors: Selectors,
    /// Namespace whose short names resolve, where one was given.
    pub namespace: Option<String>,
    /// Where the manager is installed.
    pub manager_namespace: String,
    /// How to get to a manager.
    pub way: Way,
    /// Where the proxy listens.
    pub listen: Listen,
    /// Everything goes to the cluster.
    pub all: bool,
    /// Rules for what goes there besides.
    pub also_proxy: Vec<String>,
    /// Rules for what never goes there.
    pub never_proxy: Vec<String>,
    /// Whether other machines may use the proxy.
    pub allow_lan: bool,
    /// What the proxy demands of its users.
    pub credentials: Option<ProxyCredentials>,
}

/// How to get to a manager.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "way", rename_all = "snake_case")]
pub enum Way {
    /// Through the API server to the installed one.
    PortForward,
    /// Straight to the installed one, by an address that leads to it.
    Direct {
        /// `host:port`.
        address: String,
    },
    /// Straight to one that knows no Kubernetes.
    Standalone {
        /// `host:port`.
        address: String,
        /// File with the key that the manager lists.
        key: PathBuf,
        /// Hash of the manager's own key.
        manager_key: KeyHash,
    },
    /// Through the API server to one that is started for this connection.
    Temporary {
        /// Image of the manager.
        image: String,
    },
}

impl Way {
    /// Whose word is taken for what goes there.
    pub fn source(&self) -> Source {
        match self {
            Self::Standalone { .. } => Source::Pinned,
            Self::PortForward | Self::Direct { .. } | Self::Temporary { .. } => Source::Cluster,
        }
    }
}

/// User name and password of the proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyCredentials {
    /// User name.
    pub user: String,
    /// Password.
    pub password: Secret,
}

impl Parameters {
    /// Equal for requests that ask for the same connection, whatever its name. `cluster` is what the selectors led
    /// to, since the same flags can mean another cluster tomorrow.
    pub fn digest(&self, cluster: &[&str]) -> String {
        let nameless = Self {
            name: None,
            ..self.clone()
        };
        let text = serde_json::to_string(&(nameless, cluster)).expect("plain data has a JSON form");
        let digest = Sha256::digest(text.as_bytes());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Where the proxy listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Listen {
    /// Loopback, 1080 or the next free port.
    Default,
    /// Loopback, IPv4 and IPv6; 0 is any free port.
    Loopback(u16),
    /// Exactly there; port 0 is any free port.
    At(SocketAddr),
}

impl Listen {
    /// Whether machines other than this one can connect there.
    pub fn beyond_loopback(&self) -> bool {
        matches!(self, Self::At(address) if !address.ip().to_canonical().is_loopback())
    }

    /// The addresses to bind, the first one being what is said to users.
    pub fn addresses(&self) -> Vec<IpAddr> {
        match self {
            Self::Default | Self::Loopback(_) => {
                vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
            }
            Self::At(address) => vec![address.ip()],
        }
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(port) = text.parse() {
            return Ok(Self::Loopback(port));
        }
        if let Some(Ok(port)) = text.strip_prefix("localhost:").map(str::parse) {
            return Ok(Self::Loopback(port));
        }
        text.parse().map(Self::At).map_err(|_| {
            "expected a port or ADDRESS:PORT, such as 1080, 127.0.0.1:0 or [::1]:1080".to_owned()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters() -> Parameters {
        Parameters {
            name: None,
            selectors: Selectors::default(),
            namespace: None,
            manager_namespace: "tp-system".into(),
            way: Way::PortForward,
            listen: Listen::Default,
            all: false,
            also_proxy: Vec::new(),
            never_proxy: Vec::new(),
            allow_lan: false,
            credentials: None,
        }
    }

    #[test]
    fn the_digest_ignores_the_name_and_nothing_else() {
        let first = parameters();
        let named = Parameters {
            name: Some("x".into()),
            ..first.clone()
        };
        let other = Parameters {
            all: true,
            ..first.clone()
        };

        assert_eq!(first.digest(&["a"]), named.digest(&["a"]));
        assert_ne!(first.digest(&["a"]), other.digest(&["a"]));
        assert_ne!(first.digest(&["a"]), first.digest(&["b"]));
    }

    #[test]
    fn parameters_survive_the_way_to_the_daemon() {
        let credentials = ProxyCredentials {
            user: "u".into(),
            password: "p".into(),
        };
        let sent = Parameters {
            credentials: Some(credentials),
            ..parameters()
        };

        let back: Parameters =
            serde_json::from_str(&serde_json::to_string(&sent).unwrap()).unwrap();

        assert_eq!(back, sent);
    }

    #[test]
    fn listen_takes_ports_and_addresses() {
        for (text, expected, beyond) in [
            ("0", Listen::Loopback(0), false),
            ("localhost:9", Listen::Loopback(9), false),
            (
                "127.0.0.1:0",
                Listen::At("127.0.0.1:0".parse().unwrap()),
                false,
            ),
            ("[::1]:7", Listen::At("[::1]:7".parse().unwrap()), false),
            ("0.0.0.0:7", Listen::At("0.0.0.0:7".parse().unwrap()), true),
            ("[::]:7", Listen::At("[::]:7".parse().unwrap()), true),
            (
                "192.168.1.4:7",
                Listen::At("192.168.1.4:7".parse().unwrap()),
                true,
            ),
        ] {
            let listen: Listen = text.parse().unwrap();
            assert_eq!(listen.beyond_loopback(), beyond, "{text}");
            assert_eq!(listen, expected);
        }
        for bad in ["", "x", "70000", "example.com:80", "1.2.3.4"] {
            assert!(bad.parse::<Listen>().is_err(), "{bad}");
        }
    }
}
