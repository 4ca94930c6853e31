use super::graphql::Operation;
use super::*;
use proptest::prelude::*;

fn parsed(json: serde_json::Value) -> Result<Matchers, String> {
    serde_json::from_value(json).map_err(|error| error.to_string())
}

fn matchers(json: serde_json::Value) -> Matchers {
    parsed(json).unwrap()
}

const FIELDS: [(&str, &str); 8] = [
    ("Host", "web.shop"),
    ("X-Tp-User", "ada"),
    ("x-tp-user", "bob"),
    ("Cookie", "theme=dark; session=s3"),
    ("Cookie", "late=1"),
    ("baggage", "tp=ada%20l;p=1,other=2"),
    ("tracestate", "v=1,tp=ada"),
    ("Content-Type", "application/json"),
];

fn head<'a>(method: &'a str, target: &'a str) -> RequestHead<'a> {
    let fields = FIELDS.map(|(name, value)| (name.as_bytes(), value.as_bytes()));
    RequestHead::new(method, target.as_bytes(), fields)
}

/// Name in the JSON, then what matches and what does not.
#[test]
fn each_kind_of_matcher_finds_what_it_names() {
    use serde_json::json;
    let mine = [
        json!({"header": {"name": "X-TP-User", "exact": "ada"}}),
        json!({"header": {"name": "x-tp-user", "exact": "bob"}}),
        json!({"header": {"name": "x-tp-user", "prefix": "a"}}),
        json!({"header": {"name": "x-tp-user", "regex": "[ab].."}}),
        json!({"path": {"exact": "/cart/7"}}),
        json!({"path": {"prefix": "/cart/"}}),
        json!({"path": {"regex": "/cart/\\d+"}}),
        json!({"method": "POST"}),
        json!({"query": {"name": "who", "exact": "ada l"}}),
        json!({"cookie": {"name": "session", "exact": "s3"}}),
        json!({"cookie": {"name": "late", "prefix": ""}}),
        json!({"baggage": {"name": "tp", "exact": "ada l"}}),
        json!({"tracestate": {"name": "tp", "exact": "ada"}}),
    ];
    let not_mine = [
        json!({"header": {"name": "x-tp-user", "exact": "Ada"}}),
        json!({"header": {"name": "x-tp-user", "regex": "a"}}),
        json!({"header": {"name": "x-other", "prefix": ""}}),
        json!({"path": {"exact": "/cart/7?who=ada"}}),
        json!({"path": {"prefix": "/Cart"}}),
        json!({"method": "post"}),
        json!({"query": {"name": "WHO", "exact": "ada l"}}),
        json!({"cookie": {"name": "session", "exact": "s"}}),
        json!({"baggage": {"name": "other", "exact": "1"}}),
        json!({"tracestate": {"name": "ada", "prefix": ""}}),
        json!({"grpc": {"service": "cart"}}),
    ];
    let head = head("POST", "/cart/7?x=1&who=ada+l");
    for one in &mine {
        assert_eq!(
            matchers(json!([one])).matches(&head, None),
            Verdict::Mine,
            "{one}"
        );
    }
    for one in &not_mine {
        let all = matchers(json!([mine[0], one]));
        assert_eq!(all.matches(&head, None), Verdict::NotMine, "{one}");
    }
    assert_eq!(matchers(json!(mine)).matches(&head, None), Verdict::Mine);
    assert_eq!(Matchers::default().matches(&head, None), Verdict::Mine);
}

#[test]
fn a_grpc_call_is_its_path_with_the_content_type() {
    use serde_json::json;
    let fields = [(&b"content-type"[..], &b"application/grpc+proto"[..])];
    let head = RequestHead::new("POST", b"/shop.v1.Cart/Add", fields);
    for (grpc, verdict) in [
        (json!({"service": "shop.v1.Cart"}), Verdict::Mine),
        (json!({"method": "Add"}), Verdict::Mine),
        (
            json!({"service": "shop.v1.Cart", "method": "Add"}),
            Verdict::Mine,
        ),
        (
            json!({"service": "shop.v1.Cart", "method": "Get"}),
            Verdict::NotMine,
        ),
        (json!({"service": "Cart"}), Verdict::NotMine),
    ] {
        let matchers = matchers(json!([{ "grpc": grpc }]));
        assert_eq!(matchers.matches(&head, None), verdict, "{grpc}");
    }
    assert!(parsed(json!([{"grpc": {}}])).is_err());
}

