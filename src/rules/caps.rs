//! The VMX machine that L2 sees: what the hardware has, as far as nvmx implements it.
//!
//! A bit that is not in these tables is refused exactly as on a machine without it (invariant I11). Each row says how
//! nvmx honours the bit.

use crate::rules::switched;
use crate::vmx::caps::{Allowed, Basic, Capabilities, EptVpid, Misc};
use crate::vmx::controls::{
    Controls, EntryControls as Entry, ExitControls as Exit, PinControls as Pin, PrimaryControls as Primary,
    SecondaryControls as Secondary, TertiaryControls as Tertiary,
};
use crate::vmx::region::REVISION;
use crate::x86::Cr4;

/// One implemented control, and how it is honoured.
#[derive(Clone, Copy)]
pub struct Offer<C> {
    /// The bit.
    pub control: C,
    /// How nvmx implements it.
    pub how: &'static str,
}

macro_rules! offers {
    ($(#[$doc:meta])* $table:ident: $control:ident { $( $bit:ident, $how:expr; )* }) => {
        $(#[$doc])*
        pub const $table: &[Offer<$control>] = &[ $( Offer { control: $control::$bit, how: $how }, )* ];
    };
}

const RUN: &str = "runs in vmcs02 as L2 set it, and its exits go to L2";
const RESIDENT_ENTRY: &str = "runs in vmcs02; without it L2's values go on in L3";
const COUNTERS_EXIT: &str =
    "applied to L2 when an exit is reflected, by the entry of vmcs01; counters run on while nvmx runs";
const RESIDENT_EXIT: &str = "applied to L2 when an exit is reflected, by the entry of vmcs01; nvmx leaves the values in the processor, where its CR4 makes them do nothing";

offers! {
    /// Pin-based controls.
    PIN: Pin {
        EXTERNAL_INTERRUPT_EXITING, "runs in vmcs02; nvmx takes no interrupt of its own";
        NMI_EXITING,                "runs in vmcs02; nvmx takes no NMI of its own";
        VIRTUAL_NMIS,               "runs in vmcs02";
        PREEMPTION_TIMER,           "runs in vmcs02, saved on every exit so that nvmx's own exits do not restart it";
        POSTED_INTERRUPTS,          "runs in vmcs02 on L2's own descriptor; the notification is L2's interrupt";
    }
}

macro_rules! run {
    ($(#[$doc:meta])* $table:ident: $control:ident { $( $bit:ident; )* } also { $( $other:ident, $how:literal; )* }) => {
        $(#[$doc])*
        pub const $table: &[Offer<$control>] = &[
            $( Offer { control: $control::$bit, how: RUN }, )*
            $( Offer { control: $control::$other, how: $how }, )*
        ];
    };
}

run! {
    /// Primary processor-based controls.
    PRIMARY: Primary {
        INTERRUPT_WINDOW_EXITING;
        USE_TSC_OFFSETTING;
        HLT_EXITING;
        INVLPG_EXITING;
        MWAIT_EXITING;
        RDPMC_EXITING;
        RDTSC_EXITING;
        CR3_LOAD_EXITING;
        CR3_STORE_EXITING;
        CR8_LOAD_EXITING;
        CR8_STORE_EXITING;
        NMI_WINDOW_EXITING;
        MOV_DR_EXITING;
        UNCONDITIONAL_IO_EXITING;
        MONITOR_TRAP_FLAG;
        MONITOR_EXITING;
        PAUSE_EXITING;
    } also {
        USE_TPR_SHADOW,              "L2's virtual-APIC page is used where it lies";
        USE_IO_BITMAPS,              "L2's bitmap pages are used where they lie";
        USE_MSR_BITMAPS,             "L2's bitmap is OR-ed with nvmx's";
        ACTIVATE_SECONDARY_CONTROLS, "always on in vmcs02; L2's secondary controls count only if it is set";
        ACTIVATE_TERTIARY_CONTROLS,  "runs in vmcs02 as L2 set it";
    }
}

run! {
    /// Secondary processor-based controls.
    SECONDARY: Secondary {
        DESCRIPTOR_TABLE_EXITING;
        ENABLE_RDTSCP;
        VIRTUALIZE_X2APIC_MODE;
        WBINVD_EXITING;
        APIC_REGISTER_VIRTUALIZATION;
        VIRTUAL_INTERRUPT_DELIVERY;
        PAUSE_LOOP_EXITING;
        RDRAND_EXITING;
        ENABLE_INVPCID;
        RDSEED_EXITING;
        ENABLE_XSAVES;
        USE_TSC_SCALING;
        ENABLE_USER_WAIT_AND_PAUSE;
    } also {
        VIRTUALIZE_APIC_ACCESSES, "L2's APIC-access page is used where it lies, mapped by a 4 KiB page where L2 maps it so";
        ENABLE_EPT,         "ept02 is composed of ept12 and ept01";
        ENABLE_VPID,        "L2's identifier stands for one of nvmx's own";
        ENABLE_PML,         "nvmx writes the log when it sets a dirty flag in ept12";
        VMCS_SHADOWING,     "L3 reaches the vmcs02 of L2's shadow VMCS; nvmx makes what it must see in its copy";
        UNRESTRICTED_GUEST, "runs in vmcs02, only together with EPT of L2";
        MODE_BASED_EXECUTE_CONTROL, "runs in vmcs02; ept02 is composed with both execute rights";
        SUB_PAGE_WRITE_PERMISSIONS, "runs in vmcs02; the table of permissions is composed of L2's";
        EPT_VIOLATION_VE,   "does not run in vmcs02: nvmx makes #VE of violations that ept12 leaves convertible";
        ENABLE_VM_FUNCTIONS, "runs in vmcs02 without a function: each VMFUNC exits, and nvmx switches the EPTP";
    }
}

offers! {
    /// Tertiary processor-based controls.
    TERTIARY: Tertiary {
        VIRTUALIZE_SPEC_CTRL, "runs in vmcs02 as L2 set it";
    }
}

offers! {
    /// VM-exit controls.
    EXIT: Exit {
        SAVE_DEBUG_CONTROLS,     "always saved in vmcs02";
        HOST_ADDRESS_SPACE_SIZE, "decides the mode of L2 after a reflected exit";
        ACK_INTERRUPT_ON_EXIT,   "runs in vmcs02";
        SAVE_PAT,                "always saved in vmcs02";
        LOAD_PAT,                "applied to L2 when an exit is reflected";
        SAVE_EFER,               "always saved in vmcs02";
        LOAD_EFER,               "applied to L2 when an exit is reflected";
        SAVE_PREEMPTION_TIMER,   "always saved in vmcs02 while the timer runs";
        CLEAR_UINV,              RESIDENT_EXIT;
        LOAD_CET,                RESIDENT_EXIT;
        LOAD_PKRS,               RESIDENT_EXIT;
        LOAD_PERF_GLOBAL_CTRL,   COUNTERS_EXIT;
        SAVE_PERF_GLOBAL_CTRL,   "in vmcs02 where the exit saves it or the entry loads it";
    }
}

offers! {
    /// VM-entry controls.
    ENTRY: Entry {
        LOAD_DEBUG_CONTROLS, "always loaded in vmcs02, with L2's values if L2 does not ask";
        IA32E_MODE_GUEST,    "runs in vmcs02";
        LOAD_PAT,            "always loaded in vmcs02, with L2's value if L2 does not ask";
        LOAD_EFER,           "always loaded in vmcs02, with L2's value if L2 does not ask";
        LOAD_UINV,           RESIDENT_ENTRY;
        LOAD_CET,            RESIDENT_ENTRY;
        LOAD_PKRS,           RESIDENT_ENTRY;
        LOAD_PERF_GLOBAL_CTRL, RESIDENT_ENTRY;
    }
}

/// EPT and VPID capabilities that nvmx implements; no supervisor shadow-stack control.
pub const EPT_VPID: u64 = {
    let ept = 1 << 0
        | 1 << 6
        | 1 << 7
        | 1 << 8
        | 1 << 14
        | 1 << 16
        | 1 << 17
        | 1 << 20
        | 1 << 21
        | 1 << 22
        | 1 << 25
        | 1 << 26;
    let vpid = 1 << 32 | 1 << 40 | 1 << 41 | 1 << 42 | 1 << 43;
    ept | vpid
};
const EPT_BITS: u64 = 0xFFFF_FFFF;

/// VM functions that nvmx implements: EPTP switching.
pub const VMFUNC: u64 = 1 << 0;

/// The bits of IA32_VMX_MISC that are taken from the hardware: timer rate, storing of LMA, activity states HLT, shutdown and
/// wait-for-SIPI, injection with instruction length 0, VMWRITE to exit-information fields (nvmx believes them only after an exit, which
/// writes them anew). Withheld: Intel PT, SMM.
pub const MISC: u64 = 0x1F | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 29 | 1 << 30;
const MISC_CR3_TARGETS_SHIFT: u32 = 16;
/// CR3-target values in the field table.
const MAX_CR3_TARGETS: u32 = 4;

/// The bits of IA32_VMX_BASIC that are taken from the hardware: INS/OUTS information, TRUE MSRs, injection with any error
/// code.
pub const BASIC: u64 = 1 << 54 | 1 << 55 | 1 << 56;
const BASIC_REGION_SIZE: u64 = 4096 << 32;
const BASIC_WRITE_BACK: u64 = 6 << 50;

fn mask<C: Controls>(table: &[Offer<C>]) -> u32 {
    table.iter().fold(0, |all, offer| all | offer.control.bits())
}

/// Hardware ∩ implemented; reserved bits of the default1 class stay 1, so that nobody can clear what nvmx does not know.
fn restrict<C: Controls>(hardware: Allowed<C>, implemented: u32) -> Allowed<C> {
    let ones = hardware.must_be_one() | C::DEFAULT1 & !implemented;
    let may = hardware.may_be_one() & implemented | ones;
    Allowed::from_msr(u64::from(may) << 32 | u64::from(ones))
}

/// The capabilities that L2 sees on this hardware.
pub fn offered(hardware: &Capabilities) -> Capabilities {
    let mut pin = mask(PIN);
    let mut secondary = if hardware.has_secondary_controls() { mask(SECONDARY) } else { 0 };
    // Without it, an exit that nvmx handles itself would start the timer anew.
    if !hardware.exit.allows(Exit::SAVE_PREEMPTION_TIMER) {
        pin &= !Pin::PREEMPTION_TIMER.bits();
    }
    let ept_vpid = hardware.ept_vpid.0 & EPT_VPID;
    let mut ept_bits = ept_vpid & EPT_BITS;
    let mut vpid_bits = ept_vpid & !EPT_BITS;
    if !hardware.secondary.allows(Secondary::ENABLE_EPT) {
        secondary &= !(Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST | Secondary::ENABLE_PML).bits();
        ept_bits = 0;
    }
    if !hardware.ept_vpid.accessed_dirty() {
        secondary &= !Secondary::ENABLE_PML.bits();
    }
    if !hardware.secondary.allows(Secondary::ENABLE_VPID) {
        secondary &= !Secondary::ENABLE_VPID.bits();
        vpid_bits = 0;
    }
    // The violation of a fetch must tell which of the two rights was asked for.
    if !hardware.ept_vpid.advanced_exit_information() || ept_bits == 0 {
        secondary &= !Secondary::MODE_BASED_EXECUTE_CONTROL.bits();
    }
    if ept_bits == 0 {
        secondary &= !Secondary::SUB_PAGE_WRITE_PERMISSIONS.bits();
    }
    let vmfunc = if ept_bits == 0 { 0 } else { hardware.vmfunc & VMFUNC };
    if vmfunc == 0 {
        secondary &= !Secondary::ENABLE_VM_FUNCTIONS.bits();
    }
    let mut primary = mask(PRIMARY);
    let implemented = TERTIARY.iter().fold(Tertiary::empty(), |all, offer| all | offer.control);
    let mut tertiary = hardware.tertiary & implemented;
    if !hardware.primary.allows(Primary::ACTIVATE_TERTIARY_CONTROLS) {
        tertiary = Tertiary::empty();
    }
    if tertiary.is_empty() {
        primary &= !Primary::ACTIVATE_TERTIARY_CONTROLS.bits();
    }
    let mut exit = mask(EXIT);
    if pin & Pin::PREEMPTION_TIMER.bits() == 0 || !hardware.pin.allows(Pin::PREEMPTION_TIMER) {
        exit &= !Exit::SAVE_PREEMPTION_TIMER.bits();
    }

    // The entry of vmcs01 loads what an exit of L3 is to load, so both controls must exist.
    for row in switched::resident_loaded_by(Exit::all()).filter(|row| !hardware.entry.allows(row.entry_load)) {
        exit &= !row.exit_load.bits();
    }

    // An exit that goes to nvmx alone must save what L3 has made of it, if the next entry loads it.
    let mut entry = mask(ENTRY);
    let (loads, both) = (Entry::LOAD_PERF_GLOBAL_CTRL, Exit::LOAD_PERF_GLOBAL_CTRL | Exit::SAVE_PERF_GLOBAL_CTRL);
    let switches = hardware.entry.allows(loads) && both.iter().all(|control| hardware.exit.allows(control));
    if !switches || hardware.counters == 0 {
        entry &= !loads.bits();
        exit &= !both.bits();
    }

    let cr3_targets = hardware.misc.cr3_targets().min(MAX_CR3_TARGETS);
    let mut offered = Capabilities {
        basic: Basic(u64::from(REVISION) | BASIC_REGION_SIZE | BASIC_WRITE_BACK | hardware.basic.0 & BASIC),
        pin_default: restrict(hardware.pin_default, pin),
        primary_default: restrict(hardware.primary_default, primary),
        exit_default: restrict(hardware.exit_default, exit),
        entry_default: restrict(hardware.entry_default, entry),
        pin: restrict(hardware.pin, pin),
        primary: restrict(hardware.primary, primary),
        secondary: restrict(hardware.secondary, secondary),
        tertiary,
        exit: restrict(hardware.exit, exit),
        entry: restrict(hardware.entry, entry),
        misc: Misc(hardware.misc.0 & MISC | u64::from(cr3_targets) << MISC_CR3_TARGETS_SHIFT),
        cr0_fixed0: hardware.cr0_fixed0,
        cr0_fixed1: hardware.cr0_fixed1,
        cr4_fixed0: hardware.cr4_fixed0,
        // No control of nvmx's switches the MSRs of FRED.
        cr4_fixed1: hardware.cr4_fixed1 & !Cr4::FRED.bits(),
        vmcs_enum: 0,
        ept_vpid: EptVpid(ept_bits | vpid_bits),
        vmfunc,
        physical_width: hardware.physical_width,
        linear_width: hardware.linear_width,
        cr3_flags: hardware.cr3_flags,
        counters: hardware.counters,
    };
    offered.vmcs_enum = offered.vmcs_enum_of_fields();
    offered
}
