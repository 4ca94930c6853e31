//! `ledger`: numbered requests, and servers that write down who had them. What became of them is judged by
//! `tp_tests::ledger`.
//!
//! ```text
//! ledger serve FOLDER ADDRESS INSTANCE [DELAY_MS]
//!     HTTP/1.1 and HTTP/2 by prior knowledge; says where it listens, runs until it is killed. Half of the delay comes
//!     before a reply, half in the middle of its body
//! ledger load FOLDER ADDRESS SEED FIRST_FLOW FLOWS PER_SECOND h1|h1-fresh|h2 [NAME:VALUE]
//!     requests until stdin ends; those that the plan calls mine carry the header
//! ```

mod load;
mod serve;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::AsyncReadExt as _;
use tp_tests::ledger::{Ledger, Plan};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["serve", folder, address, instance, ref delay @ ..] => {
            let delay = delay.first().map_or(Ok(0), |text| text.parse())?;
            let server = serve::Server {
                ledger: ledger(folder)?,
                instance: instance.to_owned(),
                delay: Duration::from_millis(delay),
            };
            serve::run(Arc::new(server), address).await
        }
        [
            "load",
            folder,
            address,
            seed,
            first_flow,
            flows,
            per_second,
            version,
            ref header @ ..,
        ] => {
            let header = header
                .first()
                .map(|text| text.split_once(':').context("NAME:VALUE"))
                .transpose()?;
            let load = load::Load {
                ledger: ledger(folder)?,
                plan: Plan {
                    seed: seed.parse()?,
                },
                address: address.parse()?,
                header: header.map(|(name, value)| (name.to_owned(), value.trim().to_owned())),
            };
            let stop = tokio_util::sync::CancellationToken::new();
            let stopper = stop.clone();
            tokio::spawn(async move {
                let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
                stopper.cancel();
            });
            load::run(
                Arc::new(load),
                first_flow.parse()?,
                flows.parse()?,
                per_second.parse()?,
                version.parse()?,
                stop,
            )
            .await;
            Ok(())
        }
        ref other => bail!("unknown arguments {other:?}"),
    }
}

fn ledger(folder: &str) -> anyhow::Result<Ledger> {
    Ledger::create(Path::new(folder)).with_context(|| folder.to_owned())
}
