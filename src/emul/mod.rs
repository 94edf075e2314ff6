//! What L2 itself exits for.
