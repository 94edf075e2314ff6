//! The field table: the one source for names, encodings, storage, shadow bitmaps and test lists.
//!
//! Source: Intel SDM vol. 3D (December 2024), appendix "Field Encoding in VMCS", and vol. 3C table "Structure of VMCS
//! Component Encoding". A row whose width contradicts its encoding does not compile.

use core::fmt;

/// Width of a field, as bits 14:13 of the encoding say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Width {
    /// 16 bits
    W16,
    /// 64 bits, with a "high" access for its upper half
    W64,
    /// 32 bits
    W32,
    /// Natural width: 64 bits on processors with Intel 64
    Natural,
}

/// The area a field belongs to, as bits 11:10 of the encoding say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Area {
    /// VM-execution, VM-exit and VM-entry control fields
    Control,
    /// VM-exit information fields, read-only
    ExitInfo,
    /// Guest-state area
    Guest,
    /// Host-state area
    Host,
}

/// Where the value that L2 sees lives while vmcs12 is active: every field has exactly one home.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Home {
    /// In nvmx's copy of vmcs12; vmcs02 holds a merged or translated value, or none.
    Cache,
    /// In vmcs02 itself: L2's value is run as it is, and the processor checks it.
    Vmcs02,
    /// In vmcs02, and a write by L2 must be seen by nvmx first (open to VMREAD only under VMCS shadowing).
    Watched,
}

/// When a field exists on a processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Needs {
    /// On every processor with VMX
    Always,
    /// If the 1-setting of this primary processor-based control is allowed
    Primary(u32),
    /// If the 1-setting of this secondary processor-based control is allowed
    Secondary(u32),
    /// If the 1-setting of this tertiary processor-based control is allowed
    Tertiary(u32),
    /// If the 1-setting of this pin-based control is allowed
    Pin(u32),
    /// If the 1-setting of this VM-exit control, or this VM-entry control, is allowed
    ExitOrEntry(u32, u32),
    /// If VM functions include this bit of IA32_VMX_VMFUNC
    VmFunc(u32),
}

const fn width_of(encoding: u32) -> Width {
    match (encoding >> 13) & 3 {
        0 => Width::W16,
        1 => Width::W64,
        2 => Width::W32,
        _ => Width::Natural,
    }
}

macro_rules! fields {
    ($( $name:ident = $enc:literal, $width:ident, $home:ident, $needs:expr; )*) => {
        /// A field of the VMCS, named as in the SDM; the discriminant is its encoding (access type "full").
        #[allow(non_camel_case_types, missing_docs)]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Field { $( $name = $enc, )* }

        $( const _: () = {
            assert!(width_of($enc) as u8 == Width::$width as u8, concat!("width contradicts encoding: ", stringify!($name)));
            assert!($enc as u32 & 0xFFFF_9001 == 0, concat!("reserved bit or access type in encoding: ", stringify!($name)));
        }; )*

        impl Field {
            /// Every field of the table, in the order of the table.
            pub const ALL: &'static [Field] = &[ $( Field::$name, )* ];

            /// Position in [`Field::ALL`]: dense, for storage.
            #[inline(always)]
            pub const fn index(self) -> usize {
                INDEXES[key(self as u32)] as usize
            }

            /// SDM-style name.
            pub const fn name(self) -> &'static str {
                match self { $( Field::$name => stringify!($name), )* }
            }

            /// When the field exists.
            pub const fn needs(self) -> Needs {
                match self { $( Field::$name => $needs, )* }
            }
        }

        /// Where L2's values live, in the order of [`Field::ALL`].
        const HOMES: &[Home] = &[ $( Home::$home, )* ];
    };
}

/// What tells fields apart: width, area and index of the encoding.
const fn key(encoding: u32) -> usize {
    (encoding >> 5 & 0x300 | encoding >> 4 & 0xC0 | encoding >> 1 & 0x3F) as usize
}

/// Positions in [`Field::ALL`] by [`key`]: one load where the field is not a constant.
const INDEXES: [u8; 0x400] = {
    const NONE: u8 = u8::MAX;
    let mut indexes = [NONE; 0x400];
    let mut i = 0;
    while i < Field::COUNT {
        let key = key(Field::ALL[i] as u32);
        assert!(indexes[key] == NONE && i < NONE as usize, "two fields with one key");
        indexes[key] = i as u8;
        i += 1;
    }
    indexes
};

