//! A request as curl would send it, from curl's own arguments. Pure.
//!
//! As far as it matters for matching: method, URL, headers, cookies and a body that is given on the command line.

use http::Uri;
use tp_manager_api::matcher::RequestHead;
use tp_manager_api::matcher::graphql::Operation;

use crate::report::{Failure, USAGE};

/// What matchers see of it, and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Method.
    pub method: String,
    /// Host of the URL.
    pub host: String,
    /// Port of the URL.
    pub port: u16,
    /// Path and query.
    target: String,
    headers: Vec<(String, String)>,
    body: String,
}

/// Flags of curl that take a value, and change nothing that is matched.
const WITH_VALUE: [&str; 15] = [
    "-o",
    "--output",
    "-w",
    "--write-out",
    "-m",
    "--max-time",
    "--connect-timeout",
    "-x",
    "--proxy",
    "--resolve",
    "-u",
    "--user",
    "--cacert",
    "--cert",
    "--key",
];

/// Those without.
const PLAIN: [&str; 25] = [
    "-s",
    "--silent",
    "-S",
    "--show-error",
    "-f",
    "--fail",
    "-i",
    "--include",
    "-v",
    "--verbose",
    "-k",
    "--insecure",
    "-L",
    "--location",
    "-N",
    "--no-buffer",
    "-0",
    "--http1.0",
    "--http1.1",
    "--http2",
    "--http2-prior-knowledge",
    "--compressed",
    "-4",
    "-6",
    "-g",
];

#[derive(Default)]
struct Parsed {
    method: Option<String>,
    url: Option<String>,
    headers: Vec<(String, String)>,
    data: Vec<String>,
    get: bool,
    head: bool,
    json: bool,
}

impl Request {
    /// Reads curl's arguments.
    ///
    /// # Errors
    /// There is no URL, or a flag whose meaning for matching is not known.
    pub fn of_curl(words: &[String]) -> Result<Self, Failure> {
        let mut parsed = Parsed::default();
        let mut words = words.iter().flat_map(|word| split_short(word));
        while let Some(word) = words.next() {
            if takes_value(&word) {
                let value = words.next();
                let value = value.ok_or_else(|| wrong(format!("{word} needs a value")))?;
                parsed.with(&word, value)?;
            } else if word.starts_with('-') && word != "-" {
                parsed.plain(&word)?;
            } else {
                parsed.with("--url", word)?;
            }
        }
        parsed.request()
    }

    /// What matchers see.
    #[must_use]
    pub fn head(&self) -> RequestHead<'_> {
        let fields = self
            .headers
            .iter()
            .map(|(name, value)| (name.as_bytes(), value.as_bytes()));
        RequestHead::new(&self.method, self.target.as_bytes(), fields)
    }

    /// The GraphQL operation of the body.
    #[must_use]
    pub fn operation(&self) -> Operation {
        Operation::of_body(self.body.as_bytes())
    }

    /// `GET http://web/`.
    #[must_use]
    pub fn line(&self) -> String {
        let port = match self.port {
            80 => String::new(),
            port => format!(":{port}"),
        };
        format!("{} http://{}{port}{}", self.method, self.host, self.target)
    }
}

/// `-sXPOST` as `-s`, `-X`, `POST`.
fn split_short(word: &str) -> Vec<String> {
    let is_short = word.len() > 2 && word.starts_with('-') && !word.starts_with("--");
    if !is_short {
        return vec![word.to_owned()];
    }
    let mut flags = Vec::new();
    let mut rest = word[1..].chars();
    while let Some(c) = rest.next() {
        let flag = format!("-{c}");
        let has_value = takes_value(&flag);
        flags.push(flag);
        if has_value {
            if !rest.as_str().is_empty() {
                flags.push(rest.as_str().to_owned());
            }
            break;
        }
    }
    flags
}

fn takes_value(word: &str) -> bool {
    const MATTER: [&str; 17] = [
        "-X",
        "--request",
        "-H",
        "--header",
        "-d",
        "--data",
        "--data-raw",
        "--data-binary",
        "--data-ascii",
        "--json",
        "-b",
        "--cookie",
        "-A",
        "--user-agent",
        "-e",
        "--referer",
        "--url",
    ];
    MATTER.contains(&word) || WITH_VALUE.contains(&word)
}

