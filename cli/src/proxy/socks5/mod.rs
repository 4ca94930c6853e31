//! SOCKS5 on one connection: the dialogue around the [`codec`], then a relay or a UDP association.
//!
//! Success is said only after the destination has accepted. What the client sends early is kept and follows.

pub mod codec;

use std::io;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use self::codec::{Methods, Parsed, Refusal, Request};
use super::credentials::Credentials;

/// How the dialogue ended without a request.
#[derive(Debug)]
pub(super) enum Failed {
    /// To be told to the client, which is then closed.
    Refused(Refusal),
    /// The client is gone.
    Gone,
}

impl From<io::Error> for Failed {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Negotiates until the request is known. Bytes behind it stay in `buffer`.
pub(super) async fn negotiate(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
    credentials: Option<&Credentials>,
) -> Result<Request, Failed> {
    let methods = receive(stream, buffer, codec::parse_greeting).await?;
    match (credentials, methods) {
        (None, Methods { none: true, .. }) => stream.write_all(&codec::USE_NO_LOGIN).await?,
        // Nothing to check: programs use a made-up login to keep their own connections apart.
        (None, Methods { password: true, .. }) => log_in(stream, buffer, |_| true).await?,
        (Some(wanted), Methods { password: true, .. }) => {
            log_in(stream, buffer, |login| {
                wanted.verify(&login.user, &login.password)
            })
            .await?;
        }
        (None | Some(_), _) => return Err(Refusal::NoMethod.into()),
    }
    receive(stream, buffer, codec::parse_request).await
}

async fn log_in(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
    verify: impl FnOnce(&codec::Login) -> bool,
) -> Result<(), Failed> {
    stream.write_all(&codec::USE_PASSWORD).await?;
    let login = receive(stream, buffer, codec::parse_login).await?;
    if !verify(&login) {
        return Err(Refusal::Login.into());
    }
    Ok(stream.write_all(&codec::LOGIN_ACCEPTED).await?)
}

/// Reads until `parse` has its message. The codec bounds how much that can be.
async fn receive<T>(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
    parse: impl Fn(&[u8]) -> Parsed<T>,
) -> Result<T, Failed> {
    loop {
        if let Some((message, used)) = parse(buffer)? {
            let _ = buffer.split_to(used);
            return Ok(message);
        }
        if stream.read_buf(buffer).await? == 0 {
            return Err(Failed::Gone);
        }
    }
}