use Needs::{Always, ExitOrEntry, Pin, Primary, Secondary, Tertiary, VmFunc};

fields! {
    // name                               encoding  width   home      exists if
    VIRTUAL_PROCESSOR_ID                = 0x0000, W16,     Cache,    Secondary(5);
    POSTED_INTR_NOTIFICATION_VECTOR     = 0x0002, W16,     Vmcs02,   Pin(7);
    EPTP_INDEX                          = 0x0004, W16,     Cache,    Secondary(18);
    HLAT_PREFIX_SIZE                    = 0x0006, W16,     Cache,    Tertiary(1);
    LAST_PID_POINTER_INDEX              = 0x0008, W16,     Cache,    Tertiary(4);

    GUEST_ES_SELECTOR                   = 0x0800, W16,     Vmcs02,   Always;
    GUEST_CS_SELECTOR                   = 0x0802, W16,     Vmcs02,   Always;
    GUEST_SS_SELECTOR                   = 0x0804, W16,     Vmcs02,   Always;
    GUEST_DS_SELECTOR                   = 0x0806, W16,     Vmcs02,   Always;
    GUEST_FS_SELECTOR                   = 0x0808, W16,     Vmcs02,   Always;
    GUEST_GS_SELECTOR                   = 0x080A, W16,     Vmcs02,   Always;
    GUEST_LDTR_SELECTOR                 = 0x080C, W16,     Vmcs02,   Always;
    GUEST_TR_SELECTOR                   = 0x080E, W16,     Vmcs02,   Always;
    GUEST_INTERRUPT_STATUS              = 0x0810, W16,     Vmcs02,   Secondary(9);
    PML_INDEX                           = 0x0812, W16,     Vmcs02,   Secondary(17);
    GUEST_UINV                          = 0x0814, W16,     Vmcs02,   ExitOrEntry(1 << 27, 1 << 19);

    HOST_ES_SELECTOR                    = 0x0C00, W16,     Cache,    Always;
    HOST_CS_SELECTOR                    = 0x0C02, W16,     Cache,    Always;
    HOST_SS_SELECTOR                    = 0x0C04, W16,     Cache,    Always;
    HOST_DS_SELECTOR                    = 0x0C06, W16,     Cache,    Always;
    HOST_FS_SELECTOR                    = 0x0C08, W16,     Cache,    Always;
    HOST_GS_SELECTOR                    = 0x0C0A, W16,     Cache,    Always;
    HOST_TR_SELECTOR                    = 0x0C0C, W16,     Cache,    Always;

    IO_BITMAP_A                         = 0x2000, W64,     Cache,    Primary(25);
    IO_BITMAP_B                         = 0x2002, W64,     Cache,    Primary(25);
    MSR_BITMAP                          = 0x2004, W64,     Cache,    Primary(28);
    VM_EXIT_MSR_STORE_ADDR              = 0x2006, W64,     Cache,    Always;
    VM_EXIT_MSR_LOAD_ADDR               = 0x2008, W64,     Cache,    Always;
    VM_ENTRY_MSR_LOAD_ADDR              = 0x200A, W64,     Cache,    Always;
    EXECUTIVE_VMCS_POINTER              = 0x200C, W64,     Cache,    Always;
    PML_ADDRESS                         = 0x200E, W64,     Cache,    Secondary(17);
    TSC_OFFSET                          = 0x2010, W64,     Vmcs02,   Always;
    VIRTUAL_APIC_ADDRESS                = 0x2012, W64,     Cache,    Primary(21);
    APIC_ACCESS_ADDRESS                 = 0x2014, W64,     Cache,    Secondary(0);
    POSTED_INTR_DESC_ADDR               = 0x2016, W64,     Cache,    Pin(7);
    VM_FUNCTION_CONTROLS                = 0x2018, W64,     Cache,    Secondary(13);
    EPT_POINTER                         = 0x201A, W64,     Cache,    Secondary(1);
    EOI_EXIT_BITMAP0                    = 0x201C, W64,     Vmcs02,   Secondary(9);
    EOI_EXIT_BITMAP1                    = 0x201E, W64,     Vmcs02,   Secondary(9);
    EOI_EXIT_BITMAP2                    = 0x2020, W64,     Vmcs02,   Secondary(9);
    EOI_EXIT_BITMAP3                    = 0x2022, W64,     Vmcs02,   Secondary(9);
    EPTP_LIST_ADDRESS                   = 0x2024, W64,     Cache,    VmFunc(0);
    VMREAD_BITMAP                       = 0x2026, W64,     Cache,    Secondary(14);
    VMWRITE_BITMAP                      = 0x2028, W64,     Cache,    Secondary(14);
    VIRTUALIZATION_EXCEPTION_INFO       = 0x202A, W64,     Cache,    Secondary(18);
    XSS_EXITING_BITMAP                  = 0x202C, W64,     Cache,    Secondary(20);
    ENCLS_EXITING_BITMAP                = 0x202E, W64,     Cache,    Secondary(15);
    SUB_PAGE_PERMISSION_TABLE_POINTER   = 0x2030, W64,     Cache,    Secondary(23);
    TSC_MULTIPLIER                      = 0x2032, W64,     Vmcs02,   Secondary(25);
    TERTIARY_VM_EXEC_CONTROL            = 0x2034, W64,     Cache,    Primary(17);
    HLAT_POINTER                        = 0x2040, W64,     Cache,    Tertiary(1);
    PID_POINTER_TABLE                   = 0x2042, W64,     Cache,    Tertiary(4);
    SPEC_CTRL_MASK                      = 0x204A, W64,     Vmcs02,   Tertiary(7);
    SPEC_CTRL_SHADOW                    = 0x204C, W64,     Vmcs02,   Tertiary(7);

    GUEST_PHYSICAL_ADDRESS              = 0x2400, W64,     Vmcs02,   Secondary(1);

    VMCS_LINK_POINTER                   = 0x2800, W64,     Cache,    Always;
    GUEST_IA32_DEBUGCTL                 = 0x2802, W64,     Vmcs02,   Always;
    GUEST_IA32_PAT                      = 0x2804, W64,     Cache,    ExitOrEntry(1 << 18, 1 << 14);
    GUEST_IA32_EFER                     = 0x2806, W64,     Vmcs02,   ExitOrEntry(1 << 20, 1 << 15);
    GUEST_IA32_PERF_GLOBAL_CTRL         = 0x2808, W64,     Vmcs02,   ExitOrEntry(1 << 30, 1 << 13);
    GUEST_PDPTE0                        = 0x280A, W64,     Vmcs02,   Secondary(1);
    GUEST_PDPTE1                        = 0x280C, W64,     Vmcs02,   Secondary(1);
    GUEST_PDPTE2                        = 0x280E, W64,     Vmcs02,   Secondary(1);
    GUEST_PDPTE3                        = 0x2810, W64,     Vmcs02,   Secondary(1);
    GUEST_IA32_BNDCFGS                  = 0x2812, W64,     Cache,    ExitOrEntry(1 << 23, 1 << 16);
    GUEST_IA32_RTIT_CTL                 = 0x2814, W64,     Cache,    ExitOrEntry(1 << 25, 1 << 18);
    GUEST_IA32_PKRS                     = 0x2818, W64,     Vmcs02,   ExitOrEntry(0, 1 << 22);

    HOST_IA32_PAT                       = 0x2C00, W64,     Cache,    ExitOrEntry(1 << 19, 0);
    HOST_IA32_EFER                      = 0x2C02, W64,     Cache,    ExitOrEntry(1 << 21, 0);
    HOST_IA32_PERF_GLOBAL_CTRL          = 0x2C04, W64,     Cache,    ExitOrEntry(1 << 12, 0);
    HOST_IA32_PKRS                      = 0x2C06, W64,     Cache,    ExitOrEntry(1 << 29, 0);

    PIN_BASED_VM_EXEC_CONTROL           = 0x4000, W32,     Cache,    Always;
    CPU_BASED_VM_EXEC_CONTROL           = 0x4002, W32,     Cache,    Always;
    EXCEPTION_BITMAP                    = 0x4004, W32,     Vmcs02,   Always;
    PAGE_FAULT_ERROR_CODE_MASK          = 0x4006, W32,     Vmcs02,   Always;
    PAGE_FAULT_ERROR_CODE_MATCH         = 0x4008, W32,     Vmcs02,   Always;
    CR3_TARGET_COUNT                    = 0x400A, W32,     Watched,  Always;
    VM_EXIT_CONTROLS                    = 0x400C, W32,     Cache,    Always;
    VM_EXIT_MSR_STORE_COUNT             = 0x400E, W32,     Cache,    Always;
    VM_EXIT_MSR_LOAD_COUNT              = 0x4010, W32,     Cache,    Always;
    VM_ENTRY_CONTROLS                   = 0x4012, W32,     Cache,    Always;
    VM_ENTRY_MSR_LOAD_COUNT             = 0x4014, W32,     Cache,    Always;
    VM_ENTRY_INTR_INFO_FIELD            = 0x4016, W32,     Vmcs02,   Always;
    VM_ENTRY_EXCEPTION_ERROR_CODE       = 0x4018, W32,     Vmcs02,   Always;
    VM_ENTRY_INSTRUCTION_LEN            = 0x401A, W32,     Vmcs02,   Always;
    TPR_THRESHOLD                       = 0x401C, W32,     Vmcs02,   Primary(21);
    SECONDARY_VM_EXEC_CONTROL           = 0x401E, W32,     Cache,    Primary(31);
    PLE_GAP                             = 0x4020, W32,     Cache,    Secondary(10);
    PLE_WINDOW                          = 0x4022, W32,     Cache,    Secondary(10);

    VM_INSTRUCTION_ERROR                = 0x4400, W32,     Cache,    Always;
    VM_EXIT_REASON                      = 0x4402, W32,     Vmcs02,   Always;
    VM_EXIT_INTR_INFO                   = 0x4404, W32,     Vmcs02,   Always;
    VM_EXIT_INTR_ERROR_CODE             = 0x4406, W32,     Vmcs02,   Always;
    IDT_VECTORING_INFO_FIELD            = 0x4408, W32,     Vmcs02,   Always;
    IDT_VECTORING_ERROR_CODE            = 0x440A, W32,     Vmcs02,   Always;
    VM_EXIT_INSTRUCTION_LEN             = 0x440C, W32,     Vmcs02,   Always;
    VMX_INSTRUCTION_INFO                = 0x440E, W32,     Vmcs02,   Always;

    GUEST_ES_LIMIT                      = 0x4800, W32,     Vmcs02,   Always;
    GUEST_CS_LIMIT                      = 0x4802, W32,     Vmcs02,   Always;
    GUEST_SS_LIMIT                      = 0x4804, W32,     Vmcs02,   Always;
    GUEST_DS_LIMIT                      = 0x4806, W32,     Vmcs02,   Always;
    GUEST_FS_LIMIT                      = 0x4808, W32,     Vmcs02,   Always;
    GUEST_GS_LIMIT                      = 0x480A, W32,     Vmcs02,   Always;
    GUEST_LDTR_LIMIT                    = 0x480C, W32,     Vmcs02,   Always;
    GUEST_TR_LIMIT                      = 0x480E, W32,     Vmcs02,   Always;
    GUEST_GDTR_LIMIT                    = 0x4810, W32,     Vmcs02,   Always;
    GUEST_IDTR_LIMIT                    = 0x4812, W32,     Vmcs02,   Always;
    GUEST_ES_AR_BYTES                   = 0x4814, W32,     Vmcs02,   Always;
    GUEST_CS_AR_BYTES                   = 0x4816, W32,     Vmcs02,   Always;
    GUEST_SS_AR_BYTES                   = 0x4818, W32,     Vmcs02,   Always;
    GUEST_DS_AR_BYTES                   = 0x481A, W32,     Vmcs02,   Always;
    GUEST_FS_AR_BYTES                   = 0x481C, W32,     Vmcs02,   Always;
    GUEST_GS_AR_BYTES                   = 0x481E, W32,     Vmcs02,   Always;
    GUEST_LDTR_AR_BYTES                 = 0x4820, W32,     Vmcs02,   Always;
    GUEST_TR_AR_BYTES                   = 0x4822, W32,     Vmcs02,   Always;
    GUEST_INTERRUPTIBILITY_INFO         = 0x4824, W32,     Vmcs02,   Always;
    GUEST_ACTIVITY_STATE                = 0x4826, W32,     Watched,  Always;
    GUEST_SMBASE                        = 0x4828, W32,     Vmcs02,   Always;
    GUEST_SYSENTER_CS                   = 0x482A, W32,     Vmcs02,   Always;
    VMX_PREEMPTION_TIMER_VALUE          = 0x482E, W32,     Vmcs02,   Pin(6);

    HOST_IA32_SYSENTER_CS               = 0x4C00, W32,     Cache,    Always;

    CR0_GUEST_HOST_MASK                 = 0x6000, Natural, Vmcs02,   Always;
    CR4_GUEST_HOST_MASK                 = 0x6002, Natural, Vmcs02,   Always;
    CR0_READ_SHADOW                     = 0x6004, Natural, Vmcs02,   Always;
    CR4_READ_SHADOW                     = 0x6006, Natural, Vmcs02,   Always;
    CR3_TARGET_VALUE0                   = 0x6008, Natural, Vmcs02,   Always;
    CR3_TARGET_VALUE1                   = 0x600A, Natural, Vmcs02,   Always;
    CR3_TARGET_VALUE2                   = 0x600C, Natural, Vmcs02,   Always;
    CR3_TARGET_VALUE3                   = 0x600E, Natural, Vmcs02,   Always;

    EXIT_QUALIFICATION                  = 0x6400, Natural, Vmcs02,   Always;
    IO_RCX                              = 0x6402, Natural, Vmcs02,   Always;
    IO_RSI                              = 0x6404, Natural, Vmcs02,   Always;
    IO_RDI                              = 0x6406, Natural, Vmcs02,   Always;
    IO_RIP                              = 0x6408, Natural, Vmcs02,   Always;
    GUEST_LINEAR_ADDRESS                = 0x640A, Natural, Vmcs02,   Always;

    GUEST_CR0                           = 0x6800, Natural, Vmcs02,   Always;
    GUEST_CR3                           = 0x6802, Natural, Vmcs02,   Always;
    GUEST_CR4                           = 0x6804, Natural, Vmcs02,   Always;
    GUEST_ES_BASE                       = 0x6806, Natural, Vmcs02,   Always;
    GUEST_CS_BASE                       = 0x6808, Natural, Vmcs02,   Always;
    GUEST_SS_BASE                       = 0x680A, Natural, Vmcs02,   Always;
    GUEST_DS_BASE                       = 0x680C, Natural, Vmcs02,   Always;
    GUEST_FS_BASE                       = 0x680E, Natural, Vmcs02,   Always;
    GUEST_GS_BASE                       = 0x6810, Natural, Vmcs02,   Always;
    GUEST_LDTR_BASE                     = 0x6812, Natural, Vmcs02,   Always;
    GUEST_TR_BASE                       = 0x6814, Natural, Vmcs02,   Always;
    GUEST_GDTR_BASE                     = 0x6816, Natural, Vmcs02,   Always;
    GUEST_IDTR_BASE                     = 0x6818, Natural, Vmcs02,   Always;
    GUEST_DR7                           = 0x681A, Natural, Vmcs02,   Always;
    GUEST_RSP                           = 0x681C, Natural, Vmcs02,   Always;
    GUEST_RIP                           = 0x681E, Natural, Vmcs02,   Always;
    GUEST_RFLAGS                        = 0x6820, Natural, Vmcs02,   Always;
    GUEST_PENDING_DBG_EXCEPTIONS        = 0x6822, Natural, Vmcs02,   Always;
    GUEST_SYSENTER_ESP                  = 0x6824, Natural, Vmcs02,   Always;
    GUEST_SYSENTER_EIP                  = 0x6826, Natural, Vmcs02,   Always;
    GUEST_S_CET                         = 0x6828, Natural, Vmcs02,   ExitOrEntry(1 << 28, 1 << 20);
    GUEST_SSP                           = 0x682A, Natural, Vmcs02,   ExitOrEntry(1 << 28, 1 << 20);
    GUEST_INTR_SSP_TABLE                = 0x682C, Natural, Vmcs02,   ExitOrEntry(1 << 28, 1 << 20);

    HOST_CR0                            = 0x6C00, Natural, Cache,    Always;
    HOST_CR3                            = 0x6C02, Natural, Cache,    Always;
    HOST_CR4                            = 0x6C04, Natural, Cache,    Always;
    HOST_FS_BASE                        = 0x6C06, Natural, Cache,    Always;
    HOST_GS_BASE                        = 0x6C08, Natural, Cache,    Always;
    HOST_TR_BASE                        = 0x6C0A, Natural, Cache,    Always;
    HOST_GDTR_BASE                      = 0x6C0C, Natural, Cache,    Always;
    HOST_IDTR_BASE                      = 0x6C0E, Natural, Cache,    Always;
    HOST_IA32_SYSENTER_ESP              = 0x6C10, Natural, Cache,    Always;
    HOST_IA32_SYSENTER_EIP              = 0x6C12, Natural, Cache,    Always;
    HOST_RSP                            = 0x6C14, Natural, Cache,    Always;
    HOST_RIP                            = 0x6C16, Natural, Cache,    Always;
    HOST_S_CET                          = 0x6C18, Natural, Cache,    ExitOrEntry(1 << 28, 1 << 20);
    HOST_SSP                            = 0x6C1A, Natural, Cache,    ExitOrEntry(1 << 28, 1 << 20);
    HOST_INTR_SSP_TABLE                 = 0x6C1C, Natural, Cache,    ExitOrEntry(1 << 28, 1 << 20);
}

