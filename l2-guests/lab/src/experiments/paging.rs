//! One guest that maps, moves, protects and unmaps pages and takes page faults of its own, under shadow page tables and
//! under EPT; and what a walk through both kinds of table costs.
//!
//! Mechanism: SDM "Memory Virtualization" and "The Extended Page Table Mechanism". With EPT the guest's tables are used by the
//! CPU as they are, so #PF, INVLPG and CR3 are the guest's own business; what is left is the first use of a frame.

use crate::{
    kernel::{self, AREA, FAULTS, FRAMES, PAGES, frame, page_lives},
    record::{self, Stop, WARM_UP},
    shadow::{self, Shadow},
    vm::{Vm, plain},
};
use core::ptr::read_volatile;
use l2_kit::{
    Global, caps,
    ept::{self, Ept, LARGE_BIT, rights},
    fields as f,
    pages::{self, LARGE, PAGE},
    setup,
    vmx::{self, reason as r},
};

const EVENTS: u64 = PAGES;

pub fn run() -> Result<(), Stop> {
    with_shadow()?;
    with_ept()?;
    walks()
}

fn with_shadow() -> Result<(), Stop> {
    let mut vm = Vm::new(&shadow::controls(plain()), None)?;
    kernel::boot(vm.cr3, kernel::on_demand);
    let mut shadow = Shadow::new(&mut vm, false);
    let count = record::events(EVENTS);
    // The same tables and code are in use before.
    vm.run(WARM_UP, 0, page_lives, &mut |vm, reason| shadow.handle(vm, reason))?;
    (shadow.hidden, shadow.reflected) = (0, 0);
    FAULTS.set(0);
    vm.run(count, 0, page_lives, &mut |vm, reason| shadow.handle(vm, reason))?;
    let facts = [("guest_faults", FAULTS.get()), ("hidden", shadow.hidden), ("reflected_faults", shadow.reflected)];
    record::row("shadow", "l3", count, &vm.bracket, &facts);
    Ok(())
}

fn with_ept() -> Result<(), Stop> {
    let mut vm = Vm::with_ept(&plain())?;
    kernel::boot(vm.cr3, kernel::on_demand);
    // The hypervisor gives a frame when the guest first uses it.
    if let Some(ept) = &vm.ept {
        (FRAMES.get()..FRAMES.get() + LARGE).step_by(PAGE as usize).for_each(|page| ept.unmap(page, PAGE));
    }
    let handler = &mut |vm: &mut Vm, reason: u32| {
        let page = vmx::read(f::GUEST_PHYSICAL_ADDRESS) & !(PAGE - 1);
        if let Some(ept) = &vm.ept {
            ept.map(page, PAGE, rights::RWX);
        }
        reason == r::EPT_VIOLATION
    };
    let count = record::events(EVENTS);
    for name in ["ept_first", "ept"] {
        FAULTS.set(0);
        vm.run(count, 0, page_lives, handler)?;
        record::row(name, "l3", count, &vm.bracket, &[("guest_faults", FAULTS.get())]);
    }
    Ok(())
}

/// References of one walk, and the EPT entries it went through.
struct Walk {
    references: u64,
    through: l2_kit::arrayvec::ArrayVec<u64, 32>,
}

impl Walk {
    /// Reads the guest's entries and, for the address of each and for the page, those of EPT: what the CPU does at a TLB miss.
    fn of(cr3: u64, linear: u64, ept: Option<u64>) -> Self {
        let mut walk = Self { references: 0, through: l2_kit::arrayvec::ArrayVec::new() };
        let mut table = cr3;
        for level in (0..4).rev() {
            let at = walk.physical(ept, table + (linear >> (12 + 9 * level) & 511) * 8);
            let entry = walk.read(at);
            if level == 0 || entry & LARGE_BIT != 0 {
                let inside = (1 << (12 + 9 * level)) - 1;
                walk.physical(ept, entry & ADDRESS & !inside | linear & inside);
                break;
            }
            table = entry & ADDRESS;
        }
        walk
    }

