//! Control fields, a second time.

use super::core_support::{Vmcs, rich, valid_vmcs12};
use super::{Violations, bit};
use nvmx::rules::caps::offered;
use nvmx::rules::checks::{check_controls, check_live_controls};
use nvmx::vmx::caps::Misc;
use nvmx::vmx::{Capabilities, Field, Field::*, Fields};
use proptest::prelude::*;
use proptest::sample::select;

const PHYSICAL_WIDTH: u32 = 39;

/// "Reserved bits ... must be set properly": each bit on its own.
fn allowed(value: u64, msr: u64) -> bool {
    (0..32).all(|i| if bit(value, i) { bit(msr, i + 32) } else { !bit(msr, i) })
}

fn beyond_width(address: u64) -> bool {
    (PHYSICAL_WIDTH..64).any(|i| bit(address, i))
}

fn page_pointer(address: u64) -> bool {
    address % 4096 == 0 && !beyond_width(address)
}

fn list(address: u64, count: u64) -> bool {
    // In 128 bits nothing wraps.
    let end = u128::from(address) + 16 * u128::from(count);
    count == 0 || address % 16 == 0 && end <= 1 << PHYSICAL_WIDTH
}

/// Names of all rules on control fields that `v` violates.
pub fn violations(v: &impl Fields, caps: &Capabilities) -> Violations {
    let pin = v.get(PIN_BASED_VM_EXEC_CONTROL);
    let primary = v.get(CPU_BASED_VM_EXEC_CONTROL);
    let written = v.get(SECONDARY_VM_EXEC_CONTROL);
    let secondary = if bit(primary, 31) { written } else { 0 };
    let exit = v.get(VM_EXIT_CONTROLS);
    let entry = v.get(VM_ENTRY_CONTROLS);
    let msr = |index| caps.msr(index).unwrap();
    let mut broken = Violations::new();
    let mut demand = |name, holds: bool| {
        if !holds {
            broken.insert(name);
        }
    };

    demand("PinControls", allowed(pin, msr(0x48D)));
    demand("PrimaryControls", allowed(primary, msr(0x48E)));
    demand("SecondaryControls", !bit(primary, 31) || allowed(secondary, msr(0x48B)));
    if bit(primary, 17) {
        let tertiary = v.get(TERTIARY_VM_EXEC_CONTROL);
        demand("TertiaryControls", (0..64).all(|i| !bit(tertiary, i) || bit(msr(0x492), i)));
    }
    demand("Cr3TargetCount", v.get(CR3_TARGET_COUNT) <= msr(0x485) >> 16 & 0x1FF);
    if bit(primary, 25) {
        demand("IoBitmapAddress", page_pointer(v.get(IO_BITMAP_A)) && page_pointer(v.get(IO_BITMAP_B)));
    }
    if bit(primary, 28) {
        demand("MsrBitmapAddress", page_pointer(v.get(MSR_BITMAP)));
    }
    // "Use TPR shadow", and what may be 1 only with it.
    let (threshold, descriptor) = (v.get(TPR_THRESHOLD), v.get(POSTED_INTR_DESC_ADDR));
    if bit(primary, 21) {
        demand("VirtualApicAddress", page_pointer(v.get(VIRTUAL_APIC_ADDRESS)));
        demand("TprThresholdReserved", bit(secondary, 9) || threshold / 16 == 0);
    } else {
        demand("VirtualApicNeedsTprShadow", ![4, 8, 9].iter().any(|&i| bit(secondary, i)));
    }
    if bit(secondary, 0) {
        demand("ApicAccessAddress", page_pointer(v.get(APIC_ACCESS_ADDRESS)));
        demand("ApicAccessesExcludeX2apicMode", !bit(secondary, 4));
    }
    if bit(secondary, 9) {
        demand("VirtualInterruptsNeedExiting", bit(pin, 0));
    }
    if bit(pin, 7) {
        demand("PostedInterruptsNeedDelivery", bit(secondary, 9));
        demand("PostedInterruptsNeedAcknowledge", bit(exit, 15));
        demand("PostedInterruptVector", v.get(POSTED_INTR_NOTIFICATION_VECTOR) / 256 == 0);
        demand("PostedDescriptorAddress", descriptor % 64 == 0 && !beyond_width(descriptor));
    }
    if !bit(pin, 3) {
        demand("VirtualNmisNeedNmiExiting", !bit(pin, 5));
    }
    if !bit(pin, 5) {
        demand("NmiWindowNeedsVirtualNmis", !bit(primary, 22));
    }
    if bit(secondary, 14) {
        let pages = page_pointer(v.get(VMREAD_BITMAP)) && page_pointer(v.get(VMWRITE_BITMAP));
        demand("ShadowBitmapAddresses", pages);
    }
    if bit(secondary, 5) {
        demand("VpidNotZero", v.get(VIRTUAL_PROCESSOR_ID) != 0);
    }
    let eptp = v.get(EPT_POINTER);
    if bit(secondary, 1) {
        let capability = msr(0x48C);
        demand("EptpMemoryType", [(0, 8), (6, 14)].iter().any(|&(kind, cap)| eptp % 8 == kind && bit(capability, cap)));
        demand(
            "EptpWalkLength",
            [(3, 6), (4, 7)].iter().any(|&(len, cap)| eptp / 8 % 8 == len && bit(capability, cap)),
        );
        demand("EptpAccessedDirty", !bit(eptp, 6) || bit(capability, 21));
        demand(
            "EptpReserved",
            (!bit(eptp, 7) || bit(capability, 23)) && (8..12).all(|i| !bit(eptp, i)) && !beyond_width(eptp),
        );
    } else {
        demand("UnrestrictedGuestNeedsEpt", !bit(secondary, 7));
        demand("PmlNeedsEpt", !bit(secondary, 17));
    }
    if bit(secondary, 17) {
        demand("PmlAddress", page_pointer(v.get(PML_ADDRESS)));
    }
    demand("ModeBasedExecuteNeedsEpt", !bit(secondary, 22) || bit(secondary, 1));
    demand("SubPagesNeedEpt", !bit(secondary, 23) || bit(secondary, 1));
    demand("SubPageTablePointer", !bit(secondary, 23) || page_pointer(v.get(SUB_PAGE_PERMISSION_TABLE_POINTER)));
    if bit(secondary, 18) {
        demand("VeInformationAddress", page_pointer(v.get(VIRTUALIZATION_EXCEPTION_INFO)));
    }
    let functions = if bit(secondary, 13) { v.get(VM_FUNCTION_CONTROLS) } else { 0 };
    demand("VmFunctionControls", (0..64).all(|i| !bit(functions, i) || bit(msr(0x491), i)));
    if bit(functions, 0) {
        demand("EptpSwitchingNeedsEpt", bit(secondary, 1));
        demand("EptpListAddress", page_pointer(v.get(EPTP_LIST_ADDRESS)));
    }
    if bit(secondary, 25) {
        demand("TscMultiplierNotZero", v.get(TSC_MULTIPLIER) > 0);
    }

    demand("ExitControls", allowed(exit, msr(0x48F)));
    if !bit(pin, 6) {
        demand("SaveTimerNeedsTimer", !bit(exit, 22));
    }
    demand("ExitMsrStoreList", list(v.get(VM_EXIT_MSR_STORE_ADDR), v.get(VM_EXIT_MSR_STORE_COUNT)));
    demand("ExitMsrLoadList", list(v.get(VM_EXIT_MSR_LOAD_ADDR), v.get(VM_EXIT_MSR_LOAD_COUNT)));

    demand("EntryControls", allowed(entry, msr(0x490)));
    demand("EntryMsrLoadList", list(v.get(VM_ENTRY_MSR_LOAD_ADDR), v.get(VM_ENTRY_MSR_LOAD_COUNT)));
    let info = v.get(VM_ENTRY_INTR_INFO_FIELD);
    if bit(info, 31) {
        let (vector, kind, deliver) = (info & 0xFF, info >> 8 & 7, bit(info, 11));
        let mtf = bit(msr(0x48E), 32 + 27);
        demand("EventType", kind != 1 && (kind != 7 || mtf));
        demand("EventVector", (kind != 2 || vector == 2) && (kind != 3 || vector < 32) && (kind != 7 || vector == 0));
        let pushes = [8, 10, 11, 12, 13, 14, 17].contains(&vector);
        let protected = bit(v.get(GUEST_CR0), 0);
        let right = match (kind == 3 && protected, bit(msr(0x480), 56)) {
            (false, _) => !deliver,
            (true, true) => true,
            (true, false) => deliver == pushes,
        };
        demand("EventErrorCodeBit", right);
        demand("EventReserved", (12..31).all(|i| !bit(info, i)));
        demand("EventErrorCode", !deliver || v.get(VM_ENTRY_EXCEPTION_ERROR_CODE) < 0x1_0000);
        let length = v.get(VM_ENTRY_INSTRUCTION_LEN);
        let shortest = if bit(msr(0x485), 30) { 0 } else { 1 };
        demand("EventInstructionLength", ![4, 5, 6].contains(&kind) || (shortest..16).contains(&length));
    }
    broken
}

