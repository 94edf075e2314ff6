//! The boots of the lab: which hypervisors are below the guest, and what runs there.

use super::figures::{Boot, Figures};
use crate::backend::linux::{Job, LinuxKvm};
use crate::backend::{Payload, Spec, Unit};
use crate::boot::{self, Outcome};
use crate::cli::Fields;
use crate::session::{LONG, Session};
use crate::transcript::view::{Show, View};
use anyhow::Result;
use nvmx_setup::linux::Kernel;
use nvmx_setup::proc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// The guest of the lab.
pub const GUEST: &str = "lab";

/// The experiments that run under KVM too.
pub const COMPARED: [&str; 5] = ["price", "msr_bitmap", "paging", "mmio", "cow"];

/// What is below the lab's hypervisor.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Stack {
    /// The machine itself: one level
    One,
    /// nvmx: nested
    Nested,
    /// Two nvmx: nested twice
    Twice,
    /// Three
    Thrice,
    /// nvmx without VMCS shadowing
    Trapped,
    /// Two, without
    TrappedTwice,
    /// Three, without
    TrappedThrice,
    /// Linux with KVM, in nvmx's place
    Kvm,
    /// nvmx, and on it Linux with KVM as the guest hypervisor
    KvmOnNvmx,
}

impl Stack {
    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Stack::One => "one",
            Stack::Nested => "nested",
            Stack::Twice => "twice",
            Stack::Thrice => "thrice",
            Stack::Trapped => "trapped",
            Stack::TrappedTwice => "trapped-twice",
            Stack::TrappedThrice => "trapped-thrice",
            Stack::Kvm => "kvm",
            Stack::KvmOnNvmx => "kvm-on-nvmx",
        }
    }

    /// How many nvmx there are whose counters the lab reads.
    pub fn depth(self) -> u32 {
        match self {
            Stack::One | Stack::Kvm | Stack::KvmOnNvmx => 0,
            Stack::Nested | Stack::Trapped => 1,
            Stack::Twice | Stack::TrappedTwice => 2,
            Stack::Thrice | Stack::TrappedThrice => 3,
        }
    }

    /// How many events are in a bracket at most: deep stacks pay for each, and averages stay the same.
    fn events(self, session: &Session) -> Option<u32> {
        match self {
            _ if session.backend.below() > 0 && session.backend.unit() == Unit::Instructions => Some(10),
            Stack::Thrice | Stack::TrappedTwice | Stack::TrappedThrice => Some(10),
            Stack::Kvm | Stack::KvmOnNvmx => Some(50),
            _ => None,
        }
    }

    /// The boot in which the lab runs these experiments; all if there are none.
    ///
    /// # Errors
    /// [`nvmx_setup::error::Stop`] if a part of it cannot be had.
    pub fn spec(self, session: &Session, only: &[&str], more: &str) -> Result<Spec> {
        let only = if only.is_empty() { String::new() } else { format!("only={}", only.join(",")) };
        let events = self.events(session).map_or(String::new(), |n| format!("events={n}"));
        let args = format!("{only} {events} {more}").split_whitespace().collect::<Vec<_>>().join(" ");
        let mut spec = match self {
            Stack::One => session.bare(GUEST, &args)?,
            Stack::Nested => session.nested(GUEST, &args, Fields::Auto)?,
            Stack::Trapped => session.nested(GUEST, &args, Fields::Trapped)?,
            Stack::Twice | Stack::Thrice => session.stacked(GUEST, &args, Fields::Auto, self.depth())?,
            Stack::TrappedTwice | Stack::TrappedThrice => {
                session.stacked(GUEST, &args, Fields::Trapped, self.depth())?
            }
            Stack::Kvm | Stack::KvmOnNvmx => {
                let linux: LinuxKvm = session.linux(Kernel::Newest, false)?;
                let hypervisor = Some(Payload::new(session.images.guest(GUEST)?, args));
                let job = Job {
                    hypervisor,
                    parameters: KVM_INTEL.into(),
                    ..Job::parse("vmm=own").unwrap_or_else(|_| unreachable!("the words are right"))
                };
                let name = format!("lab-{}", self.name());
                let bare = Spec { timeout: LONG, ..linux.bare(&session.work("linux"), &name, &job, &session.machine)? };
                if self == Stack::Kvm { bare } else { session.under_nvmx(&bare, name, &session.options(Fields::Auto)) }
            }
        };
        spec.name = format!("lab-{}", self.name());
        Ok(spec)
    }
}

/// As where KVM takes nvmx's place in `run`.
const KVM_INTEL: &str = crate::backend::kvm_linux::KVM_INTEL;

/// Boots these, two at a time, and gives what came of each.
///
/// # Errors
/// If one cannot be started.
pub fn boot_all(session: &Session, specs: &[(Stack, Spec)]) -> Result<Vec<(Stack, Outcome)>> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((stack, spec)) = specs.get(next.fetch_add(1, Ordering::SeqCst)) {
                    if proc::interrupted() {
                        return;
                    }
                    let view = View::new(&session.ui, Show::Nothing);
                    let outcome = boot::boot(&session.paths, session.backend.as_ref(), spec, &view);
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((*stack, outcome));
                }
            });
        }
    });
    proc::check_interrupt()?;
    let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    let outcomes: Vec<(Stack, Outcome)> =
        done.into_iter().map(|(stack, outcome)| Ok((stack, outcome?))).collect::<Result<_>>()?;
    for (stack, outcome) in &outcomes {
        session.ui.detail(&format!("{}: {:.1} s", stack.name(), outcome.took.as_secs_f64()));
    }
    Ok(outcomes)
}

/// What a stack runs of the experiments that are wanted (none: all).
pub fn only_in<'a>(stack: Stack, wanted: &[&'a str]) -> Vec<&'a str> {
    match stack {
        Stack::Thrice | Stack::TrappedTwice | Stack::TrappedThrice => vec!["cascade"],
        Stack::Kvm | Stack::KvmOnNvmx => COMPARED.to_vec(),
        _ => wanted.to_vec(),
    }
}

/// The figures of these boots.
pub fn figures(session: &Session, outcomes: &[(Stack, &Outcome)]) -> Figures {
    let machine = match session.backend.unit() {
        Unit::Instructions => {
            format!("{}, CPU model {}", session.backend.name(), session.machine.model)
        }
        Unit::Cycles => {
            format!("{}, {}", session.backend.name(), session.backend.cpu(&session.machine))
        }
    };
    let mut figures = Figures::new(machine, session.backend.unit().name());
    figures.below = session.backend.below() > 0;
    for (stack, outcome) in outcomes {
        figures.needs.extend(outcome.transcript.texts().filter_map(needed));
        figures.boots.insert(stack.name().into(), Boot::read(&outcome.transcript, stack.depth()));
    }
    figures.needs.sort();
    figures.needs.dedup();
    figures
}

/// What nvmx says if the machine lacks something that it needs.
pub fn needed(line: &str) -> Option<String> {
    let (_, what) = line.split_once("this CPU lacks ")?;
    what.strip_suffix(", which nvmx needs").map(str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nvmx_lacks_is_read_from_its_line() {
        let line = "[nvmx ERROR] this CPU lacks unrestricted guest (bit 39), which nvmx needs";
        assert_eq!(needed(line).as_deref(), Some("unrestricted guest (bit 39)"));
        assert_eq!(needed("[nvmx INFO ] 1 CPUs found"), None);
    }
}
