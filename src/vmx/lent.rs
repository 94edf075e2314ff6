//! The fields of the host-state area that L2 may have to itself in vmcs02, while that is a shadow VMCS: what a hypervisor with threads
//! of its own writes before an entry ([ADR 0021](../../docs/adr/0021-host-rsp-is-lent.md),
//! [ADR 0030](../../docs/adr/0030-the-fields-of-a-thread-are-lent.md)).

use super::field::Field;

/// How many there are.
pub const COUNT: usize = 4;

/// All of them, in the order in which a [`Loan`] takes them.
pub const LENT: [Field; COUNT] = [Field::HOST_RSP, Field::HOST_CR3, Field::HOST_FS_BASE, Field::HOST_GS_BASE];

/// How much of it a vmcs12 is lent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Loan {
    /// Nothing.
    Nothing,
    /// The stack pointer.
    Stack,
    /// All that belongs to a thread.
    Thread,
}

impl Loan {
    /// The fields that it opens.
    pub const fn fields(self) -> &'static [Field] {
        let [stack, ..] = &LENT;
        match self {
            Loan::Nothing => &[],
            Loan::Stack => core::slice::from_ref(stack),
            Loan::Thread => &LENT,
        }
    }

    /// The least that opens this field; `None` if none does.
    #[inline(always)]
    pub const fn with(field: Field) -> Option<Self> {
        match field {
            Field::HOST_RSP => Some(Loan::Stack),
            Field::HOST_CR3 | Field::HOST_FS_BASE | Field::HOST_GS_BASE => Some(Loan::Thread),
            _ => None,
        }
    }
}

/// The values of what is lent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LentValues {
    /// Nothing is.
    Nothing,
    /// Of [`Loan::Stack`].
    Stack([u64; 1]),
    /// Of [`Loan::Thread`].
    Thread([u64; COUNT]),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loan_opens_the_fields_that_need_it_or_less() {
        for field in Field::ALL.iter().copied() {
            for loan in [Loan::Nothing, Loan::Stack, Loan::Thread] {
                let opened = Loan::with(field).is_some_and(|least| least <= loan);
                assert_eq!(loan.fields().contains(&field), opened, "{field} by {loan:?}");
            }
            assert_eq!(LENT.contains(&field), Loan::with(field).is_some());
        }
    }
}
