//! Host state, a second time.

use super::{Violations, bit, canonical, fixed, get, none_of, pat};
use nvmx::vmx::{Capabilities, Field::*, Fields};

/// Names of all rules on the host-state area that `v` violates, entered in IA-32e mode or not.
pub fn violations(v: &impl Fields, caps: &Capabilities, long_mode: bool) -> Violations {
    let exit = get(v, VM_EXIT_CONTROLS);
    let guest_64 = bit(get(v, VM_ENTRY_CONTROLS), 9);
    let host_64 = bit(exit, 9);
    let msr = |index| caps.msr(index).unwrap();
    let mut broken = Violations::new();
    let mut demand = |name, holds: bool| {
        if !holds {
            broken.insert(name);
        }
    };

    let (cr0, cr4) = (get(v, HOST_CR0), get(v, HOST_CR4));
    demand("HostCr0", fixed(cr0, msr(0x486), msr(0x487), &[]));
    demand("HostCr4", fixed(cr4, msr(0x488), msr(0x489), &[]));
    if bit(cr4, 23) {
        demand("HostCetNeedsWp", bit(cr0, 16));
    }
    demand("HostCr3", none_of(get(v, HOST_CR3), (caps.physical_width..64).filter(|i| !bit(caps.cr3_flags, *i))));
    let canonical = |field| canonical(get(v, field), caps.linear_width);
    demand("HostSysenter", canonical(HOST_IA32_SYSENTER_ESP) && canonical(HOST_IA32_SYSENTER_EIP));
    if bit(exit, 19) {
        demand("HostPat", pat(get(v, HOST_IA32_PAT)));
    }
    if bit(exit, 21) {
        let efer = get(v, HOST_IA32_EFER);
        demand("HostEferReserved", none_of(efer, (1..8).chain([9]).chain(12..64)));
        demand("HostEferMode", bit(efer, 8) == host_64 && bit(efer, 10) == host_64);
    }

    // An address that the host's mode can use.
    let linear = |field| if host_64 { canonical(field) } else { get(v, field) < 1 << 32 };
    if bit(exit, 28) {
        demand("HostSCet", super::s_cet(get(v, HOST_S_CET)) && linear(HOST_S_CET));
        demand("HostSsp", get(v, HOST_SSP) % 4 == 0 && linear(HOST_SSP));
        demand("HostSspTable", canonical(HOST_INTR_SSP_TABLE));
    }
    if bit(exit, 29) {
        demand("HostPkrs", none_of(get(v, HOST_IA32_PKRS), 32..64));
    }

    if bit(exit, 12) {
        let free = (0..64).filter(|i| !bit(caps.counters, *i));
        demand("HostPerfGlobalCtrl", none_of(get(v, HOST_IA32_PERF_GLOBAL_CTRL), free));
    }

    let selectors = [
        HOST_ES_SELECTOR,
        HOST_CS_SELECTOR,
        HOST_SS_SELECTOR,
        HOST_DS_SELECTOR,
        HOST_FS_SELECTOR,
        HOST_GS_SELECTOR,
        HOST_TR_SELECTOR,
    ];
    demand("HostSelectorRplTi", selectors.into_iter().all(|field| get(v, field) % 8 == 0));
    demand("HostCsNotNull", get(v, HOST_CS_SELECTOR) > 0);
    demand("HostTrNotNull", get(v, HOST_TR_SELECTOR) > 0);
    if !host_64 {
        demand("HostSsNotNull", get(v, HOST_SS_SELECTOR) > 0);
    }
    let bases = [HOST_FS_BASE, HOST_GS_BASE, HOST_TR_BASE, HOST_GDTR_BASE, HOST_IDTR_BASE];
    demand("HostBaseCanonical", bases.into_iter().all(canonical));

    match (long_mode, host_64) {
        (true, true) => {}
        (false, false) => demand("HostAddressSpaceFitsMode", !guest_64),
        _ => demand("HostAddressSpaceFitsMode", false),
    }
    if host_64 {
        demand("Host64BitPae", bit(cr4, 5));
        demand("HostRip", canonical(HOST_RIP));
    } else {
        demand("Host32BitGuest", !guest_64);
        demand("Host32BitPcide", !bit(cr4, 17));
        demand("HostRip", get(v, HOST_RIP) < 1 << 32);
    }
    broken
}
