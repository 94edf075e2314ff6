//! What an exit saves, what it loads, and what a guest sees of control registers and time (SDM "Saving Guest
//! State", "Loading Host State", "VM-Execution Control Fields").

use crate::guest::{Exit, Guest};
use core::arch::asm;
use l2_kit::{
    Check, caps,
    cpu::{self, CR0_AM, CR4_TSD, CR4_VMXE, CSTAR, EFER, FS_BASE, GS_BASE, LSTAR, PAT},
    fields as f, pages,
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, entry_controls as entry, exit_controls as exit, primary, secondary},
    vmx,
    vmx::reason as r,
};

const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const DEFAULT_PAT: u64 = 0x0007_0406_0007_0406;

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls {
        secondary: secondary::EPT,
        exit: exit::SAVE_DEBUG,
        entry: entry::LOAD_DEBUG,
        ..Controls::default()
    })?;
    saved_and_loaded(&mut guest);
    pat_and_efer(&mut guest);
    msr_lists(&mut guest);
    masks(&mut guest);
    cr3_targets(&mut guest);
    time(&mut guest);
    scaled_time(&mut guest);
    Ok(())
}

extern "C" fn change_everything(_: u64) -> u64 {
    cpu::wrmsr(SYSENTER_CS, 0x1111);
    cpu::wrmsr(SYSENTER_ESP, 0x2222);
    cpu::wrmsr(SYSENTER_EIP, 0x3333);
    cpu::wrmsr(FS_BASE, 0x4444);
    cpu::wrmsr(GS_BASE, 0xFFFF_8000_0000_5555);
    cpu::set_dr7(0x700);
    cpu::set_cr4(cpu::cr4() | CR4_TSD);
    // SAFETY: flat segments; the null selector is never used.
    unsafe {
        asm!("mov ds, {0:e}", "mov es, {1:e}", in(reg) 0, in(reg) u32::from(l2_kit::descriptors::KERNEL_DATA));
    }
    5
}

fn saved_and_loaded(guest: &mut Guest) {
    let (fs, gs) = (cpu::rdmsr(FS_BASE), cpu::rdmsr(GS_BASE));
    let result = guest.execute(change_everything, 0);
    let own = [SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP].map(cpu::rdmsr);
    let bases = (cpu::rdmsr(FS_BASE), cpu::rdmsr(GS_BASE)) == (fs, gs);
    Check::new(&mut Serial, "an exit loads host state")
        .expect("result", result, Exit::Done(5))
        .expect("sysenter_cs", own[0], 0)
        .expect("sysenter_esp", own[1], 0)
        .expect("sysenter_eip", own[2], 0)
        .expect("bases", bases, true)
        .expect("dr7", Hex(cpu::dr7()), Hex(0x400))
        .expect("tsd", cpu::cr4() & CR4_TSD, 0)
        .end();
    let field = |field| Hex(vmx::read(field));
    Check::new(&mut Serial, "an exit saves guest state")
        .expect("sysenter_cs", field(f::GUEST_SYSENTER_CS), Hex(0x1111))
        .expect("sysenter_esp", field(f::GUEST_SYSENTER_ESP), Hex(0x2222))
        .expect("sysenter_eip", field(f::GUEST_SYSENTER_EIP), Hex(0x3333))
        .expect("fs_base", field(f::GUEST_FS_BASE), Hex(0x4444))
        .expect("gs_base", field(f::GUEST_GS_BASE), Hex(0xFFFF_8000_0000_5555))
        .expect("dr7", field(f::GUEST_DR7), Hex(0x700))
        .expect("cr4_tsd", Hex(vmx::read(f::GUEST_CR4) & CR4_TSD), Hex(CR4_TSD))
        .expect("ds", field(f::GUEST_DS), Hex(0))
        .expect("ds_unusable", vmx::read(f::GUEST_DS_AR) >> 16 & 1, 1)
        .expect("es", field(f::GUEST_ES), Hex(l2_kit::descriptors::KERNEL_DATA.into()))
        .fact("es_rights", field(f::GUEST_ES_AR))
        .fact("es_limit", field(f::GUEST_ES_LIMIT))
        .fact("cs_rights", field(f::GUEST_CS_AR))
        .fact("tr_rights", field(f::GUEST_TR_AR))
        .fact("gdtr_limit", field(f::GUEST_GDTR_LIMIT))
        .fact("idtr_limit", field(f::GUEST_IDTR_LIMIT))
        .fact("debugctl", field(f::GUEST_DEBUGCTL))
        .end();
    setup::write_guest_state(guest.cr3, true);
}

