//! The field table against the SDM's appendix, written here anew: by width and area, in order of index, as the appendix
//! lists them. A dash is an index that no field of ours has.

use nvmx::vmx::field::{Area, Field, Width};
use std::collections::{BTreeMap, HashSet};

struct Section {
    width: Width,
    area: Area,
    fields: &'static str,
}

const SDM: &[Section] = &[
    Section {
        width: Width::W16,
        area: Area::Control,
        fields: "VIRTUAL_PROCESSOR_ID POSTED_INTR_NOTIFICATION_VECTOR EPTP_INDEX HLAT_PREFIX_SIZE LAST_PID_POINTER_INDEX",
    },
    Section {
        width: Width::W16,
        area: Area::Guest,
        fields: "GUEST_ES_SELECTOR GUEST_CS_SELECTOR GUEST_SS_SELECTOR GUEST_DS_SELECTOR GUEST_FS_SELECTOR
            GUEST_GS_SELECTOR GUEST_LDTR_SELECTOR GUEST_TR_SELECTOR GUEST_INTERRUPT_STATUS PML_INDEX GUEST_UINV",
    },
    Section {
        width: Width::W16,
        area: Area::Host,
        fields: "HOST_ES_SELECTOR HOST_CS_SELECTOR HOST_SS_SELECTOR HOST_DS_SELECTOR HOST_FS_SELECTOR HOST_GS_SELECTOR
            HOST_TR_SELECTOR",
    },
    Section {
        width: Width::W64,
        area: Area::Control,
        fields: "IO_BITMAP_A IO_BITMAP_B MSR_BITMAP VM_EXIT_MSR_STORE_ADDR VM_EXIT_MSR_LOAD_ADDR VM_ENTRY_MSR_LOAD_ADDR
            EXECUTIVE_VMCS_POINTER PML_ADDRESS TSC_OFFSET VIRTUAL_APIC_ADDRESS APIC_ACCESS_ADDRESS
            POSTED_INTR_DESC_ADDR VM_FUNCTION_CONTROLS EPT_POINTER EOI_EXIT_BITMAP0 EOI_EXIT_BITMAP1 EOI_EXIT_BITMAP2
            EOI_EXIT_BITMAP3 EPTP_LIST_ADDRESS VMREAD_BITMAP VMWRITE_BITMAP VIRTUALIZATION_EXCEPTION_INFO
            XSS_EXITING_BITMAP ENCLS_EXITING_BITMAP SUB_PAGE_PERMISSION_TABLE_POINTER TSC_MULTIPLIER
            TERTIARY_VM_EXEC_CONTROL - - - - - HLAT_POINTER PID_POINTER_TABLE - - - SPEC_CTRL_MASK SPEC_CTRL_SHADOW",
    },
    Section { width: Width::W64, area: Area::ExitInfo, fields: "GUEST_PHYSICAL_ADDRESS" },
    Section {
        width: Width::W64,
        area: Area::Guest,
        fields: "VMCS_LINK_POINTER GUEST_IA32_DEBUGCTL GUEST_IA32_PAT GUEST_IA32_EFER GUEST_IA32_PERF_GLOBAL_CTRL
            GUEST_PDPTE0 GUEST_PDPTE1 GUEST_PDPTE2 GUEST_PDPTE3 GUEST_IA32_BNDCFGS GUEST_IA32_RTIT_CTL -
            GUEST_IA32_PKRS",
    },
    Section {
        width: Width::W64,
        area: Area::Host,
        fields: "HOST_IA32_PAT HOST_IA32_EFER HOST_IA32_PERF_GLOBAL_CTRL HOST_IA32_PKRS",
    },
    Section {
        width: Width::W32,
        area: Area::Control,
        fields: "PIN_BASED_VM_EXEC_CONTROL CPU_BASED_VM_EXEC_CONTROL EXCEPTION_BITMAP PAGE_FAULT_ERROR_CODE_MASK
            PAGE_FAULT_ERROR_CODE_MATCH CR3_TARGET_COUNT VM_EXIT_CONTROLS VM_EXIT_MSR_STORE_COUNT
            VM_EXIT_MSR_LOAD_COUNT VM_ENTRY_CONTROLS VM_ENTRY_MSR_LOAD_COUNT VM_ENTRY_INTR_INFO_FIELD
            VM_ENTRY_EXCEPTION_ERROR_CODE VM_ENTRY_INSTRUCTION_LEN TPR_THRESHOLD SECONDARY_VM_EXEC_CONTROL PLE_GAP
            PLE_WINDOW",
    },
    Section {
        width: Width::W32,
        area: Area::ExitInfo,
        fields: "VM_INSTRUCTION_ERROR VM_EXIT_REASON VM_EXIT_INTR_INFO VM_EXIT_INTR_ERROR_CODE IDT_VECTORING_INFO_FIELD
            IDT_VECTORING_ERROR_CODE VM_EXIT_INSTRUCTION_LEN VMX_INSTRUCTION_INFO",
    },
    Section {
        width: Width::W32,
        area: Area::Guest,
        fields: "GUEST_ES_LIMIT GUEST_CS_LIMIT GUEST_SS_LIMIT GUEST_DS_LIMIT GUEST_FS_LIMIT GUEST_GS_LIMIT
            GUEST_LDTR_LIMIT GUEST_TR_LIMIT GUEST_GDTR_LIMIT GUEST_IDTR_LIMIT GUEST_ES_AR_BYTES GUEST_CS_AR_BYTES
            GUEST_SS_AR_BYTES GUEST_DS_AR_BYTES GUEST_FS_AR_BYTES GUEST_GS_AR_BYTES GUEST_LDTR_AR_BYTES
            GUEST_TR_AR_BYTES GUEST_INTERRUPTIBILITY_INFO GUEST_ACTIVITY_STATE GUEST_SMBASE GUEST_SYSENTER_CS -
            VMX_PREEMPTION_TIMER_VALUE",
    },
    Section { width: Width::W32, area: Area::Host, fields: "HOST_IA32_SYSENTER_CS" },
    Section {
        width: Width::Natural,
        area: Area::Control,
        fields: "CR0_GUEST_HOST_MASK CR4_GUEST_HOST_MASK CR0_READ_SHADOW CR4_READ_SHADOW CR3_TARGET_VALUE0
            CR3_TARGET_VALUE1 CR3_TARGET_VALUE2 CR3_TARGET_VALUE3",
    },
    Section {
        width: Width::Natural,
        area: Area::ExitInfo,
        fields: "EXIT_QUALIFICATION IO_RCX IO_RSI IO_RDI IO_RIP GUEST_LINEAR_ADDRESS",
    },
    Section {
        width: Width::Natural,
        area: Area::Guest,
        fields: "GUEST_CR0 GUEST_CR3 GUEST_CR4 GUEST_ES_BASE GUEST_CS_BASE GUEST_SS_BASE GUEST_DS_BASE GUEST_FS_BASE
            GUEST_GS_BASE GUEST_LDTR_BASE GUEST_TR_BASE GUEST_GDTR_BASE GUEST_IDTR_BASE GUEST_DR7 GUEST_RSP GUEST_RIP
            GUEST_RFLAGS GUEST_PENDING_DBG_EXCEPTIONS GUEST_SYSENTER_ESP GUEST_SYSENTER_EIP GUEST_S_CET GUEST_SSP
            GUEST_INTR_SSP_TABLE",
    },
    Section {
        width: Width::Natural,
        area: Area::Host,
        fields: "HOST_CR0 HOST_CR3 HOST_CR4 HOST_FS_BASE HOST_GS_BASE HOST_TR_BASE HOST_GDTR_BASE HOST_IDTR_BASE
            HOST_IA32_SYSENTER_ESP HOST_IA32_SYSENTER_EIP HOST_RSP HOST_RIP HOST_S_CET HOST_SSP HOST_INTR_SSP_TABLE",
    },
];

