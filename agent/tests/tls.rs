//! TLS in the application's stead: curl and openssl in front, nginx with the same certificate behind.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod common;

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use common::others::{PYTHON, script, serve};
use common::{Agent, Server, agent_with, server, soon};
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tp_manager_api::tls::Credential;

/// A certificate for `web`, its key, and both as the manager gives them.
struct Pair {
    folder: tempfile::TempDir,
    credential: Credential,
}

impl Pair {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(["web".to_owned()]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("crt"), certificate.pem()).unwrap();
        std::fs::write(folder.path().join("key"), key.serialize_pem()).unwrap();
        let credential = Credential::try_new(certificate.pem(), key.serialize_pem()).unwrap();
        Self { folder, credential }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }
}

/// A server. Dropping it ends it.
struct Running {
    address: SocketAddr,
    _folder: Option<tempfile::TempDir>,
    child: Child,
}

/// nginx that answers with its name and what it sees, and takes bodies.
impl Running {
    async fn start(name: &str, listen: &str, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_str().unwrap();
        let port = {
            let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            free.local_addr().unwrap().port()
        };
        let answer = format!(
            "{name} $request_uri $server_protocol sni=$ssl_server_name proto=$http_x_forwarded_proto for=$http_x_forwarded_for"
        );
        std::fs::write(folder.path().join("large"), LARGE.repeat(1 << 16)).unwrap();
        let config = format!(
            "daemon off; master_process off; pid {root}/pid; error_log stderr; worker_processes 1; events {{}}\n\
             http {{ access_log off; client_body_temp_path {root}/a; proxy_temp_path {root}/b; fastcgi_temp_path {root}/c;\n\
             uwsgi_temp_path {root}/d; scgi_temp_path {root}/e; default_type text/plain;\n\
             server {{ listen 127.0.0.1:{port} {listen}; {more} root {root}; location /large {{}} location / {{ return 200 \"{answer}\\n\"; }} }} }}\n"
        );
        std::fs::write(folder.path().join("nginx.conf"), config).unwrap();
        let child = Command::new("/usr/sbin/nginx")
            .args(["-p", root, "-c", "nginx.conf"])
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        soon(async {
            while tokio::net::TcpStream::connect(address).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        Self {
            address,
            _folder: Some(folder),
            child,
        }
    }

    /// The application, with TLS.
    async fn app(listen: &str, pair: &Pair, more: &str) -> Self {
        let (certificate, key) = (pair.path("crt"), pair.path("key"));
        let tls = format!("ssl_certificate {certificate}; ssl_certificate_key {key}; {more}");
        Self::start("app", &format!("ssl {listen}"), &tls).await
    }

    /// The workstation's server, without.
    async fn local(listen: &str) -> Self {
        Self::start("local", listen, "").await
    }
}

/// A line of a large body.
const LARGE: &str = "0123456789abcdef0123456789abcdef";

/// An intercept of Ada's requests that names the pair.
fn of_ada(pair: &Pair) -> Value {
    json!([{
        "id": "uid-ada", "created": 1, "strict": true, "tls": pair.credential.id(),
        "matchers": [{"header": {"name": "x-tp-user", "exact": "ada"}}]
    }])
}

async fn between(app: SocketAddr, local: SocketAddr) -> Agent {
    let (app, local) = (Server::at(app), Server::at(local));
    agent_with(app, local, Duration::from_secs(60)).await
}

async fn give(agent: &Agent, pair: &Pair) {
    let body = serde_json::to_vec(&pair.credential).unwrap();
    let put = agent
        .tunnel
        .control(Method::PUT, "/v1/credentials", body.into());
    assert_eq!(put.await.unwrap().status(), StatusCode::NO_CONTENT);
}

/// The agent between both, whose intercept of Ada opens TLS with the pair.
async fn opening(app: &Running, local: &Running, pair: &Pair) -> Agent {
    let agent = between(app.address, local.address).await;
    give(&agent, pair).await;
    agent.push(of_ada(pair)).await;
    agent
}

/// What the agent says is wrong with the application.
async fn findings(agent: &Agent) -> Value {
    let asked = agent.tunnel.control(Method::GET, "/v1/tls", "".into());
    let answer = soon(asked).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    serde_json::from_slice(answer.body()).unwrap()
}

const WELL: &str = r#"{"ports":[]}"#;

fn curl(agent: &Agent, pair: &Pair) -> Command {
    let mut command = Command::new("curl");
    let port = agent.address.port();
    command
        .args(["-sS", "--noproxy", "*", "--max-time", "20"])
        .args(["--cacert", &pair.path("crt")])
        .args(["--resolve", &format!("web:{port}:127.0.0.1")])
        .kill_on_drop(true);
    command
}

async fn output(mut command: Command) -> Result<String, String> {
    let output = soon(command.output()).await.unwrap();
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout).unwrap()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// One request, with these arguments besides.
async fn get(agent: &Agent, pair: &Pair, more: &[&str]) -> Result<String, String> {
    let mut command = curl(agent, pair);
    command.args(more);
    command.arg(format!("https://web:{}/x", agent.address.port()));
    output(command).await
}

const ADA: [&str; 2] = ["-H", "x-tp-user: ada"];

#[tokio::test]
async fn requests_inside_of_tls_go_each_to_whom_they_belong() {
    let pair = Pair::new();
    // What the application speaks is what the client is offered, and the workstation gets it without TLS.
    for (speaks, plain, version, tls) in [
        ("http2", "http2", "HTTP/2.0", &[][..]),
        ("", "", "HTTP/1.1", &[]),
        ("", "", "HTTP/1.1", &["--tls-max", "1.2"]),
        ("http2", "", "HTTP/1.1", &["--http1.1"]),
        ("http2", "", "HTTP/1.1", &["--no-alpn"]),
    ] {
        let app = Running::app(speaks, &pair, "").await;
        let local = Running::local(plain).await;
        let agent = opening(&app, &local, &pair).await;
        assert_eq!(findings(&agent).await.to_string(), WELL);
        let mut command = curl(&agent, &pair);
        let url = |n: usize| format!("https://web:{}/{n}", agent.address.port());
        for n in 0..6 {
            let user = if n % 2 == 0 { "ada" } else { "adam" };
            let header = format!("x-tp-user: {user}");
            if n > 0 {
                command.args(["--next", "-sS", "--cacert", &pair.path("crt")]);
            }
            command.args(tls).args(["-H", &header, &url(n)]);
        }
        command.args(["-w", "%{num_connects}"]);

        let answers = output(command).await.unwrap();

        let mut lines = answers.lines();
        for n in 0..6 {
            let expected = match n % 2 {
                0 => format!("local /{n} {version} sni= proto=https for=127.0.0.1"),
                _ => format!("app /{n} {version} sni=web proto= for=127.0.0.1"),
            };
            assert_eq!(lines.next(), Some(&expected[..]), "{speaks} {tls:?}");
        }
        assert_eq!(
            lines.next(),
            Some("0"),
            "the last request on the same connection"
        );
    }
}

#[tokio::test]
async fn what_the_agent_cannot_stand_in_for_passes_unparsed() {
    let (pair, other) = (Pair::new(), Pair::new());
    let local = Running::local("").await;
    let show = [&ADA[..], &["--insecure"]].concat();

    // Another key than the Secret's, so that clients see what they would see without.
    let app = Running::app("", &other, "").await;
    let agent = opening(&app, &local, &pair).await;
    let found = findings(&agent).await;
    assert_eq!(found["ports"][0]["found"], "otherCertificate", "{found}");
    assert_eq!(found["ports"][0]["intercept"], "uid-ada");
    let answer = get(&agent, &other, &ADA).await.unwrap();
    assert_eq!(answer, "app /x HTTP/1.1 sni=web proto= for=\n");

    // A server that wants to see the client's certificate.
    let trusted = pair.path("crt");
    let asks = format!("ssl_verify_client on; ssl_client_certificate {trusted};");
    let app = Running::app("", &pair, &asks).await;
    let agent = opening(&app, &local, &pair).await;
    let found = findings(&agent).await;
    assert_eq!(found["ports"][0]["found"], "asksForCertificates", "{found}");
    let (certificate, key) = (pair.path("crt"), pair.path("key"));
    let own = ["--cert", &certificate, "--key", &key];
    let answer = get(&agent, &pair, &[&ADA[..], &own].concat()).await;
    assert!(
        answer.as_ref().is_ok_and(|text| text.starts_with("app /x")),
        "{answer:?}"
    );

    // No TLS at all.
    let app = Running::start("app", "", "").await;
    let agent = opening(&app, &local, &pair).await;
    let found = findings(&agent).await;
    assert_eq!(found["ports"][0]["found"], "noTls", "{found}");
    assert!(get(&agent, &pair, &show).await.is_err());

    // Nobody named a Secret.
    let app = Running::app("http2", &pair, "").await;
    let agent = between(app.address, local.address).await;
    agent.push(common::ada(true)).await;
    assert_eq!(findings(&agent).await.to_string(), WELL);
    let answer = get(&agent, &pair, &ADA).await.unwrap();
    assert_eq!(answer, "app /x HTTP/2.0 sni=web proto= for=\n");
}

#[tokio::test]
async fn while_the_application_is_down_its_key_is_shown_for_it() {
    let pair = Pair::new();
    let (mut app, local) = (
        Running::app("", &pair, "").await,
        Running::local("http2").await,
    );
    let agent = opening(&app, &local, &pair).await;
    app.child.kill().await.unwrap();

    assert_eq!(findings(&agent).await.to_string(), WELL);
    let answer = get(&agent, &pair, &ADA).await.unwrap();
    assert_eq!(answer, "local /x HTTP/2.0 sni= proto=https for=127.0.0.1\n");
    assert!(get(&agent, &pair, &[]).await.is_err());
}

#[tokio::test]
async fn bodies_of_many_at_once_arrive_whole_both_ways() {
    let (pair, behind) = (Pair::new(), server("behind").await);
    let sink = |who: &str| {
        format!(
            "client_max_body_size 9m; location /sink {{ proxy_set_header x-who {who}; proxy_pass http://{}; }}",
            behind.address
        )
    };
    for version in ["http2", ""] {
        let app = Running::app(version, &pair, &sink("app")).await;
        let local = Running::start("local", version, &sink("local")).await;
        let agent = opening(&app, &local, &pair).await;
        let requests = (0..24).map(|n| {
            let mut command = curl(&agent, &pair);
            if n % 2 == 0 {
                command.args(ADA);
            }
            command.arg(format!("https://web:{}/large", agent.address.port()));
            tokio::spawn(output(command))
        });
        for answer in futures::future::join_all(requests).await {
            let answer = answer.unwrap().unwrap();
            assert!(answer == LARGE.repeat(1 << 16), "{} bytes", answer.len());
        }
        // More than the windows hold.
        let body = pair.folder.path().join("body");
        std::fs::write(&body, LARGE.repeat(1 << 15)).unwrap();
        let data = format!("@{}", body.display());
        for (user, who) in [("ada", "local"), ("eve", "app")] {
            let mut command = curl(&agent, &pair);
            command.args(["-H", &format!("x-tp-user: {user}"), "--data-binary", &data]);
            command.arg(format!("https://web:{}/sink/{who}", agent.address.port()));
            let answer = output(command).await.unwrap();
            assert_eq!(answer, format!("behind POST /sink/{who} 1048576"));
        }
    }
    let seen = behind.received();
    assert_eq!(
        seen.matches("x-who: local").count(),
        2,
        "one for each version"
    );
    assert_eq!(seen.matches("x-who: app").count(), 2);
}

#[tokio::test]
async fn what_is_no_http_inside_goes_whole_to_who_takes_everything() {
    let pair = Pair::new();
    let app = echo(&pair).await;
    let local = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = local.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = local.accept().await {
            tokio::spawn(async move {
                let (mut rx, mut tx) = tcp.split();
                tx.write_all(b"local ").await.unwrap();
                tokio::io::copy(&mut rx, &mut tx).await.unwrap();
                tx.shutdown().await.unwrap();
            });
        }
    });
    let agent = between(app.address, address).await;
    give(&agent, &pair).await;
    let everything = json!([{
        "id": "uid-all", "created": 1, "strict": true, "matchers": [], "tls": pair.credential.id()
    }]);