extern "C" fn change_pat_and_efer(_: u64) -> u64 {
    let seen = cpu::rdmsr(PAT);
    cpu::wrmsr(PAT, DEFAULT_PAT & !0xFF);
    cpu::wrmsr(EFER, cpu::rdmsr(EFER) | 1);
    seen
}

fn pat_and_efer(guest: &mut Guest) {
    let exits = exit::SAVE_PAT | exit::LOAD_PAT | exit::SAVE_EFER | exit::LOAD_EFER;
    let entries = entry::LOAD_PAT | entry::LOAD_EFER;
    let mut out = Serial;
    let check = Check::new(&mut out, "PAT and EFER");
    if !setup::allowed_one(Kind::Exit, exits) || !setup::allowed_one(Kind::Entry, entries) {
        check.fact("offered", false).end();
        return;
    }
    let old = [f::EXIT_CONTROLS, f::ENTRY_CONTROLS].map(|field| (field, vmx::read(field)));
    let (pat, efer) = (cpu::rdmsr(PAT), cpu::rdmsr(EFER));
    vmx::write(f::EXIT_CONTROLS, old[0].1 | u64::from(exits));
    vmx::write(f::ENTRY_CONTROLS, old[1].1 | u64::from(entries));
    vmx::write(f::HOST_PAT, pat);
    vmx::write(f::HOST_EFER, efer);
    vmx::write(f::GUEST_PAT, DEFAULT_PAT & !0xFF00);
    vmx::write(f::GUEST_EFER, efer);
    let result = guest.execute(change_pat_and_efer, 0);
    check
        .expect("guest_sees", result, Exit::Done(DEFAULT_PAT & !0xFF00))
        .expect("saved_pat", Hex(vmx::read(f::GUEST_PAT)), Hex(DEFAULT_PAT & !0xFF))
        .expect("saved_efer", Hex(vmx::read(f::GUEST_EFER)), Hex(efer | 1))
        .expect("own_pat", cpu::rdmsr(PAT) == pat, true)
        .expect("own_efer", cpu::rdmsr(EFER) == efer, true)
        .end();
    for (field, value) in old {
        vmx::write(field, value);
    }
}

extern "C" fn change_lstar(_: u64) -> u64 {
    let seen = cpu::rdmsr(LSTAR);
    cpu::wrmsr(LSTAR, 0x2000);
    seen
}

/// The three lists: stored at the exit, loaded at the exit, loaded at the entry.
fn msr_lists(guest: &mut Guest) {
    let list = pages::page();
    list[..8].copy_from_slice(&[LSTAR.into(), 0, CSTAR.into(), 0, LSTAR.into(), 0x3000, LSTAR.into(), 0x1000]);
    let at = pages::address(list);
    let fields = [
        (f::EXIT_MSR_STORE_ADDR, at),
        (f::EXIT_MSR_STORE_COUNT, 2),
        (f::EXIT_MSR_LOAD_ADDR, at + 32),
        (f::EXIT_MSR_LOAD_COUNT, 1),
        (f::ENTRY_MSR_LOAD_ADDR, at + 48),
        (f::ENTRY_MSR_LOAD_COUNT, 1),
    ];
    for (field, value) in fields {
        vmx::write(field, value);
    }
    cpu::wrmsr(CSTAR, 0x4000);
    let result = guest.execute(change_lstar, 0);
    // SAFETY: our page; the CPU has written to it behind the compiler's back.
    let (stored, other) = unsafe {
        let words = at as *const u64;
        (words.add(1).read_volatile(), words.add(3).read_volatile())
    };
    Check::new(&mut Serial, "MSR lists")
        .expect("entry_loads", result, Exit::Done(0x1000))
        .expect("exit_stores", Hex(stored), Hex(0x2000))
        .expect("exit_stores_second", Hex(other), Hex(0x4000))
        .expect("exit_loads", Hex(cpu::rdmsr(LSTAR)), Hex(0x3000))
        .end();
    for (field, _) in fields {
        vmx::write(field, 0);
    }
    cpu::wrmsr(CSTAR, 0);
    cpu::wrmsr(LSTAR, 0);
}

