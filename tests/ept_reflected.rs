//! ept02 after a violation that L2 sees: it drops what is cached for its address, so that L2 may map another page there
//! without INVEPT, and no more than that.

mod ept_model;

use ept_model::*;
use nvmx::addr::Ngpa;
use nvmx::ept::{Ept02, Eptp, Outcome, PageLog, Qualification};
use nvmx::vmx::controls::SecondaryControls;

const ROOT: u64 = 0x10_0000;
const PDPT: u64 = 0x10_1000;
const PD: u64 = 0x10_2000;
const PT: u64 = 0x10_3000;
const OTHER: u64 = 0x20_0000;
const LOG: u64 = 0x30_0000;
const OLD: u64 = 0x77_7000 | WB;
const NEW: u64 = 0x88_8000 | WB;
const PLAIN: Eptp = Eptp::new(ROOT | 0x1e);
const FLAGS: Eptp = Eptp::new(ROOT | 0x5e);
const UNCACHED: Eptp = Eptp::new(ROOT | 0x18);
const MODE_BASED: Eptp = PLAIN.under(SecondaryControls::MODE_BASED_EXECUTE_CONTROL);
const OTHER_ROOT: Eptp = Eptp::new(OTHER | 0x1e);
const ROLES: [Eptp; 5] = [PLAIN, FLAGS, UNCACHED, MODE_BASED, OTHER_ROOT];

/// L2 with two trees that share all but their roots: two pages of 4 KiB, one of 2 MiB, one of 1 GiB.
struct Machine {
    l2: L2,
    frames: Frames,
    ept: Ept02<6, 8>,
}

const PAGES: [u64; 4] = [0x5000, 0x6000, 3 * MIB2 + 0x4000, GIB1 + 5 * MIB2];

impl Machine {
    /// Each role has used each page.
    fn new() -> Self {
        let mut l2 = L2::default();
        for root in [ROOT, OTHER] {
            l2.set(root, 0, PDPT | 7 | XU);
        }
        l2.set(PDPT, 0, PD | 7 | XU);
        l2.set(PDPT, 1, (7 * GIB1) | WB | LARGE | 7 | XU);
        l2.set(PD, 0, PT | 7 | XU);
        l2.set(PD, 3, (9 * MIB2) | WB | LARGE | 7 | XU);
        l2.set(PT, 5, OLD | 7 | XU);
        l2.set(PT, 6, 0x99_9000 | WB | 7 | XU);
        let mut frames = Frames::new(1000);
        let ept = Ept02::new(rules(), false, 100, &mut frames).unwrap();
        let mut machine = Self { l2, frames, ept };
        for role in ROLES {
            for page in PAGES {
                assert_eq!(machine.fault(role, page, W, None), Outcome::Filled);
            }
            assert_eq!(machine.activate(role).0.len(), PAGES.len());
        }
        machine
    }

    fn fault(&mut self, role: Eptp, ngpa: u64, access: u64, log: Option<&mut PageLog>) -> Outcome {
        let qualification = Qualification::from_bits_retain(access | 3 << 7);
        self.ept.violation(role, Ngpa::new(ngpa), qualification, log, &self.l2, &mut self.frames)
    }

    /// The leaves of a role, and whether activating it asks for INVEPT.
    fn activate(&mut self, role: Eptp) -> (Vec<(u64, u64, u64)>, bool) {
        let activation = self.ept.activate(role, &self.l2, None, &mut self.frames);
        (self.frames.leaves(activation.eptp02.ep4ta()), activation.invept)
    }

    /// Under which roles a leaf maps an address, and which of them ask for INVEPT.
    fn mapped(&mut self, ngpa: u64) -> [(bool, bool); ROLES.len()] {
        ROLES.map(|role| {
            let (leaves, invept) = self.activate(role);
            (leaves.iter().any(|leaf| (leaf.0..leaf.0 + leaf.1).contains(&ngpa)), invept)
        })
    }
}

fn is_violation(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::ReflectViolation { .. })
}

