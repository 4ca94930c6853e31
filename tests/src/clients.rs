//! Programs in Python that tests run on the laptop, each said in its own first lines.

/// Socket calls that curl does not make.
pub const SOCKET_CALLS: &str = include_str!("clients/socket_calls.py");

/// The same without blocking, on one event loop.
pub const ASYNCHRONOUS: &str = include_str!("clients/asynchronous.py");

/// Runs a command where namespaces or filters are refused.
pub const SANDBOX: &str = include_str!("clients/sandbox.py");

/// A user at a terminal.
pub const TERMINAL: &str = include_str!("clients/terminal.py");
