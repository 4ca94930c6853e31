//! What a command and a daemon say to each other: one line of JSON each way on a Unix socket.
//!
//! The socket lies in a folder that only its user can enter, and the peer's uid is asked from the kernel on top. Both
//! directions are bounded in size and time, so that no peer can hold the daemon up. Knows nothing of what a request
//! does.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::status::ConnectionStatus;
use super::wanted::Wanted;
use crate::kubeconfig::Selectors;
use crate::report::Failure;

/// What a command asks of a daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// How are you? Makes the end-to-end probe.
    Status,
    /// End. The answer comes at once; the socket closes when the process does.
    Quit,
    /// Which variables make a program use the proxy? They may hold the proxy's password.
    Env,
    /// Carry a namespace's packets. What follows on the socket is between [`crate::run::lease`] and its like.
    Run,
    /// How do I get to your cluster? The selectors may hold a token.
    Login,
    /// Keep an intercept up. What follows on the socket is [`super::asked`]'s.
    Intercept(Box<Wanted>),
    /// End an intercept.
    Leave {
        /// Its name.
        name: String,
    },
    /// Tell me which requests are an intercept's. What follows on the socket is [`super::sightings`]'s.
    Watch {
        /// Its name.
        name: String,
    },
}

/// What it answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Status`].
    Status {
        /// What it found.
        connection: Box<ConnectionStatus>,
        /// Tells whether another `connect` asks for the same thing; see [`super::parameters`].
        digest: String,
    },
    /// To [`Request::Quit`].
    Ending,
    /// To [`Request::Env`].
    Env {
        /// Names and values, in the order to print.
        variables: Vec<(String, String)>,
    },
    /// To [`Request::Run`]: names resolve as in a pod of this namespace.
    Run {
        /// Namespace whose short names resolve; empty without Kubernetes.
        namespace: String,
        /// Cluster domain; empty without Kubernetes.
        domain: String,
    },
    /// To [`Request::Login`].
    Login {
        /// The flags that lead to the cluster, and the user.
        selectors: Box<Selectors>,
        /// The connection's namespace.
        namespace: String,
    },
    /// To [`Request::Intercept`]: it is being made.
    Intercepting,
    /// To [`Request::Watch`]: they follow.
    Watching,
    /// To [`Request::Leave`].
    Left {
        /// Whether there was one.
        found: bool,
    },
    /// It was understood and could not be done.
    Failed(Failure),
    /// It was not understood.
    Refused {
        /// Why.
        reason: String,
    },
}

/// Longest request and longest reply.
const LONGEST: u64 = 1024 * 1024;

/// How long a request may take to arrive, and a reply to be written.
const WRITTEN_WITHIN: Duration = Duration::from_secs(2);

/// How long a daemon may take to answer: the probe's 2 s and some; and where it asks the API server.
const ANSWERED_WITHIN: Duration = Duration::from_secs(4);
const DONE_WITHIN: Duration = Duration::from_secs(15);

/// Commands served at the same time; more wait.
const AT_ONCE: usize = 16;

/// Answers requests until `shutdown`, then lets those under way finish. `answer` is called once for each. The socket of
/// a [`Request::Run`], a [`Request::Intercept`] and a [`Request::Watch`] goes to `lend`, which has to end by itself at shutdown.
pub async fn serve<F, A, L, B>(
    listener: UnixListener,
    shutdown: CancellationToken,
    answer: F,
    lend: L,
) where
    F: Fn(Request) -> A + Clone + Send + 'static,
    A: Future<Output = Reply> + Send + 'static,
    L: Fn(UnixStream, Request) -> B,
    B: Future<Output = ()> + Send + 'static,
{
    let mut peers = JoinSet::new();
    let mut lent = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if peers.len() < AT_ONCE => match accepted {
                Ok((stream, _)) => { peers.spawn(one(stream, answer.clone())); }
                // Out of descriptors, say: what is open goes on, and the loop does not spin.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
            Some(served) = peers.join_next(), if !peers.is_empty() => {
                if let Ok(Ok(Some((stream, request)))) = served {
                    lent.spawn(lend(stream, request));
                }
            }
            Some(_) = lent.join_next(), if !lent.is_empty() => {}
            () = shutdown.cancelled() => break,
        }
    }
    while peers.join_next().await.is_some() {}
    while lent.join_next().await.is_some() {}
}

