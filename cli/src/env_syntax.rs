//! Environment variables as text that a shell, Docker or a program reads back byte for byte.
//!
//! Each syntax has values or names that it cannot hold. Those are left out and named, never written in a form that reads
//! back as something else. Knows nothing of where variables come from.

use std::collections::BTreeMap;

use clap::ValueEnum;

/// The form of a list of variables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EnvSyntax {
    /// NAME=value lines, as `docker run --env-file` reads them
    Docker,
    /// NAME="value" lines, as Docker Compose reads them in `env_file`
    Compose,
    /// sh, bash, zsh
    #[value(alias = "sh:export")]
    Sh,
    /// csh, tcsh
    #[value(alias = "csh:export")]
    Csh,
    /// fish
    Fish,
    /// PowerShell
    #[value(alias = "ps")]
    Powershell,
    /// One JSON object
    Json,
}

/// What came of writing variables.
#[derive(Debug, PartialEq, Eq)]
pub struct Written {
    /// The text, with a line break at its end.
    pub text: String,
    /// Names of the variables that this syntax cannot hold.
    pub left_out: Vec<String>,
}

impl EnvSyntax {
    /// Writes the variables in their order; JSON sorts them.
    #[must_use]
    pub fn write(self, variables: &[(String, String)]) -> Written {
        let (held, left_out): (Vec<_>, Vec<_>) = variables
            .iter()
            .partition(|(name, value)| self.holds(name, value));
        let text = match self {
            Self::Json => json(&held),
            Self::Docker | Self::Compose | Self::Sh | Self::Csh | Self::Fish | Self::Powershell => {
                held.iter()
                    .map(|(name, value)| self.line(name, value) + "\n")
                    .collect()
            }
        };
        Written {
            text,
            left_out: left_out.into_iter().map(|(name, _)| name.clone()).collect(),
        }
    }

    fn holds(self, name: &str, value: &str) -> bool {
        let part = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let dotted = |c: char| part(c) || matches!(c, '.' | '-');
        match self {
            _ if name.is_empty() => false,
            Self::Json => true,
            // One line each, and a name ends at white space.
            Self::Docker => {
                !value.contains(['\n', '\r'])
                    && !name.starts_with('#')
                    && !name.contains(char::is_whitespace)
            }
            Self::Compose | Self::Powershell => name.chars().all(dotted),
            Self::Sh | Self::Csh | Self::Fish => {
                name.chars().all(part) && !name.starts_with(|c: char| c.is_ascii_digit())
            }
        }
    }

    fn line(self, name: &str, value: &str) -> String {
        match self {
            Self::Docker | Self::Json => format!("{name}={value}"),
            Self::Compose => format!("{name}=\"{}\"", compose(value)),
            Self::Sh => format!("export {name}='{}'", value.replace('\'', r"'\''")),
            Self::Csh => format!("setenv {name} '{}'", csh(value)),
            Self::Fish => {
                let value = value.replace('\\', r"\\").replace('\'', r"\'");
                format!("set -gx {name} '{value}'")
            }
            Self::Powershell => format!("${{Env:{name}}} = '{}'", powershell(value)),
        }
    }
}

/// Between double quotes, where Compose knows escapes and would put in variables.
fn compose(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '\n' => out.push_str(r"\n"),
            '\r' => out.push_str(r"\r"),
            '\t' => out.push_str(r"\t"),
            '"' | '\\' | '$' => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out
}

/// Between single quotes, where the history character and line breaks still want a backslash.
fn csh(value: &str) -> String {
    value
        .replace('\'', r"'\''")
        .replace('!', r"\!")
        .replace('\n', "\\\n")
}

/// Between single quotes. PowerShell takes the typographic ones for the same.
fn powershell(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        if matches!(c, '\'' | '\u{2018}'..='\u{201b}') {
            out.push(c);
        }
        out.push(c);
    }
    out
}

