//! What matchers see of a request, borrowed from whoever parsed it.

/// The head of one HTTP request, of either version.
#[derive(Clone, Debug)]
pub struct RequestHead<'a> {
    pub(super) method: &'a str,
    pub(super) path: &'a [u8],
    pub(super) query: Option<&'a [u8]>,
    pub(super) fields: Vec<(&'a [u8], &'a [u8])>,
}

impl<'a> RequestHead<'a> {
    /// `target` is the request's target in origin-form or absolute-form (RFC 9112 §3.2), or HTTP/2's `:path`. Fields are
    /// names, in any case, and values without the white space around them.
    pub fn new(
        method: &'a str,
        target: &'a [u8],
        fields: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
    ) -> Self {
        let target = without_authority(target);
        let (path, query) = match target.iter().position(|byte| *byte == b'?') {
            Some(at) => (&target[..at], Some(&target[at + 1..])),
            None => (target, None),
        };
        Self {
            method,
            path,
            query,
            fields: fields.into_iter().collect(),
        }
    }

    /// The method.
    pub fn method(&self) -> &'a str {
        self.method
    }

    /// Path and query.
    pub fn target(&self) -> Vec<u8> {
        match self.query {
            Some(query) => [self.path, b"?", query].concat(),
            None => self.path.to_vec(),
        }
    }

    /// Names and values, as they came.
    pub fn fields(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
        self.fields.iter().copied()
    }

    /// Values of the fields with this name, which is lower-case.
    pub(super) fn values(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.fields
            .iter()
            .filter(move |(field, _)| field.eq_ignore_ascii_case(name.as_bytes()))
            .map(|(_, value)| *value)
    }

    /// Whether the content type is `kind`, or begins with it and a separator.
    pub(super) fn has_content_type(&self, kind: &str) -> bool {
        self.values("content-type").any(|value| {
            let (start, rest) = value.split_at(kind.len().min(value.len()));
            start.eq_ignore_ascii_case(kind.as_bytes())
                && rest
                    .first()
                    .is_none_or(|next| matches!(next, b';' | b'+' | b' ' | b'\t'))
        })
    }
}

/// Cuts `scheme://authority` off an absolute-form.
fn without_authority(target: &[u8]) -> &[u8] {
    if target.first() == Some(&b'/') {
        return target;
    }
    let Some(scheme) = target.windows(3).position(|three| three == b"://") else {
        return target;
    };
    let rest = &target[scheme + 3..];
    match rest.iter().position(|byte| matches!(byte, b'/' | b'?')) {
        Some(at) if rest[at] == b'/' => &rest[at..],
        // An empty path is `/` (RFC 9110 §4.2.3), but the query stays.
        Some(at) => &rest[at..],
        None => b"/",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_and_query_come_from_both_forms_of_a_target() {
        for (target, path, query) in [
            ("/a?b=c", "/a", Some("b=c")),
            ("/", "/", None),
            ("*", "*", None),
            ("http://web.shop/a?b", "/a", Some("b")),
            ("http://web.shop", "/", None),
            ("http://web.shop?x", "", Some("x")),
            ("/a?u=http://b/c", "/a", Some("u=http://b/c")),
        ] {
            let head = RequestHead::new("GET", target.as_bytes(), []);
            assert_eq!(head.path, path.as_bytes(), "{target}");
            assert_eq!(head.query, query.map(str::as_bytes), "{target}");
        }
    }

    #[test]
    fn a_content_type_ends_at_its_separator() {
        let with = |value: &'static str| {
            RequestHead::new("POST", b"/", [(&b"Content-Type"[..], value.as_bytes())])
        };
        assert!(with("application/grpc").has_content_type("application/grpc"));
        assert!(with("application/grpc+proto").has_content_type("application/grpc"));
        assert!(with("Application/JSON; charset=utf-8").has_content_type("application/json"));
        assert!(!with("application/grpc-web").has_content_type("application/grpc"));
        assert!(!with("application").has_content_type("application/grpc"));
    }
}
