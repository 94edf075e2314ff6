//! Virtual VMX: the state machine, instructions, checks, merge, route, reflect.

pub mod caps;
