//! Mode-based execute control and convertible violations: entries with two execute rights, and bit 63.

mod ept_model;

use ept_model::*;
use nvmx::addr::{Gpa, Ngpa};
use nvmx::ept::entry::{Meaning, Misconfig, decode};
use nvmx::ept::walk::{GuestTables, Walk, walk};
use nvmx::ept::{Ept02, EptRules, Eptp, Level, Outcome, Qualification, Rights};
use nvmx::vmx::controls::SecondaryControls;

const ROOT: u64 = 0x10_0000;
const PDPT: u64 = 0x10_1000;
const PD: u64 = 0x10_2000;
const PT: u64 = 0x10_3000;
const NGPA: u64 = 0x5000;
const PAGE: u64 = 0x77_7000 | WB;
const PLAIN: Eptp = Eptp::new(ROOT | 0x1e);
const MODE_BASED: Eptp = PLAIN.under(SecondaryControls::MODE_BASED_EXECUTE_CONTROL);
const SUPPRESS_VE: u64 = 1 << 63;
/// Bits of the qualification: a fetch from a linear address, of user mode.
const FETCH: u64 = X | 3 << 7;
const OF_USER: u64 = 1 << 9;

/// The sixteen combinations of bits 2:0 and 10.
fn rights() -> impl Iterator<Item = u64> {
    (0..16).map(|n| n & 7 | n >> 3 << 10)
}

/// Each kind of access: what the processor reports, and the right that it needs with and without the control.
const ACCESSES: [(u64, u64, u64); 4] =
    [(R | 3 << 7, R, R), (W | 3 << 7, W, W), (FETCH, X, X), (FETCH | OF_USER, XU, X)];

struct Machine {
    l2: L2,
    frames: Frames,
    ept: Ept02<4, 8>,
}

impl Machine {
    /// Upper tables for the addresses below 1 GiB; their entries grant all.
    fn new() -> Self {
        let mut l2 = L2::default();
        for (table, next) in [(ROOT, PDPT), (PDPT, PD), (PD, PT)] {
            l2.set(table, 0, next | 7 | XU);
        }
        let mut frames = Frames::new(100);
        let ept = Ept02::new(rules(), true, 50, &mut frames).unwrap();
        Self { l2, frames, ept }
    }

    fn fault(&mut self, eptp: Eptp, qualification: u64) -> Outcome {
        let qualification = Qualification::from_bits_retain(qualification);
        self.ept.violation(eptp, Ngpa::new(NGPA), qualification, None, &self.l2, &mut self.frames)
    }

    /// The entry that maps the page in ept02, and whether activating it asked for INVEPT.
    fn activate(&mut self, eptp: Eptp) -> (Option<u64>, bool) {
        let activation = self.ept.activate(eptp, &self.l2, None, &mut self.frames);
        assert_eq!(activation.eptp02.get() & 0xfff, 0x1e, "the role is nothing that a processor sees");
        let leaves = self.frames.leaves(activation.eptp02.ep4ta());
        (leaves.first().map(|leaf| leaf.2), activation.invept)
    }
}

#[test]
fn an_entry_is_present_by_each_right_that_counts() {
    for execute_only in [false, true] {
        for mode_based in [false, true] {
            let rules = EptRules::new(WIDTH, execute_only, true, true).mode_based(mode_based);
            for right in rights() {
                for (level, rest) in [(Level::Pml4, PDPT), (Level::Pdpt, PD), (Level::Pd, PT), (Level::Pt, PAGE)] {
                    let counts = if mode_based { right } else { right & 7 };
                    // SDM "EPT Misconfigurations": writable and not readable; executable and not readable, where execute-only
                    // translations are not supported, by either execute right that counts.
                    let wrong = counts & R == 0 && (counts & W != 0 || !execute_only);
                    let expected = match (counts, wrong) {
                        (0, _) => "not present",
                        (_, true) => "wrong",
                        _ => "good",
                    };
                    let word = match decode(rest | right, level, &rules) {
                        Meaning::NotPresent => "not present",
                        Meaning::Misconfigured(Misconfig::Rights) => "wrong",
                        Meaning::Misconfigured(other) => panic!("{other:?}"),
                        Meaning::Table(_) | Meaning::Leaf { .. } => "good",
                    };
                    assert_eq!(word, expected, "{right:#x} at {level:?} under {rules:?}");
                }
            }
        }
    }
}

#[test]
fn both_execute_rights_are_anded_over_all_levels() {
    let rules = rules().mode_based(true);
    for level in 0..4 {
        for taken in rights() {
            let mut m = Machine::new();
            m.l2.set(PT, 5, PAGE | 7 | XU);
            let (table, index) = [(ROOT, 0), (PDPT, 0), (PD, 0), (PT, 5)][level];
            let whole = m.l2.get(table + index * 8);
            m.l2.set(table, index, whole & !taken);
            let left = (7 | XU) & !taken;
            match walk(&mut GuestTables(&m.l2), (Gpa::new(ROOT), Level::Pml4), NGPA, &rules) {
                Walk::Leaf(leaf) => assert_eq!(u64::from(leaf.rights.bits()), left, "level {level}"),
                Walk::NotPresent(_) => assert_eq!(left, 0),
                Walk::Misconfigured(..) => assert_eq!(left & 3, W),
                Walk::Unreadable(error) => panic!("{error:?}"),
            }
        }
    }
}

