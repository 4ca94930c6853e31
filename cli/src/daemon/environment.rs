//! The variables that make programs use the proxy.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::parameters::ProxyCredentials;
use super::status::ProxyStatus;

/// What never goes through a proxy: it is this machine.
const LOOPBACK: [&str; 4] = ["localhost", "127.0.0.1", "127.0.0.0/8", "::1"];

/// The proxy's addresses as they are shown; no password in them.
pub fn shown(address: SocketAddr) -> ProxyStatus {
    let reached = reached_at(address);
    ProxyStatus {
        address: reached.to_string(),
        socks: format!("socks5h://{reached}"),
        http: format!("http://{reached}"),
        pac: format!("http://{reached}/proxy.pac"),
    }
}

/// Names and values, in both spellings that programs look for. They hold the password where there is one.
pub fn variables(
    address: SocketAddr,
    credentials: Option<&ProxyCredentials>,
    never: &[String],
) -> Vec<(String, String)> {
    let reached = reached_at(address);
    let login = credentials.map(login).unwrap_or_default();
    let socks = format!("socks5h://{login}{reached}");
    let http = format!("http://{login}{reached}");
    let table = [
        ("ALL_PROXY", &socks),
        ("HTTP_PROXY", &http),
        ("HTTPS_PROXY", &http),
        ("NO_PROXY", &no_proxy(never)),
    ];
    let both = |(name, value): (&str, &String)| {
        [
            (name.to_owned(), value.clone()),
            (name.to_lowercase(), value.clone()),
        ]
    };
    table.into_iter().flat_map(both).collect()
}

/// An unspecified address is where to listen, not where to connect.
fn reached_at(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V4(_) | IpAddr::V6(_) => address.ip(),
    };
    SocketAddr::new(ip, address.port())
}

/// Programs write "everything below" with a leading dot.
fn no_proxy(never: &[String]) -> String {
    let rules = never
        .iter()
        .map(|rule| rule.strip_prefix('*').unwrap_or(rule));
    LOOPBACK
        .into_iter()
        .chain(rules)
        .collect::<Vec<_>>()
        .join(",")
}

fn login(credentials: &ProxyCredentials) -> String {
    let user = percent_encoded(&credentials.user);
    let password = percent_encoded(credentials.password.reveal());
    format!("{user}:{password}@")
}

/// All but RFC 3986's unreserved characters.
fn percent_encoded(text: &str) -> String {
    let encoded = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(byte).to_string()
        }
        byte => format!("%{byte:02X}"),
    };
    text.bytes().map(encoded).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(variables: &[(String, String)], name: &str) -> String {
        variables.iter().find(|(n, _)| n == name).unwrap().1.clone()
    }

    #[test]
    fn both_spellings_name_the_proxy_and_leave_loopback_out() {
        let variables = variables(
            "127.0.0.1:1080".parse().unwrap(),
            None,
            &["*.lan".into(), "10.0.0.0/8".into()],
        );

        for name in ["ALL_PROXY", "all_proxy"] {
            assert_eq!(value(&variables, name), "socks5h://127.0.0.1:1080");
        }
        assert_eq!(value(&variables, "https_proxy"), "http://127.0.0.1:1080");
        assert_eq!(
            value(&variables, "no_proxy"),
            "localhost,127.0.0.1,127.0.0.0/8,::1,.lan,10.0.0.0/8"
        );
    }

    #[test]
    fn a_login_is_encoded_and_an_unspecified_address_is_loopback() {
        let credentials = ProxyCredentials {
            user: "a@b".into(),
            password: "p:/ ".into(),
        };

        let variables = variables("0.0.0.0:9".parse().unwrap(), Some(&credentials), &[]);

        assert_eq!(
            value(&variables, "HTTP_PROXY"),
            "http://a%40b:p%3A%2F%20@127.0.0.1:9"
        );
        assert_eq!(shown("[::]:9".parse().unwrap()).socks, "socks5h://[::1]:9");
    }
}
