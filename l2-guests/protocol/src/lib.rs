//! What the guests, nvmx and the harness must agree on: the CPUID interface and the records on the serial line.
#![cfg_attr(not(feature = "std"), no_std)]

pub mod abi;
