//! A TCP connection straight to a manager, or to whatever passes TCP or TLS on to one.

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::net::TcpStream;
use tp_tunnel::carrier::ReadAhead;
use tp_tunnel::{BoxedStream, KeyHash};

use super::super::status::CarrierKind;
use super::super::unmet::Unmet;
use super::port_forward::Finder;
use super::{CarrierDialer, Place};
use crate::report::Failure;

/// `--via host:port`.
pub struct Direct {
    address: String,
    pin: Pin,
}

/// Where the manager's key hash comes from.
enum Pin {
    Given(KeyHash),
    Found(Finder),
}

impl Direct {
    /// To a manager whose key hash the user gave.
    pub fn pinned(address: String, key: KeyHash) -> Self {
        let pin = Pin::Given(key);
        Self { address, pin }
    }

    /// To the manager of a cluster, whose key hash the cluster tells.
    pub fn found(address: String, finder: Finder) -> Self {
        let pin = Pin::Found(finder);
        Self { address, pin }
    }
}

impl CarrierDialer for Direct {
    fn kind(&self) -> CarrierKind {
        CarrierKind::Direct
    }

    fn places(&self) -> BoxFuture<'_, Result<Vec<Place>, Unmet>> {
        async {
            let key = match &self.pin {
                Pin::Given(key) => *key,
                Pin::Found(finder) => finder.locate().await?.1,
            };
            let place = Place {
                name: self.address.clone(),
                port: 0,
                key,
            };
            Ok(vec![place])
        }
        .boxed()
    }

    fn dial<'a>(&'a self, place: &'a Place) -> BoxFuture<'a, Result<BoxedStream, Unmet>> {
        async {
            let failed = |error: std::io::Error| {
                let failure =
                    Failure::new(format!("cannot connect to {}", place.name)).caused_by(&error);
                Unmet::passing(failure.hint(
                    "is this the address that `--via` should name, and does the manager run there?",
                ))
            };
            let stream = TcpStream::connect(&place.name).await.map_err(failed)?;
            stream.set_nodelay(true).map_err(failed)?;
            let stream: BoxedStream = Box::new(ReadAhead::new(stream));
            Ok(stream)
        }
        .boxed()
    }
}
