//! Who handles an exit of L3: L2 or nvmx.
//!
//! Pure. Most controls of L2 run in vmcs02 unchanged and nvmx adds nothing to them, so there an exit is itself the proof
//! that L2 asked for it; where nvmx adds intercepts (MSRs, EPT), L2's side is looked up.
//!
//! Source: Intel SDM vol. 3C (December 2024), chapter "VMX Non-Root Operation": "Instructions That Cause VM Exits", "Other
//! Causes of VM Exits".

use crate::vmx::bitmap::{Access, shadow_index};
use crate::vmx::controls::{PinControls, PrimaryControls, SecondaryControls};
use crate::vmx::event::{EventInfo, EventKind};
use crate::vmx::exit::{BasicReason, ExitReason};
use crate::vmx::qualification::CrAccess;

/// Where an exit goes.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// L2 asked for it.
    Reflect,
    /// nvmx handles it, or, after an EPT violation, finds out that L2 has to.
    Nvmx,
}

/// What the processor reports about an exit. Only what the reason defines is looked at, so the rest may be 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExitInfo {
    /// Exit reason.
    pub reason: ExitReason,
    /// Exit qualification.
    pub qualification: u64,
    /// VM-exit interruption information.
    pub event: EventInfo,
    /// ECX at the exit: the MSR of RDMSR and WRMSR.
    pub ecx: u32,
    /// The field encoding that VMREAD or VMWRITE gives, if L2 uses VMCS shadowing.
    pub encoding: u64,
}

/// What L2 asked for in vmcs12.
pub trait GuestWants {
    /// Pin-based controls.
    fn pin(&self) -> PinControls;
    /// Primary processor-based controls.
    fn primary(&self) -> PrimaryControls;
    /// Secondary processor-based controls; empty unless the primary ones activate them.
    fn secondary(&self) -> SecondaryControls;
    /// True if L2's MSR bitmap has the bit set, or lies outside of L2's memory. Asked only if L2 uses MSR bitmaps.
    fn msr_bitmap(&self, msr: u32, access: Access) -> bool;
    /// True if L2's VMREAD or VMWRITE bitmap has this bit set, or lies outside of L2's memory. Asked only if L2 uses VMCS
    /// shadowing.
    fn shadow_bitmap(&self, bit: u16, access: Access) -> bool;
}

/// L2 sees an exit for this reason whatever its controls say.
#[inline(always)]
pub const fn is_always_reflected(reason: ExitReason) -> bool {
    use BasicReason as R;
    const ALWAYS: [BasicReason; 15] = [
        R::CPUID,
        R::GETSEC,
        R::INVD,
        R::XSETBV,
        R::TASK_SWITCH,
        R::VMCALL,
        R::VMCLEAR,
        R::VMLAUNCH,
        R::VMPTRLD,
        R::VMPTRST,
        R::VMRESUME,
        R::VMXOFF,
        R::VMXON,
        R::INVEPT,
        R::INVVPID,
    ];
    const SET: u64 = {
        let (mut set, mut i) = (0, 0);
        while i < ALWAYS.len() {
            set |= 1 << ALWAYS[i].0;
            i += 1;
        }
        set
    };
    reason.0 < u64::BITS && SET >> reason.0 & 1 != 0
}

/// Decides. An entry that failed late failed on L2's guest state or L2's MSR list.
#[inline]
pub fn route(exit: &ExitInfo, guest: &impl GuestWants) -> Route {
    if exit.reason.is_entry_failure() || guest_wants_exit(exit, guest) { Route::Reflect } else { Route::Nvmx }
}