fn json(variables: &[&(String, String)]) -> String {
    let map: BTreeMap<&str, &str> = variables
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    serde_json::to_string_pretty(&map).expect("texts have a JSON form") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(syntax: EnvSyntax, value: &str) -> String {
        let written = syntax.write(&[("A".to_owned(), value.to_owned())]);
        assert_eq!(written.left_out, [""; 0]);
        written.text.trim_end_matches('\n').to_owned()
    }

    #[test]
    fn every_syntax_quotes_what_is_special_in_it() {
        use EnvSyntax::{Compose, Csh, Docker, Fish, Powershell, Sh};
        for (syntax, value, expected) in [
            (Docker, r#"it's "$HOME" \"#, r#"A=it's "$HOME" \"#),
            (Docker, "", "A="),
            (Compose, "plain", r#"A="plain""#),
            (Compose, r#"it's "$HOME" \"#, r#"A="it's \"\$HOME\" \\""#),
            (Compose, "a\nb\tc\r", r#"A="a\nb\tc\r""#),
            (Compose, r"\$x", r#"A="\\\$x""#),
            (Sh, "it's", r"export A='it'\''s'"),
            (Sh, "a\nb", "export A='a\nb'"),
            (Csh, "it's", r"setenv A 'it'\''s'"),
            (Csh, "a!b\nc", "setenv A 'a\\!b\\\nc'"),
            (Fish, r"it's \", r"set -gx A 'it\'s \\'"),
            (Fish, "a\nb", "set -gx A 'a\nb'"),
            (Powershell, "it's $x", "${Env:A} = 'it''s $x'"),
            (
                Powershell,
                "\u{2018}x\u{201b}",
                "${Env:A} = '\u{2018}\u{2018}x\u{201b}\u{201b}'",
            ),
        ] {
            assert_eq!(lines(syntax, value), expected, "{syntax:?}");
        }
    }

    #[test]
    fn what_a_syntax_cannot_hold_is_left_out_and_named() {
        use EnvSyntax::{Compose, Csh, Docker, Fish, Json, Powershell, Sh};
        let variables = [
            ("GOOD", "x"),
            ("LINES", "a\nb"),
            ("RETURN", "a\r"),
            ("my.name", "x"),
            ("9LIVES", "x"),
            ("#x", "x"),
            ("A B", "x"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        for (syntax, left_out) in [
            (Docker, &["LINES", "RETURN", "#x", "A B"][..]),
            (Compose, &["#x", "A B"]),
            (Powershell, &["#x", "A B"]),
            (Sh, &["my.name", "9LIVES", "#x", "A B"]),
            (Csh, &["my.name", "9LIVES", "#x", "A B"]),
            (Fish, &["my.name", "9LIVES", "#x", "A B"]),
            (Json, &[]),
        ] {
            let written = syntax.write(&variables);
            assert_eq!(written.left_out, left_out, "{syntax:?}");
            assert!(written.text.contains("GOOD"), "{syntax:?}");
        }
    }

    #[test]
    fn json_reads_back() {
        let variables = [
            ("B".to_owned(), "a\n\"'$\\".to_owned()),
            ("A".to_owned(), String::new()),
        ];

        let text = EnvSyntax::Json.write(&variables).text;

        let back: BTreeMap<String, String> = serde_json::from_str(&text).unwrap();
        assert_eq!(back, variables.into_iter().collect());
    }

    /// Values that break naive quoting.
    const HARD: [&str; 9] = [
        "a'b\"c $HOME `id` \\ *",
        "''",
        "\\'",
        "ends with \\",
        "two\nlines\n",
        "! !! !$ !x",
        " spaces ",
        "\t#not a comment; true && false | x > y",
        "gr\u{fc}\u{df}e \u{2018}q\u{2019} \u{1f980}",
    ];

    #[test]
    fn a_shell_reads_back_what_was_written() {
        for program in ["sh", "bash"] {
            let variables: Vec<_> = HARD
                .iter()
                .enumerate()
                .map(|(n, value)| (format!("TP_TEST_{n}"), (*value).to_owned()))
                .collect();
            let mut script = EnvSyntax::Sh.write(&variables).text;
            for (name, _) in &variables {
                script += &format!("printf '%s\\0' \"${name}\"\n");
            }

            let run = std::process::Command::new(program)
                .args(["-c", &script])
                .output()
                .unwrap();

            let read = String::from_utf8(run.stdout).unwrap();
            let read: Vec<_> = read.split_terminator('\0').collect();
            assert_eq!(read, HARD, "{program}");
        }
    }
}
