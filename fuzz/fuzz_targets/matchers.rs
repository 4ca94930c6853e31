//! Matchers of an intercept against a request: the router's answer is the explanation's, and no panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tp_manager_api::matcher::graphql::Operation;
use tp_manager_api::matcher::{Matchers, Outcome, RequestHead, Verdict};

/// Lines of input: the matchers as JSON, method, target, then one field a line, then a body.
fn parts(input: &[u8]) -> Option<(&str, &str, &[u8], Vec<(&[u8], &[u8])>, &[u8])> {
    let mut lines = input.splitn(4, |byte| *byte == b'\n');
    let json = std::str::from_utf8(lines.next()?).ok()?;
    let method = std::str::from_utf8(lines.next()?).ok()?;
    let (target, rest) = (lines.next()?, lines.next()?);
    let end = rest.windows(2).position(|two| two == b"\n\n").unwrap_or(rest.len());
    let fields = rest[..end]
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let colon = line.iter().position(|byte| *byte == b':')?;
            Some((&line[..colon], &line[colon + 1..]))
        })
        .collect();
    Some((json, method, target, fields, &rest[end..]))
}

fuzz_target!(|input: &[u8]| {
    let Some((json, method, target, fields, body)) = parts(input) else {
        return;
    };
    let operation = Operation::of_body(body);
    let Ok(matchers) = serde_json::from_str::<Matchers>(json) else {
        return;
    };
    let head = RequestHead::new(method, target, fields);
    for body in [None, Some(&operation)] {
        let verdict = matchers.matches(&head, body);
        let outcomes: Vec<_> = matchers.explain(&head, body).iter().map(|f| f.outcome).collect();
        assert_eq!(verdict == Verdict::Mine, outcomes.iter().all(|o| *o == Outcome::Matches));
        assert!(verdict != Verdict::NeedsBody || (body.is_none() && outcomes.contains(&Outcome::NeedsBody)));
    }
    let again: Matchers = serde_json::from_str(&matchers.canonical()).expect("its own JSON");
    assert_eq!(again, matchers);
});
