//! The Session object: what lets this connection's key in.
//!
//! Written with the user's own Kubernetes identity, renewed at half time, deleted at the end. Whether the object is
//! honoured is the manager's business; who may write it, the API server's. Times are the API server's: a workstation
//! with a wrong clock still writes a right expiry.
//!
//! Each object has a key of its own. Whoever reads an object learns its key's hash, and the manager believes the first
//! object that lists a hash; so a hash that others have seen never stands in a new object.

use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::authentication::v1::{SelfSubjectReview, UserInfo};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::core::Status;
use serde_json::json;
use tp_manager_api::{ClientInfo, Session, SessionSpec};
use tp_tunnel::{Identity, KeyHash};

use super::connection::Severity;
use super::login::Login;
use super::status::SessionStatus;
use super::unmet::Unmet;
use crate::kubeconfig::Cluster;
use crate::report::Failure;

/// How far ahead an expiry is written. Half of it bounds how long a daemon may be unable to renew.
const LIFETIME: SignedDuration = SignedDuration::from_mins(30);

/// Owner of the fields in the API server's books. Always the same one: the admission policy asks for that.
const FIELD_MANAGER: &str = "tp";

/// One user's Session in one namespace, from its creation to its deletion.
#[derive(Debug)]
pub struct SessionLease {
    login: Login,
    namespace: String,
    object: Mutex<Object>,
}

/// The object of the moment.
#[derive(Clone, Debug)]
struct Object {
    identity: Identity,
    written: Option<Written>,
}

/// What the API server last accepted of it.
#[derive(Clone, Copy, Debug)]
struct Written {
    expires_at: Timestamp,
    /// The API server's clock less this machine's.
    clock_offset: SignedDuration,
}

/// The writer as the API server sees it, and the server's clock.
struct Writer {
    user: UserInfo,
    clock_offset: SignedDuration,
}

impl SessionLease {
    /// A lease that is not written yet.
    pub fn new(login: Login, namespace: String) -> Self {
        Self {
            login,
            namespace,
            object: Mutex::new(Object::unwritten()),
        }
    }

    /// Its name and expiry, once it was written.
    pub fn status(&self) -> Option<SessionStatus> {
        let object = self.object();
        object.written.map(|written| SessionStatus {
            name: object.name(),
            expires_at: written.expires_at,
        })
    }

    /// What to do when the manager does not see it.
    pub fn whereabouts(&self) -> String {
        format!(
            "`kubectl -n {} get sessions.tp.dev {}` shows whether it is still there; the manager's log says why it was refused",
            self.namespace,
            self.object().name()
        )
    }

    /// Makes sure before a dial that the object is there and lives: creates it, renews it when half of its time is
    /// over, and makes another one when it expired while this machine slept. Returns the key that it lists. Cancel safe.
    ///
    /// # Errors
    /// What the API server refused. It is final when somebody deleted the object.
    pub async fn ensure(&self) -> Result<Identity, Unmet> {
        match self.object().written {
            None => self.create().await?,
            Some(written) if written.left() <= SignedDuration::ZERO => self.replace().await?,
            Some(written) if written.left() < LIFETIME / 2 => self.renew().await?,
            Some(_) => self.check().await?,
        }
        Ok(self.object().identity)
    }

    /// As [`SessionLease::ensure`], but asks nothing while more than half of its time is left.
    ///
    /// # Errors
    /// As there.
    pub async fn keep(&self) -> Result<(), Unmet> {
        match self.object().written {
            Some(written) if written.left() >= LIFETIME / 2 => Ok(()),
            _ => self.ensure().await.map(drop),
        }
    }

    /// Deletes the object. One that is gone already is as good.
    ///
    /// # Errors
    /// The API server refused, or did not answer; the object then ends by its expiry.
    pub async fn end(&self) -> Result<(), Failure> {
        let object = self.object();
        if object.written.is_none() {
            return Ok(());
        }
        let name = object.name();
        let deletion = DeleteParams::default();
        let cluster = self.login.cluster().await?;
        let api = self.api(&cluster);
        let request = api.delete(&name, &deletion);
        match cluster.in_time(answer(request)).await? {
            Answer::Given(_) | Answer::Missing(_) => {
                tracing::info!(session = name, "session deleted");
                Ok(())
            }
            Answer::Forbidden(error) => Err(error.into()),
        }
    }

    /// As if this machine had slept past its end.
    #[cfg(test)]
    pub(super) fn expire(&self) {
        if let Some(written) = &mut self.lock().written {
            written.expires_at = Timestamp::now() - SignedDuration::from_secs(1);
        }
    }

