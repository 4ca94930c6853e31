//! The keeper's way to whoever has the connection: it asks for flows and hears how they get on.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use tokio::sync::mpsc;

use super::channel::Channel;
use super::messages::{Ask, News, Told};

/// News of one flow: it is being opened, and how that ended.
const NEWS: usize = 2;

/// The keeper's end.
pub(super) struct Connection {
    channel: Channel,
    waiting: RefCell<HashMap<u64, mpsc::Sender<News>>>,
    next: Cell<u64>,
    ended: Cell<bool>,
}

/// A flow that was asked for.
pub(super) struct Asked {
    id: u64,
    news: mpsc::Receiver<News>,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            channel: Channel::new(socket)?,
            waiting: RefCell::default(),
            next: Cell::new(0),
            ended: Cell::new(false),
        })
    }

    /// Brings news to those who wait, until the connection ends. After that every flow is without a tunnel.
    pub(super) async fn run(&self) {
        while let Ok(Some((told, _))) = self.channel.receive::<Told>().await {
            let waiting = self.waiting.borrow().get(&told.id).cloned();
            if let Some(waiting) = waiting {
                // Who has gone wants none; nobody gets more than there is room for.
                let _ = waiting.try_send(told.news);
            }
        }
        self.ended.set(true);
        self.waiting.borrow_mut().clear();
    }

    /// Asks for a flow; `None` is one to the resolver.
    pub(super) async fn open(&self, to: Option<SocketAddr>) -> Asked {
        let id = self.next.replace(self.next.get() + 1);
        let (news_tx, news) = mpsc::channel(NEWS);
        if !self.ended.get() {
            self.waiting.borrow_mut().insert(id, news_tx);
            let ask = to.map_or(Ask::OpenResolver { id }, |to| Ask::Open { id, to });
            if self.channel.send(&ask, &[]).await.is_err() {
                self.waiting.borrow_mut().remove(&id);
            }
        }
        Asked { id, news }
    }

    /// What the opener says next.
    pub(super) async fn news(&self, asked: &mut Asked) -> News {
        let news = asked.news.recv().await.unwrap_or(News::NoTunnel);
        if news != News::Opening {
            self.waiting.borrow_mut().remove(&asked.id);
        }
        news
    }

    /// Hands the end of the program's socket over to a flow that is open.
    pub(super) async fn carry(&self, asked: &Asked, socket: impl AsFd) -> io::Result<()> {
        let ask = Ask::Carry { id: asked.id };
        self.channel.send(&ask, &[socket.as_fd()]).await
    }

    /// Gives an open flow back.
    pub(super) async fn abandon(&self, asked: &Asked) {
        // It ends with the connection too.
        let _ = self.channel.send(&Ask::Abandon { id: asked.id }, &[]).await;
    }
}
