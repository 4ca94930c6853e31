//! One DNS message there and one back: UDP, TCP when the answer did not fit, the next nameserver when one is silent.
//!
//! It moves bytes and compares ids and questions; what a message says is its callers' business.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::dial::message::{HEADER, question_end};

/// Where to ask, and how patiently. Clones share the bound on questions that are open.
#[derive(Clone, Debug)]
pub struct Nameservers {
    addresses: Vec<SocketAddr>,
    timeout: Duration,
    attempts: u32,
    /// Each open question holds a descriptor.
    open: Arc<Semaphore>,
}

/// Questions open at once; later ones wait for their turn.
const OPEN_MAX: usize = 1024;

/// Nobody gave a usable answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// resolv.conf lists none.
    #[error("no nameserver is configured")]
    NoNameserver,
    /// All were silent or unreachable; the last failure.
    #[error("no nameserver answered")]
    Silent(#[source] io::Error),
}

impl Nameservers {
    /// With the addresses in order of preference, the patience with one of them in one attempt, and how often the list is
    /// gone through.
    pub fn new(addresses: Vec<SocketAddr>, timeout: Duration, attempts: u32) -> Self {
        Self {
            addresses,
            timeout,
            attempts,
            open: Arc::new(Semaphore::new(OPEN_MAX)),
        }
    }

    /// Sends a query and returns the answer, with the query's id. The id on the wire is a random one.
    ///
    /// A nameserver that fails or refuses is passed over while there is another; its answer is returned when all do.
    pub async fn exchange(&self, query: &[u8]) -> Result<Vec<u8>, ExchangeError> {
        let _turn = self.open.acquire().await.expect("it is never closed");
        let mut failed: Option<Vec<u8>> = None;
        let mut last = None;
        for server in (0..self.attempts).flat_map(|_| &self.addresses) {
            match timeout(self.timeout, ask(*server, query)).await {
                Ok(Ok(answer)) if is_failure(&answer) => failed = Some(answer),
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => last = Some(error),
                Err(_) => last = Some(io::Error::from(io::ErrorKind::TimedOut)),
            }
        }
        match (failed, last) {
            (Some(answer), _) => Ok(answer),
            (None, Some(error)) => Err(ExchangeError::Silent(error)),
            (None, None) => Err(ExchangeError::NoNameserver),
        }
    }
}

async fn ask(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    if query.len() < HEADER {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut sent = query.to_vec();
    sent[..2].copy_from_slice(&rand::random::<[u8; 2]>());
    let answer = ask_datagram(server, &sent).await?;
    let mut answer = if is_truncated(&answer) {
        ask_stream(server, &sent).await.unwrap_or(answer)
    } else {
        answer
    };
    answer[..2].copy_from_slice(&query[..2]);
    Ok(answer)
}

/// A socket of its own per query: the source port is as hard to guess as the kernel makes it.
async fn ask_datagram(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any = match server.ip() {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; LARGEST_DATAGRAM];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if answers(query, &buffer[..length]) {
            buffer.truncate(length);
            buffer.shrink_to_fit();
            return Ok(buffer);
        }
    }
}

