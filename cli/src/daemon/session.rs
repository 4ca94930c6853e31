//! The Session object: what lets this connection's key in.
//!
//! Written with the user's own Kubernetes identity, renewed at half time, deleted at the end. Whether the object is
//! honoured is the manager's business; who may write it, the API server's. Times are the API server's: a workstation
//! with a wrong clock still writes a right expiry.

use std::sync::{Mutex, PoisonError};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::authentication::v1::{SelfSubjectReview, UserInfo};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::core::Status;
use serde_json::json;
use tp_manager_api::{ClientInfo, Session, SessionSpec};
use tp_tunnel::KeyHash;

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

/// One Session, from its creation to its deletion.
#[derive(Debug)]
pub struct SessionLease {
    login: Login,
    namespace: String,
    key_hash: KeyHash,
    name: String,
    written: Mutex<Option<Written>>,
}

/// What the API server last accepted.
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
    /// A lease that is not written yet. The key makes its name unique.
    pub fn new(login: Login, namespace: String, key_hash: KeyHash) -> Self {
        let name = name_of(key_hash);
        Self {
            login,
            namespace,
            key_hash,
            name,
            written: Mutex::new(None),
        }
    }

    /// Its name and expiry, once it was written.
    pub fn status(&self) -> Option<SessionStatus> {
        self.written().map(|written| SessionStatus {
            name: self.name.clone(),
            expires_at: written.expires_at,
        })
    }

    /// What to do when the manager does not see it.
    pub fn whereabouts(&self) -> String {
        format!(
            "`kubectl -n {} get sessions.tp.dev {}` shows whether it is still there; the manager's log says why it was refused",
            self.namespace, self.name
        )
    }

    /// Makes sure before a dial that the object is there and lives: creates it, renews it when half of its time is
    /// over, and makes it anew when it expired while this machine slept. Cancel safe.
    ///
    /// # Errors
    /// What the API server refused. It is final when somebody deleted the object.
    pub async fn ensure(&self) -> Result<(), Unmet> {
        match self.written() {
            None => self.create().await,
            Some(written) if written.left() <= SignedDuration::ZERO => self.replace().await,
            Some(written) if written.left() < LIFETIME / 2 => self.renew().await,
            Some(_) => self.check().await,
        }
    }

    /// As [`SessionLease::ensure`], but asks nothing while more than half of its time is left.
    ///
    /// # Errors
    /// As there.
    pub async fn keep(&self) -> Result<(), Unmet> {
        match self.written() {
            Some(written) if written.left() >= LIFETIME / 2 => Ok(()),
            _ => self.ensure().await,
        }
    }

    /// Deletes the object. One that is gone already is as good.
    ///
    /// # Errors
    /// The API server refused, or did not answer; the object then ends by its expiry.
    pub async fn end(&self) -> Result<(), Failure> {
        if self.written().is_none() {
            return Ok(());
        }
        let deletion = DeleteParams::default();
        let cluster = self.login.cluster().await?;
        let api = self.api(&cluster);
        let request = api.delete(&self.name, &deletion);
        match cluster.in_time(answer(request)).await? {
            Answer::Given(_) | Answer::Missing(_) => {
                tracing::info!(session = self.name, "session deleted");
                Ok(())
            }
            Answer::Forbidden(error) => Err(error.into()),
        }
    }

    async fn create(&self) -> Result<(), Unmet> {
        let writer = self.writer().await?;
        let expires_at = writer.now() + LIFETIME;
        let session = Session::new(&self.name, self.spec(&writer, expires_at));
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
            session = self.name,
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
        let spec = self.spec(&writer, expires_at);
        let patch = Patch::Merge(
            json!({ "spec": { "groups": spec.groups, "expiresAt": spec.expires_at } }),
        );
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let cluster = self.cluster().await?;
        let api = self.api(&cluster);
        self.living(&cluster, api.patch(&self.name, &params, &patch))
            .await?;
        self.set_written(&writer, expires_at);
        Ok(())
    }

    /// An expired object may be gone or not; the manager removes it at its leisure.
    async fn replace(&self) -> Result<(), Unmet> {
        self.end().await.map_err(Unmet::passing)?;
        self.create().await
    }

    async fn check(&self) -> Result<(), Unmet> {
        let cluster = self.cluster().await?;
        let api = self.api(&cluster);
        self.living(&cluster, api.get(&self.name)).await
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
        let Self {
            name, namespace, ..
        } = self;
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

    fn spec(&self, writer: &Writer, expires_at: Timestamp) -> SessionSpec {
        SessionSpec {
            user: writer.user.username.clone().unwrap_or_default(),
            groups: writer.user.groups.clone().unwrap_or_default(),
            key_hash: self.key_hash.to_string(),
            expires_at: Time(expires_at),
            client: ClientInfo {
                host: host_name(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
        }
    }

    async fn cluster(&self) -> Result<Cluster, Unmet> {
        self.login.cluster().await.map_err(Unmet::passing)
    }

    fn api(&self, cluster: &Cluster) -> Api<Session> {
        Api::namespaced(cluster.client.clone(), &self.namespace)
    }

    fn written(&self) -> Option<Written> {
        *self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_written(&self, writer: &Writer, expires_at: Timestamp) {
        let clock_offset = writer.clock_offset;
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        *written = Some(Written {
            expires_at,
            clock_offset,
        });
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

fn host_name() -> String {
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
    use super::*;

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
}
