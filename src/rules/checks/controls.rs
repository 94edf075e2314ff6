//! Rules on the VM-execution, VM-exit and VM-entry control fields.
//!
//! Source: Intel SDM vol. 3C (December 2024), "VM-Execution Control Fields", "VM-Exit Control Fields" and "VM-Entry Control
//! Fields" of the chapter "VM Entries". Rules on controls that nvmx does not offer are absent: the first five refuse the
//! control itself.

use crate::rules::checks::view::{CR0_PE, View, implies};
use crate::rules::checks::{CheckId, ControlsChecked, Failure, first_failure, virtual_apic};
use crate::vmx::controls::{EPTP_SWITCHING, ExitControls, PinControls, PrimaryControls, SecondaryControls};
use crate::vmx::event::{self, EventKind};
use crate::vmx::{Capabilities, Field, Fields, VmxError};

/// Checks all rules on control fields.
pub fn check_controls(fields: &impl Fields, caps: &Capabilities) -> Result<ControlsChecked, Failure> {
    let proof = check_cached_controls(fields, caps)?;
    check_live_controls(fields, caps)?;
    Ok(proof)
}

/// The rules that concern fields in nvmx's copy of vmcs12 only: to be run again when one of those was written.
pub fn check_cached_controls(fields: &impl Fields, caps: &Capabilities) -> Result<ControlsChecked, Failure> {
    let v = &View { fields, caps };
    let failed = first_failure! { v;
        PinControls => pin_controls;
        PrimaryControls => primary_controls;
        SecondaryControls => secondary_controls;
        TertiaryControls => tertiary_controls;
        IoBitmapAddress => io_bitmap_addresses;
        MsrBitmapAddress => msr_bitmap_address;
        VirtualNmisNeedNmiExiting => virtual_nmis_need_nmi_exiting;
        NmiWindowNeedsVirtualNmis => nmi_window_needs_virtual_nmis;
        ShadowBitmapAddresses => shadow_bitmap_addresses;
        VpidNotZero => vpid_not_zero;
        EptpMemoryType => eptp_memory_type;
        EptpWalkLength => eptp_walk_length;
        EptpAccessedDirty => eptp_accessed_dirty;
        EptpReserved => eptp_reserved;
        UnrestrictedGuestNeedsEpt => unrestricted_guest_needs_ept;
        ModeBasedExecuteNeedsEpt => mode_based_execute_needs_ept;
        SubPagesNeedEpt => sub_pages_need_ept;
        SubPageTablePointer => sub_page_table_pointer;
        VeInformationAddress => ve_information_address;
        VmFunctionControls => vm_function_controls;
        EptpSwitchingNeedsEpt => eptp_switching_needs_ept;
        EptpListAddress => eptp_list_address;
        PmlNeedsEpt => pml_needs_ept;
        PmlAddress => pml_address;
        ExitControls => exit_controls;
        SaveTimerNeedsTimer => save_timer_needs_timer;
        ExitMsrStoreList => exit_msr_store_list;
        ExitMsrLoadList => exit_msr_load_list;
        EntryControls => entry_controls;
        EntryMsrLoadList => entry_msr_load_list;
    };
    conclude(failed.or_else(|| virtual_apic::cached_failure(v))).map(|()| ControlsChecked(()))
}

/// The rules on control fields whose value lives in vmcs02, where the processor checks them on every entry: run these to
/// explain its refusal.
pub fn check_live_controls(fields: &impl Fields, caps: &Capabilities) -> Result<(), Failure> {
    let v = &View { fields, caps };
    let failed = first_failure! { v;
        TscMultiplierNotZero => tsc_multiplier_not_zero;
        Cr3TargetCount => cr3_target_count;
        EventType => event_type;
        EventVector => event_vector;
        EventErrorCodeBit => event_error_code_bit;
        EventReserved => event_reserved;
        EventErrorCode => event_error_code;
        EventInstructionLength => event_instruction_length;
    };
    conclude(failed.or_else(|| virtual_apic::live_failure(v)))
}

