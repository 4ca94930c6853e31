//! What stands in a ledger: one JSON object a line.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::plan::Id;

/// Header of a reply that names who answered.
pub const INSTANCE_HEADER: &str = "x-ledger-instance";

/// One line of a ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The request.
    #[serde(flatten)]
    pub id: Id,
    /// Milliseconds since 1970.
    pub at: u64,
    /// What happened to it.
    #[serde(flatten)]
    pub event: Event,
}

/// What an end saw. A client writes one `Sent` and at most one of `Answered` and `Failed`; a server one `Received` for
/// each time that a whole request came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The client began to send it.
    Sent {
        /// Whether it carried the header of an intercept.
        mine: bool,
    },
    /// A whole reply of a server came.
    Answered {
        /// Who signed it.
        instance: String,
        /// Whether the application answered in place of a workstation that could not (`x-tp-fallback`).
        fallback: bool,
        /// Whether every byte was right.
        intact: bool,
    },
    /// It ended with an error that the client could not take for success.
    Failed {
        /// A status, or how the connection ended.
        error: String,
    },
    /// A whole request came.
    Received {
        /// Who writes this.
        instance: String,
        /// Whether every byte was right.
        intact: bool,
    },
}

impl Record {
    /// Happening now.
    pub fn now(id: Id, event: Event) -> Self {
        Self {
            id,
            at: now(),
            event,
        }
    }
}

/// Milliseconds since 1970, as records have them.
pub fn now() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The ledger of one process: a file of its own in the run's folder, which it only appends to.
#[derive(Debug)]
pub struct Ledger {
    file: File,
}

impl Ledger {
    /// A new file of this process in `folder`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create(folder: &Path) -> std::io::Result<Self> {
        // In a pod every process is number 1.
        let path = folder.join(format!("{:016x}.jsonl", rand::random::<u64>()));
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(path)?;
        Ok(Self { file })
    }

    /// Appends a line, in one call, so that whoever is killed meanwhile leaves none that is half.
    ///
    /// # Panics
    /// When the disk is full: a ledger with holes proves nothing.
    pub fn write(&self, id: Id, event: Event) {
        let mut line =
            serde_json::to_string(&Record::now(id, event)).expect("strings, numbers and booleans");
        line.push('\n');
        (&self.file)
            .write_all(line.as_bytes())
            .expect("the ledger can be written");
    }
}

/// Every line of every ledger in `folder`.
///
/// # Errors
/// What cannot be read, or is no ledger.
pub fn read_all(folder: &Path) -> anyhow::Result<Vec<Record>> {
    let mut records = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let text = std::fs::read_to_string(&path)?;
        // The last line may be on its way: nobody has seen its end.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        for line in text[..whole].lines() {
            let record = serde_json::from_str(line);
            records.push(record.with_context(|| format!("{}: {line}", path.display()))?);
        }
    }
    Ok(records)
}
