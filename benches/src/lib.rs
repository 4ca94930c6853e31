//! Benches are programs: `src/bin` holds one folder or file a question, run with `cargo run --release -p tp-benches --bin`.
