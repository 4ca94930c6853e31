//! Names outside of the cluster, as the workstation's own resolver answers them: its hosts file, then its nameservers.
//!
//! Own code in place of `getaddrinfo`, since that has neither TTLs nor record types other than addresses.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::Message;
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// How long one nameserver may take. Two fit into what a stub resolver waits.
const PATIENCE: Duration = Duration::from_secs(2);

/// Seconds. The file may change at any time.
const HOSTS_TTL: u32 = 5;

/// The answer, or `None` where nobody gives one.
pub(super) async fn answer(asked: &Message, query: &[u8]) -> Option<Vec<u8>> {
    let hosts = tokio::fs::read_to_string("/etc/hosts").await;
    if let Some(answer) = from_hosts(&hosts.unwrap_or_default(), asked) {
        return Some(answer);
    }
    let configuration = tokio::fs::read_to_string("/etc/resolv.conf").await;
    for nameserver in nameservers(&configuration.unwrap_or_default()) {
        if let Ok(Ok(answer)) = timeout(PATIENCE, exchange(nameserver, query)).await {
            return Some(answer);
        }
    }
    None
}

/// Which nameservers a `/etc/resolv.conf` says; its own where none is named (resolv.conf(5)).
pub(super) fn nameservers(configuration: &str) -> Vec<SocketAddr> {
    let named = configuration.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.next().filter(|word| *word == "nameserver");
        address.and(words.next())?.parse::<IpAddr>().ok()
    });
    let mut nameservers: Vec<SocketAddr> = named
        .take(3)
        .map(|address| SocketAddr::new(address, 53))
        .collect();
    if nameservers.is_empty() {
        nameservers.push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 53));
    }
    nameservers
}

async fn exchange(nameserver: SocketAddr, query: &[u8]) -> std::io::Result<Vec<u8>> {
    let any: SocketAddr = match nameserver {
        SocketAddr::V4(_) => ([0; 4], 0).into(),
        SocketAddr::V6(_) => ([0; 16], 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(nameserver).await?;
    socket.send(query).await?;
    let mut answer = vec![0; 65_535];
    loop {
        let length = socket.recv(&mut answer).await?;
        if length >= 12 && answer[..2] == query[..2] {
            answer.truncate(length);
            break;
        }
    }
    const TRUNCATED: u8 = 2;
    match answer[2] & TRUNCATED {
        0 => Ok(answer),
        _ => exchange_over_tcp(nameserver, query).await.or(Ok(answer)),
    }
}

async fn exchange_over_tcp(nameserver: SocketAddr, query: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(nameserver).await?;
    let length = u16::try_from(query.len()).map_err(std::io::Error::other)?;
    stream
        .write_all(&[&length.to_be_bytes(), query].concat())
        .await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; length.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

fn from_hosts(hosts: &str, asked: &Message) -> Option<Vec<u8>> {
    let question = asked.queries.first()?;
    let known = addresses(hosts, &question.name);
    if known.is_empty() || !matches!(question.query_type, RecordType::A | RecordType::AAAA) {
        return None;
    }
    let records = known.into_iter().filter_map(|address| {
        let data = match (address, question.query_type) {
            (IpAddr::V4(address), RecordType::A) => RData::A(A(address)),
            (IpAddr::V6(address), RecordType::AAAA) => RData::AAAA(AAAA(address)),
            (IpAddr::V4(_) | IpAddr::V6(_), _) => return None,
        };
        Some(Record::from_rdata(question.name.clone(), HOSTS_TTL, data))
    });
    let records: Vec<Record> = records.collect();
    let mut answer = asked.clone().into_response();
    answer.edns = None;
    answer.metadata.recursion_available = true;
    answer.add_answers(records);
    answer.to_vec().ok()
}

fn addresses(hosts: &str, name: &Name) -> Vec<IpAddr> {
    let name = name.to_ascii();
    let name = name.trim_end_matches('.');
    let lines = hosts
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default());
    let matching = lines.filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.next()?.parse::<IpAddr>().ok()?;
        words
            .any(|word| word.eq_ignore_ascii_case(name))
            .then_some(address)
    });
    matching.collect()
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use hickory_proto::op::{MessageType, OpCode, Query};

    use super::*;

    const HOSTS: &str = "127.0.0.1 localhost # me\n10.1.1.1 Build.corp build\nfd00::1 build\n";

    fn asked(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new(9, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_str(name).unwrap(), kind));
        message
    }

    #[test]
    fn the_hosts_file_answers_for_its_names_and_no_others() {
        let of = |name, kind| {
            from_hosts(HOSTS, &asked(name, kind))
                .map(|answer| Message::from_vec(&answer).unwrap().answers.len())
        };

        assert_eq!(of("build.", RecordType::A), Some(1));
        assert_eq!(of("build.", RecordType::AAAA), Some(1));
        assert_eq!(
            of("build.corp.", RecordType::AAAA),
            Some(0),
            "known, and without one"
        );
        assert_eq!(of("build.", RecordType::TXT), None);
        assert_eq!(of("other.", RecordType::A), None);
    }

    #[test]
    fn three_nameservers_are_asked_at_most_and_the_own_one_without_any() {
        let text = "search x\nnameserver 10.0.0.1\nnameserver ::1\nnameserver bad\nnameserver 1.1.1.1\n\
                    nameserver 8.8.8.8\n";

        assert_eq!(nameservers(text).len(), 3);
        assert_eq!(nameservers(""), ["127.0.0.1:53".parse().unwrap()]);
    }

    #[tokio::test]
    async fn a_nameserver_is_asked_with_the_message_as_it_is() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let nameserver = socket.local_addr().unwrap();
        let query = asked("example.com.", RecordType::MX).to_vec().unwrap();
        let server = async {
            let mut buffer = [0; 512];
            let (length, peer) = socket.recv_from(&mut buffer).await.unwrap();
            socket.send_to(b"no answer at all", peer).await.unwrap();
            socket.send_to(&buffer[..length], peer).await.unwrap();
        };

        let (answer, ()) = tokio::join!(exchange(nameserver, &query), server);

        assert_eq!(answer.unwrap(), query);
    }
}