    agent.push(everything).await;
    assert_eq!(say(&agent, &pair, "\x01hello").await, "local \x01hello");
    agent.push(of_ada(&pair)).await;
    assert_eq!(say(&agent, &pair, "\x01hello").await, "app olleh\x01");
}

/// gRPC offers a name of its own before `h2`, and its servers take the first.
#[tokio::test]
async fn grpc_goes_where_it_belongs() {
    let pair = Pair::new();
    let (certificate, key) = (pair.path("crt"), pair.path("key"));
    let serve = ["serve", "app", "127.0.0.1:0", &certificate, &key];
    let app = python("grpc_peer.py", &serve).await;
    let local = python("grpc_peer.py", &["serve", "local"]).await;
    let agent = opening(&app, &local, &pair).await;

    let address = agent.address.to_string();
    let call = script(PYTHON, "grpc_peer.py", &["call", &address, &certificate]);
    output(call).await.unwrap();
}

/// A TLS server that answers each line backwards.
async fn echo(pair: &Pair) -> Running {
    python("tls_lines.py", &[&pair.path("crt"), &pair.path("key")]).await
}

/// One of `others` that serves.
async fn python(name: &str, arguments: &[&str]) -> Running {
    let (address, child) = serve(PYTHON, name, arguments).await;
    Running {
        address,
        _folder: None,
        child,
    }
}

