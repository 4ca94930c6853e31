//! Both subprotocols of a port-forward, against a real API server, kubelet and container runtime.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tp_cli::kubeconfig::{Selectors, websocket};
use tp_tests::Cluster;
use tp_tunnel::carrier::port_forward::{PortForwardStream, Subprotocol};

type Stream = PortForwardStream<websocket::Socket>;

/// A forwarded port of a pod, by this subprotocol and no other.
async fn open(cluster: &Cluster, pod: &str, port: u16, by: Subprotocol) -> std::io::Result<Stream> {
    let selectors = Selectors {
        kubeconfig: Some(cluster.directory().join("kubeconfig")),
        ..Selectors::default()
    };
    let cluster = selectors.load().await;
    let client = cluster.expect("the harness's kubeconfig loads").client;
    let place = ("kube-system", pod);
    let asked = websocket::port_forward(&client, place, port, &[by]).await;
    let (socket, chosen) = asked.expect("the API server speaks both");
    assert_eq!(chosen, by);
    PortForwardStream::open(socket, chosen, port).await
}

#[tokio::test]
async fn bytes_go_both_ways_and_ends_and_refusals_are_told_by_each_subprotocol() {
    let Some(cluster) = Cluster::shared() else {
        return;
    };
    let pod = cluster.kubectl(&[
        "-n",
        "kube-system",
        "get",
        "pods",
        "-l",
        "k8s-app=kube-dns",
        "-o",
        "name",
    ]);
    let pod = pod.trim().strip_prefix("pod/").unwrap();
    for by in Subprotocol::ALL {
        let mut health = open(&cluster, pod, 8080, by).await.unwrap();
        let request = b"GET /health HTTP/1.1\r\nHost: dns\r\nConnection: close\r\n\r\n";
        health.write_all(request).await.unwrap();
        health.flush().await.unwrap();
        let mut answer = Vec::new();
        let end = health.read_to_end(&mut answer).await;
        let answer = String::from_utf8(answer).unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with("OK"),
            "{by:?}: {answer}"
        );
        // A port that ends is an error: what runs inside says whether it was complete.
        assert!(end.is_err(), "{by:?}");

        let refused = match open(&cluster, pod, 1, by).await {
            Ok(mut stream) => stream.read_u8().await.unwrap_err(),
            Err(refused) => refused,
        };
        assert!(refused.to_string().contains("refused"), "{by:?}: {refused}");
    }
}
