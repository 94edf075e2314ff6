//! MOV to CR0, LMSW, CLTS and MOV to CR4 of L2, where they touch a bit that nvmx owns: pure decisions.
//!
//! nvmx owns CR4.VMXE always, CR4.FRED (not offered: it stays 0), CR0.NE always (VMX needs it; L2 sees its own value), and
//! CR0.PE and CR0.PG while L2 is in VMX
//! operation. Source: SDM vol. 3A, "Control Registers", vol. 3C, "Restrictions on VMX Operation".

use crate::x86::{Cr0, Cr4, Fault, efer};

/// The state that the rules depend on.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// CR0 as L2 sees it.
    pub cr0: u64,
    /// CR4 as L2 sees it.
    pub cr4: u64,
    /// CR3
    pub cr3: u64,
    /// IA32_EFER
    pub efer: u64,
    /// CS.L
    pub cs_long: bool,
    /// The TSS in TR is one of 16 bits.
    pub tss_16: bool,
    /// L2 is in VMX operation.
    pub vmx_operation: bool,
}

/// What else a new value of CR0 or CR4 brings about.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Effects {
    /// IA32_EFER.LMA changes to this.
    pub long_mode: Option<bool>,
    /// PDPTEs must be loaded from CR3.
    pub load_pdptes: bool,
    /// The TLB must forget translations.
    pub flush: bool,
}

/// MOV to CR0 of `new`: the faults and the effects, in 64-bit or protected mode with CPL 0.
pub fn write_cr0(mode: Mode, new: u64) -> Result<Effects, Fault> {
    let (old, new) = (Cr0::from_bits_retain(mode.cr0), Cr0::from_bits_retain(new));
    let cr4 = Cr4::from_bits_retain(mode.cr4);
    let gp = Err(Fault::GeneralProtection(0));
    if new.bits() >> 32 != 0
        || new.contains(Cr0::PG) && !new.contains(Cr0::PE)
        || new.contains(Cr0::NW) && !new.contains(Cr0::CD)
    {
        return gp;
    }
    // IA32_VMX_CR0_FIXED0 as L2 sees it: no unrestricted root operation.
    if mode.vmx_operation && !new.contains(Cr0::PE | Cr0::PG | Cr0::NE) {
        return gp;
    }
    // Shadow stacks rely on write protection.
    if cr4.contains(Cr4::CET) && !new.contains(Cr0::WP) {
        return gp;
    }
    let mut effects = Effects { flush: (old ^ new).intersects(Cr0::PG | Cr0::WP), ..Effects::default() };
    let starts = new.contains(Cr0::PG) && !old.contains(Cr0::PG);
    let stops = old.contains(Cr0::PG) && !new.contains(Cr0::PG);
    let long = mode.efer & efer::LME != 0;
    if starts && long {
        if !cr4.contains(Cr4::PAE) || mode.cs_long || mode.tss_16 {
            return gp;
        }
        effects.long_mode = Some(true);
    }
    if stops {
        if long && mode.cs_long || cr4.contains(Cr4::PCIDE) {
            return gp;
        }
        if long {
            effects.long_mode = Some(false);
        }
    }
    let pae = new.contains(Cr0::PG) && cr4.contains(Cr4::PAE) && !long;
    effects.load_pdptes = pae && (old ^ new).intersects(Cr0::PG | Cr0::CD | Cr0::NW);
    Ok(effects)
}

/// MOV to CR4 of `new`, where `allowed` are the bits this processor knows (IA32_VMX_CR4_FIXED1).
pub fn write_cr4(mode: Mode, new: u64, allowed: u64) -> Result<Effects, Fault> {
    let (old, new) = (Cr4::from_bits_retain(mode.cr4), Cr4::from_bits_retain(new));
    let gp = Err(Fault::GeneralProtection(0));
    let paging = mode.cr0 & Cr0::PG.bits() != 0;
    let long_mode = paging && mode.efer & efer::LME != 0;
    if new.bits() & !allowed != 0 || mode.vmx_operation && !new.contains(Cr4::VMXE) {
        return gp;
    }
    if long_mode && (!new.contains(Cr4::PAE) || (old ^ new).contains(Cr4::LA57)) {
        return gp;
    }
    // With PCIDs the low bits of CR3 are one, so they must be 0 when that begins.
    let pcids_start = new.contains(Cr4::PCIDE) && !old.contains(Cr4::PCIDE);
    if new.contains(Cr4::PCIDE) && !long_mode || pcids_start && mode.cr3 & 0xFFF != 0 {
        return gp;
    }
    if new.contains(Cr4::CET) && mode.cr0 & Cr0::WP.bits() == 0 {
        return gp;
    }
    let translation = Cr4::PSE | Cr4::PAE | Cr4::PGE | Cr4::SMEP | Cr4::SMAP | Cr4::PCIDE | Cr4::PKE;
    Ok(Effects {
        long_mode: None,
        load_pdptes: paging
            && !long_mode
            && new.contains(Cr4::PAE)
            && (old ^ new).intersects(Cr4::PSE | Cr4::PAE | Cr4::PGE | Cr4::SMEP),
        flush: (old ^ new).intersects(translation),
    })
}

