//! Every way that a kubeconfig says who you are and how to get there.

use std::process::Stdio;

use tp_tests::{Cluster, Connection, Laptop, Namespace, User};

fn assert_works(tp: &Connection<'_>) {
    assert_eq!(tp.get("http://web/"), "hello-from-probe\n");
}

/// The kubeconfig of `user` with another entry in place of the certificate.
fn with_user_entry(user: &User, entry: &str) -> String {
    let line = user
        .kubeconfig
        .lines()
        .find(|line| line.starts_with("users:"))
        .expect("a kubeconfig has users");
    let name = &user.name;
    user.kubeconfig
        .replace(line, &format!("users: [{{name: {name}, user: {entry}}}]"))
}

fn scene<'a>(cluster: &'a Cluster) -> Namespace<'a> {
    let namespace = cluster.namespace("kinds");
    namespace.probe("web");
    namespace
}

#[test]
fn a_credential_plugin_is_asked_and_its_failure_is_named() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = scene(&cluster);
    let user = User::of_namespace(&cluster, "ada", &namespace);
    let field = |name: &str| {
        let start = user.kubeconfig.split(&format!("{name}: ")).nth(1).unwrap();
        let encoded = start.split([',', '}']).next().unwrap();
        let laptop = Laptop::with_kubeconfig(&cluster, "");
        laptop
            .run_with(
                "base64",
                &["-d"],
                encoded.as_bytes(),
                tp_tests::process::LIMIT,
            )
            .ok()
            .out()
    };
    let credential = serde_json::json!({
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {
            "clientCertificateData": field("client-certificate-data"),
            "clientKeyData": field("client-key-data"),
        },
    });
    let exec = "{exec: {apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never, command: sh, args: [plugin]}}";
    let laptop = Laptop::with_kubeconfig(&cluster, &with_user_entry(&user, exec));
    laptop.write_file("home/credential.json", &credential.to_string());
    laptop.write_file("home/plugin", "exec cat credential.json");
    laptop.kubectl(&["auth", "whoami"]).ok();

    assert_works(&laptop.connect(&[]));

    laptop.tp(&["quit"]).ok();
    laptop.write_file("home/plugin", "echo the card reader is empty >&2; exit 3");
    let failed = laptop.tp(&["connect", "--listen", "127.0.0.1:0"]).exits(1);
    assert!(
        failed.err().contains("the card reader is empty"),
        "{}",
        failed.report()
    );
}

#[test]
fn a_token_and_impersonation_are_users_like_others() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = scene(&cluster);
    let ns = namespace.name.as_str();
    let account = format!("{ns}:default");
    for role in [
        ["tp-user", "--clusterrole=tp-user", ns],
        ["connect", "--role=tp-connect", "tp-system"],
    ] {
        let binding = format!("{ns}-{}", role[0]);
        let subject = format!("--serviceaccount={account}");
        cluster.kubectl(&[
            "-n",
            role[2],
            "create",
            "rolebinding",
            &binding,
            role[1],
            &subject,
        ]);
    }
    let token = cluster.kubectl(&["-n", ns, "create", "token", "default"]);
    let user = User::without_rights(&cluster, "nobody", ns);

    let laptop = Laptop::with_kubeconfig(
        &cluster,
        &with_user_entry(&user, &format!("{{token: {}}}", token.trim())),
    );
    assert_works(&laptop.connect(&[]));

    let admin = Laptop::admin(&cluster);
    let ada = User::of_namespace(&cluster, "ada", &namespace);
    let as_ada = ["-n", ns, "--as", &ada.name, "--as-group", "developers"];
    let tp = admin.connect(&as_ada);
    assert_works(&tp);
    let session = cluster.kubectl(&[
        "-n",
        ns,
        "get",
        "sessions.tp.dev",
        "-o",
        "jsonpath={.items[*].spec.user}",
    ]);
    assert!(session.contains("ada"), "{session}");
    admin.tp(&["quit"]).ok();
    let refused = admin
        .tp(&[
            "connect",
            "--listen",
            "127.0.0.1:0",
            "-n",
            ns,
            "--as",
            "eve",
        ])
        .exits(1);
    assert!(
        refused.err().contains("eve") || refused.err().contains("sessions"),
        "{}",
        refused.report()
    );
    cluster.kubectl(&[
        "-n",
        "tp-system",
        "delete",
        "rolebinding",
        &format!("{ns}-connect"),
    ]);
}

#[test]
fn an_http_proxy_of_the_kubeconfig_is_used() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = scene(&cluster);
    let user = User::of_namespace(&cluster, "ada", &namespace);
    let laptop = Laptop::of(&cluster, &user);
    // A CONNECT proxy that counts what it was asked.
    let proxy = r#"
import socket, threading
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
def pump(a, b):
    try:
        while data := a.recv(65536): b.sendall(data)
        b.shutdown(socket.SHUT_WR)
    except OSError: pass
def serve(client):
    head = b""
    while b"\r\n\r\n" not in head: head += client.recv(4096)
    host, port = head.split(b" ")[1].decode().rsplit(":", 1)
    print("CONNECT", host, port, flush=True)
    there = socket.create_connection((host, int(port)))
    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    threading.Thread(target=pump, args=(client, there), daemon=True).start()
    pump(there, client)
while True: threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"#;
    let mut command = laptop.command("python3", &["-c", proxy]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut said = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut port = String::new();
    std::io::BufRead::read_line(&mut said, &mut port).unwrap();
    let server = r#"server: "https://node-1:6443""#;
    let with_proxy = format!(r#"{server}, proxy-url: "http://127.0.0.1:{}""#, port.trim());
    laptop.write_file(
        "home/.kube/config",
        &user.kubeconfig.replace(server, &with_proxy),
    );

    let tp = laptop.connect(&[]);

    assert_works(&tp);
    let mut asked = String::new();
    std::io::BufRead::read_line(&mut said, &mut asked).unwrap();
    assert_eq!(asked, "CONNECT node-1 6443\n");
    let _ = child.kill();
    let _ = child.wait();
}
