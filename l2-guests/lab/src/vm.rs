//! A virtual machine that runs a program of this image, and the loop that all experiments share.

use crate::{
    guest,
    record::{self, Bracket, Stop, WARM_UP, unexpected},
};
use l2_kit::{
    Global, cpu,
    ept::Ept,
    fields as f,
    pages::{self, Access, PAGE},
    setup::{self, Controls, Kind, entry_controls, exit_controls, primary, secondary},
    vcpu::Vcpu,
    vmx::{self, reason as r},
};

const STACK: u64 = 32 << 10;
static LAST_VPID: Global<u16> = Global::new(0);

/// A virtual machine of one CPU: 64-bit, ring 0, this image's tables, page tables of its own.
pub struct Vm {
    /// Its virtual CPU; the VMCS is current after [`Vm::new`]
    pub vcpu: Vcpu,
    /// Its physical memory, unless its hypervisor shadows its page tables
    pub ept: Option<Ept>,
    /// Its page tables
    pub cr3: u64,
    /// What is being measured
    pub bracket: Bracket,
    vpid: u16,
    stack: u64,
}

/// An experiment's handler of an exit: `false` if it does not know it. Called for all exits but the bracket's own VMCALLs.
pub type Handler<'a> = &'a mut dyn FnMut(&mut Vm, u32) -> bool;

/// What a guest of this lab needs of the controls, whatever the experiment adds: its MSR bitmap lets everything pass.
pub fn plain() -> Controls {
    let efer = setup::allowed_one(Kind::Entry, entry_controls::LOAD_EFER);
    let vpid = setup::allowed_one(Kind::Secondary, secondary::VPID);
    Controls {
        pin: 0,
        primary: primary::MSR_BITMAPS,
        secondary: secondary::EPT | if vpid { secondary::VPID } else { 0 },
        exit: exit_controls::SAVE_DEBUG | if efer { exit_controls::SAVE_EFER | exit_controls::LOAD_EFER } else { 0 },
        entry: entry_controls::IA32E | entry_controls::LOAD_DEBUG | if efer { entry_controls::LOAD_EFER } else { 0 },
    }
}

impl Vm {
    /// A machine with these controls; with EPT in them, `ept` is its memory.
    ///
    /// # Errors
    /// What the CPU lacks.
    pub fn new(controls: &Controls, ept: Option<Ept>) -> Result<Self, Stop> {
        if ept.is_some() && !setup::allowed_one(Kind::Secondary, secondary::EPT) {
            return Err(Stop::Missing("EPT"));
        }
        let vcpu = Vcpu::new(setup::revision()).map_err(Stop::NotEntered)?;
        setup::write_controls(controls)?;
        setup::write_host_state();
        let cr3 = pages::identity_tables(Access::Kernel);
        setup::write_guest_state(cr3, true);
        vmx::write(f::MSR_BITMAP, pages::address(pages::page()));
        if let Some(ept) = &ept {
            vmx::write(f::EPTP, ept.pointer());
        }
        // Each machine has its own, so that none meets what the CPU cached of another.
        let vpid =
            if controls.secondary & secondary::VPID != 0 { LAST_VPID.replace(LAST_VPID.get() + 1) + 1 } else { 0 };
        if vpid != 0 {
            vmx::write(f::VPID, u64::from(vpid));
        }
        let stack = pages::take(STACK, PAGE) + STACK - 8;
        Ok(Self { vcpu, ept, cr3, bracket: Bracket::new(), vpid, stack })
    }

    /// A machine with EPT that maps everything one to one.
    ///
    /// # Errors
    /// What the CPU lacks.
    pub fn with_ept(controls: &Controls) -> Result<Self, Stop> {
        Self::new(controls, Some(Ept::identity()))
    }

    /// Runs `program(count)` in the guest within a bracket, after [`WARM_UP`] of it, and prints the row.
    ///
    /// # Errors
    /// If the guest cannot go on.
    pub fn row(&mut self, name: &str, count: u64, program: fn(u64), handler: Handler<'_>) -> Result<(), Stop> {
        let count = record::events(count);
        self.run(count, WARM_UP, program, handler)?;
        record::row(name, "l3", count, &self.bracket, &[]);
        Ok(())
    }

