//! Where the manager is, and which key it shows.
//!
//! The manager writes it to a ConfigMap that only it may write; a workstation reads it through the API server, so the
//! key it pins is as trustworthy as the API server is.

use serde::{Deserialize, Serialize};

/// Key of the ConfigMap's data that holds the locator as JSON.
pub const LOCATOR_ENTRY: &str = "manager.json";

/// Contents of ConfigMap [`crate::MANAGER_NAME`].
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ManagerLocator {
    /// Version the manager speaks.
    pub protocol: u32,
    /// Oldest version it still understands.
    pub oldest_protocol: u32,
    /// Release of the manager, for people.
    pub version: String,
    /// Hash of the public key that every replica shows: `sha256:` and 64 hexadecimal digits.
    pub key_hash: String,
    /// Port of the tunnel on each pod.
    pub port: u16,
    /// Names of the ready replicas.
    pub pods: Vec<String>,
}

/// Which side has to be upgraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skew {
    /// The two understand each other.
    None,
    /// The workstation is too old for the manager.
    WorkstationTooOld,
    /// The manager is too old for the workstation.
    ManagerTooOld,
}

impl ManagerLocator {
    /// Compares a manager with a workstation that speaks `newest` and understands everything from `oldest` on.
    pub fn skew(&self, oldest: u32, newest: u32) -> Skew {
        if newest < self.oldest_protocol {
            Skew::WorkstationTooOld
        } else if self.protocol < oldest {
            Skew::ManagerTooOld
        } else {
            Skew::None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(oldest: u32, newest: u32) -> ManagerLocator {
        ManagerLocator {
            protocol: newest,
            oldest_protocol: oldest,
            version: "0".into(),
            key_hash: String::new(),
            port: 8443,
            pods: Vec::new(),
        }
    }

    #[test]
    fn skew_names_the_side_to_upgrade() {
        for (manager, workstation, expected) in [
            ((1, 1), (1, 1), Skew::None),
            ((1, 2), (1, 1), Skew::None),
            ((1, 1), (1, 2), Skew::None),
            ((2, 2), (1, 1), Skew::WorkstationTooOld),
            ((1, 1), (2, 2), Skew::ManagerTooOld),
            ((2, 3), (1, 2), Skew::None),
        ] {
            let locator = self::manager(manager.0, manager.1);
            assert_eq!(
                locator.skew(workstation.0, workstation.1),
                expected,
                "{manager:?} {workstation:?}"
            );
        }
    }
}
