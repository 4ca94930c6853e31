//! `probe`: the traffic of the tests. `probe serve` is a server for pods; the other commands are a SOCKS5 client that
//! compares every byte and says how a connection ended.
//!
//! It knows nothing of `tp`: what it says about a proxy would be as true of any other. Results are one JSON object on
//! stdout. Exit code 3 means that the proxy refused, and the object holds its reply code.
//!
//! ```text
//! probe serve
//! probe tcp PROXY HOST PORT                      stdin to the flow, the flow to stdout, how it ended to stderr
//! probe udp PROXY HOST PORT COUNT SIZE           COUNT datagrams, each echoed
//! probe udp-forward PROXY LISTEN HOST PORT       a local UDP port in front of one UDP ASSOCIATE, for `dig`
//! probe flows PROXY HOST PORT COUNT BYTES hold|go   COUNT flows at once; `hold` keeps them until stdin ends
//! probe short PROXY HOST PORT COUNT AT_ONCE      COUNT connections one after the other in AT_ONCE lanes
//! probe raw ADDRESS SECONDS|head                 stdin to the address as it is; says what came back and how it ended
//!                                                within that time, or until the answer's HTTP head is complete
//! probe ring ADDRESS BYTES                       BYTES to an echo and back, every call through io_uring
//! ```

mod flows;
mod pattern;
mod serve;
mod socks;
mod sys;
mod udp;

use std::io::Write as _;
use std::net::ToSocketAddrs as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&words).await {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            let refused = error.downcast_ref::<socks::Refused>();
            say(&json!({ "error": format!("{error:#}"), "reply": refused.map(|r| r.0) }));
            std::process::ExitCode::from(if refused.is_some() { 3 } else { 1 })
        }
    }
}

async fn run(words: &[&str]) -> anyhow::Result<()> {
    match words {
        ["serve"] => serve::run().await,
        ["tcp", proxy, host, port] => tcp(proxy, host, port.parse()?).await,
        ["udp", proxy, host, port, count, size] => {
            udp::echo(proxy, host, port.parse()?, count.parse()?, size.parse()?).await
        }
        ["udp-forward", proxy, listen, host, port] => {
            udp::forward(proxy, listen, host, port.parse()?).await
        }
        [
            "flows",
            proxy,
            host,
            port,
            count,
            bytes,
            mode @ ("hold" | "go"),
        ] => {
            flows::many(
                proxy,
                host,
                port.parse()?,
                count.parse()?,
                bytes.parse()?,
                *mode == "hold",
            )
            .await
        }
        ["short", proxy, host, port, count, at_once] => {
            flows::short(proxy, host, port.parse()?, count.parse()?, at_once.parse()?).await
        }
        ["raw", address, until] => raw(address, until).await,
        ["ring", address, bytes] => ring(address, bytes.parse()?),
        other => bail!("unknown arguments {other:?}"),
    }
}

/// Joins stdin and stdout to one flow; its end goes to stderr as `end=fin` or `end=rst`.
async fn tcp(proxy: &str, host: &str, port: u16) -> anyhow::Result<()> {
    let (mut read, mut write) = socks::connect(proxy, host, port).await?.into_split();
    let send = tokio::spawn(async move {
        let sent = tokio::io::copy(&mut tokio::io::stdin(), &mut write).await;
        // Half-close, and keep the writer until the other half has ended too.
        let _ = write.shutdown().await;
        (sent, write)
    });
    let mut stdout = tokio::io::stdout();
    let end = copy_to_end(&mut read, &mut stdout).await;
    stdout.flush().await?;
    send.abort();
    let _ = writeln!(std::io::stderr(), "end={end}");
    // tokio's stdin thread would hold the process until stdin ends.
    std::process::exit(0);
}

/// Copies until the end and names it.
async fn copy_to_end(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut tokio::io::Stdout,
) -> &'static str {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => return "fin",
            Ok(len) => {
                if to.write_all(&buffer[..len]).await.is_err() {
                    return "stdout";
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return "rst",
            Err(_) => return "error",
        }
    }
}

/// Sends stdin as it is and keeps the connection open; reports the answer, its end, and the time until then.
async fn raw(address: &str, until: &str) -> anyhow::Result<()> {
    let head_only = until == "head";
    let limit = Duration::from_secs(if head_only { 30 } else { until.parse()? });
    let mut input = Vec::new();
    tokio::io::stdin().read_to_end(&mut input).await?;
    let mut stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("cannot reach {address}"))?;
    let (start, mut answer, mut end) = (Instant::now(), Vec::new(), "open");
    let (mut read, mut write) = stream.split();
    // A peer that closes early makes the write fail; what it said before still counts.
    let send = async {
        let _ = write.write_all(&input).await;
        std::future::pending::<()>().await;
    };
    let receive = async {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            match read.read(&mut buffer).await {
                Ok(0) => break end = "fin",
                Ok(len) => answer.extend_from_slice(&buffer[..len]),
                Err(_) => break end = "rst",
            }
            if head_only && answer.windows(4).any(|four| four == b"\r\n\r\n") {
                break;
            }
        }
    };
    tokio::select! {
        () = send => {}
        () = receive => {}
        () = tokio::time::sleep(limit) => {}
    }
    let elapsed = u64::try_from(start.elapsed().as_millis())?;
    say(
        &json!({ "end": end, "ms": elapsed, "hex": hex(&answer), "text": String::from_utf8_lossy(&answer) }),
    );
    Ok(())
}

/// Sends a pattern in blocks, each after the echo of the one before, through io_uring alone.
fn ring(address: &str, bytes: usize) -> anyhow::Result<()> {
    const BLOCK: usize = 32 * 1024;
    let address = address
        .to_socket_addrs()?
        .next()
        .context("the name has no address")?;
    let mut stream = sys::RingStream::connect(address).context("connect")?;
    let (mut pattern, mut left, mut echoed) = (pattern::Pattern::new(7), bytes, 0);
    while left > 0 {
        let mut block = vec![0; left.min(BLOCK)];
        pattern.fill(&mut block);
        let mut sent = 0;
        while sent < block.len() {
            sent += stream.send(&block[sent..]).context("send")?;
        }
        let (mut back, mut got) = (vec![0; block.len()], 0);
        while got < back.len() {
            match stream.receive(&mut back[got..]).context("receive")? {
                0 => bail!("FIN after {} bytes", echoed + got),
                more => got += more,
            }
        }
        anyhow::ensure!(back == block, "other bytes than were sent");
        left -= block.len();
        echoed += block.len();
    }
    say(&json!({ "echoed": echoed }));
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Prints one result.
fn say(value: &Value) {
    let mut stdout = std::io::stdout().lock();
    // A reader that went away needs no answer.
    let _ = writeln!(stdout, "{value}").and_then(|()| stdout.flush());
}
