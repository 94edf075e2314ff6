//! Sub-page write permissions in ept02 and spp02, against a second statement of them: whatever L2 writes into ept12 and spp12, an access of
//! L3 comes to what a processor with L2's tables alone makes of it, once L2 has executed INVEPT, or after an exit for the page.
//!
//! The processor here caches each leaf and each word of permissions that it used, for as long as it may.
#![allow(missing_docs, reason = "public for tests/fuzz only")]

pub mod ept_model;

use ept_model::*;
use nvmx::addr::{Gpa, Hpa, Ngpa};
use nvmx::ept::sub_page_table::{Said, look_up};
use nvmx::ept::{Ept02, Eptp, Outcome, PageLog, Qualification, TableFrames};
use nvmx::vmx::controls::SecondaryControls;
use proptest::prelude::*;
use std::collections::HashMap;

/// ept12: a PML4 table, and below it, for two entries of it, a table of each level.
const ROOT: u64 = 0x10_0000;
/// spp12: two roots, and six tables that serve at any level.
pub const SPP: u64 = 0x20_0000;
pub const TABLES: u64 = 8;
const DATA: u64 = 0x100_0000;
const LOG: u64 = 0x30_0000;
const RESERVE: usize = 8;
pub const SUB_PAGES: u64 = 1 << 61;
const PIECE: u64 = 128;
/// Each second bit.
pub const ALL: u64 = 0x5555_5555_5555_5555;
/// Five pages: three in one page table, two elsewhere.
pub const PAGES: [u64; 5] = [0x5000, 0x6000, 0x1F_F000, 0x20_0000, 3 << 39 | 7 << 30 | 0x5000];
const MEMORY: u64 = 0x000F_FFFF_FFFF_F000;

fn role(flags: bool, sub_pages: bool) -> Eptp {
    let controls = SecondaryControls::SUB_PAGE_WRITE_PERMISSIONS;
    let controls = if sub_pages { controls } else { SecondaryControls::empty() };
    Eptp::new(ROOT | 0x1e | if flags { 0x40 } else { 0 }).under(controls)
}

/// What an access comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// It reaches this address.
    Done(u64),
    /// An EPT violation, with these rights.
    Violation(u64),
    Misconfiguration,
    /// An SPP-related event: a table is missing, or wrong.
    Event {
        miss: bool,
    },
}

/// A kind of access, as the qualification has it.
pub const ACCESSES: [u64; 5] = [R | 3 << 7, W | 3 << 7, R | W | 3 << 7, X | 3 << 7, W | 1 << 7];

/// An entry of L2's, or all ones where L2 owns nothing.
fn entry(l2: &L2, at: u64) -> u64 {
    if owned(at, 8) { l2.get(at) } else { u64::MAX }
}

/// The permissions of a page, by text: `Err` has whether a table is missing.
fn permissions(l2: &L2, spptp: u64, ngpa: u64) -> Result<Vec<bool>, bool> {
    let text = format!("{ngpa:048b}");
    let mut table = spptp;
    for level in 0..4 {
        let index = u64::from_str_radix(&text[9 * level..9 * level + 9], 2).unwrap();
        let bits: Vec<bool> =
            format!("{:064b}", entry(l2, table + 8 * index)).chars().rev().map(|c| c == '1').collect();
        if level == 3 {
            let odd = bits.iter().skip(1).step_by(2).any(|bit| *bit);
            return if odd { Err(false) } else { Ok(bits.into_iter().step_by(2).collect()) };
        }
        if !bits[0] {
            return Err(true);
        }
        if (1..12).chain(WIDTH as usize..64).any(|n| bits[n]) {
            return Err(false);
        }
        table = entry(l2, table + 8 * index) & MEMORY;
    }
    unreachable!()
}

