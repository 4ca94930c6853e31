//! A thread of its own with one runtime on it, for as long as it is wanted.

use std::io;
use std::thread::JoinHandle;

use tokio::sync::oneshot;
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;

/// Work that runs. Dropping it tells it to stop, and waits until it has.
#[derive(Debug)]
pub struct Worker {
    stop: CancellationToken,
    ended: oneshot::Receiver<io::Error>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts `serve`, which is to return soon after it is told to stop.
    ///
    /// # Errors
    /// No thread is free.
    pub fn start<F, S>(serve: F) -> io::Result<Self>
    where
        F: FnOnce(CancellationToken) -> S + Send + 'static,
        S: Future<Output = io::Result<()>>,
    {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let (ended_tx, ended) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let thread = std::thread::Builder::new()
            .name("tp-run".to_owned())
            .spawn(move || {
                let served = runtime.block_on(LocalSet::new().run_until(serve(stopped)));
                if let Err(error) = served {
                    // Nobody may be left who wants to know.
                    let _ = ended_tx.send(error);
                }
            })?;
        Ok(Self {
            stop,
            ended,
            thread: Some(thread),
        })
    }

    /// Ends it, and returns when it has, every flow reset. Cancel safe.
    pub async fn stop(&mut self) {
        self.stop.cancel();
        if !self.ended.is_terminated() {
            // Either way its thread is done.
            let _ = (&mut self.ended).await;
        }
    }

    /// Waits until it ends by itself, and says why. Cancel safe.
    pub async fn ended(&mut self) -> io::Error {
        match (&mut self.ended).await {
            Ok(error) => error,
            Err(_) => io::Error::other("its thread broke down"),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // A panic was already reported by its hook.
            let _ = thread.join();
        }
    }
}
