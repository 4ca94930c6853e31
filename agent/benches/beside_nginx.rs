//! What does an agent cost a request that is nobody's? Beside nginx as a plain proxy in its place, in the same rounds.
//!
//! `cargo bench -p tp-agent` prints C7 for HTTP/1.1 and for HTTP/2, and C8; `BENCH_ROUNDS=3` makes it shorter. It wants
//! `h2load` and `nginx` (one worker each). The application is nginx, too. All of them share the machine, as they would share
//! a pod's node.

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use http::{Method, StatusCode};
use serde_json::json;
use tokio::net::TcpStream;
use tp_tunnel::carrier::tls::connect_tls;
use tp_tunnel::{Identity, Settings, Tunnel};

/// Requests that wait for each other, for latency.
const ALONE: usize = 3_000;

/// Requests of [`CLIENTS`] at once, for throughput.
const MANY: usize = 40_000;

const CLIENTS: usize = 32;

/// Any 64 hexadecimal digits.
const SEED: &str = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";

#[derive(Clone, Copy)]
enum Protocol {
    Http1,
    Http2,
}

/// Where a request may go, all to the same application in the end.
struct Paths {
    direct: SocketAddr,
    nginx: SocketAddr,
    agent: SocketAddr,
}

/// One run of the load generator.
struct Run {
    /// Requests a second.
    rate: f64,
    /// Milliseconds.
    p50: f64,
    p99: f64,
}

#[expect(clippy::print_stdout, reason = "the table is the program's data")]
fn main() -> anyhow::Result<()> {
    let rounds = std::env::var("BENCH_ROUNDS").ok();
    let rounds = rounds.and_then(|rounds| rounds.parse().ok()).unwrap_or(7);
    let runtime = tokio::runtime::Runtime::new()?;
    let folder = tempfile::tempdir()?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let lab = Lab::start(folder.path(), protocol)?;
        let _manager = runtime.block_on(push(lab.control, &lab.paths, &lab.identity))?;
        println!("{}", lab.measure(rounds)?);
    }
    Ok(())
}

/// The processes of one protocol.
struct Lab {
    protocol: Protocol,
    paths: Paths,
    control: SocketAddr,
    /// The manager's.
    identity: Identity,
    log: std::path::PathBuf,
    agent: Running,
    _others: [Running; 2],
}

impl Lab {
    fn start(folder: &Path, protocol: Protocol) -> anyhow::Result<Self> {
        let paths = Paths {
            direct: free_address()?,
            nginx: free_address()?,
            agent: free_address()?,
        };
        let (http2, pass) = match protocol {
            Protocol::Http1 => (
                "",
                "proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ''; proxy_buffering off;",
            ),
            Protocol::Http2 => ("http2", "grpc_pass grpc://app;"),
        };
        let app = format!(
            "server {{ listen {} {http2}; location / {{ default_type text/plain; return 200 'hello from the application'; }} }}",
            paths.direct
        );
        let proxy = format!(
            "upstream app {{ server {}; keepalive 64; keepalive_requests 100000000; }}\n\
             server {{ listen {} {http2}; location / {{ {pass} }} }}",
            paths.direct, paths.nginx
        );
        let others = [
            nginx(&folder.join(format!("app{http2}")), &app)?,
            nginx(&folder.join(format!("proxy{http2}")), &proxy)?,
        ];
        wait_for(paths.direct)?;
        wait_for(paths.nginx)?;
        let (control, identity) = (free_address()?, Identity::generate());
        let agent = Command::new(program())
            .env("TP_AGENT_SEED", SEED)
            .env("TP_LOG", "warn")
            .arg("--control")
            .arg(control.to_string())
            .arg("--manager-key")
            .arg(identity.key_hash().to_string())
            .arg("--listen")
            .arg(format!("{}={}", paths.agent, paths.direct))
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start the agent")?;
        let agent = Running(agent);
        wait_for(control)?;
        wait_for(paths.agent)?;
        Ok(Self {
            protocol,
            paths,
            control,
            identity,
            log: folder.join("requests"),
            agent,
            _others: others,
        })
    }

