//! Names to addresses, as a pod of the session's namespace would resolve them.
//!
//! A stub resolver: it asks for all names of the search list at once, where the first is not likely to be right, and
//! believes the first one in its order; it asks for A and AAAA together and follows aliases. Recursion and caching are the cluster's nameserver's work.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use futures::{StreamExt, stream};
use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use tokio::time::timeout;

use crate::dial::exchange::{ExchangeError, Nameservers};
use crate::dial::hosts;
use crate::dial::message::address;
use crate::dial::resolv_conf::ResolvConf;

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The fully qualified name that had addresses, without a dot at its end.
    pub name: String,
    /// At least one; IPv4 first, each family in the nameserver's order.
    pub addresses: Vec<IpAddr>,
}

/// Why a name has no address.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// No candidate of the search list exists.
    #[error("{0}: no such name")]
    NoSuchName(String),
    /// It exists, without an A or AAAA record.
    #[error("{0}: the name has no address")]
    NoAddress(String),
    /// The nameserver could not say.
    #[error("{name}: the nameserver answered {code}")]
    Failed {
        /// Name that was asked for.
        name: String,
        /// Response code, as in RFC 1035.
        code: ResponseCode,
    },
    /// No usable answer.
    #[error("{name}: {cause}")]
    Exchange {
        /// Name that was asked for.
        name: String,
        /// What went wrong.
        cause: ExchangeError,
    },
    /// The answer could not be read.
    #[error("{0}: the nameserver's answer is malformed")]
    Malformed(String),
}

/// Resolves for every session of a manager.
pub struct Resolver {
    conf: ResolvConf,
    nameservers: Nameservers,
    hosts: Option<PathBuf>,
}

impl Resolver {
    /// With `hosts`, that file goes before the nameservers, and is read anew for each name.
    pub fn new(conf: ResolvConf, hosts: Option<PathBuf>) -> Self {
        let addresses = conf.nameservers.clone();
        let nameservers = Nameservers::new(addresses, conf.timeout, conf.attempts);
        Self {
            conf,
            nameservers,
            hosts,
        }
    }

    /// Where DNS messages go as they are.
    pub fn nameservers(&self) -> &Nameservers {
        &self.nameservers
    }

    /// Whether an address and port is a nameserver of this pod; every session may ask it.
    pub fn is_nameserver(&self, address: SocketAddr) -> bool {
        self.conf.nameservers.contains(&address)
    }

    /// The addresses of `name` in the hosts file; none without one.
    pub fn from_hosts(&self, name: &str) -> Vec<IpAddr> {
        let text = self
            .hosts
            .as_ref()
            .and_then(|path| std::fs::read_to_string(path).ok());
        text.map(|text| hosts::lookup(&text, name))
            .unwrap_or_default()
    }

    /// Cancel safe. Takes as long as the nameservers do; callers bound it.
    pub async fn lookup(
        &self,
        name: &str,
        namespace: Option<&str>,
    ) -> Result<Resolved, ResolveError> {
        let addresses = self.from_hosts(name);
        if !addresses.is_empty() {
            return Ok(Resolved {
                name: name.to_owned(),
                addresses,
            });
        }
        let mut outcome = ResolveError::NoSuchName(name.to_owned());
        let candidates = self.conf.candidates(name, namespace);
        // A name of one label is the session's own namespace's, the first candidate, nearly always.
        let at_once = match name.contains('.') {
            true => candidates.len().max(1),
            false => 1,
        };
        let lookups: Vec<_> = candidates
            .iter()
            .map(|candidate| self.lookup_absolute(candidate))
            .collect();
        let mut found = stream::iter(lookups).buffered(at_once);
        for candidate in &candidates {
            match found.next().await {
                Some(Ok(addresses)) => {
                    return Ok(Resolved {
                        name: candidate.clone(),
                        addresses,
                    });
                }
                Some(Err(error)) => outcome = clearer(outcome, error),
                None => break,
            }
        }
        Err(outcome)
    }

