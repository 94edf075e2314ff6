//! Why a guest was left: the control, bitmap or rule that asked for it, from the fields of its VMCS.
//!
//! Source: Intel SDM vol. 3C, chapter "VMX Non-Root Operation", "Instructions That Cause VM Exits", "Other Causes of VM Exits".

use super::log::Facts;
use nvmx::vmx::Field;
use nvmx::vmx::controls::{PinControls, PrimaryControls, SecondaryControls};
use nvmx::vmx::event::EventInfo;
use nvmx::vmx::exit::{BasicReason, ExitReason};
use nvmx::vmx::qualification::{CrAccess, IoAccess};
use std::collections::BTreeMap;

/// Fields of a VMCS by encoding.
pub type Fields = BTreeMap<u32, u64>;

/// Who asked for an exit.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Asked {
    /// Nobody: the architecture has no way to avoid it
    Always,
    /// The hypervisor of this level
    Level(u8),
}

/// Why an exit came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Why {
    /// Who asked
    pub asked: Asked,
    /// What asked
    pub what: &'static str,
    /// The number that goes with it: an MSR, a port, a vector, an address
    pub number: Option<u64>,
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.asked {
            Asked::Always => write!(f, "always exits")?,
            Asked::Level(level) => write!(f, "L{level}: ")?,
        }
        if self.asked == Asked::Always && !self.what.is_empty() {
            write!(f, ": ")?;
        }
        write!(f, "{}", self.what)?;
        self.number.map_or(Ok(()), |n| write!(f, " ({n:#x})"))
    }
}

/// What in this VMCS asked for an exit. `asker` is the level that gets to see it.
pub fn why(facts: &Facts, fields: &Fields, asker: u8, root: u8) -> Why {
    let (what, number) = cause(facts, fields, asker == root);
    let asked = if what.is_empty() || is_rule(what) { Asked::Always } else { Asked::Level(asker) };
    Why { asked, what, number }
}

/// Causes that no control turns off.
const NEITHER_BITMAP: &str = "an MSR that the bitmaps do not have";
const NO_BITMAP: &str = "there is no MSR bitmap";
const FAILED: &str = "the entry failed";

fn is_rule(what: &str) -> bool {
    [NEITHER_BITMAP, FAILED].contains(&what)
}

