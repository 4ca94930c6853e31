//! One request that was an intercept's, as the agent saw it and its user may watch it.
//!
//! An agent offers a flow with the intercept's id behind [`OFFER`]; a workstation that nobody watches on refuses it. On the
//! flow comes one JSON object a line. What proves who somebody is does not leave the pod.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::matcher::RequestHead;

/// How the id of such a flow begins; the intercept's follows.
pub const OFFER: &str = "sightings/";

/// Bytes of the longest line, its end included.
pub const LINE_MAX: usize = 8 * 1024;

/// Bytes of the target that are told, and of all headers together.
const TARGET_MAX: usize = 1024;
const HEADERS_MAX: usize = 2 * 1024;

/// Headers whose values prove who somebody is.
const HIDDEN: [&str; 4] = [
    "authorization",
    "cookie",
    "proxy-authorization",
    "set-cookie",
];

/// What stands for such a value.
const IN_PLACE: &str = "(hidden)";

/// What stands for what is too long.
const CUT: &str = "…";

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sighting {
    /// When its head was there, in milliseconds since 1970, by the pod's clock.
    pub at: u64,
    /// The pod.
    pub pod: String,
    /// Who connected.
    pub peer: IpAddr,
    /// Its method.
    pub method: String,
    /// Its path and query.
    pub target: String,
    /// Names in lower case, and values; the hidden ones say so.
    pub headers: Vec<(String, String)>,
    /// Who answered.
    pub by: AnsweredBy,
    /// Status of the answer; none where it never came, or was no HTTP.
    pub status: Option<u16>,
    /// How long the answer took to its end, in milliseconds.
    pub took_ms: u64,
}

/// Who answered a request that was an intercept's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum AnsweredBy {
    /// The workstation.
    Workstation,
    /// The application, because the workstation did not take it.
    Application,
    /// Nobody: the workstation was gone.
    Nobody,
}

impl Sighting {
    /// Of a request whose answer is still to come.
    pub fn new(head: &RequestHead<'_>, peer: IpAddr, pod: &str, at: u64) -> Self {
        Self {
            at,
            pod: pod.to_owned(),
            peer,
            method: head.method().to_owned(),
            target: shortened(&head.target(), TARGET_MAX),
            headers: headers(head),
            by: AnsweredBy::Nobody,
            status: None,
            took_ms: 0,
        }
    }

    /// As it goes over the flow: at most [`LINE_MAX`] bytes.
    pub fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("strings and numbers");
        if line.len() >= LINE_MAX {
            // Bytes that JSON writes at six times their length.
            let bare = Self {
                headers: Vec::new(),
                target: shortened(self.target.as_bytes(), 64),
                ..self.clone()
            };
            line = serde_json::to_vec(&bare).expect("strings and numbers");
        }
        line.push(b'\n');
        line
    }
}

fn headers(head: &RequestHead<'_>) -> Vec<(String, String)> {
    let mut left = HEADERS_MAX;
    let mut told = Vec::new();
    for (name, value) in head.fields() {
        let name = String::from_utf8_lossy(name).to_ascii_lowercase();
        let value = match HIDDEN.contains(&name.as_str()) {
            true => IN_PLACE.to_owned(),
            false => shortened(value, left),
        };
        let size = name.len() + value.len();
        if size > left {
            break;
        }
        left -= size;
        told.push((name, value));
    }
    told
}

fn shortened(bytes: &[u8], most: usize) -> String {
    match bytes.len() <= most {
        true => String::from_utf8_lossy(bytes).into_owned(),
        false => {
            let kept = &bytes[..most.saturating_sub(CUT.len())];
            String::from_utf8_lossy(kept).into_owned() + CUT
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sighting(target: &str, fields: &[(&str, &str)]) -> Sighting {
        let fields = fields
            .iter()
            .map(|(name, value)| (name.as_bytes(), value.as_bytes()));
        let head = RequestHead::new("GET", target.as_bytes(), fields);
        Sighting::new(&head, [10, 0, 0, 1].into(), "web-1", 7)
    }

    #[test]
    fn what_proves_who_somebody_is_stays_in_the_pod() {
        let seen = sighting(
            "/cart?a=b",
            &[
                ("Host", "web"),
                ("Authorization", "Bearer secret"),
                ("COOKIE", "id=secret"),
                ("set-cookie", "secret"),
                ("Proxy-Authorization", "secret"),
                ("x-user", "ada"),
            ],
        );

        let line = String::from_utf8(seen.line()).unwrap();

        assert!(!line.contains("secret"), "{line}");
        assert_eq!(seen.target, "/cart?a=b");
        assert_eq!(seen.headers[0], ("host".to_owned(), "web".to_owned()));
        assert_eq!(seen.headers[2], ("cookie".to_owned(), IN_PLACE.to_owned()));
        assert_eq!(seen.headers[5], ("x-user".to_owned(), "ada".to_owned()));
        assert_eq!(serde_json::from_str::<Sighting>(&line).unwrap(), seen);
    }

    #[test]
    fn a_line_has_a_bound_whatever_the_request_holds() {
        let long = "/".repeat(100_000);
        for (name, target, value) in [
            ("x", long.as_str(), long.as_str()),
            (long.as_str(), "/", "/"),
            ("x", "/", "\u{1}\u{2}".repeat(50_000).as_str()),
        ] {
            let seen = sighting(target, &[("x-first", "1"), (name, value)]);
            let line = seen.line();
            assert!(line.len() <= LINE_MAX, "{}", line.len());
            assert!(serde_json::from_slice::<Sighting>(&line).is_ok());
        }
    }
}
