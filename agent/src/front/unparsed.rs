//! A connection that goes to one side as a whole.

use std::sync::Arc;

use bytes::BytesMut;
use tp_tunnel::Workstation;

use super::{Place, opaque, open};
use crate::book::{Live, Port};
use crate::route::{Via, unparsed};
use crate::socket::Socket;
use crate::upstream::{Dialing, Upstream};

/// What is known of it.
pub(super) struct Unparsed {
    pub(super) client: Socket,
    pub(super) place: Place,
    /// The connection to the application, unless there is none yet.
    pub(super) app: Option<Dialing>,
    /// Read and not yet used.
    pub(super) bytes: BytesMut,
}

impl Unparsed {
    /// To the intercept that takes everything, or else to the application.
    pub(super) async fn pass_on(self, port: Option<Arc<Port<Workstation>>>, via: Via) {
        match unparsed(port.as_deref(), via) {
            Some(live) => self.pass_to(live).await,
            None => self.pass_to_app().await,
        }
    }

    /// For an intercept that takes everything.
    pub(super) async fn pass_to(self, live: &Live<Workstation>) {
        match open(live, self.place.peer).await {
            Ok(flow) => {
                let upstream = Upstream::workstation(flow);
                opaque::join(self.client, upstream, self.bytes.freeze()).await;
            }
            Err(_) if live.route.strict => self.client.reset_on_close(),
            Err(_) => self.pass_to_app().await,
        }
    }

    /// For the application. Where it refuses, the client is reset: nobody has answered it.
    pub(super) async fn pass_to_app(self) {
        let app = match self.app {
            Some(app) => app.await,
            None => self.place.dial().await,
        };
        match app {
            Ok(app) => opaque::join(self.client, Upstream::app(app), self.bytes.freeze()).await,
            Err(error) => {
                tracing::debug!(app = %self.place.app, %error, "the application does not answer");
                self.client.reset_on_close();
            }
        }
    }
}
