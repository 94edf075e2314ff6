//! Virtual VMX: the state machine, instructions, checks, merge, route, reflect.

pub mod caps;
pub mod checks;
pub mod merge;
pub mod route;
