//! What nvmx needs from the processor, as a list that can be printed.
//!
//! Source: Intel SDM vol. 3D (December 2024), appendix "VMX Capability Reporting Facility".

use super::caps::Capabilities;
use super::controls::{EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls};

/// One thing nvmx cannot run without.
#[derive(Clone, Copy)]
pub struct Requirement {
    /// One line for a person: what, and the MSR and bit that say it is missing.
    pub text: &'static str,
    met: fn(&Capabilities) -> bool,
}

impl Requirement {
    /// True if the machine has it.
    pub fn is_met(&self, caps: &Capabilities) -> bool {
        (self.met)(caps)
    }
}

macro_rules! requirements {
    ($( $text:literal, $met:expr; )*) => {
        /// Everything nvmx needs beyond VMX itself.
        pub const REQUIREMENTS: &[Requirement] = &[ $( Requirement { text: $text, met: $met }, )* ];
    };
}

fn secondary(caps: &Capabilities, controls: SecondaryControls) -> bool {
    caps.has_secondary_controls() && caps.secondary.allows(controls)
}

requirements! {
    "write-back memory type for VMX structures (IA32_VMX_BASIC bits 53:50 = 6)",
        |c| c.basic.memory_type() == 6;
    "VMCS region of at most 4096 bytes (IA32_VMX_BASIC bits 44:32)",
        |c| c.basic.region_size() <= 4096;
    "VMX structures above 4 GiB (IA32_VMX_BASIC bit 48 = 0)",
        |c| !c.basic.addresses_limited_to_32_bits();
    "virtual NMIs (IA32_VMX_PINBASED_CTLS bits 35 and 37)",
        |c| c.pin.allows(PinControls::NMI_EXITING | PinControls::VIRTUAL_NMIS);
    "NMI-window exiting (IA32_VMX_PROCBASED_CTLS bit 54)",
        |c| c.primary.allows(PrimaryControls::NMI_WINDOW_EXITING);
    "MSR bitmaps (IA32_VMX_PROCBASED_CTLS bit 60)",
        |c| c.primary.allows(PrimaryControls::USE_MSR_BITMAPS);
    "secondary processor-based controls (IA32_VMX_PROCBASED_CTLS bit 63)",
        |c| c.has_secondary_controls();
    "extended page tables (IA32_VMX_PROCBASED_CTLS2 bit 33)",
        |c| secondary(c, SecondaryControls::ENABLE_EPT);
    "virtual-processor identifiers (IA32_VMX_PROCBASED_CTLS2 bit 37)",
        |c| secondary(c, SecondaryControls::ENABLE_VPID);
    "unrestricted guest (IA32_VMX_PROCBASED_CTLS2 bit 39)",
        |c| secondary(c, SecondaryControls::UNRESTRICTED_GUEST);
    "EPT page walks of 4 levels (IA32_VMX_EPT_VPID_CAP bit 6)",
        |c| c.ept_vpid.walk_4();
    "write-back EPT structures (IA32_VMX_EPT_VPID_CAP bit 14)",
        |c| c.ept_vpid.memory_type_wb();
    "INVEPT of a single context (IA32_VMX_EPT_VPID_CAP bits 20 and 25)",
        |c| c.ept_vpid.invept() && c.ept_vpid.invept_single();
    "INVEPT of all contexts (IA32_VMX_EPT_VPID_CAP bits 20 and 26)",
        |c| c.ept_vpid.invept() && c.ept_vpid.invept_all();
    "INVVPID of a single context (IA32_VMX_EPT_VPID_CAP bits 32 and 41)",
        |c| c.ept_vpid.invvpid() && c.ept_vpid.invvpid_single();
    "INVVPID of all contexts (IA32_VMX_EPT_VPID_CAP bits 32 and 42)",
        |c| c.ept_vpid.invvpid() && c.ept_vpid.invvpid_all();
    "a 64-bit host (IA32_VMX_EXIT_CTLS bit 41)",
        |c| c.exit.allows(ExitControls::HOST_ADDRESS_SPACE_SIZE);
    "IA32_PAT saved and loaded by VM exits (IA32_VMX_EXIT_CTLS bits 50 and 51)",
        |c| c.exit.allows(ExitControls::SAVE_PAT | ExitControls::LOAD_PAT);
    "IA32_EFER saved and loaded by VM exits (IA32_VMX_EXIT_CTLS bits 52 and 53)",
        |c| c.exit.allows(ExitControls::SAVE_EFER | ExitControls::LOAD_EFER);
    "IA-32e mode guests (IA32_VMX_ENTRY_CTLS bit 41)",
        |c| c.entry.allows(EntryControls::IA32E_MODE_GUEST);
    "IA32_PAT loaded by VM entries (IA32_VMX_ENTRY_CTLS bit 46)",
        |c| c.entry.allows(EntryControls::LOAD_PAT);
    "IA32_EFER loaded by VM entries (IA32_VMX_ENTRY_CTLS bit 47)",
        |c| c.entry.allows(EntryControls::LOAD_EFER);
}

impl Capabilities {
    /// The requirements this machine does not meet.
    pub fn missing_requirements(&self) -> impl Iterator<Item = &'static str> + '_ {
        REQUIREMENTS.iter().filter(|r| !r.is_met(self)).map(|r| r.text)
    }
}
