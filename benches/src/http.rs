//! The least of HTTP/1.1 that a diverted request needs, for both ends of it: requests without bodies on one kept
//! connection, and their answers. What stands between is what is measured, so neither end does more than it must.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What came of some requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answers {
    /// Body of the last answer: who gave it.
    pub who: String,
    /// How long each took.
    pub took: Vec<Duration>,
}

impl Answers {
    /// How long each took, in milliseconds.
    #[must_use]
    pub fn millis(&self) -> Vec<f64> {
        let millis = |took: &Duration| took.as_secs_f64() * 1e3;
        self.took.iter().map(millis).collect()
    }

    /// One line: who, then nanoseconds.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = self.who.clone();
        for took in &self.took {
            // Writing to a String does not fail.
            let _ = write!(line, " {}", took.as_nanos());
        }
        line
    }

    /// What [`Self::line`] wrote.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.trim().split(' ');
        let who = words.next().filter(|who| !who.is_empty())?.to_owned();
        let took = words.map(|word| word.parse().ok().map(Duration::from_nanos));
        let took = took.collect::<Option<_>>()?;
        Some(Self { who, took })
    }
}

/// Answers every request of a connection with `who`, until its client ends it.
///
/// # Errors
/// The connection broke.
pub fn answer(mut stream: TcpStream, who: &[u8]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut answer =
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", who.len()).into_bytes();
    answer.extend_from_slice(who);
    while head(&mut lines)?.is_some() {
        stream.write_all(&answer)?;
    }
    Ok(())
}

/// Sends `count` requests, one after the other, with `header: yes` where one is given.
///
/// # Errors
/// The connection broke, or an answer is none.
pub fn ask(mut stream: TcpStream, header: Option<&str>, count: u32) -> io::Result<Answers> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let header = header.map_or(String::new(), |name| format!("{name}: yes\r\n"));
    let request = format!("GET / HTTP/1.1\r\nhost: bench\r\n{header}\r\n");
    let (mut who, mut took) = (String::new(), Vec::new());
    for _ in 0..count {
        let started = Instant::now();
        stream.write_all(request.as_bytes())?;
        let length = head(&mut lines)?
            .flatten()
            .ok_or(io::ErrorKind::InvalidData)?;
        let mut body = vec![0; length];
        lines.read_exact(&mut body)?;
        took.push(started.elapsed());
        who = String::from_utf8_lossy(&body).into_owned();
    }
    Ok(Answers { who, took })
}

/// Reads a head; the length of the body that it announces, and `None` where the connection has ended.
fn head(lines: &mut impl BufRead) -> io::Result<Option<Option<usize>>> {
    let mut length = None;
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            return Ok(Some(length));
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().ok();
        }
    }
}

/// Asks a peer to [`ask`] somebody else. The answer is one line of [`Answers`].
///
/// # Errors
/// The connection broke.
pub fn write_order(
    stream: &mut TcpStream,
    address: &str,
    header: Option<&str>,
    count: u32,
) -> io::Result<()> {
    let header = header.unwrap_or("-");
    stream.write_all(format!("X{address} {header} {count}\n").as_bytes())
}

/// Carries out an order, from behind its first byte.
///
/// # Errors
/// It is none, or the connection broke. Where the other end cannot be reached, an empty line is the answer.
pub fn carry_out(stream: TcpStream) -> io::Result<()> {
    let mut order = String::new();
    BufReader::new(&stream).read_line(&mut order)?;
    let words: Vec<&str> = order.split_whitespace().collect();
    let [address, header, count] = words[..] else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let count = count.parse().map_err(|_| io::ErrorKind::InvalidInput)?;
    let header = Some(header).filter(|header| *header != "-");
    let asked = TcpStream::connect(address).and_then(|other| ask(other, header, count));
    let line = asked.map_or(String::new(), |answers| answers.line());
    (&stream).write_all(line.as_bytes())
}
