//! What a command says: data on stdout, failures and progress on stderr.
//!
//! A [`Failure`] is one thing that did not work, why, and one hint; it can travel from the daemon to the command that
//! waits for it. It knows nothing of the work that failed. Text that came from a cluster passes through [`escaped`]
//! before it reaches a terminal, so that an object's name cannot move the cursor.

use std::error::Error;
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

mod kubernetes;

pub use kubernetes::{is_denial, status_of};

/// Exit code of a command that failed.
pub const FAILED: u8 = 1;
/// Exit code of a command that was called wrongly.
pub const USAGE: u8 = 2;
/// Exit code of `connect -- cmd` when we failed before `cmd` started.
pub const BEFORE_COMMAND: u8 = 125;

/// How long work is silent before a progress line appears.
const PATIENCE: Duration = Duration::from_millis(300);

/// Something that did not work, as the user reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What could not be done: one line, lower case, no full stop.
    pub what: String,
    /// Why, outermost cause first.
    pub why: Vec<String>,
    /// The one thing to try next.
    pub hint: Option<String>,
    /// The process's exit code, should this failure end it.
    pub exit: u8,
}

impl Failure {
    /// A failure without a cause or a hint yet, that exits with [`FAILED`].
    pub fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            why: Vec::new(),
            hint: None,
            exit: FAILED,
        }
    }

    /// What and why as one line, for a log or a table.
    pub fn one_line(&self) -> String {
        let mut parts = vec![self.what.as_str()];
        parts.extend(self.why.iter().map(String::as_str));
        parts.dedup();
        parts.join(": ")
    }

    /// Adds one cause below those that are there.
    #[must_use]
    pub fn because(mut self, why: impl Into<String>) -> Self {
        self.why.push(why.into());
        self
    }

    /// Adds an error and its chain of sources, each once.
    #[must_use]
    pub fn caused_by(mut self, error: &dyn Error) -> Self {
        for line in chain(error) {
            if !self.why.contains(&line) {
                self.why.push(line);
            }
        }
        self
    }

    /// Sets the hint; a later one wins.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Sets the hint unless there is one.
    #[must_use]
    pub fn hint_or(mut self, hint: impl Into<String>) -> Self {
        self.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// Sets the exit code.
    #[must_use]
    pub fn exit(mut self, code: u8) -> Self {
        self.exit = code;
        self
    }

    /// Puts a wider statement in front: what was said so far becomes the first cause.
    #[must_use]
    pub fn within(mut self, what: impl Into<String>) -> Self {
        let inner = std::mem::replace(&mut self.what, what.into());
        self.why.insert(0, inner);
        self
    }

    /// The exit code for `main`.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.exit)
    }

    /// Writes the failure to stderr. A closed stderr is not worth a second failure.
    pub fn print(&self) {
        let _ = io::stderr().lock().write_all(self.to_string().as_bytes());
    }
}

/// The whole report, with a newline at its end: `error:`, the causes, a blank line and the hint.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "error: {}", escaped(&self.what))?;
        for why in &self.why {
            writeln!(f, "  caused by: {}", escaped(why))?;
        }
        match &self.hint {
            Some(hint) => writeln!(f, "\nhint: {}", escaped(hint)),
            None => Ok(()),
        }
    }
}

impl Error for Failure {}

/// Turns any error into a [`Failure`] that says what was being done.
pub trait OrFail<T> {
    /// On error, says `what` could not be done and keeps the error's chain as the cause.
    ///
    /// # Errors
    /// The failure, when `self` is an error.
    fn or_fail(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Error> OrFail<T> for Result<T, E> {
    fn or_fail(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(what()).caused_by(&error))
    }
}

/// The form in which data goes to stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Output {
    /// For people; may change between versions.
    #[default]
    Text,
    /// For programs; documented and stable.
    Json,
    /// The same structure as JSON.
    Yaml,
}

impl Output {
    /// Writes one value: the text for people, or the value itself for programs.
    ///
    /// # Errors
    /// When stdout cannot be written. A reader that has gone away (`| head`) is not an error.
    pub fn print<T: Serialize + ?Sized>(
        self,
        value: &T,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        write_out(&self.render(value, text)?)
    }

    /// Writes one value of an endless series: JSON takes one line each, YAML one document each.
    ///
    /// # Errors
    /// As [`Output::print`].
    pub fn print_next<T: Serialize + ?Sized>(
        self,
        value: &T,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        let rendered = match self {
            Self::Json => serde_json::to_string(value).or_fail(cannot_render)? + "\n",
            Self::Yaml => format!("---\n{}", self.render(value, text)?),
            Self::Text => self.render(value, text)?,
        };
        write_out(&rendered)
    }

    fn render<T: Serialize + ?Sized>(
        self,
        value: &T,
        text: impl FnOnce() -> String,
    ) -> Result<String, Failure> {
        let rendered = match self {
            Self::Text => text(),
            Self::Json => serde_json::to_string_pretty(value).or_fail(cannot_render)?,
            Self::Yaml => yaml(value)?,
        };
        Ok(with_newline(rendered))
    }
}

