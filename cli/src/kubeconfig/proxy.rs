//! Which proxy, if any, stands between this machine and the API server.
//!
//! The kubeconfig's `proxy-url` always counts. Otherwise `HTTPS_PROXY` does, unless `NO_PROXY` holds the API server's
//! host or the server is on loopback; the same rules as kubectl's.

use std::net::IpAddr;

use http::Uri;
use ipnet::IpNet;
use kube::config::Cluster;

use crate::report::{Failure, OrFail};

/// The proxy for requests to `server`.
pub(super) fn of(cluster: &Cluster, server: &Uri) -> Result<Option<Uri>, Failure> {
    let from_file = cluster.proxy_url.clone().filter(|url| !url.is_empty());
    let from_env = || {
        let excepted = variable("NO_PROXY")
            .is_some_and(|list| excepts(&list, server.host().unwrap_or_default()));
        let name = if server.scheme_str() == Some("http") {
            "HTTP_PROXY"
        } else {
            "HTTPS_PROXY"
        };
        variable(name).filter(|_| !excepted && !is_loopback(server))
    };
    from_file
        .or_else(from_env)
        .map(|url| parse(&url))
        .transpose()
}

fn variable(name: &str) -> Option<String> {
    let read = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    read(name).or_else(|| read(&name.to_lowercase()))
}

/// Our client resolves names at the proxy in any case, which is what `socks5h` asks for.
fn parse(url: &str) -> Result<Uri, Failure> {
    let url = match url.strip_prefix("socks5h://") {
        Some(rest) => format!("socks5://{rest}"),
        None if url.contains("://") => url.to_owned(),
        None => format!("http://{url}"),
    };
    let parsed = url
        .parse::<Uri>()
        .or_fail(|| format!("the proxy `{url}` is not a URL"))?;
    match parsed.scheme_str() {
        Some("http" | "https" | "socks5") => Ok(parsed),
        _ => Err(Failure::new(format!("cannot use the proxy `{url}`"))
            .hint("it must be http, https or socks5")),
    }
}

fn is_loopback(server: &Uri) -> bool {
    let host = bare(server.host().unwrap_or_default());
    host == "localhost"
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// `NO_PROXY`: `*`, hosts, domains with or without a leading dot, addresses and ranges. Ports are not looked at.
fn excepts(list: &str, host: &str) -> bool {
    let host = bare(host).to_lowercase();
    let address: Option<IpAddr> = host.parse().ok();
    list.split(',')
        .map(str::trim)
        .filter(|entry| !entry.is_empty())
        .any(
            |entry| match (address, entry.parse::<IpNet>(), entry.parse::<IpAddr>()) {
                _ if entry == "*" => true,
                (Some(address), Ok(range), _) => range.contains(&address),
                (Some(address), _, Ok(same)) => address == same,
                (Some(_), ..) => false,
                (None, ..) => is_within(&host, entry),
            },
        )
}

fn is_within(host: &str, entry: &str) -> bool {
    let domain = entry.trim_start_matches('*').to_lowercase();
    let domain = domain.split(':').next().unwrap_or_default();
    match domain.strip_prefix('.') {
        Some(bare) => host.ends_with(domain) && host != bare,
        None => host == domain || host.ends_with(&format!(".{domain}")),
    }
}

fn bare(host: &str) -> &str {
    host.trim_start_matches('[').trim_end_matches(']')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_proxy_knows_hosts_domains_addresses_and_ranges() {
        for (list, host, expected) in [
            ("*", "a.example", true),
            ("example.com", "api.example.com", true),
            ("example.com", "badexample.com", false),
            (".example.com", "example.com", false),
            ("*.example.com", "api.example.com", true),
            ("10.0.0.0/8", "10.1.2.3", true),
            ("10.0.0.0/8", "11.1.2.3", false),
            ("fd00::/8", "[fd00::1]", true),
            ("foo, 192.0.2.1", "192.0.2.1", true),
            ("", "a", false),
        ] {
            assert_eq!(excepts(list, host), expected, "{list} {host}");
        }
    }

    #[test]
    fn names_are_left_to_a_socks_proxy() {
        assert_eq!(
            parse("socks5h://p:1080").unwrap().to_string(),
            "socks5://p:1080/"
        );
        assert_eq!(parse("p:3128").unwrap().to_string(), "http://p:3128/");
        assert!(parse("ftp://p").is_err());
    }
}
