//! Each rule of VM entry: one vmcs12 that passes them all, and for every rule at least one change that breaks it and
//! nothing that is checked before it.

mod core_support;

use core_support::broken::*;
use core_support::{CONTEXT, Memory, Vmcs, rich, valid_vmcs12};
use nvmx::rules::caps::offered;
use nvmx::rules::checks::{
    CheckId, Failure, GuestFailure, check_cached_controls, check_controls, check_guest, check_guest_beyond_hardware,
    check_host, check_live_controls, check_virtual_tpr, msr_load_failure,
};
use nvmx::vmx::caps::{Basic, EptVpid};
use nvmx::vmx::field::{Area, Home};
use nvmx::vmx::region::REVISION;
use nvmx::vmx::{Capabilities, Field, Field::*, Fields, VmxError};
use std::collections::BTreeSet;

/// What a group of rules came to: the first that failed, with what L2 gets to see.
#[derive(Debug, PartialEq)]
enum Verdict {
    Passed,
    VmFail(CheckId, VmxError),
    EntryExit(CheckId, u64),
}

fn run(v: &Vmcs, memory: &Memory, caps: &Capabilities) -> Verdict {
    if let Err(Failure { check, error }) = check_controls(v, caps) {
        return Verdict::VmFail(check, error);
    }
    if let Err(Failure { check, error }) = check_virtual_tpr(v, caps, memory) {
        return Verdict::VmFail(check, error);
    }
    if let Err(Failure { check, error }) = check_host(v, caps, true) {
        return Verdict::VmFail(check, error);
    }
    match check_guest(v, caps, &CONTEXT, memory) {
        Err(GuestFailure { check, qualification }) => Verdict::EntryExit(check, qualification),
        Ok(_) => Verdict::Passed,
    }
}

fn caps() -> Capabilities {
    offered(&rich())
}

fn valid_32_bit() -> Vmcs {
    let mut v = valid_vmcs12(&caps());
    v.clear(VM_EXIT_CONTROLS, 1 << 9).set(HOST_IA32_EFER, 0);
    legacy(&mut v);
    v
}

fn expected(check: CheckId) -> Verdict {
    use CheckId::*;
    let name = check.name();
    if name.starts_with("Host") {
        return Verdict::VmFail(check, VmxError::EntryInvalidHostStateField);
    }
    if !name.starts_with("Guest") {
        return Verdict::VmFail(check, VmxError::EntryInvalidControlField);
    }
    let qualification = match check {
        GuestPdptes => 2,
        GuestBlockingNmiSti => 3,
        GuestLinkPointerAddress | GuestLinkPointerRegion | GuestLinkPointerCurrent => 4,
        _ => 0,
    };
    Verdict::EntryExit(check, qualification)
}