/// The value LMSW makes of CR0: it sets PE, MP, EM, TS from the source and never clears PE.
pub fn lmsw(cr0: u64, source: u16) -> u64 {
    (cr0 & !0xE) | (source as u64 & 0xF)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROTECTED: Mode =
        Mode { cr0: 0x11, cr4: 0, cr3: 0, efer: 0, cs_long: false, tss_16: false, vmx_operation: false };
    const LONG: Mode =
        Mode { cr0: 0x8000_0031, cr4: 0x20, cr3: 0x1000, efer: 0x500, cs_long: true, vmx_operation: true, ..PROTECTED };

    #[test]
    fn paging_without_protection_faults() {
        assert_eq!(write_cr0(PROTECTED, 0x8000_0010), Err(Fault::GeneralProtection(0)));
    }

    #[test]
    fn paging_with_lme_starts_long_mode_and_needs_pae() {
        let mode = Mode { efer: 0x100, ..PROTECTED };
        assert_eq!(write_cr0(mode, 0x8000_0031), Err(Fault::GeneralProtection(0)));
        let effects = write_cr0(Mode { cr4: 0x20, ..mode }, 0x8000_0031).unwrap();
        assert_eq!(effects.long_mode, Some(true));
        assert!(!effects.load_pdptes && effects.flush);
    }

    #[test]
    fn paging_with_pae_loads_pdptes() {
        assert!(write_cr0(Mode { cr4: 0x20, ..PROTECTED }, 0x8000_0031).unwrap().load_pdptes);
    }

    #[test]
    fn in_vmx_operation_the_fixed_bits_stay() {
        for cleared in [0x8000_0030, 0x8000_0011, 0x31] {
            assert_eq!(write_cr0(LONG, cleared), Err(Fault::GeneralProtection(0)), "{cleared:#x}");
        }
        assert_eq!(write_cr4(Mode { cr4: 0x2020, ..LONG }, 0x20, 0x3767FF), Err(Fault::GeneralProtection(0)));
        assert!(write_cr0(LONG, 0x8005_0033).is_ok());
    }

    #[test]
    fn unknown_bits_of_cr4_fault() {
        assert_eq!(write_cr4(PROTECTED, 1 << 30, 0x3767FF), Err(Fault::GeneralProtection(0)));
    }

    #[test]
    fn pae_cannot_be_cleared_in_long_mode() {
        let mode = Mode { vmx_operation: false, ..LONG };
        assert_eq!(write_cr4(mode, 0, 0x3767FF), Err(Fault::GeneralProtection(0)));
    }

    /// CR4 bits of a processor that has all that is named here.
    const ALLOWED: u64 = 0x00FF_FFFF;
    const PAGED_32: Mode = Mode { cr0: 0x8001_0011, ..PROTECTED };
    const GP: Result<Effects, Fault> = Err(Fault::GeneralProtection(0));

    #[test]
    fn upper_bits_and_nw_without_cd_fault() {
        for bit in 32..64 {
            assert_eq!(write_cr0(PROTECTED, 0x11 | 1 << bit), GP, "bit {bit}");
        }
        assert_eq!(write_cr0(PROTECTED, 0x11 | 1 << 29), GP);
        assert!(write_cr0(PROTECTED, 0x11 | 3 << 29).is_ok());
    }

    #[test]
    fn long_mode_ends_only_outside_64_bit_code_and_without_pcids() {
        let mode = Mode { vmx_operation: false, ..LONG };
        assert_eq!(write_cr0(mode, 0x31), GP);
        let compatibility = Mode { cs_long: false, ..mode };
        assert_eq!(write_cr0(compatibility, 0x31).unwrap().long_mode, Some(false));
        assert_eq!(write_cr0(Mode { cr4: 0x2_0020, ..compatibility }, 0x31), GP);
    }

    #[test]
    fn long_mode_does_not_start_in_64_bit_code() {
        let mode = Mode { cr4: 0x20, efer: 0x100, cs_long: true, ..PROTECTED };
        assert_eq!(write_cr0(mode, 0x8000_0031), GP);
    }

    #[test]
    fn long_mode_does_not_start_with_a_16_bit_tss() {
        let mode = Mode { cr4: 0x20, efer: 0x100, tss_16: true, ..PROTECTED };
        assert_eq!(write_cr0(mode, 0x8000_0031), GP);
        assert!(write_cr0(Mode { efer: 0, ..mode }, 0x8000_0031).is_ok(), "PAE paging does");
    }

    #[test]
    fn the_depth_of_paging_is_frozen_in_long_mode() {
        let mode = Mode { vmx_operation: false, ..LONG };
        assert_eq!(write_cr4(mode, 0x1020, ALLOWED), GP);
        assert!(write_cr4(Mode { cr4: 0x1020, ..mode }, 0x1020, ALLOWED).is_ok());
        assert!(write_cr4(PROTECTED, 0x1020, ALLOWED).is_ok());
    }

    #[test]
    fn pcids_start_in_long_mode_with_pcid_0() {
        let mode = Mode { vmx_operation: false, ..LONG };
        assert!(write_cr4(mode, 0x2_0020, ALLOWED).unwrap().flush);
        assert_eq!(write_cr4(Mode { cr3: 0x1001, ..mode }, 0x2_0020, ALLOWED), GP);
        assert_eq!(write_cr4(PAGED_32, 0x2_0020, ALLOWED), GP);
        let on = Mode { cr3: 0x1001, cr4: 0x2_0020, ..mode };
        assert!(write_cr4(on, 0x2_00A0, ALLOWED).is_ok(), "they may stay on");
    }

    #[test]
    fn shadow_stacks_need_write_protection() {
        let cet = Mode { cr4: 1 << 23, ..PROTECTED };
        assert_eq!(write_cr0(Mode { cr0: 0x1_0011, ..cet }, 0x11), GP);
        assert!(write_cr0(Mode { cr0: 0x1_0011, ..cet }, 0x1_0019).is_ok());
        assert_eq!(write_cr4(PROTECTED, 1 << 23, ALLOWED), GP);
        assert!(write_cr4(Mode { cr0: 0x1_0011, ..PROTECTED }, 1 << 23, ALLOWED).is_ok());
    }

    #[test]
    fn changes_that_load_pdptes_do_so_with_pae_paging_alone() {
        // CR0: PG, CD, NW. CR4: PSE, PAE, PGE, SMEP.
        for bit in [4, 5, 7, 20] {
            let on = Mode { cr4: 0x20 ^ 1 << bit, ..PAGED_32 };
            assert!(write_cr4(on, 0x20, ALLOWED).unwrap().load_pdptes, "CR4 bit {bit}");
            assert!(!write_cr4(Mode { cr0: 0x11, ..on }, 0x20, ALLOWED).unwrap().load_pdptes, "without paging");
        }
        assert!(!write_cr4(Mode { cr4: 0x20, ..PAGED_32 }, 0x24, ALLOWED).unwrap().load_pdptes, "CR4.TSD");
        let pae = Mode { cr4: 0x20, ..PAGED_32 };
        assert!(write_cr0(pae, 0xC001_0011).unwrap().load_pdptes, "CD");
        let uncached = Mode { cr0: 0xE001_0011, ..pae };
        assert!(write_cr0(uncached, 0xC001_0011).unwrap().load_pdptes, "NW");
        assert!(!write_cr0(uncached, 0xE001_0019).unwrap().load_pdptes, "TS");
        assert!(!write_cr0(pae, 0x8001_0019).unwrap().load_pdptes, "TS");
        assert!(!write_cr0(PAGED_32, 0xC001_0011).unwrap().load_pdptes, "32-bit paging");
        let long = Mode { cs_long: false, vmx_operation: false, ..LONG };
        assert!(!write_cr0(long, 0xC000_0031).unwrap().load_pdptes, "long mode");
    }

    #[test]
    fn changes_of_translation_flush_and_others_do_not() {
        for bit in 0..24 {
            let old = Mode { cr0: 0x1_0011, ..PROTECTED };
            let translation = [4, 5, 7, 20, 21, 22].contains(&bit);
            let effects = write_cr4(old, 1 << bit, ALLOWED);
            assert_eq!(
                effects.map(|e| e.flush),
                if bit == 17 { GP.map(|e| e.flush) } else { Ok(translation) },
                "{bit}"
            );
        }
        assert!(write_cr0(PAGED_32, 0x8000_0011).unwrap().flush, "WP");
        assert!(!write_cr0(PAGED_32, 0x8001_0019).unwrap().flush, "TS");
    }

    #[test]
    fn lmsw_sets_but_never_clears_pe() {
        assert_eq!(lmsw(0x8000_0011, 0), 0x8000_0011);
        assert_eq!(lmsw(0x10, 0xFFFF), 0x1F);
        assert_eq!(lmsw(0x1E, 1), 0x11);
    }
}
