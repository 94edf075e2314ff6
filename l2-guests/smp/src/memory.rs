//! One ept12, one set of page tables, several CPUs: what each sees after a change and its own INVEPT or INVVPID.

use crate::{
    cpus,
    guest::{self, Guest, read_memory},
};
use core::sync::atomic::{AtomicU64, Ordering};
use l2_kit::{
    ept::{Ept, WRITE_BACK, rights},
    fields as f,
    pages::{self, Access, PAGE},
    setup::Controls,
    smp, vmx,
};

/// A linear and guest-physical address beyond what else is used: the page that changes.
const CHANGING: u64 = 0x3F00_0000;

static EPTP: AtomicU64 = AtomicU64::new(0);
static CR3: AtomicU64 = AtomicU64::new(0);

/// A page full of one number.
fn page_of(value: u64) -> u64 {
    let page = pages::page();
    page.fill(value);
    pages::address(page)
}

/// All CPUs read through one ept12 that CPU 0 changes.
pub fn all(_ids: &[u32]) {
    let [one, two, three] = [0x1111, 0x2222, 0x3333].map(page_of);
    let ept = Ept::identity();
    ept.set(CHANGING, PAGE, one | WRITE_BACK | rights::RWX);
    EPTP.store(ept.pointer(), Ordering::Release);
    smp::run_on_all(cpus(), |index| {
        if vmx_is_off() {
            guest::enter_vmx();
        }
        Guest::make(index, 0x100 + index as u64, Controls::default());
        vmx::write(f::EPTP, EPTP.load(Ordering::Acquire));
    });
    let read = |word: usize, job: smp::Job| {
        smp::note(0, 8, word as u64);
        smp::run_on_all(cpus(), job);
    };
    read(0, look);
    ept.set(CHANGING, PAGE, two | WRITE_BACK | rights::RWX);
    read(1, |index| {
        vmx::invept(1, [EPTP.load(Ordering::Acquire), 0]);
        look(index);
    });
    ept.set(CHANGING, PAGE, three | WRITE_BACK | rights::RWX);
    read(2, |index| {
        vmx::invept(2, [0, 0]);
        look(index);
    });
    ept.unmap(CHANGING, PAGE);
    read(3, |index| {
        vmx::invept(1, [EPTP.load(Ordering::Acquire), 0]);
        look(index);
    });
    // What was not there needs no invalidation.
    ept.set(CHANGING, PAGE, one | WRITE_BACK | rights::R);
    read(4, look);
    smp::note(0, 8, 0);
    crate::print("one EPT for all CPUs", &["first", "invept_single", "invept_all", "unmapped", "mapped"]);
    linear(one, two);
}

/// All CPUs read through page tables that CPU 0 changes.
fn linear(one: u64, two: u64) {
    let root = pages::identity_tables(Access::Kernel);
    pages::set_entry(root, CHANGING, one | 3);
    CR3.store(root, Ordering::Release);
    smp::run_on_all(cpus(), |_| {
        vmx::write(f::EPTP, Ept::identity().pointer());
        vmx::write(f::GUEST_CR3, CR3.load(Ordering::Acquire));
    });
    let read = |word: usize, job: smp::Job| {
        smp::note(0, 8, word as u64);
        smp::run_on_all(cpus(), job);
    };
    read(0, look);
    pages::set_entry(root, CHANGING, two | 3);
    read(1, |index| {
        vmx::invvpid(0, [0x100 + index as u64, CHANGING]);
        look(index);
    });
    pages::set_entry(root, CHANGING, one | 3);
    read(2, |index| {
        vmx::invvpid(1, [0x100 + index as u64, 0]);
        look(index);
    });
    pages::set_entry(root, CHANGING, two | 3);
    read(3, |index| {
        vmx::invvpid(2, [0, 0]);
        look(index);
    });
    smp::note(0, 8, 0);
    crate::print("one set of page tables for all CPUs", &["first", "address", "vpid", "all"]);
}

/// Leaves what the guest of this CPU reads, in the word that CPU 0 has named.
fn look(index: usize) {
    let seen = guest::of(index).execute(read_memory, CHANGING).word();
    smp::note(index, smp::noted(0, 8) as usize, seen);
}

/// Before VMXON, CR4.VMXE is clear.
fn vmx_is_off() -> bool {
    l2_kit::cpu::cr4() & l2_kit::cpu::CR4_VMXE == 0
}
