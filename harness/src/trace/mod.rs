//! Every hardware exit of a boot: recorded, put together to trees, counted and shown.
//!
//! `log` reads what the emulator wrote, `ring` what nvmx itself told, `why` finds what asked for an exit, `tree` puts exits together, `symbols` names addresses,
//! `file` keeps it all, `text`, `export`, `stat` and `vmcs` show it, `record` makes boots write it.

pub mod export;
pub mod file;
pub mod log;
pub mod record;
pub mod ring;
pub mod stat;
pub mod symbols;
pub mod text;
pub mod tree;
pub mod vmcs;
pub mod why;