fn wrong(what: String) -> Failure {
    Failure::new(what)
        .hint("give a URL and what matters of curl's flags: -X, -H, -b, -d, --json, -A, -I, -G")
        .exit(USAGE)
}

impl Parsed {
    fn with(&mut self, flag: &str, value: String) -> Result<(), Failure> {
        match flag {
            "-X" | "--request" => self.method = Some(value),
            "-H" | "--header" => self.header(&value),
            "-b" | "--cookie" if !value.contains('=') => {
                return Err(wrong(format!("cookies are read from no file: {value}")));
            }
            "-b" | "--cookie" => self.headers.push(("cookie".into(), value)),
            "-A" | "--user-agent" => self.headers.push(("user-agent".into(), value)),
            "-e" | "--referer" => self.headers.push(("referer".into(), value)),
            "--url" if self.url.is_some() => {
                return Err(wrong(format!("one URL at a time: {value}")));
            }
            "--url" => self.url = Some(value),
            "-d" | "--data" | "--data-binary" | "--data-ascii" | "--json"
                if value.starts_with('@') =>
            {
                return Err(wrong(format!("a body is read from no file: {value}")));
            }
            "-d" | "--data" | "--data-raw" | "--data-binary" | "--data-ascii" => {
                self.data.push(value)
            }
            "--json" => {
                self.json = true;
                self.data.push(value);
            }
            _ => {}
        }
        Ok(())
    }

