//! The certificate and private key with which an agent stands in for an application that speaks TLS.
//!
//! They come from a Secret that the user named, and travel where this says and nowhere else: the workstation reads the
//! Secret with its user's own identity, hands it to the replica that holds its Session (`PUT` of a [`Handover`] to
//! [`handover_path`]), and that replica to the agents whose routes name it (`PUT` of a [`Credential`] to
//! [`CREDENTIALS_PATH`]). All of them keep it in memory, for as long as the intercept; it is never in an object, a log or
//! a file. A route names it by its [`Credential::id`].

mod certificate;

use std::fmt;
use std::sync::Arc;

use jiff::Timestamp;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::Zeroize;

/// `PUT` of a [`Credential`] to an agent; the table that is pushed next may name it, and the first one that does not
/// makes the agent forget it. The answer is 204, or 400 with one line of why.
pub const CREDENTIALS_PATH: &str = "/v1/credentials";

/// `GET` asks an agent for [`Findings`].
pub const FINDINGS_PATH: &str = "/v1/tls";

/// Bytes of certificates and key together, as PEM. A chain of four with the largest RSA keys is a third of it.
pub const PEM_MAX: usize = 40 * 1024;

/// Path on the tunnel's control resource where the workstation says what it found in the Secret of an intercept, by its uid:
/// `PUT` of a [`Handover`], answered with 204. It holds for as long as the workstation is connected; a later one replaces it.
pub fn handover_path(intercept: &str) -> String {
    format!("{HANDOVER_PREFIX}{intercept}{HANDOVER_SUFFIX}")
}

/// The uid in such a path.
pub fn handover_of(path: &str) -> Option<&str> {
    let uid = path
        .strip_prefix(HANDOVER_PREFIX)?
        .strip_suffix(HANDOVER_SUFFIX)?;
    crate::route_table::is_uid(uid).then_some(uid)
}

const HANDOVER_PREFIX: &str = "/v1/intercepts/";
const HANDOVER_SUFFIX: &str = "/tls";

/// What the workstation found in the Secret.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Handover {
    /// This.
    Credential(Credential),
    /// Nothing that can be used.
    Trouble(SecretTrouble),
}

/// What is wrong with a Secret. A fixed vocabulary, since what a workstation says of it ends up in a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum SecretTrouble {
    /// There is none of that name.
    Missing,
    /// The user may not read it.
    Forbidden,
    /// It has no `tls.crt` or no `tls.key`.
    Incomplete,
    /// It has both, and they cannot be used.
    Unusable(CredentialError),
}

/// What makes PEM texts unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, thiserror::Error)]
#[serde(rename_all = "camelCase")]
pub enum CredentialError {
    /// No certificate in PEM, or one that is none.
    #[error("tls.crt holds no certificate")]
    Certificate,
    /// No private key in PEM, or of a kind that cannot sign.
    #[error("tls.key holds no private key that can be used")]
    Key,
    /// They are not of each other.
    #[error("tls.key is not the key of the certificate in tls.crt")]
    Mismatch,
    /// More than [`PEM_MAX`].
    #[error("tls.crt and tls.key are larger than {} KiB", PEM_MAX / 1024)]
    TooLarge,
}

impl SecretTrouble {
    /// What is wrong, of this Secret.
    pub fn what(self, secret: &str, namespace: &str, user: &str) -> String {
        match self {
            Self::Missing => format!("there is no Secret {secret} in namespace {namespace}"),
            Self::Forbidden => {
                format!("{user} may not read Secret {secret} of namespace {namespace}")
            }
            Self::Incomplete => format!("Secret {secret} has no tls.crt and tls.key"),
            Self::Unusable(error) => format!("Secret {secret} cannot be used: {error}"),
        }
    }

    /// What to do about it.
    pub fn cure(self, secret: &str, namespace: &str, user: &str) -> String {
        match self {
            Self::Missing => {
                format!("`kubectl get secrets -n {namespace} --field-selector type=kubernetes.io/tls` lists those that there are")
            }
            Self::Forbidden => format!(
                "an administrator grants `get` on it: `kubectl create role {secret}-reader -n {namespace} --verb=get --resource=secrets \
                 --resource-name={secret}`, and a RoleBinding of that to {user}"
            ),
            Self::Incomplete | Self::Unusable(_) => {
                "name the Secret, of type kubernetes.io/tls, that the application itself serves with".to_owned()
            }
        }
    }
}

/// A certificate chain and its private key, checked to be of each other. Clones share it; the last one overwrites the key's
/// text. Its `Debug` shows what everybody may know.
#[derive(Clone)]
pub struct Credential(Arc<Inner>);

struct Inner {
    pem: Pem,
    id: String,
    certified: Arc<CertifiedKey>,
    public_key: PublicKey,
    holds: (Timestamp, Timestamp),
    names: Vec<String>,
}

/// As it travels.
#[derive(Deserialize, Serialize)]
struct Pem {
    certificate: Hidden,
    key: Hidden,
}

#[derive(Deserialize, Serialize)]
#[serde(transparent)]
struct Hidden(String);

impl Drop for Hidden {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// SHA-256 of a SubjectPublicKeyInfo: by this an application is known, whatever certificate it shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// That of a certificate, if it is one.
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let parsed = ParsedCertificate::try_from(certificate).ok()?;
        let spki = parsed.subject_public_key_info();
        Some(Self(Sha256::digest(spki.as_ref()).into()))
    }
}

impl Credential {
    /// Checks them against each other. Dates are not looked at: see [`Credential::is_over`].
    ///
    /// # Errors
    /// They cannot serve a handshake.
    pub fn try_new(certificate: String, key: String) -> Result<Self, CredentialError> {
        Self::of(Pem {
            certificate: Hidden(certificate),
            key: Hidden(key),
        })
    }

