//! Records on the serial line, shared by the guests and the harness.
#![cfg_attr(not(feature = "std"), no_std)]