/// Gives the socket back if it is to be lent.
async fn one<F, A>(stream: UnixStream, answer: F) -> io::Result<Option<(UnixStream, Request)>>
where
    F: Fn(Request) -> A,
    A: Future<Output = Reply>,
{
    if stream.peer_cred()?.uid() != rustix::process::getuid().as_raw() {
        return Ok(None);
    }
    let mut stream = BufReader::new(stream);
    let request = within(WRITTEN_WITHIN, read_line::<Request>(&mut stream)).await;
    let reply = match &request {
        Ok(request) => answer(request.clone()).await,
        Err(error) => Reply::Refused {
            reason: error.to_string(),
        },
    };
    within(WRITTEN_WITHIN, write_line(&mut stream, &reply)).await?;
    if matches!(reply, Reply::Ending) {
        // The kernel closes it with the process, which is what the other side waits for.
        std::mem::forget(stream.into_inner().into_std());
        return Ok(None);
    }
    // The other side waits for the reply before it says more, so nothing is lost with the buffer.
    let is_lent = matches!(
        reply,
        Reply::Run { .. } | Reply::Intercepting | Reply::Watching
    );
    let lent = request.ok().filter(|_| is_lent);
    Ok(lent.map(|request| (stream.into_inner(), request)))
}

/// A daemon's end of the conversation, as a command holds it.
#[derive(Debug)]
pub struct Daemon {
    stream: BufReader<UnixStream>,
}

impl Daemon {
    /// Connects to the daemon behind `socket`.
    ///
    /// # Errors
    /// Nobody listens there any more, or somebody who is not this user.
    pub async fn connect(socket: &Path) -> io::Result<Self> {
        let stream = within(WRITTEN_WITHIN, UnixStream::connect(socket)).await?;
        if stream.peer_cred()?.uid() != rustix::process::getuid().as_raw() {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the control socket belongs to another user",
            ));
        }
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Asks once.
    ///
    /// # Errors
    /// The daemon has gone, or takes too long.
    pub async fn ask(&mut self, request: Request) -> io::Result<Reply> {
        let limit = match request {
            Request::Leave { .. } => DONE_WITHIN,
            Request::Status
            | Request::Quit
            | Request::Env
            | Request::Run
            | Request::Login
            | Request::Watch { .. }
            | Request::Intercept(_) => ANSWERED_WITHIN,
        };
        within(WRITTEN_WITHIN, write_line(&mut self.stream, &request)).await?;
        within(limit, read_line(&mut self.stream)).await
    }

    /// The socket itself, after a request was answered that lends it. The daemon says nothing on it until it is spoken to.
    pub fn into_stream(self) -> UnixStream {
        self.stream.into_inner()
    }

    /// The same for a request whose outcome is said later, and perhaps has been already.
    pub fn into_reader(self) -> BufReader<UnixStream> {
        self.stream
    }

    /// Waits until the daemon's process has gone, at most `limit`. Says whether it has.
    pub async fn gone(mut self, limit: Duration) -> bool {
        let mut rest = Vec::new();
        let end = self.stream.read_to_end(&mut rest);
        tokio::time::timeout(limit, end).await.is_ok()
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
    tokio::time::timeout(limit, work).await.map_err(late)?
}

/// Reads one JSON value that ends in a line break.
///
/// # Errors
/// The stream ended before, the line is too long, or it is no such value.
pub async fn read_line<T: DeserializeOwned>(
    stream: &mut (impl AsyncBufReadExt + Unpin),
) -> io::Result<T> {
    let mut line = Vec::new();
    stream.take(LONGEST).read_until(b'\n', &mut line).await?;
    if line.pop() != Some(b'\n') {
        let kind = io::ErrorKind::UnexpectedEof;
        return Err(io::Error::new(kind, "the line has no end, or is too long"));
    }
    serde_json::from_slice(&line).map_err(io::Error::from)
}

