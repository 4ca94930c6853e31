//! A body on its way from one side to the other: what came and was not sent on yet.
//!
//! h2 keeps each DATA frame by itself, and its flow control counts payload only: a window's worth of frames with a few
//! bytes each would take fifty times as much memory. So what comes is taken out of h2 at once, whether or not it can be
//! sent on, and short pieces become one.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use h2::RecvStream;
use http::HeaderMap;

use super::windows::Backlog;
use crate::budget::Share;

/// Pieces shorter than this are copied together.
const SHORT: usize = 1024;

/// The body of a request or of an answer.
#[derive(Debug)]
pub(super) struct Intake {
    body: RecvStream,
    pieces: VecDeque<Bytes>,
    /// Short pieces that came after those.
    tail: BytesMut,
    /// Bytes in both.
    waiting: usize,
    /// Of them, how many the sender may have sent again already.
    released: usize,
    /// For those; the others are in the backlog.
    share: Option<Share>,
    backlog: Backlog,
    end: Option<End>,
}

/// How a body ended.
#[derive(Debug)]
pub(super) enum End {
    /// With its last byte.
    Plain,
    Trailers(HeaderMap),
    Failed(h2::Error),
}

impl Intake {
    /// `backlog` is of the connection that the body comes from.
    pub(super) fn new(body: RecvStream, backlog: Backlog) -> Self {
        let end = body.is_end_stream().then_some(End::Plain);
        Self {
            body,
            pieces: VecDeque::new(),
            tail: BytesMut::new(),
            waiting: 0,
            released: 0,
            share: None,
            backlog,
            end,
        }
    }

    /// Takes in what comes next, no more than the sender's window. For ever pending after the end. Cancel safe.
    pub(super) async fn fill(&mut self) {
        if self.end.is_some() {
            return std::future::pending().await;
        }
        match self.body.data().await {
            Some(Ok(data)) => {
                self.push(data);
                if self.body.is_end_stream() {
                    self.end = Some(End::Plain);
                }
            }
            Some(Err(error)) => self.end = Some(End::Failed(error)),
            None => {
                self.end = Some(match self.body.trailers().await {
                    Ok(Some(trailers)) => End::Trailers(trailers),
                    Ok(None) => End::Plain,
                    Err(error) => End::Failed(error),
                });
            }
        }
    }

    /// Fills until `other` is done.
    pub(super) async fn meanwhile<T>(&mut self, other: impl Future<Output = T>) -> T {
        tokio::pin!(other);
        loop {
            tokio::select! {
                biased;
                done = &mut other => return done,
                () = self.fill() => {}
            }
        }
    }

    /// Takes in everything to the end, for nobody. Cancel safe.
    pub(super) async fn discard(&mut self) {
        loop {
            while self.waiting > 0 {
                drop(self.take(self.waiting));
            }
            if self.has_ended() {
                return;
            }
            self.fill().await;
        }
    }

    fn push(&mut self, data: Bytes) {
        self.waiting += data.len();
        self.backlog.add(data.len());
        if data.len() < SHORT {
            self.tail.extend_from_slice(&data);
            return;
        }
        if !self.tail.is_empty() {
            self.pieces.push_back(self.tail.split().freeze());
        }
        self.pieces.push_back(data);
    }

    /// At most `most` of the bytes that wait, from the front; the sender may send as many again.
    pub(super) fn take(&mut self, most: usize) -> Bytes {
        let data = match self.pieces.front_mut() {
            Some(front) if front.len() > most => front.split_to(most),
            Some(_) => self.pieces.pop_front().unwrap_or_default(),
            None => {
                let size = self.tail.len().min(most);
                self.tail.split_to(size).freeze()
            }
        };
        self.waiting -= data.len();
        let early = self.released.min(data.len());
        self.released -= early;
        if self.released == 0 {
            self.share = None;
        }
        self.release(data.len() - early);
        data
    }

    /// From now on [`Self::release_all`] may be called; `share` is for what it releases, until all that was taken.
    pub(super) fn read_ahead(&mut self, share: Share) {
        self.share = Some(share);
    }

    /// Lets the sender go on although what it sent still waits.
    pub(super) fn release_all(&mut self) {
        self.release(self.waiting - self.released);
        self.released = self.waiting;
    }

    fn release(&mut self, bytes: usize) {
        self.backlog.remove(bytes);
        // Fails only when the stream is gone.
        let _ = self.body.flow_control().release_capacity(bytes);
    }

    /// Everything that waits, copied.
    pub(super) fn peek(&self) -> Vec<u8> {
        let pieces = self.pieces.iter().map(|piece| &piece[..]);
        pieces.chain([&self.tail[..]]).collect::<Vec<_>>().concat()
    }

    /// Bytes that can be taken.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Whether everything is in, trailers included.
    pub(super) fn has_ended(&self) -> bool {
        self.end.is_some()
    }

    /// Whether the byte taken last was the last of all.
    pub(super) fn is_done(&self) -> bool {
        self.waiting == 0 && matches!(self.end, Some(End::Plain))
    }

    /// How it ended, once everything was taken; a failure does not wait for that.
    pub(super) fn take_end(&mut self) -> Option<End> {
        match self.end {
            Some(End::Failed(_)) => self.end.take(),
            Some(End::Plain | End::Trailers(_)) if self.waiting == 0 => self.end.take(),
            Some(End::Plain | End::Trailers(_)) | None => None,
        }
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        self.release(self.waiting - self.released);
    }
}
