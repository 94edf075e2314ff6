//! The guest that attacks are tried with, on any CPU: programs run in it, one after the other.

use core::{arch::global_asm, fmt};
use l2_kit::{
    ept::Ept,
    fields as f,
    pages::{self, Access, PAGE},
    protocol::Value,
    setup::{self, Controls, Missing, entry_controls, primary, secondary},
    vcpu::Vcpu,
    vmx::{self, Outcome, reason},
};

/// A function that the guest runs; what it returns comes with [`Exit::Done`].
pub type Program = extern "C" fn(u64) -> u64;

/// RAX of the VMCALL that ends a program.
const DONE: u64 = 0xD0E;

global_asm!(
    ".pushsection .text.attacks_done, \"ax\"",
    "attacks_done:",
    "mov rbx, rax",
    "mov eax, {done}",
    "vmcall",
    "ud2",
    ".popsection",
    done = const DONE,
);

unsafe extern "C" {
    fn attacks_done();
}

/// How an entry ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// VMLAUNCH or VMRESUME failed
    Refused(Outcome),
    /// The entry failed while guest state or MSRs were loaded: basic reason
    Failed(u32),
    /// The program came to its end
    Done(u64),
    /// Another exit: reason
    Reason(u32),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Refused(outcome) => write!(f, "{outcome}"),
            Exit::Failed(reason) => write!(f, "entry-failure-{reason}"),
            Exit::Done(value) => write!(f, "done({value:#x})"),
            Exit::Reason(reason) => write!(f, "exit-{reason}"),
        }
    }
}

impl Value for Exit {
    fn write_to(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{self}")
    }
}

/// Controls beside those of every guest here.
#[derive(Clone, Copy, Default)]
pub struct Extra {
    pub pin: u32,
    pub primary: u32,
    pub secondary: u32,
    pub exit: u32,
    pub entry: u32,
}

/// The guest: a VMCS that is set up afresh for each attack, and memory that stays.
pub struct Guest {
    pub vcpu: Vcpu,
    pub ept: Ept,
    pub cr3: u64,
    pub msr_bitmap: u64,
    vpid: u64,
    stack: u64,
}

const STACK: u64 = 16 << 10;

impl Guest {
    /// A guest with EPT and its own VPID.
    ///
    /// # Errors
    /// What the CPU lacks.
    pub fn new(vpid: u64) -> Result<Self, Missing> {
        let vcpu = Vcpu::new(setup::revision()).map_err(|o| Missing::Instruction("VMCLEAR or VMPTRLD", o))?;
        let stack = pages::take(STACK, PAGE) + STACK;
        let (cr3, msr_bitmap) = (pages::identity_tables(Access::User), pages::address(pages::page()));
        Ok(Self { vcpu, ept: Ept::identity(), cr3, msr_bitmap, vpid, stack })
    }

    /// Makes its VMCS the current one, cleared, with all fields as for a plain guest and these controls.
    ///
    /// # Errors
    /// What the CPU lacks.
    pub fn fresh(&mut self, extra: Extra) -> Result<(), Missing> {
        let region = self.vcpu.vmcs;
        // SAFETY: ours, and not current any more after VMCLEAR.
        let words = unsafe { pages::at(region) };
        for outcome in [vmx::vmclear(region), {
            words[0] = setup::revision().into();
            vmx::vmptrld(region)
        }] {
            if !outcome.succeeded() {
                return Err(Missing::Instruction("VMCLEAR or VMPTRLD", outcome));
            }
        }
        self.vcpu.launched = false;
        self.vcpu.write_host_stack();
        setup::write_controls(&Controls {
            pin: extra.pin,
            primary: extra.primary | primary::MSR_BITMAPS,
            secondary: extra.secondary | secondary::EPT | secondary::VPID,
            exit: extra.exit,
            entry: extra.entry | entry_controls::IA32E,
        })?;
        vmx::write(f::MSR_BITMAP, self.msr_bitmap);
        vmx::write(f::VPID, self.vpid);
        vmx::write(f::EPTP, self.ept.pointer());
        setup::write_host_state();
        setup::write_guest_state(self.cr3, true);
        Ok(())
    }

