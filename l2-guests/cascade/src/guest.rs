//! The virtual machine of a guest: its VMCS, EPT and bitmaps.

use crate::{
    events::Who,
    payload::{MSR_INTERCEPTED, PORT_INTERCEPTED},
};
use l2_kit::{
    arrayvec::ArrayString,
    cpu::{self, CR0_AM, CR4_TSD},
    ept::{Ept, rights},
    fields as f,
    pages::{self, LARGE, PAGE},
    setup::{self, Controls, Kind, Missing, entry_controls, exit_controls, pin, primary, secondary},
    trap,
    vcpu::Vcpu,
    vmx,
};

/// Where a guest starts: its arguments are text and a number.
pub type Program = extern "C" fn(&'static &'static str, u64) -> !;

/// A virtual machine.
pub struct Guest {
    /// Its virtual CPU
    pub vcpu: Vcpu,
    /// Its VPID, 0 if the CPU has none
    pub vpid: u16,
    /// Its physical memory
    pub ept: Ept,
}

const STACK: u64 = 64 << 10;

/// Whether the CPU lets a guest be exited by the preemption timer.
pub fn has_timer() -> bool {
    setup::allowed_one(Kind::Pin, pin::PREEMPTION_TIMER)
}

/// Whether a guest's writes of CR8 can do without exits.
pub fn has_tpr_shadow() -> bool {
    setup::allowed_one(Kind::Primary, primary::TPR_SHADOW)
}

fn has_vpid() -> bool {
    setup::allowed_one(Kind::Secondary, secondary::VPID)
}

fn has_efer() -> bool {
    setup::allowed_one(Kind::Entry, entry_controls::LOAD_EFER)
        && setup::allowed_one(Kind::Exit, exit_controls::LOAD_EFER | exit_controls::SAVE_EFER)
}

/// What cascade uses of the CPU, for its first record; empty without VMX.
pub fn features() -> ArrayString<64> {
    let mut text = ArrayString::new();
    if cpu::cpuid(1, 0)[2] & 1 << 5 != 0 {
        let has_ept = setup::allowed_one(Kind::Secondary, secondary::EPT);
        for (has, name) in [(has_ept, "ept"), (has_vpid(), "vpid"), (has_timer(), "timer"), (has_efer(), "efer")] {
            if has {
                let _ = text.try_push_str(if text.is_empty() { "" } else { " " });
                let _ = text.try_push_str(name);
            }
        }
    }
    text
}

impl Guest {
    /// A guest that will run a program in 64-bit mode with page tables and a stack of its own. Its VMCS is the current one.
    ///
    /// # Errors
    /// What the CPU lacks.
    pub fn new(
        who: Who,
        vpid: u16,
        ept: Ept,
        program: Program,
        greeting: &'static &'static str,
    ) -> Result<Self, Missing> {
        let vpid = if has_vpid() { vpid } else { 0 };
        let vcpu = Vcpu::new(setup::revision()).map_err(|o| Missing::Instruction("VMCLEAR or VMPTRLD", o))?;
        setup::write_controls(&controls(who, vpid))?;
        setup::write_host_state();
        // No IDT: a fault that nobody intercepts ends the guest by a triple fault, which the hypervisor sees.
        setup::write_guest_state(pages::identity_tables(pages::Access::Kernel), false);
        let (io, msr) = (io_bitmaps(), msr_bitmap());
        let stack = pages::take(STACK, PAGE) + STACK - 8;
        for (field, value) in [
            (f::EPTP, ept.pointer()),
            (f::IO_BITMAP_A, io),
            (f::IO_BITMAP_B, io + PAGE),
            (f::MSR_BITMAP, msr),
            (f::EXCEPTION_BITMAP, 1 << trap::UD),
            (f::GUEST_RIP, program as *const () as u64),
            (f::GUEST_RSP, stack),
        ] {
            vmx::write(field, value);
        }
        if vpid != 0 {
            vmx::write(f::VPID, vpid.into());
        }
        if who == Who::Plain && has_tpr_shadow() {
            vmx::write(f::VIRTUAL_APIC, pages::address(pages::page()));
            vmx::write(f::TPR_THRESHOLD, 0);
        }
        if who == Who::Strict {
            for (field, value) in [
                (f::CR0_MASK, CR0_AM),
                (f::CR0_SHADOW, vmx::read(f::GUEST_CR0)),
                (f::CR4_MASK, CR4_TSD),
                (f::CR4_SHADOW, vmx::read(f::GUEST_CR4)),
            ] {
                vmx::write(field, value);
            }
        }
        vcpu.registers.rdi = core::ptr::from_ref(greeting) as u64;
        vcpu.registers.rsi = who as u64;
        Ok(Self { vcpu, vpid, ept })
    }
}

fn controls(who: Who, vpid: u16) -> Controls {
    let efer = has_efer();
    let own = match who {
        Who::Strict => primary::RDTSC | primary::CR3_LOAD | primary::CR8_LOAD,
        Who::Plain if has_tpr_shadow() => primary::TPR_SHADOW,
        Who::Plain => 0,
    };
    Controls {
        pin: pin::EXTERNAL_INTERRUPT,
        primary: primary::HLT | primary::IO_BITMAPS | primary::MSR_BITMAPS | own,
        secondary: secondary::EPT | if vpid != 0 { secondary::VPID } else { 0 },
        exit: exit_controls::ACKNOWLEDGE
            | exit_controls::SAVE_DEBUG
            | if efer { exit_controls::SAVE_EFER | exit_controls::LOAD_EFER } else { 0 },
        entry: entry_controls::IA32E | entry_controls::LOAD_DEBUG | if efer { entry_controls::LOAD_EFER } else { 0 },
    }
}

/// Two pages: ports 0 to 0x7FFF and the rest. COM1 exits as well: the guest speaks through its hypervisor.
fn io_bitmaps() -> u64 {
    let at = pages::take(2 * PAGE, PAGE);
    // SAFETY: fresh memory.
    let low = unsafe { pages::at(at) };
    for port in core::iter::once(PORT_INTERCEPTED).chain(0x3F8..0x400) {
        low[usize::from(port) / 64] |= 1 << (port % 64);
    }
    at
}

/// One page of four parts: reads of low and of high MSRs, writes of low and of high ones.
fn msr_bitmap() -> u64 {
    let bitmap = pages::page();
    let high = (MSR_INTERCEPTED & 0x1FFF) as usize;
    for part in [1, 3] {
        bitmap[part * 128 + high / 64] |= 1 << (high % 64);
    }
    pages::address(bitmap)
}

/// Physical memory for guests: everything as it is, but `hole` missing and `fresh` in small pages that nobody touched yet.
pub fn memory(hole: u64, fresh: u64) -> Ept {
    let ept = Ept::identity();
    for page in (0..LARGE).step_by(PAGE as usize) {
        ept.unmap(hole + page, PAGE);
        ept.map(fresh + page, PAGE, rights::RWX);
    }
    ept
}
