//! The heartbeat of a connection: finds a dead carrier, measures the round trip, and sets the windows.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::error::TunnelError;
use crate::flow_control::Holds;
use crate::flow_control::window::{Estimator, connection_window};
use crate::meter::Meter;
use crate::settings::Settings;

/// What h2's two kinds of connection have in common here.
pub(crate) trait Http2 {
    fn set_stream_window(&mut self, size: u32) -> Result<(), h2::Error>;
    fn set_connection_window(&mut self, size: u32);
}

impl<T, B> Http2 for h2::client::Connection<T, B>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    B: bytes::Buf,
{
    fn set_stream_window(&mut self, size: u32) -> Result<(), h2::Error> {
        self.set_initial_window_size(size)
    }

    fn set_connection_window(&mut self, size: u32) {
        self.set_target_window_size(size);
    }
}

impl<T, B> Http2 for h2::server::Connection<T, B>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    B: bytes::Buf,
{
    fn set_stream_window(&mut self, size: u32) -> Result<(), h2::Error> {
        self.set_initial_window_size(size)
    }

    fn set_connection_window(&mut self, size: u32) {
        self.set_target_window_size(size);
    }
}

/// Which end this is; a client gives up sooner, because it can get a new carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Client,
    Server,
}

pub(crate) struct Pulse {
    ping_pong: PingPong,
    timer: Pin<Box<Sleep>>,
    beat: Beat,
    interval: Duration,
    attentive_interval: Duration,
    silence: Duration,
    patience: Duration,
    estimator: Estimator,
    meter: Arc<Meter>,
    holds: Arc<Holds>,
    held_max: u64,
    /// A stream window that h2 has not taken yet, because the last one is not acknowledged.
    pending_window: Option<u32>,
    connection_window: u32,
}

enum Beat {
    /// The next ping is due when the timer fires, or earlier while bytes flow.
    Resting { since: Instant, received: u64 },
    /// A ping is under way; `heard` is how much the carrier had delivered when the timer was last set.
    Waiting {
        sent: Instant,
        heard: u64,
        deadline: Instant,
    },
}

/// While bytes flow the round trip is measured this often, so that a window grows within a few round trips.
const BUSY_INTERVAL: Duration = Duration::from_millis(50);

/// Bytes that make a connection busy.
const BUSY_BYTES: u64 = 256 * 1024;

impl Pulse {
    pub(crate) fn new(
        role: Role,
        ping_pong: PingPong,
        s: &Settings,
        meter: Arc<Meter>,
        holds: Arc<Holds>,
    ) -> Self {
        let now = Instant::now();
        Self {
            ping_pong,
            timer: Box::pin(sleep_until(now)),
            beat: Beat::Resting {
                // The clock may be younger than the interval; then the first ping waits for its turn.
                since: now.checked_sub(s.ping_interval).unwrap_or(now),
                received: 0,
            },
            interval: s.ping_interval,
            attentive_interval: s.attentive_ping_interval,
            silence: s.silence,
            patience: match role {
                Role::Client => s.ping_timeout,
                Role::Server => s.peer_silence,
            },
            estimator: Estimator::new(s.window_min, s.window_max),
            meter,
            holds,
            held_max: s.held_max.into(),
            pending_window: None,
            connection_window: connection_window(s.window_min, 0),
        }
    }

    /// Called after every turn of the connection, in the connection's task. Fails when the peer is silent.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        connection: &mut impl Http2,
    ) -> Result<(), TunnelError> {
        let now = Instant::now();
        match self.beat {
            Beat::Resting { since, received } => self.rest(cx, now, since, received),
            Beat::Waiting { .. } => {}
        }
        if let Beat::Waiting {
            sent,
            heard,
            deadline,
        } = self.beat
        {
            self.wait(cx, now, sent, heard, deadline)?;
        }
        self.apply(cx, connection);
        Ok(())
    }

    fn rest(&mut self, cx: &mut Context<'_>, now: Instant, since: Instant, received: u64) {
        let due = since + self.rest_for();
        let busy = self.meter.received() - received >= BUSY_BYTES && now >= since + BUSY_INTERVAL;
        if now < due && !busy {
            self.set_timer(cx, due);
            return;
        }
        // An error means that the connection is closing, which its own poll reports.
        if self.ping_pong.send_ping(Ping::opaque()).is_ok() {
            self.beat = Beat::Waiting {
                sent: now,
                heard: self.meter.heard(),
                deadline: now + self.patience,
            };
        }
    }

    fn wait(
        &mut self,
        cx: &mut Context<'_>,
        now: Instant,
        sent: Instant,
        heard: u64,
        deadline: Instant,
    ) -> Result<(), TunnelError> {
        if let Poll::Ready(answer) = self.ping_pong.poll_pong(cx) {
            if answer.is_ok() {
                self.on_pong(now, now - sent);
            }
            self.meter.set_silent(false);
            self.set_timer(cx, now + self.rest_for());
            return Ok(());
        }
        // Any byte proves that the peer lives; its answer may wait behind much data on a slow link.
        let heard_now = self.meter.heard();
        let deadline = if heard_now == heard {
            deadline
        } else {
            now + self.patience
        };
        let silent_at = deadline - self.patience + self.silence;
        self.meter.set_silent(now >= silent_at);
        if now >= deadline {
            return Err(TunnelError::Silent(self.patience));
        }
        self.beat = Beat::Waiting {
            sent,
            heard: heard_now,
            deadline,
        };
        let next = if now < silent_at { silent_at } else { deadline };
        self.set_timer(cx, next.min(deadline));
        Ok(())
    }

    fn rest_for(&self) -> Duration {
        match self.meter.attended() {
            true => self.attentive_interval,
            false => self.interval,
        }
    }

    fn on_pong(&mut self, now: Instant, round_trip: Duration) {
        let received = self.meter.received();
        self.meter.set_round_trip(round_trip);
        let short_of_memory = self.holds.peek() > self.held_max / 2;
        let window = match short_of_memory {
            true => self.estimator.shrink(),
            false => self.estimator.on_pong(now.into_std(), round_trip, received),
        };
        self.pending_window = window.or(self.pending_window);
        self.beat = Beat::Resting {
            since: now,
            received,
        };
    }

    fn apply(&mut self, cx: &Context<'_>, connection: &mut impl Http2) {
        if let Some(window) = self.pending_window
            && connection.set_stream_window(window).is_ok()
        {
            tracing::debug!(window, "stream window");
            self.pending_window = None;
        }
        let wanted = connection_window(self.estimator.window(), self.holds.total(cx));
        if wanted != self.connection_window {
            connection.set_connection_window(wanted);
            self.connection_window = wanted;
        }
    }

    /// Registers the task even when the deadline did not change.
    fn set_timer(&mut self, cx: &mut Context<'_>, at: Instant) {
        if self.timer.deadline() != at {
            self.timer.as_mut().reset(at);
        }
        if self.timer.as_mut().poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
    }
}
