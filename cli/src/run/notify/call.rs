//! One stopped system call, and the process that made it, as far as an answer needs it.
//!
//! The process may change its memory at any time, may be killed, and its number may be given to another one. So memory
//! and descriptors are taken first and used only if the call is still waiting after that (`seccomp_unotify(2)`), and
//! each piece of memory is read once: what was looked at is what is acted on.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::address::{self, Address};
use super::sys::{self, Answer, Stopped};

/// A call that waits. Dropped without an answer it fails, so that no program hangs by a defect of ours.
#[derive(Debug)]
pub(super) struct Call {
    listener: Arc<OwnedFd>,
    stopped: Stopped,
    answered: bool,
}

/// `pidfd_open(2)`: any thread, not only the first one of its process. Linux 6.9.
const ANY_THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL as u32);

impl Call {
    /// Waits for the next one.
    pub(super) fn next(listener: &Arc<OwnedFd>) -> io::Result<Self> {
        let stopped = sys::receive(listener)?;
        Ok(Self {
            listener: Arc::clone(listener),
            stopped,
            answered: false,
        })
    }

    /// Its number.
    pub(super) fn number(&self) -> i64 {
        self.stopped.number
    }

    /// One of its arguments.
    pub(super) fn argument(&self, index: usize) -> u64 {
        self.stopped.arguments[index]
    }

    /// Answers it. Says whether anybody heard.
    pub(super) fn answer(mut self, answer: Answer) -> bool {
        self.answered = true;
        sys::answer(&self.listener, self.stopped.id, answer).is_ok()
    }

    /// Whether its thread still waits.
    pub(super) fn is_waiting(&self) -> bool {
        sys::is_waiting(&self.listener, self.stopped.id)
    }

    /// Its process's memory.
    pub(super) fn memory(&self, for_writing: bool) -> io::Result<Memory> {
        let file = File::options()
            .read(true)
            .write(for_writing)
            .open(format!("/proc/{}/mem", self.stopped.thread))?;
        self.still(Memory(file))
    }

    /// The process's descriptor of this number, as one of ours: the same open file, with its flags and position.
    pub(super) fn descriptor(&self, number: u64) -> io::Result<OwnedFd> {
        // The kernel looks at 32 bits of it.
        let number = number as u32 as i32;
        let process = self.still(self.process()?)?;
        Ok(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?)
    }

    fn process(&self) -> io::Result<OwnedFd> {
        let thread = |number| Pid::from_raw(number).ok_or(io::ErrorKind::NotFound);
        match pidfd_open(thread(self.stopped.thread)?, ANY_THREAD) {
            Err(rustix::io::Errno::INVAL) => {}
            opened => return Ok(opened?),
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.stopped.thread))?;
        let first = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
        let first = first.and_then(|number| number.trim().parse().ok());
        let first = thread(first.ok_or(io::ErrorKind::InvalidData)?)?;
        Ok(pidfd_open(first, PidfdFlags::empty())?)
    }

    /// The value, if its process was the right one all the time.
    fn still<T>(&self, value: T) -> io::Result<T> {
        if self.is_waiting() {
            Ok(value)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.answered {
            let _ = sys::answer(
                &self.listener,
                self.stopped.id,
                Answer::Error(libc::EHOSTUNREACH),
            );
        }
    }
}

/// The memory of a process.
pub(super) struct Memory(File);

impl Memory {
    /// Exactly so many bytes.
    pub(super) fn read(&self, at: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.0.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }

    /// Replaces bytes.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, at)
    }

    /// The address at a pointer, of a length that the program says.
    pub(super) fn address(&self, at: u64, length: u64) -> io::Result<Address> {
        // The kernel looks at 32 bits of it.
        let length = length as u32 as usize;
        if at == 0 || length > address::LONGEST {
            return Ok(Address::Other);
        }
        Ok(address::parse(&self.read(at, length)?))
    }

    /// A number of 64 bits.
    pub(super) fn word(&self, at: u64) -> io::Result<u64> {
        let bytes = self.read(at, 8)?;
        let bytes = bytes.first_chunk().expect("eight were read");
        Ok(u64::from_ne_bytes(*bytes))
    }

    /// A number of 32 bits.
    pub(super) fn half(&self, at: u64) -> io::Result<u32> {
        let bytes = self.read(at, 4)?;
        let bytes = bytes.first_chunk().expect("four were read");
        Ok(u32::from_ne_bytes(*bytes))
    }
}
