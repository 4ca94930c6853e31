//! DNS messages of a workstation: whatever the bytes, an answer with the query's id, and no panic.

#![no_main]

// By path: the package `tp-manager` pulls in Kubernetes, which takes minutes to build with a sanitizer.
#[path = "../../manager/src/dial/message.rs"]
#[allow(dead_code, reason = "not all of it reads bytes")]
mod message;

use hickory_proto::op::Message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // The same bytes as an answer: nameservers are not trusted either.
    let _ = message::addresses(bytes);
    match message::inspect(bytes) {
        Ok(query) => assert_eq!(query.queries.len(), 1),
        Err(refusal) => {
            let refusal = Message::from_vec(&refusal).expect("a refusal is a message");
            let id = bytes.first_chunk().map_or(0, |id| u16::from_be_bytes(*id));
            assert_eq!(refusal.metadata.id, id);
        }
    }
});
