//! What the machine itself must do for guest hypervisors, and what emulators got wrong: the TSC that is stored, 5-level paging
//! that entries and exits switch, and, on the bare machine, the local APIC that is disabled and enabled again.

use crate::guest::{Exit, Guest, nothing};
use l2_kit::{
    Check, apic, caps, cpu, fields as f,
    identity::Slot,
    pages::{self, Access},
    protocol::Hex,
    report,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, primary, secondary},
    vmx,
};

const TSC: u32 = 0x10;
const APIC_BASE: u32 = 0x1B;
const APIC_ENABLED: u64 = 1 << 11;
const APIC_EXTENDED: u64 = 1 << 10;
const CR4_FIXED1: u32 = 0x489;
const LA57: u64 = 1 << 12;
/// An address that is canonical with five levels only.
const WIDE: u64 = 0xFF11_0000_0000_1000;
/// A system-management interrupt by software, of chipsets with this port.
const SMI_PORT: u16 = 0xB2;

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    stored_tsc(&mut guest);
    five_levels(&mut guest);
    if Slot::find() == Slot::Bare {
        apic_again();
    }
    Ok(())
}

/// The offset is the guest's: RDTSC and RDMSR add it, and a VM exit stores the counter without it.
fn stored_tsc(guest: &mut Guest) {
    if !setup::allowed_one(Kind::Primary, primary::TSC_OFFSET) {
        Check::new(&mut Serial, "a stored TSC").fact("offered", false).end();
        return;
    }
    extern "C" fn read(_: u64) -> u64 {
        cpu::rdtsc()
    }
    const OFFSET: u64 = 1 << 52;
    let area = pages::page();
    area[0] = u64::from(TSC);
    let old = vmx::read(f::PRIMARY_CONTROLS);
    for (field, value) in [
        (f::PRIMARY_CONTROLS, old | u64::from(primary::TSC_OFFSET)),
        (f::TSC_OFFSET, OFFSET),
        (f::EXIT_MSR_STORE_ADDR, pages::address(area)),
        (f::EXIT_MSR_STORE_COUNT, 1),
    ] {
        vmx::write(field, value);
    }
    let before = cpu::rdtsc();
    let exit = guest.execute(read, 0);
    let after = cpu::rdtsc();
    let seen = if let Exit::Done(seen) = exit { seen } else { 0 };
    // SAFETY: the page is this part's.
    let stored = unsafe { pages::at(pages::address(area)) }[1];
    vmx::write(f::EXIT_MSR_STORE_COUNT, 0);
    vmx::write(f::PRIMARY_CONTROLS, old);
    Check::new(&mut Serial, "a stored TSC")
        .expect("guest_sees_offset", (before..after).contains(&seen.wrapping_sub(OFFSET)), true)
        .expect("stored_without_it", (before..after).contains(&stored), true)
        .end();
}

