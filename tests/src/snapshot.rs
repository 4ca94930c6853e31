//! Comparing what a user reads with what was agreed, file by file.

use std::path::PathBuf;

/// Compares `text` with `tests/snapshots/<name>.txt`. `TP_UPDATE_SNAPSHOTS=1` writes the file instead, for a reviewer
/// to read in the diff. `redactions` replace what differs from run to run, such as an address.
#[track_caller]
pub fn assert_snapshot(name: &str, text: &str, redactions: &[(&str, &str)]) {
    let text = redactions
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/snapshots")
        .join(format!("{name}.txt"));
    if std::env::var_os("TP_UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, &text)
            .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        text == expected,
        "{name} has changed; run with TP_UPDATE_SNAPSHOTS=1 to accept\n--- expected\n{expected}\n--- got\n{text}"
    );
}
