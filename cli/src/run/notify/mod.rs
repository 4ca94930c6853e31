//! `tp run` where user namespaces are refused: system calls of the program are answered by another process.
//!
//! The program runs under a seccomp filter (`filter`) that stops it in `connect` and in what resolvers send with. A
//! process beside it, the keeper (`keeper`), reads what it asked for (`call`), asks the connection (`asking`,
//! `opener`) and joins the program's own socket to a relay on the workstation's loopback (`dialling`, `joining`).
//! What is not the cluster's is left to the kernel. It is a convenience and no sandbox: see SECURITY.md.

mod address;
mod asking;
mod call;
mod channel;
mod dialling;
mod filter;
mod joining;
pub mod keeper;
mod messages;
pub mod opener;
pub mod program;
mod resolver;
mod short_names;
mod sockets;
mod sys;
mod watch;
