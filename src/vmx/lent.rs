//! The fields of nvmx's own that L2 may have to itself in vmcs02, while that is a shadow VMCS: what a hypervisor with threads of its
//! own writes before an entry, of the host-state area ([ADR 0021](../../docs/adr/0021-host-rsp-is-lent.md),
//! [ADR 0030](../../docs/adr/0030-the-fields-of-a-thread-are-lent.md)), and where VMCSs are in memory the controls by which it opens
//! windows ([ADR 0008](../../docs/adr/0008-vmcs-in-memory.md)).

use super::field::Field;

/// How many of the host-state area there are.
pub const COUNT: usize = 4;

/// Those of the host-state area, in the order in which a [`Loan`] takes them.
pub const LENT: [Field; COUNT] = [Field::HOST_RSP, Field::HOST_CR3, Field::HOST_FS_BASE, Field::HOST_GS_BASE];

/// What is lent in memory, those first.
pub const IN_MEMORY: [Field; COUNT + 1] = {
    let [stack, cr3, fs, gs] = LENT;
    [stack, cr3, fs, gs, Field::CPU_BASED_VM_EXEC_CONTROL]
};

/// How much of it a vmcs12 is lent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Loan {
    /// Nothing.
    Nothing,
    /// The stack pointer.
    Stack,
    /// All that belongs to a thread.
    Thread,
    /// That and the primary controls: in memory alone, where it costs no instruction of VMX, and there always.
    All,
}

impl Loan {
    /// The fields that it opens.
    pub const fn fields(self) -> &'static [Field] {
        let [stack, ..] = &LENT;
        match self {
            Loan::Nothing => &[],
            Loan::Stack => core::slice::from_ref(stack),
            Loan::Thread => &LENT,
            Loan::All => &IN_MEMORY,
        }
    }

    /// The least that opens this field; `None` if none does.
    #[inline(always)]
    pub const fn with(field: Field) -> Option<Self> {
        match field {
            Field::HOST_RSP => Some(Loan::Stack),
            Field::HOST_CR3 | Field::HOST_FS_BASE | Field::HOST_GS_BASE => Some(Loan::Thread),
            Field::CPU_BASED_VM_EXEC_CONTROL => Some(Loan::All),
            _ => None,
        }
    }
}

/// The values of what is to be lent, by instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LentValues {
    /// Nothing is.
    Nothing,
    /// Of [`Loan::Stack`].
    Stack([u64; 1]),
    /// Of [`Loan::Thread`].
    Thread([u64; COUNT]),
}

/// What L2 left where it was lent something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Returned {
    /// It was lent nothing.
    Nothing,
    /// Of [`Loan::Stack`].
    Stack([u64; 1]),
    /// Of [`Loan::Thread`].
    Thread([u64; COUNT]),
    /// Of [`Loan::All`].
    All([u64; IN_MEMORY.len()]),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loan_opens_the_fields_that_need_it_or_less() {
        for field in Field::ALL.iter().copied() {
            for loan in [Loan::Nothing, Loan::Stack, Loan::Thread, Loan::All] {
                let opened = Loan::with(field).is_some_and(|least| least <= loan);
                assert_eq!(loan.fields().contains(&field), opened, "{field} by {loan:?}");
            }
            assert_eq!(IN_MEMORY.contains(&field), Loan::with(field).is_some());
        }
    }
}
