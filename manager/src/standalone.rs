//! A manager without Kubernetes: keys from a file, reach from flags.
//!
//! It serves any network to whoever holds a listed key. What is listed is reachable; the rest of the world needs
//! `--egress`. The keys' file is read again when it changes, so a removed key is cut without a restart.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::future::BoxFuture;
use ipnet::IpNet;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tp_manager_api::cluster_view::ManagerInfo;
use tp_manager_api::{ClusterView, PROTOCOL};
use tp_tunnel::{Identity, KeyHash};

use crate::dial::refuse::Surroundings;
use crate::dial::resolv_conf::ResolvConf;
use crate::dial::resolve::Resolver;
use crate::dial::{Destination, Dialer, Permit, Reach};
use crate::listen::{self, Admitted, Gate, Listener};
use crate::metrics::Metrics;
use crate::service::{SessionService, Views, with_version};

/// What the flags say.
#[derive(Clone, Debug)]
pub struct Options {
    /// Address and port of the tunnel.
    pub listen: SocketAddr,
    /// PEM file with the manager's private key; made when it is missing.
    pub key: PathBuf,
    /// One `sha256:…` a line; `#` starts a comment.
    pub authorized_keys: PathBuf,
    /// Names under these are reachable, whatever they resolve to.
    pub suffixes: Vec<String>,
    /// Addresses in these are reachable.
    pub ranges: Vec<IpNet>,
    /// Everything else is reachable too.
    pub egress: bool,
}

/// Serves until `shutdown`.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<()> {
    let identity = load_or_make_key(&options.key)?;
    let keys = read_keys(&options.authorized_keys)?;
    let socket = TcpListener::bind(options.listen)
        .await
        .with_context(|| format!("cannot listen on {}", options.listen))?;
    let address = socket
        .local_addr()
        .context("cannot read the listening address")?;
    let conf = ResolvConf::parse(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
    let metrics = Arc::new(Metrics::default());
    let (keys_tx, keys_rx) = watch::channel(keys);
    let network = Arc::new(Network {
        nameservers: conf.nameservers.iter().map(SocketAddr::ip).collect(),
        own: address,
        suffixes: options
            .suffixes
            .iter()
            .map(|suffix| normalise(suffix))
            .collect(),
        ranges: options.ranges,
        egress: options.egress,
    });
    let resolver = Resolver::new(conf, Some("/etc/hosts".into()));
    let gate = Arc::new(KeyFile {
        name: host_name(),
        dialer: Arc::new(Dialer::new(
            resolver,
            Arc::clone(&metrics),
            crate::DIAL_TIMEOUT,
        )),
        network,
        keys: keys_rx,
    });
    tracing::info!(key_hash = %identity.key_hash(), listen = %address, "manager key {}", identity.key_hash());
    let listener = Listener {
        socket,
        identity,
        gate,
        metrics,
        most_strangers: listen::MOST_STRANGERS,
        drain: listen::DRAIN,
    };
    tokio::select! {
        () = listen::serve(listener, shutdown) => Ok(()),
        never = follow_keys(options.authorized_keys, keys_tx) => match never {},
    }
}

fn normalise(suffix: &str) -> String {
    suffix
        .trim_start_matches('*')
        .trim_matches('.')
        .to_ascii_lowercase()
}

/// Name of this machine as the workstation shows it.
pub(crate) fn host_name() -> Arc<str> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "standalone".into(),
        name => name.into(),
    }
}

/// The key in the file, or a new one written there for its owner alone.
fn load_or_make_key(path: &Path) -> Result<Identity> {
    match std::fs::read_to_string(path) {
        Ok(pem) => Identity::from_pem(&pem)
            .with_context(|| format!("cannot use the key in {}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let identity = Identity::generate();
            write_secret(path, &identity.to_pem())
                .with_context(|| format!("cannot write {}", path.display()))?;
            Ok(identity)
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn write_secret(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn read_keys(path: &Path) -> Result<HashSet<KeyHash>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_keys(&text).with_context(|| format!("cannot use {}", path.display()))
}

/// One hash a line; what follows it on the line, and `#` lines, are for people.
fn parse_keys(text: &str) -> Result<HashSet<KeyHash>> {
    let lines = text
        .lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line.trim()));
    lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(number, line)| {
            let word = line.split_ascii_whitespace().next().unwrap_or_default();
            word.parse().with_context(|| format!("line {number}"))
        })
        .collect()
}

/// Reads the file again every second if it was written. A file that cannot be read changes nothing.
async fn follow_keys(
    path: PathBuf,
    keys: watch::Sender<HashSet<KeyHash>>,
) -> std::convert::Infallible {
    let written = |path: &Path| {
        std::fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .ok()
    };
    let mut last = written(&path);
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = written(&path);
        if now == last {
            continue;
        }
        last = now;
        match read_keys(&path) {
            Ok(read) => {
                keys.send_if_modified(|keys| std::mem::replace(keys, read.clone()) != read);
            }
            Err(error) => tracing::warn!("keeping the keys read before: {error:#}"),
        }
    }
}

/// Admits listed keys, for as long as they are listed.
struct KeyFile {
    name: Arc<str>,
    dialer: Arc<Dialer>,
    network: Arc<Network>,
    keys: watch::Receiver<HashSet<KeyHash>>,
}

