//! `tp key`: keys for managers that know no Kubernetes.

use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;
use tp_tunnel::KeyHash;

use crate::daemon::key_file;
use crate::report::{Failure, Output};

/// Make and show keys for `tp connect --via … --key` and `tp-manager --standalone`
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand, Debug, Clone)]
enum Action {
    /// Make a new key in a new file that only you can read, and print its hash
    New {
        /// The file of the private key
        #[arg(long, value_name = "FILE", default_value = "tp-key.pem")]
        file: PathBuf,
    },
    /// Print the hash of a key
    Hash {
        /// The file of the private key
        #[arg(long, value_name = "FILE", default_value = "tp-key.pem")]
        file: PathBuf,
    },
}

#[derive(Serialize)]
struct Key {
    file: PathBuf,
    key_hash: KeyHash,
}

/// Makes or reads a key. What goes to others is the hash alone.
///
/// # Errors
/// The file exists already, or cannot be written or read.
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    let (file, identity) = match args.action {
        Action::New { file } => (file.clone(), key_file::create(&file)?),
        Action::Hash { file } => (file.clone(), key_file::read(&file)?),
    };
    let key = Key {
        file,
        key_hash: identity.key_hash(),
    };
    output.print(&key, || key.key_hash.to_string())?;
    Ok(ExitCode::SUCCESS)
}
