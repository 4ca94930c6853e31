//! The far end of the cluster benches: one TCP server that sends, receives or echoes as the first bytes ask.
//!
//! A request is one command byte and a big-endian 64-bit count: `D n` sends n bytes, `U n` reads n bytes and answers one
//! byte, `E` echoes whatever comes until the client ends its half, `O` echoes one byte and ends the connection, `H` echoes
//! one byte and holds the connection without a thread, `F` sends one byte at once (a server-first protocol, asked by port
//! and not by the client: it is served on the port after), `GET` is a request of HTTP and answered as such, `X` orders it to
//! ask somebody else in that way (`tp_benches::http`). It knows nothing of what lies between.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::thread;

use tp_benches::http;

/// Bytes a call hands to the kernel; large enough that the system call's price disappears.
const BLOCK: usize = 256 * 1024;

fn main() -> io::Result<()> {
    let port: u16 = std::env::args()
        .nth(1)
        .and_then(|port| port.parse().ok())
        .unwrap_or(7000);
    let server_first = TcpListener::bind(("0.0.0.0", port + 1))?;
    thread::spawn(move || accept(&server_first, |mut stream| stream.write_all(b"!")));
    accept(&TcpListener::bind(("0.0.0.0", port))?, serve);
    Ok(())
}

fn accept(listener: &TcpListener, serve: fn(TcpStream) -> io::Result<()>) {
    for stream in listener.incoming().flatten() {
        // A connection that ends early is the measuring side's business; the next one must still be served.
        thread::spawn(move || serve(stream));
    }
}

fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut command = [0; 1];
    stream.peek(&mut command)?;
    if command == *b"G" {
        return http::answer(stream, b"peer");
    }
    stream.read_exact(&mut command)?;
    match command[0] {
        b'X' => http::carry_out(stream),
        b'D' => {
            let count = count(&mut stream)?;
            send(&mut stream, count)
        }
        b'U' => {
            let count = count(&mut stream)?;
            receive(&mut stream, count)?;
            stream.write_all(b".")
        }
        b'E' => echo(stream),
        b'O' => {
            stream.read_exact(&mut command)?;
            stream.write_all(&command)
        }
        b'H' => {
            stream.read_exact(&mut command)?;
            stream.write_all(&command)?;
            hold(stream)
        }
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Keeps a connection, and lets go of those whose clients have.
fn hold(stream: TcpStream) -> io::Result<()> {
    const LOOK_EVERY: usize = 1000;
    static HELD: Mutex<Vec<TcpStream>> = Mutex::new(Vec::new());
    stream.set_nonblocking(true)?;
    let mut held = HELD.lock().expect("nobody panics with it");
    held.push(stream);
    if held.len().is_multiple_of(LOOK_EVERY) {
        held.retain(|stream| {
            stream
                .peek(&mut [0])
                .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        });
    }
    Ok(())
}

fn count(stream: &mut TcpStream) -> io::Result<u64> {
    let mut count = [0; 8];
    stream.read_exact(&mut count)?;
    Ok(u64::from_be_bytes(count))
}

fn send(stream: &mut TcpStream, mut count: u64) -> io::Result<()> {
    let block = vec![0x5a; BLOCK];
    while count > 0 {
        let part = usize::try_from(count).unwrap_or(BLOCK).min(BLOCK);
        stream.write_all(&block[..part])?;
        count -= part as u64;
    }
    Ok(())
}

fn receive(stream: &mut TcpStream, mut count: u64) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    while count > 0 {
        match stream.read(&mut block)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => count = count.saturating_sub(read as u64),
        }
    }
    Ok(())
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut block = vec![0; 16 * 1024];
    loop {
        match stream.read(&mut block)? {
            0 => return Ok(()),
            read => stream.write_all(&block[..read])?,
        }
    }
}
