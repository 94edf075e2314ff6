//! A guest's copy-on-write after a "fork", without and with a hypercall that announces the coming write.
//!
//! Mechanism: SDM "Memory Virtualization", "Page-Fault Error Codes" and "Exceptions and VM Exits" (the mask and match that
//! decide which #PF exit). Under shadow page tables a copy-on-write fault exits as #PF, then INVLPG exits, then the access
//! faults again since the shadow has no entry. With the mask, faults on pages that are present go to the guest directly. The
//! hypercall takes INVLPG's place and lets the hypervisor fill the entry at once. Under EPT nothing of this exits, unless the
//! hypervisor write-protects the guest's page tables and new frames, as one does that tracks them.

use crate::{
    kernel::{self, ANNOUNCE, ANNOUNCES, FAULTS, FRAMES, PAGES, PHASE, copy_on_write, fork_and_write, frame, leaf},
    record::{self, Fact, Stop, WARM_UP},
    shadow::{self, Filled, Shadow},
    store::emulate,
    vm::{Handler, Vm, advance, plain},
};
use l2_kit::{
    ept::rights,
    fields as f,
    pages::PAGE,
    vmx::{self, reason as r},
};

const EVENTS: u64 = PAGES / 4;

pub fn run() -> Result<(), Stop> {
    for announces in [false, true] {
        ANNOUNCES.set(announces);
        let name = |plain, announced| if announces { announced } else { plain };
        with_shadow(name("shadow", "shadow_call"), false)?;
        with_shadow(name("filtered", "filtered_call"), true)?;
        with_ept(name("tracked", "tracked_call"), true)?;
        if !announces {
            with_ept("ept", false)?;
        }
    }
    Ok(())
}

/// Runs the fork and prints how many of its exits came after the fork itself, when the parent wrote.
/// `prepare` comes before the fork that is measured.
fn measure(vm: &mut Vm, name: &str, prepare: &dyn Fn(&Vm), handler: Handler<'_>) -> Result<(), Stop> {
    let count = record::events(EVENTS);
    let mut in_phase = [0u64; 3];
    vm.run(WARM_UP, 0, fork_and_write, handler)?;
    prepare(vm);
    FAULTS.set(0);
    vm.run(count, 0, fork_and_write, &mut |vm, reason| {
        in_phase[PHASE.get()] += 1;
        handler(vm, reason)
    })?;
    let facts: [Fact; 2] = [("faults", FAULTS.get()), ("write_exits", in_phase[2])];
    record::row(name, "l3", count, &vm.bracket, &facts);
    Ok(())
}

/// `filtered`: only faults on pages that are not present exit.
fn with_shadow(name: &str, filtered: bool) -> Result<(), Stop> {
    let mut vm = Vm::new(&shadow::controls(plain()), None)?;
    kernel::boot(vm.cr3, copy_on_write);
    let mut shadow = Shadow::new(&mut vm, filtered);
    if filtered {
        vmx::write(f::PF_ERROR_MASK, 1);
        vmx::write(f::PF_ERROR_MATCH, 0);
    }
    measure(&mut vm, name, &|_| {}, &mut |vm, reason| {
        if reason != r::VMCALL || vm.vcpu.registers.rax != ANNOUNCE {
            return shadow.handle(vm, reason);
        }
        let (linear, entry) = (vm.vcpu.registers.rbx, vm.vcpu.registers.rcx);
        set_guest_entry(linear, entry);
        shadow.forget(vm, linear);
        let filled = shadow.fill(linear, true) == Filled::Yes;
        advance();
        filled
    })
}

/// `tracked`: the hypervisor hears of changes of the last-level page table and of each new frame.
fn with_ept(name: &str, tracked: bool) -> Result<(), Stop> {
    let mut vm = Vm::with_ept(&plain())?;
    vmx::write(f::GUEST_CR0, vmx::read(f::GUEST_CR0) | shadow::CR0_WP);
    kernel::boot(vm.cr3, copy_on_write);
    let table = leaf(kernel::AREA) & !(PAGE - 1);
    let protect_frames = |vm: &Vm| {
        if let (Some(ept), true) = (&vm.ept, tracked) {
            (0..PAGES).for_each(|page| ept.map(frame(page, true), PAGE, rights::R | rights::X));
            vm.flush_ept();
        }
    };
    if let (Some(ept), true) = (&vm.ept, tracked) {
        ept.map(table, PAGE, rights::R | rights::X);
    }
    let open = |vm: &Vm, page: u64| {
        if let Some(ept) = &vm.ept {
            ept.map(page, PAGE, rights::RWX);
        }
    };
    let handler: Handler<'_> = &mut |vm, reason| {
        let registers = &vm.vcpu.registers;
        match reason {
            r::VMCALL if registers.rax == ANNOUNCE => {
                set_guest_entry(registers.rbx, registers.rcx);
                open(vm, registers.rcx & !(PAGE - 1));
                vm.flush(Some(registers.rbx));
                advance();
                true
            }
            r::EPT_VIOLATION => {
                let page = vmx::read(f::GUEST_PHYSICAL_ADDRESS) & !(PAGE - 1);
                if page == table {
                    let Some((at, entry)) = emulate(vm) else { return false };
                    // SAFETY: the guest's page table, which this image made.
                    unsafe { (at as *mut u64).write_volatile(entry) };
                } else if (FRAMES.get()..FRAMES.get() + 2 * PAGES * PAGE).contains(&page) {
                    open(vm, page);
                } else {
                    return false;
                }
                true
            }
            _ => false,
        }
    };
    // The warm-up opens frames that the measured fork must find protected.
    measure(&mut vm, name, &protect_frames, handler)
}

fn set_guest_entry(linear: u64, entry: u64) {
    // SAFETY: the guest's page table, which this image made.
    unsafe { (leaf(linear) as *mut u64).write_volatile(entry) };
}
