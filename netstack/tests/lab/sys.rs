//! A namespace of its own for the calling thread, and a TUN device in it.
#![expect(
    unsafe_code,
    reason = "unshare, ioctl and poll have no safe form in std"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

/// Moves the calling thread to a network namespace of its own; threads and processes it starts are there too.
pub fn enter_namespace() -> io::Result<()> {
    // SAFETY: unshare takes no pointers and concerns the calling thread alone.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })
}

/// Opens a TUN device in the calling thread's namespace; with virtio-net headers and every offload if `offload`.
pub fn open_tun(name: &str, offload: bool) -> io::Result<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
    const CHECKSUM_TSO4_TSO6: libc::c_ulong = 1 | 2 | 4;
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let mut flags = libc::IFF_TUN | libc::IFF_NO_PI;
    if offload {
        flags |= libc::IFF_VNET_HDR;
    }
    request[16..18].copy_from_slice(&(flags as u16).to_ne_bytes());
    // SAFETY: the request is an `ifreq` of 40 bytes, which outlives the call.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF as _, request.as_mut_ptr()) })?;
    if offload {
        // SAFETY: this ioctl takes its argument by value.
        check(unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETOFFLOAD as _, CHECKSUM_TSO4_TSO6) })?;
    }
    Ok(tun)
}

/// Waits until `file` is readable or `timeout` has passed.
pub fn wait_readable(file: &File, timeout: Duration) {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // SAFETY: one pollfd and one timespec that outlive the call, and no signal mask.
    unsafe { libc::ppoll(&mut poll, 1, &timeout, std::ptr::null()) };
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
