//! The resolver of a program in the namespace: names of the cluster are asked there, all others on the workstation.
//!
//! Messages go through as they are, so that record types, TTLs, negative answers and EDNS stay what the resolver said.
//! Knows no packets: [`super::bridge`] brings the questions, over UDP or TCP.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::Name;
use tp_tunnel::Host;

use super::dial::Dialer;
use super::workstation_dns;
use crate::proxy::split::{Route, Split};

/// The resolver's address in the namespace, port 53.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);

/// Shorter than the 5 s after which stub resolvers ask again.
const PATIENCE: Duration = Duration::from_millis(4500);

/// Addresses whose name is remembered.
const REMEMBERED: usize = 4096;

/// How a question came, which decides how long its answer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// Which names led to which addresses outside of the cluster's ranges. A program dials an address; the right to reach a
/// private zone or an ExternalName Service comes from its name.
#[derive(Default)]
pub(super) struct Names {
    names: RefCell<HashMap<IpAddr, String>>,
    order: RefCell<VecDeque<IpAddr>>,
}

impl Names {
    /// The host to dial for an address.
    pub(super) fn host(&self, address: IpAddr) -> Host {
        let name = self.names.borrow().get(&address).cloned();
        name.map_or(Host::Ip(address), Host::Name)
    }

    fn learn(&self, name: &str, address: IpAddr) {
        let mut names = self.names.borrow_mut();
        if names.insert(address, name.to_owned()).is_some() {
            return;
        }
        let mut order = self.order.borrow_mut();
        order.push_back(address);
        if order.len() > REMEMBERED
            && let Some(oldest) = order.pop_front()
        {
            names.remove(&oldest);
        }
    }
}

/// The resolver's configuration in the namespace, as the kubelet writes it for a pod of `namespace`.
pub fn resolv_conf(namespace: &str, domain: &str) -> String {
    let search = match (namespace, domain) {
        (_, "") => String::new(),
        ("", domain) => format!("search svc.{domain} {domain}\n"),
        (namespace, domain) => format!("search {namespace}.svc.{domain} svc.{domain} {domain}\n"),
    };
    format!("{search}nameserver {RESOLVER}\noptions ndots:5\n")
}

/// Answers a question in wire format. Always answers: SERVFAIL where nobody does in time.
pub(super) async fn answer(
    dialer: &Dialer,
    names: &Names,
    query: &[u8],
    over: Transport,
) -> Vec<u8> {
    let asked = match Message::from_vec(query) {
        Ok(asked) if asked.metadata.message_type == MessageType::Query => asked,
        Ok(_) | Err(_) => return refusal(query, ResponseCode::FormErr),
    };
    let Some(question) = asked.queries.first() else {
        return refusal(query, ResponseCode::FormErr);
    };
    let split = dialer.split();
    let answering = match route(&split, &question.name) {
        Route::Cluster => from_cluster(dialer, names, &split, query).boxed_local(),
        _ if dialer.offline => async { Some(refusal(query, ResponseCode::NXDomain)) }.boxed_local(),
        Route::Direct | Route::Refused(_) => workstation_dns::answer(&asked, query).boxed_local(),
    };
    let answered = tokio::time::timeout(PATIENCE, answering)
        .await
        .ok()
        .flatten();
    let answer = answered.unwrap_or_else(|| refusal(query, ResponseCode::ServFail));
    match over {
        Transport::Udp => cut(answer, asked.max_payload()),
        Transport::Tcp => answer,
    }
}

/// Where a name is to be asked. Names that are no host's (`*.web`, `_x y`) are asked where the host below them is.
fn route(split: &Split, name: &Name) -> Route {
    if let Ok(network) = name.parse_arpa_name() {
        return split.route(&Host::Ip(network.addr()));
    }
    let text = name.to_ascii();
    let mut text = text.trim_end_matches('.');
    loop {
        if let Ok(host) = Host::parse(text) {
            return split.route(&host);
        }
        match text.split_once('.') {
            Some((_, below)) => text = below,
            None => return Route::Direct,
        }
    }
}

async fn from_cluster(
    dialer: &Dialer,
    names: &Names,
    split: &Split,
    query: &[u8],
) -> Option<Vec<u8>> {
    let question = Bytes::copy_from_slice(query);
    let ask = |tunnel: tp_tunnel::Tunnel| {
        let question = question.clone();
        async move { tunnel.dns_query(question).await }.boxed()
    };
    let answer = dialer.through_tunnel(ask).await.ok()?;
    if let Ok(message) = Message::from_vec(&answer) {
        learn(names, split, &message);
    }
    let mut answer = answer.to_vec();
    // A resolver may answer under the id 0, which caches like (RFC 8484 §4.1).
    answer.get_mut(..2)?.copy_from_slice(query.get(..2)?);
    Some(answer)
}

