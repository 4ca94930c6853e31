//! `tp list-contexts`: the clusters that the kubeconfig knows. Asks none of them.

use std::process::ExitCode;

use serde::Serialize;

use crate::kubeconfig::{Context, Selectors};
use crate::report::{Failure, Output, escaped};

/// List the contexts of the kubeconfig; `*` marks the one that is used without `--context`
#[derive(clap::Args, Debug, Clone)]
pub struct Args {
    /// Which kubeconfig.
    #[command(flatten)]
    pub selectors: Selectors,
}

#[derive(Serialize)]
struct Listing {
    contexts: Vec<Context>,
}

/// Prints the list.
///
/// # Errors
/// There is no kubeconfig, or it cannot be read.
pub async fn run(args: Args, output: &Output) -> Result<ExitCode, Failure> {
    let contexts = args.selectors.contexts()?;
    let listing = Listing { contexts };
    output.print(&listing, || table(&listing.contexts))?;
    Ok(ExitCode::SUCCESS)
}

fn table(contexts: &[Context]) -> String {
    let head = ["CONTEXT", "CLUSTER", "USER", "NAMESPACE"].map(str::to_owned);
    let row = |context: &Context| {
        [
            &context.name,
            &context.cluster,
            &context.user,
            &context.namespace,
        ]
        .map(|text| escaped(text))
    };
    let rows: Vec<_> = std::iter::once(head)
        .chain(contexts.iter().map(row))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    let marks = std::iter::once(' ').chain(
        contexts
            .iter()
            .map(|context| if context.current { '*' } else { ' ' }),
    );
    let line = |(mark, [name, cluster, user, namespace]): (char, &[String; 4])| {
        let [a, b, c] = widths;
        format!("{mark} {name:a$}  {cluster:b$}  {user:c$}  {namespace}\n")
    };
    marks.zip(&rows).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lines_up_and_marks_the_current_one() {
        let context = |name: &str, current| Context {
            name: name.into(),
            current,
            cluster: "c".into(),
            user: "ada".into(),
            namespace: "shop".into(),
        };

        let text = table(&[context("lab", true), context("production", false)]);

        assert_eq!(
            text,
            "  CONTEXT     CLUSTER  USER  NAMESPACE\n* lab         c        ada   shop\n  production  c        ada   shop\n"
        );
    }
}
