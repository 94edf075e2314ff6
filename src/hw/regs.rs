//! A guest's registers while nvmx runs.

/// The guest's general-purpose registers and what the switch itself needs.
#[repr(C, align(16))]
pub struct GuestRegs {
    /// RAX RCX RDX RBX (RSP: unused, it is in the VMCS) RBP RSI RDI R8-R15
    pub gpr: [u64; 16],
    /// nvmx's stack pointer while a guest runs
    pub(super) host_rsp: u64,
    /// TSC at the last exit
    pub(super) exit_tsc: u64,
    /// TSC ticks spent in nvmx, from exits to entries
    pub ticks: u64,
}

impl GuestRegs {
    /// All zero.
    pub const fn new() -> Self {
        GuestRegs { gpr: [0; 16], host_rsp: 0, exit_tsc: 0, ticks: 0 }
    }

    /// The guest exited at this value of the TSC, or the clock of nvmx's own time starts with it.
    pub(super) fn exited_at(&mut self, tsc: u64) {
        self.exit_tsc = tsc;
    }

    /// TSC at the last exit.
    pub fn exit_tsc(&self) -> u64 {
        self.exit_tsc
    }

    /// The value for HOST_RSP.
    pub fn host_rsp(&self) -> u64 {
        &self.host_rsp as *const u64 as u64
    }
}

impl Default for GuestRegs {
    fn default() -> Self {
        Self::new()
    }
}
