//! Rules on the controls of APIC virtualization.
//!
//! Source: Intel SDM vol. 3C (December 2024), "VM-Execution Control Fields" of the chapter "VM Entries"; what the controls
//! mean is in the chapter "APIC Virtualization and Virtual Interrupts".

use crate::addr::Gpa;
use crate::rules::checks::controls::conclude;
use crate::rules::checks::view::{View, implies};
use crate::rules::checks::{CheckId, Failure, ReadsGuest, first_failure};
use crate::vmx::controls::{ExitControls, PinControls, PrimaryControls, SecondaryControls};
use crate::vmx::{Capabilities, Field, Fields};

/// Offset of the virtual task-priority register in the virtual-APIC page.
pub const VTPR: u64 = 0x80;

/// The first rule on fields in nvmx's copy that does not hold.
pub(super) fn cached_failure(v: &View<impl Fields>) -> Option<CheckId> {
    first_failure! { v;
        VirtualApicAddress => virtual_apic_address;
        VirtualApicNeedsTprShadow => needs_tpr_shadow;
        VirtualInterruptsNeedExiting => delivery_needs_exiting;
        ApicAccessAddress => apic_access_address;
        ApicAccessesExcludeX2apicMode => accesses_exclude_x2apic_mode;
        PostedInterruptsNeedDelivery => posted_needs_delivery;
        PostedInterruptsNeedAcknowledge => posted_needs_acknowledge;
        PostedDescriptorAddress => posted_descriptor_address;
    }
}

/// The first rule on fields in vmcs02 that does not hold, but for the one that looks into memory.
pub(super) fn live_failure(v: &View<impl Fields>) -> Option<CheckId> {
    first_failure! { v;
        PostedInterruptVector => posted_vector;
        TprThresholdReserved => tpr_threshold_reserved;
    }
}

fn tpr_shadow(v: &View<impl Fields>) -> bool {
    v.primary().contains(PrimaryControls::USE_TPR_SHADOW)
}

fn delivery(v: &View<impl Fields>) -> bool {
    v.secondary().contains(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY)
}

fn posted(v: &View<impl Fields>) -> bool {
    v.pin().contains(PinControls::POSTED_INTERRUPTS)
}

fn virtual_apic_address(v: &View<impl Fields>) -> bool {
    implies(tpr_shadow(v), v.is_page_pointer(Field::VIRTUAL_APIC_ADDRESS))
}

fn needs_tpr_shadow(v: &View<impl Fields>) -> bool {
    let of_the_page = SecondaryControls::VIRTUALIZE_X2APIC_MODE
        | SecondaryControls::APIC_REGISTER_VIRTUALIZATION
        | SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY;
    tpr_shadow(v) || !v.secondary().intersects(of_the_page)
}

fn delivery_needs_exiting(v: &View<impl Fields>) -> bool {
    implies(delivery(v), v.pin().contains(PinControls::EXTERNAL_INTERRUPT_EXITING))
}

fn apic_access_address(v: &View<impl Fields>) -> bool {
    let used = v.secondary().contains(SecondaryControls::VIRTUALIZE_APIC_ACCESSES);
    implies(used, v.is_page_pointer(Field::APIC_ACCESS_ADDRESS))
}

fn accesses_exclude_x2apic_mode(v: &View<impl Fields>) -> bool {
    let both = SecondaryControls::VIRTUALIZE_APIC_ACCESSES | SecondaryControls::VIRTUALIZE_X2APIC_MODE;
    !v.secondary().contains(both)
}

fn posted_needs_delivery(v: &View<impl Fields>) -> bool {
    implies(posted(v), delivery(v))
}

fn posted_needs_acknowledge(v: &View<impl Fields>) -> bool {
    implies(posted(v), v.exit().contains(ExitControls::ACK_INTERRUPT_ON_EXIT))
}

fn posted_descriptor_address(v: &View<impl Fields>) -> bool {
    let address = v.get(Field::POSTED_INTR_DESC_ADDR);
    implies(posted(v), address & 0x3F == 0 && v.caps.is_physical(address))
}

fn posted_vector(v: &View<impl Fields>) -> bool {
    implies(posted(v), v.get(Field::POSTED_INTR_NOTIFICATION_VECTOR) <= 0xFF)
}

/// The threshold is looked at unless virtual-interrupt delivery takes its place.
fn uses_threshold(v: &View<impl Fields>) -> bool {
    tpr_shadow(v) && !delivery(v)
}

fn tpr_threshold_reserved(v: &View<impl Fields>) -> bool {
    implies(uses_threshold(v), v.get32(Field::TPR_THRESHOLD) <= 0xF)
}

/// The rule that looks into the virtual-APIC page. With virtualized APIC accesses a task priority that is too low is no
/// error: the entry is followed by an exit. The processor checks it on every entry; run this to explain its refusal.
pub fn check_virtual_tpr(fields: &impl Fields, caps: &Capabilities, memory: &impl ReadsGuest) -> Result<(), Failure> {
    let v = &View { fields, caps };
    let virtualizes_accesses = v.secondary().contains(SecondaryControls::VIRTUALIZE_APIC_ACCESSES);
    let fits = || {
        // No memory there: all ones.
        let vtpr = memory.read_u32(Gpa::new(v.get(Field::VIRTUAL_APIC_ADDRESS) | VTPR)).unwrap_or(u32::MAX);
        v.get32(Field::TPR_THRESHOLD) & 0xF <= vtpr >> 4 & 0xF
    };
    let holds = !uses_threshold(v) || virtualizes_accesses || fits();
    conclude((!holds).then_some(CheckId::TprThresholdFitsVtpr))
}
