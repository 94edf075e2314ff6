//! State that entries and exits load by controls of its own, and that an exit without them leaves as it is: CET, IA32_PKRS,
//! UINV and IA32_PERF_GLOBAL_CTRL (SDM "Loading Guest State", "Saving Guest State", "Loading Host State"). The exit saves all of it
//! in any case, but for the last one.

use crate::{
    entries::{
        Change::{Off, On, Set},
        try_with,
    },
    guest::{Exit, Guest},
};
use core::{
    arch::asm,
    ptr,
    sync::atomic::{AtomicU64, Ordering},
};
use l2_kit::{
    Check, caps,
    cpu::{self, CR4_PAE},
    fields as f, pages,
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, entry_controls as entry, exit_controls as exit, secondary},
    vmx::{self, Outcome},
};

const FEATURE_CONTROL: u32 = 0x3A;
const S_CET: u32 = 0x6A2;
const PL0_SSP: u32 = 0x6A4;
const SSP_TABLE: u32 = 0x6A8;
const PKRS: u32 = 0x6E1;
const UINTR_MISC: u32 = 0x988;
const PERF_GLOBAL_CTRL: u32 = 0x38F;
const LOAD_COUNTERS_ENTRY: u32 = 1 << 13;
const LOAD_COUNTERS_EXIT: u32 = 1 << 12;
const SAVE_COUNTERS: u32 = 1 << 30;
const UINV_SHIFT: u32 = 32;
const CR0_WP: u64 = 1 << 16;
const CR4_CET: u64 = 1 << 23;
const SHADOW_STACKS: u64 = 1 << 0;
/// Of a page table entry: present, accessed, dirty, and not writable, which makes a page of shadow stacks.
const SHADOW_STACK_PAGE: u64 = 0x61;
/// Where page tables map it.
const AT: u64 = 7 << 30;
const NOT_CANONICAL: u64 = 1 << 62;

/// An MSR that one pair of controls loads.
struct Item {
    name: &'static str,
    msr: u32,
    shift: u32,
    entry: u32,
    exit: u32,
    /// The control by which the exit saves it; 0: it always does.
    save: u32,
    guest: u32,
    /// `None`: the exit clears it.
    host: Option<u32>,
    /// Values of this hypervisor at the entry, of the two fields, and what the guest writes.
    values: [u64; 4],
}

const ITEMS: [Item; 5] = [
    Item {
        name: "S_CET",
        msr: S_CET,
        shift: 0,
        entry: entry::LOAD_CET,
        exit: exit::LOAD_CET,
        save: 0,
        guest: f::GUEST_S_CET,
        host: Some(f::HOST_S_CET),
        values: [0x1008, 0x2010, 0x3002, 0xFFFF_8000_0000_0020],
    },
    Item {
        name: "SSP table",
        msr: SSP_TABLE,
        shift: 0,
        entry: entry::LOAD_CET,
        exit: exit::LOAD_CET,
        save: 0,
        guest: f::GUEST_SSP_TABLE,
        host: Some(f::HOST_SSP_TABLE),
        values: [0x1000, 0x2000, 0xFFFF_8000_0000_3000, 0x4000],
    },
    Item {
        name: "PKRS",
        msr: PKRS,
        shift: 0,
        entry: entry::LOAD_PKRS,
        exit: exit::LOAD_PKRS,
        save: 0,
        guest: f::GUEST_PKRS,
        host: Some(f::HOST_PKRS),
        values: [0x11, 0x2222_2222, 0xFFFF_FFFF, 0x44],
    },
    Item {
        name: "UINV",
        msr: UINTR_MISC,
        shift: UINV_SHIFT,
        entry: entry::LOAD_UINV,
        exit: exit::CLEAR_UINV,
        save: 0,
        guest: f::GUEST_UINV,
        host: None,
        values: [0xE1, 0xE2, 0, 0xE4],
    },
    Item {
        name: "PERF_GLOBAL_CTRL",
        msr: PERF_GLOBAL_CTRL,
        shift: 0,
        entry: LOAD_COUNTERS_ENTRY,
        exit: LOAD_COUNTERS_EXIT,
        save: SAVE_COUNTERS,
        guest: f::GUEST_PERF_GLOBAL_CTRL,
        host: Some(f::HOST_PERF_GLOBAL_CTRL),
        values: [0x1, 0x1_0000_0002, 0x3, 0x2_0000_0000],
    },
];

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    for item in &ITEMS {
        if offered(item.entry, item.exit | item.save) && has(item) {
            for loads in 0..4 {
                switched(&mut guest, item, loads & 1 != 0, loads & 2 != 0, true);
                if item.save != 0 {
                    switched(&mut guest, item, loads & 1 != 0, loads & 2 != 0, false);
                }
            }
        } else {
            Check::new(&mut Serial, item.name).fact("offered", false).end();
        }
    }
    rules(&mut guest);
    if offered(entry::LOAD_CET, exit::LOAD_CET) && caps::get(0x489) & CR4_CET != 0 {
        of_the_guest(&mut guest);
        of_the_hypervisor(&mut guest);
    } else {
        Check::new(&mut Serial, "shadow stacks").fact("offered", false).end();
    }
    Ok(())
}

