//! What every L2 guest needs: boot, serial, VMX wrappers, assertions.
#![no_std]