    fn measure(&self, rounds: usize) -> anyhow::Result<String> {
        let idle = self.agent.resident()?;
        let mut alone: [Vec<Run>; 3] = Default::default();
        let mut many: [Vec<Run>; 3] = Default::default();
        for _ in 0..rounds {
            let addresses = [self.paths.direct, self.paths.nginx, self.paths.agent];
            for (place, address) in addresses.into_iter().enumerate() {
                alone[place].push(self.load(address, 1, ALONE)?);
            }
            for (place, address) in addresses.into_iter().enumerate() {
                many[place].push(self.load(address, CLIENTS, MANY)?);
            }
        }
        let loaded = self.agent.resident()?;
        let name = match self.protocol {
            Protocol::Http1 => "HTTP/1.1",
            Protocol::Http2 => "HTTP/2",
        };
        let mut text = format!("C7 {name}, {rounds} rounds: median (least .. most)\n");
        for (place, who) in ["direct", "nginx", "agent"].into_iter().enumerate() {
            let row = |what: &str, runs: &[Run], of: fn(&Run) -> f64| {
                format!("  {who:<8}{what:<26}{}\n", spread(runs.iter().map(of)))
            };
            text += &row("one at a time, p50 ms", &alone[place], |run| run.p50);
            text += &row("one at a time, p99 ms", &alone[place], |run| run.p99);
            text += &row("32 clients, requests/s", &many[place], |run| run.rate);
        }
        let [direct, nginx, agent] = &alone;
        let more = |of: fn(&Run) -> f64, runs: &[Run]| {
            spread(
                runs.iter()
                    .zip(direct)
                    .map(|(run, direct)| of(run) - of(direct)),
            )
        };
        writeln!(
            text,
            "  added p50: agent {}, nginx {} ms (target <= 0.3)",
            more(|run| run.p50, agent),
            more(|run| run.p50, nginx)
        )?;
        writeln!(
            text,
            "  added p99: agent {}, nginx {} ms (target <= 2)",
            more(|run| run.p99, agent),
            more(|run| run.p99, nginx)
        )?;
        let ratio = many[2]
            .iter()
            .zip(&many[1])
            .map(|(agent, nginx)| agent.rate / nginx.rate);
        writeln!(
            text,
            "  requests/s: agent / nginx {} (target >= 0.7)",
            spread(ratio)
        )?;
        writeln!(
            text,
            "C8 resident: {idle} idle, {loaded} after the load (target <= 10)"
        )?;
        Ok(text)
    }

