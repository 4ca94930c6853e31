//! The proxy as its clients see it: real sockets of loopback, a real tunnel inside this process, real `curl`.

mod cost;
mod http;
mod pac;
mod rig;
mod socks;
mod strangers;
mod udp;
