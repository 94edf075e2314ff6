//! What becomes of each access of a guest to an MSR: one table for RDMSR and WRMSR, the MSR bitmaps and the MSR areas.
//!
//! L2 owns the processor, so an MSR passes unless it could reach nvmx: by an address that the processor follows without
//! ept01 or under nvmx's page tables, by acting while nvmx runs, or because nvmx shows L2 another processor. A value that
//! nvmx does not know the meaning of could do any of these: an MSR that is not in the table can be read and not written.
//! Where a feature is refused, CPUID does not show it (`rules::hidden`).
//!
//! Pure, and without dependencies: the guest `vmxtest` holds the machine to the same table. docs/msrs.md shows it.
//! Source: SDM vol. 4, "Model-Specific Registers (MSRs)", tables "IA-32 Architectural MSRs" and those of the processors.

/// What becomes of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The processor makes it.
    Passes,
    /// As `Passes`: VM entries and exits give each level its own. `rules::switched` says whose writes exit.
    Switched,
    /// nvmx makes it, or answers it from what it keeps for L2.
    Answered,
    /// #GP(0), as on a processor without the MSR or the right to write it.
    Refused,
}

/// MSRs with the same verdicts for the same reason.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Index of the first.
    pub first: u32,
    /// Index of the last.
    pub last: u32,
    /// Their names in the SDM.
    pub name: &'static str,
    /// For reads.
    pub read: Verdict,
    /// For writes.
    pub write: Verdict,
    /// The reason.
    pub why: &'static str,
}

/// The MSRs that an MSR bitmap can let through.
pub const IN_REACH: [core::ops::RangeInclusive<u32>; 2] = [0..=0x1FFF, 0xC000_0000..=0xC000_1FFF];

/// What is not in the table, within the reach of a bitmap.
pub const UNLISTED: Row = Row {
    first: 0,
    last: 0x1FFF,
    name: "any other",
    read: Verdict::Passes,
    write: Verdict::Refused,
    why: "a value of unknown meaning may be an address, or act while nvmx runs; what the processor holds is nothing of nvmx's",
};

/// What no bitmap can let through.
pub const BEYOND: Row = Row {
    first: 0x2000,
    last: u32::MAX,
    name: "beyond the bitmaps",
    read: Verdict::Refused,
    write: Verdict::Refused,
    why: "no processor has MSRs there; the hypervisor below may, and would write to memory for them",
};

/// The row of an MSR.
pub fn row(index: u32) -> &'static Row {
    let at = TABLE.partition_point(|row| row.last < index);
    match TABLE.get(at) {
        Some(row) if row.first <= index => row,
        _ if IN_REACH.iter().any(|range| range.contains(&index)) => &UNLISTED,
        _ => &BEYOND,
    }
}

use Verdict::{Answered as A, Passes as P, Refused as R, Switched as S};

macro_rules! table {
    ($( $first:literal $(- $last:literal)?, $name:literal, $read:ident $write:ident, $why:expr; )*) => {
        /// All rows, ascending.
        pub const TABLE: &[Row] = &[ $( Row {
            first: $first, last: table!(@last $first $($last)?), name: $name, read: $read, write: $write, why: $why,
        }, )* ];
    };
    (@last $first:literal) => { $first };
    (@last $first:literal $last:literal) => { $last };
}

const PLAIN: &str = "no address, and nothing that acts on nvmx";
const FIXED: &str = "read-only";
const POWER: &str = "speed and power of the machine, which are L2's";
const UNUSED: &str = "nvmx uses nothing that it governs";
const COUNT: &str = "counters run on while nvmx runs: L2 counts nvmx's work as its own, and gets the interrupt itself";
const PEBS: &str = "the processor would write records to a linear address of L2's under nvmx's page tables; CPUID and IA32_MISC_ENABLE show none";
const PT: &str = "the processor would write the trace to a physical address without regard to ept01, of nvmx's branches too; CPUID shows none";
const LBR: &str = "no VM exit switches it off without a control that nvmx does not use: L2 would read nvmx's branches; CPUID shows none";
const SGX: &str = "SGX is hidden in CPUID";
const TME: &str =
    "keys for memory: CPUID shows none, and a physical address that names a key is beyond L2's address width";
const HFI: &str = "the processor would write a table to a physical address without regard to ept01; CPUID shows none";
const MTRR: &str = "L2 has its own: under ept01 they have no effect on L2's accesses, but those of the processor decide the type of nvmx's";
const BANKS: &str = "machine checks are L2's; an address in a bank is only a report";
const SHADOW_STACK: &str = "without effect while CR4.CET is 0, as it is in nvmx";
const STALE_LBR: &str = "nvmx's branches are in none: a VM exit clears IA32_DEBUGCTL";
const SCAN: &str = "the processor would load test patterns from an address of L2's";
const EACH_ITS_OWN: &str = "VM entries and exits switch it";

