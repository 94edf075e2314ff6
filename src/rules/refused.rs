//! Controls that L2 is not offered, and why: the counterpart of [`caps`](super::caps).

use crate::vmx::controls::{
    EntryControls as Entry, ExitControls as Exit, SecondaryControls as Secondary, TertiaryControls as Tertiary,
};

/// One control that is refused.
#[derive(Clone, Copy)]
pub struct Refused<C> {
    /// The bit.
    pub control: C,
    /// Why nvmx does not implement it.
    pub why: &'static str,
}

macro_rules! refusals {
    ($(#[$doc:meta])* $table:ident: $control:ident { $( $bit:ident, $why:expr; )* }) => {
        $(#[$doc])*
        pub const $table: &[Refused<$control>] = &[ $( Refused { control: $control::$bit, why: $why }, )* ];
    };
}

/// A feature that could only be offered untested (invariant I11).
const UNTESTED: &str = "no processor of the tests has it";
const NO_PT: &str = "Intel PT in VMX operation is not offered (IA32_VMX_MISC bit 14 is 0)";
const NO_SGX: &str = "SGX is hidden from L2";
const NO_CONTROLS: &str = "none of the controls that it activates is implemented";
const SMM: &str = "only an SMM-transfer monitor could set it";

refusals! {
    /// Tertiary processor-based controls.
    TERTIARY: Tertiary {
        LOADIWKEY_EXITING,         UNTESTED;
        ENABLE_HLAT,               UNTESTED;
        EPT_PAGING_WRITE,          "changes what a write right in EPT means, and no processor of the tests has it";
        GUEST_PAGING_VERIFICATION, "changes what a read right in EPT means, and no processor of the tests has it";
        IPI_VIRTUALIZATION,
            "the processor would read L2's table by host addresses and post to descriptors that it names, nvmx's memory included: the table would have to be composed, and no processor of the tests has it";
        ENABLE_MSR_LIST,
            "RDMSRLIST and WRMSRLIST are hidden in CPUID: each MSR of a list that nvmx answers would have to be, and no processor of the tests has them";
    }
}

refusals! {
    /// Secondary processor-based controls.
    SECONDARY: Secondary {
        ENABLE_ENCLS_EXITING,   NO_SGX;
        CONCEAL_VMX_FROM_PT,    NO_PT;
        PASID_TRANSLATION,      UNTESTED;
        PT_USES_GUEST_PHYSICAL, NO_PT;
        ENABLE_PCONFIG,         UNTESTED;
        ENABLE_ENCLV_EXITING,   NO_SGX;
        BUS_LOCK_DETECTION,     UNTESTED;
        INSTRUCTION_TIMEOUT,    UNTESTED;
    }
}

refusals! {
    /// VM-exit controls.
    EXIT: Exit {
        CLEAR_BNDCFGS,         UNTESTED;
        CONCEAL_VMX_FROM_PT,   NO_PT;
        CLEAR_RTIT_CTL,        NO_PT;
        CLEAR_LBR_CTL,         UNTESTED;
        ACTIVATE_SECONDARY_CONTROLS, NO_CONTROLS;
    }
}

refusals! {
    /// VM-entry controls.
    ENTRY: Entry {
        ENTRY_TO_SMM,            SMM;
        DEACTIVATE_DUAL_MONITOR, SMM;
        LOAD_BNDCFGS,            UNTESTED;
        CONCEAL_VMX_FROM_PT,     NO_PT;
        LOAD_RTIT_CTL,           NO_PT;
        LOAD_LBR_CTL,            UNTESTED;
    }
}