/// What a processor makes of an access with L2's tables alone.
fn bare(l2: &L2, role: Eptp, spptp: u64, address: u64, qualification: u64) -> End {
    let (page, size, rights, _) = match reference(l2, role.get() & !0xC00, address, true) {
        Said12::Nothing => return End::Violation(0),
        Said12::Wrong => return End::Misconfiguration,
        Said12::Page(page, size, rights, kind) => (page, size, rights, kind),
    };
    let target = page + address % size;
    let reached = if owned(target & !0xfff, KIB4) { End::Done(target) } else { End::Misconfiguration };
    if rights & qualification & 7 == qualification & 7 {
        return reached;
    }
    let has_bit = size == KIB4 && l2.get(leaf_place(address)) & SUB_PAGES != 0;
    let by_linear_address = qualification & W != 0 && qualification >> 7 & 3 == 3;
    if !role.sub_pages() || !has_bit || !by_linear_address || rights & 3 != R {
        return End::Violation(rights);
    }
    match permissions(l2, spptp, address) {
        Err(miss) => End::Event { miss },
        Ok(bits) if bits[(address % KIB4 / PIECE) as usize] => reached,
        Ok(_) => End::Violation(rights),
    }
}

use ept_model::Said as Said12;

/// The tables of ept12 for an address, below the root: a chain for each of the two entries of the PML4 table.
fn chain(address: u64) -> [u64; 3] {
    let first = ROOT + if address >> 39 == 0 { 0x1000 } else { 0x5000 };
    // Two page tables below the first page directory.
    [first, first + 0x1000, first + if address >> 21 & 511 == 0 { 0x2000 } else { 0x3000 }]
}

/// Where the leaf for an address lies.
fn leaf_place(address: u64) -> u64 {
    chain(address)[2] + (address >> 12 & 511) * 8
}

struct Machine {
    l2: L2,
    frames: Frames,
    ept: Ept02<3, RESERVE>,
    /// By root of ept02 and page: the leaf that the processor has cached, and the word of permissions.
    leaves: HashMap<(u64, u64), u64>,
    words: HashMap<(u64, u64), u64>,
    /// By root and 2 MiB: the last table of permissions.
    tables: HashMap<(u64, u64), u64>,
    /// L2's own map, where nvmx watches ept12.
    watching: Option<Watching>,
}

impl Machine {
    fn new(budget: u32, splits: u32) -> Self {
        let mut l2 = L2::default();
        for address in PAGES {
            let [pdpt, pd, pt] = chain(address);
            l2.set(ROOT, address >> 39, pdpt | 7);
            l2.set(pdpt, address >> 30 & 511, pd | 7);
            l2.set(pd, address >> 21 & 511, pt | 7);
            l2.set(pt, address >> 12 & 511, (DATA + address % (1 << 30)) | WB | R | SUB_PAGES);
        }
        let mut frames = Frames::new(2000);
        let mut ept = Ept02::new(rules(), true, budget, &mut frames).unwrap();
        let watching = (splits > 0).then(|| Watching::new(LOG, &mut frames));
        if splits > 0 {
            ept.watch_tables(splits);
        }
        Self { l2, frames, ept, leaves: HashMap::new(), words: HashMap::new(), tables: HashMap::new(), watching }
    }

    fn invept(&mut self, root: u64) {
        self.leaves.retain(|(of, _), _| *of != root);
        self.words.retain(|(of, _), _| *of != root);
        self.tables.retain(|(of, _), _| *of != root);
    }

    /// What L2 changed went through ept01.
    fn make(&mut self, change: &Change) {
        let before = self.l2.words.borrow().clone();
        change.make(&mut self.l2);
        let Some(watching) = &mut self.watching else { return };
        for (at, word) in self.l2.words.borrow().iter().filter(|(at, word)| before.get(at) != Some(word)) {
            let _ = word;
            watching.write(*at, &mut self.frames);
        }
    }

