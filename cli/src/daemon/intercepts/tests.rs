//! What is said of objects, and the objects themselves on an API server in the same process.

use std::convert::Infallible;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::broadcast;
use tp_manager_api::Matchers;
use tp_manager_api::intercept::{AttachMode, Workload, WorkloadKind};

use super::readiness::{HEARD_WITHIN, READY_WITHIN, Readiness};
use super::*;
use crate::daemon::inbound::LocalAddress;
use crate::kubeconfig::Selectors;

fn intercept(user: &str, matchers: Value, condition: Option<(&str, &str, &str)>) -> Intercept {
    let condition = condition.map(|(status, reason, message)| {
        json!({
            "type": "Ready", "status": status, "reason": reason, "message": message,
            "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1,
        })
    });
    serde_json::from_value(json!({
        "apiVersion": "tp.dev/v1alpha1",
        "kind": "Intercept",
        "metadata": { "name": "web-1", "generation": 1, "creationTimestamp": "2026-01-01T09:00:00Z" },
        "spec": {
            "name": "web", "user": user, "session": "tp-1", "port": 8080, "matchers": matchers,
            "workload": { "kind": "Deployment", "name": "web" },
            "client": { "host": "lovelace", "version": "1" },
        },
        "status": { "conditions": condition.into_iter().collect::<Vec<_>>() },
    }))
    .unwrap()
}

fn seen(condition: Option<(&str, &str, &str)>) -> Readiness {
    readiness::of(&Seen::There(Box::new(intercept(
        "ada",
        json!([]),
        condition,
    ))))
}

#[test]
fn what_the_manager_says_decides_whether_waiting_helps() {
    assert!(matches!(seen(None), Readiness::Unheard));
    assert!(matches!(
        seen(Some(("True", "Attached", ""))),
        Readiness::Ready
    ));
    assert!(matches!(
        seen(Some(("False", "Attaching", "1 of 2"))),
        Readiness::Waiting(_)
    ));
    assert!(matches!(
        seen(Some(("False", "FromTheFuture", ""))),
        Readiness::Waiting(_)
    ));
    let Readiness::Stuck(failure) = seen(Some((
        "False",
        "PodSecurity",
        "namespace shop enforces baseline\nask for privileged",
    ))) else {
        panic!("nothing to wait for");
    };
    assert_eq!(failure.what, "cannot intercept port 8080 of deployment/web");
    assert_eq!(failure.why, ["namespace shop enforces baseline"]);
    assert_eq!(failure.hint.as_deref(), Some("ask for privileged"));
    let gone = Seen::Gone(Box::new(intercept("ada", json!([]), None).spec));
    assert!(matches!(readiness::of(&gone), Readiness::Stuck(_)));
}

