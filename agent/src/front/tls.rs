//! TLS in the application's stead, with the key of the Secret that an intercept names.
//!
//! The application is greeted first, with the name and the protocols of the client's own ClientHello, and what it answers
//! decides: which key it shows, so that the client is shown a certificate of that key and no other, and which protocol it
//! speaks (ALPN; of what we parse, where the client offers any of that), so that the client is offered that one and bytes
//! need no translation. It is known by its key alone: the connection does not leave the pod, so names and dates of its
//! certificate say nothing more.
//!
//! A connection that the agent cannot stand in for passes unparsed: the application shows a key that no intercept of the
//! port named, does not speak TLS, or asks for the client's certificate. Where it is down, the oldest intercept's
//! certificate is shown.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use futures::future::join_all;
use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{Acceptor, NoServerSessionStorage};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, ServerConfig, SignatureScheme,
};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use tp_manager_api::tls::{Credential, Finding, Findings, Found, PublicKey};
use tp_tunnel::Workstation;

use super::{Place, Shared};
use crate::book::{Live, Port};
use crate::socket::{Raw, Socket, Tls};
use crate::upstream::{Dialing, dial};

/// What one connection is charged for both of its handshakes and what rustls holds afterwards: on each side what waits to be
/// written, a record that is not complete, and the certificates.
pub(super) const CHARGE: usize = 128 * 1024;

/// The largest ClientHello: one with all that post-quantum keys and tickets need is a fifth of it.
const HELLO_MAX: usize = 16 * 1024;

/// How long either handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// How long an application that is only looked at may take.
const LOOK: Duration = Duration::from_secs(2);

/// How a connection that began with a ClientHello goes on.
pub(super) enum Opened {
    /// Unparsed; these bytes were read of it.
    Sealed(TcpStream, BytesMut),
    /// As what it is inside.
    Decrypted {
        client: Socket,
        app: Option<Dialing>,
        place: Place,
    },
    /// The client did not go through with its handshake.
    Lost,
}

/// What of a ClientHello the application is to hear.
#[derive(Clone, Debug)]
struct Hello {
    name: Option<String>,
    /// Of what the client offers (ALPN), in its order, what can be parsed; all, where that is nothing. gRPC offers `grpc-exp`
    /// before `h2`: the same, and only the second is known to us by name.
    protocols: Vec<Vec<u8>>,
}

/// What can be parsed.
const PARSED: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// How to open further connections to the application for the same client.
#[derive(Debug)]
pub(crate) struct Inside {
    /// By which it is known.
    pub(super) key: PublicKey,
    /// What is spoken on both sides.
    pub(super) protocol: Option<Vec<u8>>,
    name: Option<String>,
}

/// The application, after its handshake.
struct Greeted {
    stream: TlsStream<Raw>,
    key: PublicKey,
    protocol: Option<Vec<u8>>,
}

/// Whether TLS to this port is anybody's.
pub(super) fn is_wanted(port: &Port<Workstation>) -> bool {
    port.intercepts.iter().any(|live| live.tls.is_some())
}

/// Stands in for the application, if it can. `bytes` were read from the client; `app` is a connection that nobody uses yet.
pub(super) async fn open(
    client: TcpStream,
    mut bytes: BytesMut,
    app: Option<Dialing>,
    place: &Place,
    port: &Port<Workstation>,
) -> Opened {
    let mut client = client;
    let Some(hello) = hello(&mut client, &mut bytes).await else {
        return Opened::Sealed(client, bytes);
    };
    let credentials: Vec<_> = port.intercepts.iter().filter_map(tls_of).collect();
    let app = match app {
        Some(dialing) => dialing.await.ok(),
        None => None,
    };
    let greeted = match app {
        Some(Socket::Tcp(app)) => {
            let keys = credentials.iter().map(|credential| credential.public_key());
            match greet(app, place.app, &hello, keys.collect()).await {
                Ok(greeted) => Some(greeted),
                Err(why) => {
                    tracing::debug!(app = %place.app, ?why, "TLS passes unparsed");
                    return Opened::Sealed(client, bytes);
                }
            }
        }
        Some(Socket::Tls(_)) | None => None,
    };
    let key = greeted.as_ref().map(|greeted| greeted.key);
    let mut credentials = credentials.into_iter();
    let credential =
        credentials.find(|credential| key.is_none_or(|key| credential.public_key() == key));
    let Some(credential) = credential else {
        return Opened::Sealed(client, bytes);
    };
    let protocols = match &greeted {
        Some(greeted) => greeted.protocol.iter().cloned().collect(),
        None => hello.protocols.clone(),
    };
    let acceptor = TlsAcceptor::from(Arc::new(server_config(credential, protocols)));
    let accepted = timeout(HANDSHAKE, acceptor.accept(Raw::new(bytes, client))).await;
    let stream = match accepted {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(peer = %place.peer, %error, "no handshake");
            return Opened::Lost;
        }
        Err(_) => return Opened::Lost,
    };
    let inside = Inside {
        key: credential.public_key(),
        protocol: stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec),
        name: hello.name,
    };
    let app = greeted.map(|greeted| {
        let socket = Socket::Tls(Box::new(Tls::new(greeted.stream)));
        Box::pin(std::future::ready(Ok(socket))) as Dialing
    });
    Opened::Decrypted {
        client: Socket::Tls(Box::new(Tls::new(TlsStream::Server(stream)))),
        app,
        place: place.decrypted(inside),
    }
}

fn tls_of(live: &Live<Workstation>) -> Option<&Credential> {
    live.tls.as_ref()
}