    /// The entry of ept02 for a page, walked by the processor.
    fn leaf02(&mut self, root: u64, address: u64) -> u64 {
        if let Some(leaf) = self.leaves.get(&(root, address >> 12)) {
            return *leaf;
        }
        let mut table = root;
        for shift in [39, 30, 21, 12] {
            let entry = self.frames.read(Hpa::new(table + (address >> shift & 511) * 8));
            if entry & 7 == 0 {
                return 0;
            }
            if shift == 12 {
                self.leaves.insert((root, address >> 12), entry);
                return entry;
            }
            assert_eq!(entry & LARGE, 0, "ept12 has no large pages");
            table = entry & MEMORY;
        }
        unreachable!()
    }

    /// The word of permissions, by spp02, or whether a table is missing.
    fn word02(&mut self, root: u64, spptp02: u64, address: u64) -> Result<u64, bool> {
        if let Some(word) = self.words.get(&(root, address >> 12)) {
            return Ok(*word);
        }
        let cached = self.tables.get(&(root, address >> 21)).copied();
        let mut table = cached.unwrap_or(spptp02);
        for shift in [39, 30, 21].into_iter().filter(|_| cached.is_none()) {
            let entry = self.frames.read(Hpa::new(table + (address >> shift & 511) * 8));
            if entry & 1 == 0 {
                return Err(true);
            }
            assert_eq!(entry & !MEMORY, 1, "nothing in spp02 is wrong");
            table = entry & MEMORY;
        }
        assert!(owned(table, KIB4), "spp02 references L2's memory alone");
        self.tables.insert((root, address >> 21), table);
        let word = self.l2.get(table + (address >> 12 & 511) * 8);
        if word & !ALL != 0 {
            return Err(false);
        }
        self.words.insert((root, address >> 12), word);
        Ok(word)
    }

    /// An access of L3, until L2 sees something or it is done.
    fn access(&mut self, role: Eptp, spptp: u64, address: u64, qualification: u64, log: &mut Option<PageLog>) -> End {
        let mut spptp02 = None;
        for attempt in 0..8 {
            let ept01 = self.watching.as_mut().filter(|_| attempt == 0).map(|watching| &mut watching.ept01);
            let activation = self.ept.activate(role, &self.l2, ept01, &mut self.frames);
            let root = activation.eptp02.ep4ta();
            if activation.invept {
                self.invept(root);
            }
            if let Some(watching) = self.watching.as_mut().filter(|_| activation.invept01) {
                watching.cached.clear();
            }
            // As an entry does, and no return to L3.
            if attempt == 0 && role.sub_pages() {
                let sub_pages = self.ept.sub_pages(Gpa::new(spptp), &mut self.frames).expect("the reserve suffices");
                if sub_pages.invept {
                    self.invept(root);
                }
                spptp02 = Some(sub_pages.spptp02.get());
            }
            let leaf = self.leaf02(root, address);
            let rights = leaf & 7;
            let reached = End::Done((leaf & MEMORY) + address % KIB4);
            if qualification & 7 & !rights == 0 {
                return reached;
            }
            let mut ended = None;
            if let (true, Some(spptp02)) = (leaf & SUB_PAGES != 0, spptp02) {
                assert_eq!(rights & 3, R, "the bit stands in leaves that can be read and not be written");
                if qualification & W != 0 && qualification >> 7 & 3 == 3 {
                    ended = Some(self.word02(root, spptp02, address));
                }
            }
            let (ngpa, before) = (Ngpa::new(address), Qualification::from_bits_retain(qualification));
            let outcome = match ended {
                Some(Ok(word)) if word >> (2 * (address % KIB4 / PIECE)) & 1 != 0 => return reached,
                Some(Err(miss)) => {
                    let told = Qualification::from_bits_retain(u64::from(miss) << 11);
                    self.ept.sub_page_event(role, ngpa, told, &self.l2, &mut self.frames)
                }
                _ => {
                    self.leaves.remove(&(root, address >> 12));
                    self.words.remove(&(root, address >> 12));
                    let refilled = self.ept.refill(role, ngpa, before, &self.l2, &mut self.frames);
                    refilled.unwrap_or_else(|| {
                        self.ept.violation(role, ngpa, before, log.as_mut(), &self.l2, &mut self.frames)
                    })
                }
            };
            match outcome {
                Outcome::Filled => {}
                Outcome::ReflectViolation { qualification: told, .. } => {
                    assert_eq!(told.bits() & 7, qualification & 7);
                    return End::Violation(told.bits() >> 3 & 7);
                }
                Outcome::ReflectMisconfig | Outcome::Forbidden { .. } => return End::Misconfiguration,
                Outcome::ReflectSubPageEvent { qualification } => {
                    assert_eq!(qualification.bits() & !(1 << 11), 0);
                    return End::Event { miss: qualification.bits() != 0 };
                }
                Outcome::ReflectLogFull => panic!("the log has room"),
            }
        }
        panic!("L3 does not get past its access");
    }
}

