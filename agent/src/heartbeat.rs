//! What a worker and its parent say to each other: one line with ports, over a pipe in each direction.
//!
//! ```text
//! worker ──► parent   live 80 8080    twice a second, and at every change: it works, and these ports want traffic
//! worker ──► parent   live 53=40001   the same, and UDP port 53 is to come to port 40001
//! worker ◄── parent   live 80 8080    to each of these: so it is now
//! worker ──► parent   close 80        reset the idle connections to these ports that bypass the agent
//! worker ◄── parent   close 80        it is done
//! worker ──► parent   yield           another agent takes over; the answer is that the parent closes its pipe
//! ```
//!
//! Each other word is answered, in order: so the worker knows which of its words an answer is to, and does not take the answer to an
//! older one for the state of the kernel. The end of either pipe is the end of who wrote to it.

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;

/// Ports that one line may have.
const PORTS_MAX: usize = 64;

/// Bytes of the longest line.
const LINE_MAX: u64 = 1024;

/// How long the parent may take to do what it is asked for.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// Ports that are redirected, or are to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// Those of TCP, which all come to one port.
    pub tcp: Vec<u16>,
    /// Those of UDP, each with the port that it comes to.
    pub udp: Vec<(u16, u16)>,
}

impl Ports {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tcp.is_empty() && self.udp.is_empty()
    }

    /// Whether all these are among them.
    fn have(&self, tcp: &[u16], udp: &[u16]) -> bool {
        let has_udp = |port: &u16| self.udp.iter().any(|(known, _)| known == port);
        tcp.iter().all(|port| self.tcp.contains(port)) && udp.iter().all(has_udp)
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// These ports want traffic; or get it.
    Live(Ports),
    /// Idle connections to these ports are to be reset; or were.
    Close(Vec<u16>),
    /// Nothing is to be redirected any more, for another agent takes over.
    Yield,
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, tcp, udp) = match self {
            Self::Live(Ports { tcp, udp }) => ("live", tcp, &udp[..]),
            Self::Close(ports) => ("close", ports, &[][..]),
            Self::Yield => return f.write_str("yield\n"),
        };
        f.write_str(word)?;
        tcp.iter().try_for_each(|port| write!(f, " {port}"))?;
        udp.iter()
            .try_for_each(|(port, own)| write!(f, " {port}={own}"))?;
        f.write_str("\n")
    }
}

/// The next line. Not cancel safe: a dropped call may have taken a part of it.
///
/// # Errors
/// `UnexpectedEof` at the end, `InvalidData` for anything that is no [`Word`]; the other side parses traffic and may be
/// anybody's by now.
pub(crate) async fn next(lines: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Word> {
    let mut line = Vec::new();
    lines.take(LINE_MAX).read_until(b'\n', &mut line).await?;
    match line.is_empty() {
        true => Err(io::ErrorKind::UnexpectedEof.into()),
        false => parse(&line).ok_or_else(|| io::ErrorKind::InvalidData.into()),
    }
}

fn parse(line: &[u8]) -> Option<Word> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let mut words = line.split(' ');
    let word = words.next()?;
    let number = |word: &str| word.parse().ok().filter(|port: &u16| *port != 0);
    let (mut tcp, mut udp) = (Vec::new(), Vec::new());
    for word in words {
        match word.split_once('=') {
            Some((port, own)) => udp.push((number(port)?, number(own)?)),
            None => tcp.push(number(word)?),
        }
    }
    match word {
        _ if tcp.len() + udp.len() > PORTS_MAX => None,
        "live" => Some(Word::Live(Ports { tcp, udp })),
        "close" if udp.is_empty() => Some(Word::Close(tcp)),
        "yield" if tcp.is_empty() && udp.is_empty() => Some(Word::Yield),
        _ => None,
    }
}

/// The worker's voice: writes each word to `out`.
pub fn say_to(mut out: impl Write) -> impl FnMut(&Word) -> io::Result<()> {
    move |word| {
        out.write_all(word.to_string().as_bytes())?;
        out.flush()
    }
}

/// What a worker has heard of its parent.
#[derive(Debug, Default)]
pub struct Heard {
    /// Ports that were redirected when it answered last.
    redirected: Ports,
    /// Words about ports that it has answered.
    answers: u64,
    /// How often idle connections were closed.
    closed: u64,
}

/// Listens to the parent for as long as it speaks. Its end, or its death, is how it asks the worker to stop.
pub async fn hear(parent: impl AsyncRead + Unpin, heard: watch::Sender<Heard>) {
    let mut lines = BufReader::with_capacity(256, parent);
    while let Ok(word) = next(&mut lines).await {
        heard.send_modify(|heard| match word {
            Word::Live(ports) => {
                heard.redirected = ports;
                heard.answers += 1;
            }
            Word::Close(_) => heard.closed += 1,
            // Not a parent's word.
            Word::Yield => {}
        });
    }
}

