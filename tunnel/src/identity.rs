//! Keys and pins: who a peer is, is the hash of its public key and nothing else.
//!
//! Certificates are self-signed shells that TLS demands; their names and dates are never looked at, so a wrong clock
//! changes nothing. Which hashes are welcome is decided by the callers.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use sha2::{Digest, Sha256};

/// SHA-256 of a SubjectPublicKeyInfo, written `sha256:` and 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyHash([u8; 32]);

/// A private key and its self-signed certificate. Cheap to clone; its `Debug` shows the hash only.
#[derive(Clone)]
pub struct Identity {
    certified: Arc<CertifiedKey>,
    pem: Arc<str>,
    key_hash: KeyHash,
}

/// Why a text holds no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// No private key or no certificate in it.
    #[error("not a PEM file with one private key and one certificate")]
    Pem(#[source] Option<rustls::pki_types::pem::Error>),
    /// The key is of a kind that cannot sign for TLS 1.3, or does not fit the certificate.
    #[error("the key and the certificate cannot be used together")]
    Unusable(#[source] rustls::Error),
}

/// Why a text is no key hash.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a key hash (sha256: and 64 lower-case hex digits)")]
pub struct ParseKeyHashError;

impl KeyHash {
    /// The hash of a DER-encoded SubjectPublicKeyInfo.
    pub fn of_spki(spki: &[u8]) -> Self {
        Self(Sha256::digest(spki).into())
    }

    /// The raw 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, rustls::Error> {
        let parsed = rustls::server::ParsedCertificate::try_from(certificate)?;
        Ok(Self::of_spki(&parsed.subject_public_key_info()))
    }
}

impl Identity {
    /// A new ECDSA P-256 key, the kind every TLS 1.3 client supports.
    pub fn generate() -> Self {
        Self::of(&rcgen::KeyPair::generate().expect("the system's random source works"))
    }

    fn of(key: &rcgen::KeyPair) -> Self {
        let mut params = rcgen::CertificateParams::default();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "tp");
        let certificate = params
            .self_signed(key)
            .expect("constant parameters are valid");
        let pem = format!("{}{}", key.serialize_pem(), certificate.pem());
        Self::from_pem(&pem).expect("what was just generated is valid")
    }

    /// The Ed25519 key that these 64 hexadecimal digits stand for (RFC 8032 §5.1.5): who knows the seed knows the key.
    pub fn from_seed(seed: &str) -> Result<Self, IdentityError> {
        let hash: KeyHash = format!("{PREFIX}{seed}")
            .parse()
            .map_err(|_| IdentityError::Pem(None))?;
        // PKCS#8 around a bare seed (RFC 8410 §7).
        const WRAPPING: [u8; 16] = [
            0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20,
        ];
        let der = [&WRAPPING[..], hash.as_bytes()].concat();
        let key = rcgen::KeyPair::try_from(der).map_err(|_| IdentityError::Pem(None))?;
        Ok(Self::of(&key))
    }

    /// Reads the private key and the certificate that [`Identity::to_pem`] wrote; `openssl` writes such files too.
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        let key = PrivateKeyDer::from_pem_slice(pem.as_bytes())
            .map_err(|e| IdentityError::Pem(Some(e)))?;
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|e| IdentityError::Pem(Some(e)))?;
        let key_hash = KeyHash::of_certificate(&certificate).map_err(IdentityError::Unusable)?;
        let provider = rustls::crypto::ring::default_provider();
        let certified = CertifiedKey::from_der(vec![certificate], key, &provider)
            .map_err(IdentityError::Unusable)?;
        Ok(Self {
            certified: Arc::new(certified),
            pem: pem.into(),
            key_hash,
        })
    }

    /// PKCS#8 private key and certificate, as PEM. Secret: store it 0600.
    pub fn to_pem(&self) -> String {
        self.pem.to_string()
    }

    /// The hash that others list or pin.
    pub fn key_hash(&self) -> KeyHash {
        self.key_hash
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.key_hash).finish()
    }
}

const PREFIX: &str = "sha256:";

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeyHash {
    type Err = ParseKeyHashError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hex = text
            .strip_prefix(PREFIX)
            .ok_or(ParseKeyHashError)?
            .as_bytes();
        let mut hash = [0; 32];
        if hex.len() != 2 * hash.len() {
            return Err(ParseKeyHashError);
        }
        for (byte, pair) in hash.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Ok(Self(hash))
    }
}

/// Lower case only, so that equal hashes are equal texts.
fn digit(c: u8) -> Result<u8, ParseKeyHashError> {
    match c {
        b'0'..=b'9' => Ok(c - b'0'),
        b'a'..=b'f' => Ok(c - b'a' + 10),
        _ => Err(ParseKeyHashError),
    }
}

impl serde::Serialize for KeyHash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for KeyHash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_survives_its_pem() {
        let identity = Identity::generate();
        let read = Identity::from_pem(&identity.to_pem()).unwrap();
        assert_eq!(read.key_hash(), identity.key_hash());
        assert_ne!(Identity::generate().key_hash(), identity.key_hash());
    }

    #[test]
    fn a_seed_is_one_key_everywhere() {
        let seed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
        let hash = Identity::from_seed(seed).unwrap().key_hash();
        assert_eq!(hash, Identity::from_seed(seed).unwrap().key_hash());
        // RFC 8032 §7.1 has the public key of this seed; this is the hash of it as SubjectPublicKeyInfo.
        assert_eq!(
            hash.to_string(),
            "sha256:06e3fd8fda29bb60ab59557de61edb0aecdb231134be30e75b455f8e1b792fa9"
        );
        for bad in ["", &seed[1..], &seed.to_uppercase()] {
            assert!(Identity::from_seed(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let (a, b) = (Identity::generate().to_pem(), Identity::generate().to_pem());
        let mixed = format!(
            "{}{}",
            &a[..a.find("-----BEGIN CERT").unwrap()],
            &b[b.find("-----BEGIN CERT").unwrap()..]
        );
        assert!(matches!(
            Identity::from_pem(&mixed),
            Err(IdentityError::Unusable(_))
        ));
        assert!(matches!(
            Identity::from_pem("nothing"),
            Err(IdentityError::Pem(_))
        ));
    }

    #[test]
    fn a_hash_round_trips_and_bad_texts_are_refused() {
        let hash = Identity::generate().key_hash();
        let text = hash.to_string();
        assert_eq!(text.parse(), Ok(hash));
        assert_eq!(text.len(), 7 + 64);
        for bad in [
            &text[..70],
            &text.to_uppercase(),
            &text.replace("sha256", "sha1"),
            &format!("{text}0"),
            "",
        ] {
            assert!(bad.parse::<KeyHash>().is_err(), "{bad:?} was accepted");
        }
    }
}
