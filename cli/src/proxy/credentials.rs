//! The optional user name and password of the proxy, compared in constant time.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use subtle::ConstantTimeEq as _;

/// What a client must present, by RFC 1929 or as HTTP Basic.
#[derive(Clone)]
pub struct Credentials {
    user: String,
    password: String,
}

impl Credentials {
    /// Both are at most 255 bytes, or no SOCKS client could send them (RFC 1929 §2).
    pub fn new(user: impl Into<String>, password: impl Into<String>) -> Self {
        Self {
            user: user.into(),
            password: password.into(),
        }
    }

    /// Whether these are the ones. Takes the same time for every pair of the same lengths.
    pub(super) fn verify(&self, user: &[u8], password: &[u8]) -> bool {
        let user = self.user.as_bytes().ct_eq(user);
        let password = self.password.as_bytes().ct_eq(password);
        (user & password).into()
    }

    /// Checks the value of `Proxy-Authorization` (RFC 7617).
    pub(super) fn verify_basic(&self, value: &[u8]) -> bool {
        let Some((scheme, encoded)) = value.split_at_checked("Basic ".len()) else {
            return false;
        };
        let decoded = STANDARD.decode(encoded.trim_ascii());
        let (true, Ok(decoded)) = (scheme.eq_ignore_ascii_case(b"Basic "), decoded) else {
            return false;
        };
        let mut parts = decoded.splitn(2, |byte| *byte == b':');
        match (parts.next(), parts.next()) {
            (Some(user), Some(password)) => self.verify(user, password),
            _ => false,
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_pair_is_accepted() {
        let credentials = Credentials::new("ada", "love:lace");
        let basic = |text: &str| format!("basic {}", STANDARD.encode(text)).into_bytes();

        assert!(credentials.verify(b"ada", b"love:lace"));
        assert!(credentials.verify_basic(&basic("ada:love:lace")));
        for (user, password) in [
            ("ada", ""),
            ("", "love:lace"),
            ("ada", "love:lac"),
            ("adaa", "love:lace"),
        ] {
            assert!(
                !credentials.verify(user.as_bytes(), password.as_bytes()),
                "{user} {password}"
            );
            assert!(!credentials.verify_basic(&basic(&format!("{user}:{password}"))));
        }
        for value in [
            &b""[..],
            b"Basic",
            b"Basic ",
            b"Basic %%%",
            b"Bearer YWRhOmxvdmU6bGFjZQ==",
            &basic("ada"),
        ] {
            assert!(!credentials.verify_basic(value), "{value:?}");
        }
    }

    #[test]
    fn the_password_is_not_printed() {
        assert!(!format!("{:?}", Credentials::new("ada", "secret")).contains("secret"));
    }
}
