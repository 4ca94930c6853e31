//! The only unsafe code of the workstation: what a daemon inherits and must not keep.

/// Marks every descriptor above stderr to be closed, so that a daemon does not keep the files, locks and pipes of
/// whoever started it. Called before anything of ours is open. Kernels before 5.9 cannot; there it does nothing.
#[cfg(target_os = "linux")]
pub fn close_inherited() {
    const FIRST: libc::c_uint = 3;
    // SAFETY: no descriptor from 3 on belongs to a Rust value yet: `main` calls this first, before it starts a runtime
    // or opens a file.
    #[expect(unsafe_code, reason = "no safe interface to close_range exists")]
    unsafe {
        libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0);
    }
}

/// Other kernels have no call for it.
#[cfg(not(target_os = "linux"))]
pub fn close_inherited() {}
