//! Rules on the host-state area.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Checks on Host Control Registers, MSRs, and SSP", "Checks on Host Segment and
//! Descriptor-Table Registers", "Checks Related to Address-Space Size" of the chapter "VM Entries".

use crate::rules::checks::view::{CR0_WP, CR4_CET, CR4_PAE, CR4_PCIDE, View, implies, is_s_cet};
use crate::rules::checks::{Failure, first_failure};
use crate::vmx::controls::{EntryControls, ExitControls};
use crate::vmx::{Capabilities, Field, Fields, VmxError};
use crate::x86::msr::is_pat;
use crate::x86::{efer, selector};

/// Checks all rules on the host-state area; `long_mode` is L2's IA32_EFER.LMA at the time of the entry.
///
/// Every field it reads is in nvmx's copy of vmcs12.
pub fn check_host(fields: &impl Fields, caps: &Capabilities, long_mode: bool) -> Result<(), Failure> {
    let v = &View { fields, caps };
    let address_space_fits_mode = |v: &View<_>| address_space_fits_mode(v, long_mode);
    let failed = first_failure! { v;
        HostAddressSpaceFitsMode => address_space_fits_mode;
        HostCr0 => cr0;
        HostCr4 => cr4;
        HostCetNeedsWp => cet_needs_wp;
        HostCr3 => cr3;
        HostSysenter => sysenter;
        HostPat => pat;
        HostEferReserved => efer_reserved;
        HostEferMode => efer_mode;
        HostSCet => s_cet;
        HostSsp => ssp;
        HostSspTable => ssp_table;
        HostPkrs => pkrs;
        HostPerfGlobalCtrl => perf_global_ctrl;
        HostSelectorRplTi => selector_rpl_ti;
        HostCsNotNull => cs_not_null;
        HostTrNotNull => tr_not_null;
        HostSsNotNull => ss_not_null;
        HostBaseCanonical => base_canonical;
        Host32BitGuest => guest_of_32_bit_host;
        Host32BitPcide => pcide_of_32_bit_host;
        Host64BitPae => pae_of_64_bit_host;
        HostRip => rip;
    };
    match failed {
        None => Ok(()),
        Some(check) => Err(Failure { check, error: VmxError::EntryInvalidHostStateField }),
    }
}

/// True if the only rule on this field is one on its value alone, and `value` keeps it: then a write of it calls for no
/// further check. For the fields that hypervisors write most.
pub fn host_field_holds(field: Field, value: u64, caps: &Capabilities) -> bool {
    match field {
        Field::HOST_RSP => true,
        Field::HOST_CR3 => caps.is_cr3(value),
        Field::HOST_FS_BASE | Field::HOST_GS_BASE | Field::HOST_TR_BASE => caps.is_canonical(value),
        _ => false,
    }
}

fn is_64_bit(v: &View<impl Fields>) -> bool {
    v.exit().contains(ExitControls::HOST_ADDRESS_SPACE_SIZE)
}

// Control registers and MSRs

fn cr0(v: &View<impl Fields>) -> bool {
    v.caps.cr0_ok(v.get(Field::HOST_CR0))
}

fn cr4(v: &View<impl Fields>) -> bool {
    v.caps.cr4_ok(v.get(Field::HOST_CR4))
}

fn cet_needs_wp(v: &View<impl Fields>) -> bool {
    implies(v.get(Field::HOST_CR4) & CR4_CET != 0, v.get(Field::HOST_CR0) & CR0_WP != 0)
}

fn cr3(v: &View<impl Fields>) -> bool {
    v.is_cr3(Field::HOST_CR3)
}

fn sysenter(v: &View<impl Fields>) -> bool {
    v.canonical(Field::HOST_IA32_SYSENTER_ESP) && v.canonical(Field::HOST_IA32_SYSENTER_EIP)
}

fn pat(v: &View<impl Fields>) -> bool {
    implies(v.exit().contains(ExitControls::LOAD_PAT), is_pat(v.get(Field::HOST_IA32_PAT)))
}