/// What L2 changes.
#[derive(Clone, Debug)]
pub enum Change {
    /// The rights, the bit of sub-pages and the flags of a leaf, and where it leads: to its page, or to nvmx.
    Leaf { page: usize, bits: u64, own: bool },
    /// The rights of the entry above the page table.
    Upper { page: usize, rights: u64 },
    /// An entry of spp12 for a page, in any of its tables.
    Spp { table: u64, level: u32, page: usize, entry: u64 },
}

fn change() -> impl Strategy<Value = Change> {
    let page = 0..PAGES.len();
    let rights = prop::sample::select(vec![R, R, R, R | X, R | W, 7, X, 0]);
    let flags = prop::sample::select(vec![0, 0, ACCESSED, ACCESSED | DIRTY, DIRTY]);
    let sub_pages = prop::sample::select(vec![SUB_PAGES, SUB_PAGES, SUB_PAGES, 0]);
    let leaf = (page.clone(), rights, flags, sub_pages, prop::bool::weighted(0.05))
        .prop_map(|(page, rights, flags, sub_pages, own)| Change::Leaf { page, bits: rights | flags | sub_pages, own });
    let upper = (page.clone(), prop::sample::select(vec![7, 7, 7, R | X, R]))
        .prop_map(|(page, rights)| Change::Upper { page, rights });
    let reference =
        (0..TABLES, prop::sample::select(vec![1, 1, 1, 1, 1, 1, 0, 3, 1 | 1 << 11, 1 | 1 << 62, 1 | 1 << WIDTH]));
    let entry = prop_oneof![
        8 => reference.prop_map(|(table, bits)| (SPP + table * KIB4) | bits),
        1 => Just(OWN.0 | 1),
        6 => any::<u64>().prop_map(|bits| bits & ALL),
        1 => any::<u64>(),
        2 => Just(ALL),
    ];
    let spp = (0..TABLES, 0..4u32, page, entry).prop_map(|(table, level, page, entry)| Change::Spp {
        table,
        level,
        page,
        entry,
    });
    prop_oneof![3 => leaf, 1 => upper, 8 => spp]
}

impl Change {
    fn make(&self, l2: &mut L2) {
        match *self {
            Change::Leaf { page, bits, own } => {
                let place = leaf_place(PAGES[page]);
                let leads = if own { OWN.0 } else { DATA + PAGES[page] % (1 << 30) };
                l2.set(place, 0, leads | WB | bits);
            }
            Change::Upper { page, rights } => {
                let [_, pd, pt] = chain(PAGES[page]);
                l2.set(pd, PAGES[page] >> 21 & 511, pt | rights | ACCESSED);
            }
            Change::Spp { table, level, page, entry } => {
                l2.set(SPP + table * KIB4, PAGES[page] >> (12 + 9 * level) & 511, entry);
            }
        }
    }
}

/// A table that has each page, with these words.
fn whole_table(l2: &mut L2, word: u64) {
    for page in PAGES {
        let high = u64::from(page >> 39 != 0);
        let tables = [0, 2 + high, 4 + high, 6 + high].map(|n| SPP + n * KIB4);
        for level in 0..3 {
            l2.set(tables[level], page >> (39 - 9 * level) & 511, tables[level + 1] | 1);
        }
        l2.set(tables[3], page >> 12 & 511, word);
    }
}

