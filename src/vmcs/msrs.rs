//! MSRs as `rules::msr_policy` decides: what exits, what MSR areas may do, and what nvmx answers from what it keeps for L2.
//!
//! Source: SDM vol. 4, "Model-Specific Registers (MSRs)", vol. 3A, "Advanced Programmable Interrupt Controller (APIC)", and
//! vol. 3D, appendix "VMX Capability Reporting Facility".

use crate::hw::{apic, msr as hw};
use crate::mm::GuestMemory;
use crate::rules::msr_policy::{self as policy, Verdict};
use crate::rules::switched::{Exits, Item};
use crate::vmcs::mtrrs::OwnMtrrs;
use crate::vmx::Capabilities;
use crate::vmx::bitmap::{Access, MsrBitmap};
use crate::vmx::caps::msr::{FIRST, LAST};
use crate::x86::Fault;
use crate::x86::msr::{FEATURE_LOCK, FEATURE_VMX, IA32_FEATURE_CONTROL, IA32_PERF_CAPABILITIES};
use apic::IA32_APIC_BASE;

const IA32_BIOS_UPDT_TRIG: u32 = 0x79;
/// Machine checks may be delivered to one processor.
const FEATURE_LMCE: u64 = 1 << 20;

/// IA32_PERF_CAPABILITIES: traps, registers, format, baseline, output to Intel PT and timing of PEBS.
const PERF_PEBS: u64 = 1 << 6 | 1 << 7 | 0xF << 8 | 1 << 14 | 1 << 16 | 1 << 17;

/// Whose access it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum By {
    /// The guest hypervisor's
    Guest,
    /// Its guest's, where L2's bitmap lets the access pass
    Nested,
}

/// The verdict on an access.
pub fn verdict(index: u32, access: Access) -> Verdict {
    let row = policy::row(index);
    match access {
        Access::Read => row.read,
        Access::Write => row.write,
    }
}

/// True if nvmx must see the access.
pub fn exits(index: u32, access: Access, by: By) -> bool {
    match verdict(index, access) {
        Verdict::Passes => false,
        Verdict::Switched => access == Access::Write && switched_exits(index, by),
        Verdict::Answered | Verdict::Refused => true,
    }
}

fn switched_exits(index: u32, by: By) -> bool {
    Item::of_msr(index).is_some_and(|item| match item.row().exits {
        Exits::Never => false,
        Exits::ForGuest => by == By::Guest,
        Exits::ForBoth => true,
    })
}

/// True if nvmx answers or refuses the access: the processor never makes it by itself, nor does an MSR-store area.
pub fn is_own(index: u32, access: Access) -> bool {
    matches!(verdict(index, access), Verdict::Answered | Verdict::Refused)
}

/// A word of the MSR bitmap of vmcs01 on this processor. A hypervisor writes IA32_XSS with each entry and exit whose guest has another
/// value: where the processor itself refuses those that do harm, that does not exit.
pub fn bitmap01_word(word: usize, refuses_trace_states: bool) -> u64 {
    let open = |bit: &u16| refuses_trace_states && usize::from(bit / 64) == word;
    let xss = MsrBitmap::index(hw::IA32_XSS, Access::Write).filter(open).map_or(0, |bit| 1 << (bit % 64));
    bitmap_word(word, By::Guest) & !xss
}

/// A word of what nvmx must see: of the MSR bitmap of vmcs01, or of its part of that of vmcs02. A page of them would be much
/// for the stack.
pub fn bitmap_word(word: usize, by: By) -> u64 {
    const HALF: usize = MsrBitmap::WORDS / 2;
    let access = if word < HALF { Access::Read } else { Access::Write };
    let [low, high] = &policy::IN_REACH;
    let range = if word % HALF < HALF / 2 { low } else { high };
    let first = range.start() + (word % (HALF / 2)) as u32 * 64;
    (0..64).fold(0, |bits, bit| bits | u64::from(exits(first + bit, access, by)) << bit)
}

