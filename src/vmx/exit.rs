//! Why the guest stopped: the basic exit reasons.
//!
//! Source: Intel SDM vol. 3D (December 2024), appendix "VMX Basic Exit Reasons", table "Basic Exit Reasons"; the other
//! bits of the field are in vol. 3C, table "Format of Exit Reason".

use core::fmt;

macro_rules! reasons {
    ($( $(#[$doc:meta])* $name:ident = $value:literal; )*) => {
        /// A basic exit reason: an open enumeration, so a number this table does not know is data and not an error.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(transparent)]
        pub struct BasicReason(pub u16);

        impl BasicReason {
            $( $(#[$doc])* pub const $name: BasicReason = BasicReason($value); )*

            /// Every reason with a name.
            pub const KNOWN: &'static [BasicReason] = &[ $( BasicReason::$name, )* ];

            /// The name, if the number is known.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 { $( $value => Some(stringify!($name)), )* _ => None }
            }
        }
    };
}

reasons! {
    /// Exception or non-maskable interrupt
    EXCEPTION_OR_NMI = 0;
    /// External interrupt
    EXTERNAL_INTERRUPT = 1;
    /// Triple fault
    TRIPLE_FAULT = 2;
    /// INIT signal
    INIT_SIGNAL = 3;
    /// Start-up IPI, in the wait-for-SIPI state only
    SIPI = 4;
    /// I/O system-management interrupt
    IO_SMI = 5;
    /// Other SMI
    OTHER_SMI = 6;
    /// Interrupt window
    INTERRUPT_WINDOW = 7;
    /// NMI window
    NMI_WINDOW = 8;
    /// Task switch
    TASK_SWITCH = 9;
    /// CPUID
    CPUID = 10;
    /// GETSEC
    GETSEC = 11;
    /// HLT
    HLT = 12;
    /// INVD
    INVD = 13;
    /// INVLPG
    INVLPG = 14;
    /// RDPMC
    RDPMC = 15;
    /// RDTSC
    RDTSC = 16;
    /// RSM in SMM
    RSM = 17;
    /// VMCALL
    VMCALL = 18;
    /// VMCLEAR
    VMCLEAR = 19;
    /// VMLAUNCH
    VMLAUNCH = 20;
    /// VMPTRLD
    VMPTRLD = 21;
    /// VMPTRST
    VMPTRST = 22;
    /// VMREAD
    VMREAD = 23;
    /// VMRESUME
    VMRESUME = 24;
    /// VMWRITE
    VMWRITE = 25;
    /// VMXOFF
    VMXOFF = 26;
    /// VMXON
    VMXON = 27;
    /// Control-register access
    CR_ACCESS = 28;
    /// MOV DR
    DR_ACCESS = 29;
    /// I/O instruction
    IO_INSTRUCTION = 30;
    /// RDMSR
    RDMSR = 31;
    /// WRMSR
    WRMSR = 32;
    /// VM-entry failure due to invalid guest state
    ENTRY_INVALID_GUEST_STATE = 33;
    /// VM-entry failure due to MSR loading
    ENTRY_MSR_LOADING = 34;
    /// MWAIT
    MWAIT = 36;
    /// Monitor trap flag
    MONITOR_TRAP_FLAG = 37;
    /// MONITOR
    MONITOR = 39;
    /// PAUSE, or PAUSE-loop exiting
    PAUSE = 40;
    /// VM-entry failure due to a machine-check event
    ENTRY_MACHINE_CHECK = 41;
    /// TPR below threshold
    TPR_BELOW_THRESHOLD = 43;
    /// APIC access
    APIC_ACCESS = 44;
    /// Virtualized EOI
    VIRTUALIZED_EOI = 45;
    /// Access to GDTR or IDTR
    GDTR_IDTR_ACCESS = 46;
    /// Access to LDTR or TR
    LDTR_TR_ACCESS = 47;
    /// EPT violation
    EPT_VIOLATION = 48;
    /// EPT misconfiguration
    EPT_MISCONFIGURATION = 49;
    /// INVEPT
    INVEPT = 50;
    /// RDTSCP
    RDTSCP = 51;
    /// VMX-preemption timer expired
    PREEMPTION_TIMER = 52;
    /// INVVPID
    INVVPID = 53;
    /// WBINVD or WBNOINVD
    WBINVD = 54;
    /// XSETBV
    XSETBV = 55;
    /// APIC write
    APIC_WRITE = 56;
    /// RDRAND
    RDRAND = 57;
    /// INVPCID
    INVPCID = 58;
    /// VMFUNC
    VMFUNC = 59;
    /// ENCLS
    ENCLS = 60;
    /// RDSEED
    RDSEED = 61;
    /// Page-modification log full
    PML_FULL = 62;
    /// XSAVES
    XSAVES = 63;
    /// XRSTORS
    XRSTORS = 64;
    /// PCONFIG
    PCONFIG = 65;
    /// SPP-related event
    SPP_EVENT = 66;
    /// UMWAIT
    UMWAIT = 67;
    /// TPAUSE
    TPAUSE = 68;
    /// LOADIWKEY
    LOADIWKEY = 69;
    /// ENCLV
    ENCLV = 70;
    /// ENQCMD with a PASID that is not translated
    ENQCMD_PASID = 72;
    /// ENQCMDS with a PASID that is not translated
    ENQCMDS_PASID = 73;
    /// Bus lock
    BUS_LOCK = 74;
    /// Instruction timeout
    INSTRUCTION_TIMEOUT = 75;
    /// SEAMCALL
    SEAMCALL = 76;
    /// TDCALL
    TDCALL = 77;
    /// RDMSRLIST
    RDMSRLIST = 78;
    /// WRMSRLIST
    WRMSRLIST = 79;
}

impl fmt::Display for BasicReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "REASON_{}", self.0),
        }
    }
}

impl fmt::Debug for BasicReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The whole exit-reason field.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct ExitReason(pub u32);

impl ExitReason {
    /// Bit 27: the exit happened in enclave mode.
    pub const ENCLAVE_MODE: u32 = 1 << 27;
    /// Bit 28: an MTF exit was pending.
    pub const PENDING_MTF: u32 = 1 << 28;
    /// Bit 29: the exit came from VMX root operation (SMM VM exit).
    pub const FROM_ROOT: u32 = 1 << 29;
    /// Bit 31: VM-entry failure.
    pub const ENTRY_FAILURE: u32 = 1 << 31;

    /// An ordinary exit with this basic reason.
    pub const fn exit(basic: BasicReason) -> Self {
        Self(basic.0 as u32)
    }

    /// A VM-entry failure with this basic reason.
    pub const fn entry_failure(basic: BasicReason) -> Self {
        Self(basic.0 as u32 | Self::ENTRY_FAILURE)
    }

    /// The basic reason, bits 15:0.
    #[inline]
    pub const fn basic(self) -> BasicReason {
        BasicReason(self.0 as u16)
    }

    /// True for a VM-entry failure.
    #[inline]
    pub const fn is_entry_failure(self) -> bool {
        self.0 & Self::ENTRY_FAILURE != 0
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.basic())?;
        if self.is_entry_failure() {
            f.write_str(" (entry failure)")?;
        }
        Ok(())
    }
}

impl fmt::Debug for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} [{:#x}]", self.0)
    }
}