fn guest_wants_exit(exit: &ExitInfo, guest: &impl GuestWants) -> bool {
    use BasicReason as R;
    use PrimaryControls as P;
    use SecondaryControls as S;
    let pin = |control| guest.pin().intersects(control);
    let primary = |control| guest.primary().intersects(control);
    let secondary = |control| guest.secondary().intersects(control);

    match exit.reason.basic() {
        // Always, in VMX non-root operation.
        R::CPUID | R::GETSEC | R::INVD | R::XSETBV | R::TASK_SWITCH | R::TRIPLE_FAULT | R::INIT_SIGNAL | R::SIPI => {
            true
        }
        R::VMCALL | R::VMCLEAR | R::VMLAUNCH | R::VMPTRLD | R::VMPTRST | R::VMRESUME => true,
        R::VMXOFF | R::VMXON | R::INVEPT | R::INVVPID => true,

        // Events.
        R::EXCEPTION_OR_NMI => exit.event.kind() != EventKind::Nmi || pin(PinControls::NMI_EXITING),
        R::EXTERNAL_INTERRUPT => pin(PinControls::EXTERNAL_INTERRUPT_EXITING),
        R::INTERRUPT_WINDOW => primary(P::INTERRUPT_WINDOW_EXITING),
        R::NMI_WINDOW => primary(P::NMI_WINDOW_EXITING),
        R::MONITOR_TRAP_FLAG => true, // by the control, or by an MTF event that L2 injected
        R::PREEMPTION_TIMER => pin(PinControls::PREEMPTION_TIMER),

        // Instructions with a control of their own.
        R::HLT => primary(P::HLT_EXITING),
        R::INVLPG => primary(P::INVLPG_EXITING),
        R::RDPMC => primary(P::RDPMC_EXITING),
        R::RDTSC | R::RDTSCP => primary(P::RDTSC_EXITING),
        R::MWAIT => primary(P::MWAIT_EXITING),
        R::MONITOR => primary(P::MONITOR_EXITING),
        R::PAUSE => primary(P::PAUSE_EXITING) || secondary(S::PAUSE_LOOP_EXITING),
        R::DR_ACCESS => primary(P::MOV_DR_EXITING),
        R::GDTR_IDTR_ACCESS | R::LDTR_TR_ACCESS => secondary(S::DESCRIPTOR_TABLE_EXITING),
        R::WBINVD => secondary(S::WBINVD_EXITING),
        R::RDRAND => secondary(S::RDRAND_EXITING),
        R::RDSEED => secondary(S::RDSEED_EXITING),
        R::INVPCID => secondary(S::ENABLE_INVPCID) && primary(P::INVLPG_EXITING),
        R::XSAVES | R::XRSTORS => secondary(S::ENABLE_XSAVES),

        // Operands decide.
        R::CR_ACCESS => wants_cr_access(CrAccess::decode(exit.qualification), guest.primary()),
        R::IO_INSTRUCTION => primary(P::UNCONDITIONAL_IO_EXITING | P::USE_IO_BITMAPS),
        R::VMREAD => wants_field_access(exit.encoding, Access::Read, guest),
        R::VMWRITE => wants_field_access(exit.encoding, Access::Write, guest),
        R::RDMSR => wants_msr(exit.ecx, Access::Read, guest),
        R::WRMSR => wants_msr(exit.ecx, Access::Write, guest),

        // nvmx looks first: walks of L2's tables tell whose it is, the operands of VMFUNC whether L2 sees it.
        R::EPT_VIOLATION | R::EPT_MISCONFIGURATION | R::SPP_EVENT | R::VMFUNC => false,

        // Features that are not offered: L2's control cannot be set, so the exit is not L2's.
        R::TPR_BELOW_THRESHOLD => primary(P::USE_TPR_SHADOW),
        R::APIC_ACCESS => secondary(S::VIRTUALIZE_APIC_ACCESSES),
        R::VIRTUALIZED_EOI => secondary(S::VIRTUAL_INTERRUPT_DELIVERY),
        R::APIC_WRITE => secondary(S::APIC_REGISTER_VIRTUALIZATION | S::VIRTUAL_INTERRUPT_DELIVERY),
        R::ENCLS => secondary(S::ENABLE_ENCLS_EXITING),
        R::ENCLV => secondary(S::ENABLE_ENCLV_EXITING),
        R::PML_FULL => secondary(S::ENABLE_PML),
        R::PCONFIG => secondary(S::ENABLE_PCONFIG),
        R::UMWAIT | R::TPAUSE => secondary(S::ENABLE_USER_WAIT_AND_PAUSE) && primary(P::RDTSC_EXITING),
        R::ENQCMD_PASID | R::ENQCMDS_PASID => secondary(S::PASID_TRANSLATION),
        R::BUS_LOCK => secondary(S::BUS_LOCK_DETECTION),
        R::INSTRUCTION_TIMEOUT => secondary(S::INSTRUCTION_TIMEOUT),

        // Exits only with the dual-monitor treatment of SMIs, or with tertiary controls.
        R::IO_SMI | R::OTHER_SMI | R::RSM | R::LOADIWKEY | R::RDMSRLIST | R::WRMSRLIST => false,
        // Entry failures come with bit 31; without it these numbers mean nothing.
        R::ENTRY_INVALID_GUEST_STATE | R::ENTRY_MSR_LOADING | R::ENTRY_MACHINE_CHECK => false,

        // TDX instructions, and whatever is newer than this table: no control of vmcs02 asked for it, so it exits on the
        // machine that L2 believes in as well, and L3 must not be able to end L2 (I7).
        _ => true,
    }
}

/// MOV to and from CR0 and CR4, CLTS and LMSW exit by L2's masks alone, which run in vmcs02.
fn wants_cr_access(access: CrAccess, primary: PrimaryControls) -> bool {
    match access {
        CrAccess::Write { cr: 3, .. } => primary.contains(PrimaryControls::CR3_LOAD_EXITING),
        CrAccess::Read { cr: 3, .. } => primary.contains(PrimaryControls::CR3_STORE_EXITING),
        CrAccess::Write { cr: 8, .. } => primary.contains(PrimaryControls::CR8_LOAD_EXITING),
        CrAccess::Read { cr: 8, .. } => primary.contains(PrimaryControls::CR8_STORE_EXITING),
        CrAccess::Write { cr: 0 | 4, .. } | CrAccess::Clts | CrAccess::Lmsw { .. } => true,
        CrAccess::Write { .. } | CrAccess::Read { .. } => false,
    }
}

fn wants_field_access(encoding: u64, access: Access, guest: &impl GuestWants) -> bool {
    let shadowing = guest.secondary().contains(SecondaryControls::VMCS_SHADOWING);
    !shadowing || shadow_index(encoding).is_none_or(|bit| guest.shadow_bitmap(bit, access))
}

fn wants_msr(msr: u32, access: Access, guest: &impl GuestWants) -> bool {
    let uses_bitmap = guest.primary().contains(PrimaryControls::USE_MSR_BITMAPS);
    !uses_bitmap || crate::vmx::bitmap::MsrBitmap::index(msr, access).is_none() || guest.msr_bitmap(msr, access)
}