/// Counters have an MSR from version 2 of performance monitoring on.
fn has(item: &Item) -> bool {
    item.msr != PERF_GLOBAL_CTRL || cpu::cpuid(0, 0)[0] >= 0xA && cpu::cpuid(0xA, 0)[0] & 0xFF >= 2
}

fn offered(entry: u32, exit: u32) -> bool {
    setup::allowed_one(Kind::Entry, entry) && setup::allowed_one(Kind::Exit, exit)
}

/// What the guest's program reads and writes, and what it saw: at first, and after an exit that a hypervisor below may take.
static MSR: AtomicU64 = AtomicU64::new(0);
static WRITE: AtomicU64 = AtomicU64::new(0);
static SEEN: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

extern "C" fn look_and_write(_: u64) -> u64 {
    let msr = MSR.load(Ordering::Relaxed) as u32;
    for seen in &SEEN {
        seen.store(cpu::rdmsr(msr), Ordering::Relaxed);
        cpu::rdmsr(FEATURE_CONTROL);
    }
    cpu::wrmsr(msr, WRITE.load(Ordering::Relaxed));
    cpu::rdmsr(FEATURE_CONTROL);
    5
}

fn switched(guest: &mut Guest, item: &Item, by_entry: bool, by_exit: bool, saves: bool) {
    let old = [f::EXIT_CONTROLS, f::ENTRY_CONTROLS].map(vmx::read);
    let before = cpu::rdmsr(item.msr);
    let [own, of_guest, of_host, written] = item.values;
    vmx::write(
        f::EXIT_CONTROLS,
        old[0] | u64::from(if by_exit { item.exit } else { 0 } | if saves { item.save } else { 0 }),
    );
    vmx::write(f::ENTRY_CONTROLS, old[1] | if by_entry { u64::from(item.entry) } else { 0 });
    for field in [f::GUEST_S_CET, f::GUEST_SSP, f::GUEST_SSP_TABLE, f::HOST_S_CET, f::HOST_SSP, f::HOST_SSP_TABLE] {
        if item.entry == entry::LOAD_CET {
            vmx::write(field, 0);
        }
    }
    vmx::write(item.guest, of_guest);
    if let Some(host) = item.host {
        vmx::write(host, of_host);
    }
    cpu::wrmsr(item.msr, own << item.shift);
    MSR.store(item.msr.into(), Ordering::Relaxed);
    WRITE.store(written << item.shift, Ordering::Relaxed);
    let result = guest.execute(look_and_write, 0);
    let after = cpu::rdmsr(item.msr) >> item.shift;
    // Another exit of this hypervisor's own, and once more.
    let _ = vmx::read(f::EXIT_REASON);
    cpu::cpuid(0, 0);
    let later = cpu::rdmsr(item.msr) >> item.shift;
    let saved = vmx::read(item.guest);
    cpu::wrmsr(item.msr, before);
    for (field, value) in [f::EXIT_CONTROLS, f::ENTRY_CONTROLS].into_iter().zip(old) {
        vmx::write(field, value);
    }
    let seen = SEEN.each_ref().map(|seen| Hex(seen.load(Ordering::Relaxed) >> item.shift));
    let loaded = |yes: bool, value, other| Hex(if yes { value } else { other });
    let unsaved = if saves { "" } else { ", not saved" };
    Check::new(&mut Serial, format_args!("{} loaded by entry {by_entry}, by exit {by_exit}{unsaved}", item.name))
        .expect("result", result, Exit::Done(5))
        .expect("guest_sees", seen[0], loaded(by_entry, of_guest, own))
        .expect("guest_sees_later", seen[1], loaded(by_entry, of_guest, own))
        .expect("hypervisor_sees", Hex(after), loaded(by_exit, of_host, written))
        .expect("hypervisor_sees_later", Hex(later), loaded(by_exit, of_host, written))
        .expect("saved", Hex(saved), loaded(saves, written, of_guest))
        .end();
}

