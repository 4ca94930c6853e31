//! Small bodies of requests and responses, collected under a bound.

use bytes::{Bytes, BytesMut};
use h2::RecvStream;

use crate::settings::WINDOW_MIN;

/// Why a body was not taken.
#[derive(Debug)]
pub(crate) enum BodyError {
    TooLarge,
    Stream(h2::Error),
}

/// Collects a body of at most `max` bytes. A body in one frame is not copied.
///
/// What fits a stream's smallest window keeps its credit until it is complete, so that all unfinished bodies of a
/// connection together hold at most the connection's window.
pub(crate) async fn collect(mut body: RecvStream, max: usize) -> Result<Bytes, BodyError> {
    let mut collected = Collected::Nothing;
    while let Some(data) = body.data().await {
        let data = data.map_err(BodyError::Stream)?;
        if collected.len() + data.len() > max {
            return Err(BodyError::TooLarge);
        }
        if max > WINDOW_MIN as usize {
            let _ = body.flow_control().release_capacity(data.len());
        }
        collected = collected.and(data);
    }
    // Dropping the stream returns the credit that was kept.
    Ok(collected.into())
}

enum Collected {
    Nothing,
    One(Bytes),
    Many(BytesMut),
}

impl Collected {
    fn len(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::One(bytes) => bytes.len(),
            Self::Many(bytes) => bytes.len(),
        }
    }

    fn and(self, data: Bytes) -> Self {
        match self {
            Self::Nothing => Self::One(data),
            Self::One(first) => {
                let mut many = BytesMut::with_capacity(2 * (first.len() + data.len()));
                many.extend_from_slice(&first);
                many.extend_from_slice(&data);
                Self::Many(many)
            }
            Self::Many(mut many) => {
                many.extend_from_slice(&data);
                Self::Many(many)
            }
        }
    }
}

impl From<Collected> for Bytes {
    fn from(collected: Collected) -> Self {
        match collected {
            Collected::Nothing => Self::new(),
            Collected::One(bytes) => bytes,
            Collected::Many(bytes) => bytes.freeze(),
        }
    }
}
