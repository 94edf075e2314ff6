//! A guest that calls its hypervisor, and touches pages when it is told to.

use core::{arch::global_asm, fmt};
use l2_kit::{
    ept::Ept,
    fields as f, pages,
    setup::{self, Controls, Kind, Missing, entry_controls, secondary},
    vcpu::Vcpu,
    vmx::{self, Outcome, reason},
};

global_asm!(
    ".pushsection .text.growth_guest, \"ax\"",
    // Between two calls RCX pages from RDI on are read.
    "growth_guest:",
    "vmcall",
    "test rcx, rcx",
    "jz growth_guest",
    "2: mov rax, [rdi]",
    "add rdi, 4096",
    "dec rcx",
    "jnz 2b",
    "jmp growth_guest",
    ".popsection",
);

unsafe extern "C" {
    fn growth_guest();
}

/// Why the measurement cannot go on.
#[derive(Debug)]
pub enum Stop {
    /// The CPU lacks something.
    Missing(Missing),
    /// A VMX instruction failed.
    Failed(&'static str, Outcome),
    /// A CPU does not start.
    Absent(usize),
    /// The guest exited otherwise than by its call: reason and qualification.
    Exit(u64, u64),
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::Missing(missing) => write!(f, "{missing}"),
            Stop::Failed(what, outcome) => write!(f, "{what}: {outcome}"),
            Stop::Absent(index) => write!(f, "CPU {index} does not start"),
            Stop::Exit(reason, qualification) => {
                write!(f, "the guest exited for reason {reason:#x}, qualification {qualification:#x}")
            }
        }
    }
}

impl From<Missing> for Stop {
    fn from(missing: Missing) -> Self {
        Stop::Missing(missing)
    }
}

/// The instruction's failure as an error.
pub fn must(what: &'static str, outcome: Outcome) -> Result<(), Stop> {
    if outcome.succeeded() { Ok(()) } else { Err(Stop::Failed(what, outcome)) }
}

/// A guest.
pub struct Guest(Vcpu);

impl Guest {
    /// A guest with this memory and this VPID, whose VMCS is the current one.
    ///
    /// # Errors
    /// What the CPU lacks.
    pub fn new(cr3: u64, ept: &Ept, vpid: u16) -> Result<Self, Stop> {
        let vcpu = Vcpu::new(setup::revision()).map_err(|o| Stop::Failed("VMCLEAR or VMPTRLD", o))?;
        let has_vpid = setup::allowed_one(Kind::Secondary, secondary::VPID);
        setup::write_controls(&Controls {
            secondary: secondary::EPT | if has_vpid { secondary::VPID } else { 0 },
            entry: entry_controls::IA32E,
            ..Controls::default()
        })?;
        setup::write_host_state();
        setup::write_guest_state(cr3, false);
        vmx::write(f::EPTP, ept.pointer());
        if has_vpid {
            vmx::write(f::VPID, vpid.into());
        }
        vmx::write(f::GUEST_RIP, growth_guest as *const () as u64);
        vcpu.registers.rcx = 0;
        Ok(Self(vcpu))
    }

    /// Makes its VMCS the current one.
    ///
    /// # Errors
    /// If VMPTRLD fails.
    pub fn load(&self) -> Result<(), Stop> {
        must("VMPTRLD", vmx::vmptrld(self.0.vmcs))
    }

    /// Lets it go on until its next call.
    ///
    /// # Errors
    /// If it does not come there.
    pub fn round(&mut self) -> Result<(), Stop> {
        self.0.run().map_err(|o| Stop::Failed("VMLAUNCH or VMRESUME", o))?;
        let why = vmx::read(f::EXIT_REASON);
        if why != u64::from(reason::VMCALL) {
            return Err(Stop::Exit(why, vmx::read(f::EXIT_QUALIFICATION)));
        }
        vmx::write(f::GUEST_RIP, vmx::read(f::GUEST_RIP) + vmx::read(f::EXIT_INSTRUCTION_LENGTH));
        Ok(())
    }

    /// Lets it read `count` pages from `first` on.
    ///
    /// # Errors
    /// As [`Guest::round`].
    pub fn touch(&mut self, first: u64, count: u64) -> Result<(), Stop> {
        (self.0.registers.rdi, self.0.registers.rcx) = (first, count);
        self.round()
    }
}

/// Page tables for all guests.
pub fn tables() -> u64 {
    pages::identity_tables(pages::Access::Kernel)
}
