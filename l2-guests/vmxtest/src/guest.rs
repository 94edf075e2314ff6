//! A guest to try one thing with: programs run in it, one after the other, in the same VMCS.

use core::{arch::global_asm, fmt};
use l2_kit::{
    ept::Ept,
    fields as f,
    pages::{self, Access, PAGE},
    protocol::Value,
    setup::{self, Controls, Kind, Missing, entry_controls, primary, secondary},
    trap,
    vcpu::Vcpu,
    vmx::{self, Outcome, reason},
};

/// A function that the guest runs; what it returns comes with [`Exit::Done`].
pub type Program = extern "C" fn(u64) -> u64;

/// RAX of the VMCALL that ends a program.
pub const DONE: u64 = 0xD0E;

global_asm!(
    ".pushsection .text.vmxtest_done, \"ax\"",
    "vmxtest_done:",
    "mov rbx, rax",
    "mov eax, {done}",
    "vmcall",
    "ud2",
    ".popsection",
    done = const DONE,
);

unsafe extern "C" {
    fn vmxtest_done();
}

/// How an entry ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// VMLAUNCH or VMRESUME failed
    Refused(Outcome),
    /// The entry failed while guest state or MSRs were loaded: basic reason and qualification
    Failed(u32, u64),
    /// The program came to its end
    Done(u64),
    /// Another exit: reason and qualification
    Reason(u32, u64),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Refused(outcome) => write!(f, "{outcome}"),
            Exit::Failed(reason, qualification) => write!(f, "entry-failure-{reason}({qualification:#x})"),
            Exit::Done(value) => write!(f, "done({value:#x})"),
            Exit::Reason(reason, qualification) => write!(f, "exit-{reason}({qualification:#x})"),
        }
    }
}

impl Value for Exit {
    fn write_to(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{self}")
    }
}

/// The guest.
pub struct Guest {
    /// Its virtual CPU
    pub vcpu: Vcpu,
    /// Its memory, if it has EPT
    pub ept: Option<Ept>,
    /// Its page tables
    pub cr3: u64,
    stack: u64,
    catch: u64,
}

const STACK: u64 = 16 << 10;

impl Guest {
    /// A guest with these controls besides the usual ones; with an EPT of its own if the controls ask for it. Its VMCS is
    /// the current one.
    ///
    /// # Errors
    /// What the CPU lacks.
    pub fn new(extra: Controls) -> Result<Self, Missing> {
        let vcpu = Vcpu::new(setup::revision()).map_err(|o| Missing::Instruction("VMCLEAR or VMPTRLD", o))?;
        let msr_bitmaps = setup::allowed_one(Kind::Primary, primary::MSR_BITMAPS);
        setup::write_controls(&Controls {
            primary: extra.primary | if msr_bitmaps { primary::MSR_BITMAPS } else { 0 },
            entry: extra.entry | entry_controls::IA32E,
            ..extra
        })?;
        if msr_bitmaps {
            vmx::write(f::MSR_BITMAP, pages::address(pages::page()));
        }
        setup::write_host_state();
        let cr3 = pages::identity_tables(Access::Kernel);
        setup::write_guest_state(cr3, true);
        let ept = (extra.secondary & secondary::EPT != 0).then(Ept::identity);
        if let Some(ept) = &ept {
            vmx::write(f::EPTP, ept.pointer());
        }
        let stack = pages::take(STACK, PAGE) + STACK;
        Ok(Self { vcpu, ept, cr3, stack, catch: 0 })
    }

    /// Lets the next [`Guest::run`] begin a program.
    pub fn start(&mut self, program: Program, argument: u64) {
        let top = self.stack - 64;
        // SAFETY: the guest's stack, which nobody uses now; the program returns to `vmxtest_done`.
        unsafe { (top as *mut u64).write_volatile(vmxtest_done as *const () as u64) };
        self.vcpu.registers.rdi = argument;
        self.catch = 0;
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
        let own = trap::swap_catch(self.catch);
        let entered = self.vcpu.run();
        self.catch = trap::swap_catch(own);
        if let Err(outcome) = entered {
            return Exit::Refused(outcome);
        }
        let (reason, mut qualification) = (vmx::read(f::EXIT_REASON) as u32, vmx::read(f::EXIT_QUALIFICATION));
        if reason & reason::ENTRY_FAILURE != 0 {
            self.vcpu.launched = launched;
            return Exit::Failed(reason & 0xFFFF, qualification);
        }
        // Of a register operand Bochs reports, as displacement, what its decoder left there.
        let is_register = || vmx::read(f::EXIT_INSTRUCTION_INFO) & 1 << 10 != 0;
        if matches!(reason, reason::VMREAD | reason::VMWRITE) && is_register() {
            qualification = 0;
        }
        match self.vcpu.registers.rax {
            DONE if reason == reason::VMCALL => Exit::Done(self.vcpu.registers.rbx),
            _ => Exit::Reason(reason, qualification),
        }
    }

    /// [`Guest::start`] and [`Guest::run`].
    pub fn execute(&mut self, program: Program, argument: u64) -> Exit {
        self.start(program, argument);
        self.run()
    }
}

/// A program that does nothing.
pub extern "C" fn nothing(argument: u64) -> u64 {
    argument
}
