//! `./nvmx`: builds, boots, tests and measures.
fn main() {}
