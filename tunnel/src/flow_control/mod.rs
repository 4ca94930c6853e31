//! Whose bytes go next, and how many may be under way.
//!
//! `scheduler` and `window` decide and know neither clock nor socket; `turns`, `holds` and `pulse` carry their decisions
//! to h2.

mod frame;
mod holds;
mod pulse;
mod scheduler;
mod turns;
mod window;

pub(crate) use frame::{Allowance, Frame};
pub(crate) use holds::{Hold, Holds};
pub(crate) use pulse::{Pulse, Role};
pub(crate) use turns::{Lane, Turns};
pub(crate) use window::connection_window;