#[test]
fn the_valid_vmcs12_passes_and_so_do_its_variants() {
    let variants: &[(&str, Change)] = &[
        ("64-bit", |_| ()),
        ("legacy", legacy),
        ("real mode", real_mode),
        ("virtual-8086", v86),
        ("LDT", usable_ldtr),
        ("PAE", pae),
        ("halted", |v| _ = v.set(GUEST_ACTIVITY_STATE, 1)),
        ("inject #GP", |v| _ = inject(v, GP).set(VM_ENTRY_EXCEPTION_ERROR_CODE, 0xFFFF)),
        ("inject NMI", |v| _ = inject(v, NMI)),
        ("inject NMI into HLT", |v| _ = inject(v, NMI).set(GUEST_ACTIVITY_STATE, 1)),
        ("inject interrupt", |v| _ = inject(v, EXTERNAL_INTERRUPT).or(GUEST_RFLAGS, 1 << 9)),
        ("inject INT3 of no length", |v| _ = inject(v, INT3)),
        ("inject MTF", |v| _ = inject(v, 1 << 31 | 7 << 8)),
        ("real mode exception", |v| {
            real_mode(v);
            inject(v, GP & !(1 << 11));
        }),
        ("no event: the rest of the field is not looked at", |v| _ = inject(v, 0x7FFF_FFFF)),
        ("virtual interrupts, posted", |v| _ = posted(v).set(TPR_THRESHOLD, u64::from(u32::MAX))),
        ("TPR threshold above the task priority, accesses virtualized", |v| {
            _ = tpr_shadow(v).or(SECONDARY_VM_EXEC_CONTROL, 1).set(TPR_THRESHOLD, 15)
        }),
        ("APIC accesses exit without a virtual-APIC page", |v| {
            _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1).set(APIC_ACCESS_ADDRESS, 0xFEE0_0000)
        }),
        ("addresses that no control uses", |v| {
            v.set(VIRTUAL_APIC_ADDRESS, u64::MAX).set(APIC_ACCESS_ADDRESS, u64::MAX);
            v.set(POSTED_INTR_DESC_ADDR, u64::MAX).set(POSTED_INTR_NOTIFICATION_VECTOR, 0xFFFF);
            v.set(TPR_THRESHOLD, 0xFFFF_FFFF);
        }),
        ("uncacheable EPT structures", |v| _ = v.clear(EPT_POINTER, 7)),
        ("empty MSR list anywhere", |v| _ = v.set(VM_EXIT_MSR_LOAD_ADDR, u64::MAX)),
        ("list up to the end of memory", |v| {
            _ = v.set(VM_EXIT_MSR_LOAD_ADDR, (1 << 39) - 16).set(VM_EXIT_MSR_LOAD_COUNT, 1)
        }),
        ("conforming code", |v| _ = v.set(GUEST_CS_AR_BYTES, 0xA09F)),
        ("conforming code of ring 0 run in ring 3", |v| {
            v.set(GUEST_CS_AR_BYTES, 0xA09F).or(GUEST_CS_SELECTOR, 3);
            v.or(GUEST_SS_AR_BYTES, 3 << 5).or(GUEST_SS_SELECTOR, 3);
        }),
        ("conforming code in a data register", |v| _ = v.set(GUEST_DS_AR_BYTES, 0xC09F).or(GUEST_DS_SELECTOR, 3)),
        ("unusable data segments", |v| {
            for field in [GUEST_SS_AR_BYTES, GUEST_DS_AR_BYTES, GUEST_ES_AR_BYTES, GUEST_FS_AR_BYTES, GUEST_GS_AR_BYTES]
            {
                v.set(field, 0x1_0000);
            }
            v.set(GUEST_SS_SELECTOR, 0);
        }),
        ("RIP in the upper half", |v| _ = v.set(GUEST_RIP, 0xFFFF_8000_0000_0000)),
        ("RIP just above the lower half", |v| _ = v.set(GUEST_RIP, 1 << 47)),
        ("stepping past MOV SS", |v| {
            v.set(GUEST_INTERRUPTIBILITY_INFO, 2).or(GUEST_RFLAGS, 1 << 8);
            v.set(GUEST_PENDING_DBG_EXCEPTIONS, 1 << 14);
        }),
        ("secondary controls that are not active", |v| {
            v.clear(CPU_BASED_VM_EXEC_CONTROL, 1 << 31).set(SECONDARY_VM_EXEC_CONTROL, 0xFFFF_FFFF);
            v.set(VIRTUAL_PROCESSOR_ID, 0).set(EPT_POINTER, 0);
        }),
        ("values that are not loaded", |v| {
            v.clear(VM_ENTRY_CONTROLS, 1 << 2 | 1 << 14 | 1 << 15).clear(VM_EXIT_CONTROLS, 1 << 19 | 1 << 21);
            v.set(GUEST_IA32_DEBUGCTL, !2).set(GUEST_DR7, u64::MAX);
            for field in [GUEST_IA32_PAT, GUEST_IA32_EFER, HOST_IA32_PAT, HOST_IA32_EFER] {
                v.set(field, u64::MAX);
            }
        }),
    ];
    for (name, change) in variants {
        let mut v = valid_vmcs12(&caps());
        change(&mut v);
        assert_eq!(run(&v, &Memory::default(), &caps()), Verdict::Passed, "{name}");
    }
    let v = valid_32_bit();
    assert!(check_controls(&v, &caps()).is_ok() && check_host(&v, &caps(), false).is_ok());
}