extern "C" fn read_cr0(_: u64) -> u64 {
    cpu::cr0()
}

extern "C" fn read_cr4(_: u64) -> u64 {
    cpu::cr4()
}

/// Writes what it reads: no exit, whatever the mask.
extern "C" fn rewrite(_: u64) -> u64 {
    cpu::set_cr0(cpu::cr0());
    cpu::set_cr4(cpu::cr4());
    5
}

extern "C" fn set_am(_: u64) -> u64 {
    cpu::set_cr0(cpu::cr0() | CR0_AM);
    cpu::cr0() & CR0_AM
}

fn masks(guest: &mut Guest) {
    let (cr0, cr4) = (vmx::read(f::GUEST_CR0), vmx::read(f::GUEST_CR4));
    vmx::write(f::CR0_MASK, CR0_AM);
    vmx::write(f::CR0_SHADOW, CR0_AM);
    vmx::write(f::CR4_MASK, CR4_VMXE);
    vmx::write(f::CR4_SHADOW, 0);
    let seen = (guest.execute(read_cr0, 0), guest.execute(read_cr4, 0));
    let rewritten = guest.execute(rewrite, 0);
    vmx::write(f::CR0_SHADOW, 0);
    let refused = guest.execute(set_am, 0);
    vmx::write(f::CR0_MASK, 0);
    let own = guest.execute(set_am, 0);
    Check::new(&mut Serial, "masks and shadows of control registers")
        .expect("cr0", seen.0, Exit::Done(cr0 | CR0_AM))
        .expect("cr4", seen.1, Exit::Done(cr4 & !CR4_VMXE))
        .expect("rewritten", rewritten, Exit::Done(5))
        .expect("masked", matches!(refused, Exit::Reason(r::CR_ACCESS, q) if q & 0x3F == 0), true)
        .expect("not_masked", own, Exit::Done(CR0_AM))
        .expect("saved_am", vmx::read(f::GUEST_CR0) & CR0_AM, CR0_AM)
        .end();
    vmx::write(f::GUEST_CR0, cr0);
    vmx::write(f::CR4_MASK, 0);
}

extern "C" fn write_cr3(value: u64) -> u64 {
    cpu::set_cr3(value);
    5
}

fn cr3_targets(guest: &mut Guest) {
    let exiting = u64::from(primary::CR3_LOAD);
    let old = vmx::read(f::PRIMARY_CONTROLS);
    let targets = caps::get(setup::VMX_MISC) >> 16 & 0x1FF;
    let mut out = Serial;
    let check = Check::new(&mut out, "CR3 targets");
    if targets == 0 {
        check.fact("offered", false).end();
        return;
    }
    vmx::write(f::PRIMARY_CONTROLS, old | exiting);
    let exits = guest.execute(write_cr3, guest.cr3);
    vmx::write(f::CR3_TARGET_COUNT, 1);
    vmx::write(f::CR3_TARGET0, guest.cr3);
    let target = guest.execute(write_cr3, guest.cr3);
    vmx::write(f::CR3_TARGET0, guest.cr3 + 0x1000);
    let other = guest.execute(write_cr3, guest.cr3);
    vmx::write(f::CR3_TARGET_COUNT, 0);
    vmx::write(f::PRIMARY_CONTROLS, old);
    let is_exit = |exit| matches!(exit, Exit::Reason(r::CR_ACCESS, q) if q & 0x3F == 3);
    check
        .expect("no_target", is_exit(exits), true)
        .expect("target", target, Exit::Done(5))
        .expect("another_target", is_exit(other), true)
        .end();
}