    fn of(pem: Pem) -> Result<Self, CredentialError> {
        if pem.certificate.0.len() + pem.key.0.len() > PEM_MAX {
            return Err(CredentialError::TooLarge);
        }
        let chain: Vec<_> = CertificateDer::pem_slice_iter(pem.certificate.0.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|_| CredentialError::Certificate)?;
        let leaf = chain.first().ok_or(CredentialError::Certificate)?;
        let public_key = PublicKey::of(leaf).ok_or(CredentialError::Certificate)?;
        let holds = certificate::validity(leaf).ok_or(CredentialError::Certificate)?;
        let names = certificate::names(leaf);
        let mut id = Sha256::new();
        chain.iter().for_each(|certificate| id.update(certificate));
        let id = id.finalize();
        let id = id.iter().map(|byte| format!("{byte:02x}")).collect();
        let key = PrivateKeyDer::from_pem_slice(pem.key.0.as_bytes())
            .map_err(|_| CredentialError::Key)?;
        let provider = rustls::crypto::ring::default_provider();
        let certified = CertifiedKey::from_der(chain, key, &provider);
        let certified = certified.map_err(|error| {
            match matches!(error, rustls::Error::InconsistentKeys(_)) {
                true => CredentialError::Mismatch,
                false => CredentialError::Key,
            }
        })?;
        Ok(Self(Arc::new(Inner {
            pem,
            id,
            certified: Arc::new(certified),
            public_key,
            holds,
            names,
        })))
    }

    /// By which a route names it: the SHA-256 of its certificates, 64 hexadecimal digits.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// For a handshake.
    pub fn certified(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.certified)
    }

    /// By which its application is known.
    pub fn public_key(&self) -> PublicKey {
        self.0.public_key
    }

    /// The first of its DNS names that one host can have.
    pub fn host(&self) -> Option<&str> {
        let mut names = self.0.names.iter();
        names.find(|name| !name.contains('*')).map(String::as_str)
    }

    /// Since when it does not hold any more, or from when on it will; `None` while it does.
    pub fn is_over(&self, now: Timestamp) -> Option<Timestamp> {
        let (begin, end) = self.0.holds;
        match (now < begin, now > end) {
            (true, _) => Some(begin),
            (_, true) => Some(end),
            (false, false) => None,
        }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Credential").field(&self.0.id).finish()
    }
}

/// Of the same certificates; the key follows from them.
impl PartialEq for Credential {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}

impl Eq for Credential {}

impl Serialize for Credential {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.pem.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Credential {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::of(Pem::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// What an agent found when it greeted the applications whose TLS it is to speak.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Findings {
    /// The ports where something is wrong.
    pub ports: Vec<Finding>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Finding {
    /// The intercept that names the Secret.
    pub intercept: String,
    /// What is wrong.
    pub found: Found,
}

/// Why connections to a port pass unparsed although a route names a credential for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Found {
    /// The application shows a certificate with another key.
    OtherCertificate,
    /// It does not speak TLS.
    NoTls,
    /// It asks its clients for certificates, which nobody can show in their stead.
    AsksForCertificates,
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    fn pair(until: i32) -> (String, String) {
        let mut params = CertificateParams::new(["*.shop".to_owned(), "web".to_owned()]).unwrap();
        params.not_after = date_time_ymd(until, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    #[test]
    fn a_credential_travels_whole_and_shows_nothing() {
        let (certificate, key) = pair(2040);
        let credential = Credential::try_new(certificate, key.clone()).unwrap();
        let handover = Handover::Credential(credential.clone());

        let text = serde_json::to_string(&handover).unwrap();
        let again = serde_json::from_str(&text).unwrap();

        let Handover::Credential(again) = again else {
            panic!("{again:?}");
        };
        assert_eq!(again, credential);
        assert_eq!(again.public_key(), credential.public_key());
        assert_eq!(again.host(), Some("web"));
        let shown = format!("{credential:?} {handover:?}");
        assert!(!shown.contains("PRIVATE") && !shown.contains(&key[40..80]));
    }

    #[test]
    fn what_cannot_serve_a_handshake_says_why() {
        let ((certificate, key), (_, other)) = (pair(2040), pair(2040));
        let error = |certificate: &str, key: &str| {
            let made = Credential::try_new(certificate.to_owned(), key.to_owned());
            made.unwrap_err()
        };
        assert_eq!(error(&certificate, &other), CredentialError::Mismatch);
        assert_eq!(error(&key, &key), CredentialError::Certificate);
        assert_eq!(error("", &key), CredentialError::Certificate);
        assert_eq!(error(&certificate, &certificate), CredentialError::Key);
        let large = certificate.repeat(200);
        assert_eq!(error(&large, &key), CredentialError::TooLarge);
    }

    #[test]
    fn a_certificate_holds_between_its_dates() {
        let (certificate, key) = pair(2030);
        let credential = Credential::try_new(certificate, key).unwrap();
        let at = |text: &str| credential.is_over(text.parse().unwrap());
        assert_eq!(at("2029-12-31T00:00:00Z"), None);
        let over = at("2030-01-02T00:00:00Z").unwrap();
        assert_eq!(over.to_string(), "2030-01-01T00:00:00Z");
        assert!(at("1960-01-01T00:00:00Z").is_some());
    }

    #[test]
    fn a_handover_is_for_one_uid() {
        assert_eq!(handover_of(&handover_path("u-1")), Some("u-1"));
        for path in [
            "/v1/intercepts//tls",
            "/v1/intercepts/a/b/tls",
            "/v1/health",
        ] {
            assert_eq!(handover_of(path), None, "{path}");
        }
    }
}
