//! What runs on the streams of a connection: TCP flows, UDP flows and small request bodies.

pub(crate) mod accept;
mod backlog;
pub(crate) mod body;
pub mod capsule;
pub(crate) mod datagram;
mod flow;
mod io;
mod relay;
mod socket;

pub use accept::{Attention, Incoming, NotOpened, OPENED_TIMEOUT, POSTED_MAX, Workstation, join};
pub use datagram::{DatagramFlow, DatagramReceiver, DatagramSender, Refusal, relay_datagrams};
pub use flow::{Flow, FlowReceiver, FlowSender};
pub use io::{FlowReader, FlowWriter};
pub use relay::{Ended, Relayed, relay};
pub use socket::{descriptors_are_scarce, set_up_flow_socket};