fn cause(facts: &Facts, fields: &Fields, root: bool) -> (&'static str, Option<u64>) {
    use BasicReason as R;
    let get = |field: Field| fields.get(&field.encoding()).copied().unwrap_or_default();
    let pin = PinControls::from_bits_retain(get(Field::PIN_BASED_VM_EXEC_CONTROL) as u32);
    let primary = PrimaryControls::from_bits_retain(get(Field::CPU_BASED_VM_EXEC_CONTROL) as u32);
    let secondary = if primary.contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS) {
        SecondaryControls::from_bits_retain(get(Field::SECONDARY_VM_EXEC_CONTROL) as u32)
    } else {
        SecondaryControls::empty()
    };
    let reason = ExitReason(facts.reason);
    if reason.is_entry_failure() {
        return (FAILED, None);
    }
    let vector = u64::from(EventInfo(facts.event).vector());
    match reason.basic() {
        R::EXCEPTION_OR_NMI if vector == 2 => ("NMI exiting", None),
        R::EXCEPTION_OR_NMI if vector == 14 => ("exception bitmap with the page-fault mask", Some(14)),
        R::EXCEPTION_OR_NMI => ("exception bitmap", Some(vector)),
        R::EXTERNAL_INTERRUPT => ("external-interrupt exiting", (facts.event >> 31 == 1).then_some(vector)),
        R::INTERRUPT_WINDOW => ("interrupt-window exiting", None),
        R::NMI_WINDOW => ("NMI-window exiting", None),
        R::HLT => ("HLT exiting", None),
        R::INVLPG => ("INVLPG exiting", None),
        R::RDPMC => ("RDPMC exiting", None),
        R::RDTSC | R::RDTSCP => ("RDTSC exiting", None),
        R::CR_ACCESS => (cr_access(facts, &get), None),
        R::DR_ACCESS => ("MOV-DR exiting", None),
        R::IO_INSTRUCTION => {
            let port = Some(u64::from(IoAccess::decode(facts.qualification).port));
            let bitmaps = primary.contains(PrimaryControls::USE_IO_BITMAPS);
            (if bitmaps { "I/O bitmap" } else { "unconditional I/O exiting" }, port)
        }
        R::RDMSR | R::WRMSR => {
            let msr = facts.rcx & 0xFFFF_FFFF;
            let listed = msr < 0x2000 || (0xC000_0000..0xC000_2000).contains(&msr);
            let what = match primary.contains(PrimaryControls::USE_MSR_BITMAPS) {
                false => NO_BITMAP,
                true if !listed => NEITHER_BITMAP,
                true if reason.basic() == R::RDMSR => "MSR bitmap, reads",
                true => "MSR bitmap, writes",
            };
            (what, Some(msr))
        }
        R::MWAIT => ("MWAIT exiting", None),
        R::MONITOR_TRAP_FLAG => ("monitor trap flag", None),
        R::MONITOR => ("MONITOR exiting", None),
        R::PAUSE if primary.contains(PrimaryControls::PAUSE_EXITING) => ("PAUSE exiting", None),
        R::PAUSE => ("PAUSE-loop exiting", None),
        R::TPR_BELOW_THRESHOLD => ("TPR threshold", Some(get(Field::TPR_THRESHOLD))),
        R::APIC_ACCESS => ("virtualize APIC accesses", Some(facts.qualification & 0xFFF)),
        R::VIRTUALIZED_EOI => ("EOI-exit bitmap", Some(facts.qualification & 0xFF)),
        R::APIC_WRITE => ("APIC-register virtualization", Some(facts.qualification & 0xFFF)),
        R::GDTR_IDTR_ACCESS | R::LDTR_TR_ACCESS => ("descriptor-table exiting", None),
        R::EPT_VIOLATION if root => ("no such entry in the EPT that the processor uses", Some(facts.address)),
        R::EPT_VIOLATION => ("its EPT does not allow the access", Some(facts.address)),
        R::EPT_MISCONFIGURATION => ("an entry of the EPT is misconfigured", Some(facts.address)),
        R::VMREAD | R::VMWRITE if secondary.contains(SecondaryControls::VMCS_SHADOWING) => {
            let read = reason.basic() == R::VMREAD;
            (if read { "VMREAD bitmap" } else { "VMWRITE bitmap" }, Some(facts.address))
        }
        R::PREEMPTION_TIMER => ("VMX-preemption timer", None),
        R::WBINVD => ("WBINVD exiting", None),
        R::RDRAND => ("RDRAND exiting", None),
        R::RDSEED => ("RDSEED exiting", None),
        R::INVPCID => ("INVPCID and INVLPG exiting", None),
        R::VMFUNC => ("VM function that is not allowed", Some(facts.rax & 0xFFFF_FFFF)),
        R::PML_FULL => ("the page-modification log is full", None),
        R::XSAVES | R::XRSTORS => ("XSS-exiting bitmap", None),
        R::UMWAIT | R::TPAUSE => ("RDTSC exiting", None),
        _ if pin.is_empty() && primary.is_empty() => ("", None),
        _ => ("", None),
    }
}

fn cr_access(facts: &Facts, get: &dyn Fn(Field) -> u64) -> &'static str {
    match CrAccess::decode(facts.qualification) {
        CrAccess::Write { cr: 0, .. } | CrAccess::Clts | CrAccess::Lmsw { .. } => {
            if get(Field::CR0_GUEST_HOST_MASK) == 0 { "CR0, whatever its mask" } else { "CR0 guest/host mask" }
        }
        CrAccess::Write { cr: 4, .. } => "CR4 guest/host mask",
        CrAccess::Write { cr: 3, .. } => "CR3-load exiting",
        CrAccess::Write { .. } => "CR8-load exiting",
        CrAccess::Read { cr: 3, .. } => "CR3-store exiting",
        CrAccess::Read { .. } => "CR8-store exiting",
    }
}

