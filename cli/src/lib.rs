//! The workstation side of `tp`: commands, daemon, capture.
