//! The only unsafe code of `tp run`: system calls that no crate offers as a safe function.

#![expect(
    unsafe_code,
    reason = "namespaces, TUN and packet sockets have no safe interface"
)]

use std::ffi::{c_int, c_ulong, c_void};
use std::io;
use std::mem::{size_of, size_of_val};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use tokio::io::unix::AsyncFd;

/// Which process came out of a fork.
pub(super) enum Fork {
    /// The old one; the new one has this number.
    Parent(libc::pid_t),
    Child,
}

/// Moves this process into user, network, mount and UTS namespaces of its own, where it holds every capability.
pub(super) fn enter_namespaces() -> io::Result<()> {
    const ALL: c_int =
        libc::CLONE_NEWUSER | libc::CLONE_NEWNET | libc::CLONE_NEWNS | libc::CLONE_NEWUTS;
    // SAFETY: takes no pointer; it changes what this process sees, not its memory.
    done(unsafe { libc::unshare(ALL) })
}

/// Splits this process in two. The new one is a child of this one's parent; or of this one, where the parent is the first
/// process of its PID namespace and may have no such children (`clone(2)`).
///
/// # Errors
/// No process is free; or there is a second thread, whose locks the child would inherit and nobody would release.
pub(super) fn fork_sibling() -> io::Result<Fork> {
    match clone(libc::CLONE_PARENT | libc::SIGCHLD) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => clone(libc::SIGCHLD),
        split => split,
    }
}

/// Splits this process in two. The new one is its child.
///
/// # Errors
/// As [`fork_sibling`].
pub(super) fn fork() -> io::Result<Fork> {
    clone(libc::SIGCHLD)
}

fn clone(flags: c_int) -> io::Result<Fork> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other("a process with threads cannot be forked"));
    }
    // SAFETY: without a stack and shared memory this is a fork. This process has one thread, as was just seen, and only
    // a thread makes another one: the child may do whatever the parent may.
    match unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        child => Ok(Fork::Parent(child as libc::pid_t)),
    }
}

/// The user namespace that this one was made in (`ioctl_ns(2)`).
///
/// # Errors
/// That lies outside of this process's own user namespace.
pub(super) fn parent_namespace(namespace: &impl AsRawFd) -> io::Result<OwnedFd> {
    const NS_GET_PARENT: c_ulong = 0xb702;
    // SAFETY: this ioctl takes no argument.
    let number = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_PARENT as _) };
    done(number)?;
    // SAFETY: it was just made, and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Takes a descriptor that this process inherited by number, and marks it to be closed when another program starts.
///
/// # Errors
/// It is not open, or no socket: nothing else is ever passed this way.
pub(super) fn inherited_socket(number: RawFd) -> io::Result<OwnedFd> {
    let mut kind: c_int = 0;
    let mut size = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: both pointers are to live values of the sizes given.
    done(unsafe {
        libc::getsockopt(
            number,
            libc::SOL_SOCKET,
            libc::SO_TYPE,
            (&raw mut kind).cast(),
            &raw mut size,
        )
    })?;
    // SAFETY: takes no pointer.
    done(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, as was just seen, and the number came from whoever started this process, which gave it to
    // nobody else here; each number is taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Closes every descriptor from 3 on but `kept`, and whatever they were.
///
/// For a process that will touch none of its other values again; those that own descriptors must be forgotten.
pub(super) fn close_all_but(kept: &[BorrowedFd<'_>]) {
    let mut kept: Vec<u32> = kept
        .iter()
        .map(|fd| fd.as_raw_fd().unsigned_abs())
        .collect();
    kept.sort_unstable();
    let mut first = 3;
    for number in kept {
        close_range(first, number.saturating_sub(1));
        first = first.max(number + 1);
    }
    close_range(first, u32::MAX);
}

fn close_range(first: u32, last: u32) {
    if first <= last {
        // SAFETY: the caller says that nobody uses these descriptors again.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// Makes a descriptor non-blocking and watches it for readiness.
pub(super) fn watch(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&descriptor, true)?;
    // SAFETY: an `OwnedFd` stays the same open descriptor until it is dropped, and is dropped only with the watch.
    Ok(unsafe { AsyncFd::register(descriptor) }?)
}

/// A TUN device of this name in this network namespace, with virtio-net headers and all offloads.
pub(super) fn open_tun(name: &str) -> io::Result<OwnedFd> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = InterfaceRequest {
        name: [0; 16],
        flags: (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, of which this is the layout, at its full size.
    done(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    let offloads = c_ulong::from(libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6);
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    done(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, offloads) })?;
    Ok(file.into())
}

/// `struct ifreq` with its flags.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

/// A socket that exchanges whole Ethernet frames with one interface, under virtio-net headers.
pub(super) fn packet_socket(interface: u32) -> io::Result<OwnedFd> {
    let every_protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: takes no pointer.
    let number = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    done(number)?;
    // SAFETY: it was just made, and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    set_option(&socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
    set_option(&socket, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)?;
    // SAFETY: all zeroes is a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = every_protocol;
    address.sll_ifindex = interface as c_int;
    // SAFETY: the pointer is to a live `sockaddr_ll`, whose size is given.
    done(unsafe {
        libc::bind(
            number,
            (&raw const address).cast(),
            size_of_val(&address) as u32,
        )
    })?;
    Ok(socket)
}

/// Not in the `libc` crate.
const PACKET_IGNORE_OUTGOING: c_int = 23;

/// Sets a socket option whose value is one number.
pub(super) fn set_option(
    socket: &OwnedFd,
    level: c_int,
    option: c_int,
    value: c_int,
) -> io::Result<()> {
    let pointer: *const c_void = (&raw const value).cast();
    // SAFETY: the pointer is to a live `c_int`, whose size is given.
    done(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            pointer,
            size_of::<c_int>() as u32,
        )
    })
}

fn done(result: c_int) -> io::Result<()> {
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
