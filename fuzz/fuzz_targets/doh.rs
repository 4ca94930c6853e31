//! DNS messages of a workstation: whatever the bytes, an answer with the query's id, and no panic.
#![no_main]

use hickory_proto::op::Message;
use libfuzzer_sys::fuzz_target;
use tp_manager::dial::doh;

fuzz_target!(|bytes: &[u8]| {
    // The same bytes as an answer: nameservers are not trusted either.
    let _ = doh::addresses(bytes);
    match doh::inspect(bytes) {
        Ok(query) => assert_eq!(query.queries.len(), 1),
        Err(refusal) => {
            let refusal = Message::from_vec(&refusal).expect("a refusal is a message");
            let id = bytes.first_chunk().map_or(0, |id| u16::from_be_bytes(*id));
            assert_eq!(refusal.metadata.id, id);
        }
    }
});