pub(super) fn conclude(failed: Option<CheckId>) -> Result<(), Failure> {
    match failed {
        None => Ok(()),
        Some(check) => Err(Failure { check, error: VmxError::EntryInvalidControlField }),
    }
}

// VM-execution control fields

fn pin_controls(v: &View<impl Fields>) -> bool {
    v.caps.pin.accepts(v.pin().bits())
}

fn primary_controls(v: &View<impl Fields>) -> bool {
    v.caps.primary.accepts(v.primary().bits())
}

fn secondary_controls(v: &View<impl Fields>) -> bool {
    let active = v.primary().contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS);
    implies(active, v.caps.secondary.accepts(v.secondary().bits()))
}

fn tertiary_controls(v: &View<impl Fields>) -> bool {
    let active = v.primary().contains(PrimaryControls::ACTIVATE_TERTIARY_CONTROLS);
    implies(active, v.get(Field::TERTIARY_VM_EXEC_CONTROL) & !v.caps.tertiary.bits() == 0)
}

fn cr3_target_count(v: &View<impl Fields>) -> bool {
    v.get32(Field::CR3_TARGET_COUNT) <= v.caps.misc.cr3_targets()
}

fn io_bitmap_addresses(v: &View<impl Fields>) -> bool {
    let used = v.primary().contains(PrimaryControls::USE_IO_BITMAPS);
    implies(used, v.is_page_pointer(Field::IO_BITMAP_A) && v.is_page_pointer(Field::IO_BITMAP_B))
}

fn msr_bitmap_address(v: &View<impl Fields>) -> bool {
    implies(v.primary().contains(PrimaryControls::USE_MSR_BITMAPS), v.is_page_pointer(Field::MSR_BITMAP))
}

fn shadow_bitmap_addresses(v: &View<impl Fields>) -> bool {
    let used = v.secondary().contains(SecondaryControls::VMCS_SHADOWING);
    implies(used, v.is_page_pointer(Field::VMREAD_BITMAP) && v.is_page_pointer(Field::VMWRITE_BITMAP))
}

fn virtual_nmis_need_nmi_exiting(v: &View<impl Fields>) -> bool {
    implies(v.pin().contains(PinControls::VIRTUAL_NMIS), v.pin().contains(PinControls::NMI_EXITING))
}

fn nmi_window_needs_virtual_nmis(v: &View<impl Fields>) -> bool {
    let window = v.primary().contains(PrimaryControls::NMI_WINDOW_EXITING);
    implies(window, v.pin().contains(PinControls::VIRTUAL_NMIS))
}

fn vpid_not_zero(v: &View<impl Fields>) -> bool {
    implies(v.secondary().contains(SecondaryControls::ENABLE_VPID), v.get(Field::VIRTUAL_PROCESSOR_ID) != 0)
}

fn with_eptp(v: &View<impl Fields>, rule: impl Fn(u64) -> bool) -> bool {
    !v.secondary().contains(SecondaryControls::ENABLE_EPT) || rule(v.get(Field::EPT_POINTER))
}

fn eptp_memory_type(v: &View<impl Fields>) -> bool {
    with_eptp(v, |eptp| match eptp & 7 {
        0 => v.caps.ept_vpid.memory_type_uc(),
        6 => v.caps.ept_vpid.memory_type_wb(),
        _ => false,
    })
}

fn eptp_walk_length(v: &View<impl Fields>) -> bool {
    with_eptp(v, |eptp| match eptp >> 3 & 7 {
        3 => v.caps.ept_vpid.walk_4(),
        4 => v.caps.ept_vpid.walk_5(),
        _ => false,
    })
}

fn eptp_accessed_dirty(v: &View<impl Fields>) -> bool {
    with_eptp(v, |eptp| implies(eptp & 1 << 6 != 0, v.caps.ept_vpid.accessed_dirty()))
}

