//! What a DNS message of a stranger may be, and what an answer says about addresses.
//!
//! Pure, and without the rest of the crate, so that it can be fuzzed alone.

use std::net::IpAddr;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{Name, RData};

/// The query, if it is one with one question; otherwise the answer that refuses it.
pub fn inspect(query: &[u8]) -> Result<Message, Vec<u8>> {
    let message = Message::from_vec(query).map_err(|_| refusal(query, ResponseCode::FormErr))?;
    let one_question = message.queries.len() == 1 && question_end(query).is_some();
    if message.metadata.message_type != MessageType::Query || !one_question {
        return Err(refusal(query, ResponseCode::FormErr));
    }
    if message.metadata.op_code != OpCode::Query {
        return Err(refusal(query, ResponseCode::NotImp));
    }
    Ok(message)
}

/// A bare header with the query's id, whatever else the query holds.
pub fn refusal(query: &[u8], code: ResponseCode) -> Vec<u8> {
    let id = query.first_chunk().map_or(0, |id| u16::from_be_bytes(*id));
    let mut message = Message::error_msg(id, OpCode::Query, code);
    message.metadata.recursion_available = true;
    message
        .to_vec()
        .expect("a header alone can always be written")
}

/// What an answer to an address question holds: the question's name and the addresses, aliases followed by whoever
/// made it.
pub fn addresses(answer: &[u8]) -> Option<(String, Vec<IpAddr>)> {
    let message = Message::from_vec(answer).ok()?;
    let addresses: Vec<IpAddr> = message
        .answers
        .iter()
        .filter_map(|record| address(&record.data))
        .collect();
    let name = host_name(&message.queries.first()?.name);
    (!addresses.is_empty()).then_some((name, addresses))
}

/// A name as everything else here writes it: lower case, without a dot at its end.
pub fn host_name(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}

/// The address in a record, if it is of the two kinds that hold one.
pub fn address(data: &RData) -> Option<IpAddr> {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "another crate's open list of record types"
    )]
    match data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
        _ => None,
    }
}

/// Bytes of a message before its first question.
pub const HEADER: usize = 12;

/// Where the first question ends; `None` when it does not or its name is compressed, which in a query has no sense.
pub fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        match usize::from(*message.get(at)?) {
            0 => break,
            length @ 1..=63 => at += 1 + length,
            _ => return None,
        }
    }
    let end = at + 1 + 4;
    (end <= message.len() && at - HEADER < 255).then_some(end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn reading_never_panics_and_a_refusal_is_a_message(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = addresses(&bytes);
            if let Err(refusal) = inspect(&bytes) {
                prop_assert!(Message::from_vec(&refusal).is_ok());
            }
        }
    }
}
