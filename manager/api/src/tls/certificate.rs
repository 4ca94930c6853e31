//! What of a certificate matters here and rustls does not say: when it holds, and for which names (RFC 5280 §4.1).
//!
//! A reader of DER (X.690 §8, §10) for exactly these two questions. Whatever it does not understand is `None`.

use jiff::Timestamp;
use jiff::civil::DateTime;

const BOOLEAN: u8 = 0x01;
const INTEGER: u8 = 0x02;
const OCTETS: u8 = 0x04;
const OBJECT: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
/// `[0]` of the version.
const VERSION: u8 = 0xa0;
/// `[3]` of the extensions.
const EXTENSIONS: u8 = 0xa3;
/// `dNSName` of a `GeneralName`.
const DNS_NAME: u8 = 0x82;

/// 2.5.29.17.
const SUBJECT_ALTERNATIVE_NAME: &[u8] = &[0x55, 0x1d, 0x11];

/// The first and the last moment at which it holds.
pub(super) fn validity(certificate: &[u8]) -> Option<(Timestamp, Timestamp)> {
    let (times, _) = of(SEQUENCE, from_validity(certificate)?)?;
    let (begin, rest) = time(times)?;
    let (end, _) = time(rest)?;
    Some((begin, end))
}

/// Its DNS names, in their order; wildcards as they are.
pub(super) fn names(certificate: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    let mut rest = alternative_names(certificate).unwrap_or_default();
    while let Some((tag, name, further)) = element(rest) {
        rest = further;
        if let (DNS_NAME, Ok(name)) = (tag, std::str::from_utf8(name)) {
            names.push(name.to_owned());
        }
    }
    names
}

/// The fields of `TBSCertificate` from `validity` on.
fn from_validity(certificate: &[u8]) -> Option<&[u8]> {
    let (certificate, _) = of(SEQUENCE, certificate)?;
    let (mut fields, _) = of(SEQUENCE, certificate)?;
    if let Some((_, rest)) = of(VERSION, fields) {
        fields = rest;
    }
    // Serial number, signature, issuer.
    for tag in [INTEGER, SEQUENCE, SEQUENCE] {
        fields = of(tag, fields)?.1;
    }
    Some(fields)
}

fn alternative_names(certificate: &[u8]) -> Option<&[u8]> {
    let mut fields = from_validity(certificate)?;
    let extensions = loop {
        let (tag, value, rest) = element(fields)?;
        if tag == EXTENSIONS {
            break value;
        }
        fields = rest;
    };
    let (mut extensions, _) = of(SEQUENCE, extensions)?;
    loop {
        let (extension, rest) = of(SEQUENCE, extensions)?;
        extensions = rest;
        let (kind, value) = of(OBJECT, extension)?;
        if kind == SUBJECT_ALTERNATIVE_NAME {
            let value = of(BOOLEAN, value).map_or(value, |(_critical, value)| value);
            let (value, _) = of(OCTETS, value)?;
            return Some(of(SEQUENCE, value)?.0);
        }
    }
}

/// `UTCTime` or `GeneralizedTime`, both to the second and in UTC (RFC 5280 §4.1.2.5).
fn time(bytes: &[u8]) -> Option<(Timestamp, &[u8])> {
    let (tag, text, rest) = element(bytes)?;
    let text = std::str::from_utf8(text).ok()?;
    let text = match tag {
        UTC_TIME => {
            let year: u8 = text.get(..2)?.parse().ok()?;
            let century = if year >= 50 { "19" } else { "20" };
            format!("{century}{text}")
        }
        GENERALIZED_TIME => text.to_owned(),
        _ => return None,
    };
    let time = DateTime::strptime("%Y%m%d%H%M%SZ", &text).ok()?;
    let time = time.to_zoned(jiff::tz::TimeZone::UTC).ok()?;
    Some((time.timestamp(), rest))
}

/// The value of an element with this tag, and what follows it.
fn of(tag: u8, bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (found, value, rest) = element(bytes)?;
    (found == tag).then_some((value, rest))
}

/// Tag and value of an element, and what follows it.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], rest) = bytes.split_first_chunk::<2>()?;
    let (size, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x83 => {
            let (size, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            let size = size
                .iter()
                .fold(0, |size, byte| size << 8 | usize::from(*byte));
            (size, rest)
        }
        _ => return None,
    };
    let (value, rest) = rest.split_at_checked(size)?;
    Some((tag, value, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    fn certificate(from: i32, to: i32, names: &[&str]) -> Vec<u8> {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.not_before = date_time_ymd(from, 2, 3);
        params.not_after = date_time_ymd(to, 4, 5);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn dates_and_names_are_read_on_both_sides_of_2050() {
        for (from, to) in [(1999, 2026), (2026, 2049), (2049, 2050), (2050, 2199)] {
            let certificate = certificate(from, to, &["web.shop", "10.0.0.1", "*.shop.svc"]);
            let (begin, end) = validity(&certificate).unwrap();
            assert_eq!(begin.to_string(), format!("{from}-02-03T00:00:00Z"));
            assert_eq!(end.to_string(), format!("{to}-04-05T00:00:00Z"));
            assert_eq!(names(&certificate), ["web.shop", "*.shop.svc"]);
        }
    }

    #[test]
    fn a_certificate_that_is_cut_off_anywhere_says_nothing() {
        let whole = certificate(2020, 2030, &["web"]);
        for end in 0..whole.len() {
            assert_eq!(validity(&whole[..end]), None, "{end}");
            assert!(names(&whole[..end]).is_empty(), "{end}");
        }
        assert!(names(&certificate(2020, 2030, &[])).is_empty());
    }
}