extern "C" fn read_time(_: u64) -> u64 {
    cpu::rdtsc()
}

fn time(guest: &mut Guest) {
    const OFFSET: u64 = 1 << 50;
    let old = vmx::read(f::PRIMARY_CONTROLS);
    vmx::write(f::PRIMARY_CONTROLS, old | u64::from(primary::TSC_OFFSET));
    vmx::write(f::TSC_OFFSET, OFFSET);
    let before = cpu::rdtsc();
    let seen = match guest.execute(read_time, 0) {
        Exit::Done(time) => time,
        _ => 0,
    };
    let after = cpu::rdtsc();
    vmx::write(f::PRIMARY_CONTROLS, old);
    let between = (before..=after).contains(&seen.wrapping_sub(OFFSET));
    Check::new(&mut Serial, "TSC offset").expect("between", between, true).end();
}

/// With scaling the guest sees (TSC * multiplier >> 48) + offset, if TSC offsetting is on as well; else scaling does nothing
/// (SDM "Changes to Instruction Behavior in VMX Non-Root Operation": RDTSC).
fn scaled_time(guest: &mut Guest) {
    if !setup::allowed_one(Kind::Secondary, secondary::TSC_SCALING) {
        Check::new(&mut Serial, "TSC scaling").fact("offered", false).end();
        return;
    }
    let [old_primary, old_secondary] = [f::PRIMARY_CONTROLS, f::SECONDARY_CONTROLS].map(vmx::read);
    let offsetting = old_primary | u64::from(primary::TSC_OFFSET);
    vmx::write(f::SECONDARY_CONTROLS, old_secondary | u64::from(secondary::TSC_SCALING));
    for (name, multiplier, offset, primary) in [
        ("1", 1 << 48, 0, offsetting),
        ("1 and an offset", 1 << 48, 1 << 50, offsetting),
        ("2", 2 << 48, 0, offsetting),
        ("1/2", 1 << 47, 0, offsetting),
        ("3/4 and an offset below 0", 3 << 46, !0xFFF, offsetting),
        ("1/65536", 1 << 32, 0, offsetting),
        ("almost 0", 1, 7, offsetting),
        ("65536 less a little", !0, 0, offsetting),
        ("2 without offsetting", 2 << 48, 1 << 50, old_primary),
    ] {
        vmx::write(f::PRIMARY_CONTROLS, primary);
        vmx::write(f::TSC_MULTIPLIER, multiplier);
        vmx::write(f::TSC_OFFSET, offset);
        let seen = |time: u64| match primary == offsetting {
            true => (((u128::from(time) * u128::from(multiplier)) >> 48) as u64).wrapping_add(offset),
            false => time,
        };
        for (instruction, program) in [("RDTSC", read_time as crate::guest::Program), ("RDMSR", read_time_msr)] {
            let before = cpu::rdtsc();
            let result = guest.execute(program, 0);
            let after = cpu::rdtsc();
            let time = if let Exit::Done(time) = result { time } else { 0 };
            let passed = seen(after).wrapping_sub(seen(before));
            Check::new(&mut Serial, format_args!("TSC multiplier {name}: {instruction}"))
                .expect("done", matches!(result, Exit::Done(_)), true)
                .expect("between", time.wrapping_sub(seen(before)) <= passed, true)
                .end();
        }
    }
    vmx::write(f::TSC_MULTIPLIER, 0);
    let refused = guest.execute(read_time, 0);
    vmx::write(f::SECONDARY_CONTROLS, old_secondary);
    let not_used = guest.execute(crate::guest::nothing, 5);
    vmx::write(f::TSC_OFFSET, 0);
    vmx::write(f::PRIMARY_CONTROLS, old_primary);
    Check::new(&mut Serial, "TSC multiplier 0")
        .expect("used", refused, Exit::Refused(vmx::Outcome::FailValid(7)))
        .expect("not_used", not_used, Exit::Done(5))
        .end();
}

extern "C" fn read_time_msr(_: u64) -> u64 {
    cpu::rdmsr(0x10)
}