#[test]
fn each_rule_fails_by_its_own_name() {
    for (check, change) in CASES {
        let mut v = valid_vmcs12(&caps());
        change(&mut v);
        assert_eq!(run(&v, &Memory::default(), &caps()), expected(*check));
    }
    for (check, change) in CASES_32_BIT_HOST {
        let mut v = valid_32_bit();
        change(&mut v);
        let failure = check_host(&v, &caps(), false).unwrap_err();
        assert_eq!(failure, Failure { check: *check, error: VmxError::EntryInvalidHostStateField });
    }
}

#[test]
fn accessed_and_dirty_flags_are_enabled_only_where_there_are_any() {
    let without = Capabilities { ept_vpid: EptVpid(caps().ept_vpid.0 & !(1 << 21)), ..caps() };
    let mut v = valid_vmcs12(&caps());
    v.or(EPT_POINTER, 1 << 6);
    assert_eq!(run(&v, &Memory::default(), &caps()), Verdict::Passed);
    assert_eq!(run(&v, &Memory::default(), &without), expected(CheckId::EptpAccessedDirty));
}

#[test]
fn every_rule_has_a_case() {
    let mut covered: BTreeSet<_> = CASES.iter().chain(CASES_32_BIT_HOST).map(|(check, _)| *check as u16).collect();
    covered.insert(CheckId::EptpAccessedDirty as u16); // in the test above
    let of_states = CheckId::ALL.iter().filter(|check| check.section() != "Loading MSRs");
    let missing: Vec<_> = of_states.filter(|check| !covered.contains(&(**check as u16))).collect();
    // Implied by HostAddressSpaceFitsMode for a processor outside of IA-32e mode, and kept because the SDM states it.
    assert_eq!(missing, [&CheckId::Host32BitGuest]);
}

#[test]
fn each_rule_names_a_field_that_breaks_it() {
    let of = |valid: Vmcs, cases: &[(CheckId, Change)]| {
        for (check, change) in cases {
            let mut v = valid.clone();
            change(&mut v);
            let named = check.fields().iter().any(|&field| v.get(field) != valid.get(field));
            assert!(named, "{check}: none of {:?} was changed", check.fields());
        }
    };
    of(valid_vmcs12(&caps()), CASES);
    of(valid_32_bit(), CASES_32_BIT_HOST);
}

#[test]
fn a_refused_msr_is_explained_by_its_index() {
    for (index, check) in [
        (1 << 32 | 0x174, CheckId::MsrLoadReserved),
        (0xC000_0100, CheckId::MsrLoadBase),
        (0xC000_0101, CheckId::MsrLoadBase),
        (0x800, CheckId::MsrLoadX2apic),
        (0x8FF, CheckId::MsrLoadX2apic),
        (0x900, CheckId::MsrLoadValue),
        (0xC000_0083, CheckId::MsrLoadValue),
        (u64::MAX, CheckId::MsrLoadWithheld),
    ] {
        assert_eq!(msr_load_failure(index), check, "{index:#x}");
    }
}

#[test]
fn a_64_bit_guest_of_a_32_bit_host_fails_even_if_the_entry_is_made_in_long_mode() {
    let mut v = valid_vmcs12(&caps());
    v.clear(VM_EXIT_CONTROLS, 1 << 9);
    assert_eq!(check_host(&v, &caps(), true).unwrap_err().check, CheckId::HostAddressSpaceFitsMode);
}

