//! Every number of the tunnel in one place.
//!
//! These are for the authenticated tunnel, where both ends hold a listed key: h2's own abuse limits would end a
//! connection, and all its flows, for traffic that is ordinary here (many unread tiny frames, many resets). A listener
//! that strangers reach must not use them.

use std::time::Duration;

/// Limits and intervals of one connection. [`Settings::default`] is what the product ships.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How often the client pings an otherwise silent peer.
    pub ping_interval: Duration,
    /// The same while somebody attends to the peer ([`crate::Workstation::attend`]).
    pub attentive_ping_interval: Duration,
    /// How long a ping may be without an answer, and without any other byte, before the peer counts as silent. Its
    /// connection goes on.
    pub silence: Duration,
    /// How long a client waits for the answer to a ping before it calls the carrier dead.
    pub ping_timeout: Duration,
    /// How long a server hears nothing from a client before it drops it.
    pub peer_silence: Duration,
    /// How long a UDP flow lives without a datagram.
    pub datagram_idle: Duration,
    /// Smallest stream window, in bytes, and the first one.
    pub window_min: u32,
    /// Largest stream window, in bytes.
    pub window_max: u32,
    /// Bytes that slow readers may hold a connection before the slowest is reset.
    pub held_max: u32,
    /// Streams a peer may have open at once.
    pub streams_max: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ping_interval: Duration::from_secs(5),
            attentive_ping_interval: Duration::from_secs(1),
            silence: Duration::from_secs(2),
            ping_timeout: Duration::from_secs(5),
            peer_silence: Duration::from_secs(30),
            datagram_idle: Duration::from_secs(120),
            window_min: WINDOW_MIN,
            window_max: 16 << 20,
            held_max: 64 << 20,
            streams_max: 20_000,
        }
    }
}

/// Smallest and first stream window: a whole request body fits.
pub(crate) const WINDOW_MIN: u32 = 1 << 20;

/// Payload of one DATA frame: with its header of nine bytes it fills exactly two TLS records of 16 KiB.
pub(crate) const FRAME_PAYLOAD: usize = 32 * 1024 - 9;

/// What one connection accepts as a DATA frame. Larger than ours, so that another client's 32 KiB frames pass.
pub(crate) const FRAME_MAX: u32 = 32 * 1024;

/// Largest decoded header block; ours are a few hundred bytes. Every stream that waits for its dial holds one.
pub(crate) const HEADER_BLOCK_MAX: u32 = 4 * 1024;

/// Own resets remembered at any moment. Port scanners and test suites reset a lot.
pub(crate) const RESETS_MAX: usize = 100_000;

/// Streams that the peer opened and reset before they were even looked at. Streams are looked at in every turn, so
/// only a flood of resets (CVE-2023-44487) gets there; it ends its own connection.
pub(crate) const UNSEEN_RESETS_MAX: usize = 1_024;

/// Streams of one connection that wait for a dial or an answer at any moment; more are refused with REFUSED_STREAM. It
/// bounds what a peer makes us hold before anything of it has proven useful.
pub(crate) const UNANSWERED_MAX: usize = 4_096;

/// h2 charges small unread DATA frames against this budget and ends the connection when it is spent; the windows
/// already bound what a peer can make us hold.
pub(crate) const DATA_FRAME_BUDGET: usize = usize::MAX / 4;

/// Largest control request, in bytes.
pub(crate) const CONTROL_REQUEST_MAX: usize = 64 * 1024;

/// Largest control response, in bytes.
pub(crate) const CONTROL_RESPONSE_MAX: usize = 4 * 1024 * 1024;

/// Largest DNS message (RFC 8484 §6).
pub(crate) const DNS_MESSAGE_MAX: usize = 65_535;
