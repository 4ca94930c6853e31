//! How the API server's refusals and the ways of not reaching it read.
//!
//! Knows the wording of Kubernetes' own messages as far as naming verb, resource and namespace needs it; a message in
//! any other wording is shown as it came.

use std::error::Error;
use std::io;

use kube::client::{AuthError, UpgradeConnectionError};
use kube::core::Status;

use super::{Failure, chain};
use crate::kubeconfig::Unreachable;

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        if let kube::Error::Api(status) = &error {
            return refused(status);
        }
        if status_of(&error) == Some(401) {
            return not_accepted();
        }
        if let Some(unreachable) = find::<Unreachable>(&error) {
            return not_reached(unreachable);
        }
        if let Some(auth) = find::<AuthError>(&error) {
            return no_credentials(auth);
        }
        Self::new("the request to the API server failed").caused_by(&error)
    }
}

/// The HTTP status of a refusal, also where the request was for a WebSocket.
#[must_use]
pub fn status_of(error: &kube::Error) -> Option<u16> {
    if let kube::Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(status)) = error {
        return Some(status.as_u16());
    }
    let kube::Error::Api(status) = error else {
        return None;
    };
    Some(status.code)
}

/// Whether the API server refused because RBAC does not allow it, and not because of what was asked.
#[must_use]
pub fn is_denial(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 403 && Denial::parse(&status.message).is_some())
}

fn refused(status: &Status) -> Failure {
    match status.code {
        401 => not_accepted().because(said(status)),
        403 => forbidden(&status.message),
        429 | 503 => Failure::new(format!(
            "the API server is overloaded or starting ({})",
            status.code
        ))
        .because(said(status))
        .hint("try again in a moment"),
        _ => Failure::new(said(status)),
    }
}

fn not_accepted() -> Failure {
    Failure::new("the API server does not accept these credentials (401)").hint(
        "the token or certificate may have expired: log in again, then try `kubectl auth whoami`",
    )
}

fn said(status: &Status) -> String {
    match (status.message.as_str(), status.reason.as_str()) {
        ("", "") => format!("the API server answered {}", status.code),
        ("", reason) => reason.to_owned(),
        (message, _) => message.to_owned(),
    }
}

fn forbidden(message: &str) -> Failure {
    match Denial::parse(message) {
        Some(denial) => Failure::new(denial.sentence()).hint(denial.hint()),
        None => Failure::new(message.to_owned()),
    }
}

/// What an RBAC refusal says.
#[derive(Debug, PartialEq, Eq)]
struct Denial<'a> {
    user: &'a str,
    verb: &'a str,
    resource: &'a str,
    group: &'a str,
    namespace: Option<&'a str>,
}

impl<'a> Denial<'a> {
    /// Reads `… is forbidden: User "u" cannot create resource "pods" in API group "" in the namespace "n"`.
    fn parse(message: &'a str) -> Option<Self> {
        let (_, rest) = message.split_once("is forbidden: User \"")?;
        let (user, rest) = rest.split_once("\" cannot ")?;
        let (verb, rest) = rest.split_once(" resource \"")?;
        let (resource, rest) = rest.split_once("\" in API group \"")?;
        let (group, rest) = rest.split_once('"')?;
        let namespace = rest
            .split_once("in the namespace \"")
            .and_then(|(_, rest)| rest.split_once('"'))
            .map(|(namespace, _)| namespace);
        Some(Self {
            user,
            verb,
            resource,
            group,
            namespace,
        })
    }

    fn sentence(&self) -> String {
        let Self { user, verb, .. } = self;
        format!(
            "{user} may not {verb} {} {}",
            self.full_resource(),
            self.place()
        )
    }

    fn hint(&self) -> String {
        format!(
            "ask for a role that allows `{}` on `{}` {}, or choose another user with `--context`, `--user` or `--as`",
            self.verb,
            self.full_resource(),
            self.place()
        )
    }

    fn place(&self) -> String {
        match self.namespace {
            Some(namespace) => format!("in namespace {namespace}"),
            None => "at cluster scope".to_owned(),
        }
    }

    /// As RBAC and kubectl write it: `deployments.apps`, `pods/portforward`, `sessions.tp.dev/egress`.
    fn full_resource(&self) -> String {
        match (self.group, self.resource.split_once('/')) {
            ("", _) => self.resource.to_owned(),
            (group, None) => format!("{}.{group}", self.resource),
            (group, Some((resource, sub))) => format!("{resource}.{group}/{sub}"),
        }
    }
}

