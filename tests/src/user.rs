//! Real users of the cluster: client certificates signed by its CA, and the rights that a test gives them.

use std::process::Command;

use crate::cluster::Cluster;
use crate::process::tool;
use crate::workload::Namespace;

/// The group of every user made here. `ensure_manager` lets it reach the manager.
pub const GROUP: &str = "developers";

/// One user with a kubeconfig.
#[derive(Debug)]
pub struct User {
    /// The name, as the API server sees it.
    pub name: String,
    /// A kubeconfig for the laptop, whose context names the namespace the user was made for.
    pub kubeconfig: String,
}

impl User {
    /// A user without any right yet, whose kubeconfig is set to `namespace`. The user's name begins with `name` and
    /// belongs to this namespace alone: the manager remembers for a minute what a user may not do.
    pub fn without_rights(cluster: &Cluster, name: &str, namespace: &str) -> Self {
        let name = format!("{name}.{namespace}");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let certificates = cluster.directory().join("run/certs");
        let script = r#"
            cd "$1"
            openssl ecparam -name prime256v1 -genkey -noout -out key
            openssl req -new -key key -subj "/O=$4/CN=$3" -out request
            printf 'extendedKeyUsage=clientAuth\n' > extensions
            openssl x509 -req -in request -CA "$2/ca.crt" -CAkey "$2/ca.key" -set_serial "0x$(openssl rand -hex 8)" \
              -days 2 -sha256 -extfile extensions -out certificate
            base64 -w0 certificate; echo; base64 -w0 key; echo; base64 -w0 "$2/ca.crt"; echo
        "#;
        let mut openssl = Command::new("sh");
        openssl
            .args(["-euc", script, "sh"])
            .arg(folder.path())
            .arg(certificates)
            .arg(&name)
            .arg(GROUP);
        let output = tool(&mut openssl);
        let [certificate, key, ca] = output.lines().collect::<Vec<_>>()[..] else {
            panic!("openssl wrote {output}")
        };
        let kubeconfig = format!(
            r#"apiVersion: v1
kind: Config
clusters: [{{name: lab, cluster: {{server: "https://node-1:6443", certificate-authority-data: {ca}}}}}]
users: [{{name: {name}, user: {{client-certificate-data: {certificate}, client-key-data: {key}}}}}]
contexts: [{{name: lab, context: {{cluster: lab, user: {name}, namespace: {namespace}}}}}]
current-context: lab
"#
        );
        Self { name, kubeconfig }
    }

    /// A user who may use `tp` in `namespace`, and nothing else. The right to reach the manager comes from the group
    /// [`GROUP`].
    pub fn of_namespace(cluster: &Cluster, name: &str, namespace: &Namespace<'_>) -> Self {
        let user = Self::without_rights(cluster, name, &namespace.name);
        user.grant(cluster, &namespace.name, "tp-user");
        user
    }

    /// A user who may use `tp` in `namespace` and intercept there, and nothing else.
    pub fn who_intercepts(cluster: &Cluster, name: &str, namespace: &Namespace<'_>) -> Self {
        let user = Self::without_rights(cluster, name, &namespace.name);
        user.grant(cluster, &namespace.name, "tp-intercept");
        user
    }

    /// Binds a role of the product in `namespace`; a ClusterRole of that name is what `tp install` makes.
    pub fn grant(&self, cluster: &Cluster, namespace: &str, role: &str) {
        let (binding, user) = (self.binding(role), format!("--user={}", self.name));
        let role = format!("--clusterrole={role}");
        cluster.kubectl(&[
            "-n",
            namespace,
            "create",
            "rolebinding",
            &binding,
            &role,
            &user,
        ]);
    }

    /// Takes a right away again.
    pub fn revoke(&self, cluster: &Cluster, namespace: &str, role: &str) {
        cluster.kubectl(&[
            "-n",
            namespace,
            "delete",
            "rolebinding",
            &self.binding(role),
        ]);
    }

    fn binding(&self, role: &str) -> String {
        format!("{}-{role}", self.name)
    }
}
