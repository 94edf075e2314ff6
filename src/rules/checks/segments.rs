//! Rules on the guest's segment and descriptor-table registers.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Checks on Guest Segment Registers" and "Checks on Guest Descriptor-Table
//! Registers"; access rights: table "Format of Access Rights".

use crate::rules::checks::CheckId;
use crate::rules::checks::guest::{RFLAGS_VM, is_ia32e};
use crate::rules::checks::view::{CR0_PE, View, implies};
use crate::vmx::segment::{AccessRights, Segment};
use crate::vmx::{Field, Fields};
use crate::x86::selector;

/// The first rule that does not hold.
pub(super) fn first_failure(v: &View<impl Fields>) -> Option<CheckId> {
    let common = super::first_failure! { v;
        GuestTrSelector => tr_selector;
        GuestLdtrSelector => ldtr_selector;
        GuestSsRpl => ss_rpl;
        GuestBaseCanonical => base_canonical;
        GuestBase32Bit => base_32_bit;
    };
    let rights = || {
        if is_v86(v) {
            super::first_failure! { v;
                GuestV86Base => v86_base;
                GuestV86Limit => v86_limit;
                GuestV86Rights => v86_rights;
            }
        } else {
            super::first_failure! { v;
                GuestCsType => cs_type;
                GuestSsType => ss_type;
                GuestDataType => data_type;
                GuestSegmentS => segment_s;
                GuestCsDpl => cs_dpl;
                GuestSsDpl => ss_dpl;
                GuestDataDpl => data_dpl;
                GuestSegmentPresent => segment_present;
                GuestSegmentReserved => segment_reserved;
                GuestCsDb => cs_db;
                GuestSegmentGranularity => segment_granularity;
            }
        }
    };
    let system = || {
        super::first_failure! { v;
            GuestTrType => tr_type;
            GuestTrRights => tr_rights;
            GuestLdtrRights => ldtr_rights;
            GuestTableBase => table_base;
            GuestTableLimit => table_limit;
        }
    };
    common.or_else(rights).or_else(system)
}

/// ES, CS, SS, DS, FS, GS
const CODE_AND_DATA: [Segment; 6] = [Segment::Es, Segment::Cs, Segment::Ss, Segment::Ds, Segment::Fs, Segment::Gs];
/// ES, DS, FS, GS
const DATA: [Segment; 4] = [Segment::Es, Segment::Ds, Segment::Fs, Segment::Gs];

fn is_v86(v: &View<impl Fields>) -> bool {
    v.get(Field::GUEST_RFLAGS) & RFLAGS_VM != 0
}

fn rights(v: &View<impl Fields>, segment: Segment) -> AccessRights {
    AccessRights(v.get32(segment.rights()))
}

fn rpl(v: &View<impl Fields>, segment: Segment) -> u8 {
    selector::rpl(v.get(segment.selector()) as u16)
}

/// CS counts as usable whatever its unusable bit says.
fn counts(v: &View<impl Fields>, segment: Segment) -> bool {
    segment == Segment::Cs || !rights(v, segment).is_unusable()
}

/// True if the rule holds for CS and each usable SS, DS, ES, FS, GS.
fn all_that_count<F: Fields>(v: &View<F>, rule: impl Fn(Segment) -> bool) -> bool {
    CODE_AND_DATA.iter().all(|&segment| !counts(v, segment) || rule(segment))
}

/// G is 0 if bits 11:0 of the limit are not all 1, and 1 if one of bits 31:20 is.
fn granularity_fits(v: &View<impl Fields>, segment: Segment) -> bool {
    let (limit, granular) = (v.get32(segment.limit()), rights(v, segment).granularity());
    implies(limit & 0xFFF != 0xFFF, !granular) && implies(limit >> 20 != 0, granular)
}

// Selectors and bases

fn tr_selector(v: &View<impl Fields>) -> bool {
    !selector::is_local(v.get(Field::GUEST_TR_SELECTOR) as u16)
}

fn ldtr_selector(v: &View<impl Fields>) -> bool {
    implies(!rights(v, Segment::Ldtr).is_unusable(), !selector::is_local(v.get(Field::GUEST_LDTR_SELECTOR) as u16))
}

fn ss_rpl(v: &View<impl Fields>) -> bool {
    implies(!is_v86(v) && !v.unrestricted(), rpl(v, Segment::Ss) == rpl(v, Segment::Cs))
}

fn base_canonical(v: &View<impl Fields>) -> bool {
    let always = [Segment::Tr, Segment::Fs, Segment::Gs].iter().all(|segment| v.canonical(segment.base()));
    always && implies(!rights(v, Segment::Ldtr).is_unusable(), v.canonical(Field::GUEST_LDTR_BASE))
}

