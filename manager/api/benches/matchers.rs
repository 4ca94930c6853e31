//! One request against 100 intercepts of five matchers each, of which none is its: the most an agent has to do.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use serde_json::json;
use tp_manager_api::matcher::{Matchers, RequestHead, Verdict};

/// All of an intercept's matchers but the costliest match, so every one of the 500 runs.
fn intercepts(last: impl Fn(usize) -> serde_json::Value) -> Vec<Matchers> {
    (0..100)
        .map(|n| {
            let list = json!([
                {"method": "GET"},
                {"path": {"prefix": "/api/"}},
                {"header": {"name": "x-tenant", "exact": "acme"}},
                {"header": {"name": "x-region", "prefix": "eu-"}},
                last(n),
            ]);
            serde_json::from_value(list).expect("valid matchers")
        })
        .collect()
}

fn fields() -> Vec<(&'static [u8], &'static [u8])> {
    let mut fields: Vec<(&[u8], &[u8])> = vec![
        (b"Host", b"web.shop.svc.cluster.local"),
        (
            b"User-Agent",
            b"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
        ),
        (
            b"Accept",
            b"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
        ),
        (b"Accept-Language", b"en-US,en;q=0.5"),
        (b"Accept-Encoding", b"gzip, deflate, br, zstd"),
        (b"Connection", b"keep-alive"),
        (b"X-Request-Id", b"6f1c1c4e-3c0b-4e0c-9f5c-0a8f4f0a9a51"),
        (b"X-Tenant", b"acme"),
        (b"X-Region", b"eu-west-1"),
        (
            b"traceparent",
            b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ),
        (b"X-Tp-User", b"somebody-else"),
    ];
    fields.push((
        b"Cookie",
        b"theme=dark; session=1f0e3dad99908345f7439f8ffabdffc4",
    ));
    fields
}

fn bench(c: &mut Criterion) {
    let kinds = [
        (
            "header",
            intercepts(|n| json!({"header": {"name": "x-tp-user", "exact": format!("user-{n}")}})),
        ),
        (
            "regex",
            intercepts(
                |n| json!({"header": {"name": "x-tp-user", "regex": format!("user-{n}-.*")}}),
            ),
        ),
        (
            "cookie",
            intercepts(|n| json!({"cookie": {"name": "session", "exact": format!("{n}")}})),
        ),
    ];
    let fields = fields();
    for (name, intercepts) in kinds {
        c.bench_function(&format!("100 intercepts x 5 matchers, {name} last"), |b| {
            b.iter(|| {
                let head = RequestHead::new(
                    "GET",
                    b"/api/v1/cart?id=7",
                    black_box(&fields).iter().copied(),
                );
                let mine = intercepts
                    .iter()
                    .filter(|matchers| matchers.matches(&head, None) == Verdict::Mine);
                assert_eq!(mine.count(), 0);
            });
        });
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
