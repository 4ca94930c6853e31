//! Who may write a `Session` or an `Intercept`, decided by the API server itself.
//!
//! RBAC says in which namespaces a user may create them; it cannot say *whose* name stands in them. These policies
//! do: an object names its writer and nobody else. A Session keeps its key for life, and never lies more than an hour
//! ahead; whether an Intercept's Session is its writer's is the manager's to see. What the manager itself may do to pods is in
//! [`fence`].
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

use crate::{INTERCEPTS, Intercept, SESSIONS, Session};

pub mod fence;

/// Name of the policy and of its binding.
pub const SESSION_POLICY: &str = "sessions.tp.dev";

/// Name of the policy for Intercepts and of its binding.
pub const INTERCEPT_POLICY: &str = "intercepts.tp.dev";

/// The custom resources' definitions.
pub fn crds() -> [CustomResourceDefinition; 2] {
    [Session::crd(), Intercept::crd()]
}

/// A policy and what puts it into force.
pub type Enforced = (ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding);

/// The policies for what users write, each with its binding.
pub fn for_users() -> [Enforced; 2] {
    [
        (session_policy(), binding(SESSION_POLICY)),
        (intercept_policy(), binding(INTERCEPT_POLICY)),
    ]
}

/// The policy for Sessions.
pub fn session_policy() -> ValidatingAdmissionPolicy {
    policy(
        SESSION_POLICY,
        SESSIONS,
        json!([
            { "name": "groups", "expression": GROUPS },
            { "name": "writes", "expression": WRITES },
            { "name": "prolongs", "expression": PROLONGS },
            { "name": "owners", "expression": OWNERS },
        ]),
        json!([
            is_writers(),
            keeps_its_user(),
            rule("Invalid", KEEPS_KEY, "spec.keyHash cannot change"),
            rule(
                "Invalid",
                STARTS_BOUNDED,
                "spec.expiresAt must be at most one hour ahead"
            ),
            rule(
                "Invalid",
                RENEWS_BOUNDED,
                "spec.expiresAt must be at most one hour ahead"
            ),
            rule(
                "Forbidden",
                &may_delete(SESSIONS),
                "only its user may delete a Session, or who may `delete` `sessions/others`"
            ),
        ]),
    )
}

/// The policy for Intercepts. What an Intercept is cannot change at all; that is a rule of its definition.
pub fn intercept_policy() -> ValidatingAdmissionPolicy {
    policy(
        INTERCEPT_POLICY,
        INTERCEPTS,
        json!([
            { "name": "groups", "expression": GROUPS },
            { "name": "writes", "expression": WRITES },
        ]),
        json!([
            is_writers(),
            keeps_its_user(),
            rule(
                "Forbidden",
                &may_delete(INTERCEPTS),
                "only its user may delete an Intercept, or who may `delete` `intercepts/others`"
            ),
        ]),
    )
}

fn is_writers() -> serde_json::Value {
    rule("Forbidden", IS_WRITER, WRITER_IS_USER)
}

fn keeps_its_user() -> serde_json::Value {
    rule(
        "Forbidden",
        KEEPS_USER,
        "spec.user is the owner and cannot change",
    )
}

/// A policy about who writes one of our resources. It refuses when it cannot be evaluated.
fn policy(
    name: &str,
    resource: &str,
    variables: serde_json::Value,
    validations: serde_json::Value,
) -> ValidatingAdmissionPolicy {
    serde_json::from_value(json!({
        "metadata": { "name": name },
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": { "resourceRules": [{
                "apiGroups": [crate::GROUP],
                "apiVersions": ["*"],
                "operations": ["CREATE", "UPDATE", "DELETE"],
                "resources": [resource],
            }]},
            "variables": variables,
            "validations": validations,
        },
    }))
    .expect("the policies are constants of the right shape")
}

/// Puts the policy of this name into force, everywhere.
fn binding(policy: &str) -> ValidatingAdmissionPolicyBinding {
    serde_json::from_value(json!({
        "metadata": { "name": policy },
        "spec": { "policyName": policy, "validationActions": ["Deny"] },
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

const WRITER_IS_USER: &str =
    "spec.user and spec.groups must be those of the writer (kubectl auth whoami)";

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

fn may_delete(resource: &str) -> String {
    format!(
        "request.operation != 'DELETE' || oldObject.spec.user == request.userInfo.username || \
         authorizer.group('tp.dev').resource('{resource}').subresource('others').namespace(request.namespace)\
         .check('delete').allowed()"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policies_fail_closed_and_cover_every_write() {
        for ((policy, _), (resource, validations)) in
            for_users().iter().zip([(SESSIONS, 6), (INTERCEPTS, 3)])
        {
            let policy = serde_json::to_value(policy).unwrap();
            let spec = &policy["spec"];

            assert_eq!(spec["failurePolicy"], "Fail");
            let rule = &spec["matchConstraints"]["resourceRules"][0];
            assert_eq!(rule["operations"], json!(["CREATE", "UPDATE", "DELETE"]));
            assert_eq!(rule["resources"], json!([resource]));
            assert_eq!(spec["validations"].as_array().unwrap().len(), validations);
        }
    }

    #[test]
    fn the_bindings_deny() {
        for (policy, binding) in for_users() {
            let binding = serde_json::to_value(binding).unwrap();

            assert_eq!(binding["spec"]["policyName"], policy.metadata.name.unwrap());
            assert_eq!(binding["spec"]["validationActions"], json!(["Deny"]));
        }
    }
}