#[test]
fn names_and_texts_are_unique() {
    let names: BTreeSet<_> = CheckId::ALL.iter().map(|c| c.name()).collect();
    let texts: BTreeSet<_> = CheckId::ALL.iter().map(|c| c.text()).collect();
    assert_eq!((names.len(), texts.len()), (CheckId::ALL.len(), CheckId::ALL.len()));
    assert!(texts.iter().all(|text| !text.is_empty()));
}

#[test]
fn controls_come_before_host_state_and_host_state_before_guest_state() {
    let mut v = valid_vmcs12(&caps());
    v.set(GUEST_RFLAGS, 0);
    assert_eq!(run(&v, &Memory::default(), &caps()), expected(CheckId::GuestRflagsReserved));
    v.set(HOST_CS_SELECTOR, 0);
    assert_eq!(run(&v, &Memory::default(), &caps()), expected(CheckId::HostCsNotNull));
    v.set(CR3_TARGET_COUNT, 5);
    assert_eq!(run(&v, &Memory::default(), &caps()), expected(CheckId::Cr3TargetCount));
    v.set(PIN_BASED_VM_EXEC_CONTROL, 0);
    assert_eq!(run(&v, &Memory::default(), &caps()), expected(CheckId::PinControls));
}

/// Refuses to be asked for a field whose value lives in vmcs02.
struct CacheOnly<'a>(&'a Vmcs);

impl Fields for CacheOnly<'_> {
    fn get(&self, field: Field) -> u64 {
        assert_eq!(field.home(), Home::Cache, "{field} would cost a VMREAD of vmcs02");
        self.0.get(field)
    }
}

#[test]
fn the_checks_of_every_entry_touch_only_nvmx_s_copy() {
    let mut v = valid_vmcs12(&caps());
    v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 25 | 1 << 28).or(SECONDARY_VM_EXEC_CONTROL, 1 << 7);
    let all_lists = [VM_EXIT_MSR_STORE_COUNT, VM_EXIT_MSR_LOAD_COUNT, VM_ENTRY_MSR_LOAD_COUNT];
    all_lists.iter().for_each(|&count| _ = v.set(count, 3));
    assert!(check_cached_controls(&CacheOnly(&v), &caps()).is_ok());
    assert!(check_host(&CacheOnly(&v), &caps(), true).is_ok());
}

#[test]
fn cached_and_live_rules_together_are_all_rules_on_controls() {
    for (check, change) in CASES {
        let mut v = valid_vmcs12(&caps());
        change(&mut v);
        let split = check_cached_controls(&v, &caps()).map(|_| ()).and_then(|()| check_live_controls(&v, &caps()));
        assert_eq!(split, check_controls(&v, &caps()).map(|_| ()), "{check:?}");
    }
}

#[test]
fn the_tpr_threshold_is_compared_with_the_high_half_of_the_task_priority() {
    for threshold in 0..16u64 {
        for vtpr in 0..256u64 {
            let mut v = valid_vmcs12(&caps());
            tpr_shadow(&mut v).set(TPR_THRESHOLD, threshold);
            let memory = Memory([(0x5080, 0xABCD_EF00 | vtpr)].into());
            let fits = threshold <= vtpr >> 4;
            assert_eq!(check_virtual_tpr(&v, &caps(), &memory).is_ok(), fits, "{threshold} {vtpr:#x}");
            v.set(VIRTUAL_APIC_ADDRESS, 32 << 20);
            assert!(check_virtual_tpr(&v, &caps(), &memory).is_ok(), "no memory: all ones");
        }
    }
}

#[test]
fn error_code_of_an_exception_is_free_where_the_processor_says_so() {
    let free = Capabilities { basic: Basic(caps().basic.0 | 1 << 56), ..caps() };
    let mut v = valid_vmcs12(&free);
    inject(&mut v, GP & !(1 << 11));
    assert!(check_controls(&v, &free).is_ok());
    inject(&mut v, 1 << 31 | 3 << 8 | 1 << 11 | 6);
    assert!(check_controls(&v, &free).is_ok());
    inject(&mut v, NMI | 1 << 11);
    assert_eq!(check_controls(&v, &free).unwrap_err().check, CheckId::EventErrorCodeBit);
}