#[test]
fn l2_maps_another_page_behind_a_violation_without_invept() {
    for role in ROLES {
        let mut m = Machine::new();
        m.l2.set(PT, 5, OLD | R | XU | ACCESSED);
        m.ept.invept_all();
        let _ = m.activate(role);
        assert!(is_violation(m.fault(role, 0x5123, W, None)), "{role:?}");
        m.l2.set(PT, 5, NEW | 7 | XU);
        assert!(!m.activate(role).0.iter().any(|leaf| leaf.0 == 0x5000), "the read that follows faults");
        assert_eq!(m.fault(role, 0x5123, R, None), Outcome::Filled);
        let (leaves, invept) = m.activate(role);
        let page = leaves.iter().find(|leaf| leaf.0 == 0x5000).map(|leaf| leaf.2 & !0xfff & !XU);
        assert_eq!((page, invept), (Some(NEW & !0xfff), false), "{role:?}");
    }
}

#[test]
fn it_goes_in_every_root_of_the_same_ep4ta_and_in_no_other() {
    for role in &ROLES[..4] {
        for (page, table, index) in [(0, PT, 5), (2, PD, 3), (3, PDPT, 1)] {
            let mut m = Machine::new();
            m.l2.set(table, index, 0);
            assert!(is_violation(m.fault(*role, PAGES[page], R, None)));
            let large = page >= 2;
            let expected = ROLES.map(|other| match other {
                OTHER_ROOT => (true, false),
                // The processor had the violation in this root, and dropped what it had of this 4 KiB.
                other => (false, other != *role || large),
            });
            assert_eq!(m.mapped(PAGES[page]), expected, "{role:?}, page {page}");
            let others = PAGES.into_iter().enumerate().filter(|(n, _)| *n != page);
            for (_, other) in others {
                assert_eq!(m.mapped(other), [(true, false); ROLES.len()], "{other:#x}");
            }
        }
    }
}

#[test]
fn each_outcome_that_l2_sees_drops_the_page() {
    type Change = fn(&mut L2);
    let cases: [(&str, Change, Outcome); 4] = [
        ("misconfigured", |l2| l2.set(PT, 5, OLD | W | XU), Outcome::ReflectMisconfig),
        ("a reserved bit", |l2| l2.set(PT, 5, OLD | 1 << WIDTH | 7 | XU), Outcome::ReflectMisconfig),
        ("a table in nvmx's memory", |l2| l2.set(PD, 0, OWN.0 | 7 | XU), Outcome::ReflectMisconfig),
        (
            "a page in nvmx's memory",
            |l2| l2.set(PT, 5, OWN.0 | WB | 7 | XU),
            Outcome::Forbidden { gpa: nvmx::addr::Gpa::new(OWN.0) },
        ),
    ];
    for (name, change, outcome) in cases {
        let mut m = Machine::new();
        change(&mut m.l2);
        assert_eq!(m.fault(PLAIN, 0x5000, R, None), outcome, "{name}");
        assert_eq!(m.mapped(0x5000).map(|(mapped, _)| mapped), [false, false, false, false, true], "{name}");
    }
    // A full log: the page is not dirty, and the index is out of its range.
    let mut m = Machine::new();
    m.l2.set(PT, 5, OLD | 7 | XU | ACCESSED);
    let mut log = PageLog { address: nvmx::addr::Gpa::new(LOG), index: 0xffff };
    assert_eq!(m.fault(FLAGS, 0x5000, W, Some(&mut log)), Outcome::ReflectLogFull);
    assert_eq!(m.mapped(0x5000).map(|(mapped, _)| mapped), [false, false, false, false, true]);
}

#[test]
fn an_invept_of_l2_that_follows_is_one_of_the_processor() {
    // Combined mappings of other linear addresses may last until then.
    let mut m = Machine::new();
    m.l2.set(PT, 5, 0);
    assert!(is_violation(m.fault(PLAIN, 0x5000, R, None)));
    assert!(!m.activate(PLAIN).1);
    m.ept.invept_single(PLAIN);
    assert!(m.activate(PLAIN).1);
}

#[test]
fn a_violation_that_only_nvmx_found_costs_an_invept() {
    let mut m = Machine::new();
    m.l2.set(PT, 5, 0);
    m.ept.found_violation(PLAIN);
    assert!(is_violation(m.fault(PLAIN, 0x5000, R, None)));
    assert!(m.activate(PLAIN).1);
}

#[test]
fn what_was_never_there_costs_nothing() {
    let mut m = Machine::new();
    let before = m.ept.stats();
    assert!(is_violation(m.fault(PLAIN, 0x7000, R, None)));
    assert!(is_violation(m.fault(PLAIN, 4 << 39, R, None)));
    assert_eq!(m.mapped(0x5000), [(true, false); ROLES.len()]);
    assert_eq!(m.ept.stats(), before);
}
