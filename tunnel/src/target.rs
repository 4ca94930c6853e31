//! Where a flow wants to go: a host and a port, as they appear in `:authority`.
//!
//! A name is validated and normalised here, once, so that every later stage compares and logs the same text. It knows
//! nothing of DNS or of which targets are allowed.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// A destination as the capture side saw it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// The name or address asked for.
    pub host: Host,
    /// The port; 0 is refused when parsing.
    pub port: u16,
}

/// A destination host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// A name in lower case without a trailing dot, at most 253 bytes of labels of letters, digits, `-` and `_`.
    Name(String),
    /// A literal address.
    Ip(IpAddr),
}

/// Why a text is not a target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseTargetError {
    /// The host part is neither an address nor a valid name.
    #[error("not a host name or address")]
    Host,
    /// The port is missing, zero or not a number up to 65535.
    #[error("not a port")]
    Port,
}

impl Target {
    /// A target from its parts.
    pub fn new(host: Host, port: u16) -> Self {
        Self { host, port }
    }
}

impl Host {
    /// A validated name, or an address when the text is one.
    pub fn parse(text: &str) -> Result<Self, ParseTargetError> {
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Ok(Self::Ip(ip));
        }
        let name = text.strip_suffix('.').unwrap_or(text);
        if !is_name(name) {
            return Err(ParseTargetError::Host);
        }
        Ok(Self::Name(name.to_ascii_lowercase()))
    }
}

/// RFC 1035 lengths; `_` is allowed because SRV-style names and some Services carry it. A last label of digits only
/// is refused: resolvers of other systems read such names as addresses (`0x7f.1`, `127.1`).
fn is_name(name: &str) -> bool {
    let label_ok = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let last = name.rsplit('.').next().unwrap_or_default();
    let numeric = last.bytes().all(|b| b.is_ascii_digit())
        || last
            .strip_prefix("0x")
            .is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
    name.len() <= 253 && !numeric && name.split('.').all(label_ok)
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Ip(ip) => ip.fmt(f),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]:{}", self.port),
            host @ (Host::Name(_) | Host::Ip(IpAddr::V4(_))) => write!(f, "{host}:{}", self.port),
        }
    }
}

impl FromStr for Host {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl FromStr for Target {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (host, port) = text.rsplit_once(':').ok_or(ParseTargetError::Port)?;
        let host = match host.strip_prefix('[') {
            Some(rest) => {
                let inside = rest.strip_suffix(']').ok_or(ParseTargetError::Host)?;
                Host::Ip(IpAddr::V6(
                    inside
                        .parse::<Ipv6Addr>()
                        .map_err(|_| ParseTargetError::Host)?,
                ))
            }
            None if host.contains(':') => return Err(ParseTargetError::Host),
            None => Host::parse(host)?,
        };
        Ok(Self {
            host,
            port: parse_port(port)?,
        })
    }
}

/// Digits only: `u16::from_str` alone would take `+80`.
pub(crate) fn parse_port(text: &str) -> Result<u16, ParseTargetError> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(port) if digits && port != 0 => Ok(port),
        Ok(_) | Err(_) => Err(ParseTargetError::Port),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_normalised() {
        let target: Target = "Web.Prod.SVC.cluster.local.:80".parse().unwrap();
        assert_eq!(target.to_string(), "web.prod.svc.cluster.local:80");
    }

    #[test]
    fn bad_texts_are_refused() {
        let long = format!("{}:80", "a.".repeat(127) + "aa");
        for text in [
            "",
            "web",
            "web:",
            ":80",
            "web:0",
            "web:65536",
            "web:+80",
            "we b:80",
            "::1:80",
            "[::1:80",
            "[1.2.3.4]:80",
            "-a:80",
            "a-:80",
            "a..b:80",
            ".:80",
            "127.1:80",
            "0x7f000001:80",
            "1.2.3.4.5:80",
            "a\u{e9}:80",
            "a/b:80",
            &long,
        ] {
            assert!(text.parse::<Target>().is_err(), "{text:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn authority_round_trips(host in prop_oneof![
            "[a-z_][a-z0-9_]{0,20}(\\.[a-z][a-z0-9]{0,20}){0,4}".prop_map(Host::Name),
            any::<IpAddr>().prop_map(Host::Ip),
        ], port in 1..=u16::MAX) {
            let target = Target::new(host, port);
            prop_assert_eq!(target.to_string().parse::<Target>(), Ok(target));
        }

        #[test]
        fn parsing_never_panics(text in ".{0,300}") {
            let _ = text.parse::<Target>();
        }
    }
}
