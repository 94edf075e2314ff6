//! How much of its host-state area a vmcs12 is lent: learned from what L2 writes
//! ([ADR 0030](../../docs/adr/0030-the-fields-of-a-thread-are-lent.md)).

use crate::rules::checks::host_field_holds;
use crate::vmcs::slot::Slot;
use crate::vmcs::stale::Stale;
use crate::vmx::lent::{self, IN_MEMORY, LENT, LentValues, Loan, Returned};
use crate::vmx::{Capabilities, Field};

/// Two writes of a thread's fields with at most so many exits of L3 from the one to the other are a habit.
const HABIT: u64 = 8;
/// After so many entries to which L2 wrote none of them it is none any more.
const FORGOTTEN: u32 = 32;

/// What a vmcs12 is lent, and what is known of L2's habits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lending {
    /// What it is lent.
    pub loan: Loan,
    /// At which of its exits L2 last wrote a field of a thread that was not lent.
    written: Option<u64>,
    /// Entries in a row to which L2 wrote none, since they are.
    unused: u32,
}

/// L2 left a value in a lent field that breaks a rule, or that must be judged with others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RuleBroken;

impl Lending {
    /// Nothing, and nothing is known.
    pub const NOTHING: Self = Self { loan: Loan::Nothing, written: None, unused: 0 };

    /// A field that can be lent with this loan was written, behind so many exits of L3: what the vmcs12 is lent from now on.
    pub fn learn(&mut self, least: Loan, exits: u64) -> Loan {
        let habit = match least {
            // One that writes it behind its VMLAUNCH will do so again.
            Loan::Nothing | Loan::Stack | Loan::All => true,
            Loan::Thread => {
                let last = self.written.replace(exits);
                last.is_some_and(|last| last != exits && exits.wrapping_sub(last) <= HABIT)
            }
        };
        if habit { self.loan.max(least) } else { self.loan }
    }

    /// It is lent this from now on.
    pub fn is(&mut self, loan: Loan) {
        (self.loan, self.unused) = (loan, 0);
    }

    /// L2 has not written what it is lent for long.
    #[inline(always)]
    pub fn is_forgotten(&self) -> bool {
        self.unused >= FORGOTTEN
    }
}

impl Slot {
    /// vmcs02 is to be a shadow VMCS: what L2 is lent in it, which the copy has no more.
    #[inline(always)]
    pub(super) fn lend(&mut self) -> LentValues {
        match self.loan.loan {
            Loan::Nothing => LentValues::Nothing,
            Loan::Stack => LentValues::Stack([self.take(Field::HOST_RSP)]),
            // By instructions nothing more is lent.
            Loan::Thread | Loan::All => {
                let [stack, cr3, fs, gs] = LENT;
                LentValues::Thread([self.take(stack), self.take(cr3), self.take(fs), self.take(gs)])
            }
        }
    }

    /// The same in memory.
    #[inline(always)]
    pub(super) fn lend_all(&mut self) -> [u64; IN_MEMORY.len()] {
        IN_MEMORY.map(|field| self.take(field))
    }

    #[inline(always)]
    fn take(&mut self, field: Field) -> u64 {
        self.vmcs12.valid.remove(field);
        self.vmcs12.get(field)
    }

    /// What L2 was lent is in the copy again.
    #[inline(always)]
    pub(super) fn has_back(&mut self, values: Returned, offered: &Capabilities) -> Result<(), RuleBroken> {
        match values {
            Returned::Nothing => Ok(()),
            Returned::Stack([value]) => {
                self.vmcs12.fetched(Field::HOST_RSP, value);
                Ok(())
            }
            Returned::Thread(values) => self.thread_is_back(values, offered),
            Returned::All(values) => self.all_is_back(values, offered),
        }
    }

    #[inline(always)]
    fn all_is_back(&mut self, values: [u64; IN_MEMORY.len()], offered: &Capabilities) -> Result<(), RuleBroken> {
        let vmcs12 = &mut self.vmcs12;
        IN_MEMORY.into_iter().for_each(|field| vmcs12.valid.insert(field));
        let same = IN_MEMORY.into_iter().zip(values).all(|(field, value)| vmcs12.get(field) == value);
        if same { Ok(()) } else { self.all_is_back_changed(values, offered) }
    }

    #[inline(never)]
    fn all_is_back_changed(
        &mut self,
        [thread @ .., primary]: [u64; IN_MEMORY.len()],
        offered: &Capabilities,
    ) -> Result<(), RuleBroken> {
        let host = self.thread_is_back(thread, offered);
        self.write_copy(Field::CPU_BASED_VM_EXEC_CONTROL, primary, offered);
        // Other controls than those of windows are judged and merged anew, from vmcs01.
        if self.stale.contains(Stale::CONTROLS) { Err(RuleBroken) } else { host }
    }

    #[inline(never)]
    fn thread_is_back(
        &mut self,
        [stack, cr3, fs, gs]: [u64; lent::COUNT],
        offered: &Capabilities,
    ) -> Result<(), RuleBroken> {
        let vmcs12 = &mut self.vmcs12;
        vmcs12.fetched(Field::HOST_RSP, stack);
        let mut changed = 0;
        let mut back = |field, value| {
            changed |= vmcs12.get(field) ^ value;
            vmcs12.fetched(field, value);
            host_field_holds(field, value, offered)
        };
        let good = back(Field::HOST_CR3, cr3) & back(Field::HOST_FS_BASE, fs) & back(Field::HOST_GS_BASE, gs);
        self.loan.unused = if changed == 0 { self.loan.unused.saturating_add(1) } else { 0 };
        if good || changed == 0 {
            return Ok(());
        }
        self.stale |= Stale::HOST;
        Err(RuleBroken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_pointer_is_lent_at_once_and_a_thread_by_habit() {
        let mut lending = Lending::NOTHING;
        assert_eq!(lending.learn(Loan::Stack, 1), Loan::Stack);
        lending.is(Loan::Stack);
        // Three fields behind one exit, and again much later: no habit.
        for exits in [5, 5, 5, 14, 23, 1000, 1000] {
            assert_eq!(lending.learn(Loan::Thread, exits), Loan::Stack, "{exits}");
        }
        assert_eq!(lending.learn(Loan::Thread, 1000 + HABIT), Loan::Thread);
        lending.is(Loan::Thread);
        assert_eq!(lending.learn(Loan::Stack, 1100), Loan::Thread, "more is not taken away");
    }
}