/// Values that the entry refuses. Not those of IA32_PKRS: Bochs does not look at their upper half.
fn rules(guest: &mut Guest) {
    let host = Exit::Refused(Outcome::FailValid(8));
    let state = Exit::Failed(33, 0);
    let (cet_exit, cet_entry) = ((f::EXIT_CONTROLS, exit::LOAD_CET), (f::ENTRY_CONTROLS, entry::LOAD_CET));
    let uinv_entry = (f::ENTRY_CONTROLS, entry::LOAD_UINV);
    let counters = ((f::EXIT_CONTROLS, LOAD_COUNTERS_EXIT), (f::ENTRY_CONTROLS, LOAD_COUNTERS_ENTRY));
    for (name, (word, control), field, value, wanted) in [
        ("host S_CET with bit 6", cet_exit, f::HOST_S_CET, 1 << 6, host),
        ("host S_CET with bit 9", cet_exit, f::HOST_S_CET, 1 << 9, host),
        ("host S_CET with SUPPRESS and TRACKER", cet_exit, f::HOST_S_CET, 3 << 10, host),
        ("host S_CET not canonical", cet_exit, f::HOST_S_CET, NOT_CANONICAL, host),
        ("host SSP with bit 1", cet_exit, f::HOST_SSP, 2, host),
        ("host SSP not canonical", cet_exit, f::HOST_SSP, NOT_CANONICAL, host),
        ("host SSP table not canonical", cet_exit, f::HOST_SSP_TABLE, NOT_CANONICAL, host),
        ("guest S_CET with bit 7", cet_entry, f::GUEST_S_CET, 1 << 7, state),
        ("guest S_CET with SUPPRESS and TRACKER", cet_entry, f::GUEST_S_CET, 3 << 10, state),
        ("guest S_CET not canonical", cet_entry, f::GUEST_S_CET, NOT_CANONICAL, state),
        ("guest SSP with bit 0", cet_entry, f::GUEST_SSP, 1, state),
        ("guest SSP not canonical", cet_entry, f::GUEST_SSP, NOT_CANONICAL, state),
        ("guest SSP table not canonical", cet_entry, f::GUEST_SSP_TABLE, NOT_CANONICAL, state),
        ("guest UINV 256", uinv_entry, f::GUEST_UINV, 0x100, state),
        ("host counter 31", counters.0, f::HOST_PERF_GLOBAL_CTRL, 1 << 31, host),
        ("host counter 63", counters.0, f::HOST_PERF_GLOBAL_CTRL, 1 << 63, host),
        ("guest counter 31", counters.1, f::GUEST_PERF_GLOBAL_CTRL, 1 << 31, state),
        ("guest counter 63", counters.1, f::GUEST_PERF_GLOBAL_CTRL, 1 << 63, state),
    ] {
        let kind = if word == f::EXIT_CONTROLS { Kind::Exit } else { Kind::Entry };
        if !setup::allowed_one(kind, control) {
            Check::new(&mut Serial, name).fact("offered", false).end();
            continue;
        }
        let bad = try_with(guest, &[(word, On(control.into())), (field, Set(value))]).0;
        // Without the control nobody looks.
        let ignored = try_with(guest, &[(field, Set(value))]).0;
        Check::new(&mut Serial, name).expect("result", bad, wanted).expect("unused", ignored, Exit::Done(5)).end();
    }
    if caps::get(0x489) & CR4_CET != 0 {
        let without = |field| (field, Off(CR0_WP));
        for (name, cr0, cr4, loads, wanted) in [
            // Bochs looks at the host's only if CET state is loaded.
            ("host CET without WP", f::HOST_CR0, f::HOST_CR4, cet_exit, host),
            ("guest CET without WP", f::GUEST_CR0, f::GUEST_CR4, cet_entry, state),
        ] {
            let got = try_with(guest, &[(cr4, On(CR4_CET)), without(cr0), (loads.0, On(loads.1.into()))]).0;
            Check::new(&mut Serial, name).expect("result", got, wanted).end();
        }
    }
}

#[inline(never)]
extern "C" fn deeper(depth: u64) -> u64 {
    cpu::rdmsr(FEATURE_CONTROL);
    if depth == 0 {
        return rdssp();
    }
    let deepest = deeper(depth - 1);
    // Else the call would be a jump.
    core::hint::black_box(deepest)
}

#[inline(always)]
fn rdssp() -> u64 {
    let value: u64;
    // SAFETY: reads a register; without shadow stacks it does nothing.
    unsafe { asm!("xor {0:e}, {0:e}", "rdsspq {0}", out(reg) value, options(nomem, nostack)) };
    value
}