#[test]
fn every_combination_of_rights_and_access_fills_or_reflects_as_ept12_says() {
    for (eptp, mode_based) in [(PLAIN, false), (MODE_BASED, true)] {
        for right in rights() {
            for (access, needed, plainly_needed) in ACCESSES {
                let mut m = Machine::new();
                m.l2.set(PT, 5, PAGE | right);
                let (granted, needed) = if mode_based { (right, needed) } else { (right & 7, plainly_needed) };
                let outcome = m.fault(eptp, access);
                let seen = m.activate(eptp).0;
                if granted & 3 == W {
                    assert_eq!((outcome, seen), (Outcome::ReflectMisconfig, None));
                } else if granted & needed != 0 {
                    assert_eq!((outcome, seen), (Outcome::Filled, Some(PAGE | granted)));
                } else {
                    let told = access | (granted & 7) << 3 | (granted & XU) >> 4;
                    let qualification = Qualification::from_bits_retain(told);
                    let wanted = Outcome::ReflectViolation { qualification, convertible: true };
                    assert_eq!((outcome, seen), (wanted, None), "{right:#x} {access:#x}");
                }
            }
        }
    }
}

#[test]
fn one_ept12_has_a_role_with_and_one_without_the_control() {
    let mut m = Machine::new();
    m.l2.set(PT, 5, PAGE | R | XU);
    assert_eq!(m.fault(PLAIN, R), Outcome::Filled);
    assert_eq!(m.fault(MODE_BASED, FETCH | OF_USER), Outcome::Filled);
    assert_eq!(m.activate(PLAIN).0, Some(PAGE | R));
    assert_eq!(m.activate(MODE_BASED).0, Some(PAGE | R | XU));
    // INVEPT goes by the address of the root alone.
    m.l2.set(PT, 5, PAGE | R | X | XU);
    m.ept.invept_single(PLAIN);
    assert_eq!(m.activate(MODE_BASED), (Some(PAGE | R | X | XU), true));
    assert_eq!(m.activate(PLAIN), (Some(PAGE | R | X), true));
    // So does what a violation that L2 sees drops.
    assert!(matches!(m.fault(PLAIN, W), Outcome::ReflectViolation { .. }));
    assert_eq!(
        (m.activate(PLAIN), m.activate(MODE_BASED)),
        ((None, false), (None, true)),
        "the processor forgot the first itself"
    );
}

#[test]
fn another_execute_right_needs_invept_when_it_is_taken_and_not_when_it_is_given() {
    let mut m = Machine::new();
    m.l2.set(PT, 5, PAGE | R | X);
    assert_eq!(m.fault(MODE_BASED, R), Outcome::Filled);
    let _ = m.activate(MODE_BASED);
    m.l2.set(PT, 5, PAGE | R | X | XU);
    assert_eq!(m.fault(MODE_BASED, FETCH | OF_USER), Outcome::Filled);
    assert_eq!(m.activate(MODE_BASED), (Some(PAGE | R | X | XU), false));
    m.l2.set(PT, 5, PAGE | R | W | XU);
    assert_eq!(m.fault(MODE_BASED, W), Outcome::Filled);
    assert_eq!(m.activate(MODE_BASED), (Some(PAGE | R | W | XU), true));
}

#[test]
fn no_run_continues_under_mode_based_execute_control() {
    let mut m = Machine::new();
    for index in 5..8 {
        m.l2.set(PT, index, PAGE | R | X);
    }
    assert_eq!(m.fault(MODE_BASED, R), Outcome::Filled);
    let fetch = Qualification::from_bits_retain(FETCH | OF_USER);
    let outcome = m.ept.refill(MODE_BASED, Ngpa::new(0x6000), fetch, &m.l2, &mut m.frames);
    assert_eq!(outcome, None, "it would ask for bit 2");
}

#[test]
fn the_entry_that_ends_the_walk_decides_whether_a_violation_is_convertible() {
    let entries = [(ROOT, 0), (PDPT, 0), (PD, 0), (PT, 5)];
    let flags = Eptp::new(ROOT | 0x1e | 1 << 6);
    for eptp in [PLAIN, flags] {
        for ends in 0..4 {
            for suppressed in 0..16u32 {
                let mut m = Machine::new();
                m.l2.set(PT, 5, PAGE | R);
                for (n, (table, index)) in entries.into_iter().enumerate() {
                    let entry = m.l2.get(table + index * 8) | if suppressed >> n & 1 != 0 { SUPPRESS_VE } else { 0 };
                    // Not present at `ends`, or there is a page that does not allow the access.
                    m.l2.set(table, index, if n == ends && ends < 3 { entry & !(7 | XU) } else { entry });
                }
                let convertible = suppressed >> ends & 1 == 0;
                match m.fault(eptp, W | 3 << 7) {
                    Outcome::ReflectViolation { qualification, convertible: told } => {
                        assert_eq!(told, convertible, "ends at {ends}, suppressed {suppressed:#x}");
                        let granted = if ends < 3 { Rights::empty() } else { Rights::READ };
                        assert_eq!(qualification.bits() >> 3 & 7, u64::from(granted.bits()));
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}
