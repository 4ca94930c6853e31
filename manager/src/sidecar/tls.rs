//! The webhook's certificate, looked at again with every connection: a new one needs no restart.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

/// `tls.crt` and `tls.key` of one folder.
pub(super) struct Certificates {
    folder: PathBuf,
    last: Mutex<Option<Loaded>>,
}

struct Loaded {
    files: Files,
    acceptor: TlsAcceptor,
}

#[derive(PartialEq, Eq)]
struct Files {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Certificates {
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            last: Mutex::new(None),
        }
    }

    /// Of what the files hold now.
    ///
    /// # Errors
    /// One cannot be read, or the two do not fit each other.
    pub(super) fn acceptor(&self) -> Result<TlsAcceptor> {
        let files = self.read()?;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = last.as_ref().filter(|loaded| loaded.files == files) {
            return Ok(loaded.acceptor.clone());
        }
        let acceptor = acceptor(&files)?;
        *last = Some(Loaded {
            files,
            acceptor: acceptor.clone(),
        });
        Ok(acceptor)
    }

    fn read(&self) -> Result<Files> {
        let read = |name: &str| {
            let path = self.folder.join(name);
            std::fs::read(&path).with_context(|| format!("cannot read {path:?}"))
        };
        Ok(Files {
            certificate: read("tls.crt")?,
            key: read("tls.key")?,
        })
    }
}

fn acceptor(files: &Files) -> Result<TlsAcceptor> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&files.certificate).collect();
    let key = PrivateKeyDer::from_pem_slice(&files.key).context("tls.key is no private key")?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("ring has TLS 1.3")?
        .with_no_client_auth()
        .with_single_cert(chain.context("tls.crt is no certificate")?, key)
        .context("tls.crt and tls.key cannot be used together")?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tp_tunnel::Identity;

    fn write(folder: &Path, identity: &Identity) {
        for name in ["tls.crt", "tls.key"] {
            std::fs::write(folder.join(name), identity.to_pem()).unwrap();
        }
    }

    #[test]
    fn a_new_certificate_is_served_without_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let certificates = Certificates::new(folder.path());
        assert!(certificates.acceptor().is_err());
        let config = || Arc::clone(certificates.acceptor().unwrap().config());

        write(folder.path(), &Identity::generate());
        let first = config();
        assert!(
            Arc::ptr_eq(&first, &config()),
            "unchanged files are not parsed again"
        );
        write(folder.path(), &Identity::generate());
        assert!(!Arc::ptr_eq(&first, &config()));
        std::fs::write(folder.path().join("tls.key"), Identity::generate().to_pem()).unwrap();
        assert!(certificates.acceptor().is_err(), "they do not fit");
    }
}
