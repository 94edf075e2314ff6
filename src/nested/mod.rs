//! Virtual VMX: the state machine, instructions, checks, merge, route, reflect.
