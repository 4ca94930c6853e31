//! Lists of named values: the query, cookies, `baggage` and `tracestate`.

use std::borrow::Cow;

use percent_encoding::percent_decode;

/// `a=b&c=d`, decoded as forms are: `+` is a space.
pub(super) fn query(query: &[u8]) -> impl Iterator<Item = (Cow<'_, [u8]>, Cow<'_, [u8]>)> {
    query
        .split(|byte| *byte == b'&')
        .map(pair)
        .map(|(name, value)| (form_decoded(name), form_decoded(value)))
}

/// `a=b; c=d` (RFC 6265 §4.2.1).
pub(super) fn cookies(header: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    header
        .split(|byte| *byte == b';')
        .map(|member| pair(member.trim_ascii()))
}

/// `a=b;property,c=d` (W3C Baggage §3.2).
pub(super) fn baggage(header: &[u8]) -> impl Iterator<Item = (&[u8], Cow<'_, [u8]>)> {
    header.split(|byte| *byte == b',').map(|member| {
        let end = member.iter().position(|byte| *byte == b';');
        let (name, value) = pair(&member[..end.unwrap_or(member.len())]);
        (name.trim_ascii(), percent_decode(value.trim_ascii()).into())
    })
}

/// `a=b,c=d` (W3C Trace Context §3.3).
pub(super) fn tracestate(header: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    header
        .split(|byte| *byte == b',')
        .map(|member| pair(member.trim_ascii()))
}

fn pair(member: &[u8]) -> (&[u8], &[u8]) {
    match member.iter().position(|byte| *byte == b'=') {
        Some(at) => (&member[..at], &member[at + 1..]),
        None => (member, b""),
    }
}

fn form_decoded(text: &[u8]) -> Cow<'_, [u8]> {
    match text.contains(&b'+') {
        false => percent_decode(text).into(),
        true => {
            let spaced: Vec<u8> = text
                .iter()
                .map(|byte| if *byte == b'+' { b' ' } else { *byte })
                .collect();
            Cow::Owned(percent_decode(&spaced).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_split_and_decoded_as_their_standards_say() {
        let query: Vec<_> = query(b"a=1&b=x%20y+z&c&=").collect();
        let names: Vec<_> = query.iter().map(|(name, _)| name.as_ref()).collect();
        assert_eq!(names, [&b"a"[..], b"b", b"c", b""]);
        assert_eq!(query[1].1.as_ref(), b"x y z");
        let cookies: Vec<_> = cookies(b"a=1; b=\"2=3\";c").collect();
        assert_eq!(
            cookies,
            [(&b"a"[..], &b"1"[..]), (b"b", b"\"2=3\""), (b"c", b"")]
        );
        let baggage: Vec<_> = baggage(b"user = a%2Cb ;p=1, x=y").collect();
        assert_eq!(baggage[0].0, b"user");
        assert_eq!(baggage[0].1.as_ref(), b"a,b");
        assert_eq!(baggage[1].1.as_ref(), b"y");
        let state: Vec<_> = tracestate(b"tp=ada , v@x=1").collect();
        assert_eq!(state[0], (&b"tp"[..], &b"ada"[..]));
    }
}
