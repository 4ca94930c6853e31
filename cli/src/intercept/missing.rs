//! Flags of Telepresence with nothing behind them here. They are taken to be refused by name, with what to do instead.

use crate::report::{Failure, USAGE};

/// See the module.
#[derive(clap::Args, Debug, Clone, Default)]
pub struct MissingFlags {
    /// `false` is what is done anyway.
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true")]
    mount: Option<String>,
    #[arg(long, hide = true)]
    local_mount_port: Option<String>,
    #[arg(long, hide = true)]
    docker_run: bool,
    #[arg(long, hide = true)]
    docker_build: Option<String>,
    #[arg(long, hide = true)]
    docker_debug: Option<String>,
    #[arg(long, hide = true)]
    docker_mount: Option<String>,
    #[arg(long, hide = true)]
    replace: bool,
    #[arg(long, hide = true)]
    metadata: Vec<String>,
}

const NO_FILES: (&str, &str) = (
    "the container's files are not brought to the workstation",
    "leave it out, or say `--mount=false`; the environment comes with `-e FILE` and `-- COMMAND`",
);
const NO_DOCKER: (&str, &str) = (
    "tp starts no containers",
    "`tp intercept NAME -p PORT -e web.env`, then `docker run --env-file web.env -p PORT:PORT IMAGE`; `--address` where it publishes no port",
);
const NO_REPLACE: (&str, &str) = (
    "the application keeps running beside the intercept",
    "`--global` takes everything that comes to the port; `kubectl scale` stops what the application does by itself",
);
const NO_METADATA: (&str, &str) = (
    "nothing would read it",
    "leave it out; `tp list -i --output json` shows who intercepts what",
);

impl MissingFlags {
    /// Whether none of them was given.
    ///
    /// # Errors
    /// The first that was, why it is not there, and what to do.
    pub fn refuse(&self) -> Result<(), Failure> {
        let mounts = self.mount.as_ref().is_some_and(|value| value != "false");
        let given = [
            (mounts, "--mount", NO_FILES),
            (
                self.local_mount_port.is_some(),
                "--local-mount-port",
                NO_FILES,
            ),
            (self.docker_run, "--docker-run", NO_DOCKER),
            (self.docker_build.is_some(), "--docker-build", NO_DOCKER),
            (self.docker_debug.is_some(), "--docker-debug", NO_DOCKER),
            (self.docker_mount.is_some(), "--docker-mount", NO_DOCKER),
            (self.replace, "--replace", NO_REPLACE),
            (!self.metadata.is_empty(), "--metadata", NO_METADATA),
        ];
        match given.into_iter().find(|(is_given, ..)| *is_given) {
            None => Ok(()),
            Some((_, flag, (why, hint))) => Err(Failure::new(format!("there is no `{flag}` here"))
                .because(why)
                .hint(hint)
                .exit(USAGE)),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        flags: MissingFlags,
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        for (flag, refused) in [
            ("--mount", Some("--mount")),
            ("--mount=true", Some("--mount")),
            ("--mount=/tmp/x", Some("--mount")),
            ("--mount=false", None),
            ("--docker-run", Some("--docker-run")),
            ("--docker-build=.", Some("--docker-build")),
            ("--replace", Some("--replace")),
            ("--metadata=a=b", Some("--metadata")),
        ] {
            let line = Line::try_parse_from(["tp", flag]).unwrap_or_else(|error| panic!("{error}"));
            let failure = line.flags.refuse().err();
            let said = failure.as_ref().map(|failure| failure.what.as_str());
            assert_eq!(
                said,
                refused
                    .map(|flag| format!("there is no `{flag}` here"))
                    .as_deref(),
                "{flag}"
            );
            assert!(failure.is_none_or(|failure| failure.exit == USAGE));
        }
    }
}
