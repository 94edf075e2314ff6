//! IA32_APIC_BASE: the page of the APIC's registers moves, over memory too, and hides what is there; what the register does
//! not take is refused (SDM vol. 3A, "Relocating the Local APIC Registers", "x2APIC State Transitions").

use super::OUTSIDE;
use crate::guest::{Exit, Guest};
use core::fmt;
use l2_kit::{
    Check, cpu, fields as f, log, pages,
    protocol::{Hex, Value},
    serial::Serial,
    trap, vmx,
};

const APIC_BASE: u32 = 0x1B;
const X2APIC: u64 = 1 << 10;
const ENABLED: u64 = 1 << 11;
/// Offsets of the APIC's version and of its task-priority register.
const VERSION: u64 = 0x30;
const TASK_PRIORITY: u64 = 0x80;
/// What memory holds where the APIC is moved to.
const MARK: u32 = 0x5A5A_1234;
/// A guest's program returns it for #GP.
const REFUSED: u64 = 0xBAD;

/// What a write came to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wrote {
    Taken,
    Fault(u8, u64),
}

const GP: Wrote = Wrote::Fault(trap::GP, 0);

impl fmt::Display for Wrote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Taken => f.write_str("taken"),
            Self::Fault(vector, error) => write!(f, "trap-{vector}({error:#x})"),
        }
    }
}

impl Value for Wrote {
    fn write_to(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{self}")
    }
}

fn write(value: u64) -> Wrote {
    match cpu::try_wrmsr(APIC_BASE, value) {
        Ok(()) => Wrote::Taken,
        Err(trap) => Wrote::Fault(trap.vector, trap.error),
    }
}

/// The 32-bit register of the APIC, or the memory, at an address.
fn load(address: u64) -> u32 {
    // SAFETY: the APIC's page, or one that this part took from the pool; nobody refers to it.
    unsafe { (address as *const u32).read_volatile() }
}

fn store(address: u64, value: u32) {
    // SAFETY: as in `load`.
    unsafe { (address as *mut u32).write_volatile(value) };
}

/// Moves the APIC, looks at its version there, and moves it back.
extern "C" fn move_and_look(value: u64) -> u64 {
    let before = cpu::rdmsr(APIC_BASE);
    if write(value) != Wrote::Taken {
        return REFUSED;
    }
    let version = load((value & !0xFFF) + VERSION);
    cpu::wrmsr(APIC_BASE, before);
    version.into()
}

extern "C" fn look(page: u64) -> u64 {
    load(page + VERSION).into()
}

pub(super) fn all(guest: &mut Guest) {
    let home = cpu::rdmsr(APIC_BASE);
    if home & (X2APIC | ENABLED) != ENABLED {
        Check::new(&mut Serial, "APIC base").fact("xapic", false).end();
        return;
    }
    let page = pages::take(pages::PAGE, pages::PAGE);
    for register in [VERSION, TASK_PRIORITY] {
        store(page + register, MARK);
    }
    moved(home, page);
    refused(home);
    of_the_guest(guest, home, page);
    by_areas(guest, home, page);
    outside(guest, home);
}

/// The page of flags of `home`, at another place.
fn at(home: u64, page: u64) -> u64 {
    home & 0xFFF | page
}

fn moved(home: u64, page: u64) {
    let version = load((home & !0xFFF) + VERSION);
    let wrote = write(at(home, page));
    let (read_back, there) = (cpu::rdmsr(APIC_BASE), load(page + VERSION));
    store(page + TASK_PRIORITY, 0x30);
    let priority = load(page + TASK_PRIORITY);
    store(page + TASK_PRIORITY, 0);
    let back = write(home);
    Check::new(&mut Serial, "APIC base: over memory")
        .expect("written", wrote, Wrote::Taken)
        // The address differs from machine to machine.
        .expect("read", read_back == at(home, page), true)
        .expect("version", there, version)
        .expect("priority", priority, 0x30)
        .expect("back", back, Wrote::Taken)
        .expect("version_again", load((home & !0xFFF) + VERSION), version)
        .expect("memory", [load(page + VERSION), load(page + TASK_PRIORITY)] == [MARK; 2], true)
        .end();
}

/// Reserved bits, addresses that the CPU does not have, x2APIC mode without the APIC.
fn refused(home: u64) {
    let width = cpu::cpuid(0x8000_0008, 0)[0] & 0xFF;
    for bit in (0..8).chain([9]).chain(width..64) {
        let wrote = write(home | 1 << bit);
        Check::new(&mut Serial, format_args!("APIC base: reserved bit {bit}"))
            .expect("written", wrote, GP)
            .expect("read", Hex(cpu::rdmsr(APIC_BASE)), Hex(home))
            .end();
    }
    let wrote = write(home & !ENABLED | X2APIC);
    Check::new(&mut Serial, "APIC base: x2APIC mode of an APIC that is off")
        .expect("written", wrote, GP)
        .expect("read", Hex(cpu::rdmsr(APIC_BASE)), Hex(home))
        .end();
}

