//! Who may write a `Session`, decided by the API server itself.
//!
//! RBAC says in which namespaces a user may create Sessions; it cannot say *whose* name stands in them. This policy
//! does: a Session names its writer and nobody else, keeps its key for life, and never lies more than an hour ahead.
//!
//! CEL has no clock. The API server's own time is read from what it alone writes before validation: on a creation
//! `metadata.creationTimestamp`, on a renewal the time in `metadata.managedFields` of the one entry that owns
//! `spec.expiresAt`. A change of the field always moves its ownership to the current write, stamped with now; an
//! entry that a client made up for itself does not survive that.

use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::json;

use crate::Session;

/// Name of the policy and of its binding.
pub const SESSION_POLICY: &str = "sessions.tp.dev";

/// The custom resource's definition.
pub fn crd() -> CustomResourceDefinition {
    Session::crd()
}

/// The policy for Sessions. It refuses when it cannot be evaluated.
pub fn session_policy() -> ValidatingAdmissionPolicy {
    serde_json::from_value(json!({
        "metadata": { "name": SESSION_POLICY },
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": { "resourceRules": [{
                "apiGroups": [crate::GROUP],
                "apiVersions": ["*"],
                "operations": ["CREATE", "UPDATE", "DELETE"],
                "resources": [crate::SESSIONS],
            }]},
            "variables": [
                { "name": "groups", "expression": GROUPS },
                { "name": "writes", "expression": WRITES },
                { "name": "prolongs", "expression": PROLONGS },
                { "name": "owners", "expression": OWNERS },
            ],
            "validations": [
                rule("Forbidden", IS_WRITER, "spec.user and spec.groups must be those of the writer (kubectl auth whoami)"),
                rule("Forbidden", KEEPS_USER, "spec.user is the owner and cannot change"),
                rule("Invalid", KEEPS_KEY, "spec.keyHash cannot change"),
                rule("Invalid", STARTS_BOUNDED, "spec.expiresAt must be at most one hour ahead"),
                rule("Invalid", RENEWS_BOUNDED, "spec.expiresAt must be at most one hour ahead"),
                rule("Forbidden", MAY_DELETE, "only its user may delete a Session, or who may `delete` `sessions/others`"),
            ],
        },
    }))
    .expect("the policy is a constant of the right shape")
}

/// Puts [`session_policy`] into force, everywhere.
pub fn session_policy_binding() -> ValidatingAdmissionPolicyBinding {
    serde_json::from_value(json!({
        "metadata": { "name": SESSION_POLICY },
        "spec": { "policyName": SESSION_POLICY, "validationActions": ["Deny"] },
    }))
    .expect("the binding is a constant of the right shape")
}

fn rule(reason: &str, expression: &str, message: &str) -> serde_json::Value {
    json!({ "reason": reason, "expression": expression, "message": message })
}

const GROUPS: &str = "has(request.userInfo.groups) ? request.userInfo.groups : []";

/// A creation, or an update of the spec. Metadata alone (a garbage collector's finalizer) is nobody's identity.
const WRITES: &str = "request.operation == 'CREATE' || (request.operation == 'UPDATE' && object.spec != oldObject.spec)";

const PROLONGS: &str =
    "request.operation == 'UPDATE' && object.spec.expiresAt != oldObject.spec.expiresAt";

/// The field managers that own `spec.expiresAt`. Exactly one after a change: see the module's documentation.
const OWNERS: &str = "has(object.metadata.managedFields) ? object.metadata.managedFields.filter(m, \
     has(m.time) && has(m.fieldsV1) && 'f:spec' in m.fieldsV1 && 'f:expiresAt' in m.fieldsV1['f:spec']) : []";

const IS_WRITER: &str = "!variables.writes || (object.spec.user == request.userInfo.username && \
     sets.equivalent(has(object.spec.groups) ? object.spec.groups : [], variables.groups))";

const KEEPS_USER: &str = "request.operation != 'UPDATE' || object.spec.user == oldObject.spec.user";

const KEEPS_KEY: &str =
    "request.operation != 'UPDATE' || object.spec.keyHash == oldObject.spec.keyHash";

const STARTS_BOUNDED: &str = "request.operation != 'CREATE' || timestamp(object.spec.expiresAt) <= \
     timestamp(object.metadata.creationTimestamp) + duration('1h')";

/// Times in managedFields have whole seconds, hence the one more.
const RENEWS_BOUNDED: &str = "!variables.prolongs || (variables.owners.size() == 1 && variables.owners.all(m, \
     timestamp(object.spec.expiresAt) <= timestamp(m.time) + duration('3601s')))";

const MAY_DELETE: &str = "request.operation != 'DELETE' || oldObject.spec.user == request.userInfo.username || \
     authorizer.group('tp.dev').resource('sessions').subresource('others').namespace(request.namespace)\
     .check('delete').allowed()";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_fails_closed_and_covers_every_write() {
        let policy = serde_json::to_value(session_policy()).unwrap();
        let spec = &policy["spec"];

        assert_eq!(spec["failurePolicy"], "Fail");
        let rule = &spec["matchConstraints"]["resourceRules"][0];
        assert_eq!(rule["operations"], json!(["CREATE", "UPDATE", "DELETE"]));
        assert_eq!(rule["resources"], json!(["sessions"]));
        assert_eq!(spec["validations"].as_array().unwrap().len(), 6);
    }

    #[test]
    fn the_binding_denies() {
        let binding = serde_json::to_value(session_policy_binding()).unwrap();

        assert_eq!(binding["spec"]["policyName"], SESSION_POLICY);
        assert_eq!(binding["spec"]["validationActions"], json!(["Deny"]));
    }
}