/// Says a line inside of TLS, and gives everything that is answered until both have ended.
async fn say(agent: &Agent, pair: &Pair, line: &str) -> String {
    let mut openssl = Command::new("openssl")
        .args([
            "s_client",
            "-quiet",
            "-verify_return_error",
            "-verify_quiet",
        ])
        .args(["-CAfile", &pair.path("crt"), "-servername", "web"])
        .args(["-connect", &agent.address.to_string(), "-no_ign_eof"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut stdin = openssl.stdin.take().unwrap();
    stdin.write_all(line.as_bytes()).await.unwrap();
    stdin.write_all(b"\n").await.unwrap();
    let mut stdout = tokio::io::BufReader::new(openssl.stdout.take().unwrap());
    let mut answer = String::new();
    let reading = tokio::io::AsyncBufReadExt::read_line(&mut stdout, &mut answer);
    soon(reading).await.unwrap();
    drop(stdin);
    soon(openssl.wait()).await.unwrap();
    answer.trim_end().to_owned()
}

#[tokio::test]
async fn a_credential_goes_with_the_table_that_named_it() {
    let pair = Pair::new();
    let (app, local) = (Running::app("", &pair, "").await, Running::local("").await);
    let agent = between(app.address, local.address).await;
    let (status, why) = agent.try_push(of_ada(&pair)).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(why.contains("was not given"), "{why}");

    give(&agent, &pair).await;
    agent.push(of_ada(&pair)).await;
    agent.push(of_ada(&pair)).await;
    assert!(get(&agent, &pair, &ADA).await.unwrap().starts_with("local"));
    agent.push(json!([])).await;
    assert!(get(&agent, &pair, &ADA).await.unwrap().starts_with("app"));
    assert_eq!(
        agent.try_push(of_ada(&pair)).await.0,
        StatusCode::BAD_REQUEST
    );

    // What is no credential is refused, and nothing of it comes back.
    let body = r#"{"certificate":"x","key":"hush"}"#;
    let put = agent
        .tunnel
        .control(Method::PUT, "/v1/credentials", body.into());
    let answer = put.await.unwrap();
    assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
    assert!(!String::from_utf8_lossy(answer.body()).contains("hush"));
}
