//! Where a carrier can go, and how one is opened. It carries bytes; what runs inside is the tunnel's business.

use futures::future::BoxFuture;
use tp_tunnel::{BoxedStream, KeyHash};

use super::status::CarrierKind;
use super::unmet::Unmet;

mod direct;
mod port_forward;

pub use direct::Direct;
pub use port_forward::{Finder, PortForward};

/// A replica of the manager that a carrier could go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its pod, or its address.
    pub name: String,
    /// The port of the tunnel there.
    pub port: u16,
    /// The key it has to show.
    pub key: KeyHash,
}

/// One way to managers. Knows nothing of sessions, tunnels or when to dial.
pub trait CarrierDialer: Send + Sync + 'static {
    /// What to call its carriers.
    fn kind(&self) -> CarrierKind;

    /// Where carriers can go at this moment, in no order; never empty.
    fn places(&self) -> BoxFuture<'_, Result<Vec<Place>, Unmet>>;

    /// Opens one carrier. Dropping the future drops what was opened.
    fn dial<'a>(&'a self, place: &'a Place) -> BoxFuture<'a, Result<BoxedStream, Unmet>>;
}
