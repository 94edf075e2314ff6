//! A device register that a guest stores to a million times: trapped one by one; mapped as memory and looked at each virtual
//! millisecond; a frame buffer whose written pages EPT's dirty flags tell; and the page-modification log.
//!
//! Mechanism: SDM "EPT Violations", "VMX-Preemption Timer", "Accessed and Dirty Flags for EPT", "Page-Modification Logging".
//! Each value that the guest stores is the time of its store. So the hypervisor knows how old a value is that it sees, and
//! how many it never saw.

use crate::{
    record::{self, Stop},
    store::{emulate, store},
    vm::{Handler, Vm, plain},
};
use core::{arch::asm, ptr::read_volatile};
use l2_kit::{
    Global, cpu,
    ept::{DIRTY, rights},
    fields as f,
    pages::{self, LARGE, PAGE},
    setup::{self, Kind, allowed_one, pin, secondary},
    vmx::{self, reason as r},
};

/// Ticks of a virtual millisecond: the emulated processor's clock has 100 MHz.
const MILLISECOND: u64 = 100_000;
const STORES: u64 = 1_000_000;
const TRAPPED_STORES: u64 = 10_000;
/// With its work between two stores the guest stores a million times a virtual second.
const WORK: u64 = 45;
const BUFFER: u64 = 2 * LARGE;
/// The guest writes so often to a page of the buffer before it goes on to the next.
const BURST: u64 = 1000;

static REGISTER: Global<u64> = Global::new(0);
static FRAMES: Global<u64> = Global::new(0);

/// What the hypervisor has seen.
#[derive(Default)]
struct Observer {
    last: u64,
    seen: u64,
    looked: u64,
    oldest: u64,
}

impl Observer {
    /// A value that was stored at that time.
    fn value(&mut self, stored: u64) {
        self.seen += u64::from(stored != self.last);
        self.last = stored;
    }

    /// The oldest value that may have waited: stored just after the last look.
    fn looked(&mut self) {
        let now = cpu::rdtsc();
        if self.looked != 0 {
            self.oldest = self.oldest.max(now - self.looked);
        }
        self.looked = now;
    }

    fn print(&self, vm: &Vm, name: &str, count: u64) {
        let facts = [("seen", self.seen), ("missed", count.saturating_sub(self.seen)), ("oldest", self.oldest)];
        record::loose_row(name, "l3", count, &vm.bracket, &facts);
    }
}

pub fn run() -> Result<(), Stop> {
    REGISTER.set(pages::take(PAGE, PAGE));
    FRAMES.set(pages::take(BUFFER, LARGE));
    trapped()?;
    if !allowed_one(Kind::Pin, pin::PREEMPTION_TIMER) {
        return Err(Stop::Missing("VMX-preemption timer"));
    }
    sampled()?;
    if l2_kit::caps::get(setup::VMX_EPT_VPID_CAP) & 1 << 21 == 0 {
        // The log needs the flags.
        record::missing("page-modification log");
        return Err(Stop::Missing("accessed and dirty flags of EPT"));
    }
    dirty()?;
    if !allowed_one(Kind::Secondary, secondary::PML) {
        return Err(Stop::Missing("page-modification log"));
    }
    logged()
}

/// Every store exits: the register's page is not there.
fn trapped() -> Result<(), Stop> {
    let mut vm = Vm::with_ept(&plain())?;
    if let Some(ept) = &vm.ept {
        ept.map(REGISTER.get(), PAGE, rights::R | rights::X);
    }
    let (count, mut observer) = (record::events(TRAPPED_STORES), Observer::default());
    vm.run(count, 0, stores, &mut |vm, reason| match emulate(vm) {
        Some((_, stored)) if reason == r::EPT_VIOLATION => {
            observer.value(stored);
            observer.oldest = observer.oldest.max(cpu::rdtsc() - stored);
            true
        }
        _ => false,
    })?;
    observer.print(&vm, "trapped", count);
    Ok(())
}

/// A machine whose preemption timer fires each virtual millisecond of the guest's own time.
fn with_timer() -> Result<Vm, Stop> {
    let mut controls = plain();
    controls.pin |= pin::PREEMPTION_TIMER;
    let vm = Vm::with_ept(&controls)?;
    vmx::write(f::PREEMPTION_TIMER, MILLISECOND >> (l2_kit::caps::get(setup::VMX_MISC) & 0x1F));
    Ok(vm)
}

