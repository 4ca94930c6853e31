//! The Secret that an intercept names, as far as the manager knows it: what the workstation read of it, and what agents
//! made of that.
//!
//! Pure. The manager has no right to Secrets, and asks for none: RBAC decides what the user's own identity may read.

use k8s_openapi::jiff::Timestamp;
use tp_manager_api::Intercept;
use tp_manager_api::intercept::Reason;
use tp_manager_api::tls::{Credential, Found, Handover};

use super::problem::Problem;

/// What an intercept opens TLS with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Secret {
    /// Its name.
    pub(super) name: String,
    /// What was in it.
    pub(super) credential: Credential,
}

/// What an intercept's Secret comes to; `None` where it names none. `handover` is what its workstation said last.
pub(super) fn secret(
    intercept: &Intercept,
    handover: Option<&Handover>,
    now: Timestamp,
) -> Result<Option<Secret>, Problem> {
    let spec = &intercept.spec;
    let Some(name) = &spec.tls_secret else {
        return Ok(None);
    };
    let namespace = intercept.metadata.namespace.as_deref().unwrap_or_default();
    let credential = match handover {
        None => {
            let what = format!("the workstation has not read Secret {name} yet");
            return Err(Problem::passing(Reason::Attaching, what));
        }
        Some(Handover::Trouble(trouble)) => {
            return Err(Problem::lasting(
                Reason::TlsSecret,
                trouble.what(name, namespace, &spec.user),
                trouble.cure(name, namespace, &spec.user),
            ));
        }
        Some(Handover::Credential(credential)) => credential.clone(),
    };
    if let Some(moment) = credential.is_over(now) {
        let what = match moment < now {
            true => format!("the certificate of Secret {name} has expired at {moment}"),
            false => format!("the certificate of Secret {name} holds from {moment} on only"),
        };
        let cure = "renew it; the workstation reads the Secret again within a minute";
        return Err(Problem::lasting(Reason::TlsSecret, what, cure));
    }
    let name = name.clone();
    Ok(Some(Secret { name, credential }))
}

/// What an agent found at the application of a pod.
pub(super) fn mismatch(secret: &Secret, pod: &str, port: u16, found: Found) -> Problem {
    let name = &secret.name;
    let (what, cure) = match found {
        Found::OtherCertificate => (
            format!(
                "port {port} of pod {pod} shows a certificate with another key than Secret {name}"
            ),
            "name the Secret that the application itself serves with; after a renewal it may have to load it again",
        ),
        Found::NoTls => (
            format!("port {port} of pod {pod} does not answer a TLS handshake"),
            "leave `--tls-secret` away where the application does not speak TLS itself",
        ),
        Found::AsksForCertificates => (
            format!("port {port} of pod {pod} asks its clients for certificates"),
            "nobody can show them in the clients' stead; intercept a port without",
        ),
    };
    Problem::lasting(Reason::TlsSecret, what, cure)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;
    use tp_manager_api::tls::{CredentialError, SecretTrouble};

    fn intercept(secret: Option<&str>) -> Intercept {
        let spec = serde_json::from_value(json!({
            "name": "web", "user": "ada", "session": "tp-1", "port": 443,
            "workload": { "kind": "Deployment", "name": "web" }, "tlsSecret": secret,
        }));
        let mut intercept = Intercept::new("web-1", spec.unwrap());
        intercept.metadata.namespace = Some("shop".to_owned());
        intercept
    }

    /// One that holds from 2020 to 2030.
    pub(in super::super) fn credential() -> Credential {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(["web".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2030, 1, 1);
        let certificate = params.self_signed(&key).unwrap();
        Credential::try_new(certificate.pem(), key.serialize_pem()).unwrap()
    }

    #[test]
    fn what_is_wrong_with_a_secret_is_named_with_its_cure() {
        let given = Handover::Credential(credential());
        let trouble = Handover::Trouble;
        for (handover, at, part, lasting) in [
            (None, "2025", "has not read Secret web-tls", false),
            (
                Some(trouble(SecretTrouble::Missing)),
                "2025",
                "no Secret web-tls in namespace shop",
                true,
            ),
            (
                Some(trouble(SecretTrouble::Forbidden)),
                "2025",
                "ada may not read Secret web-tls",
                true,
            ),
            (
                Some(trouble(SecretTrouble::Unusable(CredentialError::Mismatch))),
                "2025",
                "not the key",
                true,
            ),
            (
                Some(given.clone()),
                "2031",
                "expired at 2030-01-01T00:00:00Z",
                true,
            ),
            (
                Some(given.clone()),
                "2019",
                "from 2020-01-01T00:00:00Z",
                true,
            ),
        ] {
            let now = format!("{at}-06-01T00:00:00Z").parse().unwrap();
            let problem = secret(&intercept(Some("web-tls")), handover.as_ref(), now).unwrap_err();
            assert!(problem.what.contains(part), "{problem:?}");
            assert_eq!(problem.cure.is_some(), lasting, "{problem:?}");
            assert_eq!(problem.reason.is_lasting(), lasting, "{problem:?}");
        }
        let now = "2025-06-01T00:00:00Z".parse().unwrap();
        let found = secret(&intercept(Some("web-tls")), Some(&given), now).unwrap();
        assert_eq!(found.unwrap().name, "web-tls");
        // Given without being asked for, it is nothing.
        assert_eq!(secret(&intercept(None), Some(&given), now), Ok(None));
    }
}