    fn physical(&mut self, ept: Option<u64>, guest_physical: u64) -> u64 {
        let Some(mut table) = ept else { return guest_physical };
        for level in (0..4).rev() {
            let at = table + (guest_physical >> (12 + 9 * level) & 511) * 8;
            let entry = self.read(at);
            let _ = self.through.try_push(at);
            if level == 0 || entry & LARGE_BIT != 0 {
                let inside = (1 << (12 + 9 * level)) - 1;
                return entry & ADDRESS & !inside | guest_physical & inside;
            }
            table = entry & ADDRESS;
        }
        guest_physical
    }

    fn read(&mut self, at: u64) -> u64 {
        self.references += 1;
        // SAFETY: tables of this image.
        unsafe { read_volatile(at as *const u64) }
    }
}

const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
static TOUCHED: Global<u64> = Global::new(0);

/// Counts the references of one miss. That the walk is the CPU's own is seen by EPT's accessed flags: cleared before the guest
/// touches the page, they are set in each entry that the walk went through.
fn walks() -> Result<(), Stop> {
    let flags = caps::get(setup::VMX_EPT_VPID_CAP) & 1 << 21 != 0;
    if !flags {
        record::missing("accessed and dirty flags of EPT");
    }
    // Small or large pages of the guest and of EPT
    for (name, small_guest, small_ept) in
        [("walk_2m_2m", false, false), ("walk_4k_2m", true, false), ("walk_4k_4k", true, true)]
    {
        let mut vm = Vm::with_ept(&plain())?;
        kernel::boot(vm.cr3, kernel::on_demand);
        let linear = if small_guest { AREA } else { frame(0, false) };
        if small_guest {
            pages::set_entry(vm.cr3, linear, frame(0, false) | 3);
        }
        let Some(ept) = vm.ept else { continue };
        if small_ept {
            let tables = (0..4).map(|level| table(vm.cr3, linear, level));
            tables.chain([frame(0, false)]).for_each(|page| ept.map(page & !(PAGE - 1), PAGE, rights::RWX));
        }
        let walk = Walk::of(vm.cr3, linear, Some(ept.pointer() & ADDRESS));
        let marked = if flags { marked(&mut vm, &ept, linear, &walk)? } else { 0 };
        let facts = [("references", walk.references), ("ept_entries", walk.through.len() as u64), ("marked", marked)];
        record::row(name, "l3", 1, &record::Bracket::new(), &facts);
        if small_guest && !small_ept {
            let one = Walk::of(vm.cr3, linear, None);
            record::row("walk_4k", "native", 1, &record::Bracket::new(), &[("references", one.references)]);
        }
    }
    Ok(())
}

/// How many of the walk's EPT entries (the same one twice counts twice) the CPU has marked when the guest touched the page.
fn marked(vm: &mut Vm, ept: &Ept, linear: u64, walk: &Walk) -> Result<u64, Stop> {
    vmx::write(f::EPTP, ept.pointer_with_flags());
    ept.clear_flags();
    let _ = vmx::invept(1, [ept.pointer_with_flags(), 0]);
    TOUCHED.set(linear);
    let touch = |_| {
        // SAFETY: a mapped page.
        unsafe { read_volatile(TOUCHED.get() as *const u64) };
    };
    vm.run(1, 0, touch, &mut |_, _| false)?;
    // SAFETY: entries of this image's EPT.
    let is_marked = |at: &&u64| unsafe { read_volatile(**at as *const u64) } & ept::ACCESSED != 0;
    Ok(walk.through.iter().filter(is_marked).count() as u64)
}

/// The guest's table of a level for a linear address.
fn table(cr3: u64, linear: u64, level: u32) -> u64 {
    (level + 1..4).rev().fold(cr3, |table, upper| {
        // SAFETY: tables of this image.
        let table = unsafe { pages::at(table) };
        table[(linear >> (12 + 9 * upper)) as usize & 511] & ADDRESS
    })
}