fn base_32_bit(v: &View<impl Fields>) -> bool {
    let segments = [Segment::Cs, Segment::Ss, Segment::Ds, Segment::Es];
    segments.iter().all(|&segment| !counts(v, segment) || v.get(segment.base()) >> 32 == 0)
}

// Virtual-8086 mode

fn v86_base(v: &View<impl Fields>) -> bool {
    CODE_AND_DATA.iter().all(|segment| v.get(segment.base()) == v.get(segment.selector()) << 4)
}

fn v86_limit(v: &View<impl Fields>) -> bool {
    CODE_AND_DATA.iter().all(|segment| v.get(segment.limit()) == 0xFFFF)
}

fn v86_rights(v: &View<impl Fields>) -> bool {
    CODE_AND_DATA.iter().all(|segment| v.get(segment.rights()) == 0xF3)
}

// Access rights outside of virtual-8086 mode

fn cs_type(v: &View<impl Fields>) -> bool {
    match rights(v, Segment::Cs).kind() {
        9 | 11 | 13 | 15 => true,
        3 => v.unrestricted(),
        _ => false,
    }
}

fn ss_type(v: &View<impl Fields>) -> bool {
    implies(counts(v, Segment::Ss), matches!(rights(v, Segment::Ss).kind(), 3 | 7))
}

fn data_type(v: &View<impl Fields>) -> bool {
    DATA.iter().all(|&segment| {
        let rights = rights(v, segment);
        rights.is_unusable() || rights.is_accessed() && implies(rights.is_code(), rights.is_readable_code())
    })
}

fn segment_s(v: &View<impl Fields>) -> bool {
    all_that_count(v, |segment| rights(v, segment).is_code_or_data())
}

fn cs_dpl(v: &View<impl Fields>) -> bool {
    let (cs, ss) = (rights(v, Segment::Cs), rights(v, Segment::Ss));
    match cs.kind() {
        3 => cs.dpl() == 0,
        9 | 11 => cs.dpl() == ss.dpl(),
        13 | 15 => cs.dpl() <= ss.dpl(),
        _ => false,
    }
}

fn ss_dpl(v: &View<impl Fields>) -> bool {
    let ss = rights(v, Segment::Ss);
    let must_be_0 = rights(v, Segment::Cs).kind() == 3 || v.get(Field::GUEST_CR0) & CR0_PE == 0;
    implies(!v.unrestricted(), ss.dpl() == rpl(v, Segment::Ss)) && implies(must_be_0, ss.dpl() == 0)
}

fn data_dpl(v: &View<impl Fields>) -> bool {
    let holds = |segment| {
        let rights = rights(v, segment);
        rights.is_unusable() || rights.kind() > 11 || rights.dpl() >= rpl(v, segment)
    };
    v.unrestricted() || DATA.iter().all(|&segment| holds(segment))
}

fn segment_present(v: &View<impl Fields>) -> bool {
    all_that_count(v, |segment| rights(v, segment).is_present())
}

fn segment_reserved(v: &View<impl Fields>) -> bool {
    all_that_count(v, |segment| rights(v, segment).reserved() == 0)
}

fn cs_db(v: &View<impl Fields>) -> bool {
    let cs = rights(v, Segment::Cs);
    implies(is_ia32e(v) && cs.is_64_bit_code(), !cs.is_32_bit())
}

fn segment_granularity(v: &View<impl Fields>) -> bool {
    all_that_count(v, |segment| granularity_fits(v, segment))
}

// System segments and descriptor tables

fn tr_type(v: &View<impl Fields>) -> bool {
    match rights(v, Segment::Tr).kind() {
        11 => true,
        3 => !is_ia32e(v),
        _ => false,
    }
}

fn is_system_segment(v: &View<impl Fields>, segment: Segment) -> bool {
    let rights = rights(v, segment);
    !rights.is_code_or_data() && rights.is_present() && rights.reserved() == 0 && granularity_fits(v, segment)
}

fn tr_rights(v: &View<impl Fields>) -> bool {
    !rights(v, Segment::Tr).is_unusable() && is_system_segment(v, Segment::Tr)
}

fn ldtr_rights(v: &View<impl Fields>) -> bool {
    let rights = rights(v, Segment::Ldtr);
    rights.is_unusable() || rights.kind() == 2 && is_system_segment(v, Segment::Ldtr)
}

fn table_base(v: &View<impl Fields>) -> bool {
    v.canonical(Field::GUEST_GDTR_BASE) && v.canonical(Field::GUEST_IDTR_BASE)
}

fn table_limit(v: &View<impl Fields>) -> bool {
    v.get(Field::GUEST_GDTR_LIMIT) >> 16 == 0 && v.get(Field::GUEST_IDTR_LIMIT) >> 16 == 0
}
