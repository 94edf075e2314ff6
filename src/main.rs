//! Bare-metal entry of the nvmx image.
#![no_std]
#![no_main]