/// Writes one JSON value and a line break.
///
/// # Errors
/// The stream cannot be written.
pub async fn write_line<T: Serialize>(
    stream: &mut (impl AsyncWriteExt + Unpin),
    value: &T,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    stream.flush().await
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn socket(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("tp-control-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    async fn drop_it(_: UnixStream, _: Request) {}

    async fn env(request: Request) -> Reply {
        match request {
            Request::Env => Reply::Env {
                variables: vec![("A".into(), "b".into())],
            },
            Request::Quit => Reply::Ending,
            Request::Run => Reply::Run {
                namespace: "shop".into(),
                domain: "cluster.local".into(),
            },
            Request::Intercept(_) => Reply::Intercepting,
            Request::Status | Request::Login | Request::Watch { .. } | Request::Leave { .. } => {
                Reply::Refused {
                    reason: "no".into(),
                }
            }
        }
    }

    #[tokio::test]
    async fn a_request_is_answered() {
        let path = socket("answered");
        let listener = UnixListener::bind(&path).unwrap();
        let shutdown = CancellationToken::new();
        let server = tokio::spawn(serve(listener, shutdown.clone(), env, drop_it));

        let reply = Daemon::connect(&path)
            .await
            .unwrap()
            .ask(Request::Env)
            .await
            .unwrap();

        assert!(
            matches!(reply, Reply::Env { variables } if variables == [("A".to_owned(), "b".to_owned())])
        );
        shutdown.cancel();
        server.await.unwrap();
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test]
    async fn a_lent_socket_goes_on_after_the_reply() {
        let path = socket("lent");
        let listener = UnixListener::bind(&path).unwrap();
        let shutdown = CancellationToken::new();
        let lend = |mut stream: UnixStream, request: Request| async move {
            assert_eq!(request, Request::Run);
            assert_eq!(stream.read_u8().await.unwrap(), b'?');
            stream.write_all(b"more").await.unwrap();
        };
        let server = tokio::spawn(serve(listener, shutdown.clone(), env, lend));

        let mut daemon = Daemon::connect(&path).await.unwrap();
        let reply = daemon.ask(Request::Run).await.unwrap();
        let mut more = String::new();
        let mut stream = daemon.into_stream();
        stream.write_all(b"?").await.unwrap();
        stream.read_to_string(&mut more).await.unwrap();

        assert!(matches!(reply, Reply::Run { namespace, .. } if namespace == "shop"));
        assert_eq!(more, "more");
        shutdown.cancel();
        server.await.unwrap();
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test]
    async fn what_is_no_request_is_refused_and_the_next_one_served() {
        let path = socket("refused");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(serve(listener, CancellationToken::new(), env, drop_it));

        for garbage in [
            "\n",
            "{}\n",
            "{\"request\":\"exec\"}\n",
            "GET / HTTP/1.1\r\n\r\n",
        ] {
            let mut stream = BufReader::new(UnixStream::connect(&path).await.unwrap());
            stream.write_all(garbage.as_bytes()).await.unwrap();
            let reply: Reply = read_line(&mut stream).await.unwrap();
            assert!(matches!(reply, Reply::Refused { .. }), "{garbage:?}");
        }
        assert!(
            Daemon::connect(&path)
                .await
                .unwrap()
                .ask(Request::Env)
                .await
                .is_ok()
        );
        server.abort();
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test]
    async fn an_endless_line_is_refused_in_bounded_memory() {
        let endless = tokio::io::repeat(b'x');

        let refused = read_line::<Request>(&mut BufReader::new(endless)).await;

        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let _ = runtime.block_on(read_line::<Reply>(&mut bytes.as_slice()));
        }

        #[test]
        fn what_is_written_is_read_back(pairs in proptest::collection::vec(("\\PC*", "\\PC*"), 0..4)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let reply = Reply::Env { variables: pairs.clone() };
            let mut line = Vec::new();
            runtime.block_on(write_line(&mut line, &reply)).unwrap();
            let back: Reply = runtime.block_on(read_line(&mut line.as_slice())).unwrap();
            let same = matches!(back, Reply::Env { variables } if variables == pairs);
            prop_assert!(same);
        }
    }
}