/// How nvmx answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    ApicBase,
    FeatureControl,
    MicrocodeUpdate,
    MiscEnable,
    Mtrr,
    PerfCapabilities,
    Vmx,
    Xss,
}

fn answer_for(index: u32) -> Option<Answer> {
    Some(match index {
        IA32_APIC_BASE => Answer::ApicBase,
        IA32_FEATURE_CONTROL => Answer::FeatureControl,
        IA32_BIOS_UPDT_TRIG => Answer::MicrocodeUpdate,
        hw::IA32_MISC_ENABLE => Answer::MiscEnable,
        0x200..=0x23F | 0x250 | 0x258..=0x259 | 0x268..=0x26F | 0x2FF => Answer::Mtrr,
        IA32_PERF_CAPABILITIES => Answer::PerfCapabilities,
        FIRST..=LAST => Answer::Vmx,
        hw::IA32_XSS => Answer::Xss,
        _ => return None,
    })
}

/// What nvmx keeps for L2 on one processor.
pub struct OwnMsrs {
    /// IA32_FEATURE_CONTROL
    pub feature_control: u64,
    /// The MTRRs
    pub mtrrs: OwnMtrrs,
}

impl OwnMsrs {
    /// As this processor has them. `mtrrs` is CPUID.1:EDX.MTRR.
    pub fn of_this_processor(mtrrs: bool, physical_width: u32) -> Self {
        let rdmsr = |index| hw::rdmsr_safe(index).unwrap_or(0);
        Self {
            feature_control: FEATURE_LOCK | FEATURE_VMX | rdmsr(IA32_FEATURE_CONTROL) & FEATURE_LMCE,
            mtrrs: OwnMtrrs::read(mtrrs, physical_width, rdmsr),
        }
    }
}

/// What RDMSR of an MSR that nvmx answers yields; `None` if it is a #GP.
pub fn answer(offered: &Capabilities, own: &OwnMsrs, index: u32) -> Option<u64> {
    if verdict(index, Access::Read) != Verdict::Answered {
        return None;
    }
    match answer_for(index)? {
        Answer::FeatureControl => Some(own.feature_control),
        Answer::MiscEnable => hw::rdmsr_safe(index).ok().map(|value| value | hw::MISC_NO_BTS | hw::MISC_NO_PEBS),
        Answer::Mtrr => own.mtrrs.get(index),
        Answer::PerfCapabilities => hw::rdmsr_safe(index).ok().map(|value| value & !PERF_PEBS),
        Answer::Vmx => offered.msr(index),
        Answer::ApicBase | Answer::MicrocodeUpdate | Answer::Xss => None,
    }
}

impl OwnMsrs {
    /// WRMSR of an MSR that nvmx answers or refuses.
    pub fn write<P>(&mut self, guest: &GuestMemory<P>, index: u32, value: u64) -> Result<(), Fault> {
        const GP: Fault = Fault::GeneralProtection(0);
        if verdict(index, Access::Write) != Verdict::Answered {
            return Err(GP);
        }
        let taken = match answer_for(index).ok_or(GP)? {
            Answer::ApicBase => return apic::set_base(value, guest),
            Answer::MiscEnable => return hw::set_misc_enable(value),
            Answer::Xss => return hw::set_xss(value),
            Answer::MicrocodeUpdate => true,
            Answer::Mtrr => self.mtrrs.set(index, value),
            Answer::FeatureControl => self.set_feature_control(value),
            Answer::PerfCapabilities | Answer::Vmx => false,
        };
        if taken { Ok(()) } else { Err(GP) }
    }

    /// L2 may set what the machine has without SMX and SGX, until it sets the lock.
    fn set_feature_control(&mut self, value: u64) -> bool {
        let known = FEATURE_LOCK | FEATURE_VMX | self.feature_control & FEATURE_LMCE;
        let taken = self.feature_control & FEATURE_LOCK == 0 && value & !known == 0;
        if taken {
            self.feature_control = value;
        }
        taken
    }
}

