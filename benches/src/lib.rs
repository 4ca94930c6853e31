//! Benches are programs: `src/bin` holds one folder or file a question, run with `cargo run --release -p tp-benches --bin`.
//! Here is what several of them need: the load, a little HTTP, the processes under it, OpenSSH as a peer, and the table of the
//! rounds.

pub mod http;
pub mod load;
pub mod process;
pub mod ssh;
pub mod table;
