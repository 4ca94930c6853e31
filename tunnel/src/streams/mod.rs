//! What runs on the streams of a connection: TCP flows and UDP flows.

mod datagram;
mod flow;
mod relay;

pub use datagram::DatagramFlow;
pub use flow::{Flow, FlowReceiver, FlowSender};
pub use relay::{Ended, Relayed, relay};
