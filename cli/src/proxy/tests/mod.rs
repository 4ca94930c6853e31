//! The proxy as its clients see it: real sockets of loopback, a real tunnel inside this process, real `curl`.

mod http;
mod rig;
mod socks;
mod strangers;
mod udp;