/// Exits and entries that change CR4.LA57 in 64-bit mode, and system management in between.
fn five_levels(guest: &mut Guest) {
    if caps::get(CR4_FIXED1) & LA57 == 0 || cpu::cpuid(7, 0)[2] & 1 << 16 == 0 {
        Check::new(&mut Serial, "5-level paging").fact("offered", false).end();
        return;
    }
    let root = |four: u64| {
        let five = pages::page();
        five[0] = four | 3;
        pages::address(five)
    };
    let old = [f::HOST_CR4, f::HOST_CR3, f::GUEST_CR4, f::GUEST_CR3].map(|field| (field, vmx::read(field)));
    let (own_root, guest_root) = (root(cpu::cr3()), root(pages::identity_tables(Access::Kernel)));
    // A GS base and an MSR that are canonical for the guest's five levels, and not for the four of the hypervisor.
    let wide = [f::GUEST_GS_BASE, f::GUEST_SYSENTER_EIP].map(|field| (field, vmx::read(field)));
    vmx::write(f::GUEST_CR4, old[2].1 | LA57);
    vmx::write(f::GUEST_CR3, guest_root);
    wide.iter().for_each(|(field, _)| vmx::write(*field, WIDE));
    let exit = guest.execute(nothing, 9);
    let kept = wide.iter().all(|(field, _)| vmx::read(*field) == WIDE);
    old.iter().chain(&wide).for_each(|(field, value)| vmx::write(*field, *value));
    let msr = cpu::rdmsr(cpu::LSTAR);
    let written = cpu::try_wrmsr(cpu::LSTAR, WIDE).is_ok() && cpu::rdmsr(cpu::LSTAR) == WIDE;
    let refused = cpu::try_wrmsr(cpu::LSTAR, 1 << 60).is_err();
    cpu::wrmsr(cpu::LSTAR, msr);
    Check::new(&mut Serial, "addresses of 57 bits")
        .expect("result", exit, Exit::Done(9))
        .expect("kept", kept, true)
        .expect("written", written, true)
        .expect("refused", refused, true)
        .end();
    for (name, own, its) in [("of the hypervisor", true, false), ("of the guest", false, true), ("of both", true, true)]
    {
        if own {
            vmx::write(f::HOST_CR4, old[0].1 | LA57);
            vmx::write(f::HOST_CR3, own_root);
        }
        if its {
            vmx::write(f::GUEST_CR4, old[2].1 | LA57);
            vmx::write(f::GUEST_CR3, guest_root);
        }
        let exit = guest.execute(smi, 5);
        let cr4 = cpu::cr4();
        let alive = smi(6);
        let again = guest.execute(nothing, 7);
        // Back: what this image is used to.
        old.iter().for_each(|(field, value)| vmx::write(*field, *value));
        let back = guest.execute(nothing, 8);
        Check::new(&mut Serial, format_args!("5-level paging {name}"))
            .expect("result", exit, Exit::Done(5))
            .expect("own_cr4", Hex(cr4 & LA57), Hex(if own { LA57 } else { 0 }))
            .expect("alive", alive, 6)
            .expect("again", again, Exit::Done(7))
            .expect("back", back, Exit::Done(8))
            .expect("cr4", Hex(cpu::cr4() & LA57), Hex(0))
            .end();
    }
}

/// Into system management and back.
extern "C" fn smi(argument: u64) -> u64 {
    cpu::out8(SMI_PORT, 0);
    argument
}

/// Disabled, the CPU has no local APIC; enabled again, it has. Nothing is printed: hypervisors need not offer it.
fn apic_again() {
    let base = cpu::rdmsr(APIC_BASE);
    let offered = || cpu::cpuid(1, 0)[3] >> 9 & 1;
    if base & APIC_EXTENDED != 0 || offered() == 0 {
        return;
    }
    cpu::wrmsr(APIC_BASE, base & !APIC_ENABLED);
    let disabled = (cpu::rdmsr(APIC_BASE) & APIC_ENABLED, offered());
    let skips = cpu::cpuid(1, 0)[2] >> 21 & 1 != 0 && cpu::try_wrmsr(APIC_BASE, base | APIC_EXTENDED).is_ok();
    cpu::wrmsr(APIC_BASE, base);
    let enabled = (cpu::rdmsr(APIC_BASE), offered());
    apic::init();
    let ((), seen) = crate::injection::noting(0x61, || {
        apic::send_self(0x61);
        // SAFETY: the handler returns.
        unsafe { core::arch::asm!("sti", "nop", "nop", "cli") };
    });
    apic::eoi();
    for (wrong, what) in [
        (disabled != (0, 0), "a local APIC that is disabled is still there"),
        (skips, "a local APIC gets from disabled to x2APIC mode at once"),
        (enabled != (base, 1), "a local APIC that is enabled again is not there"),
        (seen.count != 1, "a local APIC that was enabled again sends no interrupt"),
    ] {
        if wrong {
            report::fail(format_args!("{what}"));
        }
    }
}
