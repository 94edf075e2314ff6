//! The cascade L2 hypervisor (library part).
#![no_std]
