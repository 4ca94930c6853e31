//! TLS 1.3 with both keys pinned, anew for every carrier.
//!
//! Trust is the hash of the peer's public key: the client refuses any server key but the one it was told, in the
//! handshake; the server takes any key whose owner signed the handshake and reports its hash, because whether that key
//! is listed may need a moment to find out. No resumption and no early data, so nothing of one carrier helps to forge
//! another.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig,
    SignatureScheme,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::carrier::ReadAhead;
use crate::identity::{Identity, KeyHash};

/// The client's end, ready for HTTP/2.
pub type ClientTls<IO> = tokio_rustls::client::TlsStream<IO>;

/// The server's end, ready for HTTP/2.
pub type ServerTls<IO> = tokio_rustls::server::TlsStream<ReadAhead<IO>>;

/// What may run inside a carrier, chosen by ALPN on one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2 as any client speaks it.
    Http2,
    /// Resume records, then HTTP/2. Not offered yet.
    Resume,
}

impl Protocol {
    const OFFERED: [Self; 1] = [Self::Http2];

    /// The ALPN name.
    pub fn alpn(self) -> &'static [u8] {
        match self {
            Self::Http2 => b"h2",
            Self::Resume => b"tp/1",
        }
    }
}

/// Why a carrier could not be secured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The server's key is not the pinned one.
    #[error("the manager presented the key {found}, not the pinned {pinned}")]
    WrongKey {
        /// What was expected.
        pinned: KeyHash,
        /// What came.
        found: KeyHash,
    },
    /// The handshake failed; a peer without a key or without a common protocol ends here too.
    #[error("the TLS handshake failed")]
    Handshake(#[source] io::Error),
    /// The handshake did not finish in time.
    #[error("the TLS handshake did not finish within {0:?}")]
    TimedOut(Duration),
    /// The peer chose no protocol, or one that was not offered.
    #[error("the peer does not speak h2 inside TLS")]
    NoProtocol,
}

/// Secures a carrier from the client's side. Fails before any HTTP byte when the server's key is not `manager`.
///
/// rustls reads in small pieces: a carrier to which each read is a system call is to be wrapped in a [`ReadAhead`].
///
/// Cancel safe in the sense that dropping it drops the carrier.
pub async fn connect_tls<IO>(
    io: IO,
    me: &Identity,
    manager: &KeyHash,
) -> Result<ClientTls<IO>, TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let name = ServerName::try_from("manager.tp.dev").expect("a constant, valid name");
    let connector = TlsConnector::from(Arc::new(client_config(me, *manager)));
    let stream = within(connector.connect(name, io))
        .await?
        .map_err(|error| handshake_error(error, *manager))?;
    check_protocol(stream.get_ref().1.alpn_protocol())?;
    Ok(stream)
}

/// Secures a carrier from the server's side and says whose it is. The caller decides on the hash before it reads.
///
/// Cancel safe in the sense that dropping it drops the carrier.
pub async fn accept_tls<IO>(io: IO, me: &Identity) -> Result<(ServerTls<IO>, KeyHash), TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let acceptor = TlsAcceptor::from(Arc::new(server_config(me)));
    let stream = within(acceptor.accept(ReadAhead::new(io)))
        .await?
        .map_err(TlsError::Handshake)?;
    check_protocol(stream.get_ref().1.alpn_protocol())?;
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(<[_]>::first);
    let key_hash = certificate
        .map(KeyHash::of_certificate)
        .transpose()
        .map_err(io::Error::other);
    let key_hash = key_hash
        .map_err(TlsError::Handshake)?
        .expect("client authentication is mandatory");
    Ok((stream, key_hash))
}

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

async fn within<F: Future>(handshake: F) -> Result<F::Output, TlsError> {
    tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake)
        .await
        .map_err(|_| TlsError::TimedOut(HANDSHAKE_TIMEOUT))
}

fn check_protocol(chosen: Option<&[u8]>) -> Result<(), TlsError> {
    match Protocol::OFFERED
        .iter()
        .any(|protocol| Some(protocol.alpn()) == chosen)
    {
        true => Ok(()),
        false => Err(TlsError::NoProtocol),
    }
}

/// Finds our own verifier's refusal inside what rustls reports.
fn handshake_error(error: io::Error, pinned: KeyHash) -> TlsError {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    if let Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) = inner
        && let Some(WrongKey(found)) = other.0.downcast_ref::<WrongKey>()
    {
        return TlsError::WrongKey {
            pinned,
            found: *found,
        };
    }
    TlsError::Handshake(error)
}

fn client_config(me: &Identity, pinned: KeyHash) -> ClientConfig {
    let verifier = Arc::new(PinnedServer {
        pinned,
        algorithms: algorithms(),
    });
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring supports TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(me.certified())));
    config.alpn_protocols = Protocol::OFFERED
        .map(|protocol| protocol.alpn().to_vec())
        .to_vec();
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    config
}

fn server_config(me: &Identity) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring supports TLS 1.3")
        .with_client_cert_verifier(Arc::new(AnyClientKey {
            algorithms: algorithms(),
        }))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(me.certified())));
    config.alpn_protocols = Protocol::OFFERED
        .map(|protocol| protocol.alpn().to_vec())
        .to_vec();
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    ring::default_provider().signature_verification_algorithms
}

#[derive(Debug, thiserror::Error)]
#[error("the server's key is not the pinned one")]
struct WrongKey(KeyHash);

/// Compares the key, then lets rustls check that the peer holds it (CertificateVerify). Dates and names are ignored.
#[derive(Debug)]
struct PinnedServer {
    pinned: KeyHash,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let found = KeyHash::of_certificate(end_entity)?;
        if found != self.pinned {
            let other = rustls::OtherError(Arc::new(WrongKey(found)));
            return Err(rustls::Error::InvalidCertificate(CertificateError::Other(
                other,
            )));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12_refused())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Takes every well-formed certificate whose key signed the handshake; a client without one is refused.
#[derive(Debug)]
struct AnyClientKey {
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for AnyClientKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        KeyHash::of_certificate(end_entity).map(|_| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12_refused())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn tls12_refused() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken here".into())
}
