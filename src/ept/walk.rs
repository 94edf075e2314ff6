//! The walker: one for every EPT, whoever owns the tables.
//!
//! Source: Intel SDM vol. 3C (December 2024), "EPT Translation Mechanism" and "Prioritization of EPT Misconfigurations
//! and EPT Violations": an entry that is not present ends the walk with a violation, one that is present but wrong with
//! a misconfiguration; rights are looked at when the page is found.

use super::entry::{Caching, EptRules, Level, Meaning, Misconfig, Rights, decode};
use super::{GuestView, NotOwned, TableFrames};
use crate::addr::{Gpa, Hpa};
use core::convert::Infallible;

/// An address in the space that a table's entries point into.
pub trait TableAddress: Copy {
    /// Wraps a raw value.
    fn from_raw(raw: u64) -> Self;
    /// The raw value.
    fn raw(self) -> u64;
}

macro_rules! table_address {
    ($($name:ty),*) => { $(
        impl TableAddress for $name {
            #[inline]
            fn from_raw(raw: u64) -> Self { Self::new(raw) }
            #[inline]
            fn raw(self) -> u64 { self.get() }
        }
    )* };
}
table_address!(Gpa, Hpa);

/// Where the walker gets entries from. It asks for each entry once.
pub trait TableReader {
    /// The space that tables and pages lie in.
    type Address: TableAddress;
    /// Why an entry cannot be read.
    type Error;
    /// Reads the entry at this address.
    fn read(&mut self, entry: Self::Address) -> Result<u64, Self::Error>;
}

/// Reads ept12 in L2's memory.
pub struct GuestTables<'a, G>(pub &'a G);

impl<G: GuestView> TableReader for GuestTables<'_, G> {
    type Address = Gpa;
    type Error = NotOwned;
    #[inline]
    fn read(&mut self, entry: Gpa) -> Result<u64, NotOwned> {
        self.0.read_entry(entry)
    }
}

/// Reads nvmx's own tables.
pub struct OwnTables<'a, F>(pub &'a F);

impl<F: TableFrames> TableReader for OwnTables<'_, F> {
    type Address = Hpa;
    type Error = Infallible;
    #[inline]
    fn read(&mut self, entry: Hpa) -> Result<u64, Infallible> {
        Ok(self.0.read(entry))
    }
}

/// The page that an address lies in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf<A> {
    /// Where the page starts.
    pub page: A,
    /// The table its entry lies in, hence its size.
    pub level: Level,
    /// The entry itself lies here.
    pub entry: A,
    /// Rights, ANDed over all entries of the walk.
    pub rights: Rights,
    /// Rights, ANDed over the entries above the leaf.
    pub upper: Rights,
    /// Memory type of the page.
    pub caching: Caching,
}

/// What a walk came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Walk<A, E> {
    /// A page; whether its rights allow the access is for the caller to see.
    Leaf(Leaf<A>),
    /// No page: an entry at this level is not present. It takes part in the AND of rights, which is therefore empty.
    NotPresent(Level),
    /// An entry at this level breaks a rule.
    Misconfigured(Level, Misconfig),
    /// A table cannot be read.
    Unreadable(E),
}

impl<A, E> Walk<A, E> {
    /// The page, if there is one.
    #[inline(always)]
    pub fn leaf(self) -> Option<Leaf<A>> {
        match self {
            Walk::Leaf(leaf) => Some(leaf),
            Walk::NotPresent(_) | Walk::Misconfigured(..) | Walk::Unreadable(_) => None,
        }
    }
}

/// Walks from the table `root`, which is one of level `top`, to the page of `address`. An address of more than 48 bits has no
/// translation by four levels, and one of more than 57 none by five, whatever the tables say.
#[inline(always)] // Returned in memory it would cost a caller as much as a level.
pub fn walk<R: TableReader>(
    reader: &mut R,
    (root, top): (R::Address, Level),
    address: u64,
    rules: &EptRules,
) -> Walk<R::Address, R::Error> {
    let (mut table, mut rights) = (root.raw(), rules.all_rights());
    if top == Level::Pml5 {
        match fifth_level(reader, root, address, rules) {
            Ok((pml4, granted)) => (table, rights) = (pml4, granted),
            Err(end) => return end,
        }
    } else if !Level::Pml4.reaches(address) {
        return Walk::NotPresent(Level::Pml4);
    }
    // A loop over a constant: unrolled, so that the level is known in each step.
    for level in [Level::Pml4, Level::Pdpt, Level::Pd, Level::Pt] {
        let at = R::Address::from_raw(table | level.entry_offset(address));
        let entry = match reader.read(at) {
            Ok(entry) => entry,
            Err(error) => return Walk::Unreadable(error),
        };
        let upper = rights;
        rights = upper.intersection(Rights::of(entry));
        match decode(entry, level, rules) {
            Meaning::Table(next) => table = next,
            Meaning::Leaf { address, caching } => {
                let page = R::Address::from_raw(address);
                return Walk::Leaf(Leaf { page, level, entry: at, rights, upper, caching });
            }
            Meaning::NotPresent => return Walk::NotPresent(level),
            Meaning::Misconfigured(rule) => return Walk::Misconfigured(level, rule),
        }
    }
    // Not reached: no entry of a page table references a table.
    Walk::NotPresent(Level::Pt)
}

/// The PML4 table that a PML5 table leads to, and the rights that its entry grants; or how the walk ends.
#[cold]
#[inline(never)]
#[allow(clippy::type_complexity)]
fn fifth_level<R: TableReader>(
    reader: &mut R,
    pml5: R::Address,
    address: u64,
    rules: &EptRules,
) -> Result<(u64, Rights), Walk<R::Address, R::Error>> {
    const TOP: Level = Level::Pml5;
    if !TOP.reaches(address) {
        return Err(Walk::NotPresent(TOP));
    }
    let at = R::Address::from_raw(pml5.raw() | TOP.entry_offset(address));
    let entry = reader.read(at).map_err(Walk::Unreadable)?;
    match decode(entry, TOP, rules) {
        Meaning::Table(next) => Ok((next, rules.all_rights() & Rights::of(entry))),
        Meaning::Misconfigured(rule) => Err(Walk::Misconfigured(TOP, rule)),
        Meaning::NotPresent | Meaning::Leaf { .. } => Err(Walk::NotPresent(TOP)),
    }
}