/// Reads the whole ClientHello. `None` for something else, or no end of it.
async fn hello(client: &mut TcpStream, bytes: &mut BytesMut) -> Option<Hello> {
    let reading = async {
        loop {
            if let Some(hello) = Hello::parse(bytes).ok()? {
                return Some(hello);
            }
            if bytes.len() > HELLO_MAX || client.read_buf(bytes).await.ok()? == 0 {
                return None;
            }
        }
    };
    timeout(HANDSHAKE, reading).await.ok().flatten()
}

impl Hello {
    fn parse(mut bytes: &[u8]) -> Result<Option<Self>, ()> {
        let mut acceptor = Acceptor::default();
        while bytes.has_remaining() {
            acceptor.read_tls(&mut bytes).map_err(drop)?;
            if let Some(accepted) = acceptor.accept().map_err(drop)? {
                let hello = accepted.client_hello();
                let offered: Vec<_> = hello.alpn().into_iter().flatten().collect();
                let parsed = offered.iter().filter(|name| PARSED.contains(*name));
                let parsed: Vec<_> = parsed.copied().collect();
                let protocols = if parsed.is_empty() { offered } else { parsed };
                return Ok(Some(Self {
                    name: hello.server_name().map(str::to_owned),
                    protocols: protocols.into_iter().map(<[u8]>::to_vec).collect(),
                }));
            }
        }
        Ok(None)
    }
}

impl Inside {
    /// Another connection to the application, which speaks what the first one did.
    pub(super) async fn connect(&self, app: SocketAddr) -> std::io::Result<Socket> {
        let tcp = dial(app).await?;
        let hello = Hello {
            name: self.name.clone(),
            protocols: self.protocol.iter().cloned().collect(),
        };
        let greeted = greet(tcp, app, &hello, vec![self.key]).await;
        match greeted {
            Ok(greeted) if greeted.protocol == self.protocol => {
                Ok(Socket::Tls(Box::new(Tls::new(greeted.stream))))
            }
            Ok(_) => Err(std::io::Error::other("it speaks something else now")),
            Err(found) => Err(std::io::Error::other(format!("{found:?}"))),
        }
    }
}

/// A handshake with the application, whose key must be one of these.
async fn greet(
    tcp: TcpStream,
    app: SocketAddr,
    hello: &Hello,
    keys: Vec<PublicKey>,
) -> Result<Greeted, Found> {
    let name = hello.name.clone().and_then(|name| name.try_into().ok());
    let asked = Arc::new(Asked::default());
    let mut config = client_config(keys, Arc::clone(&asked));
    config.alpn_protocols.clone_from(&hello.protocols);
    let connector = TlsConnector::from(Arc::new(config));
    let name = name.unwrap_or(ServerName::IpAddress(app.ip().into()));
    let connecting = connector.connect(name, Raw::new(BytesMut::new(), tcp));
    let connected = timeout(HANDSHAKE, connecting)
        .await
        .map_err(|_| Found::NoTls)?;
    if asked.0.load(Relaxed) {
        return Err(Found::AsksForCertificates);
    }
    let stream = connected.map_err(|error| found(&error))?;
    let session = stream.get_ref().1;
    let key = session
        .peer_certificates()
        .and_then(|chain| PublicKey::of(chain.first()?));
    Ok(Greeted {
        key: key.ok_or(Found::NoTls)?,
        protocol: session.alpn_protocol().map(<[u8]>::to_vec),
        stream: TlsStream::Client(stream),
    })
}

fn found(error: &std::io::Error) -> Found {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    match inner {
        Some(Error::InvalidCertificate(_)) => Found::OtherCertificate,
        Some(_) | None => Found::NoTls,
    }
}

/// Greets the applications whose TLS these ports' intercepts are about, and says what is wrong with them. One that is down
/// may come yet.
pub(crate) async fn findings(shared: &Shared, own: std::net::IpAddr, ports: Vec<u16>) -> Findings {
    let mut looks = Vec::new();
    for port in ports.into_iter().filter_map(|port| shared.book.port(port)) {
        let app = SocketAddr::new(own, port.app);
        for live in &port.intercepts {
            if let Some(credential) = live.tls.clone() {
                looks.push(look(live.route.id.clone(), app, credential));
            }
        }
    }
    let ports = join_all(looks).await.into_iter().flatten().collect();
    Findings { ports }
}

async fn look(intercept: String, app: SocketAddr, credential: Credential) -> Option<Finding> {
    let hello = Hello {
        name: credential.host().map(str::to_owned),
        protocols: Vec::new(),
    };
    let greeted = timeout(LOOK, async {
        let tcp = dial(app).await.ok()?;
        greet(tcp, app, &hello, vec![credential.public_key()])
            .await
            .err()
    });
    let found = greeted.await.unwrap_or(Some(Found::NoTls))?;
    Some(Finding { intercept, found })
}

/// Full handshakes only: what a client could resume would have to be kept.
fn server_config(credential: &Credential, protocols: Vec<Vec<u8>>) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("ring supports TLS 1.2 and 1.3")
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(credential.certified())));
    config.alpn_protocols = protocols;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config
}

fn client_config(keys: Vec<PublicKey>, asked: Arc<Asked>) -> ClientConfig {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("ring supports TLS 1.2 and 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Known {
            keys,
            provider: provider(),
        }))
        .with_client_cert_resolver(asked);
    config.resumption = rustls::client::Resumption::disabled();
    config
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Whether the application asked for a certificate. It gets none.
#[derive(Debug, Default)]
struct Asked(AtomicBool);

impl ResolvesClientCert for Asked {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.store(true, Relaxed);
        None
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Takes a certificate of one of these keys, whose owner signed the handshake.
#[derive(Debug)]
struct Known {
    keys: Vec<PublicKey>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Known {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match PublicKey::of(end_entity).is_some_and(|key| self.keys.contains(&key)) {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.provider.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}
