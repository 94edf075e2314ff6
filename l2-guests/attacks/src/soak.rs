//! Soak: very many exits and switches of guests, after which nothing must have grown: free frames, the depth of the stack, what
//! an exit costs.

use crate::{
    guest::{self, Exit, Extra, Guest},
    lab::Lab,
};
use l2_kit::{
    Check, cpu,
    identity::{self, Slot},
    log,
    protocol::abi::Counter,
    report,
    serial::Serial,
    vmx::{self, reason},
};

/// Pieces of a run; the first and the last are compared.
const PIECES: u64 = 10;

/// What nvmx has spent.
#[derive(Clone, Copy, Default)]
struct Spent {
    ticks: u64,
    exits: u64,
    vmreads: u64,
    vmwrites: u64,
    frames: u64,
    stack: u64,
}

impl Spent {
    fn now() -> Self {
        if Slot::find() != Slot::Nvmx {
            return Self::default();
        }
        let counters = identity::counters();
        let [ticks, exits, vmreads, vmwrites] =
            [Counter::L1Ticks, Counter::HwExits, Counter::Vmread, Counter::Vmwrite].map(|c| counters[c as usize]);
        let (frames, stack) = identity::frames_and_stack();
        Self { ticks, exits, vmreads, vmwrites, frames, stack }
    }

    /// Of each of `count` events since `before`, in thousandths.
    fn each(&self, before: &Self, count: u64) -> [u64; 4] {
        [
            self.ticks - before.ticks,
            self.exits - before.exits,
            self.vmreads - before.vmreads,
            self.vmwrites - before.vmwrites,
        ]
        .map(|sum| sum * 1000 / count.max(1))
    }
}

/// Reflected exits, then switches between guests.
pub fn all(lab: &mut Lab) {
    let exits = lab.exits();
    if !lab.lists(format_args!("soak: exits")) {
        lab.with(Extra::default());
        lab.guest.start(cpuid_for_ever, 0);
        constant("exits", exits, |count| {
            (0..count).all(|_| {
                let exit = lab.guest.run();
                lab.guest.skip();
                exit == Exit::Reason(reason::CPUID)
            })
        });
    }
    let switches = lab.exits() / 100;
    if !lab.lists(format_args!("soak: switches of guests")) {
        // More than nvmx has places for at once, so that VMCSs are written back and loaded anew.
        let mut guests: [Guest; GUESTS] = core::array::from_fn(|i| {
            let guest = Guest::new(0x20 + i as u64).and_then(|mut guest| guest.fresh(Extra::default()).map(|()| guest));
            guest.unwrap_or_else(|missing| report::die(format_args!("{missing}")))
        });
        let mut turn = 0;
        constant("switches of guests", switches, |count| {
            (0..count).all(|_| {
                turn = (turn + 1) % GUESTS;
                let guest = &mut guests[turn];
                let loaded = vmx::vmptrld(guest.vcpu.vmcs).succeeded();
                loaded && guest.execute(guest::nothing, turn as u64) == Exit::Done(turn as u64)
            })
        });
        guests.iter().for_each(|guest| {
            let _ = vmx::vmclear(guest.vcpu.vmcs);
        });
    }
}

const GUESTS: usize = 70;

/// Lets `run` make so many events in pieces, and compares what the first and the last took. The very first events, which fill
/// what is empty, come before.
fn constant(name: &str, count: u64, mut run: impl FnMut(u64) -> bool) {
    let piece = count / PIECES;
    let mut right = run(piece / 10 + 4 * GUESTS as u64);
    let mut first = None;
    let mut last = ([0; 4], 0, 0);
    for _ in 0..PIECES {
        let before = Spent::now();
        right &= run(piece);
        let after = Spent::now();
        last = (after.each(&before, piece), after.frames, after.stack);
        first.get_or_insert(last);
    }
    let first = first.unwrap_or(last);
    log!(
        "{name}: {count}; a thousand cost {:?} ticks, exits, VMREADs, VMWRITEs at first and {:?} at last",
        first.0,
        last.0
    );
    log!("{name}: frames free {} and {}, stack used {} and {}", first.1, last.1, first.2, last.2);
    // A tick is an instruction where one CPU is alone; a hundredth more is something else.
    let same = first.0.iter().zip(last.0).all(|(first, last)| last <= first + first / 100);
    Check::new(&mut Serial, format_args!("soak: {name}"))
        .fact("cases", count)
        .expect("right", right, true)
        .expect("cost_is_constant", same, true)
        .expect("frames_are_constant", first.1 == last.1, true)
        .expect("stack_is_constant", first.2 == last.2, true)
        .end();
}

/// Exits by CPUID again and again.
extern "C" fn cpuid_for_ever(_: u64) -> u64 {
    loop {
        cpu::cpuid(0, 0);
    }
}