fn of_the_guest(guest: &mut Guest, home: u64, page: u64) {
    let version = load((home & !0xFFF) + VERSION).into();
    let moved = guest.execute(move_and_look, at(home, page));
    let refused = guest.execute(move_and_look, at(home, page) | 1);
    let beyond = guest.execute(move_and_look, at(home, 1 << 51));
    Check::new(&mut Serial, "APIC base: written by the guest")
        .expect("over_memory", moved, Exit::Done(version))
        .expect("reserved_bit", refused, Exit::Done(REFUSED))
        .expect("no_address", beyond, Exit::Done(REFUSED))
        .expect("read", Hex(cpu::rdmsr(APIC_BASE)), Hex(home))
        .end();
}

/// An MSR area with one entry, in the fields of an area's address and count.
fn area(list: &mut pages::Page, fields: [u32; 2], value: Option<u64>) {
    list[0] = APIC_BASE.into();
    list[1] = value.unwrap_or(0);
    vmx::write(fields[0], pages::address(list));
    vmx::write(fields[1], value.is_some().into());
}

const ENTRY: [u32; 2] = [f::ENTRY_MSR_LOAD_ADDR, f::ENTRY_MSR_LOAD_COUNT];
const EXIT: [u32; 2] = [f::EXIT_MSR_LOAD_ADDR, f::EXIT_MSR_LOAD_COUNT];

fn by_areas(guest: &mut Guest, home: u64, page: u64) {
    let version = load((home & !0xFFF) + VERSION);
    let lists = [pages::page(), pages::page()];
    area(lists[0], ENTRY, Some(at(home, page)));
    let seen = guest.execute(look, page);
    let kept = cpu::rdmsr(APIC_BASE);
    area(lists[0], ENTRY, Some(at(home, page) | 1));
    cpu::wrmsr(APIC_BASE, home);
    let refused = guest.execute(look, page);
    area(lists[0], ENTRY, None);
    area(lists[1], EXIT, Some(at(home, page)));
    let before = guest.execute(look, page);
    area(lists[1], EXIT, None);
    let (after, there) = (cpu::rdmsr(APIC_BASE), load(page + VERSION));
    cpu::wrmsr(APIC_BASE, home);
    Check::new(&mut Serial, "APIC base: loaded by MSR areas")
        .expect("entry", seen, Exit::Done(version.into()))
        .expect("stays", kept == at(home, page), true)
        .expect("reserved_bit", refused, Exit::Failed(34, 1))
        .expect("guest_before_exit", before, Exit::Done(MARK.into()))
        .expect("exit", after == at(home, page), true)
        .expect("version", there, version)
        .end();
}

/// Pages around one of nvmx that are tried.
const AROUND: u64 = 64 << 20;

/// No page of nvmx is ever hidden from it: not by the hypervisor, whatever the mode, not by its guest, not by an MSR area.
fn outside(guest: &mut Guest, home: u64) {
    let outside = OUTSIDE.get();
    if outside == 0 {
        return;
    }
    let list = pages::page();
    for (name, flags) in [("on", home & 0xFFF), ("off", home & 0x100), ("x2apic", home & 0x100 | ENABLED | X2APIC)] {
        area(list, ENTRY, Some(outside | flags));
        let by_area = guest.execute(look, pages::address(list));
        area(list, ENTRY, None);
        Check::new(&mut Serial, format_args!("APIC base: outside, {name}"))
            .expect("written", write(outside | flags), GP)
            .expect("by_guest", guest.execute(move_and_look, outside | flags), Exit::Done(REFUSED))
            .expect("by_area", by_area, Exit::Failed(34, 1))
            .expect("read", Hex(cpu::rdmsr(APIC_BASE)), Hex(home))
            .end();
    }
    // nvmx's range is one piece: it begins and ends once.
    let mut refused = 0;
    let (mut first, mut last) = (u64::MAX, 0);
    for page in (outside.saturating_sub(AROUND)..outside + AROUND).step_by(pages::PAGE as usize) {
        if write(at(home, page)) == Wrote::Taken {
            cpu::wrmsr(APIC_BASE, home);
            continue;
        }
        refused += 1;
        (first, last) = (first.min(page), page);
    }
    log!("nvmx lies at {first:#x}..{:#x}", last + pages::PAGE);
    Check::new(&mut Serial, "APIC base: page by page over what is outside")
        .expect("in_one_piece", refused, (last - first) / pages::PAGE + 1)
        .expect("holds_the_page", (first..=last).contains(&outside), true)
        .end();
}