fn not_reached(unreachable: &Unreachable) -> Failure {
    let root = chain(unreachable).pop().unwrap_or_default();
    let failure = Failure::new(unreachable.to_string());
    if find::<rustls::Error>(unreachable).is_some() || root.contains("certificate") {
        return failure
            .because(root)
            .hint("does the kubeconfig hold this server's certificate authority? see `--certificate-authority`");
    }
    let why = if timed_out(unreachable) {
        "it did not answer in time".to_owned()
    } else {
        root
    };
    failure.because(why).hint(
        "is the cluster up, and does this machine reach it? `kubectl version` asks the same server",
    )
}

fn timed_out(error: &(dyn Error + 'static)) -> bool {
    find::<io::Error>(error).is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
        || find::<tokio::time::error::Elapsed>(error).is_some()
}

fn no_credentials(error: &AuthError) -> Failure {
    if let AuthError::AuthExecRun { cmd, out } = error {
        return Failure::new(format!("the credential plugin {} failed", program(cmd)))
            .because(out.status.to_string())
            .because_last_line(&out.stderr)
            .hint("log in again with the plugin's own command");
    }
    if let AuthError::AuthExecStart(io) = error {
        return Failure::new("the kubeconfig's credential plugin cannot be started")
            .because(io.to_string())
            .hint("install the program that `users[].user.exec.command` names, or put it on PATH");
    }
    // The others read well by themselves, and none has a cure that is ours to name.
    Failure::new("cannot get credentials for the API server").caused_by(error)
}

/// The program's name out of a command in `Debug` form, which begins with `KEY="value"` pairs that may be secret.
fn program(command: &str) -> String {
    command
        .split_whitespace()
        .find(|word| word.starts_with('"'))
        .unwrap_or("from the kubeconfig")
        .trim_matches('"')
        .to_owned()
}

impl Failure {
    fn because_last_line(self, output: &[u8]) -> Self {
        let text = String::from_utf8_lossy(output);
        match text.lines().rev().find(|line| !line.trim().is_empty()) {
            Some(line) => self.because(line.trim()),
            None => self,
        }
    }
}

/// The first error of type `E` in a chain, also inside `io::Error`'s box, which hides from `source()`.
fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    std::iter::successors(Some(error), |&error| {
        let inner = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        inner
            .map(|inner| inner as &(dyn Error + 'static))
            .or_else(|| error.source())
    })
    .find_map(|error| error.downcast_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16, message: &str) -> kube::Error {
        kube::Error::Api(Status::failure(message, "").with_code(code).boxed())
    }

    #[test]
    fn a_denial_names_verb_resource_and_namespace() {
        let error = status(
            403,
            "sessions.tp.dev is forbidden: User \"ada\" cannot create resource \"sessions\" in API group \"tp.dev\" in the namespace \"shop\"",
        );

        let failure = Failure::from(error);

        assert_eq!(
            failure.what,
            "ada may not create sessions.tp.dev in namespace shop"
        );
        assert!(
            failure
                .hint
                .unwrap()
                .contains("`create` on `sessions.tp.dev`")
        );
        assert!(failure.why.is_empty());
    }

    #[test]
    fn a_denial_of_a_named_subresource_is_understood() {
        let error = status(
            403,
            "pods \"tp-manager-0\" is forbidden: User \"system:serviceaccount:a:b\" cannot get resource \"pods/portforward\" in API group \"\" in the namespace \"tp-system\": RBAC: role.rbac.authorization.k8s.io \"x\" not found",
        );

        let failure = Failure::from(error);

        assert_eq!(
            failure.what,
            "system:serviceaccount:a:b may not get pods/portforward in namespace tp-system"
        );
    }

    #[test]
    fn a_denial_at_cluster_scope_says_so() {
        let error = status(
            403,
            "namespaces is forbidden: User \"ada\" cannot list resource \"namespaces\" in API group \"\" at the cluster scope",
        );

        assert_eq!(
            Failure::from(error).what,
            "ada may not list namespaces at cluster scope"
        );
    }

    #[test]
    fn an_admission_refusal_is_shown_as_it_came() {
        let message =
            "admission webhook \"deny.example.com\" denied the request: no images from there";

        assert_eq!(Failure::from(status(403, message)).what, message);
    }

    #[test]
    fn an_expired_token_is_named() {
        let failure = Failure::from(status(401, "Unauthorized"));

        assert!(failure.what.contains("credentials"), "{failure}");
        assert!(failure.hint.unwrap().contains("expired"));
    }

    #[test]
    fn a_plugins_environment_is_never_printed() {
        assert_eq!(
            program("TOKEN=\"hunter2\" \"aws\" \"eks\" \"get-token\""),
            "aws"
        );
    }
}