/// True if an MSR-load area of a guest may have the processor load this value. What nvmx only answers, it cannot.
pub fn may_load<P>(index: u32, value: u64, memory: &GuestMemory<P>) -> bool {
    match verdict(index, Access::Write) {
        Verdict::Passes | Verdict::Switched => true,
        Verdict::Refused => false,
        Verdict::Answered => match answer_for(index) {
            Some(Answer::ApicBase) => apic::may_move_to(value, memory),
            Some(Answer::MiscEnable) => hw::is_misc_enable_harmless(value),
            Some(Answer::Xss) => hw::is_xss_harmless(value),
            _ => false,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PAGE_SIZE;
    use crate::mm::Span;
    use crate::vmx::bitmap::BitmapPage;
    use proptest::prelude::*;

    const BOTH: [Access; 2] = [Access::Read, Access::Write];
    const NVMX: Span = Span::new(0x4000_0000, 0x4020_0000);
    const WIDTH: u8 = 39;

    fn every_msr() -> impl Iterator<Item = u32> {
        policy::IN_REACH.into_iter().flatten().chain([0x2000, 0x4B56_4D00, 0xBFFF_FFFF, 0xC000_2000, u32::MAX])
    }

    #[test]
    fn rows_ascend_and_say_why() {
        for pair in policy::TABLE.windows(2) {
            assert!(pair[0].last < pair[1].first, "{:#x} comes behind {:#x}", pair[1].first, pair[0].first);
        }
        for row in policy::TABLE {
            assert!(row.first <= row.last && !row.name.is_empty() && !row.why.is_empty(), "{row:?}");
            assert!(policy::IN_REACH.iter().any(|r| r.contains(&row.first) && r.contains(&row.last)), "{row:?}");
        }
    }

    #[test]
    fn what_is_in_no_row_can_be_read_and_not_written() {
        let listed = |index| policy::TABLE.iter().any(|row| (row.first..=row.last).contains(&index));
        for index in every_msr().filter(|index| !listed(*index)) {
            let in_reach = MsrBitmap::index(index, Access::Read).is_some();
            let read = if in_reach { Verdict::Passes } else { Verdict::Refused };
            assert_eq!(
                (verdict(index, Access::Read), verdict(index, Access::Write)),
                (read, Verdict::Refused),
                "{index:#x}"
            );
        }
    }

    /// RDMSR and WRMSR, both bitmaps and the areas, each against the table.
    #[test]
    fn bitmaps_instructions_and_areas_agree() {
        let bitmap = |by| MsrBitmap(BitmapPage(std::array::from_fn(|word| bitmap_word(word, by))));
        let bitmaps = [By::Guest, By::Nested].map(|by| (by, bitmap(by)));
        let memory = GuestMemory::new((), NVMX, WIDTH);
        for (index, access) in every_msr().flat_map(|index| BOTH.map(|access| (index, access))) {
            let verdict = verdict(index, access);
            let exits = Item::of_msr(index).map_or(Exits::Never, |item| item.row().exits);
            let noted = |by| {
                access == Access::Write && (exits == Exits::ForBoth || exits == Exits::ForGuest && by == By::Guest)
            };
            let own = matches!(verdict, Verdict::Answered | Verdict::Refused);
            assert_eq!(is_own(index, access), own, "{index:#x} {access:?}");
            for (by, bitmap) in &bitmaps {
                assert_eq!(bitmap.exits(index, access), own || noted(*by), "{index:#x} {access:?} {by:?}");
            }
            if verdict == Verdict::Answered {
                assert!(answer_for(index).is_some(), "{index:#x}");
            }
            if access == Access::Write && verdict != Verdict::Answered {
                assert_eq!(may_load(index, 0, &memory), verdict != Verdict::Refused, "{index:#x}");
            }
        }
    }

    #[test]
    fn writes_of_ia32_xss_pass_where_the_processor_refuses_what_nvmx_would() {
        let all = MsrBitmap(BitmapPage(std::array::from_fn(|word| bitmap_word(word, By::Guest))));
        for refuses in [true, false] {
            let bitmap = MsrBitmap(BitmapPage(std::array::from_fn(|word| bitmap01_word(word, refuses))));
            for (index, access) in every_msr().flat_map(|index| BOTH.map(|access| (index, access))) {
                let passes = refuses && (index, access) == (hw::IA32_XSS, Access::Write);
                assert_eq!(bitmap.exits(index, access), all.exits(index, access) && !passes, "{index:#x} {access:?}");
            }
        }
    }

    /// Those that the SDM gives an address which ept01 does not translate, or that act while nvmx runs.
    #[test]
    fn what_could_reach_nvmx_is_not_the_processor_s() {
        let harmful = [
            0x1B, 0x33, 0x79, 0x1A0, 0x1D4, 0x200, 0x2FF, 0x3F1, 0x3F4, 0x480, 0x560, 0x570, 0x600, 0x982, 0x14CE,
            0x17D0, 0xDA0, 0xD90,
        ];
        for index in harmful {
            assert!(is_own(index, Access::Write), "{index:#x}");
        }
    }

    #[test]
    fn areas_load_nothing_that_wrmsr_may_not() {
        let memory = GuestMemory::new((), NVMX, WIDTH);
        let may = |index, value| may_load(index, value, &memory);
        assert!(may(hw::IA32_MISC_ENABLE, 1) && !may(hw::IA32_MISC_ENABLE, 1 << 34));
        assert!(may(hw::IA32_XSS, 1 << 11) && !may(hw::IA32_XSS, 1 << 8) && !may(hw::IA32_XSS, 1 << 15));
        for index in [IA32_FEATURE_CONTROL, IA32_BIOS_UPDT_TRIG, 0x200, 0x480] {
            assert!(!may(index, 0), "{index:#x}");
        }
    }

    #[test]
    fn a_feature_that_is_refused_is_hidden() {
        use crate::rules::hidden::HIDDEN;
        for hidden in HIDDEN {
            if let Some(index) = hidden.msr {
                assert_eq!(BOTH.map(|access| verdict(index, access)), [Verdict::Refused; 2], "{}", hidden.name);
            }
        }
    }

    #[test]
    fn feature_control_is_locked() {
        let mtrrs = OwnMtrrs::read(false, 39, |_| 0);
        let mut own = OwnMsrs { feature_control: FEATURE_LOCK | FEATURE_VMX, mtrrs };
        assert!(!own.set_feature_control(FEATURE_VMX));
        own.feature_control = 0;
        assert!(!own.set_feature_control(1 << 18), "SGX");
        assert!(own.set_feature_control(FEATURE_LOCK | FEATURE_VMX));
    }

    proptest! {
        #[test]
        fn no_msr_beyond_the_bitmaps_is_ever_let_through(index: u32) {
            let in_reach = index <= 0x1FFF || (0xC000_0000..=0xC000_1FFF).contains(&index);
            prop_assert!(in_reach || BOTH.iter().all(|access| verdict(index, *access) == Verdict::Refused));
        }

        /// Whatever the mode and the other bits are: a base that does no harm while the APIC is off, or in x2APIC mode, would
        /// do it as soon as that changes.
        #[test]
        fn the_apic_moves_anywhere_but_into_nvmx(page in prop_oneof![0x3_FFF0u64..0x4_0210, any::<u64>()], low in 0u64..0x1000) {
            let base = (page << 12) & ((1 << 52) - 1);
            let memory = GuestMemory::new((), NVMX, WIDTH);
            let harmless = !NVMX.overlaps(Span::new(base, base + PAGE_SIZE)) && base >> WIDTH == 0;
            prop_assert_eq!(may_load(IA32_APIC_BASE, base | low, &memory), harmless);
        }
    }
}
