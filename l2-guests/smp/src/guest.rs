//! A small guest of this CPU.

use core::{
    arch::{asm, global_asm},
    cell::UnsafeCell,
};
use l2_kit::{
    ept::Ept,
    fields as f,
    pages::{self, Access, PAGE},
    report,
    setup::{self, Controls, Missing, entry_controls, primary, secondary},
    smp::MAX_CPUS,
    vcpu::Vcpu,
    vmx::{self, reason},
};

/// What the guest runs; what it returns comes with [`Exit::Done`].
pub type Program = extern "C" fn(u64) -> u64;

/// RAX of the VMCALL that ends a program.
const DONE: u64 = 0xD0E;
const STACK: u64 = 16 << 10;

global_asm!(
    ".pushsection .text.smp_done, \"ax\"",
    "smp_done:",
    "mov rbx, rax",
    "mov eax, {done}",
    "vmcall",
    "ud2",
    ".popsection",
    done = const DONE,
);

unsafe extern "C" {
    fn smp_done();
}

/// How an entry ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// VMLAUNCH or VMRESUME failed with this error
    Refused(u64),
    /// The program returned
    Done(u64),
    /// Another exit
    Reason(u32),
}

impl Exit {
    /// As a word: the value of a program; other endings are numbers above what programs return.
    pub fn word(self) -> u64 {
        match self {
            Exit::Done(value) => value,
            Exit::Reason(reason) => 0xE000_0000 | u64::from(reason),
            Exit::Refused(error) => 0xF000_0000 | error,
        }
    }
}

/// The guest.
pub struct Guest {
    /// Its virtual CPU
    pub vcpu: Vcpu,
    stack: u64,
}

/// The guest of each CPU.
struct Guests([UnsafeCell<Option<Guest>>; MAX_CPUS]);
// SAFETY: each CPU uses its own, and CPU 0 those of CPUs that wait for it.
unsafe impl Sync for Guests {}
static GUESTS: Guests = Guests([const { UnsafeCell::new(None) }; MAX_CPUS]);

/// The guest of a CPU: made by [`Guest::make`]. The VMCS is current on the CPU that used it last.
#[allow(clippy::mut_from_ref, reason = "see `Guests`")]
pub fn of(index: usize) -> &'static mut Guest {
    // SAFETY: see `Guests`.
    match unsafe { &mut *GUESTS.0[index].get() } {
        Some(guest) => guest,
        None => report::die(format_args!("CPU {index} has no guest")),
    }
}

/// Into VMX operation, on this CPU.
pub fn enter_vmx() {
    if let Err(missing) = setup::enter_vmx() {
        report::die(format_args!("{missing}"));
    }
}

impl Guest {
    /// A new guest, current on this CPU, with EPT and VPID `vpid`, and these controls.
    pub fn make(index: usize, vpid: u64, extra: Controls) -> &'static mut Self {
        match Self::new(vpid, extra) {
            // SAFETY: see `Guests`.
            Ok(guest) => unsafe { *GUESTS.0[index].get() = Some(guest) },
            Err(missing) => report::die(format_args!("CPU {index}: {missing}")),
        }
        of(index)
    }

    fn new(vpid: u64, extra: Controls) -> Result<Self, Missing> {
        let vcpu = Vcpu::new(setup::revision()).map_err(|o| Missing::Instruction("VMCLEAR or VMPTRLD", o))?;
        setup::write_controls(&Controls {
            primary: extra.primary | primary::MSR_BITMAPS,
            secondary: extra.secondary | secondary::EPT | secondary::VPID,
            entry: extra.entry | entry_controls::IA32E,
            ..extra
        })?;
        vmx::write(f::MSR_BITMAP, pages::address(pages::page()));
        vmx::write(f::VPID, vpid);
        setup::write_host_state();
        setup::write_guest_state(pages::identity_tables(Access::Kernel), true);
        vmx::write(f::EPTP, Ept::identity().pointer());
        let stack = pages::take(STACK, PAGE) + STACK;
        Ok(Self { vcpu, stack })
    }

    /// Lets the next [`Guest::run`] begin a program, with interrupts on or off.
    pub fn start(&mut self, program: Program, argument: u64, interrupts: bool) {
        let top = self.stack - 64;
        // SAFETY: the guest's stack, which nobody uses now.
        unsafe { (top as *mut u64).write_volatile(smp_done as *const () as u64) };
        self.vcpu.registers.rdi = argument;
        for (field, value) in [
            (f::GUEST_RIP, program as *const () as u64),
            (f::GUEST_RSP, top),
            (f::GUEST_RFLAGS, if interrupts { 0x202 } else { 2 }),
            (f::GUEST_INTERRUPTIBILITY, 0),
            (f::GUEST_ACTIVITY, 0),
            (f::GUEST_PENDING_DEBUG, 0),
        ] {
            vmx::write(field, value);
        }
    }

    /// Enters the guest and says how that ended.
    pub fn run(&mut self) -> Exit {
        if self.vcpu.run().is_err() {
            return Exit::Refused(vmx::read(f::INSTRUCTION_ERROR));
        }
        let reason = vmx::read(f::EXIT_REASON) as u32;
        match self.vcpu.registers.rax {
            DONE if reason == reason::VMCALL => Exit::Done(self.vcpu.registers.rbx),
            _ => Exit::Reason(reason),
        }
    }

    /// Skips the instruction that exited.
    pub fn skip(&mut self) {
        vmx::write(f::GUEST_RIP, vmx::read(f::GUEST_RIP) + vmx::read(f::EXIT_INSTRUCTION_LENGTH));
    }

    /// [`Guest::start`] and [`Guest::run`].
    pub fn execute(&mut self, program: Program, argument: u64) -> Exit {
        self.start(program, argument, false);
        self.run()
    }
}

/// Reads memory at `argument`: a program.
pub extern "C" fn read_memory(argument: u64) -> u64 {
    // SAFETY: the address is mapped, or the fault is the experiment.
    unsafe { (argument as *const u64).read_volatile() }
}

/// Spins until the word at `argument` is not 0: a program.
pub extern "C" fn spin(argument: u64) -> u64 {
    loop {
        match read_memory(argument) {
            // SAFETY: does nothing.
            0 => unsafe { asm!("nop", options(nomem, nostack, preserves_flags)) },
            value => return value,
        }
    }
}
