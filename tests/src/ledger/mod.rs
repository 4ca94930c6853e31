//! Whether anything was lost: every request is numbered and seeded, each end keeps an append-only ledger, and a join of the
//! ledgers says of each request what became of it.
//!
//! A client that only counts answers cannot tell a request that was executed twice from one that was executed once, nor a
//! whole reply from a truncated one that ends well. Here both ends derive the same bytes from (seed, flow, sequence number),
//! compare them, and write down what they saw; [`join()`] is the only place where anything is judged.
//!
//! `tests/ledger` is the program that makes the traffic (`ledger load`) and answers it (`ledger serve`). It knows nothing
//! of `tp`.

mod book;
mod join;
mod plan;
mod record;
pub mod scene;

pub use book::{Book, Load, Serving};
pub use join::{Class, Expectation, Finding, Report, join};
pub use plan::{Exchange, Id, Label, Plan, REQUEST_HEADER};
pub use record::{Event, INSTANCE_HEADER, Ledger, Record, now, read_all};
