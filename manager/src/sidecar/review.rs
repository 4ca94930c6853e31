//! One review (`admission.k8s.io/v1`): what the API server asks, and what it is told. Pure.
//!
//! The answer is always that the pod may be made. Why the agent was left out is a warning, which `kubectl` prints.

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

use super::container::Blueprint;
use super::mutate::{Left, patch};

#[derive(Debug, Deserialize)]
struct Question {
    request: Asked,
}

#[derive(Debug, Deserialize)]
struct Asked {
    uid: String,
    operation: String,
    #[serde(default)]
    object: Option<Pod>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Review {
    api_version: &'static str,
    kind: &'static str,
    response: Answer,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    uid: String,
    allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch: Option<ByteString>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// The answer to the review in `body`.
///
/// # Errors
/// It is no review of a pod.
pub(super) fn answer(
    body: &[u8],
    blueprint: &Blueprint<'_>,
    seed: &str,
) -> serde_json::Result<Vec<u8>> {
    let Question { request } = serde_json::from_slice(body)?;
    let created = request.object.filter(|_| request.operation == "CREATE");
    let decided = match &created {
        Some(pod) => patch(pod, blueprint, seed),
        None => Err(Left::AsItIs),
    };
    let (patch, warnings) = match decided {
        Ok(patch) => (Some(ByteString(serde_json::to_vec(&patch)?)), Vec::new()),
        Err(Left::AsItIs) => (None, Vec::new()),
        Err(left) => (None, vec![format!("tp adds no agent to the pod: {left}")]),
    };
    let response = Answer {
        uid: request.uid,
        allowed: true,
        patch_type: patch.as_ref().map(|_| "JSONPatch"),
        patch,
        warnings,
    };
    serde_json::to_vec(&Review {
        api_version: "admission.k8s.io/v1",
        kind: "AdmissionReview",
        response,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use tp_tunnel::Identity;

    fn ask(question: &Value) -> serde_json::Result<Value> {
        let blueprint = Blueprint {
            image: "tp:1",
            manager_key: Identity::generate().key_hash(),
            native: true,
        };
        let body = question.to_string();
        let answer = answer(body.as_bytes(), &blueprint, &"00".repeat(32))?;
        serde_json::from_slice(&answer)
    }

    fn question(operation: &str, port: &str) -> Value {
        let pod = json!({
            "metadata": { "labels": { "tp.dev/sidecar": "http" } },
            "spec": { "containers": [{ "name": "app", "ports": [{ "name": port, "containerPort": 80 }] }] },
        });
        json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": { "uid": "u-1", "operation": operation, "namespace": "shop", "object": pod, "oldObject": null },
        })
    }

    #[test]
    fn a_pod_that_asks_gets_a_patch() {
        let answer = ask(&question("CREATE", "http")).unwrap();

        let response = &answer["response"];
        assert_eq!(
            (&response["uid"], &response["allowed"]),
            (&json!("u-1"), &json!(true))
        );
        assert_eq!(response["patchType"], "JSONPatch");
        let patch: ByteString = serde_json::from_value(response["patch"].clone()).unwrap();
        let patch: Value = serde_json::from_slice(&patch.0).unwrap();
        assert_eq!(patch[0]["op"], "remove");
    }

    #[test]
    fn every_pod_may_be_made() {
        let answer = ask(&question("CREATE", "other")).unwrap();
        assert_eq!(answer["response"]["allowed"], true);
        assert!(answer["response"]["patch"].is_null());
        let warning = answer["response"]["warnings"][0].as_str().unwrap();
        assert!(warning.contains("\"http\""), "{warning}");

        let update = ask(&question("UPDATE", "http")).unwrap();
        let expected = json!({ "uid": "u-1", "allowed": true });
        assert_eq!(update["response"], expected);
    }

    #[test]
    fn what_is_no_review_of_a_pod_is_refused() {
        let mut service = question("CREATE", "http");
        service["request"]["object"]["spec"] = json!({ "containers": "x" });
        for bad in [
            service,
            json!({}),
            json!([]),
            json!({ "request": { "uid": 1 } }),
        ] {
            assert!(ask(&bad).is_err(), "{bad}");
        }
    }
}
