//! Whose bytes go next, and how many may be under way.