impl Gate for KeyFile {
    fn admit(&self, key: KeyHash) -> BoxFuture<'_, Result<Admitted, String>> {
        Box::pin(async move {
            if !self.keys.borrow().contains(&key) {
                return Err("the key is not listed".to_owned());
            }
            let service = SessionService {
                replica: Arc::clone(&self.name),
                dialer: Arc::clone(&self.dialer),
                reach: Arc::clone(&self.network),
                seat: None,
                views: FixedView(self.network.view(&self.name)),
            };
            let mut keys = self.keys.clone();
            Ok(Admitted {
                who: key.to_string(),
                service: Arc::new(service),
                ended: Box::pin(async move {
                    let removed = keys.wait_for(|keys| !keys.contains(&key)).await.is_ok();
                    if removed {
                        "the key was removed".to_owned()
                    } else {
                        "the manager ends".to_owned()
                    }
                }),
            })
        })
    }
}

/// What lies behind a standalone manager; the same for every key.
struct Network {
    nameservers: Vec<IpAddr>,
    own: SocketAddr,
    suffixes: Vec<String>,
    ranges: Vec<IpNet>,
    egress: bool,
}

impl Network {
    fn view(&self, name: &str) -> ClusterView {
        with_version(ClusterView {
            protocol: PROTOCOL,
            manager: ManagerInfo {
                name: name.to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
            service_ranges: self.ranges.clone(),
            suffixes: self.suffixes.clone(),
            everything: self.egress,
            ..ClusterView::default()
        })
    }

    fn reaches(&self, destination: &Destination) -> bool {
        let named = destination.name.as_deref().is_some_and(|name| {
            self.suffixes.iter().any(|suffix| {
                name.strip_suffix(suffix.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            })
        });
        named
            || self.egress
            || self
                .ranges
                .iter()
                .any(|range| range.contains(&destination.address))
    }
}

impl Reach for Network {
    fn surroundings(&self) -> &dyn Surroundings {
        self
    }

    fn namespace(&self) -> Option<&str> {
        None
    }

    fn permit<'a>(&'a self, destination: &'a Destination) -> BoxFuture<'a, Result<Permit, String>> {
        let permit = match self.reaches(destination) {
            true => Ok(None),
            false => Err(format!(
                "{} is in no --range and under no --suffix of this manager, which runs without --egress",
                destination
                    .name
                    .clone()
                    .unwrap_or_else(|| destination.address.to_string())
            )),
        };
        Box::pin(std::future::ready(permit))
    }
}

impl Surroundings for Network {
    fn is_nameserver(&self, address: IpAddr) -> bool {
        self.nameservers.contains(&address)
    }

    /// There are no nodes, but a machine with such ports open is one in all likelihood.
    fn is_node(&self, _address: IpAddr) -> bool {
        true
    }

    fn is_manager(&self, address: IpAddr, port: u16) -> bool {
        port == self.own.port()
            && (address == self.own.ip() || self.own.ip().is_unspecified() && is_local(address))
    }
}

/// Whether this machine has the address: only then can a socket be bound to it.
pub(crate) fn is_local(address: IpAddr) -> bool {
    std::net::UdpSocket::bind((address, 0)).is_ok()
}

struct FixedView(ClusterView);

impl Views for FixedView {
    fn view(&self) -> BoxFuture<'_, ClusterView> {
        Box::pin(std::future::ready(self.0.clone()))
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(suffixes: &[&str], ranges: &[&str], egress: bool) -> Network {
        Network {
            nameservers: Vec::new(),
            own: "10.1.0.1:8443".parse().unwrap(),
            suffixes: suffixes.iter().map(|suffix| normalise(suffix)).collect(),
            ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
            egress,
        }
    }

    fn to(name: Option<&str>, address: &str) -> Destination {
        Destination {
            name: name.map(str::to_owned),
            address: address.parse().unwrap(),
            port: 80,
        }
    }

    #[test]
    fn only_what_is_listed_is_reached_without_egress() {
        let listed = network(&["*.demo.test"], &["10.1.0.0/16"], false);

        assert!(listed.reaches(&to(Some("web.demo.test"), "203.0.113.1")));
        assert!(listed.reaches(&to(Some("demo.test"), "203.0.113.1")));
        assert!(!listed.reaches(&to(Some("notdemo.test"), "203.0.113.1")));
        assert!(listed.reaches(&to(None, "10.1.2.3")));
        assert!(listed.reaches(&to(Some("elsewhere.test"), "10.1.2.3")));
        assert!(!listed.reaches(&to(None, "10.2.2.3")));
        assert!(network(&[], &[], true).reaches(&to(None, "203.0.113.1")));
    }

    #[test]
    fn the_manager_refuses_its_own_port_only() {
        let around = network(&[], &["10.1.0.0/16"], false);

        assert!(around.is_manager("10.1.0.1".parse().unwrap(), 8443));
        assert!(!around.is_manager("10.1.0.1".parse().unwrap(), 80));
        assert!(!around.is_manager("10.1.0.2".parse().unwrap(), 8443));
    }

    #[test]
    fn a_key_file_is_hashes_comments_and_nothing_else() {
        let hash = Identity::generate().key_hash();

        let keys = parse_keys(&format!("# ada\n\n  {hash} ada@laptop\n")).unwrap();

        assert_eq!(keys, HashSet::from([hash]));
        assert!(parse_keys("ssh-ed25519 AAAA").is_err());
    }
}