fn sdm() -> BTreeMap<&'static str, (u32, Width, Area)> {
    let mut all = BTreeMap::new();
    for section in SDM {
        let width = match section.width {
            Width::W16 => 0x0000,
            Width::W64 => 0x2000,
            Width::W32 => 0x4000,
            Width::Natural => 0x6000,
        };
        let area = match section.area {
            Area::Control => 0x000,
            Area::ExitInfo => 0x400,
            Area::Guest => 0x800,
            Area::Host => 0xC00,
        };
        for (index, name) in (0..).zip(section.fields.split_whitespace()) {
            if name != "-" {
                all.insert(name, (width + area + 2 * index, section.width, section.area));
            }
        }
    }
    all
}

#[test]
fn table_has_the_encodings_of_the_sdm_and_no_others() {
    let expected: BTreeMap<_, _> = sdm().into_iter().map(|(name, (encoding, ..))| (name, encoding)).collect();
    let actual: BTreeMap<_, _> = Field::ALL.iter().map(|f| (f.name(), f.encoding())).collect();
    assert_eq!(expected, actual);
}

#[test]
fn well_known_encodings() {
    // Pins the construction above to numbers that any hypervisor's header has.
    for (field, encoding) in [
        (Field::GUEST_RIP, 0x681E),
        (Field::HOST_RSP, 0x6C14),
        (Field::EPT_POINTER, 0x201A),
        (Field::TSC_MULTIPLIER, 0x2032),
        (Field::GUEST_IA32_PKRS, 0x2818),
        (Field::VMX_PREEMPTION_TIMER_VALUE, 0x482E),
        (Field::VM_EXIT_REASON, 0x4402),
        (Field::EXIT_QUALIFICATION, 0x6400),
        (Field::HOST_INTR_SSP_TABLE, 0x6C1C),
    ] {
        assert_eq!(field.encoding(), encoding, "{field}");
    }
}

