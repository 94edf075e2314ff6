//! Entries that the CPU refuses: bad controls (error 7), bad host state (error 8), bad guest state (exit reason 33), MSRs
//! that cannot be loaded (exit reason 34).
//!
//! Sources: SDM "Checks on VMX Controls and Host-State Area", "Checking and Loading Guest State", "Loading MSRs".

mod bits;
mod controls;
mod events;
mod guest_state;
mod host;
mod msr_lists;

use crate::guest::{self, Exit, Guest};
use l2_kit::{
    Check, fields as f,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, secondary},
    vmx::{self, Outcome},
};

const NOT_CANONICAL: u64 = 1 << 62;
const BAD_GUEST: Exit = Exit::Failed(33, 0);

/// A change to a field.
#[derive(Clone, Copy)]
pub enum Change {
    /// This value
    Set(u64),
    /// These bits on
    On(u64),
    /// These bits off
    Off(u64),
}

use Change::{Off, On, Set};

impl Change {
    /// What becomes of a value.
    fn of(self, old: u64) -> u64 {
        match self {
            Set(value) => value,
            On(bits) => old | bits,
            Off(bits) => old & !bits,
        }
    }
}

/// All of it.
///
/// # Errors
/// What the CPU lacks for a plain guest.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    launch_state(&mut guest);
    controls::all(&mut guest);
    host::all(&mut guest);
    guest_state::segments(&mut guest);
    guest_state::registers(&mut guest);
    events::all(&mut guest);
    msr_lists::all(&mut guest);
    bits::all(&mut guest);
    ok(&mut guest, "entry after all this");
    Ok(())
}

fn ok(guest: &mut Guest, name: &str) {
    Check::new(&mut Serial, name).expect("result", guest.execute(guest::nothing, 5), Exit::Done(5)).end();
}

fn launch_state(guest: &mut Guest) {
    guest.vcpu.launched = true;
    let resumed = guest.execute(guest::nothing, 5);
    guest.vcpu.launched = false;
    let launched = guest.execute(guest::nothing, 5);
    guest.vcpu.launched = false;
    let again = guest.execute(guest::nothing, 5);
    guest.vcpu.launched = true;
    let resumed_now = guest.execute(guest::nothing, 5);
    // MOV SS keeps the next instruction from entering.
    let blocked = l2_kit::vmx!("mov {s:e}, ss\nmov ss, {s:e}\nvmresume", s = out(reg) _);
    Check::new(&mut Serial, "launch state")
        .expect("vmresume_first", resumed, Exit::Refused(Outcome::FailValid(5)))
        .expect("vmlaunch", launched, Exit::Done(5))
        .expect("vmlaunch_again", again, Exit::Refused(Outcome::FailValid(4)))
        .expect("vmresume", resumed_now, Exit::Done(5))
        .expect("blocked_by_mov_ss", blocked, Outcome::FailValid(26))
        .end();
}

/// The most fields that an attempt changes.
const MOST: usize = 8;

/// Tries to enter with some fields changed; tells how that ended and whether RIP and RFLAGS stayed.
pub fn try_with(guest: &mut Guest, changes: &[(u32, Change)]) -> (Exit, bool) {
    guest.start(guest::nothing, 5);
    let mut before = [(0, 0); MOST];
    for (saved, (field, change)) in before.iter_mut().zip(changes) {
        let old = vmx::read(*field);
        *saved = (*field, old);
        vmx::write(*field, change.of(old));
    }
    let (rip, rflags) = (vmx::read(f::GUEST_RIP), vmx::read(f::GUEST_RFLAGS));
    let got = guest.run();
    let kept = (vmx::read(f::GUEST_RIP), vmx::read(f::GUEST_RFLAGS)) == (rip, rflags);
    for (field, old) in before.into_iter().take(changes.len()).rev() {
        vmx::write(field, old);
    }
    (got, kept)
}

/// [`try_with`] as a record.
fn attempt(guest: &mut Guest, name: &str, changes: &[(u32, Change)], wanted: Exit) {
    let (got, kept) = try_with(guest, changes);
    let mut out = Serial;
    let check = Check::new(&mut out, name).expect("result", got, wanted);
    match wanted {
        Exit::Done(_) => check.end(),
        _ => check.expect("guest_kept", kept, true).end(),
    }
}

/// Without the control a case says nothing: then there is no attempt.
fn attempt_if(guest: &mut Guest, kind: Kind, bits: u32, name: &str, changes: &[(u32, Change)], wanted: Exit) {
    if setup::allowed_one(kind, bits) {
        attempt(guest, name, changes, wanted);
    } else {
        Check::new(&mut Serial, name).fact("offered", false).end();
    }
}