fn efer_reserved(v: &View<impl Fields>) -> bool {
    implies(v.exit().contains(ExitControls::LOAD_EFER), v.get(Field::HOST_IA32_EFER) & !efer::DEFINED == 0)
}

fn efer_mode(v: &View<impl Fields>) -> bool {
    let efer = v.get(Field::HOST_IA32_EFER);
    let agrees = |bit| (efer & bit != 0) == is_64_bit(v);
    implies(v.exit().contains(ExitControls::LOAD_EFER), agrees(efer::LMA) && agrees(efer::LME))
}

fn loads_cet(v: &View<impl Fields>) -> bool {
    v.exit().contains(ExitControls::LOAD_CET)
}

fn s_cet(v: &View<impl Fields>) -> bool {
    implies(loads_cet(v), is_s_cet(v.get(Field::HOST_S_CET)) && v.is_linear(Field::HOST_S_CET, is_64_bit(v)))
}

fn ssp(v: &View<impl Fields>) -> bool {
    implies(loads_cet(v), v.get(Field::HOST_SSP) & 3 == 0 && v.is_linear(Field::HOST_SSP, is_64_bit(v)))
}

fn ssp_table(v: &View<impl Fields>) -> bool {
    implies(loads_cet(v), v.canonical(Field::HOST_INTR_SSP_TABLE))
}

fn pkrs(v: &View<impl Fields>) -> bool {
    implies(v.exit().contains(ExitControls::LOAD_PKRS), v.get(Field::HOST_IA32_PKRS) >> 32 == 0)
}

fn perf_global_ctrl(v: &View<impl Fields>) -> bool {
    let loads = v.exit().contains(ExitControls::LOAD_PERF_GLOBAL_CTRL);
    implies(loads, v.get(Field::HOST_IA32_PERF_GLOBAL_CTRL) & !v.caps.counters == 0)
}

// Segment and descriptor-table registers

fn selector_rpl_ti(v: &View<impl Fields>) -> bool {
    use Field::*;
    let selectors = [
        HOST_CS_SELECTOR,
        HOST_SS_SELECTOR,
        HOST_DS_SELECTOR,
        HOST_ES_SELECTOR,
        HOST_FS_SELECTOR,
        HOST_GS_SELECTOR,
        HOST_TR_SELECTOR,
    ];
    selectors.map(|field| v.get(field) as u16).iter().all(|&s| selector::rpl(s) == 0 && !selector::is_local(s))
}

fn cs_not_null(v: &View<impl Fields>) -> bool {
    v.get(Field::HOST_CS_SELECTOR) != 0
}

fn tr_not_null(v: &View<impl Fields>) -> bool {
    v.get(Field::HOST_TR_SELECTOR) != 0
}

fn ss_not_null(v: &View<impl Fields>) -> bool {
    implies(!is_64_bit(v), v.get(Field::HOST_SS_SELECTOR) != 0)
}

fn base_canonical(v: &View<impl Fields>) -> bool {
    use Field::*;
    let bases = [HOST_FS_BASE, HOST_GS_BASE, HOST_GDTR_BASE, HOST_IDTR_BASE, HOST_TR_BASE];
    bases.iter().all(|&field| v.canonical(field))
}

// Address-space size

fn address_space_fits_mode(v: &View<impl Fields>, long_mode: bool) -> bool {
    if long_mode { is_64_bit(v) } else { !is_64_bit(v) && !v.entry().contains(EntryControls::IA32E_MODE_GUEST) }
}

fn guest_of_32_bit_host(v: &View<impl Fields>) -> bool {
    implies(!is_64_bit(v), !v.entry().contains(EntryControls::IA32E_MODE_GUEST))
}

fn pcide_of_32_bit_host(v: &View<impl Fields>) -> bool {
    implies(!is_64_bit(v), v.get(Field::HOST_CR4) & CR4_PCIDE == 0)
}

fn pae_of_64_bit_host(v: &View<impl Fields>) -> bool {
    implies(is_64_bit(v), v.get(Field::HOST_CR4) & CR4_PAE != 0)
}

fn rip(v: &View<impl Fields>) -> bool {
    v.is_linear(Field::HOST_RIP, is_64_bit(v))
}
