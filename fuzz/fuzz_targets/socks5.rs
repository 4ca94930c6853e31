//! SOCKS5 handshakes and datagram headers: no panic, nothing used that is not there, and a message that was read from
//! a prefix is the same message in the whole.

#![no_main]

// By path: the package `tp` pulls in Kubernetes, which takes minutes to build with a sanitizer.
#[path = "../../cli/src/proxy/socks5/codec.rs"]
#[allow(dead_code, reason = "the replies are not fuzzed")]
mod codec;

use libfuzzer_sys::fuzz_target;

/// Longest message of the protocol: a login with two fields of 255 bytes.
const MESSAGE_MAX: usize = 513;

fuzz_target!(|data: &[u8]| {
    check(data, codec::parse_greeting);
    check(data, codec::parse_login);
    check(data, codec::parse_request);
    if let Some(header) = codec::parse_datagram(data) {
        assert!(header.length <= data.len());
        assert_ne!(header.target.port, 0);
    }
    if let Err(refusal) = codec::parse_request(data) {
        assert!(
            refusal.reply().get(1) != Some(&0),
            "a refusal never reads as success"
        );
    }
});

fn check<T: PartialEq>(data: &[u8], parse: impl Fn(&[u8]) -> codec::Parsed<T>) {
    match parse(data) {
        Ok(Some((message, used))) => {
            assert!(used <= data.len());
            let exact = parse(&data[..used]);
            assert!(
                matches!(exact, Ok(Some((again, length))) if again == message && length == used)
            );
        }
        Ok(None) => assert!(
            data.len() < MESSAGE_MAX,
            "waits for more than any message is long"
        ),
        Err(_) => {}
    }
}