fn learn(names: &Names, split: &Split, answer: &Message) {
    let Some(question) = answer.queries.first() else {
        return;
    };
    let name = question.name.to_ascii();
    let Ok(Host::Name(name)) = Host::parse(&name) else {
        return;
    };
    for address in answer
        .answers
        .iter()
        .filter_map(|record| record.data.ip_addr())
    {
        if split.route(&Host::Ip(address)) == Route::Direct {
            names.learn(&name, address);
        }
    }
}

/// Fits an answer to what the asker takes over UDP: what is too long is asked again over TCP (RFC 1035 §4.2.1).
pub(super) fn cut(answer: Vec<u8>, largest: u16) -> Vec<u8> {
    if answer.len() <= usize::from(largest) {
        return answer;
    }
    let Ok(message) = Message::from_vec(&answer) else {
        return refusal(&answer, ResponseCode::ServFail);
    };
    message
        .truncate()
        .to_vec()
        .unwrap_or_else(|_| refusal(&answer, ResponseCode::ServFail))
}

/// A header and the question, as far as it can be read.
pub(super) fn refusal(query: &[u8], code: ResponseCode) -> Vec<u8> {
    let id = query.first_chunk().map_or(0, |id| u16::from_be_bytes(*id));
    let mut message = Message::error_msg(id, OpCode::Query, code);
    if let Ok(asked) = Message::from_vec(query) {
        message.metadata.recursion_desired = asked.metadata.recursion_desired;
        message.add_queries(asked.queries);
    }
    message.metadata.recursion_available = true;
    message
        .to_vec()
        .expect("a header and a question that was read can be written")
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use hickory_proto::op::Query;
    use hickory_proto::rr::rdata::{A, TXT};
    use hickory_proto::rr::{RData, Record, RecordType};
    use tp_manager_api::ClusterView;

    use super::*;
    use crate::proxy::UserRules;

    fn split() -> Split {
        let view = ClusterView {
            namespace: "shop".into(),
            domain: "cluster.local".into(),
            service_ranges: vec!["10.96.0.0/16".parse().unwrap()],
            suffixes: vec!["corp.internal".into()],
            ..ClusterView::default()
        };
        Split::new(view, UserRules::default())
    }

    fn name(text: &str) -> Name {
        Name::from_str(text).unwrap()
    }

    #[test]
    fn names_are_asked_where_they_live() {
        let split = split();
        for (text, expected) in [
            ("web.shop.svc.cluster.local.", Route::Cluster),
            ("_http._tcp.web.shop.svc.cluster.local.", Route::Cluster),
            ("1.0.96.10.in-addr.arpa.", Route::Cluster),
            ("1.0.0.8.in-addr.arpa.", Route::Direct),
            ("*.db.corp.internal.", Route::Cluster),
            ("example.com.", Route::Direct),
            (".", Route::Direct),
        ] {
            assert_eq!(route(&split, &name(text)), expected, "{text}");
        }
    }

    #[test]
    fn only_addresses_that_do_not_speak_for_themselves_are_remembered() {
        let names = Names::default();
        let mut answer = Message::response(7, OpCode::Query);
        let asked = name("db.corp.internal.");
        answer.add_query(Query::query(asked.clone(), RecordType::A));
        for address in ["10.96.0.9", "172.20.0.9"] {
            let data = RData::A(A(address.parse().unwrap()));
            answer.add_answer(Record::from_rdata(asked.clone(), 5, data));
        }

        learn(&names, &split(), &answer);

        let host = |address: &str| names.host(address.parse().unwrap());
        assert_eq!(host("172.20.0.9"), Host::Name("db.corp.internal".into()));
        assert_eq!(host("10.96.0.9"), Host::Ip("10.96.0.9".parse().unwrap()));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let names = Names::default();
        for number in 0..REMEMBERED as u32 + 10 {
            names.learn("x", IpAddr::from(number.to_be_bytes()));
        }

        assert_eq!(names.names.borrow().len(), REMEMBERED);
    }

    #[test]
    fn a_long_answer_is_cut_to_a_question_for_tcp() {
        let mut answer = Message::response(7, OpCode::Query);
        let asked = name("web.shop.svc.cluster.local.");
        answer.add_query(Query::query(asked.clone(), RecordType::TXT));
        let text = RData::TXT(TXT::new(vec!["x".repeat(200); 5]));
        answer.add_answer(Record::from_rdata(asked, 5, text));
        let whole = answer.to_vec().unwrap();

        let short = Message::from_vec(&cut(whole.clone(), 512)).unwrap();

        assert!(short.metadata.truncation && short.answers.is_empty());
        assert_eq!((short.metadata.id, short.queries.len()), (7, 1));
        assert_eq!(cut(whole.clone(), 4096), whole);
    }

    #[test]
    fn the_configuration_is_a_pods() {
        assert_eq!(
            resolv_conf("shop", "cluster.local"),
            "search shop.svc.cluster.local svc.cluster.local cluster.local\n\
             nameserver 198.18.0.2\n\
             options ndots:5\n"
        );
        assert!(!resolv_conf("", "").contains("search"));
    }
}