    fn load(&self, address: SocketAddr, clients: usize, requests: usize) -> anyhow::Result<Run> {
        let mut command = Command::new("h2load");
        if let Protocol::Http1 = self.protocol {
            command.arg("--h1");
        }
        let output = command
            .args([
                "-t",
                "1",
                "-n",
                &requests.to_string(),
                "-c",
                &clients.to_string(),
            ])
            .arg(format!("--log-file={}", self.log.display()))
            .arg(format!("http://{address}/"))
            .output()
            .context("h2load is not installed")?;
        let log = std::fs::read_to_string(&self.log)?;
        std::fs::remove_file(&self.log)?;
        evaluate(&log, requests)
            .with_context(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Rows of h2load: start, status, duration; times in microseconds.
fn evaluate(log: &str, requests: usize) -> anyhow::Result<Run> {
    let mut rows = Vec::with_capacity(requests);
    for row in log.lines() {
        let mut words = row.split('\t').map(|word| word.parse::<i64>());
        let (Some(Ok(start)), Some(Ok(200)), Some(Ok(took))) =
            (words.next(), words.next(), words.next())
        else {
            bail!("a request failed: {row}");
        };
        rows.push((took, start + took, start));
    }
    if rows.len() != requests {
        bail!("{} of {requests} requests were answered", rows.len());
    }
    rows.sort_unstable();
    let first = rows.iter().map(|row| row.2).min().unwrap_or_default();
    let last = rows.iter().map(|row| row.1).max().unwrap_or_default();
    let at = |share: f64| rows[((rows.len() - 1) as f64 * share) as usize].0 as f64 / 1e3;
    Ok(Run {
        rate: requests as f64 / ((last - first) as f64 / 1e6),
        p50: at(0.5),
        p99: at(0.99),
    })
}

fn spread(values: impl Iterator<Item = f64>) -> String {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let [least, median, most] = [0, values.len() / 2, values.len() - 1].map(|at| values[at]);
    match median.abs() < 100.0 {
        true => format!("{median:.3} ({least:.3} .. {most:.3})"),
        false => format!("{median:.0} ({least:.0} .. {most:.0})"),
    }
}

/// Resident memory, in MiB.
struct Resident {
    /// What the process wrote.
    own: f64,
    /// Pages of the program's file, which all its processes of a node share.
    program: f64,
}

impl std::fmt::Display for Resident {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { own, program } = self;
        write!(
            f,
            "{:.1} MiB ({own:.1} its own, {program:.1} of the program)",
            own + program
        )
    }
}

/// A child that is ended when this is dropped.
struct Running(Child);

impl Running {
    fn resident(&self) -> anyhow::Result<Resident> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.with_context(|| format!("no {name}"))?;
            anyhow::Ok(kib.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
        };
        Ok(Resident {
            own: field("RssAnon:")?,
            program: field("RssFile:")?,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The static program of the image where `TP_BIN_DIR` says that it was built, otherwise cargo's.
fn program() -> std::path::PathBuf {
    match std::env::var_os("TP_BIN_DIR") {
        Some(folder) => Path::new(&folder).join("tp-agent"),
        None => env!("CARGO_BIN_EXE_tp-agent").into(),
    }
}

fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn wait_for(address: SocketAddr) -> anyhow::Result<()> {
    for _ in 0..200 {
        if std::net::TcpStream::connect(address).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    bail!("nothing listens on {address}")
}

/// One nginx with one worker that keeps connections open.
fn nginx(folder: &Path, servers: &str) -> anyhow::Result<Running> {
    std::fs::create_dir(folder)?;
    let root = folder.display();
    let config = format!(
        "daemon off; master_process off; pid {root}/pid; error_log stderr crit; worker_processes 1;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; keepalive_requests 100000000; tcp_nodelay on;\n\
         client_body_temp_path {root}/a; proxy_temp_path {root}/b; fastcgi_temp_path {root}/c; uwsgi_temp_path {root}/d; scgi_temp_path {root}/e;\n\
         {servers} }}\n"
    );
    std::fs::write(folder.join("nginx.conf"), config)?;
    let child = Command::new("nginx")
        .arg("-p")
        .arg(folder)
        .args(["-e", "stderr", "-c", "nginx.conf"])
        .stdin(Stdio::null())
        .spawn()
        .context("nginx is not installed")?;
    Ok(Running(child))
}

/// The manager: one intercept that matches none of the requests, so that each of them is looked at.
async fn push(control: SocketAddr, paths: &Paths, identity: &Identity) -> anyhow::Result<Tunnel> {
    let tcp = TcpStream::connect(control).await?;
    let pinned = Identity::from_seed(SEED)?.key_hash();
    tp_tunnel::carrier::tune(&tcp)?;
    let tls = connect_tls(tcp, identity, &pinned).await?;
    let settings = Settings {
        ping_interval: Duration::from_secs(1),
        ..Settings::default()
    };
    let (tunnel, driver) = Tunnel::establish_with(tls, settings).await?;
    tokio::spawn(driver);
    let table = json!({"ports": [{
        "listen": paths.agent.port(),
        "app": paths.direct.port(),
        "intercepts": [{
            "id": "uid-ada", "created": 1,
            "matchers": [{"header": {"name": "x-tp-user", "exact": "ada"}}]
        }]
    }]});
    let body = bytes::Bytes::from(table.to_string());
    let renewed = tunnel.clone();
    let first = renewed
        .control(Method::PUT, "/v1/routes", body.clone())
        .await?;
    if first.status() != StatusCode::NO_CONTENT {
        bail!("the routes were refused: {}", first.status());
    }
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(5)).await;
            if renewed
                .control(Method::PUT, "/v1/routes", body.clone())
                .await
                .is_err()
            {
                return;
            }
        }
    });
    Ok(tunnel)
}
