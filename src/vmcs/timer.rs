//! The VMX-preemption timer of L3 across exits that L2 does not see.
//!
//! It counts down by 1 each time that bit X of the TSC changes, X from IA32_VMX_MISC, while L3 runs; and on the machine that
//! L2 sees L3 runs on when nvmx handles an exit of its own. The processor's timer stands still meanwhile, and begins with
//! a whole count at each entry. So nvmx keeps the moment at which it ends.
//!
//! Source: Intel SDM vol. 3C (December 2024), "VMX-Preemption Timer"; vol. 3D, "Miscellaneous Data" (IA32_VMX_MISC).

/// The timer of one vmcs12.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Timer {
    /// What L2 set for the last entry.
    set: u64,
    /// TSC >> X at which it is 0: known from the first exit on that L2 does not see.
    ends: Option<u64>,
}

impl Timer {
    /// L2 enters with this value.
    #[inline(always)]
    pub fn start(&mut self, value: u64) {
        *self = Timer { set: value, ends: None };
    }

    /// What L2 set for the last entry.
    #[inline(always)]
    pub const fn set(&self) -> u64 {
        self.set
    }

    /// L3 goes on after an exit that L2 does not see: what the processor's timer is to begin with. `left` is what it had at
    /// the exit, the rest are values of the TSC; `shift` is X.
    pub fn go_on(&mut self, left: impl FnOnce() -> u64, shift: u32, exit: u64, now: u64) -> u64 {
        let ends = *self.ends.get_or_insert_with(|| (exit >> shift).saturating_add(left()));
        ends.saturating_sub(now >> shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// A timer of `value` whose L3 runs, exits and is handled for any times at all ends when one without exits ends.
        #[test]
        fn it_ends_when_it_would_have_without_exits(
            shift in 0u32..32,
            value in 0u64..1 << 32,
            begin in 0u64..1 << 60,
            pieces in prop::collection::vec((0u64..1 << 34, 0u64..1 << 34), 1..40),
        ) {
            let mut timer = Timer::default();
            timer.start(value);
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
                loaded = timer.go_on(|| loaded - counted, shift, exit, now);
                prop_assert_eq!(loaded, end.saturating_sub(now >> shift));
                prop_assert_eq!(timer.set(), value);
            }
        }
    }

    #[test]
    fn a_new_entry_of_l2_starts_it_anew() {
        let mut timer = Timer::default();
        timer.start(10);
        assert_eq!(timer.go_on(|| 8, 2, 40, 47), 7);
        timer.start(10);
        assert_eq!(timer.go_on(|| 9, 2, 80, 80), 9);
        assert_eq!(timer.go_on(|| unreachable!(), 2, 81, 1000), 0, "overdue");
    }
}
