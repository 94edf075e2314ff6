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
    /// Where HOST_RSP points to: 0 before a host-state area was written.
    home: u64,
}

impl GuestRegs {
    /// All zero.
    pub const fn new() -> Self {
        GuestRegs { gpr: [0; 16], host_rsp: 0, exit_tsc: 0, ticks: 0, home: 0 }
    }

    /// The guest exited at this value of the TSC, or the clock of nvmx's own time starts with it.
    pub(super) fn exited_at(&mut self, tsc: u64) {
        self.exit_tsc = tsc;
    }

    /// TSC at the last exit.
    pub fn exit_tsc(&self) -> u64 {
        self.exit_tsc
    }

    /// The value for HOST_RSP: the same for each VMCS of this processor. From here on the registers stay where they are.
    ///
    /// # Panics
    ///
    /// If they were moved since they were settled before.
    pub(super) fn settle(&mut self) -> u64 {
        let here = self.host_rsp();
        assert!(self.home == 0 || self.home == here, "the registers that HOST_RSP points to were moved");
        self.home = here;
        here
    }

    /// They are where the host-state areas say that they are.
    pub(super) fn are_at_home(&self) -> bool {
        self.home == self.host_rsp()
    }

    /// The stack pointer with which an exit pushes a guest's registers to where they are now.
    pub fn host_rsp(&self) -> u64 {
        &self.host_rsp as *const u64 as u64
    }
}

impl Default for GuestRegs {
    fn default() -> Self {
        Self::new()
    }
}
