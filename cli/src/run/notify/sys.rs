//! The unsafe code of this method: installing the filter, and the three requests of its listener (`seccomp_unotify(2)`).

#![expect(unsafe_code, reason = "seccomp has no safe interface")]

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use libc::{c_int, c_ulong, sock_filter};

/// One system call that was stopped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stopped {
    /// Names it to the listener.
    pub(super) id: u64,
    /// The thread that made it.
    pub(super) thread: i32,
    /// Which call.
    pub(super) number: i64,
    /// Its arguments as they were in the registers.
    pub(super) arguments: [u64; 6],
}

/// What the program gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The kernel carries it out, with what the program's memory holds by then.
    Continue,
    /// It returns this.
    Value(i64),
    /// It fails with this error number.
    Error(c_int),
}

/// Puts this thread, and all that come from it, under `filter` for good. Gives its listener.
///
/// # Errors
/// `EBUSY`: there is a listener above already, and the kernel allows one. `EINVAL`, `ENOSYS`: the kernel has none of this.
pub(super) fn install(filter: &[sock_filter]) -> io::Result<OwnedFd> {
    const YES: c_ulong = 1;
    const UNUSED: c_ulong = 0;
    // SAFETY: takes no pointer. Without it the kernel takes a filter only from root.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, YES, UNUSED, UNUSED, UNUSED) } == -1 {
        return Err(io::Error::last_os_error());
    }
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(io::Error::other)?,
        filter: filter.as_ptr().cast_mut(),
    };
    // A mitigation against code that tries to read its own process's memory; it would slow every program down.
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: the pointer is to a live `sock_fprog` whose own pointer and length are a live slice; the kernel only reads.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    let Ok(listener @ 0..) = c_int::try_from(listener) else {
        return Err(io::Error::last_os_error());
    };
    // SAFETY: it was just made, and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(listener) })
}

/// The kernel may know a longer `seccomp_notif` than this program, and writes all of it.
#[repr(C)]
union Room {
    notification: libc::seccomp_notif,
    space: [u64; 64],
}

/// Waits for the next stopped call.
///
/// # Errors
/// `ENOENT`: its thread was interrupted in the meantime, ask again.
pub(super) fn receive(listener: impl AsFd) -> io::Result<Stopped> {
    // All of it zero, as the kernel demands.
    let mut room = MaybeUninit::<Room>::zeroed();
    request(
        &listener,
        libc::SECCOMP_IOCTL_NOTIF_RECV as c_ulong,
        room.as_mut_ptr(),
    )?;
    // SAFETY: every bit pattern is a valid `seccomp_notif`, and it was zeroed or written.
    let notification = unsafe { room.assume_init().notification };
    Ok(Stopped {
        id: notification.id,
        thread: i32::try_from(notification.pid).map_err(io::Error::other)?,
        number: notification.data.nr.into(),
        arguments: notification.data.args,
    })
}

/// Answers a call.
///
/// # Errors
/// `ENOENT`: nobody waits for it any more, a signal came or the thread ended.
pub(super) fn answer(listener: impl AsFd, id: u64, answer: Answer) -> io::Result<()> {
    let (val, error, flags) = match answer {
        Answer::Continue => (0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
        Answer::Value(value) => (value, 0, 0),
        Answer::Error(number) => (0, -number, 0),
    };
    let mut response = libc::seccomp_notif_resp {
        id,
        val,
        error,
        flags,
    };
    request(
        &listener,
        libc::SECCOMP_IOCTL_NOTIF_SEND as c_ulong,
        &raw mut response,
    )
}

/// Whether somebody still waits for the answer. While that is so, its thread's number is no other thread's.
pub(super) fn is_waiting(listener: impl AsFd, id: u64) -> bool {
    let mut id = id;
    request(
        &listener,
        libc::SECCOMP_IOCTL_NOTIF_ID_VALID as c_ulong,
        &raw mut id,
    )
    .is_ok()
}

/// `argument` points to what the request reads or writes, which the callers above see to.
fn request<T>(listener: &impl AsFd, number: c_ulong, argument: *mut T) -> io::Result<()> {
    const { assert!(size_of::<T>() >= size_of::<u64>()) };
    let listener = listener.as_fd().as_raw_fd();
    loop {
        // SAFETY: the pointer is to a live value of the type that the request is defined for.
        if unsafe { libc::ioctl(listener, number as _, argument) } != -1 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
