//! A browser with nothing but the PAC file shows a page of the cluster, scripts included.

use std::time::Duration;

use tp_tests::{Cluster, Laptop, User};

#[test]
fn chromium_loads_a_page_by_name_with_the_pac_file_alone() {
    let Some(cluster) = Cluster::with_manager() else {
        return;
    };
    let namespace = cluster.namespace("browser");
    namespace.server("web", "nginx", &[80]);
    let laptop = Laptop::of(&cluster, &User::of_namespace(&cluster, "ada", &namespace));
    let tp = laptop.connect(&[]);
    let pac = format!("http://{}/proxy.pac", tp.proxy);
    assert!(
        laptop
            .run("curl", &["-sS", "--fail", &pac])
            .ok()
            .out()
            .contains("FindProxyForURL")
    );

    let browse = |url: &str, pac: &str| {
        let pac = format!("--proxy-pac-url={pac}");
        // The sandbox of the browser wants user namespaces, which is not what is tested here.
        let arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--user-data-dir=profile",
            "--virtual-time-budget=10000",
            "--dump-dom",
            &pac,
            url,
        ];
        laptop
            .run_with("chromium", &arguments, b"", Duration::from_secs(60))
            .out()
    };

    for host in [
        "web".to_owned(),
        format!("web.{}.svc.cluster.local", namespace.name),
    ] {
        let page = browse(&format!("http://{host}/page.html"), &pac);
        assert!(
            page.contains("script saw hello-from-nginx"),
            "{host}: {page}"
        );
    }
    // Without the proxy the same browser finds nothing.
    let page = browse(
        "http://web/page.html",
        "data:,function FindProxyForURL(){return 'DIRECT'}",
    );
    assert!(!page.contains("hello-from-nginx"), "{page}");
}