    async fn lookup_absolute(&self, name: &str) -> Result<Vec<IpAddr>, ResolveError> {
        let v4 = self.addresses(name, RecordType::A);
        let v6 = self.addresses(name, RecordType::AAAA);
        tokio::pin!(v4, v6);
        let (v4, v6) = tokio::select! {
            v4 = &mut v4 => {
                // A nameserver that is slow with AAAA must not slow down those who have an IPv4 address.
                let patience = if v4.is_ok() { RESOLUTION_DELAY } else { Duration::MAX };
                (v4, timeout(patience, v6).await.unwrap_or(Ok(Vec::new())))
            }
            v6 = &mut v6 => (v4.await, v6),
        };
        match (v4, v6) {
            (Ok(mut v4), Ok(v6)) => {
                v4.extend(v6);
                Ok(v4)
            }
            (Ok(addresses), Err(_)) | (Err(_), Ok(addresses)) => Ok(addresses),
            (Err(v4), Err(v6)) => Err(clearer(v6, v4)),
        }
    }

    /// The addresses of one family. Follows aliases within an answer, and asks on where an answer ends in one.
    async fn addresses(&self, name: &str, family: RecordType) -> Result<Vec<IpAddr>, ResolveError> {
        let mut asked = Name::from_ascii(format!("{name}."))
            .map_err(|_| ResolveError::NoSuchName(name.to_owned()))?;
        for _ in 0..LONGEST_CHAIN {
            let answer = self.ask(name, &asked, family).await?;
            match read(&answer, &asked) {
                Outcome::Addresses(addresses) => return Ok(addresses),
                Outcome::Alias(target) => asked = target,
                Outcome::Nothing => return Err(nothing(name, answer.metadata.response_code)),
            }
        }
        Err(ResolveError::NoAddress(name.to_owned()))
    }

    async fn ask(
        &self,
        name: &str,
        asked: &Name,
        family: RecordType,
    ) -> Result<Message, ResolveError> {
        let mut query = Message::query();
        query.metadata.recursion_desired = true;
        query.add_query(Query::query(asked.clone(), family));
        query.set_edns({
            let mut edns = Edns::new();
            edns.set_max_payload(EDNS_PAYLOAD);
            edns
        });
        let query = query
            .to_vec()
            .map_err(|_| ResolveError::NoSuchName(name.to_owned()))?;
        let answer =
            self.nameservers
                .exchange(&query)
                .await
                .map_err(|cause| ResolveError::Exchange {
                    name: name.to_owned(),
                    cause,
                })?;
        Message::from_vec(&answer).map_err(|_| ResolveError::Malformed(name.to_owned()))
    }
}

/// RFC 8305 §3 names 50 ms between two machines on a network; a nameserver may have to ask further for AAAA.
const RESOLUTION_DELAY: Duration = Duration::from_millis(100);

/// Aliases followed across answers.
const LONGEST_CHAIN: usize = 8;

/// DNS flag day 2020: fits every path without fragments.
const EDNS_PAYLOAD: u16 = 1232;

enum Outcome {
    Addresses(Vec<IpAddr>),
    Alias(Name),
    Nothing,
}

/// Reads the records that belong to `asked`, through its aliases; others in the answer are not believed.
fn read(answer: &Message, asked: &Name) -> Outcome {
    let mut name = asked;
    for _ in 0..=answer.answers.len() {
        let own = answer.answers.iter().filter(|record| record.name == *name);
        let addresses: Vec<IpAddr> = own
            .clone()
            .filter_map(|record| address(&record.data))
            .collect();
        if !addresses.is_empty() {
            return Outcome::Addresses(addresses);
        }
        match own.filter_map(|record| alias(&record.data)).next() {
            Some(target) => name = target,
            None => break,
        }
    }
    if name == asked {
        Outcome::Nothing
    } else {
        Outcome::Alias(name.clone())
    }
}

fn alias(data: &RData) -> Option<&Name> {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "another crate's open list of record types"
    )]
    match data {
        RData::CNAME(target) => Some(&target.0),
        _ => None,
    }
}

