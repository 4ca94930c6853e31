//! The service and the method of a gRPC call.

use super::{Grpc, RequestHead};

/// Whether the head is that of a gRPC call of this service and method.
pub(super) fn matches(grpc: &Grpc, head: &RequestHead<'_>) -> Option<bool> {
    let (service, method) = call(head)?;
    let equals = |wanted: &Option<String>, found: &[u8]| {
        wanted
            .as_ref()
            .is_none_or(|wanted| wanted.as_bytes() == found)
    };
    Some(equals(&grpc.service, service) && equals(&grpc.method, method))
}

/// `/service/method`; `None` when the request is no call.
fn call<'a>(head: &RequestHead<'a>) -> Option<(&'a [u8], &'a [u8])> {
    if !head.has_content_type("application/grpc") {
        return None;
    }
    let path = head.path.strip_prefix(b"/")?;
    let slash = path.iter().rposition(|byte| *byte == b'/')?;
    Some((&path[..slash], &path[slash + 1..]))
}
