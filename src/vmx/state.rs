//! Values of guest non-register state.
//!
//! Source: Intel SDM vol. 3C, "Guest Non-Register State", table "Format of Interruptibility State".

/// Interruptibility state.
pub mod interruptibility {
    /// Blocking by STI
    pub const STI: u64 = 1 << 0;
    /// Blocking by MOV SS
    pub const MOV_SS: u64 = 1 << 1;
    /// Either, which last for one instruction.
    pub const STI_OR_MOV_SS: u64 = STI | MOV_SS;
    /// Blocking by NMI
    pub const NMI: u64 = 1 << 3;
}

/// Activity state.
pub mod activity {
    /// Active
    pub const ACTIVE: u64 = 0;
    /// HLT
    pub const HLT: u64 = 1;
    /// Shutdown
    pub const SHUTDOWN: u64 = 2;
    /// Wait-for-SIPI
    pub const WAIT_FOR_SIPI: u64 = 3;
}
