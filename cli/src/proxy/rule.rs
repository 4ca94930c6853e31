//! One value of `--also-proxy` or `--never-proxy`: a range, an address, a host or everything below a suffix.
//!
//! Knows nothing of the cluster; whether a rule sends to it or keeps from it is the list's business that holds it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use tp_tunnel::Host;

/// What a user may name on the command line. `Display` and `FromStr` are each other's inverse.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Addresses of a range; a single address is a range of one.
    Range(IpNet),
    /// Exactly this host name.
    Name(String),
    /// Every name below this one (`*.corp.example`), but not the name itself. Kept without `*.`.
    Below(String),
}

/// Why a text is no rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither a CIDR range, an address, a host name nor `*.suffix`")]
pub struct RuleError(String);

impl Rule {
    /// Whether this rule names `host`.
    pub fn matches(&self, host: &Host) -> bool {
        match (self, host) {
            (Self::Range(range), Host::Ip(address)) => range.contains(&address.to_canonical()),
            (Self::Name(rule), Host::Name(name)) => rule == name,
            (Self::Below(suffix), Host::Name(name)) => is_below(name, suffix),
            (Self::Range(_), Host::Name(_)) | (Self::Name(_) | Self::Below(_), Host::Ip(_)) => {
                false
            }
        }
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let text = text.trim();
        if let Ok(range) = text.parse::<IpNet>() {
            return Ok(Self::Range(canonical_range(range)));
        }
        if let Ok(address) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
            return Ok(Self::Range(IpNet::from(address.to_canonical())));
        }
        let name = |text: &str| match text.parse::<Host>() {
            Ok(Host::Name(name)) => Ok(name),
            Ok(Host::Ip(_)) | Err(_) => Err(RuleError(text.to_owned())),
        };
        match text.strip_prefix("*.") {
            Some(suffix) => name(suffix).map(Self::Below),
            None => name(text).map(Self::Name),
        }
        .map_err(|_| RuleError(text.to_owned()))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range(range) => range.fmt(f),
            Self::Name(name) => f.write_str(name),
            Self::Below(suffix) => write!(f, "*.{suffix}"),
        }
    }
}

/// Whether `name` lies below `suffix`, by whole labels.
pub(super) fn is_below(name: &str, suffix: &str) -> bool {
    !suffix.is_empty()
        && name
            .strip_suffix(suffix)
            .and_then(|rest| rest.strip_suffix('.'))
            .is_some_and(|rest| !rest.is_empty())
}

/// `::ffff:10.0.0.0/104` is `10.0.0.0/8`: addresses are compared in their IPv4 form.
fn canonical_range(range: IpNet) -> IpNet {
    match (range.network().to_canonical(), range.prefix_len()) {
        (IpAddr::V4(network), 96..=128) if matches!(range, IpNet::V6(_)) => {
            IpNet::new(IpAddr::V4(network), range.prefix_len() - 96).unwrap_or(range)
        }
        _ => range.trunc(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_rule_is_read_and_written_back() {
        let table = [
            ("10.1.2.3/16", "10.1.0.0/16"),
            ("10.1.2.3", "10.1.2.3/32"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("fd00::/8", "fd00::/8"),
            ("[fd00::1]", "fd00::1/128"),
            ("Db.Example", "db.example"),
            ("*.corp.example.", "*.corp.example"),
        ];
        for (text, canonical) in table {
            let rule: Rule = text.parse().unwrap();
            assert_eq!(rule.to_string(), canonical, "{text}");
            assert_eq!(rule.to_string().parse::<Rule>().unwrap(), rule);
        }
    }

    #[test]
    fn what_is_no_rule_is_named() {
        for text in [
            "",
            "*",
            "*.",
            "10.0.0.0/33",
            "a b",
            "*.*.x",
            "*.10.0.0.1",
            "http://x",
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn a_suffix_matches_whole_labels_below_it_only() {
        let rule: Rule = "*.corp".parse().unwrap();
        for (name, expected) in [
            ("a.corp", true),
            ("a.b.corp", true),
            ("corp", false),
            ("xcorp", false),
        ] {
            assert_eq!(rule.matches(&Host::Name(name.into())), expected, "{name}");
        }
    }
}
