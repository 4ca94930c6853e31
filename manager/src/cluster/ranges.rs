//! Where Services get their addresses from: ServiceCIDR objects, or, before Kubernetes 1.33, what a refused dry run names.

use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::{ListParams, PostParams};
use kube::{Api, Client};

use super::in_short;

/// How an API server tells the ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// By objects, which can be watched.
    Objects,
    /// Only by refusing; they cannot change while it runs.
    Refusal(Vec<IpNet>),
}

/// Pause between two attempts.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// Asks until there is an answer: just after a pod's start the network may not be there yet.
pub(super) async fn find(client: &Client, namespace: &str, pause: Duration) -> Source {
    loop {
        match ask(client, namespace).await {
            Ok(source) => return source,
            Err(error) => tracing::warn!(
                error = in_short(&error),
                "the range of Services is not known yet"
            ),
        }
        tokio::time::sleep(pause).await;
    }
}

async fn ask(client: &Client, namespace: &str) -> kube::Result<Source> {
    let objects: Api<ServiceCIDR> = Api::all(client.clone());
    match objects.list(&ListParams::default().limit(1)).await {
        Ok(_) => Ok(Source::Objects),
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => {
            refused(client, namespace).await.map(Source::Refusal)
        }
        Err(error) => Err(error),
    }
}

/// Asks for a Service with an address that no cluster hands out, as a dry run, and reads the range in the refusal.
async fn refused(client: &Client, namespace: &str) -> kube::Result<Vec<IpNet>> {
    let probe: v1::Service = serde_json::from_value(serde_json::json!({
        "metadata": { "name": "tp-range-probe" },
        "spec": { "clusterIP": "192.0.2.1", "ports": [{ "port": 1 }] },
    }))
    .expect("a constant of the right shape");
    let dry_run = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    match Api::<v1::Service>::namespaced(client.clone(), namespace)
        .create(&dry_run, &probe)
        .await
    {
        Ok(_) => Ok(Vec::new()),
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 422) => {
            let ranges = ranges_in(&status.message);
            if ranges.is_empty() {
                tracing::warn!(
                    answer = status.message,
                    "the range of Services is unknown: they are reached by name only"
                );
            }
            Ok(ranges)
        }
        Err(error) => Err(error),
    }
}

/// `… The range of valid IPs is 10.96.0.0/16`, one or two ranges.
fn ranges_in(message: &str) -> Vec<IpNet> {
    let named = message
        .split_once("range of valid IPs is ")
        .map_or("", |(_, rest)| rest);
    let words = named.split(|c: char| c.is_whitespace() || c == ',');
    words
        .filter_map(|word| word.trim_end_matches('.').parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use kube::Config;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    const REFUSAL: &str = "Service \"tp-range-probe\" is invalid: spec.clusterIPs: Invalid value: [\"192.0.2.1\"]: \
                           failed to allocate IP 192.0.2.1: the provided IP (192.0.2.1) is not in the valid range. The \
                           range of valid IPs is 10.96.0.0/16";

    /// An API server that answers its requests with these, one after the other.
    async fn answering(answers: Vec<(u16, &'static str)>) -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            for (code, message) in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                read_request(&mut stream).await;
                let status = serde_json::json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure",
                                                 "message": message, "reason": "", "code": code });
                let body = match code {
                    200 => r#"{"kind":"ServiceCIDRList","apiVersion":"networking.k8s.io/v1","metadata":{},"items":[]}"#
                        .to_owned(),
                    _ => status.to_string(),
                };
                let head = format!(
                    "HTTP/1.1 {code} x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
                     Connection: close\r\n\r\n",
                    body.len()
                );
                stream.write_all((head + &body).as_bytes()).await.unwrap();
            }
        });
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut config = Config::new(url.parse().unwrap());
        // Each request shows as one.
        config.default_retry = false;
        Client::try_from(config).unwrap()
    }

    async fn read_request(stream: &mut TcpStream) {
        let mut request = Vec::new();
        let whole = |request: &[u8]| {
            let text = String::from_utf8_lossy(request).to_ascii_lowercase();
            let (head, body) = text.split_once("\r\n\r\n")?;
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.map_or(0, |length| length.parse().unwrap());
            (body.len() >= length).then_some(())
        };
        while whole(&request).is_none() {
            assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0);
        }
    }

    #[tokio::test]
    async fn an_api_server_that_is_not_there_yet_is_asked_again() {
        let (away, none) = ((503, "starting"), (404, "no such resource"));
        let old = answering(vec![away, none, away, none, (422, REFUSAL)]).await;
        let new = answering(vec![away, (200, "")]).await;

        let pause = Duration::from_millis(1);
        let range = "10.96.0.0/16".parse().unwrap();
        assert_eq!(
            find(&old, "tp-system", pause).await,
            Source::Refusal(vec![range])
        );
        assert_eq!(find(&new, "tp-system", pause).await, Source::Objects);
    }

    #[test]
    fn the_refusal_names_the_range() {
        assert_eq!(
            ranges_in(REFUSAL),
            ["10.96.0.0/16".parse::<IpNet>().unwrap()]
        );
        assert!(ranges_in("services is forbidden").is_empty());
    }
}