#[test]
fn a_status_of_an_older_spec_says_nothing() {
    let mut object = intercept("ada", json!([]), Some(("False", "PodSecurity", "no")));
    object.metadata.generation = Some(2);

    let readiness = readiness::of(&Seen::There(Box::new(object)));

    assert!(matches!(readiness, Readiness::Unheard));
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_told_what_was_last_known() {
    let waited = |condition| async move {
        let object = intercept("ada", json!([]), condition);
        let (_seen_tx, seen_rx) = watch::channel(Seen::There(Box::new(object)));
        let begun = tokio::time::Instant::now();
        let failure = readiness::wait(seen_rx).await.unwrap_err();
        (begun.elapsed(), failure)
    };

    let (took, failure) = waited(None).await;
    assert_eq!(took, HEARD_WITHIN);
    assert!(
        failure.what.contains("the manager says nothing"),
        "{failure}"
    );
    let (took, failure) = waited(Some(("False", "Attaching", "1 of 2 pods"))).await;
    assert_eq!(took, READY_WITHIN);
    assert_eq!(failure.why, ["1 of 2 pods"]);
}

#[test]
fn the_holder_is_named() {
    let header = json!([{ "header": { "name": "x-user", "exact": "ada" } }]);
    let own = intercept("ada", header.clone(), None).spec;

    let others = held_by(&intercept("bob", header, None), &own);
    let all = held_by(
        &intercept("ada", json!([]), None),
        &intercept("ada", json!([]), None).spec,
    );

    assert_eq!(
        others.why,
        [
            "bob intercepts the same requests (header x-user = ada) since 2026-01-01 09:00:00Z, as web on lovelace"
        ]
    );
    assert!(others.hint.unwrap().contains("ask bob"));
    assert!(
        all.why[0].starts_with("you already intercept everything"),
        "{all:?}"
    );
}

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>;

/// An API server that keeps objects by path, as far as intercepts and sessions need it.
struct ApiServer {
    objects: Mutex<BTreeMap<String, Value>>,
    /// Type and object of each change.
    changes: broadcast::Sender<(&'static str, Value)>,
    count: AtomicU64,
}

impl ApiServer {
    async fn start() -> (Arc<Self>, Login) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = format!("http://{}", listener.local_addr().unwrap());
        let api = Arc::new(Self {
            objects: Mutex::default(),
            changes: broadcast::channel(64).0,
            count: AtomicU64::default(),
        });
        let serving = Arc::clone(&api);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let api = Arc::clone(&serving);
                let answer = service_fn(move |request| Arc::clone(&api).answer(request));
                let connection = hyper::server::conn::http1::Builder::new();
                tokio::spawn(connection.serve_connection(TokioIo::new(stream), answer));
            }
        });
        let selectors = Selectors {
            server: Some(server),
            kubeconfig: Some("/dev/null".into()),
            ..Selectors::default()
        };
        (api, Login::new(&selectors).await.unwrap())
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, Infallible> {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let path = head.uri.path().to_owned();
        if head
            .uri
            .query()
            .is_some_and(|query| query.contains("watch=true"))
        {
            return Ok(self.watch());
        }
        let (code, answer) = match head.method {
            Method::POST if path.ends_with("selfsubjectreviews") => (201, review()),
            Method::POST => self.create(&path, body),
            Method::PATCH => self.patch(&path, &body),
            Method::DELETE => (200, self.delete(&path)),
            _ => self.get(&path),
        };
        let body = Full::new(answer.to_string().into()).boxed_unsync();
        Ok(Response::builder().status(code).body(body).unwrap())
    }

    fn create(&self, path: &str, mut object: Value) -> (u16, Value) {
        let name = object["metadata"]["name"].as_str().unwrap();
        let path = format!("{path}/{name}");
        let n = self.count.fetch_add(1, Relaxed);
        object["metadata"]["uid"] = json!(format!("uid-{n}"));
        object["metadata"]["resourceVersion"] = json!(n.to_string());
        object["metadata"]["generation"] = json!(1);
        let mut objects = self.objects.lock().unwrap();
        if objects.contains_key(&path) {
            return (409, status(409));
        }
        objects.insert(path, object.clone());
        let _ = self.changes.send(("ADDED", object.clone()));
        (201, object)
    }

    fn patch(&self, path: &str, patch: &Value) -> (u16, Value) {
        let mut objects = self.objects.lock().unwrap();
        let Some(object) = objects.get_mut(path) else {
            return (404, status(404));
        };
        for (key, value) in patch["spec"].as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        let _ = self.changes.send(("MODIFIED", object.clone()));
        (200, object.clone())
    }

    fn delete(&self, path: &str) -> Value {
        if let Some(object) = self.objects.lock().unwrap().remove(path) {
            let _ = self.changes.send(("DELETED", object));
        }
        json!({ "kind": "Status", "apiVersion": "v1", "status": "Success" })
    }

    /// One object, or the list of them.
    fn get(&self, path: &str) -> (u16, Value) {
        let objects = self.objects.lock().unwrap();
        if let Some(object) = objects.get(path) {
            return (200, object.clone());
        }
        if !path.ends_with("s") {
            return (404, status(404));
        }
        let items: Vec<_> = objects
            .iter()
            .filter(|(at, _)| at.starts_with(path))
            .map(|(_, object)| object)
            .collect();
        (
            200,
            json!({ "kind": "InterceptList", "apiVersion": "tp.dev/v1alpha1", "metadata": { "resourceVersion": "1" }, "items": items }),
        )
    }

    fn watch(&self) -> Response<Body> {
        let changes = self.changes.subscribe();
        let lines = stream::unfold(changes, |mut changes| async move {
            let (kind, object) = changes.recv().await.ok()?;
            let line = json!({ "type": kind, "object": object }).to_string() + "\n";
            Some((Ok(Frame::data(Bytes::from(line))), changes))
        });
        Response::new(StreamBody::new(lines.boxed()).boxed_unsync())
    }

    fn intercept(&self) -> Option<Value> {
        let objects = self.objects.lock().unwrap();
        let mut found = objects
            .iter()
            .filter(|(path, _)| path.contains("/intercepts/"));
        found.next().map(|(_, object)| object.clone())
    }

    fn delete_intercept(&self) {
        let name = self.intercept().unwrap()["metadata"]["name"].clone();
        let name = name.as_str().unwrap();
        self.delete(&format!(
            "/apis/tp.dev/v1alpha1/namespaces/shop/intercepts/{name}"
        ));
    }
}