/// A value as one YAML document.
///
/// # Errors
/// When the value has no YAML form, such as a map with composite keys.
pub fn yaml<T: Serialize + ?Sized>(value: &T) -> Result<String, Failure> {
    serde_saphyr::to_string(&value).or_fail(cannot_render)
}

/// Writes data to stdout.
///
/// # Errors
/// When stdout cannot be written, except where its reader has gone away.
pub fn write_out(data: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(data.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.or_fail(|| "cannot write to stdout".to_owned()),
    }
}

/// Tells the person at the terminal something that is neither data nor a failure.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", escaped(text));
}

/// As [`note`], for text that was escaped where it was made and whose blanks are to stay.
pub fn note_line(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Does `work` and, on a terminal, says so once it has taken longer than 0.3 s.
///
/// # Errors
/// Those of `work`. Cancel safe if `work` is.
pub async fn step<T, E>(what: &str, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let begun = Instant::now();
    let mut work = std::pin::pin!(work);
    if let Ok(done) = tokio::time::timeout(PATIENCE, &mut work).await {
        return done;
    }
    if !io::stderr().is_terminal() {
        return work.await;
    }
    let mut line = Line::begin(what);
    let done = work.await;
    let ending = if done.is_ok() { "ok" } else { "failed" };
    line.end(&format!(
        "{ending} ({:.1} s)",
        begun.elapsed().as_secs_f32()
    ));
    done
}

/// A progress line that is ended even when its work is dropped half-way.
struct Line {
    open: bool,
}

impl Line {
    fn begin(what: &str) -> Self {
        let _ = write!(io::stderr().lock(), "{} ... ", escaped(what));
        Self { open: true }
    }

    fn end(&mut self, how: &str) {
        self.open = false;
        let _ = writeln!(io::stderr().lock(), "{how}");
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.open {
            self.end("stopped");
        }
    }
}

/// The text with everything that could steer a terminal made visible; line breaks become spaces.
#[must_use]
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.trim().chars() {
        match c {
            '\n' | '\r' | '\t' => out.push(' '),
            c if c.is_control() || steers_direction(c) => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

/// Unicode's bidirectional overrides and isolates, which can make a name read as another.
fn steers_direction(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// `1 replica`, `2 replicas`.
#[must_use]
pub fn counted(count: impl Into<u64>, noun: &str) -> String {
    match count.into() {
        1 => format!("1 {noun}"),
        count => format!("{count} {noun}s"),
    }
}

fn chain(error: &dyn Error) -> Vec<String> {
    std::iter::successors(Some(error), |&error| {
        error.source().map(|source| source as &dyn Error)
    })
    .map(ToString::to_string)
    .collect()
}

fn with_newline(mut text: String) -> String {
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

fn cannot_render() -> String {
    "cannot write the result in this format".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_reads_as_error_causes_and_hint() {
        let failure = Failure::new("cannot reach 10.0.0.1:6443")
            .because("connection refused")
            .hint("is the cluster up?");

        let printed = failure.to_string();

        assert_eq!(
            printed,
            "error: cannot reach 10.0.0.1:6443\n  caused by: connection refused\n\nhint: is the cluster up?\n"
        );
    }

    #[test]
    fn a_wider_statement_keeps_the_cause_and_the_hint() {
        let failure = Failure::new("no such file")
            .hint("make it")
            .within("cannot read the key");

        assert_eq!(failure.what, "cannot read the key");
        assert_eq!(failure.why, ["no such file"]);
        assert_eq!(failure.hint.as_deref(), Some("make it"));
    }

    #[test]
    fn cluster_text_cannot_steer_the_terminal() {
        let hostile = "pod \u{1b}[2Jx\u{7} is\nfine \u{202e}gnp";

        let shown = Failure::new(hostile).to_string();

        assert_eq!(shown, "error: pod \\u{1b}[2Jx\\u{7} is fine \\u{202e}gnp\n");
    }

    #[test]
    fn yaml_keeps_strings_that_look_like_other_types() {
        let value = serde_json::json!({"a": "yes", "b": "0.5", "c": "10m", "d": "null", "e": "1e3", "f": "a: b # c", "g": ["", "~", "- x", "line\nline\n"]});

        let text = yaml(&value).unwrap();
        let back: serde_json::Value = serde_saphyr::from_str(&text).unwrap();

        assert_eq!(back, value, "{text}");
    }

    #[test]
    fn a_failure_survives_the_trip_from_the_daemon() {
        let failure = Failure::new("x").because("y").exit(BEFORE_COMMAND);

        let back: Failure =
            serde_json::from_str(&serde_json::to_string(&failure).unwrap()).unwrap();

        assert_eq!(back, failure);
    }
}