/// What is to be known of an exit beside its reason: leaf, MSR, port, field, address.
pub fn detail(facts: &Facts) -> String {
    use BasicReason as R;
    let reason = ExitReason(facts.reason).basic();
    let field = || u32::try_from(facts.address).ok().and_then(Field::decode);
    match reason {
        R::CPUID => format!("leaf {:#x}", facts.rax & 0xFFFF_FFFF),
        R::RDMSR | R::WRMSR => format!("MSR {:#x}", facts.rcx & 0xFFFF_FFFF),
        R::IO_INSTRUCTION => {
            let io = IoAccess::decode(facts.qualification);
            format!("{} port {:#x}", if io.input { "IN" } else { "OUT" }, io.port)
        }
        R::CR_ACCESS => match CrAccess::decode(facts.qualification) {
            CrAccess::Write { cr, .. } => format!("MOV to CR{cr}"),
            CrAccess::Read { cr, .. } => format!("MOV from CR{cr}"),
            CrAccess::Clts => "CLTS".into(),
            CrAccess::Lmsw { .. } => "LMSW".into(),
        },
        R::VMREAD | R::VMWRITE => field().map_or(format!("{:#x}", facts.address), |(f, _)| f.name().into()),
        R::EPT_VIOLATION | R::EPT_MISCONFIGURATION => {
            let access = match facts.qualification & 7 {
                1 => "read",
                2 => "write",
                3 => "read and write",
                4 => "fetch",
                _ => "access",
            };
            format!("{access} of {:#x}", facts.address)
        }
        R::EXCEPTION_OR_NMI | R::EXTERNAL_INTERRUPT if facts.event >> 31 == 1 => {
            format!("vector {:#x}", EventInfo(facts.event).vector())
        }
        _ if facts.qualification != 0 => format!("qualification {:#x}", facts.qualification),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(Field, u64)]) -> Fields {
        pairs.iter().map(|(field, value)| (field.encoding(), *value)).collect()
    }

    fn exit(reason: BasicReason) -> Facts {
        Facts { reason: u32::from(reason.0), ..Facts::default() }
    }

    #[test]
    fn the_control_that_asked_is_named() {
        let primary = |bits: PrimaryControls| with(&[(Field::CPU_BASED_VM_EXEC_CONTROL, u64::from(bits.bits()))]);
        let text = |facts: &Facts, fields: &Fields| why(facts, fields, 2, 1).to_string();
        assert_eq!(text(&exit(BasicReason::CPUID), &Fields::new()), "always exits");
        assert_eq!(text(&exit(BasicReason::HLT), &Fields::new()), "L2: HLT exiting");
        let rdmsr = Facts { rcx: 0x1B, ..exit(BasicReason::RDMSR) };
        assert_eq!(text(&rdmsr, &primary(PrimaryControls::empty())), "L2: there is no MSR bitmap (0x1b)");
        assert_eq!(text(&rdmsr, &primary(PrimaryControls::USE_MSR_BITMAPS)), "L2: MSR bitmap, reads (0x1b)");
        let beyond = Facts { rcx: 0x4000_0000, ..rdmsr };
        let text_of = text(&beyond, &primary(PrimaryControls::USE_MSR_BITMAPS));
        assert_eq!(text_of, "always exits: an MSR that the bitmaps do not have (0x40000000)");
        let io = Facts { qualification: 0x80 << 16 | 8, ..exit(BasicReason::IO_INSTRUCTION) };
        assert_eq!(text(&io, &primary(PrimaryControls::USE_IO_BITMAPS)), "L2: I/O bitmap (0x80)");
        assert_eq!(detail(&io), "IN port 0x80");
        let failed = Facts { reason: 0x8000_0021, ..Facts::default() };
        assert_eq!(text(&failed, &Fields::new()), "always exits: the entry failed");
    }

    #[test]
    fn vmread_exits_by_its_bitmap_only_with_vmcs_shadowing() {
        let vmread = Facts { address: 0x6C14, ..exit(BasicReason::VMREAD) };
        let primary = u64::from(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS.bits());
        let secondary = u64::from(SecondaryControls::VMCS_SHADOWING.bits());
        let on = with(&[(Field::CPU_BASED_VM_EXEC_CONTROL, primary), (Field::SECONDARY_VM_EXEC_CONTROL, secondary)]);
        assert_eq!(why(&vmread, &on, 1, 1).to_string(), "L1: VMREAD bitmap (0x6c14)");
        assert_eq!(why(&vmread, &Fields::new(), 1, 1).to_string(), "always exits");
        assert_eq!(detail(&vmread), "HOST_RSP");
    }
}