#[derive(Clone, Debug)]
pub enum Step {
    /// L2 changes something and executes INVEPT, of all contexts or of one.
    Change(Vec<Change>, bool),
    /// L3 accesses a byte of a page, under a role and a table.
    Access { page: usize, piece: u64, access: usize, flags: bool, sub_pages: bool, second: bool },
    /// L2, which saw an exit for the last access, gives the page a leaf or spp12 an entry for it, and L3 tries again.
    Again(Change),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let access =
        (0..PAGES.len(), 0..KIB4 / 8, 0..ACCESSES.len() + 4, any::<bool>(), prop::bool::weighted(0.85), any::<bool>())
            .prop_map(|(page, piece, access, flags, sub_pages, second)| {
                // Most are plain writes.
                let access = if access < ACCESSES.len() { access } else { 1 };
                Step::Access { page, piece, access, flags, sub_pages, second }
            });
    let changes =
        (prop::collection::vec(change(), 1..4), any::<bool>()).prop_map(|(all, whole)| Step::Change(all, whole));
    prop::collection::vec(prop_oneof![8 => access, 3 => changes, 3 => change().prop_map(Step::Again)], 1..60)
}

/// L2's memory with the flags that an access sets.
fn after(l2: &L2, role: Eptp, address: u64, end: End, qualification: u64) -> HashMap<u64, u64> {
    let words = l2.words.borrow().clone();
    let done = matches!(end, End::Done(_));
    let flags = role.accessed_dirty() && done;
    if flags { marked(words, role.get() & !0xC00, address, qualification & W != 0) } else { words }
}

/// Takes these steps, with a budget of tables, and where ept12 is watched with so many pieces of large pages; panics where an access comes
/// to something else than L2's tables say.
pub fn run(steps: &[Step], budget: u32, splits: u32) {
    let mut m = Machine::new(budget, splits);
    whole_table(&mut m.l2, ALL);
    let mut last = None;
    for step in steps {
        match step {
            Step::Change(changes, all) => {
                changes.iter().for_each(|change| m.make(change));
                if *all {
                    m.ept.invept_all()
                } else {
                    m.ept.invept_single(Eptp::new(ROOT | 0x1e))
                }
                last = None;
            }
            Step::Access { page, piece, access, flags, sub_pages, second } => {
                let role = role(*flags, *sub_pages);
                let (address, spptp) = (PAGES[*page] + piece * 8, SPP + u64::from(*second) * KIB4);
                last = try_access(&mut m, role, spptp, *page, address, ACCESSES[*access]);
            }
            Step::Again(change) => {
                let Some((role, spptp, page, address, qualification)) = last else { continue };
                let fits = match change {
                    Change::Leaf { page: of, .. } | Change::Spp { page: of, .. } => *of == page,
                    Change::Upper { .. } => false,
                };
                if fits {
                    m.make(change);
                    last = try_access(&mut m, role, spptp, page, address, qualification);
                    // Of other pages and other roles L2 does not know before it executes INVEPT.
                    m.ept.invept_all();
                }
            }
        }
    }
    m.ept.forget_all(&mut m.frames);
    let of_ept01 = m.watching.as_ref().map_or(0, |watching| watching.ept01.tables() as usize);
    assert_eq!(m.frames.used.len(), 1 + RESERVE + of_ept01, "a root and the reserve are what is left");
}

type Tried = (Eptp, u64, usize, u64, u64);

