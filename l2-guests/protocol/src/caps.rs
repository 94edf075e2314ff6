//! The VMX capability MSRs of a machine as one word, and what two machines have in common.
//!
//! A guest that is to see the same on two machines must use only what both offer. It prints what it uses as a `caps` record;
//! given that word as `caps=` on its command line, the same guest on another machine uses no more.
//!
//! Source: SDM vol. 3D, appendix "VMX Capability Reporting Facility".

use crate::record::Value;
use core::fmt;

/// The first of the MSRs: IA32_VMX_BASIC
pub const FIRST: u32 = 0x480;
/// How many there are: up to IA32_VMX_EXIT_CTLS2
pub const COUNT: usize = 0x14;

const BASIC: u32 = 0x480;
const MISC: u32 = 0x485;
const CR0_FIXED0: u32 = 0x486;
const CR4_FIXED0: u32 = 0x488;
const VMCS_ENUM: u32 = 0x48A;
/// Addresses of 32 bits, memory type, INS/OUTS information, TRUE MSRs, injection with any error code. Not revision and size.
const BASIC_BITS: u64 = 0x1FF << 48;
/// Of those, what a machine has or has not.
const BASIC_FLAGS: u64 = 7 << 54;
const TRUE_CONTROLS: u64 = 1 << 55;
/// What a machine has or has not; not the rate of the timer and the revision of the MSEG.
const MISC_FLAGS: u64 = 0x1E0 | 3 << 14 | 7 << 28;
/// Numbers of which the smaller counts: CR3 targets, entries of MSR lists.
const MISC_NUMBERS: [u64; 2] = [0x1FF << 16, 7 << 25];

/// The values; `None` for an MSR that the machine lacks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caps([Option<u64>; COUNT]);

impl Caps {
    /// Reads all of them.
    pub fn read(mut rdmsr: impl FnMut(u32) -> Option<u64>) -> Self {
        let mut index = FIRST;
        Caps([(); COUNT].map(|()| {
            index += 1;
            rdmsr(index - 1)
        }))
    }

    /// The reverse of the text.
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(',');
        let mut values = [None; COUNT];
        for value in &mut values {
            *value = match words.next()? {
                "-" => None,
                word => Some(u64::from_str_radix(word, 16).ok()?),
            };
        }
        words.next().is_none().then_some(Caps(values))
    }

    /// The value of an MSR.
    pub fn get(&self, msr: u32) -> Option<u64> {
        let index = usize::try_from(msr.checked_sub(FIRST)?).ok()?;
        self.0.get(index).copied().flatten()
    }

    /// Only what can be compared: what a machine has or has not, neither revisions nor rates.
    pub fn comparable(mut self) -> Self {
        for (msr, value) in (FIRST..).zip(&mut self.0) {
            let mask = match msr {
                BASIC => BASIC_BITS,
                MISC => MISC_FLAGS | MISC_NUMBERS[0] | MISC_NUMBERS[1],
                _ => !0,
            };
            *value = value.map(|value| value & mask);
        }
        self
    }

    /// This machine, using no more than the other one offers.
    pub fn clamped(mut self, other: &Self) -> Self {
        let both = |msr| self.get(msr).zip(other.get(msr));
        let true_controls = both(BASIC).is_some_and(|(own, limit)| own & limit & TRUE_CONTROLS != 0);
        let mut all = self.0;
        for (msr, value) in (FIRST..).zip(&mut all) {
            *value = match msr {
                0x48D..=0x490 if !true_controls => None,
                _ => both(msr).map(|(own, limit)| common(msr, own, limit)),
            };
        }
        self.0 = all;
        self
    }
}

/// What `own` and `limit` have in common as values of an MSR.
fn common(msr: u32, own: u64, limit: u64) -> u64 {
    match msr {
        BASIC => own & (!BASIC_FLAGS | limit),
        // Low half: what must be 1; high half: what may be 1
        0x481..=0x484 | 0x48B | 0x48D..=0x490 => own & limit & !0xFFFF_FFFF | (own | limit) & 0xFFFF_FFFF,
        MISC => MISC_NUMBERS.iter().fold(own & (!MISC_FLAGS | limit), |value, number| {
            let least = (own & number).min(limit & number);
            value & !number | least
        }),
        CR0_FIXED0 | CR4_FIXED0 => own | limit,
        VMCS_ENUM => own.min(limit),
        _ => own & limit,
    }
}

impl fmt::Display for Caps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, value) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            match value {
                Some(value) => write!(f, "{value:x}")?,
                None => f.write_str("-")?,
            }
        }
        Ok(())
    }
}

impl Value for Caps {
    fn write_to(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        write!(out, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(change: impl Fn(u32) -> Option<u64>) -> Caps {
        Caps::read(|msr| change(msr).or(if msr <= 0x491 { Some(u64::MAX) } else { None }))
    }

    #[test]
    fn the_text_gives_the_values_back() {
        let caps = machine(|msr| (msr == 0x48C).then_some(0xF01));
        #[cfg(feature = "std")]
        assert_eq!(Caps::parse(&caps.to_string()), Some(caps));
        assert_eq!(caps.get(0x48C), Some(0xF01));
        assert_eq!((caps.get(0x492), caps.get(0x47F), caps.get(0x494)), (None, None, None));
        for text in ["", "1,2", "x"] {
            assert_eq!(Caps::parse(text), None, "{text}");
        }
    }

    #[test]
    fn controls_may_be_set_where_both_allow_it_and_must_be_where_one_does() {
        let (own, limit) = (0x0000_00FF_0000_0013, 0x0000_0FF7_0000_0016);
        let of = |value| machine(move |msr| (msr == 0x48E).then_some(value));
        assert_eq!(of(own).clamped(&of(limit)).get(0x48E), Some(0x0000_00F7_0000_0017));
    }

    #[test]
    fn rate_and_revision_stay_the_machine_s_own_and_are_not_compared() {
        let own = machine(|msr| match msr {
            0x480 => Some(0x00DA_0400_0000_0012),
            0x485 => Some(0x7600_01E5),
            _ => None,
        });
        let limit = machine(|msr| match msr {
            0x480 => Some(0x0098_1000_0000_0034),
            0x485 => Some(0x0004_0067),
            _ => None,
        });
        let clamped = own.clamped(&limit);
        assert_eq!(clamped.get(0x480), Some(0x009A_0400_0000_0012));
        assert_eq!(clamped.get(0x485), Some(0x65));
        assert_eq!(clamped.comparable().get(0x485), Some(0x60));
        assert_eq!(clamped.comparable().get(0x480), Some(0x009A_0000_0000_0000));
    }

    #[test]
    fn what_one_machine_lacks_is_gone() {
        let rich = machine(|_| None);
        let poor = Caps::read(|msr| (msr < 0x48B).then_some(if msr == 0x480 { 0 } else { 5 }));
        let clamped = rich.clamped(&poor);
        assert_eq!((clamped.get(0x48B), clamped.get(0x48D), clamped.get(0x48A)), (None, None, Some(5)));
        assert_eq!(poor.clamped(&poor), poor);
    }
}
