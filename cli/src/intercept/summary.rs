//! What an intercept is, in a few lines for people.

use tp_manager_api::route_table::Protocol;

use crate::daemon::status::InterceptStatus;
use crate::intercept::example;
use crate::report::{self, escaped};

/// Where each port leads, which requests go there, and a line of curl to try it.
pub fn told(statuses: &[InterceptStatus], curl: Option<&[String]>, to_pod: &[u16]) -> String {
    let mut text = String::new();
    for status in statuses {
        let by = match &status.service {
            Some(service) => format!(" (Service {service})"),
            None => String::new(),
        };
        let pods = report::counted(status.pods_attached, "pod");
        text += &escaped(&format!(
            "{}: port {}{} of {}{by} in {pods} leads to {}",
            status.name,
            status.port,
            if status.protocol == Protocol::Udp {
                "/udp"
            } else {
                ""
            },
            status.workload,
            status.local
        ));
        text.push('\n');
    }
    let matchers = statuses
        .first()
        .map(|status| status.matchers.as_slice())
        .unwrap_or_default();
    for (n, matcher) in matchers.iter().enumerate() {
        let name = if n == 0 { "requests" } else { "and" };
        text += &format!("  {name:<9} {}\n", escaped(&matcher.to_string()));
    }
    if let Some(secret) = statuses
        .iter()
        .find_map(|status| status.tls_secret.as_ref())
    {
        text += &format!("  {:<9} opened with Secret {}\n", "TLS", escaped(secret));
    }
    for port in to_pod {
        text += &format!(
            "  {:<9} localhost:{port} leads to port {port} of a pod\n",
            "to pod"
        );
    }
    if let Some(curl) = curl {
        let words: Vec<String> = ["tp".to_owned(), "curl".to_owned()]
            .into_iter()
            .chain(curl.iter().cloned())
            .collect();
        text += &format!("  {:<9} {}\n", "try", escaped(&example::shell_line(&words)));
    }
    text
}

/// What connections from before an intercept mean for it.
pub fn open_before(count: u32, port: u16) -> String {
    let (was, them, they) = match count {
        1 => ("was", "it", "it closes"),
        _ => ("were", "them", "they close"),
    };
    let what = report::counted(count, "connection");
    format!(
        "{what} to port {port} {was} open before: requests on {them} go to the application until {they} \
         (`--close-idle` closes idle ones)"
    )
}

#[cfg(test)]
mod tests {
    use tp_manager_api::Matcher;
    use tp_manager_api::matcher::{NamedText, Text};

    use super::*;

    #[test]
    fn one_connection_and_many_are_told_in_english() {
        let [one, two] = [1, 2].map(|count| open_before(count, 80));
        assert!(one.starts_with("1 connection to port 80 was open before: requests on it go to"));
        assert!(
            two.starts_with("2 connections to port 80 were open before: requests on them go to")
        );
    }

    #[test]
    fn what_was_made_is_told_with_a_line_to_try_it() {
        let status = InterceptStatus {
            name: "web".into(),
            workload: "deployment/web".into(),
            port: 8080,
            service: Some("web".into()),
            local: "localhost:3000".into(),
            pods_attached: 2,
            matchers: vec![Matcher::Header(NamedText {
                name: "x-user".into(),
                value: Text {
                    exact: Some("ada".into()),
                    ..Text::default()
                },
            })],
            ..InterceptStatus::default()
        };
        let curl = ["-H", "x-user: ada", "http://web.shop/"].map(str::to_owned);

        assert_eq!(
            told(&[status], Some(&curl), &[9000]),
            "web: port 8080 of deployment/web (Service web) in 2 pods leads to localhost:3000\n  \
             requests  header x-user = ada\n  to pod    localhost:9000 leads to port 9000 of a pod\n  try       tp curl -H 'x-user: ada' http://web.shop/\n"
        );
    }
}