const TOUCHED: &[Field] = &[
    PIN_BASED_VM_EXEC_CONTROL,
    CPU_BASED_VM_EXEC_CONTROL,
    SECONDARY_VM_EXEC_CONTROL,
    TERTIARY_VM_EXEC_CONTROL,
    VM_EXIT_CONTROLS,
    VM_ENTRY_CONTROLS,
    IO_BITMAP_A,
    IO_BITMAP_B,
    MSR_BITMAP,
    VIRTUAL_PROCESSOR_ID,
    EPT_POINTER,
    PML_ADDRESS,
    VIRTUAL_APIC_ADDRESS,
    APIC_ACCESS_ADDRESS,
    POSTED_INTR_DESC_ADDR,
    POSTED_INTR_NOTIFICATION_VECTOR,
    TPR_THRESHOLD,
    CR3_TARGET_COUNT,
    VM_FUNCTION_CONTROLS,
    VIRTUALIZATION_EXCEPTION_INFO,
    EPTP_LIST_ADDRESS,
    TSC_MULTIPLIER,
    VM_EXIT_MSR_STORE_ADDR,
    VM_EXIT_MSR_STORE_COUNT,
    VM_EXIT_MSR_LOAD_ADDR,
    VM_EXIT_MSR_LOAD_COUNT,
    VM_ENTRY_MSR_LOAD_ADDR,
    VM_ENTRY_MSR_LOAD_COUNT,
    VM_ENTRY_INTR_INFO_FIELD,
    VM_ENTRY_EXCEPTION_ERROR_CODE,
    VM_ENTRY_INSTRUCTION_LEN,
    GUEST_CR0,
];

