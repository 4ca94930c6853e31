//! The connections of this user, as another process sees them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::future::join_all;
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::control::{Daemon, Reply, Request};
use super::folder::{self, Folder};
use super::held::Held;
use super::sightings::Watch;
use super::status::{ConnectionStatus, InterceptStatus, State};
use super::wanted::Wanted;
use crate::kubeconfig::Selectors;
use crate::report::Failure;

/// How long a second `connect` waits for the first one of the same name to come up.
const COMING_UP: Duration = Duration::from_secs(10);

/// How long ending may take: flows, session object, process.
const ENDED_WITHIN: Duration = Duration::from_secs(15);

/// A living connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its name.
    pub name: String,
    socket: PathBuf,
    log: PathBuf,
}

/// Every living connection, sorted by name.
pub fn all() -> Vec<Peer> {
    let of = |folder: Folder| {
        let held = folder
            .names()
            .into_iter()
            .filter(|name| folder.is_held(name))
            .collect::<Vec<_>>();
        held.into_iter().map(move |name| Peer {
            socket: folder.socket(&name),
            log: folder.log(&name),
            name,
        })
    };
    let mut peers: Vec<Peer> = folder::folders().into_iter().flat_map(of).collect();
    peers.sort_by(|a, b| a.name.cmp(&b.name));
    peers.dedup_by(|a, b| a.name == b.name);
    peers
}

/// Connections that ended by themselves and were not connected again since.
pub fn ended() -> Vec<ConnectionStatus> {
    let of = |folder: Folder| {
        let dead = folder
            .ended()
            .into_iter()
            .filter(|name| !folder.is_held(name))
            .collect::<Vec<_>>();
        dead.into_iter().map(move |name| {
            ConnectionStatus::ended(&name, folder.last_word(&name), folder.log(&name))
        })
    };
    folder::folders().into_iter().flat_map(of).collect()
}

/// Forgets those that ended: the named one, or all. Says whether there was one.
pub fn forget_ended(name: Option<&str>) -> bool {
    let mut forgotten = false;
    for folder in folder::folders() {
        for dead in folder
            .ended()
            .into_iter()
            .filter(|dead| name.is_none_or(|name| name == dead))
        {
            forgotten |= std::fs::remove_file(folder.obituary(&dead)).is_ok();
        }
    }
    forgotten
}

/// The connection that is meant: the named one, or the only one.
///
/// # Errors
/// There is none, or it is not clear which.
pub fn one(name: Option<&str>) -> Result<Peer, Failure> {
    pick(all(), name)
}

fn pick(mut peers: Vec<Peer>, name: Option<&str>) -> Result<Peer, Failure> {
    let names = peers
        .iter()
        .map(|peer| peer.name.as_str())
        .collect::<Vec<_>>()
        .join(", ");
    match (name, peers.len()) {
        (_, 0) => Err(Failure::new("not connected").hint("connect with `tp connect`")),
        (Some(name), _) => {
            let missing = || {
                Failure::new(format!("there is no connection named {name}"))
                    .hint(format!("there is: {names}"))
            };
            peers
                .into_iter()
                .find(|peer| peer.name == name)
                .ok_or_else(missing)
        }
        (None, 1) => Ok(peers.remove(0)),
        (None, _) => {
            Err(Failure::new("there are several connections")
                .hint(format!("say which one: {names}")))
        }
    }
}

/// The state of these connections; each makes its probe at the same time.
pub async fn statuses(peers: &[Peer]) -> Vec<ConnectionStatus> {
    join_all(peers.iter().map(Peer::status)).await
}

impl Peer {
    /// What it says of itself, or that it says nothing.
    pub async fn status(&self) -> ConnectionStatus {
        match ask(&self.socket, Request::Status).await {
            Ok(Reply::Status { connection, .. }) => *connection,
            Ok(_) | Err(_) => ConnectionStatus::unresponsive(&self.name, self.log.clone()),
        }
    }

