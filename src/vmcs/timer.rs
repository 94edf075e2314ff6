//! The VMX-preemption timer of L3 across exits that L2 does not see.
//!
//! It counts down by 1 each time that bit X of the TSC changes, X from IA32_VMX_MISC, while L3 runs; and on the machine that
//! L2 sees L3 runs on when nvmx handles an exit of its own. The processor's timer stands still meanwhile, and begins with
//! a whole count at each entry. So nvmx keeps the moment at which it ends.
//!
//! Source: Intel SDM vol. 3C (December 2024), "VMX-Preemption Timer"; vol. 3D, "Miscellaneous Data" (IA32_VMX_MISC).

use crate::vmx::{Field, FieldAccess};

const VALUE: Field = Field::VMX_PREEMPTION_TIMER_VALUE;

/// The timer of one vmcs12. Its vmcs02 is current in each function.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Timer {
    /// What L2 set for the last entry.
    set: u64,
    /// TSC >> X at which it is 0: known from the first exit on that L2 does not see.
    ends: Option<u64>,
}

impl Timer {
    /// L2 enters with the value that is in vmcs02.
    #[inline(always)]
    pub fn start(&mut self, vmcs02: &mut impl FieldAccess) {
        *self = Timer { set: vmcs02.read(VALUE), ends: None };
    }

    /// An exit goes to L2, which does not have the value saved: it finds what it set.
    #[inline(always)]
    pub fn give_back(&self, vmcs02: &mut impl FieldAccess) {
        vmcs02.write(VALUE, self.set);
    }

    /// L3 goes on after an exit that L2 does not see. `exit` and `now` are values of the TSC; `shift` is X.
    #[cold]
    pub fn go_on(&mut self, vmcs02: &mut impl FieldAccess, shift: u32, exit: u64, now: u64) {
        let ends = *self.ends.get_or_insert_with(|| (exit >> shift).saturating_add(vmcs02.read(VALUE)));
        vmcs02.write(VALUE, ends.saturating_sub(now >> shift));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The field in vmcs02.
    struct Vmcs02(u64);

    impl FieldAccess for Vmcs02 {
        fn read(&mut self, field: Field) -> u64 {
            assert_eq!(field, VALUE);
            self.0
        }

        fn write(&mut self, field: Field, value: u64) {
            assert_eq!(field, VALUE);
            self.0 = value;
        }
    }

    proptest! {
        /// A timer of `value` whose L3 runs, exits and is handled for any times at all ends when one without exits ends.
        #[test]
        fn it_ends_when_it_would_have_without_exits(
            shift in 0u32..32,
            value in 0u64..1 << 32,
            begin in 0u64..1 << 60,
            pieces in prop::collection::vec((0u64..1 << 34, 0u64..1 << 34), 1..40),
        ) {
            let (mut timer, mut vmcs02) = (Timer::default(), Vmcs02(value));
            timer.start(&mut vmcs02);
            let end = (begin >> shift) + value;
            let (mut now, mut loaded) = (begin, value);
            for (runs, handled) in pieces {
                let exit = now + runs;
                let counted = (exit >> shift) - (now >> shift);
                if counted >= loaded {
                    // The processor's timer fires here: not before it should, and at once where it is overdue.
                    prop_assert!(exit >> shift >= end);
                    prop_assert!((now >> shift) + loaded == end.max(now >> shift));
                    return Ok(());
                }
                now = exit + handled;
                vmcs02.0 = loaded - counted;
                timer.go_on(&mut vmcs02, shift, exit, now);
                loaded = vmcs02.0;
                prop_assert_eq!(loaded, end.saturating_sub(now >> shift));
            }
            timer.give_back(&mut vmcs02);
            prop_assert_eq!(vmcs02.0, value);
        }
    }

    #[test]
    fn a_new_entry_of_the_guest_starts_it_anew() {
        let mut timer = Timer::default();
        let mut go_on = |start: bool, left: u64, exit: u64, now: u64| {
            if start {
                timer.start(&mut Vmcs02(10));
            }
            let mut vmcs02 = Vmcs02(left);
            timer.go_on(&mut vmcs02, 2, exit, now);
            vmcs02.0
        };
        assert_eq!(go_on(true, 8, 40, 47), 7);
        assert_eq!(go_on(true, 9, 80, 80), 9);
        assert_eq!(go_on(false, 100, 81, 1000), 0, "overdue, whatever the processor has left");
    }
}
