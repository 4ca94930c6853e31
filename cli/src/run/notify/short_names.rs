//! Names as a pod may write them, for a program that has the workstation's resolver configuration and so its search
//! list: `web` and `web.shop` arrive as they were typed, and are completed here as a pod's resolver would.

use std::str::FromStr as _;

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::CNAME;
use hickory_proto::rr::{Name, RData, Record};
use tp_tunnel::Host;

use crate::proxy::Split;
use crate::proxy::split::Route;
use crate::run::dial::Dialer;
use crate::run::dns::{self, Names, Transport};

/// Seconds. A Service of that name may come at any time.
const TTL: u32 = 5;

/// Answers a question in wire format, as [`dns::answer`] does.
pub(super) async fn answer(
    dialer: &Dialer,
    names: &Names,
    namespace: Option<&str>,
    query: &[u8],
    over: Transport,
) -> Vec<u8> {
    let asked = match Message::from_vec(query) {
        Ok(asked) if asked.metadata.message_type == MessageType::Query => asked,
        Ok(_) | Err(_) => return dns::answer(dialer, names, query, over).await,
    };
    let split = dialer.split();
    let candidates = asked
        .queries
        .first()
        .map(|question| full_names(&split, namespace, &question.name))
        .unwrap_or_default();
    if candidates.is_empty() {
        return dns::answer(dialer, names, query, over).await;
    }
    let mut last = None;
    for name in candidates {
        let Some(answer) = ask(dialer, names, &asked, &name).await else {
            break;
        };
        let exists = answer.metadata.response_code == ResponseCode::NoError;
        last = Some(renamed(&asked, &name, answer));
        if exists {
            break;
        }
    }
    let answer = last.and_then(|answer| answer.to_vec().ok());
    let answer = answer.unwrap_or_else(|| dns::refusal(query, ResponseCode::ServFail));
    match over {
        Transport::Udp => dns::cut(answer, asked.max_payload()),
        Transport::Tcp => answer,
    }
}

/// What a pod's search list makes of a name; nothing where the name is not a short one of the cluster's.
fn full_names(split: &Split, namespace: Option<&str>, name: &Name) -> Vec<Name> {
    let view = split.view();
    let text = name.to_ascii();
    let Ok(host @ Host::Name(_)) = Host::parse(text.trim_end_matches('.')) else {
        return Vec::new();
    };
    let short = host.to_string();
    let namespace = namespace.unwrap_or(&view.namespace);
    let beside = Host::parse(&format!("{short}.{namespace}"));
    let is_ours = |host: &Host| split.route(host) == Route::Cluster;
    let is_full = short == view.domain || short.ends_with(&format!(".{}", view.domain));
    if view.domain.is_empty() || is_full || !(is_ours(&host) || beside.is_ok_and(|b| is_ours(&b))) {
        return Vec::new();
    }
    let domain = &view.domain;
    let search = [
        format!("{namespace}.svc.{domain}."),
        format!("svc.{domain}."),
        format!("{domain}."),
    ];
    let completed = search
        .iter()
        .filter_map(|suffix| Name::from_str(&format!("{short}.{suffix}")).ok());
    // As it is, in the end: a private zone that the cluster resolves.
    completed.chain([name.clone()]).collect()
}

async fn ask(dialer: &Dialer, names: &Names, asked: &Message, name: &Name) -> Option<Message> {
    let mut full = asked.clone();
    full.queries.first_mut()?.name = name.clone();
    let query = full.to_vec().ok()?;
    let answer = dns::answer(dialer, names, &query, Transport::Tcp).await;
    Message::from_vec(&answer).ok()
}

/// The answer to the question that was asked: the short name is an alias of the full one.
fn renamed(asked: &Message, name: &Name, mut answer: Message) -> Message {
    let Some(question) = asked.queries.first() else {
        return answer;
    };
    if question.name == *name {
        return answer;
    }
    let exists = answer.metadata.response_code == ResponseCode::NoError;
    if exists && !answer.answers.is_empty() {
        let alias = RData::CNAME(CNAME(name.clone()));
        let alias = Record::from_rdata(question.name.clone(), TTL, alias);
        answer.answers.insert(0, alias);
    }
    answer.queries = asked.queries.clone();
    answer
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{OpCode, Query};
    use hickory_proto::rr::RecordType;
    use hickory_proto::rr::rdata::A;
    use tp_manager_api::ClusterView;

    use super::*;
    use crate::proxy::UserRules;

    fn split() -> Split {
        let view = ClusterView {
            namespace: "shop".into(),
            domain: "cluster.local".into(),
            services: [
                ("shop".to_owned(), vec!["web".to_owned()]),
                ("dev".to_owned(), vec!["api".to_owned()]),
            ]
            .into(),
            suffixes: vec!["corp.internal".into()],
            ..ClusterView::default()
        };
        Split::new(view, UserRules::default())
    }

    fn full(namespace: Option<&str>, name: &str) -> Vec<String> {
        let name = Name::from_str(name).unwrap();
        let names = full_names(&split(), namespace, &name);
        names.iter().map(Name::to_ascii).collect()
    }

    #[test]
    fn short_names_are_completed_as_in_a_pod_of_the_namespace() {
        assert_eq!(
            full(None, "web."),
            [
                "web.shop.svc.cluster.local.",
                "web.svc.cluster.local.",
                "web.cluster.local.",
                "web."
            ]
        );
        assert_eq!(full(None, "api.dev.")[1], "api.dev.svc.cluster.local.");
        assert_eq!(full(Some("dev"), "api.")[0], "api.dev.svc.cluster.local.");
        assert_eq!(
            full(None, "git.corp.internal.").last().unwrap(),
            "git.corp.internal."
        );
    }

    #[test]
    fn full_names_and_names_of_others_stay_as_they_are() {
        for name in [
            "web.shop.svc.cluster.local.",
            "cluster.local.",
            "api.",
            "example.com.",
            "1.0.96.10.in-addr.arpa.",
            ".",
        ] {
            assert!(full(None, name).is_empty(), "{name}");
        }
    }

    #[test]
    fn the_answer_is_to_the_question_as_it_was_asked() {
        let (short, long) = (
            Name::from_str("web.").unwrap(),
            Name::from_str("web.shop.svc.cluster.local.").unwrap(),
        );
        let mut asked = Message::new(7, MessageType::Query, OpCode::Query);
        asked.add_query(Query::query(short.clone(), RecordType::A));
        let mut answer = Message::response(7, OpCode::Query);
        answer.add_query(Query::query(long.clone(), RecordType::A));
        answer.add_answer(Record::from_rdata(
            long.clone(),
            5,
            RData::A(A("10.96.0.9".parse().unwrap())),
        ));

        let renamed = renamed(&asked, &long, answer);

        assert_eq!(renamed.queries[0].name, short);
        assert_eq!(renamed.answers[0].name, short);
        assert_eq!(renamed.answers[0].data, RData::CNAME(CNAME(long.clone())));
        assert_eq!(renamed.answers[1].name, long);
    }
}
