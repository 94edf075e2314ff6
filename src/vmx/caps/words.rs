//! The capability MSRs one by one.

use crate::vmx::controls::Controls;
use core::marker::PhantomData;

/// Which settings of a control field are allowed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allowed<C> {
    ones: u32,
    may: u32,
    controls: PhantomData<C>,
}

impl<C: Controls> Allowed<C> {
    /// From the value of a capability MSR: bits 31:0 must be 1, bits 63:32 may be 1.
    pub const fn from_msr(value: u64) -> Self {
        Self { ones: value as u32, may: (value >> 32) as u32, controls: PhantomData }
    }

    /// The value of the capability MSR.
    pub const fn to_msr(self) -> u64 {
        (self.may as u64) << 32 | self.ones as u64
    }

    /// Bits that must be 1.
    pub const fn must_be_one(self) -> u32 {
        self.ones
    }

    /// Bits that may be 1.
    pub const fn may_be_one(self) -> u32 {
        self.may
    }

    /// The known controls whose 1-setting is allowed.
    pub fn settable(self) -> C {
        C::from_bits_truncate(self.may)
    }

    /// True if the 1-setting of every one of `controls` is allowed.
    pub fn allows(self, controls: C) -> bool {
        controls.bits() & !self.may == 0
    }

    /// True if a VM entry accepts the value in this control field.
    pub const fn accepts(self, value: u32) -> bool {
        value & self.ones == self.ones && value & !self.may == 0
    }

    /// `value` with all bits set that must be.
    pub fn with_required(self, value: C) -> C {
        C::from_bits_retain(value.bits() | self.ones)
    }
}

macro_rules! bits {
    ($(#[$doc:meta])* $name:ident { $( $(#[$bit_doc:meta])* $method:ident = $bit:literal; )* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(transparent)]
        pub struct $name(pub u64);
        impl $name {
            $( $(#[$bit_doc])* pub const fn $method(self) -> bool { self.0 >> $bit & 1 != 0 } )*
        }
    };
}

bits! {
    /// IA32_VMX_BASIC.
    Basic {
        /// Physical addresses of VMX structures are limited to 32 bits.
        addresses_limited_to_32_bits = 48;
        /// The instruction-information field is valid for INS and OUTS.
        reports_ins_outs_information = 54;
        /// The TRUE capability MSRs exist.
        has_true_controls = 55;
        /// A hardware exception may be injected with or without an error code.
        any_error_code_delivery = 56;
    }
}

impl Basic {
    /// VMCS revision identifier, bits 30:0.
    pub const fn revision(self) -> u32 {
        self.0 as u32 & 0x7FFF_FFFF
    }
    /// Bytes to allocate for a VMXON region or a VMCS, bits 44:32.
    pub const fn region_size(self) -> u32 {
        (self.0 >> 32) as u32 & 0x1FFF
    }
    /// Memory type for accesses to a VMCS, bits 53:50 (6 = write-back).
    pub const fn memory_type(self) -> u8 {
        (self.0 >> 50) as u8 & 0xF
    }
}

bits! {
    /// IA32_VMX_MISC.
    Misc {
        /// VM exits store IA32_EFER.LMA into the "IA-32e mode guest" VM-entry control.
        stores_lma_on_exit = 5;
        /// Activity state HLT.
        activity_hlt = 6;
        /// Activity state shutdown.
        activity_shutdown = 7;
        /// Activity state wait-for-SIPI.
        activity_wait_for_sipi = 8;
        /// Intel PT can be used in VMX operation.
        pt_in_vmx = 14;
        /// IA32_SMBASE can be read in SMM.
        smbase_msr = 15;
        /// Bit 2 of IA32_SMM_MONITOR_CTL can be set.
        vmxoff_smi_unblocking = 28;
        /// VMWRITE can write VM-exit information fields.
        vmwrite_any_field = 29;
        /// A software interrupt or exception may be injected with instruction length 0.
        zero_length_injection = 30;
    }
}

impl Misc {
    /// The VMX-preemption timer counts when this bit of the TSC changes, bits 4:0.
    pub const fn preemption_timer_shift(self) -> u32 {
        self.0 as u32 & 0x1F
    }
    /// Number of CR3-target values, bits 24:16.
    pub const fn cr3_targets(self) -> u32 {
        (self.0 >> 16) as u32 & 0x1FF
    }
    /// Recommended maximum of entries in an MSR list, from bits 27:25.
    pub const fn max_msr_list(self) -> u32 {
        512 * (((self.0 >> 25) as u32 & 7) + 1)
    }
    /// True if the activity-state field may hold `state` (0 is always allowed).
    pub const fn supports_activity(self, state: u64) -> bool {
        match state {
            0 => true,
            1 => self.activity_hlt(),
            2 => self.activity_shutdown(),
            3 => self.activity_wait_for_sipi(),
            _ => false,
        }
    }
}

bits! {
    /// IA32_VMX_EPT_VPID_CAP.
    EptVpid {
        /// Execute-only translations.
        execute_only = 0;
        /// Page walk of 4 levels.
        walk_4 = 6;
        /// Page walk of 5 levels.
        walk_5 = 7;
        /// EPT structures may be uncacheable.
        memory_type_uc = 8;
        /// EPT structures may be write-back.
        memory_type_wb = 14;
        /// 2-MByte pages.
        pages_2m = 16;
        /// 1-GByte pages.
        pages_1g = 17;
        /// INVEPT exists.
        invept = 20;
        /// Accessed and dirty flags.
        accessed_dirty = 21;
        /// EPT violations report advanced information.
        advanced_exit_information = 22;
        /// Supervisor shadow-stack control.
        supervisor_shadow_stack = 23;
        /// INVEPT of a single context.
        invept_single = 25;
        /// INVEPT of all contexts.
        invept_all = 26;
        /// INVVPID exists.
        invvpid = 32;
        /// INVVPID of an individual address.
        invvpid_address = 40;
        /// INVVPID of a single context.
        invvpid_single = 41;
        /// INVVPID of all contexts.
        invvpid_all = 42;
        /// INVVPID of a single context, global translations retained.
        invvpid_single_retaining_globals = 43;
    }
}