table! {
    0x0000 - 0x0001, "IA32_P5_MC_ADDR, IA32_P5_MC_TYPE", P P, BANKS;
    0x0006, "IA32_MONITOR_FILTER_SIZE", P P, UNUSED;
    0x0010, "IA32_TIME_STAMP_COUNTER", P P, "the TSC is the machine's; nvmx only counts with it";
    0x0011 - 0x0012, "MSR_KVM_WALL_CLOCK, MSR_KVM_SYSTEM_TIME", R R, "KVM below would write its clock to an address of L2's choice";
    0x0017, "IA32_PLATFORM_ID", P R, FIXED;
    0x001B, "IA32_APIC_BASE", P A, "the page of the registers hides memory: not over nvmx's, else the processor decides";
    0x001C, "IA32_USER_MSR_CTL", R R, "URDMSR and UWRMSR need a control that nvmx does not set; CPUID shows none";
    0x002F, "IA32_BARRIER", P P, PLAIN;
    0x0033, "MSR_TEST_CTRL", R R, "locked accesses of nvmx to L2's memory would fault; IA32_CORE_CAPABILITIES is hidden";
    0x0034 - 0x0035, "MSR_SMI_COUNT, MSR_CORE_THREAD_COUNT", P R, FIXED;
    0x003A, "IA32_FEATURE_CONTROL", A A, "shows VMX outside SMX, locked, and local machine checks as firmware chose";
    0x003B, "IA32_TSC_ADJUST", P P, "the TSC is the machine's; nvmx only counts with it";
    0x0048, "IA32_SPEC_CTRL", P P, "holds in nvmx too, which is slower then and never wrong";
    0x0049, "IA32_PRED_CMD", P P, PLAIN;
    0x004E - 0x004F, "MSR_PPIN_CTL, MSR_PPIN", P P, PLAIN;
    0x0079, "IA32_BIOS_UPDT_TRIG", P A, "the address would be read under nvmx's page tables; nothing is loaded, as in VMX non-root operation";
    0x007B - 0x007C, "IA32_MCU_ENUMERATION, IA32_MCU_STATUS", P R, FIXED;
    0x0087, "IA32_MKTME_KEYID_PARTITIONING", R R, TME;
    0x008B, "IA32_BIOS_SIGN_ID", P P, PLAIN;
    0x008C - 0x008F, "IA32_SGXLEPUBKEYHASHn", R R, SGX;
    0x009B, "IA32_SMM_MONITOR_CTL", R R, "dual-monitor treatment is not offered (IA32_VMX_BASIC bit 49)";
    0x009E, "IA32_SMBASE", P R, "read-only, and in SMM alone";
    0x00BC, "IA32_MISC_PACKAGE_CTLS", P P, POWER;
    0x00BD, "IA32_XAPIC_DISABLE_STATUS", P R, FIXED;
    0x00C1 - 0x00C8, "IA32_PMCn", P P, COUNT;
    0x00CE, "MSR_PLATFORM_INFO", P R, FIXED;
    0x00CF, "IA32_CORE_CAPABILITIES", R R, "CPUID shows none: it announces MSR_TEST_CTRL and in-field scan";
    0x00E1, "IA32_UMWAIT_CONTROL", P P, UNUSED;
    0x00E2, "MSR_PKG_CST_CONFIG_CONTROL", P P, POWER;
    0x00E4, "MSR_PMG_IO_CAPTURE_BASE", P P, "I/O ports that MWAIT stands for; they are L2's";
    0x00E7 - 0x00E8, "IA32_MPERF, IA32_APERF", P P, PLAIN;
    0x00FE, "IA32_MTRRCAP", P R, FIXED;
    0x010A, "IA32_ARCH_CAPABILITIES", P R, FIXED;
    0x010B, "IA32_FLUSH_CMD", P P, PLAIN;
    0x010F, "MSR_TSX_FORCE_ABORT", P P, UNUSED;
    0x0122, "IA32_TSX_CTRL", P P, UNUSED;
    0x0123, "IA32_MCU_OPT_CTRL", P P, PLAIN;
    0x0140, "MSR_MISC_FEATURES_ENABLES", P P, "a CPUID that faults does so outside of ring 0, and before it exits";
    0x0174 - 0x0176, "IA32_SYSENTER_CS, _ESP, _EIP", S S, EACH_ITS_OWN;
    0x0179, "IA32_MCG_CAP", P R, FIXED;
    0x017A - 0x017B, "IA32_MCG_STATUS, IA32_MCG_CTL", P P, BANKS;
    0x0186 - 0x018D, "IA32_PERFEVTSELn", P P, COUNT;
    0x0195, "IA32_OVERCLOCKING_STATUS", P R, FIXED;
    0x0198, "IA32_PERF_STATUS", P R, FIXED;
    0x0199 - 0x019C, "IA32_PERF_CTL, IA32_CLOCK_MODULATION, IA32_THERM_INTERRUPT, IA32_THERM_STATUS", P P, POWER;
    0x01A0, "IA32_MISC_ENABLE", A A, "execute-disable stays on, which nvmx's page tables use; shows no BTS and no PEBS";
    0x01A2, "MSR_TEMPERATURE_TARGET", P P, POWER;
    0x01A4, "MSR_MISC_FEATURE_CONTROL", P P, "prefetchers";
    0x01A6 - 0x01A7, "MSR_OFFCORE_RSPn", P P, COUNT;
    0x01AA, "MSR_MISC_PWR_MGMT", P P, POWER;
    0x01AD - 0x01AE, "MSR_TURBO_RATIO_LIMIT", P P, POWER;
    0x01B0 - 0x01B2, "IA32_ENERGY_PERF_BIAS, IA32_PACKAGE_THERM_STATUS, _INTERRUPT", P P, POWER;
    0x01C4 - 0x01C5, "IA32_XFD, IA32_XFD_ERR", P P, "nvmx uses no extended state";
    0x01C8 - 0x01C9, "MSR_LBR_SELECT, MSR_LASTBRANCH_TOS", P P, STALE_LBR;
    0x01CC - 0x01D4, "IA32_FRED_RSPn, _STKLVLS, _SSPn, _CONFIG", R R, "no control of nvmx's switches them; CPUID shows no FRED, and CR4.FRED stays 0";
    0x01D9, "IA32_DEBUGCTL", S S, "VM entries and exits switch it, and it is 0 in nvmx";
    0x01DB - 0x01DE, "MSR_LASTBRANCHFROMIP to MSR_LER_TO_LIP", P P, STALE_LBR;
    0x01F2 - 0x01F5, "IA32_SMRR_PHYSBASE, _PHYSMASK, MSR_PRMRR_PHYS_BASE, _MASK", P R, "ranges of SMM and SGX, which are firmware's";
    0x01F8 - 0x01FA, "IA32_PLATFORM_DCA_CAP, IA32_CPU_DCA_CAP, IA32_DCA_0_CAP", P P, PLAIN;
    0x01FC, "MSR_POWER_CTL", P P, POWER;
    0x0200 - 0x023F, "IA32_MTRR_PHYSBASEn, _PHYSMASKn", A A, MTRR;
    0x0250, "IA32_MTRR_FIX64K_00000", A A, MTRR;
    0x0258 - 0x0259, "IA32_MTRR_FIX16K_n", A A, MTRR;
    0x0268 - 0x026F, "IA32_MTRR_FIX4K_n", A A, MTRR;
    0x0277, "IA32_PAT", S S, EACH_ITS_OWN;
    0x0280 - 0x029F, "IA32_MCn_CTL2", P P, BANKS;
    0x02C2 - 0x02D9, "MSR_COPY_SCAN_HASHES to MSR_ARRAY_BIST", R R, SCAN;
    0x02FF, "IA32_MTRR_DEF_TYPE", A A, MTRR;
    0x0300 - 0x0301, "MSR_SGXOWNEREPOCHn", R R, SGX;
    0x0309 - 0x0318, "IA32_FIXED_CTRn", P P, COUNT;
    0x0329, "IA32_PERF_METRICS", P P, COUNT;
    0x0345, "IA32_PERF_CAPABILITIES", A R, "shows no PEBS";
    0x038D - 0x0392, "IA32_FIXED_CTR_CTRL, IA32_PERF_GLOBAL_STATUS, _CTRL, _STATUS_RESET, _STATUS_SET, _INUSE", P P, COUNT;
    0x03F1 - 0x03F5, "IA32_PEBS_ENABLE, MSR_PEBS_DATA_CFG, IA32_PEBS_BASE, IA32_PEBS_INDEX", R R, PEBS;
    0x03F6 - 0x03F7, "MSR_PEBS_LD_LAT, MSR_PEBS_FRONTEND", P P, COUNT;
    0x03F8 - 0x03FE, "MSR_PKG_C3_RESIDENCY to MSR_CORE_C7_RESIDENCY", P P, POWER;
    0x0400 - 0x047F, "IA32_MCn_CTL, _STATUS, _ADDR, _MISC", P P, BANKS;
    0x0480 - 0x0493, "IA32_VMX_BASIC to IA32_VMX_EXIT_CTLS2", A R, "the VMX that nvmx offers";
    0x04C1 - 0x04C8, "IA32_A_PMCn", P P, COUNT;
    0x04D0, "IA32_MCG_EXT_CTL", P P, BANKS;
    0x0500, "IA32_SGX_SVN_STATUS", R R, SGX;
    0x0560 - 0x0561, "IA32_RTIT_OUTPUT_BASE, _OUTPUT_MASK_PTRS", R R, PT;
    0x0570 - 0x0572, "IA32_RTIT_CTL, _STATUS, _CR3_MATCH", R R, PT;
    0x0580 - 0x0587, "IA32_RTIT_ADDRn_A, _B", R R, PT;
    0x0600, "IA32_DS_AREA", R R, PEBS;
    0x0606 - 0x0658, "MSR_RAPL_POWER_UNIT and the power limits", P P, POWER;
    0x0680 - 0x069F, "MSR_LASTBRANCH_n_FROM_IP", P P, STALE_LBR;
    0x06A0 - 0x06A8, "IA32_U_CET, IA32_S_CET, IA32_PLn_SSP, IA32_INTERRUPT_SSP_TABLE_ADDR", P P, SHADOW_STACK;
    0x06C0 - 0x06DF, "MSR_LASTBRANCH_n_TO_IP", P P, STALE_LBR;
    0x06E0, "IA32_TSC_DEADLINE", P P, "the timer and its interrupt are L2's";
    0x06E1, "IA32_PKRS", P P, "without effect while CR4.PKS is 0, as it is in nvmx";
    0x0770 - 0x0777, "IA32_PM_ENABLE, IA32_HWP_*", P P, POWER;
    0x0800 - 0x08FF, "the registers of the local APIC in x2APIC mode", P P, "the APIC is L2's; INIT and SIPI are exits where they arrive";
    0x0981 - 0x0984, "IA32_TME_CAPABILITY, _ACTIVATE, _EXCLUDE_MASK, _EXCLUDE_BASE", R R, TME;
    0x0985 - 0x098A, "IA32_UINTR_RR, _HANDLER, _STACKADJUST, _MISC, _PD, _TT", P P, "linear addresses of ring 3; without effect while CR4.UINTR is 0, as it is in nvmx";
    0x0990 - 0x0991, "IA32_COPY_STATUS, IA32_IWKEYBACKUP_STATUS", P R, FIXED;
    0x0C80, "IA32_DEBUG_INTERFACE", P R, "a debugger would see all memory; that is firmware's decision";
    0x0C81 - 0x0D8F, "IA32_L3_QOS_CFG to the last mask of cache and memory bandwidth", P P, "speed of the caches, which are L2's";
    0x0D90, "IA32_BNDCFGS", R R, "nvmx's branches would reset L2's bound registers; CPUID shows no MPX";
    0x0D91 - 0x0D92, "IA32_COPY_LOCAL_TO_PLATFORM, IA32_COPY_PLATFORM_TO_LOCAL", P P, PLAIN;
    0x0D93, "IA32_PASID", P P, "devices are L2's";
    0x0DA0, "IA32_XSS", P A, "without the states of Intel PT and of last branches: XRSTORS would load what WRMSR may not";
    0x0DB0 - 0x0DB2, "IA32_PKG_HDC_CTL, IA32_PM_CTL1, IA32_THREAD_STALL", P P, POWER;
    0x0DC0 - 0x0DDF, "MSR_LBR_INFO_n", P P, STALE_LBR;
    0x1200 - 0x121F, "IA32_LBR_n_INFO", R R, LBR;
    0x1400 - 0x1401, "IA32_SEAMRR_PHYS_BASE, _MASK", R R, "the range of TDX, which is firmware's";
    0x14CE - 0x14CF, "IA32_LBR_CTL, IA32_LBR_DEPTH", R R, LBR;
    0x1500 - 0x151F, "IA32_LBR_n_FROM_IP", R R, LBR;
    0x1600 - 0x161F, "IA32_LBR_n_TO_IP", R R, LBR;
    0x17D0 - 0x17D4, "IA32_HW_FEEDBACK_PTR, _CONFIG, IA32_THREAD_FEEDBACK_CHAR, IA32_HW_FEEDBACK_THREAD_CONFIG", R R, HFI;
    0x17DA, "IA32_HRESET_ENABLE", P P, PLAIN;
    0x1900 - 0x19FF, "IA32_PMC_GPn_*, IA32_PMC_FXn_*", R R, "some of them switch PEBS on; CPUID shows version 5 of performance monitoring at most";
    0x1B01, "IA32_UARCH_MISC_CTL", P P, PLAIN;
    0xC000_0080, "IA32_EFER", S S, EACH_ITS_OWN;
    0xC000_0081 - 0xC000_0084, "IA32_STAR, IA32_LSTAR, IA32_CSTAR, IA32_FMASK", P P, UNUSED;
    0xC000_0100 - 0xC000_0101, "IA32_FS_BASE, IA32_GS_BASE", S S, EACH_ITS_OWN;
    0xC000_0102 - 0xC000_0103, "IA32_KERNEL_GS_BASE, IA32_TSC_AUX", P P, UNUSED;
}