fn eptp_reserved(v: &View<impl Fields>) -> bool {
    with_eptp(v, |eptp| {
        let shadow_stack = implies(eptp & 1 << 7 != 0, v.caps.ept_vpid.supervisor_shadow_stack());
        shadow_stack && eptp & 0xF00 == 0 && v.within_physical_width(Field::EPT_POINTER)
    })
}

fn unrestricted_guest_needs_ept(v: &View<impl Fields>) -> bool {
    implies(v.unrestricted(), v.secondary().contains(SecondaryControls::ENABLE_EPT))
}

fn mode_based_execute_needs_ept(v: &View<impl Fields>) -> bool {
    let used = v.secondary().contains(SecondaryControls::MODE_BASED_EXECUTE_CONTROL);
    implies(used, v.secondary().contains(SecondaryControls::ENABLE_EPT))
}

fn sub_pages_need_ept(v: &View<impl Fields>) -> bool {
    let used = v.secondary().contains(SecondaryControls::SUB_PAGE_WRITE_PERMISSIONS);
    implies(used, v.secondary().contains(SecondaryControls::ENABLE_EPT))
}

fn sub_page_table_pointer(v: &View<impl Fields>) -> bool {
    let used = v.secondary().contains(SecondaryControls::SUB_PAGE_WRITE_PERMISSIONS);
    implies(used, v.is_page_pointer(Field::SUB_PAGE_PERMISSION_TABLE_POINTER))
}

fn ve_information_address(v: &View<impl Fields>) -> bool {
    let used = v.secondary().contains(SecondaryControls::EPT_VIOLATION_VE);
    implies(used, v.is_page_pointer(Field::VIRTUALIZATION_EXCEPTION_INFO))
}

/// The VM functions that are enabled; none without "enable VM functions".
fn vm_functions(v: &View<impl Fields>) -> u64 {
    let enabled = v.secondary().contains(SecondaryControls::ENABLE_VM_FUNCTIONS);
    if enabled { v.get(Field::VM_FUNCTION_CONTROLS) } else { 0 }
}

fn switches_eptp(v: &View<impl Fields>) -> bool {
    vm_functions(v) & EPTP_SWITCHING != 0
}

fn vm_function_controls(v: &View<impl Fields>) -> bool {
    vm_functions(v) & !v.caps.vmfunc == 0
}

fn eptp_switching_needs_ept(v: &View<impl Fields>) -> bool {
    implies(switches_eptp(v), v.secondary().contains(SecondaryControls::ENABLE_EPT))
}

fn eptp_list_address(v: &View<impl Fields>) -> bool {
    implies(switches_eptp(v), v.is_page_pointer(Field::EPTP_LIST_ADDRESS))
}

fn tsc_multiplier_not_zero(v: &View<impl Fields>) -> bool {
    implies(v.secondary().contains(SecondaryControls::USE_TSC_SCALING), v.get(Field::TSC_MULTIPLIER) != 0)
}

fn pml_needs_ept(v: &View<impl Fields>) -> bool {
    let secondary = v.secondary();
    implies(secondary.contains(SecondaryControls::ENABLE_PML), secondary.contains(SecondaryControls::ENABLE_EPT))
}

fn pml_address(v: &View<impl Fields>) -> bool {
    implies(v.secondary().contains(SecondaryControls::ENABLE_PML), v.is_page_pointer(Field::PML_ADDRESS))
}

// VM-exit control fields

fn exit_controls(v: &View<impl Fields>) -> bool {
    v.caps.exit.accepts(v.exit().bits())
}

fn save_timer_needs_timer(v: &View<impl Fields>) -> bool {
    let saves = v.exit().contains(ExitControls::SAVE_PREEMPTION_TIMER);
    implies(saves, v.pin().contains(PinControls::PREEMPTION_TIMER))
}

