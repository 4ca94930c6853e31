//! The PAC file in a browser's engine decides as the split does.

use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use tokio::process::Command;
use tp_manager_api::ClusterView;

use super::super::{Route, Split, UserRules, pac};

/// `isInNet` as browsers have it, for literal addresses.
const IS_IN_NET: &str = r#"
function number(text) { return text.split(".").reduce(function (sum, part) { return sum * 256 + Number(part); }, 0); }
function isInNet(host, net, mask) { return ((number(host) & number(mask)) >>> 0) === number(net) }
"#;

const HOSTS: &[&str] = &[
    "web",
    "api",
    "toString",
    "web.shop",
    "WEB.shop",
    "api.dev",
    "web.dev",
    "example.dev",
    "www.example.dev",
    "x.api.dev",
    "x.y.api.dev",
    "db-0.db",
    "db-x.db",
    "foo.io",
    "anything.svc",
    "svc",
    "a.b.svc",
    "web.shop.svc.cluster.local",
    "cluster.local",
    "xcluster.local",
    "git.corp.internal",
    "corp.internal",
    "10.96.0.1",
    "10.97.0.1",
    "10.96.7.1",
    "10.244.9.9",
    "203.0.113.5",
    "8.8.8.8",
    "127.0.0.1",
    "localhost",
    "app.localhost",
    "one.example",
    "x.one.example",
    "x.two.example",
    "two.example",
    "never.shop.svc",
    "constructor.x",
];

#[tokio::test]
async fn the_script_decides_as_the_split() {
    let Some(chromium) = ["/usr/bin/chromium", "/usr/bin/chromium-browser"]
        .iter()
        .find(|path| Path::new(path).exists())
    else {
        eprintln!("SKIPPED the_script_decides_as_the_split: no chromium");
        return;
    };
    let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let view = ClusterView {
        namespace: "shop".into(),
        domain: "cluster.local".into(),
        service_ranges: vec!["10.96.0.0/16".parse().unwrap()],
        pod_ranges: vec!["10.244.0.0/16".parse().unwrap()],
        services: [
            (
                "shop".to_owned(),
                vec!["web".to_owned(), "db".to_owned(), "io".to_owned()],
            ),
            ("dev".to_owned(), vec!["api".to_owned()]),
        ]
        .into(),
        suffixes: vec!["corp.internal".into()],
        ..ClusterView::default()
    };
    for all in [false, true] {
        let rules = UserRules {
            all,
            also_proxy: parse(&["203.0.113.0/24", "one.example", "*.two.example"]),
            never_proxy: parse(&["10.96.7.0/24", "never.shop.svc"]),
        };
        let split = Split::new(view.clone(), rules);
        let script = pac::script(&split, "127.0.0.1:1080".parse().unwrap());

        let answers = evaluate(chromium, &script).await;

        for host in HOSTS {
            let expected = match split.route(&host.parse().unwrap()) {
                Route::Cluster => "SOCKS5 127.0.0.1:1080; PROXY 127.0.0.1:1080",
                // A browser reaches its own machine by itself.
                Route::Direct | Route::Refused(_) => "DIRECT",
            };
            assert_eq!(answers[host], expected, "{host}, all {all}");
        }
    }
}

/// The script's answer for each host.
async fn evaluate(chromium: &str, script: &str) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    let hosts = json!(HOSTS);
    let collect = format!(
        "var answers = {{}}; {hosts}.forEach(function (host) {{ answers[host] = FindProxyForURL('http://' + host + '/', host); }});"
    );
    let html = format!(
        "<body><script>{IS_IN_NET}{script}{collect}document.title = JSON.stringify(answers);</script>"
    );
    std::fs::write(&page, html).unwrap();
    let output = Command::new(chromium)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"])
        .arg(format!(
            "--user-data-dir={}",
            folder.path().join("profile").display()
        ))
        .arg(format!("file://{}", page.display()))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let title = text
        .split_once("<title>")
        .and_then(|(_, rest)| rest.split_once("</title>"));
    let (title, _) =
        title.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)));
    serde_json::from_str(title).unwrap()
}
