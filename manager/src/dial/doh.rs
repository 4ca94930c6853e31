//! DNS messages of the workstation (RFC 8484), answered by this pod's nameserver.
//!
//! A message goes through as it is: EDNS, flags and id stay the workstation's. It is read only to refuse what is no
//! query, to answer from the hosts file where there is one, and to know which addresses a session has heard of.

use std::net::IpAddr;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{RData, Record, RecordType};
use tokio::time::timeout;

use crate::dial::message::{host_name, inspect, refusal};
use crate::dial::resolve::Resolver;

/// Answers a message. Always returns a message: FORMERR for what cannot be read, SERVFAIL when nobody answers in time.
pub async fn answer(resolver: &Resolver, query: &[u8]) -> Vec<u8> {
    let asked = match inspect(query) {
        Ok(asked) => asked,
        Err(refusal) => return refusal,
    };
    if let Some(answer) = from_hosts(resolver, &asked) {
        return answer;
    }
    match timeout(PATIENCE, resolver.nameservers().exchange(query)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) | Err(_) => refusal(query, ResponseCode::ServFail),
    }
}

/// Shorter than the 5 s after which stub resolvers give up.
const PATIENCE: Duration = Duration::from_millis(4500);

fn from_hosts(resolver: &Resolver, query: &Message) -> Option<Vec<u8>> {
    let question = query.queries.first()?;
    let known = resolver.from_hosts(&host_name(&question.name));
    if known.is_empty() || !matches!(question.query_type, RecordType::A | RecordType::AAAA) {
        return None;
    }
    let data = known
        .into_iter()
        .filter_map(|address| match (address, question.query_type) {
            (IpAddr::V4(v4), RecordType::A) => Some(RData::A(A(v4))),
            (IpAddr::V6(v6), RecordType::AAAA) => Some(RData::AAAA(AAAA(v6))),
            (IpAddr::V4(_) | IpAddr::V6(_), _) => None,
        });
    let records: Vec<Record> = data
        .map(|data| Record::from_rdata(question.name.clone(), HOSTS_TTL, data))
        .collect();
    let mut answer = query.clone().into_response();
    answer.edns = None;
    answer.metadata.recursion_available = true;
    answer.add_answers(records);
    answer.to_vec().ok()
}

/// Seconds. The file may change at any time.
const HOSTS_TTL: u32 = 5;

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::str::FromStr;

    use hickory_proto::op::{Edns, MessageType, OpCode, Query};
    use hickory_proto::rr::Name;
    use tokio::net::UdpSocket;

    use super::*;
    use crate::dial::message::addresses;
    use crate::dial::resolv_conf::ResolvConf;

    fn query(name: &str, family: RecordType) -> Message {
        let mut message = Message::new(0xbeef, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_str(name).unwrap(), family));
        message
    }

    fn resolver(nameserver: Option<SocketAddr>) -> Resolver {
        let mut conf = ResolvConf {
            timeout: Duration::from_millis(100),
            attempts: 1,
            ..ResolvConf::default()
        };
        conf.nameservers.extend(nameserver);
        Resolver::new(conf, None)
    }

    #[tokio::test]
    async fn a_message_goes_through_as_it_is() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let resolver = resolver(Some(socket.local_addr().unwrap()));
        let mut sent = query("web.example.", RecordType::SRV);
        sent.set_edns(Edns::new()).metadata.checking_disabled = true;
        let sent = sent.to_vec().unwrap();
        let server = tokio::spawn(async move {
            let mut buffer = [0; 2048];
            let (length, peer) = socket.recv_from(&mut buffer).await.unwrap();
            let seen = buffer[..length].to_vec();
            buffer[2] |= 0x80;
            socket.send_to(&buffer[..length], peer).await.unwrap();
            seen
        });

        let answer = answer(&resolver, &sent).await;

        let seen = server.await.unwrap();
        assert_eq!(seen[2..], sent[2..], "all but the id is the workstation's");
        assert_eq!(answer[..2], [0xbe, 0xef]);
        assert_eq!(answer[3..], sent[3..]);
    }

    #[tokio::test]
    async fn what_is_no_query_is_refused_and_silence_is_a_failure() {
        let code = async |bytes: &[u8]| {
            let answer = Message::from_vec(&answer(&resolver(None), bytes).await).unwrap();
            (answer.metadata.id, answer.metadata.response_code)
        };
        let good = query("web.", RecordType::A).to_vec().unwrap();
        let mut notify = good.clone();
        notify[2] = 0x20;
        let mut response = good.clone();
        response[2] = 0x80;

        assert_eq!(code(b"").await, (0, ResponseCode::FormErr));
        assert_eq!(code(&good[..5]).await, (0xbeef, ResponseCode::FormErr));
        assert_eq!(code(&response).await, (0xbeef, ResponseCode::FormErr));
        assert_eq!(code(&notify).await, (0xbeef, ResponseCode::NotImp));
        assert_eq!(code(&good).await, (0xbeef, ResponseCode::ServFail));
    }

    #[tokio::test]
    async fn the_hosts_file_answers_address_questions() {
        let file = std::env::temp_dir().join(format!("tp-doh-hosts-{}", std::process::id()));
        std::fs::write(&file, "10.9.9.9 web\n").unwrap();
        let resolver = Resolver::new(ResolvConf::default(), Some(file.clone()));

        let v4 = answer(&resolver, &query("Web.", RecordType::A).to_vec().unwrap()).await;
        let v6 = answer(
            &resolver,
            &query("web.", RecordType::AAAA).to_vec().unwrap(),
        )
        .await;

        std::fs::remove_file(file).unwrap();
        assert_eq!(
            addresses(&v4),
            Some(("web".to_owned(), vec!["10.9.9.9".parse().unwrap()]))
        );
        let v6 = Message::from_vec(&v6).unwrap();
        assert_eq!(
            (v6.metadata.response_code, v6.answers.len()),
            (ResponseCode::NoError, 0)
        );
    }
}
