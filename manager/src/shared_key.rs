//! The one key of all replicas, in a Secret.
//!
//! Whoever comes first makes it; the API server decides who that is. A rollout or another replica changes no pin.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tp_manager_api::{KEY_ENTRY, KEY_SECRET};
use tp_tunnel::Identity;

/// Reads the key, or makes it. Tries again while the API server cannot be reached.
pub async fn load(client: Client, namespace: &str) -> Identity {
    let api = Api::<Secret>::namespaced(client, namespace);
    loop {
        match read_or_make(&api).await {
            Ok(identity) => return identity,
            Err(error) => tracing::warn!("no key yet: {error:#}"),
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

async fn read_or_make(api: &Api<Secret>) -> Result<Identity> {
    if let Some(secret) = api
        .get_opt(KEY_SECRET)
        .await
        .with_context(|| format!("cannot read Secret {KEY_SECRET}"))?
    {
        return read(&secret);
    }
    let identity = Identity::generate();
    match api.create(&PostParams::default(), &secret(&identity)).await {
        Ok(_) => Ok(identity),
        Err(kube::Error::Api(status)) if status.code == 409 => read(
            &api.get(KEY_SECRET)
                .await
                .with_context(|| format!("cannot read Secret {KEY_SECRET}"))?,
        ),
        Err(error) => Err(error).with_context(|| format!("cannot create Secret {KEY_SECRET}")),
    }
}

fn secret(identity: &Identity) -> Secret {
    Secret {
        metadata: ObjectMeta {
            name: Some(KEY_SECRET.to_owned()),
            ..ObjectMeta::default()
        },
        data: Some(
            [(
                KEY_ENTRY.to_owned(),
                ByteString(identity.to_pem().into_bytes()),
            )]
            .into(),
        ),
        immutable: Some(true),
        ..Secret::default()
    }
}

fn read(secret: &Secret) -> Result<Identity> {
    let entry = secret.data.as_ref().and_then(|data| data.get(KEY_ENTRY));
    let bytes = entry.with_context(|| format!("Secret {KEY_SECRET} has no entry {KEY_ENTRY}"))?;
    let text = std::str::from_utf8(&bytes.0).with_context(|| format!("{KEY_ENTRY} is not text"))?;
    Identity::from_pem(text).with_context(|| {
        format!("cannot use {KEY_ENTRY} of Secret {KEY_SECRET}; delete it for a new key")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_replica_stores_another_reads() {
        let identity = Identity::generate();

        assert_eq!(
            read(&secret(&identity)).unwrap().key_hash(),
            identity.key_hash()
        );
        assert!(read(&Secret::default()).is_err());
    }
}