    async fn create(&self) -> Result<(), Unmet> {
        let writer = self.writer().await?;
        let expires_at = writer.now() + LIFETIME;
        let object = self.object();
        let name = object.name();
        let session = Session::new(&name, object.spec(&writer, expires_at));
        let params = PostParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PostParams::default()
        };
        let cluster = self.cluster().await?;
        let api = self.api(&cluster);
        let created = cluster.in_time(answer(api.create(&params, &session))).await;
        match created.map_err(Unmet::passing)? {
            Answer::Given(_) => {}
            Answer::Missing(status) => return Err(Unmet::passing(self.unknown(&status))),
            Answer::Forbidden(error) => return Err(Unmet::lasting(error.into())),
        }
        tracing::info!(
            session = name,
            namespace = self.namespace,
            "session created"
        );
        self.set_written(&writer, expires_at);
        Ok(())
    }

    /// The policy wants the writer's present groups, which may have changed since; so they are asked for again.
    async fn renew(&self) -> Result<(), Unmet> {
        let writer = self.writer().await?;
        let expires_at = writer.now() + LIFETIME;
        let object = self.object();
        let spec = object.spec(&writer, expires_at);
        let patch = Patch::Merge(
            json!({ "spec": { "groups": spec.groups, "expiresAt": spec.expires_at } }),
        );
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let cluster = self.cluster().await?;
        let api = self.api(&cluster);
        self.living(&cluster, api.patch(&object.name(), &params, &patch))
            .await?;
        self.set_written(&writer, expires_at);
        Ok(())
    }

    /// The expired object lets nobody in any more, and the manager removes it if this cannot; its key has been seen.
    async fn replace(&self) -> Result<(), Unmet> {
        if let Err(failure) = self.end().await {
            tracing::debug!(error = failure.one_line(), "expired session not deleted");
        }
        *self.lock() = Object::unwritten();
        self.create().await
    }

    async fn check(&self) -> Result<(), Unmet> {
        let cluster = self.cluster().await?;
        let api = self.api(&cluster);
        self.living(&cluster, api.get(&self.object().name())).await
    }

    /// What a request for the object says of its life.
    async fn living(
        &self,
        cluster: &Cluster,
        request: impl Future<Output = kube::Result<Session>>,
    ) -> Result<(), Unmet> {
        let answer = cluster.in_time(answer(request)).await;
        match answer.map_err(Unmet::passing)? {
            Answer::Given(session) if session.metadata.deletion_timestamp.is_none() => Ok(()),
            Answer::Given(_) | Answer::Missing(_) => Err(self.deleted()),
            Answer::Forbidden(error) => Err(Unmet::lasting(error.into())),
        }
    }

    /// A 404 on creation means that the namespace or the kind is missing.
    fn unknown(&self, status: &Status) -> Failure {
        if status.message.starts_with("namespaces ") {
            let failure = Failure::new(format!("there is no namespace {}", self.namespace));
            return failure.hint("choose one that exists with `-n`");
        }
        Failure::new("the cluster does not know Session objects of tp.dev").hint(
            "an administrator installs them with `tp install`; `tp connect --temporary` needs none",
        )
    }

    fn deleted(&self) -> Unmet {
        let namespace = &self.namespace;
        let name = self.object().name();
        Unmet {
            failure: Failure::new(format!(
                "the Session {name} in namespace {namespace} was deleted"
            ))
            .hint("connect again with `tp connect`, if you still may"),
            severity: Severity::Final,
        }
    }

    /// The review's creation time is the API server's now, to the second.
    async fn writer(&self) -> Result<Writer, Unmet> {
        let cluster = self.cluster().await?;
        let api: Api<SelfSubjectReview> = Api::all(cluster.client.clone());
        let (params, review) = (PostParams::default(), SelfSubjectReview::default());
        let answer = cluster.in_time(api.create(&params, &review)).await;
        let answer = answer.map_err(Unmet::passing)?;
        let server = answer.metadata.creation_timestamp.map(|Time(at)| at);
        let user = answer.status.and_then(|status| status.user_info);
        Ok(Writer {
            user: user.unwrap_or_default(),
            clock_offset: server.map_or(SignedDuration::ZERO, |at| {
                at.duration_since(Timestamp::now())
            }),
        })
    }

    async fn cluster(&self) -> Result<Cluster, Unmet> {
        self.login.cluster().await.map_err(Unmet::passing)
    }

    fn api(&self, cluster: &Cluster) -> Api<Session> {
        Api::namespaced(cluster.client.clone(), &self.namespace)
    }

    fn object(&self) -> Object {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Object> {
        self.object.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_written(&self, writer: &Writer, expires_at: Timestamp) {
        self.lock().written = Some(Written {
            expires_at,
            clock_offset: writer.clock_offset,
        });
    }
}

impl Object {
    fn unwritten() -> Self {
        Self {
            identity: Identity::generate(),
            written: None,
        }
    }

    fn name(&self) -> String {
        name_of(self.identity.key_hash())
    }

    fn spec(&self, writer: &Writer, expires_at: Timestamp) -> SessionSpec {
        SessionSpec {
            user: writer.user.username.clone().unwrap_or_default(),
            groups: writer.user.groups.clone().unwrap_or_default(),
            key_hash: self.identity.key_hash().to_string(),
            expires_at: Time(expires_at),
            client: ClientInfo {
                host: host_name(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
        }
    }
}

impl Writer {
    fn now(&self) -> Timestamp {
        Timestamp::now() + self.clock_offset
    }
}

impl Written {
    fn left(&self) -> SignedDuration {
        self.expires_at
            .duration_since(Timestamp::now() + self.clock_offset)
    }
}

/// Objects of one user never collide, and a reader of the list can tell two of them apart.
fn name_of(key_hash: KeyHash) -> String {
    let hex: String = key_hash
        .as_bytes()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("tp-{hex}")
}

pub(super) fn host_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

/// The API server's word, as far as it decides about a session's life.
enum Answer<T> {
    Given(T),
    /// 404, and what of.
    Missing(Box<Status>),
    /// 403. Another attempt would be refused likewise.
    Forbidden(kube::Error),
}

async fn answer<T>(request: impl Future<Output = kube::Result<T>>) -> kube::Result<Answer<T>> {
    match request.await {
        Ok(given) => Ok(Answer::Given(given)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(Answer::Missing(status)),
        Err(kube::Error::Api(status)) if status.code == 403 => {
            Ok(Answer::Forbidden(kube::Error::Api(status)))
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::kubeconfig::Selectors;

    #[test]
    fn a_name_is_short_and_of_the_keys_making() {
        let hash: KeyHash = format!("sha256:{}", "0123456789abcdef".repeat(4))
            .parse()
            .unwrap();

        assert_eq!(name_of(hash), "tp-0123456789abcdef");
    }

    #[test]
    fn time_left_is_counted_on_the_servers_clock() {
        let fast_by_two_hours = Written {
            expires_at: Timestamp::now() - SignedDuration::from_hours(2) + LIFETIME,
            clock_offset: SignedDuration::from_hours(-2),
        };

        let left = fast_by_two_hours.left();

        assert!(
            left > LIFETIME - SignedDuration::from_secs(5) && left <= LIFETIME,
            "{left}"
        );
    }

    /// An API server that takes every Session, and tells what it took.
    async fn api_server(sessions: Arc<Mutex<Vec<Session>>>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(answer_all(BufReader::new(stream), sessions.clone()));
            }
        });
        format!("http://{address}")
    }

    async fn answer_all(mut stream: BufReader<TcpStream>, sessions: Arc<Mutex<Vec<Session>>>) {
        loop {
            let (mut request, mut length) = (String::new(), 0);
            loop {
                let mut line = String::new();
                if stream.read_line(&mut line).await.unwrap() == 0 {
                    return;
                }
                if let Some(value) = line.strip_prefix("content-length: ") {
                    length = value.trim().parse().unwrap();
                }
                if line == "\r\n" {
                    break;
                }
                request += &line;
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await.unwrap();
            let answer = if request.contains("selfsubjectreviews") {
                json!({ "metadata": { "creationTimestamp": Timestamp::now() }, "status": { "userInfo": { "username": "ada" } } })
            } else if request.starts_with("POST") {
                let session: Session = serde_json::from_slice(&body).unwrap();
                let answer = serde_json::to_value(&session).unwrap();
                sessions.lock().unwrap().push(session);
                answer
            } else {
                json!({ "kind": "Status", "apiVersion": "v1", "status": "Success" })
            };
            let answer = answer.to_string();
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                answer.len()
            );
            let whole = head + &answer;
            stream.write_all(whole.as_bytes()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn the_object_after_an_expired_one_lists_a_key_that_nobody_has_seen() {
        let sessions = Arc::default();
        let selectors = Selectors {
            server: Some(api_server(Arc::clone(&sessions)).await),
            kubeconfig: Some("/dev/null".into()),
            ..Selectors::default()
        };
        let lease = SessionLease::new(Login::new(&selectors).await.unwrap(), "shop".into());
        let first = lease.ensure().await.unwrap();
        lease.expire();

        let second = lease.ensure().await.unwrap();

        let listed: Vec<_> = sessions
            .lock()
            .unwrap()
            .iter()
            .map(|session| session.spec.key_hash.clone())
            .collect();
        let shown = [first, second].map(|identity| identity.key_hash().to_string());
        assert_eq!(listed, shown);
        assert_ne!(shown[0], shown[1]);
    }
}
