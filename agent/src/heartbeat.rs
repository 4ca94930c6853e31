//! What a worker and its parent say to each other: one line with ports, over a pipe in each direction.
//!
//! ```text
//! worker ──► parent   live 80 8080    twice a second, and at every change: it works, and these ports want traffic
//! worker ◄── parent   live 80 8080    at every change: these ports are redirected now
//! ```
//!
//! The end of either pipe is the end of who wrote to it.

use std::io::{self, Write};

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::sync::watch;

/// Ports that one line may have.
const PORTS_MAX: usize = 64;

/// Bytes of the longest line.
const LINE_MAX: u64 = 1024;

/// The line for these ports.
pub(crate) fn line(ports: &[u16]) -> String {
    let mut line = "live".to_owned();
    for port in ports {
        line.push_str(&format!(" {port}"));
    }
    line.push('\n');
    line
}

/// The ports of the next line. Not cancel safe: a dropped call may have taken a part of a line.
///
/// # Errors
/// `UnexpectedEof` at the end, `InvalidData` for anything that [`line()`] does not write; the other side parses traffic and
/// may be anybody's by now.
pub(crate) async fn next(lines: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Vec<u16>> {
    let mut line = Vec::new();
    lines.take(LINE_MAX).read_until(b'\n', &mut line).await?;
    match line.is_empty() {
        true => Err(io::ErrorKind::UnexpectedEof.into()),
        false => parse(&line).ok_or_else(|| io::ErrorKind::InvalidData.into()),
    }
}

fn parse(line: &[u8]) -> Option<Vec<u16>> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let mut words = line.split(' ');
    words.next().filter(|word| *word == "live")?;
    let ports = words.map(|word| word.parse().ok().filter(|port| *port != 0));
    let ports: Vec<u16> = ports.collect::<Option<_>>()?;
    (ports.len() <= PORTS_MAX).then_some(ports)
}

/// The worker's voice: writes each word to `out`.
pub fn beat_to(mut out: impl Write) -> impl FnMut(&[u16]) -> io::Result<()> {
    move |ports| {
        out.write_all(line(ports).as_bytes())?;
        out.flush()
    }
}

/// The worker's ear: the ports that are redirected. Returns when the parent is silent for ever, which is how it asks the
/// worker to stop.
pub async fn hear(parent: impl AsyncRead + Unpin, redirected: watch::Sender<Vec<u16>>) {
    let mut lines = BufReader::with_capacity(256, parent);
    while let Ok(ports) = next(&mut lines).await {
        redirected.send_replace(ports);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_can_say_ports_and_nothing_else() {
        for ports in [&[][..], &[80], &[80, 8080, 65535]] {
            assert_eq!(parse(line(ports).as_bytes()).as_deref(), Some(ports));
        }
        assert_eq!(line(&[80, 8080]), "live 80 8080\n");
        let many = format!("live{}\n", " 80".repeat(65));
        for bad in [
            &b"live 80"[..],
            b"live 0\n",
            b"live 65536\n",
            b"live  80\n",
            b"dead\n",
            b"\n",
            b"live -1\n",
            b"live 80\r\n",
            b"\xff\n",
            many.as_bytes(),
        ] {
            assert_eq!(parse(bad), None, "{}", bad.escape_ascii());
        }
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