impl Field {
    /// Number of fields in the table.
    pub const COUNT: usize = Self::ALL.len();

    /// The encoding with access type "full".
    #[inline]
    pub const fn encoding(self) -> u32 {
        self as u32
    }

    /// The field with this encoding; the "high" access type of a 64-bit field is not accepted here.
    #[inline(always)]
    pub const fn from_encoding(encoding: u32) -> Option<Field> {
        let index = INDEXES[key(encoding)] as usize;
        if index < Self::COUNT && Self::ALL[index] as u32 == encoding { Some(Self::ALL[index]) } else { None }
    }

    /// Where L2's value lives.
    #[inline(always)]
    pub const fn home(self) -> Home {
        HOMES[self.index()]
    }

    /// Width.
    pub const fn width(self) -> Width {
        width_of(self as u32)
    }

    /// Area.
    pub const fn area(self) -> Area {
        match (self as u32 >> 10) & 3 {
            0 => Area::Control,
            1 => Area::ExitInfo,
            2 => Area::Guest,
            _ => Area::Host,
        }
    }

    /// The bits a field can hold.
    pub const fn mask(self) -> u64 {
        match self.width() {
            Width::W16 => 0xFFFF,
            Width::W32 => 0xFFFF_FFFF,
            Width::W64 | Width::Natural => u64::MAX,
        }
    }

