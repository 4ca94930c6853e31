//! An attempt to connect that did not work out.

use super::connection::Severity;
use crate::report::Failure;

/// Why there is no carrier, and whether another attempt can change that.
#[derive(Clone, Debug)]
pub struct Unmet {
    /// What to tell the user.
    pub failure: Failure,
    /// Whether to try again.
    pub severity: Severity,
}

impl Unmet {
    /// Worth another attempt.
    pub fn passing(failure: Failure) -> Self {
        Self {
            failure,
            severity: Severity::Passing,
        }
    }

    /// Not worth one before somebody acts.
    pub fn lasting(failure: Failure) -> Self {
        Self {
            failure,
            severity: Severity::Final,
        }
    }
}
