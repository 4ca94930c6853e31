//! What runs on the streams of a connection: TCP flows, UDP flows and small request bodies.

pub(crate) mod body;
pub mod capsule;
pub(crate) mod datagram;
mod flow;
mod relay;

pub use datagram::{DatagramFlow, DatagramReceiver, DatagramSender};
pub use flow::{Flow, FlowReceiver, FlowSender};
pub use relay::{Ended, Relayed, relay};
