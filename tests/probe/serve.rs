//! The server in a pod. One port, one behaviour, so that a test can ask for the end it wants to see.
//!
//! | port | behaviour |
//! | --- | --- |
//! | 7 TCP, UDP | echo |
//! | 9 | reads until FIN, then answers `<length> <SHA-256 in hex>\n` and closes |
//! | 13 | speaks first: `hello\n`, then echo |
//! | 14 | reads one byte, answers `bye`, then resets |
//! | 15 | says nothing, not even that it is there: SYNs are not answered |
//! | 19 | reads `<length> <seed>\n`, answers with that much of the seed's pattern and closes |
//! | 80 | HTTP: `/ends` = how connections to 7 ended, `/hostname`, anything else `hello-from-probe` |

use std::fmt::Write as _;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

use crate::pattern::Pattern;

/// How connections to the echo port ended so far.
#[derive(Default)]
struct Ends {
    open: AtomicU64,
    fin: AtomicU64,
    rst: AtomicU64,
}

static ENDS: Ends = Ends {
    open: AtomicU64::new(0),
    fin: AtomicU64::new(0),
    rst: AtomicU64::new(0),
};

/// Serves until killed.
pub(crate) async fn run() -> anyhow::Result<()> {
    let udp = UdpSocket::bind("[::]:7").await.context("UDP port 7")?;
    tokio::try_join!(
        listen(7, echo_counted),
        listen(9, digest),
        listen(13, hello),
        listen(14, say_bye_and_reset),
        silent(15),
        listen(19, source),
        listen(80, http),
        async { udp_echo(udp).await.context("UDP echo") },
    )?;
    Ok(())
}

async fn listen<F>(port: u16, behaviour: fn(TcpStream) -> F) -> anyhow::Result<()>
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind(("::", port))
        .await
        .with_context(|| format!("port {port}"))?;
    loop {
        match listener.accept().await {
            // A connection that fails is the test's business, not the server's.
            Ok((stream, _)) => drop(tokio::spawn(behaviour(stream))),
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
        }
    }
}

/// A listener whose queue is full: the kernel drops the SYNs that come then, so that a connect hangs.
async fn silent(port: u16) -> anyhow::Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::UNSPECIFIED, port).into())?;
    let listener = socket.listen(1)?;
    // Nobody accepts them. A queue for one holds two.
    let own = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let fillers = (
        TcpStream::connect(own).await?,
        TcpStream::connect(own).await?,
    );
    std::future::pending::<()>().await;
    drop((listener, fillers));
    Ok(())
}

async fn echo_counted(stream: TcpStream) -> io::Result<()> {
    ENDS.open.fetch_add(1, Relaxed);
    let ended = echo(stream).await;
    ENDS.open.fetch_sub(1, Relaxed);
    if ended.is_ok() { &ENDS.fin } else { &ENDS.rst }.fetch_add(1, Relaxed);
    ended
}

async fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::new();
    loop {
        // Waiting flows hold no buffer: ten thousand of them must fit into a small pod.
        stream.readable().await?;
        buffer.resize(16 * 1024, 0);
        match stream.try_read(&mut buffer) {
            Ok(0) => return stream.shutdown().await,
            Ok(len) => stream.write_all(&buffer[..len]).await?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        buffer = Vec::new();
    }
}

async fn digest(mut stream: TcpStream) -> io::Result<()> {
    let (mut hash, mut total, mut buffer) = (Sha256::new(), 0_u64, vec![0; 64 * 1024]);
    loop {
        match stream.read(&mut buffer).await? {
            0 => break,
            len => {
                hash.update(&buffer[..len]);
                total += len as u64;
            }
        }
    }
    let mut line = format!("{total} ");
    for byte in hash.finalize() {
        write!(line, "{byte:02x}").map_err(io::Error::other)?;
    }
    line.push('\n');
    stream.write_all(line.as_bytes()).await?;
    stream.shutdown().await
}

async fn hello(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(b"hello\n").await?;
    echo(stream).await
}

async fn say_bye_and_reset(mut stream: TcpStream) -> io::Result<()> {
    stream.read_u8().await?;
    stream.write_all(b"bye").await?;
    // What is written must leave before the reset takes the rest of the send queue with it.
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    stream.set_zero_linger()
}

async fn source(stream: TcpStream) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    let mut numbers = line
        .split_whitespace()
        .map(|word| word.parse::<u64>().map_err(io::Error::other));
    let mut number = || numbers.next().ok_or(io::ErrorKind::InvalidData)?;
    let (mut left, mut pattern) = (number()?, Pattern::new(number()?));
    let mut buffer = vec![0; 64 * 1024];
    while left > 0 {
        let len = left.min(buffer.len() as u64) as usize;
        pattern.fill(&mut buffer[..len]);
        stream.write_all(&buffer[..len]).await?;
        left -= len as u64;
    }
    stream.shutdown().await
}

async fn http(stream: TcpStream) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let (mut request, mut header) = (String::new(), String::new());
    stream.read_line(&mut request).await?;
    while stream.read_line(&mut header).await? > 2 {
        header.clear();
    }
    let body = match request.split(' ').nth(1) {
        Some("/ends") => {
            let Ends { open, fin, rst } = &ENDS;
            format!(
                "open {} fin {} rst {}\n",
                open.load(Relaxed),
                fin.load(Relaxed),
                rst.load(Relaxed)
            )
        }
        Some("/hostname") => std::fs::read_to_string("/proc/sys/kernel/hostname")?,
        _ => "hello-from-probe\n".into(),
    };
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await?;
    stream.shutdown().await
}

async fn udp_echo(socket: UdpSocket) -> io::Result<()> {
    let mut buffer = vec![0; 65_536];
    loop {
        // An ICMP error about an earlier peer surfaces here, and concerns nobody else.
        let Ok((len, peer)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        let _ = socket.send_to(&buffer[..len], peer).await;
    }
}