#[derive(Clone, Debug)]
enum Change {
    Flip(Field, u32),
    Set(Field, u64),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let event = (0u64..32, 0u64..8, any::<bool>(), 0u32..20).prop_map(|(vector, kind, deliver, stray)| {
        let reserved = if stray > 17 { 1 << (stray - 5) } else { 0 };
        Change::Set(VM_ENTRY_INTR_INFO_FIELD, 1 << 31 | vector | kind << 8 | u64::from(deliver) << 11 | reserved)
    });
    let interesting =
        select(vec![0, 1, 4, 5, 15, 16, 0x1000, 1 << 38, (1 << 39) - 16, 1 << 39, u64::MAX - 15, u64::MAX]);
    let change = prop_oneof![
        4 => (select(TOUCHED), 0u32..64).prop_map(|(field, bit)| Change::Flip(field, bit)),
        2 => (select(TOUCHED), interesting).prop_map(|(field, value)| Change::Set(field, value)),
        1 => (select(TOUCHED), any::<u64>()).prop_map(|(field, value)| Change::Set(field, value)),
        3 => event,
    ];
    prop::collection::vec(change, 0..5)
}

fn machines() -> impl Strategy<Value = Capabilities> {
    (any::<bool>(), any::<bool>(), 0u64..5).prop_map(|(zero_length, any_error_code, targets)| {
        let mut caps = offered(&rich());
        let misc = caps.misc.0 & !(1 << 30 | 0x1FF << 16);
        caps.misc = Misc(misc | u64::from(zero_length) << 30 | targets << 16);
        caps.basic.0 |= u64::from(any_error_code) << 56;
        caps
    })
}