/// A guest on a shadow stack of its own, over exits; this hypervisor has none.
fn of_the_guest(guest: &mut Guest) {
    let page = pages::page();
    pages::set_entry(guest.cr3, AT, pages::address(page) | SHADOW_STACK_PAGE);
    guest.start(deeper, 3);
    // What the program's `ret` takes from the stack must stand on the shadow stack too.
    // SAFETY: the guest's stack, which is not running.
    page[500] = unsafe { *(vmx::read(f::GUEST_RSP) as *const u64) };
    let top = AT + 500 * 8;
    let old = [f::ENTRY_CONTROLS, f::EXIT_CONTROLS, f::GUEST_CR0, f::GUEST_CR4].map(|field| (field, vmx::read(field)));
    for (field, value) in [
        (f::ENTRY_CONTROLS, old[0].1 | u64::from(entry::LOAD_CET)),
        (f::EXIT_CONTROLS, old[1].1 | u64::from(exit::LOAD_CET)),
        (f::GUEST_CR0, old[2].1 | CR0_WP),
        (f::GUEST_CR4, old[3].1 | CR4_CET),
        (f::GUEST_S_CET, SHADOW_STACKS),
        (f::GUEST_SSP, top),
        (f::GUEST_SSP_TABLE, 0),
        (f::HOST_S_CET, 0),
        (f::HOST_SSP, 0),
        (f::HOST_SSP_TABLE, 0),
    ] {
        vmx::write(field, value);
    }
    let result = guest.run();
    let saved = [f::GUEST_SSP, f::GUEST_S_CET].map(|field| Hex(vmx::read(field)));
    let own = cpu::rdmsr(S_CET);
    for (field, value) in old {
        vmx::write(field, value);
    }
    Check::new(&mut Serial, "a guest's shadow stack")
        .expect("result", result, Exit::Done(top - 3 * 8))
        .expect("ssp", saved[0], Hex(top + 8))
        .expect("s_cet", saved[1], Hex(SHADOW_STACKS))
        .expect("own_s_cet", own, 0)
        .end();
}

/// This hypervisor on a shadow stack, over exits of its own and of its guest's; each exit of the guest loads its SSP.
fn of_the_hypervisor(guest: &mut Guest) {
    let page = pages::page();
    pages::set_entry(cpu::cr3(), AT, pages::address(page) | SHADOW_STACK_PAGE);
    let token = AT + 500 * 8;
    page[500] = token;
    let (cr0, cr4) = (cpu::cr0(), cpu::cr4());
    cpu::set_cr0(cr0 | CR0_WP);
    cpu::set_cr4(cr4 | CR4_CET);
    cpu::wrmsr(PL0_SSP, token);
    let (first, second): (u64, u64);
    // SAFETY: calls and returns are balanced, so the shadow stack is as empty at the end as at the beginning, and it is off
    // again. CPUID is an exit if there is a hypervisor below.
    unsafe {
        asm!(
            "mov ecx, {s_cet}", "mov eax, 1", "xor edx, edx", "wrmsr", "setssbsy",
            "call 2f", "jmp 3f",
            "2: push rbx", "xor eax, eax", "xor ecx, ecx", "cpuid", "pop rbx", "xor r9d, r9d", "rdsspq r9", "ret",
            "3: xor r8d, r8d", "rdsspq r8",
            "mov ecx, {s_cet}", "xor eax, eax", "xor edx, edx", "wrmsr",
            s_cet = const S_CET,
            out("rax") _, out("rcx") _, out("rdx") _, out("r8") first, out("r9") second,
        );
    }
    // The exit gives this hypervisor CR4.CET, and the values of its fields.
    let old = [f::EXIT_CONTROLS, f::HOST_CR0, f::HOST_CR4].map(|field| (field, vmx::read(field)));
    for (field, value) in [
        (f::EXIT_CONTROLS, old[0].1 | u64::from(exit::LOAD_CET)),
        (f::HOST_CR0, cpu::cr0()),
        (f::HOST_CR4, cpu::cr4() | CR4_PAE),
        (f::HOST_S_CET, 0x10),
        (f::HOST_SSP, AT + 0x100),
        (f::HOST_SSP_TABLE, 0x5000),
    ] {
        vmx::write(field, value);
    }
    let result = guest.execute(crate::guest::nothing, 5);
    let loaded = (cpu::cr4() & CR4_CET != 0, Hex(cpu::rdmsr(S_CET)), Hex(cpu::rdmsr(SSP_TABLE)));
    for (field, value) in old {
        vmx::write(field, value);
    }
    for msr in [S_CET, SSP_TABLE, PL0_SSP] {
        cpu::wrmsr(msr, 0);
    }
    cpu::set_cr4(cr4);
    cpu::set_cr0(cr0);
    // SAFETY: the token, which the processor changes through another mapping.
    let busy = unsafe { ptr::from_ref(&page[500]).read_volatile() };
    Check::new(&mut Serial, "a hypervisor's shadow stack")
        .expect("ssp", Hex(first), Hex(token))
        .expect("ssp_in_a_call", Hex(second), Hex(token - 8))
        .expect("busy", Hex(busy), Hex(token | 1))
        .expect("result", result, Exit::Done(5))
        .expect("cr4_cet", loaded.0, true)
        .expect("s_cet", loaded.1, Hex(0x10))
        .expect("ssp_table", loaded.2, Hex(0x5000))
        .end();
}
