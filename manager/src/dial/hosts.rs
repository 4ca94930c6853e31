//! `/etc/hosts`, for a manager that serves a network without a cluster.
//!
//! In a cluster it is not read: the manager's own file says nothing about the pods of another namespace.

use std::net::IpAddr;

/// The addresses of `name` in the text of a hosts file, in order.
pub fn lookup(text: &str, name: &str) -> Vec<IpAddr> {
    let addresses = text.lines().filter_map(|line| {
        let mut words = line.split('#').next()?.split_ascii_whitespace();
        let address: IpAddr = words.next()?.parse().ok()?;
        words
            .any(|word| word.trim_end_matches('.').eq_ignore_ascii_case(name))
            .then_some(address)
    });
    addresses.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_with_the_name_counts() {
        let text =
            "127.0.0.1 localhost\n10.0.0.1\tWeb.Demo web # db\n::1 web\nbad web\n10.0.0.2 db\n";

        assert_eq!(
            lookup(text, "web"),
            [
                "10.0.0.1".parse::<IpAddr>().unwrap(),
                "::1".parse().unwrap()
            ]
        );
        assert_eq!(lookup(text, "web.demo").len(), 1);
        assert_eq!(lookup(text, "db"), ["10.0.0.2".parse::<IpAddr>().unwrap()]);
        assert!(lookup(text, "we").is_empty());
    }
}
