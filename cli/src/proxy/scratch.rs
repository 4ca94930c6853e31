//! One buffer a thread for bytes in passing, so that idle flows own none.

use std::cell::RefCell;

/// Holds the largest UDP datagram; for TCP larger reads gain nothing.
const SIZE: usize = 64 * 1024;

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; SIZE].into_boxed_slice());
}

/// Lends the buffer. Its content is whatever was there before.
pub(super) fn with<T>(use_it: impl FnOnce(&mut [u8]) -> T) -> T {
    BUFFER.with_borrow_mut(|buffer| use_it(buffer))
}