/// An access; what was tried if L2 sees it.
fn try_access(m: &mut Machine, role: Eptp, spptp: u64, page: usize, address: u64, qualification: u64) -> Option<Tried> {
    let expected = bare(&m.l2, role, spptp, address, qualification);
    let words = after(&m.l2, role, address, expected, qualification);
    let end = m.access(role, spptp, address, qualification, &mut None);
    assert_eq!(end, expected, "{role:x?} {spptp:#x} {address:#x} {qualification:#x}");
    // A page that is not L2's is found after the flags are set.
    if end != End::Misconfiguration {
        assert_eq!(*m.l2.words.borrow(), words, "the flags of an access that came to {end:?}");
    }
    (!matches!(end, End::Done(_))).then_some((role, spptp, page, address, qualification))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn accesses_come_to_what_l2s_tables_say(steps in steps()) {
        run(&steps, 40, 0);
    }

    #[test]
    fn the_same_where_ept12_is_watched(steps in steps()) {
        run(&steps, 40, 100);
    }

    #[test]
    fn the_same_with_the_fewest_frames(steps in steps()) {
        run(&steps, 0, 0);
    }
}

#[test]
fn each_sub_page_has_its_own_bit_and_an_access_to_several_needs_all() {
    let mut l2 = L2::default();
    for piece in 0..32 {
        whole_table(&mut l2, 1 << (2 * piece));
        for at in (0..KIB4).step_by(8) {
            for bytes in [1, 2, 8, 64, 128, 256] {
                let said = look_up(Gpa::new(SPP), Ngpa::new(PAGES[1] + at), &l2);
                let covers = (at..at + bytes).all(|byte| byte / PIECE == piece);
                assert_eq!(said.allows(Ngpa::new(PAGES[1] + at), bytes), covers, "{piece} {at:#x} {bytes}");
            }
        }
    }
    whole_table(&mut l2, ALL);
    let said = look_up(Gpa::new(SPP), Ngpa::new(PAGES[4]), &l2);
    assert!(matches!(said, Said::Page { bits: ALL, .. }), "{said:?}");
    assert!(said.allows(Ngpa::new(PAGES[4] + 8), KIB4 - 8), "the rest of the page");
    assert!(!said.allows(Ngpa::new(PAGES[4] + 8), KIB4), "no page beside it");
    assert!(!Said::Miss.allows(Ngpa::new(0), 1) && !Said::Misconfigured.allows(Ngpa::new(0), 1));
}

#[test]
fn a_table_above_48_bits_is_nobodys() {
    let mut m = Machine::new(20, 0);
    whole_table(&mut m.l2, ALL);
    // Five levels whose first entries all lead the same way.
    let top = 0x50_0000;
    m.l2.set(top, 0, ROOT | 7);
    m.l2.set(top, 1, ROOT | 7);
    let role = Eptp::new(top | 0x26).under(SecondaryControls::SUB_PAGE_WRITE_PERMISSIONS);
    for (address, allowed) in [(PAGES[0], true), (1 << 48 | PAGES[0], false)] {
        let write = Qualification::from_bits_retain(W | 3 << 7);
        let _ = m.ept.activate(role, &m.l2, None, &mut m.frames);
        let _ = m.ept.sub_pages(Gpa::new(SPP), &mut m.frames);
        let outcome = m.ept.violation(role, Ngpa::new(address), write, None, &m.l2, &mut m.frames);
        assert_eq!(outcome == Outcome::Filled, allowed, "{address:#x} {outcome:?}");
    }
}

#[test]
fn a_write_that_the_processor_refuses_all_the_same_is_l2s() {
    let mut m = Machine::new(20, 0);
    whole_table(&mut m.l2, ALL);
    let (role, write) = (role(false, true), W | 3 << 7);
    assert!(matches!(m.access(role, SPP, PAGES[0], write, &mut None), End::Done(_)));
    let told = Qualification::from_bits_retain(write);
    let outcome = m.ept.violation(role, Ngpa::new(PAGES[0]), told, None, &m.l2, &mut m.frames);
    assert!(
        matches!(outcome, Outcome::ReflectViolation { qualification, .. } if qualification.bits() == write | R << 3)
    );
}

