//! One virtual CPU: state, the run loop, exit dispatch.