async fn ask_stream(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(query.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut stream = TcpStream::connect(server).await?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(query);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; length.into()];
    stream.read_exact(&mut answer).await?;
    if answers(query, &answer) {
        Ok(answer)
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// More than any EDNS size in use; what a datagram cannot hold comes by TCP.
const LARGEST_DATAGRAM: usize = 16 * 1024;

/// Same id, a response, and the same question letter by letter (RFC 5452 §9.1); a failure may leave the question out.
fn answers(query: &[u8], answer: &[u8]) -> bool {
    if answer.len() < HEADER || answer[..2] != query[..2] || answer[2] & 0x80 == 0 {
        return false;
    }
    let no_question = answer[4..6] == [0, 0];
    if no_question {
        return is_failure(answer) || is_truncated(answer) || rcode(answer) == FORMERR;
    }
    match question_end(query)
        .and_then(|end| Some((query.get(HEADER..end)?, answer.get(HEADER..end)?)))
    {
        Some((asked, answered)) => asked.eq_ignore_ascii_case(answered),
        None => false,
    }
}

fn is_truncated(answer: &[u8]) -> bool {
    answer[2] & 0x02 != 0
}

fn rcode(answer: &[u8]) -> u8 {
    answer[3] & 0x0f
}

const FORMERR: u8 = 1;

/// SERVFAIL, NOTIMP or REFUSED: another nameserver may do better.
fn is_failure(answer: &[u8]) -> bool {
    matches!(rcode(answer), 2 | 4 | 5)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::net::TcpListener;

    use super::*;

    /// `web.` A, id 0x1234.
    const QUERY: &[u8] =
        b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03web\x00\x00\x01\x00\x01";

    fn reply_to(query: &[u8], flags: u8, rcode: u8) -> Vec<u8> {
        let mut reply = query.to_vec();
        reply[2] = 0x80 | flags;
        reply[3] = rcode;
        reply
    }

    fn asking(addresses: Vec<SocketAddr>) -> Nameservers {
        Nameservers::new(addresses, Duration::from_millis(300), 1)
    }

    /// Answers one query after another with what `reply` makes of it.
    async fn server(reply: fn(&[u8]) -> Vec<Vec<u8>>) -> (SocketAddr, tokio::task::JoinHandle<()>) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut buffer = [0; 2048];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
                for answer in reply(&buffer[..length]) {
                    socket.send_to(&answer, peer).await.unwrap();
                }
            }
        });
        (address, task)
    }

    #[tokio::test]
    async fn the_answer_has_the_id_of_the_query() {
        let (address, _task) = server(|query| vec![reply_to(query, 0, 0)]).await;

        let answer = asking(vec![address]).exchange(QUERY).await.unwrap();

        assert_eq!(answer, reply_to(QUERY, 0, 0));
    }

    #[tokio::test]
    async fn forged_answers_are_not_taken() {
        let (address, _task) = server(|query| {
            let mut wrong_id = reply_to(query, 0, 0);
            wrong_id[0] ^= 1;
            let mut wrong_name = reply_to(query, 0, 0);
            wrong_name[13] = b'x';
            vec![
                vec![],
                query.to_vec(),
                wrong_id,
                wrong_name,
                reply_to(query, 0, 3),
            ]
        })
        .await;

        let answer = asking(vec![address]).exchange(QUERY).await.unwrap();

        assert_eq!(rcode(&answer), 3);
    }

    #[tokio::test]
    async fn a_truncated_answer_comes_again_by_tcp() {
        let (address, _task) = server(|query| vec![reply_to(query, 0x02, 0)]).await;
        let listener = TcpListener::bind(address).await.unwrap();
        let by_tcp = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut query = vec![0; stream.read_u16().await.unwrap().into()];
            stream.read_exact(&mut query).await.unwrap();
            let mut answer = reply_to(&query, 0, 0);
            answer.extend([7; 40_000]);
            stream.write_u16(answer.len() as u16).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        });

        let answer = asking(vec![address]).exchange(QUERY).await.unwrap();

        by_tcp.await.unwrap();
        assert_eq!(answer.len(), QUERY.len() + 40_000);
        assert_eq!(answer[..2], QUERY[..2]);
    }

    #[tokio::test]
    async fn a_silent_and_a_failing_nameserver_are_passed_over() {
        let (silent, _task) = server(|_| Vec::new()).await;
        let (failing, _task) = server(|query| vec![reply_to(query, 0, 2)]).await;
        let (good, _task) = server(|query| vec![reply_to(query, 0, 0)]).await;

        let answer = asking(vec![silent, failing, good])
            .exchange(QUERY)
            .await
            .unwrap();
        assert_eq!(rcode(&answer), 0);

        let answer = asking(vec![silent, failing]).exchange(QUERY).await.unwrap();
        assert_eq!(rcode(&answer), 2);

        let silence = asking(vec![silent]).exchange(QUERY).await;
        assert!(matches!(silence, Err(ExchangeError::Silent(_))));
    }

    proptest! {
        #[test]
        fn comparing_never_panics(query in prop::collection::vec(any::<u8>(), 12..80), answer in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = answers(&query, &answer);
        }

        #[test]
        fn any_message_answers_itself_as_a_response(name in "[a-z]{1,63}(\\.[a-z]{1,30}){0,4}") {
            let mut query = QUERY[..12].to_vec();
            for label in name.split('.') {
                query.push(label.len() as u8);
                query.extend(label.as_bytes());
            }
            query.extend([0, 0, 1, 0, 1]);
            prop_assert!(answers(&query, &reply_to(&query, 0, 0)));
        }
    }
}
