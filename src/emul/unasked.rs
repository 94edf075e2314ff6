//! Exits of L2 that no control of vmcs01 asks for and that `run::guest_exit` has no line for.
//!
//! The rule: whatever L2 or its user mode executes must not end the machine. An exit without a control is one of an
//! instruction that always exits (SDM vol. 3C, "Instructions That Cause VM Exits Unconditionally", and the instructions of
//! TDX), of a feature that nvmx does not offer; also one that is newer than this table. L2 gets what a processor without the
//! feature has for it: #UD. An exit by a control that nvmx does not set would be a fault of the processor or of nvmx: nothing
//! can be said about the state then, so the machine ends.

use crate::vmx::exit::BasicReason;

/// What L2 gets.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unasked {
    /// #UD
    InvalidOpcode,
    /// The end of the machine, for this reason.
    Impossible(&'static str),
}

/// Decides by the basic reason alone.
pub const fn outcome(reason: BasicReason) -> Unasked {
    use BasicReason as R;
    match reason {
        // Always exit. SMX and TDX are not offered; CR4.SMXE, which L2 may set as IA32_VMX_CR4_FIXED1 says, changes nothing.
        R::GETSEC | R::SEAMCALL | R::TDCALL => Unasked::InvalidOpcode,
        // Exits in VMX non-root operation only with "enable VM functions"; without it #UD, and some L0 exits all the same.
        R::VMFUNC => Unasked::InvalidOpcode,
        R::EXTERNAL_INTERRUPT => Unasked::Impossible("no external-interrupt exiting"),
        R::IO_SMI | R::OTHER_SMI | R::RSM => Unasked::Impossible("no dual-monitor treatment of SMIs"),
        R::INTERRUPT_WINDOW | R::PREEMPTION_TIMER => Unasked::Impossible("not armed"),
        R::HLT | R::INVLPG | R::RDPMC | R::RDTSC | R::RDTSCP | R::MWAIT | R::MONITOR | R::PAUSE | R::DR_ACCESS => {
            Unasked::Impossible("a primary control that is clear")
        }
        R::IO_INSTRUCTION => Unasked::Impossible("no I/O exiting"),
        R::TPR_BELOW_THRESHOLD | R::APIC_ACCESS | R::VIRTUALIZED_EOI | R::APIC_WRITE => {
            Unasked::Impossible("no APIC virtualization")
        }
        R::GDTR_IDTR_ACCESS | R::LDTR_TR_ACCESS | R::WBINVD | R::RDRAND | R::RDSEED | R::INVPCID => {
            Unasked::Impossible("a secondary control that is clear")
        }
        R::XSAVES | R::XRSTORS | R::PCONFIG | R::UMWAIT | R::TPAUSE => Unasked::Impossible("enabled, and not to exit"),
        R::ENCLS | R::ENCLV | R::ENQCMD_PASID | R::ENQCMDS_PASID | R::BUS_LOCK | R::INSTRUCTION_TIMEOUT => {
            Unasked::Impossible("a secondary control that is clear")
        }
        R::LOADIWKEY | R::RDMSRLIST | R::WRMSRLIST => Unasked::Impossible("no tertiary controls"),
        R::PML_FULL | R::SPP_EVENT => Unasked::Impossible("a feature of EPT that ept01 does not use"),
        R::EPT_MISCONFIGURATION => Unasked::Impossible("ept01 is nvmx's own"),
        R::ENTRY_INVALID_GUEST_STATE | R::ENTRY_MSR_LOADING | R::ENTRY_MACHINE_CHECK => {
            Unasked::Impossible("no entry failure without bit 31")
        }
        // Handled: they do not come here.
        R::EXCEPTION_OR_NMI
        | R::TRIPLE_FAULT
        | R::INIT_SIGNAL
        | R::SIPI
        | R::NMI_WINDOW
        | R::MONITOR_TRAP_FLAG
        | R::TASK_SWITCH
        | R::CPUID => HANDLED,
        R::INVD | R::VMCALL | R::VMCLEAR | R::VMLAUNCH | R::VMPTRLD | R::VMPTRST | R::VMREAD | R::VMRESUME => HANDLED,
        R::VMWRITE | R::VMXOFF | R::VMXON | R::CR_ACCESS | R::RDMSR | R::WRMSR | R::EPT_VIOLATION | R::INVEPT => {
            HANDLED
        }
        R::INVVPID | R::XSETBV => HANDLED,
        // Newer than the table.
        _ => Unasked::InvalidOpcode,
    }
}

const HANDLED: Unasked = Unasked::Impossible("nvmx handles it");

#[cfg(test)]
mod tests {
    use super::*;

    /// The arms of `run::guest_exit::dispatch`, from its text.
    fn handled() -> Vec<BasicReason> {
        let text = include_str!("../run/guest_exit.rs");
        let named =
            |reason: &&BasicReason| reason.name().is_some_and(|name| text.contains(&format!("BasicReason::{name} =>")));
        BasicReason::KNOWN.iter().filter(named).copied().collect()
    }

    #[test]
    fn every_basic_reason_has_an_outcome_and_no_instruction_ends_the_machine() {
        let handled = handled();
        assert!(handled.len() >= 25 && handled.contains(&BasicReason::TASK_SWITCH));
        for number in 0..=u16::MAX {
            let reason = BasicReason(number);
            let outcome = outcome(reason);
            match reason.name() {
                // 35, 38, 42, 71 and what is newer than the table
                None => assert_eq!(outcome, Unasked::InvalidOpcode, "{reason}"),
                Some(_) if handled.contains(&reason) => {
                    assert!(matches!(outcome, HANDLED | Unasked::InvalidOpcode), "{reason}");
                }
                Some(_) => assert_ne!(outcome, HANDLED, "{reason} has no line in guest_exit"),
            }
        }
    }

    /// SDM vol. 3C, "Instructions That Cause VM Exits Unconditionally", and the TDX instructions, by number.
    #[test]
    fn what_always_exits_is_handled_or_an_invalid_opcode() {
        let always = [10, 11, 13, 18, 19, 20, 21, 22, 24, 26, 27, 50, 53, 55, 76, 77];
        let handled = handled();
        for number in always {
            let reason = BasicReason(number);
            assert!(handled.contains(&reason) || outcome(reason) == Unasked::InvalidOpcode, "{reason}");
        }
    }
}
