//! An agent that stops, as with its pod: nobody who has reached it notices.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod common;

use std::io::{Read, Write};
use std::time::Duration;

use common::{ADA, ada, agent, agent_with, expect, server, soon};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

#[tokio::test]
async fn a_stop_ends_what_is_idle_and_lets_the_rest_finish() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = common::Server::at(listener.local_addr().unwrap());
    let mut agent = agent_with(app, server("local").await, Duration::from_secs(15)).await;
    agent.push(ada(false)).await;
    let mut busy = agent.connect().await;
    busy.send("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
    let (mut server, _) = soon(listener.accept()).await.unwrap();
    expect(&mut server, "\r\n\r\n").await;
    let mut idle = agent.connect().await;
    assert!(idle.get("/", ADA).await.contains("local"));
    agent.stop();
    assert_eq!(idle.rest().await.unwrap(), "");
    server
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        .await
        .unwrap();
    assert!(busy.answer().await.ends_with("ok"));
    assert_eq!(busy.rest().await.unwrap(), "");
    soon(async { while TcpStream::connect(agent.address).await.is_ok() {} }).await;
}

/// The kernel accepts connections for a program that is busy, and resets them when it closes its socket.
#[tokio::test]
async fn whoever_the_kernel_has_accepted_is_served_after_a_stop() {
    let mut agent = agent().await;
    // Nothing of the agent runs between these, for it has no thread of its own.
    let connect = || std::net::TcpStream::connect(agent.address).unwrap();
    let mut clients: Vec<_> = (0..20).map(|_| connect()).collect();
    agent.stop();
    tokio::task::yield_now().await;
    clients.extend((0..20).map(|_| std::net::TcpStream::connect(agent.address).unwrap()));
    for (n, client) in clients.into_iter().enumerate() {
        let answered = tokio::task::spawn_blocking(move || answer(client, n));
        assert!(soon(answered).await.unwrap().contains("app GET /"), "{n}");
    }
}

fn answer(mut client: std::net::TcpStream, n: usize) -> String {
    let request = format!("GET /{n} HTTP/1.1\r\nHost: web\r\n\r\n");
    client.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}