#[test]
fn only_a_request_whose_head_matches_asks_for_its_body() {
    use serde_json::json;
    let cart = |user: &str| {
        matchers(json!([
            {"graphql": {"operation": "GetCart"}},
            {"header": {"name": "x-tp-user", "exact": user}}
        ]))
    };
    let found = Operation::of_body(br#"{"query":"query GetCart { a }"}"#);
    let post = head("POST", "/graphql");

    assert_eq!(cart("ada").matches(&post, None), Verdict::NeedsBody);
    assert_eq!(cart("eve").matches(&post, None), Verdict::NotMine);
    assert_eq!(cart("ada").matches(&post, Some(&found)), Verdict::Mine);
    let none = Operation::default();
    assert_eq!(cart("ada").matches(&post, Some(&none)), Verdict::NotMine);
    let get = head("GET", "/graphql?query=query%20GetCart%7Ba%7D");
    assert_eq!(cart("ada").matches(&get, None), Verdict::Mine);
    assert_eq!(
        cart("ada").matches(&head("PUT", "/"), None),
        Verdict::NotMine
    );
}

#[test]
fn every_matcher_says_why() {
    use serde_json::json;
    let all = matchers(json!([
        {"method": "GET"},
        {"header": {"name": "x-none", "exact": "1"}},
        {"path": {"prefix": "/"}},
        {"graphql": {"operation": "A"}}
    ]));

    let findings = all.explain(&head("POST", "/"), None);

    let said: Vec<_> = findings
        .iter()
        .map(|finding| (finding.matcher.to_string(), finding.outcome))
        .collect();
    assert_eq!(
        said,
        [
            ("header x-none = 1".into(), Outcome::Absent),
            ("path begins with /".into(), Outcome::Matches),
            ("method = GET".into(), Outcome::Differs),
            ("graphql operation = A".into(), Outcome::NeedsBody),
        ]
    );
}

#[test]
fn what_must_not_choose_is_refused_by_name() {
    use serde_json::json;
    for (bad, says) in [
        (
            json!({"header": {"name": "Authorization", "exact": "x"}}),
            "authorization",
        ),
        (
            json!({"header": {"name": "cookie", "exact": "x"}}),
            "cookie",
        ),
        (json!({"header": {"name": "Host", "exact": "x"}}), "host"),
        (json!({"header": {"name": "x_y", "exact": "x"}}), "x_y"),
        (json!({"header": {"name": "a b", "exact": "x"}}), "a b"),
        (json!({"header": {"name": "", "exact": "x"}}), "header"),
        (json!({"header": {"name": "x-a"}}), "exactly one of"),
        (
            json!({"header": {"name": "x-a", "exakt": "1"}}),
            "exactly one of",
        ),
        (json!({"path": {"regex": "("}}), "unclosed group"),
        (json!({"method": "G T"}), "method"),
        (json!({"verb": "GET"}), "unknown variant"),
        (json!({"path": {"exact": "x".repeat(1025)}}), "1025"),
    ] {
        let error = parsed(json!([bad])).unwrap_err();
        assert!(error.contains(says), "{bad}: {error}");
    }
    let many: Vec<_> = (0..17)
        .map(|n| json!({"method": format!("M{n}")}))
        .collect();
    assert!(parsed(json!(many)).unwrap_err().contains("more than 16"));
}

#[test]
fn equal_intercepts_have_one_name_and_others_another() {
    use serde_json::json;
    let a = matchers(json!([{"method": "GET"}, {"header": {"name": "X-A", "exact": "1"}}]));
    let b = matchers(json!([
        {"header": {"name": "x-a", "exact": "1"}}, {"method": "GET"}, {"method": "GET"}
    ]));
    assert_eq!(a, b);
    assert_eq!(a.canonical(), b.canonical());
    let name = intercept_name;
    let first = name("deployment", "web", 80, &a);
    assert_eq!(first, name("deployment", "web", 80, &b));
    // The name is stored in clusters: it must not change between releases.
    assert_eq!(first, "web-c8f7dd61e9e645ada175617797d72835");
    let others = [
        name("statefulset", "web", 80, &a),
        name("deployment", "web8", 0, &a),
        name("deployment", "web", 8080, &a),
        name("deployment", "web", 80, &Matchers::default()),
    ];
    assert!(others.iter().all(|other| *other != first));
    let long = name("deployment", &format!("A.{}", "x".repeat(200)), 80, &a);
    assert!(long.len() <= 63 && long.starts_with("a-xxx"), "{long}");
}

#[cfg(feature = "kube")]
#[test]
fn the_vocabulary_stands_in_a_custom_resource() {
    use kube::CustomResourceExt;
    #[derive(kube::CustomResource, Clone, Debug, Deserialize, Serialize, schemars::JsonSchema)]
    #[kube(group = "tp.dev", version = "v1", kind = "Probe", namespaced)]
    struct ProbeSpec {
        matchers: Vec<Matcher>,
    }
    let crd = serde_json::to_value(Probe::crd()).unwrap();
    let items = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        ["matchers"]["items"];
    assert_eq!(items["type"], "object", "{items:#}");
    let header = &items["properties"]["header"];
    assert_eq!(
        header["properties"]["exact"]["maxLength"], 1024,
        "{items:#}"
    );
    assert_eq!(header["required"], serde_json::json!(["name"]));
    assert_eq!(items["oneOf"].as_array().unwrap().len(), 9);
}

fn any_text() -> impl Strategy<Value = Text> {
    let literal = "[a-c/ .*]{0,6}";
    prop_oneof![
        literal.prop_map(|exact| Text {
            exact: Some(exact),
            ..Text::default()
        }),
        literal.prop_map(|prefix| Text {
            prefix: Some(prefix),
            ..Text::default()
        }),
        "[a-c/]{0,3}(\\.\\*)?".prop_map(|regex| Text {
            regex: Some(regex),
            ..Text::default()
        }),
    ]
}

fn any_named() -> impl Strategy<Value = NamedText> {
    ("[a-cA-C]{1,2}", any_text()).prop_map(|(name, value)| NamedText { name, value })
}

fn any_matcher() -> impl Strategy<Value = Matcher> {
    prop_oneof![
        any_named().prop_map(Matcher::Header),
        any_text().prop_map(Matcher::Path),
        "[A-C]{1,2}".prop_map(Matcher::Method),
        any_named().prop_map(Matcher::Query),
        any_named().prop_map(Matcher::Cookie),
        any_named().prop_map(Matcher::Baggage),
        any_named().prop_map(Matcher::Tracestate),
        "[a-c]{1,2}".prop_map(|operation| Matcher::Graphql(Graphql { operation })),
    ]
}

proptest! {
    #[test]
    fn the_order_of_writing_changes_nothing(
        list in proptest::collection::vec(any_matcher(), 0..6),
        method in "[A-C]{1,2}",
        target in "/[a-c/]{0,4}(\\?[a-c=&]{0,8})?",
        fields in proptest::collection::vec(("[a-cA-C]{1,2}|cookie|baggage|tracestate", "[a-c=;,/ ]{0,8}"), 0..5),
    ) {
        let mut reversed = list.clone();
        reversed.reverse();
        let (one, other) = (Matchers::try_new(list).unwrap(), Matchers::try_new(reversed).unwrap());
        let head = RequestHead::new(
            &method,
            target.as_bytes(),
            fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())),
        );
        let nothing = Operation::default();
        let verdict = one.matches(&head, Some(&nothing));
        prop_assert_eq!(verdict, other.matches(&head, Some(&nothing)));
        prop_assert_eq!(one.canonical(), other.canonical());
        // Every finding matches, exactly when the request is mine.
        let findings = one.explain(&head, Some(&nothing));
        let all = findings.iter().all(|finding| finding.outcome == Outcome::Matches);
        prop_assert_eq!(all, verdict == Verdict::Mine);
        // What was read back from JSON is the same.
        let again: Matchers = serde_json::from_str(&one.canonical()).unwrap();
        prop_assert_eq!(again, one);
    }
}