/// The worker's parent, as its tasks see it.
#[derive(Debug)]
pub struct Parent {
    /// Words about ports that the worker has begun to say.
    said: AtomicU64,
    heard: watch::Receiver<Heard>,
    /// Words that are not about what is live; one at a time, so that an answer has one question.
    wish_tx: mpsc::Sender<Word>,
    turn: Semaphore,
}

impl Parent {
    /// With what [`hear`] hears, and where the worker's voice takes other words from.
    pub fn new(heard: watch::Receiver<Heard>) -> (Self, mpsc::Receiver<Word>) {
        let (wish_tx, wishes) = mpsc::channel(1);
        let turn = Semaphore::new(1);
        let parent = Self {
            said: AtomicU64::default(),
            heard,
            wish_tx,
            turn,
        };
        (parent, wishes)
    }

    /// Counts a word about ports. To be called before the ports are looked up.
    pub(crate) fn begin_word(&self) {
        self.said.fetch_add(1, Relaxed);
    }

    /// Waits until the kernel redirects all these ports, which the next word will have. False after [`PATIENCE`].
    pub(crate) async fn redirects(&self, tcp: &[u16], udp: &[u16]) -> bool {
        // Words up to here may have been made without them.
        let said = self.said.load(Relaxed);
        let mut heard = self.heard.clone();
        let all = heard.wait_for(|heard| heard.answers > said && heard.redirected.have(tcp, udp));
        matches!(timeout(PATIENCE, all).await, Ok(Ok(_)))
    }

    /// Has the idle connections to these ports closed. False after [`PATIENCE`].
    pub(crate) async fn close(&self, ports: Vec<u16>) -> bool {
        let Ok(_turn) = self.turn.acquire().await else {
            return false;
        };
        let mut heard = self.heard.clone();
        let before = heard.borrow_and_update().closed;
        let closed = async {
            self.wish_tx.send(Word::Close(ports)).await.ok()?;
            heard
                .wait_for(|heard| heard.closed > before)
                .await
                .ok()
                .map(drop)
        };
        matches!(timeout(PATIENCE, closed).await, Ok(Some(())))
    }

    /// Has the parent redirect nothing more and end this worker, which goes on with what it has. False after
    /// [`PATIENCE`].
    pub(crate) async fn yields(&self) -> bool {
        let mut heard = self.heard.clone();
        let yielded = async {
            self.wish_tx.send(Word::Yield).await.ok()?;
            // The end of the pipe.
            while heard.changed().await.is_ok() {}
            Some(())
        };
        matches!(timeout(PATIENCE, yielded).await, Ok(Some(())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_can_say_ports_and_nothing_else() {
        for ports in [vec![], vec![80], vec![80, 8080, 65535]] {
            let udp = vec![(53, 40001)];
            let live = |udp| {
                Word::Live(Ports {
                    tcp: ports.clone(),
                    udp,
                })
            };
            for word in [
                live(Vec::new()),
                live(udp),
                Word::Close(ports.clone()),
                Word::Yield,
            ] {
                assert_eq!(parse(word.to_string().as_bytes()), Some(word));
            }
        }
        let ports = Ports {
            tcp: vec![80, 8080],
            udp: vec![(53, 40001)],
        };
        assert_eq!(Word::Live(ports).to_string(), "live 80 8080 53=40001\n");
        let many = format!("live{}\n", " 80".repeat(65));
        for bad in [
            &b"live 80"[..],
            b"live 0\n",
            b"live 65536\n",
            b"live  80\n",
            b"dead\n",
            b"close 0\n",
            b"\n",
            b"live -1\n",
            b"live 53=\n",
            b"live 53=0\n",
            b"live 53=1=2\n",
            b"close 53=40001\n",
            b"yield 80\n",
            b"live 80\r\n",
            b"\xff\n",
            many.as_bytes(),
        ] {
            assert_eq!(parse(bad), None, "{}", bad.escape_ascii());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_answer_to_an_older_word_is_not_the_answer() {
        let (heard_tx, heard) = watch::channel(Heard::default());
        let parent = Parent::new(heard).0;
        let answer = |tcp: &[u16]| {
            heard_tx.send_modify(|heard| {
                heard.redirected.tcp = tcp.to_vec();
                heard.answers += 1;
            });
        };
        parent.begin_word();
        answer(&[80]);
        // An intercept went, and comes back before that was answered.
        parent.begin_word();
        let redirected = parent.redirects(&[80], &[]);
        tokio::pin!(redirected);
        assert!(futures::poll!(&mut redirected).is_pending());
        parent.begin_word();
        answer(&[]);
        assert!(futures::poll!(&mut redirected).is_pending());
        answer(&[80]);
        assert!(redirected.await);
    }

    #[tokio::test]
    async fn a_line_that_does_not_end_is_not_read_for_ever() {
        let endless = [b'l'; 5000];
        let error = next(&mut &endless[..]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let error = next(&mut &b""[..]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