    /// True for the fields of the host-state area.
    #[inline(always)]
    pub const fn is_host_state(self) -> bool {
        matches!(self.area(), Area::Host)
    }

    /// True for the VM-exit information fields.
    pub const fn is_read_only(self) -> bool {
        matches!(self.area(), Area::ExitInfo)
    }

    /// Splits an encoding as L2 gives it: the field and whether only its upper 32 bits are meant.
    #[inline(always)]
    pub const fn decode(encoding: u32) -> Option<(Field, bool)> {
        match Self::from_encoding(encoding & !1) {
            Some(f) if encoding & 1 == 0 => Some((f, false)),
            Some(f) if matches!(f.width(), Width::W64) => Some((f, true)),
            _ => None,
        }
    }
}

/// The PDPTEs of the guest-state area.
pub const PDPTES: [Field; 4] = [Field::GUEST_PDPTE0, Field::GUEST_PDPTE1, Field::GUEST_PDPTE2, Field::GUEST_PDPTE3];

impl fmt::Debug for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Something that holds the values of fields: vmcs12, or a map in a test.
pub trait Fields {
    /// The value of a field; 0 for a field that was never written.
    fn get(&self, field: Field) -> u64;

    /// Hears of a rule that these values break, by its number; whether the checks end there.
    #[inline(always)]
    fn ends_at(&self, rule: u16) -> bool {
        let _ = rule;
        true
    }
}

impl<F: Fn(Field) -> u64> Fields for F {
    fn get(&self, field: Field) -> u64 {
        self(field)
    }
}
