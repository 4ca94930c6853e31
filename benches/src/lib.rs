//! Benches are programs: `src/bin` holds one folder or file a question, run with `cargo run --release -p tp-benches --bin`.
//! Here is what several of them need: the load, the processes under it, and OpenSSH as a peer.

pub mod load;
pub mod process;
pub mod ssh;