    /// The variables that make a program use it.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn variables(&self) -> Result<Vec<(String, String)>, Failure> {
        match ask(&self.socket, Request::Env).await {
            Ok(Reply::Env { variables }) => Ok(variables),
            Ok(_) => Err(self.silent("it answered something else; is it of another version?")),
            Err(error) => Err(self.silent(&error.to_string())),
        }
    }

    /// Asks it to carry a namespace's packets. Gives the socket on which the rest is agreed, and the namespace and the
    /// cluster domain that names resolve in.
    ///
    /// # Errors
    /// It does not answer, or is of a release that cannot.
    pub async fn borrow(&self) -> Result<(UnixStream, String, String), Failure> {
        let asked = async {
            let mut daemon = Daemon::connect(&self.socket).await?;
            let reply = daemon.ask(Request::Run).await?;
            std::io::Result::Ok((daemon, reply))
        };
        match asked.await {
            Ok((daemon, Reply::Run { namespace, domain })) => {
                Ok((daemon.into_stream(), namespace, domain))
            }
            Ok((_, Reply::Refused { reason })) => Err(self.silent(&reason)),
            Ok(_) => Err(self.silent("it answered another question")),
            Err(error) => Err(self.silent(&error.to_string())),
        }
    }

    /// The way to its cluster, and its namespace.
    ///
    /// # Errors
    /// It does not answer, or knows no cluster.
    pub async fn login(&self) -> Result<(Selectors, String), Failure> {
        match ask(&self.socket, Request::Login).await {
            Ok(Reply::Login {
                selectors,
                namespace,
            }) => Ok((*selectors, namespace)),
            other => Err(self.unexpected(other)),
        }
    }

    /// Asks it for an intercept, and waits until that is ready. Dropping the future takes the wish back.
    ///
    /// # Errors
    /// Why it cannot be, or the daemon does not answer.
    pub async fn intercept(&self, wanted: Wanted) -> Result<(Held, Vec<InterceptStatus>), Failure> {
        let asked = async {
            let mut daemon = Daemon::connect(&self.socket).await?;
            let reply = daemon.ask(Request::Intercept(Box::new(wanted))).await?;
            std::io::Result::Ok((daemon, reply))
        };
        match asked.await {
            Ok((daemon, Reply::Intercepting)) => match Held::wait(daemon.into_reader()).await {
                Ok(made) => made,
                Err(error) => Err(self.silent(&error.to_string())),
            },
            other => Err(self.unexpected(other.map(|(_, reply)| reply))),
        }
    }

    /// Ends an intercept; says whether there was one.
    ///
    /// # Errors
    /// It could not be removed in the cluster, or the daemon does not answer.
    pub async fn leave(&self, name: &str) -> Result<bool, Failure> {
        let name = name.to_owned();
        match ask(&self.socket, Request::Leave { name }).await {
            Ok(Reply::Left { found }) => Ok(found),
            other => Err(self.unexpected(other)),
        }
    }

    /// Asks it to tell which requests are an intercept's from now on.
    ///
    /// # Errors
    /// There is no such intercept, or the daemon does not answer.
    pub async fn watch(&self, name: &str) -> Result<Watch, Failure> {
        let name = name.to_owned();
        let asked = async {
            let mut daemon = Daemon::connect(&self.socket).await?;
            let reply = daemon.ask(Request::Watch { name }).await?;
            std::io::Result::Ok((daemon, reply))
        };
        match asked.await {
            Ok((daemon, Reply::Watching)) => {
                let begun = Watch::begin(daemon.into_stream()).await;
                begun.map_err(|error| self.silent(&error.to_string()))
            }
            other => Err(self.unexpected(other.map(|(_, reply)| reply))),
        }
    }

    fn unexpected(&self, reply: std::io::Result<Reply>) -> Failure {
        match reply {
            Ok(Reply::Failed(failure)) => failure,
            Ok(Reply::Refused { reason }) => self.silent(&reason),
            Ok(_) => self.silent("it answered another question; is it of another version?"),
            Err(error) => self.silent(&error.to_string()),
        }
    }

    /// Ends it and waits until its session is deleted and its process has gone.
    ///
    /// # Errors
    /// It does not answer, or takes too long.
    pub async fn quit(&self) -> Result<(), Failure> {
        let mut daemon = match Daemon::connect(&self.socket).await {
            Ok(daemon) => daemon,
            Err(_) if all().iter().all(|peer| peer.name != self.name) => return Ok(()),
            Err(error) => return Err(self.silent(&error.to_string())),
        };
        daemon
            .ask(Request::Quit)
            .await
            .map_err(|error| self.silent(&error.to_string()))?;
        match daemon.gone(ENDED_WITHIN).await {
            true => Ok(()),
            false => Err(self.silent("it began to end and did not finish")),
        }
    }

    fn silent(&self, why: &str) -> Failure {
        Failure::new(format!(
            "the daemon of connection {} does not answer",
            self.name
        ))
        .because(why)
        .hint(format!("its log is {}", self.log.display()))
    }
}

/// Waits until the connection behind `socket` is up; returns its status and digest.
///
/// # Errors
/// It does not answer, or does not come up.
pub async fn wait_connected(
    name: &str,
    socket: &Path,
) -> Result<(ConnectionStatus, String), Failure> {
    let deadline = Instant::now() + COMING_UP;
    loop {
        let found = ask(socket, Request::Status).await;
        match found {
            Ok(Reply::Status { connection, digest }) if connection.state != State::Connecting => {
                return Ok((*connection, digest));
            }
            _ if Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(50)).await,
            _ => {
                return Err(Failure::new(format!(
                    "a connection named {name} is being made and does not come up"
                ))
                .hint(format!(
                    "end it with `tp quit {name}`, or give this one another name with `--name`"
                )));
            }
        }
    }
}

async fn ask(socket: &Path, request: Request) -> std::io::Result<Reply> {
    Daemon::connect(socket).await?.ask(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peers(names: &[&str]) -> Vec<Peer> {
        let peer = |name: &&str| Peer {
            name: (*name).to_owned(),
            socket: PathBuf::new(),
            log: PathBuf::new(),
        };
        names.iter().map(peer).collect()
    }

    #[test]
    fn the_only_connection_needs_no_name_and_several_do() {
        assert_eq!(pick(peers(&["a"]), None).unwrap().name, "a");
        assert_eq!(pick(peers(&["a", "b"]), Some("b")).unwrap().name, "b");
        assert!(
            pick(peers(&["a", "b"]), None)
                .unwrap_err()
                .hint
                .unwrap()
                .contains("a, b")
        );
        assert!(
            pick(peers(&["a"]), Some("x"))
                .unwrap_err()
                .what
                .contains("named x")
        );
        assert!(
            pick(peers(&[]), None)
                .unwrap_err()
                .hint
                .unwrap()
                .contains("tp connect")
        );
    }
}
