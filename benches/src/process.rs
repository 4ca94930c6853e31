//! Children that do not outlive their bench, and what they cost.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, bail};

/// A child that is ended when this is dropped.
pub struct Running(pub Child);

impl Running {
    /// Resident memory, in bytes.
    ///
    /// # Errors
    /// It has ended.
    pub fn resident(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
    }

    /// Processor time of its threads that live, user and system, in seconds (`/proc/PID/task/TID/schedstat`).
    ///
    /// # Errors
    /// It has ended.
    pub fn processor_time(&self) -> anyhow::Result<f64> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.0.id()))?;
        let nanoseconds = tasks.map(|task| -> io::Result<u64> {
            let usage = std::fs::read_to_string(task?.path().join("schedstat"))?;
            let time = usage.split(' ').next().and_then(|time| time.parse().ok());
            time.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        });
        let total: u64 = nanoseconds.sum::<io::Result<u64>>()?;
        Ok(total as f64 / 1e9)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An address of loopback on which nothing listens.
///
/// # Errors
/// No port is free.
pub fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// Returns once something accepts connections at `address`.
///
/// # Errors
/// Nothing did for 5 s.
pub fn wait_for(address: SocketAddr) -> anyhow::Result<()> {
    for _ in 0..200 {
        if TcpStream::connect(address).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    bail!("nothing listens on {address}")
}
