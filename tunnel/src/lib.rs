//! Flows multiplexed as standard HTTP/2 over one disposable byte stream.
//!
//! A workstation opens TCP flows with CONNECT, UDP flows with connect-udp, takes inbound flows on posted streams, asks DNS
//! questions with DoH and reads small JSON resources, all on one connection whose both ends hold pinned keys. The crate does not know Kubernetes, packets,
//! or which destinations are allowed: a [`server::Service`] decides that.

pub mod carrier;
pub mod client;
mod error;
mod flow_control;
mod identity;
mod link;
mod meter;
pub mod proxy_status;
pub mod server;
mod settings;
pub mod streams;
mod target;

pub use carrier::{BoxedStream, ByteStream};
pub use client::{Driver, Traffic, Tunnel};
pub use error::{FlowError, OpenError, TunnelError};
pub use identity::{Identity, IdentityError, KeyHash, ParseKeyHashError};
pub use proxy_status::{DialError, DialErrorKind};
pub use server::{Dialed, Service, serve, serve_with};
pub use settings::Settings;
pub use streams::{
    Attention, DatagramFlow, DatagramReceiver, DatagramSender, Ended, Flow, FlowReader,
    FlowReceiver, FlowSender, FlowWriter, Incoming, NotOpened, OPENED_TIMEOUT, POSTED_MAX, Refusal,
    Relayed, Workstation, descriptors_are_scarce, join, relay, relay_datagrams, set_up_flow_socket,
};
pub use target::{Host, ParseTargetError, Target};
