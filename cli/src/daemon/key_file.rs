//! A private key on disk: made once, private, never overwritten.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use tp_tunnel::Identity;

use crate::report::{Failure, OrFail};

/// Reads an identity, and refuses a file that others could have read or changed.
///
/// # Errors
/// Not there, not private, or no identity in it.
pub fn read(path: &Path) -> Result<Identity, Failure> {
    let cannot = || format!("cannot read the key {}", path.display());
    let found = fs::metadata(path).map_err(|error| {
        let failure = Failure::new(cannot()).caused_by(&error);
        failure.hint(format!("`tp key new --file {}` makes one", path.display()))
    })?;
    if found.mode() & 0o077 != 0 {
        let failure = Failure::new(cannot()).because(format!(
            "others have access to it (mode {:04o})",
            found.mode() & 0o7777
        ));
        return Err(failure.hint(format!("chmod 600 {}", path.display())));
    }
    let pem = fs::read_to_string(path).or_fail(cannot)?;
    Identity::from_pem(&pem).or_fail(cannot)
}

/// Makes a new identity in a new file.
///
/// # Errors
/// The file exists, or cannot be written; then nothing is left of it.
pub fn create(path: &Path) -> Result<Identity, Failure> {
    let identity = Identity::generate();
    let written = write_new(path, identity.to_pem().as_bytes());
    written.map_err(|error| {
        let failure =
            Failure::new(format!("cannot write the key {}", path.display())).caused_by(&error);
        if error.kind() != io::ErrorKind::AlreadyExists {
            return failure;
        }
        failure.hint("name another file with `--file`, or remove this one first")
    })?;
    Ok(identity)
}

fn write_new(path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let written = file.write_all(contents).and_then(|()| file.sync_all());
    written.inspect_err(|_| drop(fs::remove_file(path)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_private_reads_back_and_is_never_overwritten() {
        let path = std::env::temp_dir().join(format!("tp-key-{}", std::process::id()));
        let _ = fs::remove_file(&path);

        let made = create(&path).unwrap();

        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(read(&path).unwrap().key_hash(), made.key_hash());
        assert!(create(&path).unwrap_err().hint.is_some());
        assert_eq!(read(&path).unwrap().key_hash(), made.key_hash());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(read(&path).unwrap_err().hint.unwrap().contains("chmod 600"));
        fs::remove_file(&path).unwrap();
    }
}