/// The register is memory; the hypervisor looks at it when the timer fires. The timer starts anew with each entry.
fn sampled() -> Result<(), Stop> {
    let mut vm = with_timer()?;
    let (count, mut observer) = (many(), Observer::default());
    vm.run(count, 0, stores, &mut |_, reason| {
        // SAFETY: a page of this image.
        observer.value(unsafe { read_volatile(REGISTER.get() as *const u64) });
        observer.looked();
        reason == r::PREEMPTION_TIMER
    })?;
    observer.print(&vm, "sampled", count);
    Ok(())
}

fn buffer_pages() -> impl Iterator<Item = u64> {
    (FRAMES.get()..FRAMES.get() + BUFFER).step_by(PAGE as usize)
}

/// EPT that has the buffer in small pages and keeps its flags.
fn track(vm: &Vm) {
    if let Some(ept) = &vm.ept {
        buffer_pages().for_each(|page| ept.map(page, PAGE, rights::RWX));
        vmx::write(f::EPTP, ept.pointer_with_flags());
    }
}

/// Looks at one page if it was written since, and makes its next write count again.
fn look(vm: &Vm, page: u64, observer: &mut Observer) -> bool {
    let Some(ept) = &vm.ept else { return false };
    let entry = ept.entry(page, 0);
    if entry & DIRTY != 0 {
        ept.set_entry(page, 0, entry & !DIRTY);
        // SAFETY: a page of this image.
        observer.value(unsafe { read_volatile(page as *const u64) });
    }
    entry & DIRTY != 0
}

fn flush(vm: &Vm) {
    if let Some(ept) = &vm.ept {
        let _ = vmx::invept(1, [ept.pointer_with_flags(), 0]);
    }
}

/// The dirty flags tell at each millisecond which pages of the buffer to look at.
fn dirty() -> Result<(), Stop> {
    let mut vm = with_timer()?;
    track(&vm);
    let (count, mut observer) = (many(), Observer::default());
    vm.run(count, 0, fill, &mut |vm, reason| {
        // All of them, not only up to the first.
        if buffer_pages().filter(|page| look(vm, *page, &mut observer)).count() > 0 {
            flush(vm);
        }
        observer.looked();
        reason == r::PREEMPTION_TIMER
    })?;
    observer.print(&vm, "dirty_flags", count);
    Ok(())
}

/// The CPU writes down each page that becomes dirty and exits when 512 are written down.
fn logged() -> Result<(), Stop> {
    const LAST: u64 = 511;
    let mut controls = plain();
    controls.secondary |= secondary::PML;
    let mut vm = Vm::with_ept(&controls)?;
    track(&vm);
    let log = pages::address(pages::page());
    vmx::write(f::PML_ADDR, log);
    vmx::write(f::PML_INDEX, LAST);
    let (count, mut observer) = (many(), Observer::default());
    let mut drain = |vm: &Vm, from: usize| {
        // SAFETY: the log's page is this image's.
        let entries = unsafe { *(log as *const [u64; 512]) };
        for page in entries.get(from..).unwrap_or_default() {
            look(vm, *page & !(PAGE - 1), &mut observer);
        }
        vmx::write(f::PML_INDEX, LAST);
        flush(vm);
        observer.looked();
    };
    let handler: Handler<'_> = &mut |vm, reason| {
        drain(vm, 0);
        reason == r::PML_FULL
    };
    vm.run(count, 0, fill, handler)?;
    // What is left is found without an exit.
    drain(&vm, (vmx::read(f::PML_INDEX) as u16).wrapping_add(1).into());
    observer.print(&vm, "pml", count);
    Ok(())
}

/// A million stores, or a tenth of that.
fn many() -> u64 {
    if record::limited() { STORES / 10 } else { STORES }
}

fn stores(count: u64) {
    for _ in 0..count {
        store(REGISTER.get(), cpu::rdtsc());
        work();
    }
}

fn fill(count: u64) {
    for i in 0..count {
        store(FRAMES.get() + i / BURST % (BUFFER / PAGE) * PAGE, cpu::rdtsc());
        work();
    }
}

/// What a driver does between two stores.
fn work() {
    // SAFETY: counts a register down.
    unsafe { asm!("2: dec {n}", "jnz 2b", n = inout(reg) WORK => _, options(nomem, nostack)) };
}