#[test]
fn a_write_to_a_clean_page_is_logged_once_and_not_if_it_is_refused() {
    for (word, logged) in [(ALL, 1), (0, 0), (2, 0)] {
        let mut m = Machine::new(20, 0);
        whole_table(&mut m.l2, word);
        let mut log = Some(PageLog { address: Gpa::new(LOG), index: 511 });
        for _ in 0..3 {
            let _ = m.access(role(true, true), SPP, PAGES[1] + 8, W | 3 << 7, &mut log);
        }
        assert_eq!(511 - log.unwrap().index, logged, "{word:#x}");
        assert_eq!(m.l2.get(LOG + 511 * 8), if logged == 1 { PAGES[1] } else { 0 });
        let mut full = PageLog { address: Gpa::new(LOG), index: 0xFFFF };
        let write = Qualification::from_bits_retain(W | 3 << 7);
        let outcome =
            m.ept.violation(role(true, true), Ngpa::new(PAGES[2]), write, Some(&mut full), &m.l2, &mut m.frames);
        assert_eq!(outcome == Outcome::ReflectLogFull, logged == 1, "{outcome:?}");
    }
}

#[test]
fn what_l3_writes_by_a_sub_page_into_ept12_is_seen() {
    let mut m = Machine::new(40, 100);
    whole_table(&mut m.l2, ALL);
    let (role, write, pt) = (role(false, true), W | 3 << 7, chain(PAGES[0])[2]);
    // The page leads to the page table that maps it.
    m.l2.set(leaf_place(PAGES[1]), 0, pt | WB | R | SUB_PAGES);
    let read = |m: &mut Machine| m.access(role, SPP, PAGES[0], R | 3 << 7, &mut None);
    // L2 executes INVEPT until each table is watched that can be.
    for _ in 0..3 {
        assert!(matches!(read(&mut m), End::Done(_)));
        m.ept.invept_all();
    }
    let index = PAGES[0] >> 12 & 511;
    assert_eq!(m.access(role, SPP, PAGES[1] + index * 8, write, &mut None), End::Done(pt + index * 8));
    m.ept.invept_all();
    assert!(matches!(read(&mut m), End::Done(_)));
    m.l2.set(pt, index, 0);
    m.ept.invept_all();
    assert_eq!(read(&mut m), End::Violation(0));
}

/// L2's entry above the last table for the first page leads to another one, which denies all.
fn move_table(m: &mut Machine) {
    let other = SPP + 7 * KIB4;
    m.l2.set(other, PAGES[0] >> 12 & 511, 0);
    m.l2.set(SPP + 4 * KIB4, PAGES[0] >> 21 & 511, other | 1);
}

#[test]
fn another_table_of_permissions_counts_after_invept_where_ept12_was_not_written() {
    for splits in [0, 100] {
        let mut m = Machine::new(40, splits);
        whole_table(&mut m.l2, ALL);
        let write = |m: &mut Machine| m.access(role(false, true), SPP, PAGES[0], W | 3 << 7, &mut None);
        for _ in 0..4 {
            assert!(matches!(write(&mut m), End::Done(_)));
            m.ept.invept_all();
        }
        move_table(&mut m);
        m.ept.invept_single(Eptp::new(ROOT | 0x1e));
        assert_eq!(write(&mut m), End::Violation(R), "{splits}");
    }
}

#[test]
fn another_table_of_permissions_counts_behind_a_violation() {
    let mut m = Machine::new(40, 0);
    whole_table(&mut m.l2, 1);
    let write = |m: &mut Machine, at: u64| m.access(role(false, true), SPP, PAGES[0] + at, W | 3 << 7, &mut None);
    assert!(matches!(write(&mut m, 0), End::Done(_)));
    assert_eq!(write(&mut m, PIECE), End::Violation(R));
    m.l2.set(SPP + 7 * KIB4, PAGES[0] >> 12 & 511, 1 << 2);
    m.l2.set(SPP + 4 * KIB4, PAGES[0] >> 21 & 511, (SPP + 7 * KIB4) | 1);
    assert!(matches!(write(&mut m, PIECE), End::Done(_)));
    assert_eq!(write(&mut m, 0), End::Violation(R));
}
