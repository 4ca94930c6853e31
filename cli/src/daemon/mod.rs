//! The process that keeps a connection up, and how commands talk to it.
//!
//! [`background`] is the process, [`running`] what lives in it: [`supervisor`] keeps a carrier up as [`connection`]
//! decides, [`session`] lets its key in, [`control`] answers commands. [`peers`] is the commands' side of that.
//! [`intercepts`] are the objects of its user, [`inbound`] the flows that come of them.

pub mod access;
pub mod asked;
pub mod background;
pub mod carrier;
pub mod connection;
pub mod control;
pub mod environment;
pub mod folder;
pub mod held;
pub mod inbound;
pub mod intercepts;
pub mod key_file;
pub mod listen;
pub mod log;
pub mod login;
pub mod overlap;
pub mod parameters;
pub mod peers;
pub mod running;
pub mod screen;
pub mod secrets;
pub mod services;
pub mod session;
pub mod sightings;
pub mod status;
pub mod supervisor;
pub mod sys;
pub mod unmet;
pub mod wanted;

pub use folder::valid_name;

use crate::report::Failure;

/// Ends every connection of this user to the cluster whose API server has this URL. Returns how many there were.
///
/// # Errors
/// One of them does not end.
pub async fn quit_connections_to(server: &str) -> Result<usize, Failure> {
    let server = server.trim_end_matches('/');
    let mut ended = 0;
    for peer in peers::all() {
        if peer.status().await.server.as_deref() == Some(server) {
            peer.quit().await?;
            ended += 1;
        }
    }
    Ok(ended)
}
