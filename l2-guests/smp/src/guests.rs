//! A guest on each CPU, all at once, and one CPU's bitmap that another one changes.

use crate::{
    cpus,
    guest::{self, Exit, Guest},
};
use l2_kit::{
    cpu, fields as f, identity, pages,
    protocol::abi::Counter,
    report,
    setup::Controls,
    smp,
    vmx::{self, reason},
};

const ROUNDS: u64 = 300;
/// The word with the address of CPU 0's bitmap.
const BITMAP: usize = 8;

/// Enters VMX operation on all CPUs and runs guests there.
pub fn all(_ids: &[u32]) {
    smp::run_on_all(cpus(), |index| {
        guest::enter_vmx();
        let guest = Guest::make(index, 1 + index as u64, Controls::default());
        smp::note(index, 0, 1);
        // All begin together.
        (0..cpus()).for_each(|other| smp::wait_for_note(other, 0));
        guest.start(exits, ROUNDS, false);
        let mut seen = 0;
        loop {
            match guest.run() {
                Exit::Reason(reason::CPUID) => {
                    seen += 1;
                    guest.vcpu.registers.rax = seen * 2;
                    guest.skip();
                }
                other => {
                    smp::note(index, 1, seen);
                    smp::note(index, 2, other.word());
                    return;
                }
            }
        }
    });
    crate::print("a guest on each CPU", &["ready", "cpuid_exits", "sum"]);
    bitmap();
    if identity::Slot::find() == identity::Slot::Nvmx {
        counters();
    }
}

/// Sums up what CPUID gives: 2 + 4 + ... if no exit and no register is lost.
extern "C" fn exits(rounds: u64) -> u64 {
    (0..rounds).map(|_| u64::from(cpu::cpuid(0, 0)[0])).sum()
}

/// Reads an MSR as often as asked.
extern "C" fn read_msr(rounds: u64) -> u64 {
    (0..rounds).map(|_| cpu::rdmsr(cpu::LSTAR)).sum()
}

/// nvmx's counters: a number for each CPU, and sums that are those of all CPUs.
fn counters() {
    let reflected = |values: identity::Counters| values[Counter::Reflected as usize];
    let snapshot: smp::Job = |index| {
        smp::note(index, 0, identity::counters()[Counter::Reflected as usize]);
        smp::note(index, 1, u64::from(identity::cpus().1));
    };
    smp::run_on_all(cpus(), snapshot);
    let sum: u64 = (0..cpus()).map(|index| smp::noted(index, 0)).sum();
    let told = identity::counter_of_all_cpus(Counter::Reflected);
    if told != sum || sum < reflected(identity::counters()) {
        report::fail(format_args!("{told} exits reflected on all CPUs, not {sum}"));
    }
    let numbered = (0..cpus()).all(|index| smp::noted(index, 1) == index as u64);
    if !numbered || identity::cpus() != (cpus() as u32, 0) {
        report::fail(format_args!("nvmx counts CPUs otherwise: {:?}", identity::cpus()));
    }
    smp::clear_notes();
}

/// The last CPU changes the MSR bitmap of CPU 0's guest between two entries.
fn bitmap() {
    smp::note(0, BITMAP, vmx::read(f::MSR_BITMAP));
    let other = cpus() - 1;
    let guest = guest::of(0);
    let mut count = |word: usize| {
        guest.start(read_msr, 5, false);
        let mut exits = 0;
        while guest.run() == Exit::Reason(reason::RDMSR) {
            exits += 1;
            guest.vcpu.registers.set_edx_eax(0);
            guest.skip();
        }
        smp::note(0, word, exits);
    };
    count(0);
    smp::run_on(other, |_| change(true));
    count(1);
    count(2);
    smp::run_on(other, |_| change(false));
    count(3);
    smp::run_on(other, |_| change(true));
    count(4);
    crate::print("a bitmap that another CPU changes", &["before", "set", "still_set", "cleared", "set_again"]);
}

/// Sets or clears the bit for reads of IA32_LSTAR in the bitmap that CPU 0 has noted.
fn change(intercept: bool) {
    // SAFETY: the page is CPU 0's, which waits.
    let page = unsafe { pages::at(smp::noted(0, BITMAP)) };
    let bit = (cpu::LSTAR & 0x1FFF) as usize;
    let word = &mut page[1024 / 8 + bit / 64];
    *word = *word & !(1 << (bit % 64)) | u64::from(intercept) << (bit % 64);
}
