//! The PAC file: in a browser's engine it decides as the split does, and only this machine gets it.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::process::Command;
use tp_manager_api::ClusterView;

use super::super::http::{self, head};
use super::super::{Route, Split, UserRules, pac};
use super::rig::Rig;

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

#[tokio::test]
async fn origin_form_gets_400_and_nothing_to_read() {
    let rig = Rig::start().await;
    let port = rig.proxy.port();
    for request in [
        format!("GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"),
        "GET /proxy.pac HTTP/1.1\r\nHost: rebound.example\r\n\r\n".to_owned(),
        format!("GET /proxy.pac HTTP/1.1\r\nHost: rebound.example:{port}\r\n\r\n"),
        "GET /proxy.pac HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned(),
        format!(
            "GET /proxy.pac HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nSec-Fetch-Site: cross-site\r\n\r\n"
        ),
        format!(
            "GET /proxy.pac HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nSec-Fetch-Site: same-origin\r\n\r\n"
        ),
        format!("POST /proxy.pac HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"),
        format!("GET /proxy.pac?x HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"),
        format!(
            "OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: http://evil.example\r\n\r\n"
        ),
    ] {
        let answer = String::from_utf8(rig.say(request.as_bytes()).await).unwrap();
        let expected = "HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        assert_eq!(answer, expected, "{request}");
    }
}

#[test]
fn the_pac_file_is_not_for_other_machines_whatever_they_call_themselves() {
    let proxy = "0.0.0.0:1080".parse().unwrap();
    let text = b"GET /proxy.pac HTTP/1.1\r\nHost: 127.0.0.1:1080\r\n\r\n";
    let (head, _) = head::Head::parse(text).unwrap().unwrap();
    let may =
        |client: &str| http::may_have_pac(&head, "/proxy.pac", client.parse().unwrap(), proxy);

    assert!(may("127.0.0.1:40000") && may("[::1]:40000") && may("[::ffff:127.0.0.1]:40000"));
    assert!(!may("192.168.1.7:40000") && !may("[2001:db8::7]:40000"));
}

#[tokio::test]
async fn the_pac_file_is_served_to_loopback_and_follows_the_split() {
    let rig = Rig::start().await;
    let proxy = rig.proxy;
    let request =
        format!("GET /proxy.pac HTTP/1.1\r\nHost: {proxy}\r\nSec-Fetch-Site: none\r\n\r\n");

    let before = String::from_utf8(rig.say(request.as_bytes()).await).unwrap();
    rig.split_tx.send_replace(Arc::new(Split::new(
        ClusterView::default(),
        UserRules {
            all: true,
            ..UserRules::default()
        },
    )));
    let after = String::from_utf8(rig.say(request.as_bytes()).await).unwrap();

    assert!(
        before.contains("\r\ncontent-type: application/x-ns-proxy-autoconfig\r\n"),
        "{before}"
    );
    assert!(
        before.contains(&format!("SOCKS5 {proxy}; PROXY {proxy}")),
        "{before}"
    );
    assert!(
        before.contains(r#""everything":false"#) && after.contains(r#""everything":true"#),
        "{after}"
    );
}