#[test]
fn width_and_area_follow_the_section() {
    let sdm = sdm();
    for &field in Field::ALL {
        let (_, width, area) = sdm[field.name()];
        assert_eq!((field.width(), field.area()), (width, area), "{field}");
        assert_eq!(field.is_read_only(), area == Area::ExitInfo, "{field}");
    }
}

#[test]
fn index_is_dense_and_in_order() {
    for (i, field) in Field::ALL.iter().enumerate() {
        assert_eq!(field.index(), i);
    }
    assert_eq!(Field::ALL.len(), Field::COUNT);
    assert_eq!(Field::ALL.iter().collect::<HashSet<_>>().len(), Field::COUNT);
}

#[test]
fn every_encoding_decodes_to_its_field_or_to_nothing() {
    let by_encoding: BTreeMap<u32, &str> = sdm().into_iter().map(|(name, (encoding, ..))| (encoding, name)).collect();
    for encoding in (0..=0x1_FFFFu32).chain([u32::MAX, 0x8000_681E, 0xFFFF_681E]) {
        let expected = if encoding & 1 == 0 {
            by_encoding.get(&encoding).map(|name| (*name, false))
        } else {
            // The "high" access type exists for 64-bit fields only.
            by_encoding.get(&(encoding - 1)).filter(|_| encoding & 0x6000 == 0x2000).map(|name| (*name, true))
        };
        let actual = Field::decode(encoding).map(|(field, high)| (field.name(), high));
        assert_eq!(actual, expected, "{encoding:#x}");
    }
}

#[test]
fn mask_is_as_wide_as_the_field() {
    for &field in Field::ALL {
        let bits = match field.encoding() >> 13 & 3 {
            0 => 16,
            2 => 32,
            _ => 64,
        };
        assert_eq!(field.mask().count_ones(), bits, "{field}");
        assert_eq!(field.mask().trailing_ones(), bits, "{field}");
    }
}