fn agree(v: &Vmcs, caps: &Capabilities) {
    let broken = violations(v, caps);
    match check_controls(v, caps) {
        Ok(_) => assert!(broken.is_empty(), "not found: {broken:?}"),
        Err(failure) => assert!(broken.contains(failure.check.name()), "{} but {broken:?}", failure.check),
    }
    if let Err(failure) = check_live_controls(v, caps) {
        assert!(broken.contains(failure.check.name()), "{} but {broken:?}", failure.check);
    }
}

fn flip(v: &mut Vmcs, field: Field, bit: u32) {
    let value = (v.get(field) ^ 1 << bit) & field.mask();
    v.set(field, value);
}

#[test]
fn both_statements_agree_on_every_single_bit() {
    let caps = offered(&rich());
    let plain = valid_vmcs12(&caps);
    let mut busy = plain.clone();
    busy.or(PIN_BASED_VM_EXEC_CONTROL, 1 << 3 | 1 << 5 | 1 << 6)
        .or(CPU_BASED_VM_EXEC_CONTROL, 1 << 22 | 1 << 25 | 1 << 28);
    busy.or(SECONDARY_VM_EXEC_CONTROL, 1 << 7).or(VM_EXIT_CONTROLS, 1 << 22).set(VM_ENTRY_INTR_INFO_FIELD, 0x8000_0B0D);
    busy.set(VM_EXIT_MSR_LOAD_COUNT, 1).set(VM_EXIT_MSR_STORE_COUNT, 3).set(VM_ENTRY_MSR_LOAD_COUNT, 512);
    busy.or(SECONDARY_VM_EXEC_CONTROL, 1 << 13 | 1 << 18 | 1 << 22 | 1 << 25)
        .set(VM_FUNCTION_CONTROLS, 1)
        .set(TSC_MULTIPLIER, 1 << 48);
    let mut software = busy.clone();
    software.set(VM_ENTRY_INTR_INFO_FIELD, 0x8000_0680).set(VM_ENTRY_INSTRUCTION_LEN, 2).set(CR3_TARGET_COUNT, 4);
    let mut apic = plain.clone();
    apic.or(PIN_BASED_VM_EXEC_CONTROL, 1 << 7 | 1).or(CPU_BASED_VM_EXEC_CONTROL, 1 << 21).or(VM_EXIT_CONTROLS, 1 << 15);
    apic.or(SECONDARY_VM_EXEC_CONTROL, 1 << 4 | 1 << 8 | 1 << 9).set(POSTED_INTR_NOTIFICATION_VECTOR, 0x41);
    let mut tertiary = plain.clone();
    tertiary.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 17).set(TERTIARY_VM_EXEC_CONTROL, 1 << 7);
    let mut accesses = plain.clone();
    accesses.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 21).or(SECONDARY_VM_EXEC_CONTROL, 1).set(TPR_THRESHOLD, 15);
    for start in [plain, busy, software, apic, accesses, tertiary] {
        assert!(violations(&start, &caps).is_empty());
        for &field in TOUCHED {
            for bit in 0..64 {
                let mut v = start.clone();
                flip(&mut v, field, bit);
                agree(&v, &caps);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn both_statements_agree_on_any_changes(caps in machines(), changes in changes()) {
        let mut v = valid_vmcs12(&caps);
        for change in changes {
            match change {
                Change::Flip(field, bit) => flip(&mut v, field, bit),
                Change::Set(field, value) => _ = v.set(field, value & field.mask()),
            }
        }
        agree(&v, &caps);
    }
}