    /// [`Vm::row`] without printing; the bracket holds what was measured.
    ///
    /// # Errors
    /// As there.
    pub fn run(&mut self, count: u64, warm_up: u64, program: fn(u64), handler: Handler<'_>) -> Result<(), Stop> {
        for (field, value) in [
            (f::GUEST_RIP, guest::start as *const () as u64),
            (f::GUEST_RSP, self.stack),
            (f::GUEST_RFLAGS, 2),
            (f::GUEST_CR3, self.cr3),
        ] {
            vmx::write(field, value);
        }
        guest::PROGRAM.set(program);
        (self.vcpu.registers.rdi, self.vcpu.registers.rsi) = (count, warm_up);
        loop {
            self.vcpu.run().map_err(Stop::NotEntered)?;
            let reason = vmx::read(f::EXIT_REASON) as u32;
            if reason == r::VMCALL {
                match self.vcpu.registers.rax {
                    guest::BEGIN => {
                        advance();
                        self.bracket.start();
                        continue;
                    }
                    guest::END => {
                        self.bracket.stop();
                        advance();
                        continue;
                    }
                    guest::DONE => return Ok(()),
                    _ => {}
                }
            }
            record::count(&mut self.bracket.seen, reason);
            if !handler(self, reason) {
                return Err(unexpected(reason));
            }
        }
    }

    /// Drops what the CPU has cached of the guest's translations: of all of them, or of one linear address.
    pub fn flush(&self, linear: Option<u64>) {
        if self.vpid != 0 {
            // Types: SDM "INVVPID"; 0 is one address, 1 one VPID.
            let kind = if linear.is_some() { 0 } else { 1 };
            let _ = vmx::invvpid(kind, [self.vpid.into(), linear.unwrap_or(0)]);
        }
    }

    /// Drops what the CPU has cached of the guest's EPT.
    pub fn flush_ept(&self) {
        if let Some(ept) = &self.ept {
            let _ = vmx::invept(1, [ept.pointer(), 0]);
        }
    }
}

/// Skips the instruction that exited.
#[inline]
pub fn advance() {
    vmx::write(f::GUEST_RIP, vmx::read(f::GUEST_RIP) + vmx::read(f::EXIT_INSTRUCTION_LENGTH));
}

/// Whether reading and writing an MSR exits, by the guest's MSR bitmap (SDM "MSR-Bitmap Address": reads of low MSRs, reads of
/// high ones, writes of low ones, writes of high ones, 1 KiB each).
pub fn intercept(msr: u32, reads: bool, writes: bool) {
    // SAFETY: the bitmap is a page of the kit's pool that only the processor reads.
    let bitmap = unsafe { pages::at(vmx::read(f::MSR_BITMAP)) };
    let bit = (msr & 0x1FFF) as usize + if msr >= 0xC000_0000 { 0x2000 } else { 0 };
    for (bit, on) in [(bit, reads), (bit + 0x4000, writes)] {
        if on {
            bitmap[bit / 64] |= 1 << (bit % 64);
        } else {
            bitmap[bit / 64] &= !(1 << (bit % 64));
        }
    }
}

/// The rows that tell what a bracket itself costs, in the image and in a guest.
///
/// # Errors
/// If there cannot be a guest.
pub fn calibrate() -> Result<(), Stop> {
    record::native("empty", 1, |_| {});
    Vm::with_ept(&plain())?.row("empty", 1, |_| {}, &mut |_, _| false)
}

/// Answers a CPUID exit as the CPU answers, without asking it: a hypervisor that is nested pays for its own CPUID.
pub fn answer_cpuid(vm: &mut Vm, answer: [u32; 4]) {
    let registers = &mut *vm.vcpu.registers;
    let [a, b, c, d] = answer.map(u64::from);
    (registers.rax, registers.rbx, registers.rcx, registers.rdx) = (a, b, c, d);
    advance();
}

/// EBX and ECX of CPUID leaf 7, which older CPUs do not have: extended features.
pub fn extended_features() -> (u32, u32) {
    let [_, b, c, _] = if cpu::cpuid(0, 0)[0] >= 7 { cpu::cpuid(7, 0) } else { [0; 4] };
    (b, c)
}

/// Answers RDTSC.
pub fn answer_rdtsc(vm: &mut Vm) {
    vm.vcpu.registers.set_edx_eax(cpu::rdtsc());
    advance();
}