#[test]
fn cr3_has_the_flags_of_linear_address_masking_where_the_processor_has_that() {
    let masks = Capabilities { cr3_flags: 1 << 61 | 1 << 62, ..caps() };
    for (field, check) in [(GUEST_CR3, CheckId::GuestCr3), (HOST_CR3, CheckId::HostCr3)] {
        for bit in 39..64 {
            let mut v = valid_vmcs12(&caps());
            v.set(field, v.get(field) | 1 << bit);
            let none = Memory([].into());
            assert_eq!(run(&v, &none, &caps()), expected(check), "{field:?} {bit}");
            let wanted = if matches!(bit, 61 | 62) { Verdict::Passed } else { expected(check) };
            assert_eq!(run(&v, &none, &masks), wanted, "{field:?} {bit}");
        }
    }
}

#[test]
fn link_pointer_to_an_ordinary_vmcs_is_accepted_and_to_a_shadow_is_not() {
    let mut v = valid_vmcs12(&caps());
    v.set(VMCS_LINK_POINTER, 0x5000);
    let with = |word| Memory([(0x5000, word)].into());
    assert_eq!(run(&v, &with(u64::from(REVISION)), &caps()), Verdict::Passed);
    let shadow = u64::from(REVISION | 1 << 31);
    assert_eq!(run(&v, &with(shadow), &caps()), expected(CheckId::GuestLinkPointerRegion));
}

#[test]
fn pdptes_of_a_guest_without_ept_come_from_its_memory() {
    let mut v = valid_vmcs12(&caps());
    pae(&mut v);
    v.clear(SECONDARY_VM_EXEC_CONTROL, 1 << 1).set(GUEST_CR3, 0x3020).set(GUEST_PDPTE0, u64::MAX);
    let with = |word| Memory([(0x3038, word)].into());
    assert_eq!(run(&v, &with(0x4001), &caps()), Verdict::Passed);
    assert_eq!(run(&v, &with(u64::MAX - 1), &caps()), Verdict::Passed, "not present");
    assert_eq!(run(&v, &with(0x4003), &caps()), expected(CheckId::GuestPdptes));
}

#[test]
fn what_hardware_cannot_see_is_checked_before_the_entry() {
    for (check, change) in CASES {
        let mut v = valid_vmcs12(&caps());
        change(&mut v);
        let full = run(&v, &Memory::default(), &caps());
        let before = check_guest_beyond_hardware(&v, &caps(), &CONTEXT, &Memory::default());
        let must_see = matches!(
            check,
            CheckId::GuestActivity
                | CheckId::GuestLinkPointerAddress
                | CheckId::GuestLinkPointerRegion
                | CheckId::GuestLinkPointerCurrent
        );
        match before {
            Err(GuestFailure { check: found, qualification }) => {
                assert_eq!(full, Verdict::EntryExit(found, qualification));
                assert_eq!(found, *check);
            }
            Ok(()) => assert!(!must_see, "{check:?}"),
        }
    }
}

#[test]
fn rules_ask_for_no_exit_information() {
    struct NoExitInfo<'a>(&'a Vmcs);
    impl Fields for NoExitInfo<'_> {
        fn get(&self, field: Field) -> u64 {
            assert_ne!(field.area(), Area::ExitInfo, "{field}");
            self.0.get(field)
        }
    }
    let v = valid_vmcs12(&caps());
    let v = NoExitInfo(&v);
    assert!(check_controls(&v, &caps()).is_ok());
    assert!(check_host(&v, &caps(), true).is_ok());
    assert!(check_guest(&v, &caps(), &CONTEXT, &Memory::default()).is_ok());
}