fn nothing(name: &str, code: ResponseCode) -> ResolveError {
    let name = name.to_owned();
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "another crate's open list of response codes"
    )]
    match code {
        ResponseCode::NXDomain => ResolveError::NoSuchName(name),
        ResponseCode::NoError => ResolveError::NoAddress(name),
        code => ResolveError::Failed { name, code },
    }
}

/// Of two failures the one that says more: a broken nameserver before a name without address before no such name.
fn clearer(a: ResolveError, b: ResolveError) -> ResolveError {
    let rank = |error: &ResolveError| match error {
        ResolveError::NoSuchName(_) => 0,
        ResolveError::NoAddress(_) => 1,
        ResolveError::Failed { .. }
        | ResolveError::Exchange { .. }
        | ResolveError::Malformed(_) => 2,
    };
    if rank(&b) > rank(&a) { b } else { a }
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::{A, AAAA, CNAME};
    use tokio::net::UdpSocket;

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_str(text).unwrap()
    }

    fn zone(asked: &Name, family: RecordType) -> (ResponseCode, Vec<Record>) {
        let record = |owner: &str, data| Record::from_rdata(name(owner), 5, data);
        let a = |text: &str| RData::A(A(text.parse().unwrap()));
        let cname = |target: &str| RData::CNAME(CNAME(name(target)));
        match (asked.to_string().as_str(), family) {
            ("web.shop.svc.cluster.local.", RecordType::A) => (
                ResponseCode::NoError,
                vec![record("WEB.shop.svc.cluster.local.", a("10.96.1.1"))],
            ),
            ("web.shop.svc.cluster.local.", _) => (ResponseCode::NoError, vec![]),
            ("dual.shop.svc.cluster.local.", RecordType::A) => (
                ResponseCode::NoError,
                vec![record("dual.shop.svc.cluster.local.", a("10.96.1.2"))],
            ),
            ("dual.shop.svc.cluster.local.", _) => (
                ResponseCode::NoError,
                vec![record(
                    "dual.shop.svc.cluster.local.",
                    RData::AAAA(AAAA("fd00::2".parse().unwrap())),
                )],
            ),
            ("ext.shop.svc.cluster.local.", RecordType::A) => (
                ResponseCode::NoError,
                vec![
                    record("ext.shop.svc.cluster.local.", cname("db.example.")),
                    record("db.example.", cname("real.example.")),
                    record("real.example.", a("192.0.2.7")),
                    record("liar.example.", a("127.0.0.1")),
                ],
            ),
            ("half.shop.svc.cluster.local.", RecordType::A) => (
                ResponseCode::NoError,
                vec![record(
                    "half.shop.svc.cluster.local.",
                    cname("web.shop.svc.cluster.local."),
                )],
            ),
            ("loop.shop.svc.cluster.local.", _) => (
                ResponseCode::NoError,
                vec![record(
                    "loop.shop.svc.cluster.local.",
                    cname("loop.shop.svc.cluster.local."),
                )],
            ),
            ("broken.shop.svc.cluster.local.", _) => (ResponseCode::ServFail, vec![]),
            ("half.shop.svc.cluster.local.", _) | ("ext.shop.svc.cluster.local.", _) => {
                (ResponseCode::NoError, vec![])
            }
            _ => (ResponseCode::NXDomain, vec![]),
        }
    }

    /// A nameserver for [`zone`] and a resolver in a pod of another namespace.
    async fn resolver() -> Resolver {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut conf = ResolvConf::parse(
            "search tp-system.svc.cluster.local svc.cluster.local\noptions ndots:5",
        );
        conf.nameservers.push(socket.local_addr().unwrap());
        conf.timeout = Duration::from_millis(300);
        tokio::spawn(async move {
            let mut buffer = [0; 2048];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
                let query = Message::from_vec(&buffer[..length]).unwrap();
                let (code, answers) = zone(&query.queries[0].name, query.queries[0].query_type);
                let mut reply = query.into_response();
                reply.metadata.response_code = code;
                reply.add_answers(answers);
                socket
                    .send_to(&reply.to_vec().unwrap(), peer)
                    .await
                    .unwrap();
            }
        });
        Resolver::new(conf, None)
    }

    #[tokio::test]
    async fn a_short_name_is_found_in_the_sessions_namespace_only() {
        let resolver = resolver().await;

        let resolved = resolver.lookup("web", Some("shop")).await.unwrap();

        assert_eq!(resolved.name, "web.shop.svc.cluster.local");
        assert_eq!(resolved.addresses, ["10.96.1.1".parse::<IpAddr>().unwrap()]);
        let elsewhere = resolver.lookup("web", Some("bank")).await;
        assert!(matches!(elsewhere, Err(ResolveError::NoSuchName(name)) if name == "web"));
        assert!(resolver.lookup("web.shop", Some("bank")).await.is_ok());
        assert!(
            resolver
                .lookup("web.shop.svc.cluster.local", Some("bank"))
                .await
                .is_ok()
        );
    }

    #[tokio::test]
    async fn the_whole_search_list_is_asked_at_once_and_its_first_hit_counts() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut conf = ResolvConf::parse("search a b\noptions ndots:5");
        conf.nameservers.push(socket.local_addr().unwrap());
        let answering = tokio::spawn(async move {
            let mut queries = Vec::new();
            // Two families of three names, and no answer before the last of them has come.
            for _ in 0..6 {
                let mut buffer = [0; 2048];
                let (length, peer) = socket.recv_from(&mut buffer).await.unwrap();
                queries.push((Message::from_vec(&buffer[..length]).unwrap(), peer));
            }
            for (query, peer) in queries {
                let name = query.queries[0].name.clone();
                let mut reply = query.into_response();
                // Both `web.x.b` and `web.x` exist.
                if name == self::name("web.x.a.") {
                    reply.metadata.response_code = ResponseCode::NXDomain;
                } else {
                    let address = RData::A(A("10.0.0.2".parse().unwrap()));
                    reply.add_answer(Record::from_rdata(name, 5, address));
                }
                let reply = reply.to_vec().unwrap();
                socket.send_to(&reply, peer).await.unwrap();
            }
        });

        let resolved = Resolver::new(conf, None)
            .lookup("web.x", None)
            .await
            .unwrap();

        assert_eq!(resolved.name, "web.x.b");
        answering.await.unwrap();
    }

    #[tokio::test]
    async fn both_families_come_back_ipv4_first() {
        let resolved = resolver().await.lookup("dual", Some("shop")).await.unwrap();

        let expected: [IpAddr; 2] = ["10.96.1.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        assert_eq!(resolved.addresses, expected);
    }

    #[tokio::test]
    async fn aliases_are_followed_and_strangers_not_believed() {
        let resolver = resolver().await;

        let external = resolver.lookup("ext", Some("shop")).await.unwrap();
        assert_eq!(external.name, "ext.shop.svc.cluster.local");
        assert_eq!(external.addresses, ["192.0.2.7".parse::<IpAddr>().unwrap()]);

        let unfinished = resolver.lookup("half", Some("shop")).await.unwrap();
        assert_eq!(
            unfinished.addresses,
            ["10.96.1.1".parse::<IpAddr>().unwrap()]
        );

        assert!(resolver.lookup("loop", Some("shop")).await.is_err());
    }

    #[tokio::test]
    async fn a_failing_nameserver_is_not_taken_for_an_unknown_name() {
        let outcome = resolver().await.lookup("broken", Some("shop")).await;

        assert!(matches!(
            outcome,
            Err(ResolveError::Failed {
                code: ResponseCode::ServFail,
                ..
            })
        ));
    }

    #[tokio::test]
    async fn the_hosts_file_goes_first() {
        let file = std::env::temp_dir().join(format!("tp-hosts-{}", std::process::id()));
        std::fs::write(&file, "10.9.9.9 web\n").unwrap();
        let resolver = Resolver::new(ResolvConf::default(), Some(file.clone()));

        let resolved = resolver.lookup("web", None).await.unwrap();

        std::fs::remove_file(file).unwrap();
        assert_eq!(resolved.addresses, ["10.9.9.9".parse::<IpAddr>().unwrap()]);
    }
}
