//! What the guests, nvmx and the harness must agree on: the CPUID interface and the records on the serial line.
//!
//! A record is one line that starts with `@`, for instance
//! `@L2 event name=cpuid handled_by=L2 scope=l3 count=1000 ticks=123456`. Lines without `@` are free text for people.
//! Guests write with [`Record`]; the harness reads with `OwnedRecord` (feature `std`).
#![cfg_attr(not(feature = "std"), no_std)]

pub mod abi;
pub mod caps;
#[cfg(feature = "std")]
mod parse;
mod record;
pub mod trace;

#[cfg(feature = "std")]
pub use parse::{OwnedRecord, ParseError, Problem, is_record};
pub use record::{Hex, Kind, Level, MARK, Record, Value};