/// An MSR list of `count` entries of 16 bytes lies wholly within the physical address space, on a 16-byte boundary.
fn msr_list(v: &View<impl Fields>, address: Field, count: Field) -> bool {
    let (address, count) = (v.get(address), u64::from(v.get32(count)));
    let Some(last) = count.checked_mul(16).and_then(|bytes| bytes.checked_sub(1)) else { return true };
    let Some(last) = address.checked_add(last) else { return false };
    address & 0xF == 0 && v.caps.is_physical(address) && v.caps.is_physical(last)
}

fn exit_msr_store_list(v: &View<impl Fields>) -> bool {
    msr_list(v, Field::VM_EXIT_MSR_STORE_ADDR, Field::VM_EXIT_MSR_STORE_COUNT)
}

fn exit_msr_load_list(v: &View<impl Fields>) -> bool {
    msr_list(v, Field::VM_EXIT_MSR_LOAD_ADDR, Field::VM_EXIT_MSR_LOAD_COUNT)
}

// VM-entry control fields

fn entry_controls(v: &View<impl Fields>) -> bool {
    v.caps.entry.accepts(v.entry().bits())
}

fn entry_msr_load_list(v: &View<impl Fields>) -> bool {
    msr_list(v, Field::VM_ENTRY_MSR_LOAD_ADDR, Field::VM_ENTRY_MSR_LOAD_COUNT)
}

fn event_type(v: &View<impl Fields>) -> bool {
    !v.event().is_valid()
        || match v.event().kind() {
            EventKind::Reserved => false,
            EventKind::Other => v.caps.primary.allows(PrimaryControls::MONITOR_TRAP_FLAG),
            _ => true,
        }
}

fn event_vector(v: &View<impl Fields>) -> bool {
    let event = v.event();
    !event.is_valid()
        || match event.kind() {
            EventKind::Nmi => event.vector() == event::vector::NMI,
            EventKind::HardwareException => event.vector() <= 31,
            EventKind::Other => event.vector() == 0,
            _ => true,
        }
}

fn event_error_code_bit(v: &View<impl Fields>) -> bool {
    let event = v.event();
    if !event.is_valid() {
        return true;
    }
    let exception = event.kind() == EventKind::HardwareException;
    let protected = v.get(Field::GUEST_CR0) & CR0_PE != 0;
    if !exception || !protected {
        return !event.has_error_code();
    }
    v.caps.basic.any_error_code_delivery() || event.has_error_code() == event::has_error_code(event.vector())
}

fn event_reserved(v: &View<impl Fields>) -> bool {
    implies(v.event().is_valid(), v.event().0 & event::EventInfo::ENTRY_RESERVED == 0)
}

fn event_error_code(v: &View<impl Fields>) -> bool {
    let used = v.event().is_valid() && v.event().has_error_code();
    implies(used, v.get32(Field::VM_ENTRY_EXCEPTION_ERROR_CODE) >> 16 == 0)
}

fn event_instruction_length(v: &View<impl Fields>) -> bool {
    let used = v.event().is_valid() && v.event().has_instruction_length();
    let shortest = if v.caps.misc.zero_length_injection() { 0 } else { 1 };
    implies(used, (shortest..=15).contains(&v.get32(Field::VM_ENTRY_INSTRUCTION_LEN)))
}

/// Would this EPTP pass the checks of a VM entry? INVEPT and EPTP switching ask the same.
pub fn eptp_is_valid(eptp: u64, caps: &Capabilities) -> bool {
    let fields = |field| match field {
        Field::EPT_POINTER => eptp,
        Field::CPU_BASED_VM_EXEC_CONTROL => PrimaryControls::ACTIVATE_SECONDARY_CONTROLS.bits() as u64,
        Field::SECONDARY_VM_EXEC_CONTROL => SecondaryControls::ENABLE_EPT.bits() as u64,
        _ => 0,
    };
    let v = &View { fields: &fields, caps };
    eptp_memory_type(v) && eptp_walk_length(v) && eptp_accessed_dirty(v) && eptp_reserved(v)
}
