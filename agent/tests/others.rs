//! Clients and servers that we did not write, on both sides of the agent.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod common;

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use common::others::{PYTHON, script, serve};
use common::{Server, ada, agent_with, soon};
use serde_json::{Value, json};
use tokio::process::Command;

/// A server as the application, another as the local one, and a client that knows who has to answer.
async fn all_of(program: &str, name: &str) {
    all_of_with(program, name, ada(true)).await;
}

async fn all_of_with(program: &str, name: &str, intercepts: Value) {
    let (app, _app) = serve(program, name, &["serve", "app"]).await;
    let (local, _local) = serve(program, name, &["serve", "local"]).await;
    let agent = agent_with(Server::at(app), Server::at(local), Duration::from_secs(60)).await;
    agent.push(intercepts).await;
    let address = agent.address.to_string();
    let output = script(program, name, &["call", &address]).output();
    let output = tokio::time::timeout(Duration::from_secs(100), output)
        .await
        .expect("done within 100 s")
        .unwrap();
    assert!(
        output.status.success(),
        "{name}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test]
async fn grpc_of_all_four_kinds_with_trailers_and_deadlines() {
    all_of(PYTHON, "grpc_peer.py").await;
}

#[tokio::test]
async fn websockets() {
    all_of(PYTHON, "websocket_peer.py").await;
}

#[tokio::test]
async fn graphql_operations_however_they_are_sent() {
    let get_cart = json!([{
        "id": "uid-cart", "created": 1, "strict": true,
        "matchers": [{"graphql": {"operation": "GetCart"}}]
    }]);
    all_of_with(PYTHON, "graphql_peer.py", get_cart).await;
}

#[tokio::test]
async fn keep_alive_connections_of_node() {
    all_of("node", "keep_alive.js").await;
}

#[tokio::test]
async fn curl_and_nginx() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_str().unwrap();
    let port = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port()
    };
    let large: String = (0..300_000).map(|n| format!("{n:07}")).collect();
    std::fs::write(folder.path().join("large"), &large).unwrap();
    let config = format!(
        "daemon off; master_process off; pid {root}/pid; error_log stderr; worker_processes 1; events {{}}\n\
         http {{ access_log off; client_body_temp_path {root}/a; proxy_temp_path {root}/b; fastcgi_temp_path {root}/c;\n\
         uwsgi_temp_path {root}/d; scgi_temp_path {root}/e; gzip on; gzip_types *; default_type text/plain;\n\
         server {{ listen 127.0.0.1:{port}; root {root}; location = /who {{ return 200 app; }} }} }}\n"
    );
    std::fs::write(folder.path().join("nginx.conf"), config).unwrap();
    let mut nginx = Command::new("/usr/sbin/nginx")
        .args(["-p", root, "-c", "nginx.conf"])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let app = SocketAddr::from(([127, 0, 0, 1], port));
    soon(async {
        while tokio::net::TcpStream::connect(app).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let agent = agent_with(
        Server::at(app),
        common::server("local").await,
        Duration::from_secs(60),
    )
    .await;
    agent.push(ada(true)).await;
    let curl = |arguments: &'static [&'static str], path: &str| {
        let mut command = Command::new("curl");
        command
            .args(["-sS", "--noproxy", "*", "--max-time", "20"])
            .args(arguments)
            .arg(format!("http://{}{path}", agent.address));
        async move {
            let output = soon(command.output()).await.unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{error}");
            String::from_utf8(output.stdout).unwrap()
        }
    };
    assert_eq!(curl(&[], "/who").await, "app");
    assert_eq!(
        curl(&["-H", "x-tp-user: ada"], "/who").await,
        "local GET /who 0"
    );
    assert_eq!(curl(&[], "/large").await, large);
    assert_eq!(curl(&["--compressed"], "/large").await, large);
    assert_eq!(curl(&["-r", "7-13"], "/large").await, "0000001");
    assert!(
        curl(&["-I"], "/large")
            .await
            .contains("Content-Length: 2100000\r\n")
    );
    assert!(
        curl(
            &["-d", "a=b", "-o", "/dev/null", "-w", "%{http_code}"],
            "/large"
        )
        .await
        .contains("405")
    );
    // An offer of HTTP/2 is not passed on; the answer is HTTP/1.1.
    assert_eq!(
        curl(&["--http2", "-w", " %{http_version}"], "/who").await,
        "app 1.1"
    );
    nginx.kill().await.unwrap();
}
