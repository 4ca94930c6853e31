//! The user's access to the API server for as long as a connection lives.
//!
//! A daemon outlives tokens and certificates. Once the API server has refused the credentials, the kubeconfig is read
//! anew before each further request, so that logging in again heals the connection. It stays with the cluster that it
//! began with, whatever the kubeconfig's current context is by then.

use std::sync::{Arc, Mutex, PoisonError};

use crate::kubeconfig::{Cluster, Selectors};
use crate::report::Failure;

/// See the module. Clones share it.
#[derive(Clone, Debug)]
pub struct Login {
    selectors: Arc<Selectors>,
    current: Arc<Mutex<Cluster>>,
}

impl Login {
    /// Reads the kubeconfig. The API server is not asked yet.
    ///
    /// # Errors
    /// As [`Selectors::load`].
    pub async fn new(selectors: &Selectors) -> Result<Self, Failure> {
        let cluster = selectors.load().await?;
        let mut selectors = selectors.clone();
        if !cluster.context.is_empty() {
            selectors.context = Some(cluster.context.clone());
        }
        Ok(Self {
            selectors: Arc::new(selectors),
            current: Arc::new(Mutex::new(cluster)),
        })
    }

    /// The flags that lead there.
    pub fn selectors(&self) -> &Selectors {
        &self.selectors
    }

    /// The cluster as it was last known, whether its credentials still hold or not.
    pub fn last(&self) -> Cluster {
        self.lock().clone()
    }

    /// The cluster to send the next request to. Cancel safe.
    ///
    /// # Errors
    /// The credentials were refused before, and the kubeconfig cannot be read or leads elsewhere now.
    pub async fn cluster(&self) -> Result<Cluster, Failure> {
        let last = self.last();
        if !last.is_refused() {
            return Ok(last);
        }
        let fresh = self.selectors.load().await?;
        if fresh.server != last.server {
            let what = format!(
                "the kubeconfig leads to {} now, and this connection to {}",
                fresh.server, last.server
            );
            return Err(Failure::new(what).hint("end it with `tp quit` and connect again"));
        }
        *self.lock() = fresh.clone();
        Ok(fresh)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cluster> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::Api;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::TcpListener;

    use super::*;

    /// An API server that accepts one token, and has one object.
    async fn api_server(token: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(answer(BufReader::new(stream), token));
            }
        });
        format!("http://{address}")
    }

    async fn answer(mut stream: BufReader<tokio::net::TcpStream>, token: &str) {
        let (mut line, mut known) = (String::new(), false);
        while stream.read_line(&mut line).await.unwrap() > 0 {
            known |= line
                .trim_end()
                .eq_ignore_ascii_case(&format!("authorization: Bearer {token}"));
            if line == "\r\n" {
                let (status, body) = match known {
                    true => (
                        "200 OK",
                        r#"{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":"x"}}"#,
                    ),
                    false => (
                        "401 Unauthorized",
                        r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"Unauthorized","reason":"Unauthorized","code":401}"#,
                    ),
                };
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                    body.len()
                );
                let whole = head + body;
                stream.write_all(whole.as_bytes()).await.unwrap();
                known = false;
            }
            line.clear();
        }
    }

    fn write(path: &Path, current: &str, server: &str, token: &str) {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: {current}\n\
             clusters: [{{name: c, cluster: {{server: '{server}'}}}}, {{name: d, cluster: {{server: 'http://127.0.0.1:1'}}}}]\n\
             users: [{{name: u, user: {{token: {token}}}}}]\n\
             contexts: [{{name: one, context: {{cluster: c, user: u}}}}, {{name: two, context: {{cluster: d, user: u}}}}]\n"
        );
        std::fs::write(path, text).unwrap();
    }

    async fn ask(login: &Login) -> Result<(), Failure> {
        let cluster = login.cluster().await?;
        let api: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "default");
        cluster.in_time(api.get("x")).await.map(drop)
    }

    #[tokio::test]
    async fn a_refreshed_kubeconfig_heals_refused_credentials_and_changes_nothing_else() {
        let server = api_server("new").await;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config");
        let selectors = Selectors {
            kubeconfig: Some(path.clone()),
            ..Selectors::default()
        };
        write(&path, "one", &server, "old");
        let login = Login::new(&selectors).await.unwrap();

        for _ in 0..2 {
            let refused = ask(&login).await.unwrap_err();
            assert!(refused.what.contains("401"), "{refused}");
            assert!(refused.hint.unwrap().contains("log in again"));
        }
        // `kubectl config use-context` in the meantime.
        write(&path, "two", &server, "new");
        ask(&login).await.unwrap();
        assert_eq!(login.last().context, "one");

        login.last().set_refused();
        write(&path, "two", "http://127.0.0.1:2", "new");
        let elsewhere = ask(&login).await.unwrap_err();
        assert!(elsewhere.what.contains("leads to"), "{elsewhere}");
    }
}
