//! Secrets that intercepts name: read with the user's own identity, and handed to the manager through the tunnel.
//!
//! A certificate and its key are handed over when an intercept is made, when a tunnel has come up (the manager keeps them
//! in memory only, and for as long as the workstation is there), and whenever the Secret was found changed: it is read
//! again every minute. A Secret that is gone, or may not be read any more, ends its use. Nothing of it is kept here.

use std::time::Duration;

use http::{Method, StatusCode};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use tokio::sync::watch;
use tp_manager_api::tls::{Credential, CredentialError, Handover, SecretTrouble, handover_path};
use tp_tunnel::Tunnel;
use zeroize::Zeroize;

use super::intercepts::Intercepts;
use crate::kubeconfig::Cluster;
use crate::report::{Failure, status_of};

/// How often a Secret is read again.
const REREAD: Duration = Duration::from_secs(60);

/// After something went wrong on the way.
const AGAIN: Duration = Duration::from_secs(1);

/// How long the manager may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

/// Keys of a Secret of type `kubernetes.io/tls`.
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";

/// Whether a Secret can be used.
///
/// # Errors
/// Why not, and what to do about it.
pub(super) async fn check(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    user: &str,
) -> Result<(), Failure> {
    match read(cluster, namespace, name).await? {
        Handover::Credential(_) => Ok(()),
        Handover::Trouble(trouble) => Err(Failure::new("TLS cannot be opened")
            .because(trouble.what(name, namespace, user))
            .hint(trouble.cure(name, namespace, user))),
    }
}

/// Keeps the manager told for as long as it is polled.
pub(super) async fn hand_over(
    mut tunnel: watch::Receiver<Option<Tunnel>>,
    intercepts: &Intercepts,
) {
    let mut count = intercepts.count();
    loop {
        count.borrow_and_update();
        let up = tunnel.borrow_and_update().clone();
        let secrets = intercepts.tls_secrets();
        let pause = match (up, secrets.is_empty()) {
            (Some(up), false) => match tell_all(intercepts, &up, secrets).await {
                Ok(()) => REREAD,
                Err(failure) => {
                    tracing::warn!(error = failure.one_line(), "Secrets not handed over");
                    AGAIN
                }
            },
            (Some(_) | None, _) => Duration::MAX,
        };
        tokio::select! {
            changed = tunnel.changed() => if changed.is_err() {
                return;
            },
            changed = count.changed() => if changed.is_err() {
                return;
            },
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn tell_all(
    intercepts: &Intercepts,
    tunnel: &Tunnel,
    secrets: Vec<(Option<String>, String)>,
) -> Result<(), Failure> {
    let (cluster, namespace) = intercepts.place().await?;
    for (uid, secret) in secrets {
        let uid = uid.ok_or_else(|| Failure::new("an intercept is being made anew"))?;
        let handover = read(&cluster, &namespace, &secret).await?;
        tell(tunnel, &uid, &handover).await?;
    }
    Ok(())
}

async fn tell(tunnel: &Tunnel, uid: &str, handover: &Handover) -> Result<(), Failure> {
    let body = serde_json::to_vec(handover).expect("texts are always JSON");
    let path = handover_path(uid);
    let asked = tunnel.control(Method::PUT, &path, body.into());
    let answer = tokio::time::timeout(ANSWER, asked).await;
    let answer = answer.map_err(|_| Failure::new("the manager does not answer"))?;
    let answer = answer.map_err(|error| Failure::new("the tunnel failed").caused_by(&error))?;
    match answer.status() {
        StatusCode::NO_CONTENT => Ok(()),
        // It does not get better by itself.
        status => {
            tracing::warn!(%status, "the manager does not take a certificate");
            Ok(())
        }
    }
}

/// What a Secret holds.
async fn read(cluster: &Cluster, namespace: &str, name: &str) -> Result<Handover, Failure> {
    let api: Api<Secret> = Api::namespaced(cluster.client.clone(), namespace);
    let asked = async { Ok(api.get_opt(name).await) };
    let trouble = |trouble| Ok(Handover::Trouble(trouble));
    let secret = match cluster.in_time(asked).await? {
        Ok(Some(secret)) => secret,
        Ok(None) => return trouble(SecretTrouble::Missing),
        Err(error) if status_of(&error) == Some(403) => return trouble(SecretTrouble::Forbidden),
        Err(error) => return Err(error.into()),
    };
    let mut data = secret.data.unwrap_or_default();
    let (certificate, key) = (data.remove(CERTIFICATE), data.remove(KEY));
    data.values_mut().for_each(|other| other.0.zeroize());
    let (Some(certificate), Some(key)) = (certificate, key) else {
        return trouble(SecretTrouble::Incomplete);
    };
    match credential(certificate, key) {
        Ok(credential) => Ok(Handover::Credential(credential)),
        Err(error) => trouble(SecretTrouble::Unusable(error)),
    }
}

fn credential(certificate: ByteString, key: ByteString) -> Result<Credential, CredentialError> {
    let certificate = String::from_utf8(certificate.0).map_err(|_| CredentialError::Certificate)?;
    let key = String::from_utf8(key.0).map_err(|_| CredentialError::Key)?;
    Credential::try_new(certificate, key)
}