    fn header(&mut self, text: &str) {
        if let Some((name, value)) = text.split_once(':') {
            self.headers
                .push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }

    fn plain(&mut self, flag: &str) -> Result<(), Failure> {
        match flag {
            "-I" | "--head" => self.head = true,
            "-G" | "--get" => self.get = true,
            known if PLAIN.contains(&known) => {}
            unknown => return Err(wrong(format!("the flag {unknown} is not understood"))),
        }
        Ok(())
    }

    fn request(mut self) -> Result<Request, Failure> {
        let url = self
            .url
            .take()
            .ok_or_else(|| wrong("there is no URL".to_owned()))?;
        let bad = || wrong(format!("{url} is no URL of HTTP"));
        let whole = match url.contains("://") {
            true => url.clone(),
            false => format!("http://{url}"),
        };
        let uri: Uri = whole.parse().map_err(|_| bad())?;
        let port = match uri.scheme_str() {
            Some("http") => uri.port_u16().unwrap_or(80),
            Some("https") => uri.port_u16().unwrap_or(443),
            Some(_) | None => return Err(bad()),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(bad)?;
        let has_body = !self.data.is_empty() && !self.get;
        let mut target = uri
            .path_and_query()
            .map_or("/", |target| target.as_str())
            .to_owned();
        if self.get && !self.data.is_empty() {
            target.push(if target.contains('?') { '&' } else { '?' });
            target += &self.data.join("&");
        }
        if has_body {
            let kind = match self.json {
                true => "application/json",
                false => "application/x-www-form-urlencoded",
            };
            self.default_header("content-type", kind);
        }
        let method = match (self.method.take(), self.head, has_body) {
            (Some(method), _, _) => method,
            (None, true, _) => "HEAD".to_owned(),
            (None, false, true) => "POST".to_owned(),
            (None, false, false) => "GET".to_owned(),
        };
        let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
        self.default_header("host", &authority);
        Ok(Request {
            method,
            host: host.to_owned(),
            port,
            target,
            headers: self.headers,
            body: self.data.join(if self.json { "" } else { "&" }),
        })
    }

    fn default_header(&mut self, name: &str, value: &str) {
        if !self
            .headers
            .iter()
            .any(|(known, _)| known.eq_ignore_ascii_case(name))
        {
            self.headers.push((name.to_owned(), value.to_owned()));
        }
    }
}

/// The Service and its namespace that a host means in a pod of `namespace`: `web`, `web.shop`, `web.shop.svc…`.
#[must_use]
pub fn service_of<'a>(host: &'a str, namespace: &'a str) -> Option<(&'a str, &'a str)> {
    let host = host.trim_end_matches('.');
    let labels: Vec<&str> = host.split('.').collect();
    match labels.as_slice() {
        [_, ..] if host.parse::<std::net::IpAddr>().is_ok() || host.starts_with('[') => None,
        [service] => Some((service, namespace)),
        [service, namespace] | [service, namespace, "svc", ..] => Some((service, namespace)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tp_manager_api::Matchers;
    use tp_manager_api::matcher::Verdict;

    use super::*;

    fn request(line: &[&str]) -> Request {
        let words: Vec<String> = line.iter().map(|word| (*word).to_owned()).collect();
        Request::of_curl(&words).unwrap_or_else(|failure| panic!("{failure}"))
    }

    fn matches(line: &[&str], matchers: &str) -> bool {
        let matchers: Matchers = serde_json::from_str(matchers).unwrap();
        let request = request(line);
        matchers.matches(&request.head(), Some(&request.operation())) == Verdict::Mine
    }

    #[test]
    fn curls_arguments_become_what_curl_would_send() {
        for (line, expected) in [
            (&["web"][..], "GET http://web/"),
            (
                &["-sSf", "http://web.shop:8080/a?b=c"],
                "GET http://web.shop:8080/a?b=c",
            ),
            (&["-XPUT", "web"], "PUT http://web/"),
            (&["-sX", "PUT", "web"], "PUT http://web/"),
            (&["-d", "a=1", "web/x"], "POST http://web/x"),
            (
                &["-G", "-d", "a=1", "-d", "b=2", "web/x?c=3"],
                "GET http://web/x?c=3&a=1&b=2",
            ),
            (&["-I", "web"], "HEAD http://web/"),
            (
                &["-o", "/dev/null", "-w", "%{http_code}", "https://web/"],
                "GET http://web:443/",
            ),
        ] {
            assert_eq!(request(line).line(), expected, "{line:?}");
        }
    }

    #[test]
    fn headers_cookies_and_bodies_are_matched() {
        let user = r#"[{"header":{"name":"x-user","exact":"ada"}}]"#;
        assert!(matches(&["-H", "X-User: ada", "web"], user));
        assert!(!matches(&["-H", "X-User: bob", "web"], user));
        let cookie = r#"[{"cookie":{"name":"u","exact":"ada"}}]"#;
        assert!(matches(&["-b", "a=b; u=ada", "web"], cookie));
        let graphql = r#"[{"graphql":{"operation":"Cart"}}]"#;
        assert!(matches(
            &["--json", r#"{"query":"query Cart { id }"}"#, "web/graphql"],
            graphql
        ));
        assert!(!matches(
            &["--json", r#"{"query":"query Other { id }"}"#, "web/graphql"],
            graphql
        ));
        let grpc = r#"[{"grpc":{"method":"Add"}}]"#;
        assert!(matches(
            &[
                "-H",
                "content-type: application/grpc",
                "-X",
                "POST",
                "web/shop.Cart/Add"
            ],
            grpc
        ));
    }

    #[test]
    fn what_is_not_understood_is_said() {
        for (line, part) in [
            (&["-s"][..], "no URL"),
            (&["web", "other"], "one URL"),
            (&["--frobnicate", "web"], "--frobnicate"),
            (&["-d", "@file", "web"], "no file"),
            (&["web", "-H"], "needs a value"),
            (&["ftp://web/"], "no URL of HTTP"),
        ] {
            let words: Vec<String> = line.iter().map(|word| (*word).to_owned()).collect();
            let failure = Request::of_curl(&words).unwrap_err();
            assert!(
                failure.what.contains(part) && failure.exit == USAGE,
                "{failure}"
            );
        }
    }

    #[test]
    fn a_host_means_a_service_as_in_a_pod() {
        for (host, expected) in [
            ("web", Some(("web", "own"))),
            ("web.shop", Some(("web", "shop"))),
            ("web.shop.svc", Some(("web", "shop"))),
            ("web.shop.svc.cluster.local.", Some(("web", "shop"))),
            ("10.0.0.1", None),
            ("www.example.com", None),
        ] {
            assert_eq!(service_of(host, "own"), expected, "{host}");
        }
    }
}