#[test]
fn every_base_and_every_sysenter_address_must_be_canonical() {
    let fails = |field, edge| {
        let mut v = valid_vmcs12(&caps());
        usable_ldtr(&mut v);
        v.set(field, edge);
        run(&v, &Memory::default(), &caps())
    };
    let cases = [
        (CheckId::HostBaseCanonical, &[HOST_FS_BASE, HOST_GS_BASE, HOST_GDTR_BASE, HOST_IDTR_BASE, HOST_TR_BASE][..]),
        (CheckId::HostSysenter, &[HOST_IA32_SYSENTER_ESP, HOST_IA32_SYSENTER_EIP][..]),
        (CheckId::GuestBaseCanonical, &[GUEST_FS_BASE, GUEST_GS_BASE, GUEST_TR_BASE, GUEST_LDTR_BASE][..]),
        (CheckId::GuestSysenter, &[GUEST_SYSENTER_ESP, GUEST_SYSENTER_EIP][..]),
        (CheckId::GuestTableBase, &[GUEST_GDTR_BASE, GUEST_IDTR_BASE][..]),
    ];
    for (check, fields) in cases {
        for &field in fields {
            assert_eq!(fails(field, 1 << 47), expected(check), "{field}");
            assert_eq!(fails(field, (u64::MAX << 47) - 1), expected(check), "{field}");
            assert_eq!(fails(field, (1 << 47) - 1), Verdict::Passed, "{field}");
            assert_eq!(fails(field, u64::MAX << 47), Verdict::Passed, "{field}");
        }
    }
}

#[test]
fn events_that_each_activity_state_takes() {
    // The machine under nvmx has all four states; the rules are the same for it.
    let hw = rich();
    let mc = 1 << 31 | 3 << 8 | 18;
    let db = 1 << 31 | 3 << 8 | 1;
    let mtf = 1 << 31 | 7 << 8;
    let events = [NMI, mc, db, mtf, GP, INT3, EXTERNAL_INTERRUPT];
    let taken = [(0, 0b111_1111), (1, 0b100_1111), (2, 0b000_0011), (3, 0)];
    for (state, taken) in taken {
        for (i, event) in events.into_iter().enumerate() {
            let mut v = valid_vmcs12(&hw);
            inject(&mut v, event).set(VM_ENTRY_INSTRUCTION_LEN, 1).set(GUEST_ACTIVITY_STATE, state);
            v.or(GUEST_RFLAGS, 1 << 9);
            let verdict = run(&v, &Memory::default(), &hw);
            let expected = if taken >> i & 1 == 1 { Verdict::Passed } else { expected(CheckId::GuestActivityEvent) };
            assert_eq!(verdict, expected, "state {state}, event {event:#x}");
        }
    }
}

/// The first of all broken rules is the one that the entry ends with, and a second one that has nothing to do with it is
/// told as well.
#[test]
fn all_broken_rules_begin_with_the_one_that_is_reported() {
    let (caps, memory) = (caps(), Memory::default());
    let all = |v: &Vmcs| nvmx::rules::checks::all_broken(v, &caps, true, &CONTEXT, &memory);
    assert!(all(&valid_vmcs12(&caps)).is_empty());
    for (check, change) in CASES {
        let mut v = valid_vmcs12(&caps);
        change(&mut v);
        match run(&v, &memory, &caps) {
            Verdict::Passed => continue,
            Verdict::VmFail(first, _) | Verdict::EntryExit(first, _) => {
                assert_eq!(all(&v).first(), Some(&first), "{check:?}");
                let group = first.name().starts_with("Guest");
                v.set(HOST_RIP, 1 << 62).set(GUEST_SYSENTER_ESP, 1 << 62);
                let both = all(&v);
                assert!(both.contains(&first) && both.contains(&CheckId::HostRip), "{check:?}: {both:?} {group}");
                assert!(both.contains(&CheckId::GuestSysenter), "{check:?}: {both:?}");
            }
        }
    }
}
