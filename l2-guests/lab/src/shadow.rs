//! Shadow page tables: what a hypervisor does for a guest that pages, where the CPU has no EPT.
//!
//! Mechanism: SDM "Memory Virtualization", "Virtualizing Memory by Brute Force" (a "virtual TLB"). The guest's page tables are
//! never used by the CPU. It runs on tables of the hypervisor's, which start empty and are filled fault by fault from the
//! guest's, as a TLB is. What empties a TLB empties them: MOV to CR3 all, INVLPG one entry.

use crate::vm::{Vm, advance};
use l2_kit::{
    cpu, fields as f,
    pages::{self, PAGE},
    setup::{Controls, primary, secondary},
    trap::PF,
    vmx::{self, reason as r},
};

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
/// CR0.WP: read-only is read-only for ring 0 too.
pub const CR0_WP: u64 = 1 << 16;
/// Tables at most: what a guest touches between two flushes.
const TABLES: u64 = 48;

/// The tables, and what the hypervisor did.
pub struct Shadow {
    /// What the guest believes to be in CR3
    pub guest_cr3: u64,
    root: u64,
    used: u64,
    eager: bool,
    /// #PF of which the guest never hears
    pub hidden: u64,
    /// #PF that are the guest's own and exited all the same
    pub reflected: u64,
}

/// What the guest's tables say to an access.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// Allowed: the shadow has it now
    Yes,
    /// No translation
    NotPresent,
    /// A translation that forbids it
    NotAllowed,
}

/// What a guest without EPT needs to exit for.
pub fn controls(mut plain: Controls) -> Controls {
    plain.secondary &= !secondary::EPT;
    plain.primary |= primary::INVLPG | primary::CR3_LOAD;
    plain
}

impl Shadow {
    /// Empty tables for the guest of `vm`, which runs on them from now on. `eager`: a page that the guest may write is filled
    /// as one it has written, so that no fault on a present page is ever hidden.
    pub fn new(vm: &mut Vm, eager: bool) -> Self {
        let root = pages::take(TABLES * PAGE, PAGE);
        let shadow = Self { guest_cr3: vm.cr3, root, used: 1, eager, hidden: 0, reflected: 0 };
        vm.cr3 = root;
        vmx::write(f::GUEST_CR0, vmx::read(f::GUEST_CR0) | CR0_WP);
        vmx::write(f::EXCEPTION_BITMAP, 1 << PF);
        shadow
    }

    /// Handles the three exits of paging.
    pub fn handle(&mut self, vm: &mut Vm, reason: u32) -> bool {
        let qualification = vmx::read(f::EXIT_QUALIFICATION);
        match reason {
            r::EXCEPTION_OR_NMI if vmx::read(f::EXIT_INTERRUPTION_INFO) as u8 == PF => {
                let error = vmx::read(f::EXIT_INTERRUPTION_ERROR);
                match self.fill(qualification, error & WRITE != 0) {
                    Filled::Yes => self.hidden += 1,
                    // The shadow may have had no entry where the guest has one that forbids the access.
                    Filled::NotAllowed => self.reflect(qualification, error | PRESENT),
                    Filled::NotPresent => self.reflect(qualification, error & !PRESENT),
                }
            }
            INVLPG => {
                self.forget(vm, qualification);
                advance();
            }
            // MOV to CR3
            r::CR_ACCESS if qualification & 0x3F == 3 => {
                self.guest_cr3 = vm.vcpu.registers.get(qualification >> 8);
                self.forget_all(vm);
                advance();
            }
            _ => return false,
        }
        true
    }

    /// The guest's own fault. If its delivery faults in turn since the shadow lacks the IDT or the stack, that fault is hidden,
    /// the instruction raises the first one again, and it is counted again.
    fn reflect(&mut self, linear: u64, error: u64) {
        self.reflected += 1;
        inject_page_fault(linear, error);
    }

    /// Looks a linear address up in the guest's tables; if the access is allowed there, the shadow gets the entry.
    pub fn fill(&mut self, linear: u64, write: bool) -> Filled {
        let (mut table, mut rights) = (self.guest_cr3 & ADDRESS, WRITE | USER);
        for level in (0..4).rev() {
            let entry = entry(table, linear, level);
            if *entry & PRESENT == 0 {
                return Filled::NotPresent;
            }
            rights &= *entry;
            *entry |= ACCESSED;
            if level > 0 && *entry & LARGE == 0 {
                table = *entry & ADDRESS;
                continue;
            }
            if write && rights & WRITE == 0 {
                return Filled::NotAllowed;
            }
            // Read-only until it is written, so that the guest's dirty flag is right.
            let dirty = write || self.eager && rights & WRITE != 0;
            *entry |= if dirty { DIRTY } else { 0 };
            let rights = if dirty || *entry & DIRTY != 0 { rights } else { rights & !WRITE };
            let leaf = *entry & (ADDRESS | LARGE) | rights | PRESENT;
            self.set(linear, level, leaf);
            return Filled::Yes;
        }
        Filled::NotPresent
    }

    fn set(&mut self, linear: u64, last: u32, leaf: u64) {
        let mut table = self.root;
        for level in (last + 1..4).rev() {
            let slot = entry(table, linear, level);
            if *slot & PRESENT == 0 || *slot & LARGE != 0 {
                *slot = self.table() | PRESENT | WRITE | USER;
            }
            table = *slot & ADDRESS;
        }
        *entry(table, linear, last) = leaf;
    }

    fn table(&mut self) -> u64 {
        assert!(self.used < TABLES, "the guest touches more than its shadow has tables for");
        let at = self.root + self.used * PAGE;
        self.used += 1;
        // SAFETY: a table that nothing refers to.
        unsafe { pages::at(at) }.fill(0);
        at
    }

    /// Drops the entry of one page.
    pub fn forget(&mut self, vm: &Vm, linear: u64) {
        let mut table = self.root;
        for level in (0..4).rev() {
            let slot = entry(table, linear, level);
            if *slot & PRESENT == 0 || level == 0 || *slot & LARGE != 0 {
                *slot = 0;
                break;
            }
            table = *slot & ADDRESS;
        }
        vm.flush(Some(linear));
    }

    fn forget_all(&mut self, vm: &Vm) {
        // SAFETY: the root is this shadow's.
        unsafe { pages::at(self.root) }.fill(0);
        self.used = 1;
        vm.flush(None);
    }
}

const INVLPG: u32 = 14;

/// The guest's own fault: it finds CR2, error code and RIP as without a hypervisor.
fn inject_page_fault(linear: u64, error: u64) {
    cpu::set_cr2(linear);
    // Valid, with error code, hardware exception
    vmx::write(f::ENTRY_INTERRUPTION_INFO, 1 << 31 | 1 << 11 | 3 << 8 | u64::from(PF));
    vmx::write(f::ENTRY_EXCEPTION_ERROR, error);
}

/// An entry of a table in memory that is mapped one to one.
fn entry(table: u64, linear: u64, level: u32) -> &'static mut u64 {
    // SAFETY: tables of the guest or of the shadow, both this image's memory; one reference at a time.
    let table = unsafe { pages::at(table) };
    &mut table[(linear >> (12 + 9 * level)) as usize & 511]
}
