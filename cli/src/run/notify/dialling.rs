//! A program's connect from the moment it is known until the program has heard how it ended.
//!
//! Each has a task of its own, so a destination that does not answer delays nobody else.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::asking::{Asked, Connection};
use super::call::Call;
use super::joining::{self, Loopback};
use super::messages::News;
use super::sys::Answer;
use super::watch::{Dial, Program, failed};

/// What all dials of one program share.
pub(super) struct Dialling {
    pub(super) program: Program,
    pub(super) connection: Connection,
    pub(super) loopback: Loopback,
}

impl Dialling {
    /// Dials whatever comes. Cancel safe; dropping it fails what is under way.
    pub(super) async fn run(self: Rc<Self>, mut dial_rx: mpsc::Receiver<Dial>) {
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                dial = dial_rx.recv() => match dial {
                    Some(dial) => {
                        let own = Rc::clone(&self);
                        tasks.spawn_local(async move { own.dial(dial).await });
                    }
                    None => return,
                },
                Some(_) = tasks.join_next(), if !tasks.is_empty() => {}
            }
        }
    }

    async fn dial(&self, dial: Dial) {
        let to = (!dial.resolver).then_some(dial.to);
        let mut asked = self.connection.open(to).await;
        let news = self.connection.news(&mut asked).await;
        if news == News::Outside {
            return self.leave_to_kernel(dial);
        }
        match dial.impatient {
            Some(call) => {
                let held = Held {
                    to: dial.to,
                    socket: dial.socket,
                    cookie: dial.cookie,
                };
                self.in_progress(held, call, asked, news).await;
            }
            None => self.blocking(dial, asked, news).await,
        }
    }

    /// The kernel reads the address anew, so a program that changes it meanwhile gets what it wrote last.
    fn leave_to_kernel(&self, dial: Dial) {
        let waiting = self.program.sockets().forget(dial.cookie);
        // Ours would keep the socket open.
        drop(dial.socket);
        for call in waiting.into_iter().chain(dial.impatient) {
            call.answer(Answer::Continue);
        }
    }

    /// The program waits in `connect` until the destination has answered.
    async fn blocking(&self, dial: Dial, mut asked: Asked, news: News) {
        let patience = SockRef::from(&dial.socket).write_timeout().ok().flatten();
        let Ok(outcome) = within(patience, self.outcome(&mut asked, news)).await else {
            // What `connect` says when SO_SNDTIMEO is over (`socket(7)`).
            self.answer_all(dial.cookie, Answer::Error(libc::EINPROGRESS));
            return self.give_up(asked, news).await;
        };
        if let Err(number) = outcome {
            return self.answer_all(dial.cookie, Answer::Error(number));
        }
        let program = Arc::new(dial.socket);
        let socket = Arc::clone(&program);
        let joined = tokio::task::spawn_blocking(move || joining::join(&socket)).await;
        let carried = match joined.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
            Ok((end, shown)) => self.connection.carry(&asked, &end).await.map(|()| shown),
            Err(error) => Err(error),
        };
        match carried {
            Ok(shown) => {
                let waiting = self.program.sockets().joined(dial.cookie, dial.to, shown);
                let told: Vec<bool> = waiting
                    .into_iter()
                    .map(|call| call.answer(Answer::Value(0)))
                    .collect();
                if told.contains(&true) {
                    self.program.sockets().heard(dial.cookie);
                }
            }
            Err(error) => {
                self.connection.abandon(&asked).await;
                self.answer_all(dial.cookie, failed(&error));
            }
        }
    }

    /// The program goes on, and its poller hears how it ended.
    async fn in_progress(&self, held: Held, call: Call, mut asked: Asked, news: News) {
        let shown = match self.loopback.hold(&held.socket) {
            Ok(shown) => shown,
            Err(error) => {
                self.program.sockets().forget(held.cookie);
                call.answer(failed(&error));
                return self.give_up(asked, news).await;
            }
        };
        self.program.sockets().held(held.cookie, held.to, shown);
        if call.answer(Answer::Error(libc::EINPROGRESS)) {
            self.program.sockets().heard(held.cookie);
        }
        let number = match self.outcome(&mut asked, news).await {
            Ok(()) => match self.release(&held, shown, &asked).await {
                Ok(()) => return,
                Err(_) => {
                    self.connection.abandon(&asked).await;
                    libc::ECONNABORTED
                }
            },
            Err(number) => number,
        };
        // First, since the program may ask as soon as it hears.
        self.program.sockets().failed(held.cookie, number);
        joining::break_off(&held.socket);
    }

    async fn release(&self, held: &Held, shown: SocketAddr, asked: &Asked) -> io::Result<()> {
        let end = self.loopback.release(&held.socket).await?;
        self.connection.carry(asked, &end).await?;
        self.program.sockets().joined(held.cookie, held.to, shown);
        Ok(())
    }

    /// Waits until the destination has answered. The error is the number that `connect` gives for it.
    async fn outcome(&self, asked: &mut Asked, news: News) -> Result<(), i32> {
        let news = if news == News::Opening {
            self.connection.news(asked).await
        } else {
            news
        };
        match news {
            News::Open => Ok(()),
            News::Refused => Err(libc::ECONNREFUSED),
            News::TimedOut => Err(libc::ETIMEDOUT),
            News::NoTunnel => Err(libc::ENETUNREACH),
            News::Unreachable | News::Opening | News::Outside => Err(libc::EHOSTUNREACH),
        }
    }

    /// Nobody wants the flow any more, should it still open.
    async fn give_up(&self, mut asked: Asked, news: News) {
        if self.outcome(&mut asked, news).await.is_ok() {
            self.connection.abandon(&asked).await;
        }
    }

    fn answer_all(&self, cookie: u64, answer: Answer) {
        let waiting = self.program.sockets().forget(cookie);
        for call in waiting {
            call.answer(answer);
        }
    }
}

/// A non-blocking socket on its way.
struct Held {
    to: SocketAddr,
    socket: OwnedFd,
    cookie: u64,
}

async fn within<T>(
    patience: Option<Duration>,
    work: impl Future<Output = T>,
) -> Result<T, tokio::time::error::Elapsed> {
    match patience {
        Some(patience) => timeout(patience, work).await,
        None => Ok(work.await),
    }
}