fn review() -> Value {
    json!({ "metadata": { "creationTimestamp": jiff::Timestamp::now() }, "status": { "userInfo": { "username": "ada" } } })
}

fn status(code: u16) -> Value {
    json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "reason": "no", "code": code })
}

/// One intercept `web` of a workstation with a Session.
async fn one_intercept() -> (Arc<ApiServer>, Arc<SessionLease>, Intercepts) {
    let (api, login) = ApiServer::start().await;
    let lease = Arc::new(SessionLease::new(login.clone(), "shop".to_owned()));
    lease.ensure().await.unwrap();
    let intercepts = Intercepts::new(
        login,
        Arc::clone(&lease),
        "shop".to_owned(),
        watch::channel(None).1,
    );
    let port = WantedPort {
        port: 8080,
        protocol: Default::default(),
        service: None,
        local: LocalAddress {
            host: None,
            port: 3000,
        },
    };
    let wanted = Wanted {
        name: "web".to_owned(),
        workload: Workload {
            kind: WorkloadKind::Deployment,
            name: "web".to_owned(),
        },
        ports: vec![port],
        container: None,
        matchers: Matchers::default(),
        strict: false,
        tls_secret: None,
        close_idle: false,
        attach: AttachMode::Auto,
        to_pod: Vec::new(),
        held: false,
    };
    intercepts.make(&wanted).await.unwrap();
    (api, lease, intercepts)
}

/// Waits until the daemon has seen that its object is there, or gone.
async fn until_seen(intercepts: &Intercepts, there: bool) {
    let mut seen_rx = intercepts.lock()["web"][0].seen_rx.clone();
    let seen = seen_rx.wait_for(|seen| matches!(seen, Seen::There(_)) == there);
    tokio::time::timeout(Duration::from_secs(5), seen)
        .await
        .unwrap()
        .unwrap();
}

async fn next_session(lease: &SessionLease) -> String {
    lease.expire();
    lease.ensure().await.unwrap();
    lease.status().unwrap().name
}

#[tokio::test]
async fn an_intercept_follows_the_next_session() {
    let (api, lease, intercepts) = one_intercept().await;
    let before = api.intercept().unwrap();
    assert_eq!(before["spec"]["session"], lease.status().unwrap().name);

    let session = next_session(&lease).await;
    intercepts.follow_session().await;

    let after = api.intercept().unwrap();
    assert_eq!(after["spec"]["session"], session);
    assert_eq!(after["metadata"]["uid"], before["metadata"]["uid"]);
}

#[tokio::test]
async fn one_that_went_with_its_session_is_made_anew() {
    let (api, lease, intercepts) = one_intercept().await;
    api.delete_intercept();
    until_seen(&intercepts, false).await;

    let session = next_session(&lease).await;
    intercepts.follow_session().await;

    assert_eq!(api.intercept().unwrap()["spec"]["session"], session);
    until_seen(&intercepts, true).await;
    let id = intercepts.statuses()[0].id.clone();
    assert_eq!(api.intercept().unwrap()["metadata"]["uid"], id);
    assert_eq!(intercepts.way(&id).unwrap().to.port, 3000);
}

#[tokio::test]
async fn one_that_somebody_deleted_stays_deleted_and_is_said() {
    let (api, _lease, intercepts) = one_intercept().await;
    api.delete_intercept();
    until_seen(&intercepts, false).await;

    intercepts.follow_session().await;

    assert_eq!(api.intercept(), None);
    assert_eq!(intercepts.statuses()[0].reason.as_deref(), Some("Deleted"));
    assert!(intercepts.leave("web").await.unwrap());
}

#[tokio::test]
async fn what_is_left_leads_nowhere_and_is_gone() {
    let (api, _lease, intercepts) = one_intercept().await;
    let id = intercepts.statuses()[0].id.clone();
    assert!(intercepts.way(&id).is_some());
    assert_eq!(*intercepts.count().borrow(), 1);

    assert!(intercepts.leave("web").await.unwrap());

    assert!(intercepts.way(&id).is_none());
    assert_eq!(api.intercept(), None);
    assert_eq!(*intercepts.count().borrow(), 0);
    assert!(!intercepts.leave("web").await.unwrap());
}