    /// Lets the next [`Guest::run`] begin a program.
    pub fn start(&mut self, program: Program, argument: u64) {
        let top = self.stack - 64;
        // SAFETY: the guest's stack, which nobody uses now; the program returns to `attacks_done`.
        unsafe { (top as *mut u64).write_volatile(attacks_done as *const () as u64) };
        self.vcpu.registers.rdi = argument;
        self.vcpu.registers.rax = 0;
        for (field, value) in [
            (f::GUEST_RIP, program as *const () as u64),
            (f::GUEST_RSP, top),
            (f::GUEST_RFLAGS, 2),
            (f::GUEST_INTERRUPTIBILITY, 0),
            (f::GUEST_ACTIVITY, 0),
            (f::GUEST_PENDING_DEBUG, 0),
        ] {
            vmx::write(field, value);
        }
    }

    /// Enters the guest and says how that ended.
    pub fn run(&mut self) -> Exit {
        let launched = self.vcpu.launched;
        if let Err(outcome) = self.vcpu.run() {
            return Exit::Refused(outcome);
        }
        let reason = vmx::read(f::EXIT_REASON) as u32;
        if reason & reason::ENTRY_FAILURE != 0 {
            self.vcpu.launched = launched;
            return Exit::Failed(reason & 0xFFFF);
        }
        match self.vcpu.registers.rax {
            DONE if reason == reason::VMCALL => Exit::Done(self.vcpu.registers.rbx),
            _ => Exit::Reason(reason),
        }
    }

    /// [`Guest::start`] and [`Guest::run`].
    pub fn execute(&mut self, program: Program, argument: u64) -> Exit {
        self.start(program, argument);
        self.run()
    }

    /// Skips the instruction that exited.
    pub fn skip(&mut self) {
        vmx::write(f::GUEST_RIP, vmx::read(f::GUEST_RIP).wrapping_add(vmx::read(f::EXIT_INSTRUCTION_LENGTH)));
    }

    /// Maps the page of the guest at `linear` to `physical`, as its own tables say.
    pub fn map_linear(&self, linear: u64, physical: u64) {
        pages::set_entry(self.cr3, linear, physical | 0x67);
    }
}

/// The page directory for `linear` in the page tables at `root`, where it must be.
pub fn directory_of(root: u64, linear: u64) -> u64 {
    [39, 30].into_iter().fold(root, |table, shift| {
        // SAFETY: page tables of this image, to which nobody holds a reference.
        let entries = unsafe { pages::at(table) };
        entries[(linear >> shift) as usize & 511] & 0x000F_FFFF_FFFF_F000
    })
}

/// Forgets what was cached of all of this CPU's EPTs and VPIDs.
pub fn forget() {
    let _ = vmx::invept(2, [0, 0]);
    let _ = vmx::invvpid(2, [0, 0]);
}

/// A program that does nothing.
pub extern "C" fn nothing(argument: u64) -> u64 {
    argument
}

/// Reads memory at `argument`: a program.
pub extern "C" fn read(argument: u64) -> u64 {
    // SAFETY: the address is mapped, or the fault is the experiment.
    unsafe { (argument as *const u64).read_volatile() }
}

/// Writes memory at `argument`: a program.
pub extern "C" fn write(argument: u64) -> u64 {
    // SAFETY: as above.
    unsafe { (argument as *mut u64).write_volatile(WRITTEN) };
    WRITTEN
}

/// What [`write`] writes.
pub const WRITTEN: u64 = 0x5AFE_5AFE_5AFE_5AFE;

/// Runs what lies at `argument`: a program.
pub extern "C" fn call(argument: u64) -> u64 {
    // SAFETY: what lies there is the experiment.
    let code: extern "C" fn() -> u64 = unsafe { core::mem::transmute(argument) };
    code()
}
