//! The workstation side of `tp`: commands, daemon, capture.

pub mod kubeconfig;
pub mod report;
