//! Events that nvmx holds back or has put into a VMCS: the data. `guest::events` and `nested::events` act on them.

use crate::hw::cpu::Arrived;
use crate::vmcs::slots::SlotId;
use crate::vmx::Field;
use bitflags::bitflags;

bitflags! {
    /// Events for a guest that cannot take them yet.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Waiting: u8 {
        /// An NMI that arrived in nvmx.
        const NMI = Arrived::NMI.bits();
        /// A machine check that arrived in nvmx.
        const MACHINE_CHECK = Arrived::MACHINE_CHECK.bits();
        /// An INIT that arrived while L2 was in VMX root operation, where it is blocked.
        const INIT = 1 << 5;
        /// No event waits, but nvmx has put something into the VMCS of the guest: [`Events`] says what.
        const OWN = 1 << 2;
        /// No event waits: L3's translations are looked at before each entry (`stale=warn`).
        const LOOK = 1 << 3;
        /// No event waits: what is entered goes into the trace (`trace=N`).
        const TRACE = 1 << 4;
        /// What is done before every entry, for as long as the processor runs.
        const ALWAYS = Self::LOOK.bits() | Self::TRACE.bits();
    }
}

/// L2's processor on its way from an INIT to its first instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Startup {
    /// It runs, or waits for a start-up message in the state after an INIT.
    Done,
    /// It waits for a start-up message; vmcs01 is not in the state after an INIT yet.
    Waiting,
    /// The message came; L2 has not been entered since.
    Entering,
}

/// Fields of an injected event, which are vmcs12's: information, error code, instruction length.
pub const INJECTION: [Field; 3] =
    [Field::VM_ENTRY_INTR_INFO_FIELD, Field::VM_ENTRY_EXCEPTION_ERROR_CODE, Field::VM_ENTRY_INSTRUCTION_LEN];

/// What nvmx has put into a VMCS for events of its own.
#[derive(Default)]
pub struct Events {
    /// The next exit of L3 by the monitor trap flag is nvmx's own.
    pub stops_nested: bool,
    /// The activity state that L3 keeps in such an exit: a processor may say that it woke up.
    pub activity: Option<u64>,
    /// The slot whose vmcs02 has an event of nvmx's in it, and what L2 had there.
    pub lent: Option<(SlotId, [u64; 3])>,
}
