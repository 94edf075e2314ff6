//! The hypervisor: its guests, and the loop that runs them.

use crate::{
    cpuid::Leaves,
    events::{self, MOV_CR8_SHADOWED, TIMER, Who, XSETBV},
    exits::{self, Next},
    guest::{self, Guest},
    measure::Bracket,
    observe, payload,
};
use core::ops::Range;
use l2_kit::{
    arrayvec::ArrayVec,
    cpu, fields as f,
    identity::Slot,
    pages::{self, LARGE},
    report,
    setup::Missing,
    vmx,
};

/// All there is.
pub struct Hypervisor {
    /// The guests that are alive
    pub guests: ArrayVec<Guest, 3>,
    /// Index of the one whose VMCS is current
    pub current: usize,
    /// What is being measured
    pub bracket: Bracket,
    /// The event whose first exit is to be looked at
    pub observed: Option<usize>,
    /// Exits since the bracket began
    pub exits: u64,
    /// What the guests see in the intercepted MSR
    pub virtual_msr: u64,
    /// The task priority of the guest that has no virtual-APIC page
    pub virtual_priority: u64,
    /// What the guests see of CPUID
    pub leaves: Leaves,
    /// Physical addresses that the guests find missing and get when they touch them
    pub holes: Range<u64>,
    /// How often the timer is still to fire
    pub timer: u64,
}

const PLAIN: usize = 0;
/// The guest that the plain one takes turns with.
pub const PARTNER: usize = 1;
const STRICT: usize = 2;

static GREETINGS: [&str; 3] = [
    "Hello from the guest's guest: every exit of mine is counted.",
    "Hello from its neighbour: we share a CPU and take turns.",
    "Hello from a third guest: my hypervisor watches my control registers.",
];

impl Hypervisor {
    /// Makes the guests.
    ///
    /// # Errors
    /// What the CPU lacks.
    pub fn new(slot: Slot) -> Result<Self, Missing> {
        if !guest::has_timer() {
            events::leave_out(TIMER);
        }
        if !guest::has_tpr_shadow() {
            events::leave_out(MOV_CR8_SHADOWED);
        }
        if cpu::cr4() & cpu::CR4_OSXSAVE == 0 {
            events::leave_out(XSETBV);
        }
        let (hole, fresh) = (pages::take(LARGE, LARGE), pages::take(LARGE, LARGE));
        payload::HOLE.set(hole);
        payload::FRESH.set(fresh);
        let ept = guest::memory(hole, fresh);
        let [a, b, c] = &GREETINGS;
        let guests = ArrayVec::from([
            Guest::new(Who::Plain, 1, ept, payload::raise_events, a)?,
            Guest::new(Who::Plain, 2, ept, payload::yield_for_ever, b)?,
            Guest::new(Who::Strict, 3, ept, payload::raise_events, c)?,
        ]);
        Ok(Self {
            guests,
            current: STRICT,
            bracket: Bracket::new(slot),
            observed: None,
            exits: 0,
            virtual_msr: 0,
            virtual_priority: 0,
            leaves: Leaves::default(),
            holes: hole..hole + LARGE,
            timer: 0,
        })
    }

    /// Runs the guests that raise events, one after the other.
    pub fn work(&mut self) {
        for guest in [PLAIN, STRICT] {
            self.switch_to(guest);
            if let Err(why) = self.run() {
                report::fail(format_args!("{why} at {:#x}", vmx::read(f::GUEST_RIP)));
                return;
            }
        }
    }

    /// Makes another guest the current one.
    pub fn switch_to(&mut self, guest: usize) {
        self.current = guest;
        if !vmx::vmptrld(self.guests[guest].vcpu.vmcs).succeeded() {
            report::fail(format_args!("VMPTRLD of guest {guest}"));
        }
    }

    /// Runs guests until one is done.
    fn run(&mut self) -> Result<(), exits::Stop> {
        loop {
            self.guests[self.current].vcpu.run().map_err(exits::Stop::NotEntered)?;
            self.exits += 1;
            let reason = vmx::read(f::EXIT_REASON) as u32;
            if self.observed.is_some() {
                observe::exit(self, reason);
            }
            if exits::handle(self, reason)? == Next::Done {
                return Ok(());
            }
        }
    }
}
