//! The roots of ept02, kept across EPTP switches.
//!
//! A root's role is the whole of eptp12, attribute bits included: nothing is shared between roles. Each table hangs in
//! exactly one place of exactly one tree, and the only handles to tables are entries of that tree, so there is no
//! reference that could go stale and nothing to count. Memory is bounded: when frames run out, other roots lose their
//! contents, the one longest out of use first; then the own root does. Roots are made as L2 uses EPTPs, up to a bound; the
//! frame of one is freed only when L2 leaves VMX operation.
//!
//! [`Ept02::activate`] is the only door to a VM entry. What L2 invalidated is compared with ept12 there, and whatever the
//! processor must forget before it may use a root again is noted with the root and paid there: once, however often L2
//! asked for it. One `Ept02` belongs to one processor.
//!
//! Source: Intel SDM vol. 3C (December 2024), "Invalidating Cached Translation Information", "Operations that
//! Invalidate Cached Mappings", "Guidelines for Use of the INVEPT Instruction".

use super::entry::{self, EptRules, Level};
use super::eptp::Eptp;
use super::exposed::Exposed;
use super::identity::Ept01;
use super::origin::{Origin, Origins, Tables};
use super::reserve::Reserve;
use super::run::Run;
use super::sub_page_table::Spp02;
use super::{GuestView, OutOfFrames, TableFrames};
use crate::addr::{Gpa, Hpa};

/// What to run L3 with.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Activation {
    /// The EPTP for vmcs02.
    pub eptp02: Eptp,
    /// Execute INVEPT, single-context with `eptp02`, before the VM entry.
    pub invept: bool,
    /// Execute INVEPT, single-context with the EPTP of ept01, before L2 runs again: so each write of L2 sets its flag.
    pub invept01: bool,
}

/// Counters of ept02.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Leaves written.
    pub fills: u64,
    /// Roots whose contents must be compared with ept12 because L2 executed INVEPT.
    pub flushes: u64,
    /// Roots that lost their contents, or their role, for want of memory or of roots.
    pub evictions: u64,
    /// INVEPTs that [`Ept02::activate`] asked for.
    pub invepts: u64,
}

/// One composed EPT.
#[derive(Debug)]
pub(super) struct Root {
    pub(super) role: Option<Eptp>,
    pub(super) table: Hpa,
    /// What vmcs02 runs on, for the role.
    eptp02: Eptp,
    /// Tables below the root table, and those of `spp`.
    pub(super) tables: Tables,
    /// The table of sub-page write permissions, if the role has them.
    pub(super) spp: Option<Spp02>,
    /// The record of the root table; 0 if there is none.
    pub(super) record: u16,
    /// The round of ept01's watches, and the growths of what is exposed, that its records know.
    pub(super) known: (u64, u64),
    /// L2 invalidated the contents: they must not be used again before they were compared with ept12.
    pub(super) stale: bool,
    /// The processor may have cached something that is no longer in the tables.
    pub(super) invept: bool,
    last_used: u64,
}

impl Root {
    const fn new(table: Hpa) -> Self {
        // The frame may have been a root before, under an earlier owner: `invept`.
        Self {
            role: None,
            table,
            eptp02: Eptp::new(0),
            tables: Tables::new(),
            spp: None,
            record: 0,
            known: (0, 0),
            stale: false,
            invept: true,
            last_used: 0,
        }
    }

    /// The level of the root table, as the role has it.
    #[inline(always)]
    pub(super) const fn top(&self) -> Level {
        self.eptp02.top()
    }

    /// What is in it was invalidated: whether there was anything.
    #[inline]
    const fn invalidate(&mut self) -> bool {
        // The processor does not cache what is not present, so an empty root owes nothing new.
        let invalidated = self.tables.count > 0 && !self.stale && self.role.is_some();
        self.stale |= invalidated;
        invalidated
    }
}

/// What is left of a table of sub-page write permissions.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// Its first table, empty.
    First,
    /// Nothing.
    Nothing,
}

impl Root {
    /// Frees the tables of sub-page write permissions.
    #[cold]
    pub(super) fn drop_sub_pages<const N: usize, F: TableFrames>(
        &mut self,
        keep: Keep,
        reserve: &mut Reserve<N>,
        frames: &mut F,
    ) {
        let Some(spp) = &mut self.spp else { return };
        self.tables.count = self.tables.count.saturating_sub(spp.tables());
        spp.clear(reserve, frames);
        if keep == Keep::First {
            self.tables.count += spp.tables();
        } else {
            reserve.free(spp.table, frames);
            self.spp = None;
        }
    }
}

/// No root.
const NONE: u8 = u8::MAX;
/// A power of two.
const CHAINS: usize = 128;
/// A power of two.
const HINTS: usize = 128;

/// The place of a role among the hints: Fibonacci hashing of the address and the attributes.
#[inline(always)]
fn hint(role: Eptp) -> usize {
    const SHIFT: u32 = u64::BITS - HINTS.ilog2();
    (role.get().wrapping_mul(0x9E37_79B9_7F4A_7C15) >> SHIFT) as usize % HINTS
}

/// The chain of an EP4TA.
#[inline(always)]
fn chain(role: Eptp) -> usize {
    const SHIFT: u32 = u64::BITS - CHAINS.ilog2();
    (role.ep4ta().wrapping_mul(0x9E37_79B9_7F4A_7C15) >> SHIFT) as usize % CHAINS
}

/// The composed EPTs of one processor: at most `ROOTS`, with `RESERVE` frames of their own.
///
/// `RESERVE` bounds from below what the running root can hold. It must suffice for every page that one instruction of
/// L3 touches at a time, page walks and event delivery included, or L3 would not get past it.
#[derive(Debug)]
pub struct Ept02<const ROOTS: usize = 64, const RESERVE: usize = 128> {
    pub(super) rules: EptRules,
    pub(super) advanced_information: bool,
    /// Those from `made` on have no frame yet.
    pub(super) roots: [Root; ROOTS],
    /// At least one.
    made: usize,
    /// The roots by a hash of their EP4TA, and for each the next with the same hash; `NONE` ends a chain. INVEPT looks here.
    chains: [u8; CHAINS],
    further: [u8; ROOTS],
    /// Where a role was found last, by a hash of it: most searches need one look.
    hints: [u8; HINTS],
    pub(super) reserve: Reserve<RESERVE>,
    pub(super) stats: Stats,
    /// What the tables were composed of.
    pub(super) origins: Origins,
    /// Pages whose writes ept01 does not see.
    pub(super) exposed: Exposed,
    /// Tables by which ept01 may grow for the sake of watches.
    pub(super) splits: u32,
    /// Where the last fill was; its root is not stale and has the table still.
    pub(super) run: Option<Run>,
    current: usize,
    clock: u64,
    /// How often a root got another role.
    moves: u64,
}

impl<const ROOTS: usize, const RESERVE: usize> Ept02<ROOTS, RESERVE> {
    /// Takes `RESERVE + 1` frames from the pool, and later at most `budget + ROOTS - 1` more at a time.
    ///
    /// `rules` are those of the processor that L2 sees (they decide what is a misconfiguration in ept12);
    /// `advanced_information` says whether it was shown "advanced VM-exit information for EPT violations".
    pub fn new<F: TableFrames>(
        rules: EptRules,
        advanced_information: bool,
        budget: u32,
        frames: &mut F,
    ) -> Result<Self, OutOfFrames> {
        const { assert!(ROOTS > 0 && ROOTS < NONE as usize, "there must be a root to run on, and hints are bytes") };
        const {
            assert!(RESERVE >= 3, "one page needs up to three tables below a root of four levels, and one more of five")
        };
        let first = frames.alloc().ok_or(OutOfFrames)?;
        let reserve = Reserve::new(budget, frames).inspect_err(|_| frames.free(first))?;
        let mut roots = [const { Root::new(Hpa::new(0)) }; ROOTS];
        roots[0].table = first;
        Ok(Self {
            rules,
            advanced_information,
            roots,
            made: 1,
            chains: [NONE; CHAINS],
            further: [NONE; ROOTS],
            hints: [0; HINTS],
            reserve,
            stats: Stats::default(),
            origins: Origins::default(),
            exposed: Exposed::default(),
            splits: 0,
            run: None,
            current: 0,
            clock: 0,
            moves: 0,
        })
    }

    /// From now on, what was not written in ept12 is not compared after an INVEPT: for as long as this processor is the only
    /// one that runs L2, and [`Ept02::activate`] gets its ept01. `splits` is by how many tables ept01 may grow for that. To be
    /// called before anything is composed.
    pub const fn watch_tables(&mut self, splits: u32) {
        self.splits = splits;
    }

    /// L2 lets the processor write to a page of its memory by an address that is not translated.
    pub fn expose<F: TableFrames>(&mut self, page: Gpa, frames: &mut F) {
        if self.splits > 0 && self.exposed.start(frames) {
            self.exposed.add_page(page.page().get(), frames);
        }
    }

    /// The EPTP to enter L3 with, for the EPTP that L2 set up. To be called before every VM entry into L3; costs a few
    /// instructions when nothing changed. Without `ept01` all is compared that L2 invalidated.
    #[inline]
    pub fn activate<G: GuestView, F: TableFrames>(
        &mut self,
        eptp12: Eptp,
        guest: &G,
        ept01: Option<&mut Ept01>,
        frames: &mut F,
    ) -> Activation {
        if let Some(eptp02) = self.ready(eptp12) {
            return Activation { eptp02, invept: false, invept01: false };
        }
        self.settle(eptp12, guest, ept01, frames)
    }

    /// What [`Ept02::activate`] would answer, if it has nothing to do. As long as [`Ept02::moves`] stays the answer is this or none.
    #[inline(always)]
    pub fn ready(&self, eptp12: Eptp) -> Option<Eptp> {
        let root = self.current();
        let ready = root.role == Some(eptp12) && !(root.stale | root.invept);
        ready.then_some(root.eptp02)
    }

    /// How often a root got another role, and so a role another EPTP.
    #[inline(always)]
    pub const fn moves(&self) -> u64 {
        self.moves
    }

    #[cold]
    fn settle<G: GuestView, F: TableFrames>(
        &mut self,
        eptp12: Eptp,
        guest: &G,
        ept01: Option<&mut Ept01>,
        frames: &mut F,
    ) -> Activation {
        let root = self.root(self.current);
        let mut invept01 = false;
        let index = if root.role == Some(eptp12) && !root.stale {
            self.current
        } else {
            self.switch(eptp12, guest, ept01, &mut invept01, frames)
        };
        let root = self.root(index);
        let invept = core::mem::take(&mut root.invept);
        let eptp02 = root.eptp02;
        self.stats.invepts += u64::from(invept);
        Activation { eptp02, invept, invept01 }
    }

    /// L2 executed single-context INVEPT: all roots with this EP4TA, whatever their attributes.
    pub fn invept_single(&mut self, eptp12: Eptp) {
        self.run = None;
        let mut flushes = 0;
        self.for_each_of(eptp12, |_, root| flushes += u64::from(root.invalidate()));
        self.stats.flushes += flushes;
    }

    /// All roots with the EP4TA of this one, and their roles.
    #[inline(always)]
    pub(super) fn for_each_of(&mut self, eptp12: Eptp, mut f: impl FnMut(Eptp, &mut Root)) {
        let mut index = self.chains[chain(eptp12)];
        while index != NONE {
            let root = self.root(index.into());
            if let Some(role) = root.role.filter(|role| role.ep4ta() == eptp12.ep4ta()) {
                f(role, root);
            }
            index = self.further[usize::from(index) % ROOTS];
        }
    }

    /// No other root has the EP4TA of this one, which has a root.
    #[inline(always)]
    pub(super) fn is_alone(&self, eptp12: Eptp) -> bool {
        let first = self.chains[chain(eptp12)];
        self.further[usize::from(first) % ROOTS] == NONE
    }

    /// L2 executed all-context INVEPT.
    pub fn invept_all(&mut self) {
        self.run = None;
        let flushes = self.in_use_mut().iter_mut().map(|root| u64::from(root.invalidate())).sum::<u64>();
        self.stats.flushes += flushes;
    }

    /// Drops every root and frees all but one, for example when L2 leaves VMX operation.
    pub fn forget_all<F: TableFrames>(&mut self, frames: &mut F) {
        self.origins.stop(frames);
        self.exposed.stop(frames);
        for index in 0..self.made {
            self.drop_contents(index, frames);
            self.roots[index % ROOTS].drop_sub_pages(Keep::Nothing, &mut self.reserve, frames);
            if index > 0 {
                frames.free(self.root(index).table);
                *self.root(index) = Root::new(Hpa::new(0));
            }
        }
        *self.root(0) = Root::new(self.root(0).table);
        self.moves += 1;
        (self.made, self.current) = (1, 0);
        self.chains = [NONE; CHAINS];
    }

    /// The counters.
    pub const fn stats(&self) -> Stats {
        self.stats
    }

    /// Tables in use below the roots.
    pub fn tables(&self) -> u32 {
        self.in_use().iter().map(|root| root.tables.count).sum()
    }

    /// The root that L3 runs on.
    pub(super) fn current(&self) -> &Root {
        &self.roots[self.current % ROOTS]
    }

    /// The same, and where its frames come from.
    pub(super) fn current_mut(&mut self) -> (&mut Root, &mut Reserve<RESERVE>) {
        (&mut self.roots[self.current % ROOTS], &mut self.reserve)
    }

    /// The root of this index; indexes are nvmx's own.
    #[inline]
    pub(super) fn root(&mut self, index: usize) -> &mut Root {
        &mut self.roots[index % ROOTS]
    }

    /// Makes the root of this role the current one, without stale contents, and returns its index.
    #[inline(always)]
    pub(super) fn enter<G: GuestView, F: TableFrames>(&mut self, role: Eptp, guest: &G, frames: &mut F) -> usize {
        let root = self.root(self.current);
        if root.role == Some(role) && !root.stale {
            return self.current;
        }
        self.switch(role, guest, None, &mut false, frames)
    }

    #[cold]
    fn switch<G: GuestView, F: TableFrames>(
        &mut self,
        role: Eptp,
        guest: &G,
        ept01: Option<&mut Ept01>,
        invept01: &mut bool,
        frames: &mut F,
    ) -> usize {
        let index = self.find(role).unwrap_or_else(|| self.take(role, frames));
        self.hints[hint(role)] = index as u8;
        if self.root(index).stale {
            *invept01 = self.validate(index, guest, ept01, frames);
        }
        self.clock += 1;
        let clock = self.clock;
        self.root(index).last_used = clock;
        self.current = index;
        index
    }

    /// The roots that have a frame.
    fn in_use(&self) -> &[Root] {
        &self.roots[..self.made.min(ROOTS)]
    }

    /// The same, to be changed.
    pub(super) fn in_use_mut(&mut self) -> &mut [Root] {
        &mut self.roots[..self.made.min(ROOTS)]
    }

    /// The root of a role.
    fn find(&self, role: Eptp) -> Option<usize> {
        let is_it = |root: &Root| root.role == Some(role);
        let hinted = usize::from(self.hints[hint(role)]);
        if self.in_use().get(hinted).is_some_and(is_it) { Some(hinted) } else { self.in_use().iter().position(is_it) }
    }

    /// A root for a new role: one without a role, a new one, or the one longest out of use.
    fn take<F: TableFrames>(&mut self, role: Eptp, frames: &mut F) -> usize {
        let free = self.in_use().iter().position(|root| root.role.is_none());
        let index = free.or_else(|| self.make_root(frames)).unwrap_or_else(|| {
            let oldest = self.in_use().iter().enumerate().min_by_key(|(_, root)| root.last_used);
            let oldest = oldest.map_or(0, |(index, _)| index);
            self.stats.evictions += 1;
            self.drop_contents(oldest, frames);
            oldest
        });
        // All that is composed has a record, or nothing has.
        let first = self.in_use().iter().all(|root| root.role.is_none());
        if first && self.splits > 0 && self.exposed.start(frames) {
            self.origins.start();
        }
        self.moves += 1;
        let root = self.root(index);
        root.eptp02 = Eptp::for_root(root.table, role);
        if let Some(old) = root.role.replace(role) {
            self.unchain(index, old);
        }
        let chain = &mut self.chains[chain(role)];
        self.further[index % ROOTS] = core::mem::replace(chain, index as u8);
        if self.origins.are_kept() {
            self.record_root(index, role, frames);
        }
        index
    }

    /// Takes a root out of the chain of its role.
    fn unchain(&mut self, index: usize, role: Eptp) {
        let behind = self.further[index % ROOTS];
        let mut link = &mut self.chains[chain(role)];
        for _ in 0..ROOTS {
            if usize::from(*link) == index {
                *link = behind;
                return;
            }
            let next = usize::from(*link);
            let Some(further) = self.further.get_mut(next) else { return };
            link = further;
        }
    }

    /// A root, which is empty, gets its record.
    fn record_root<F: TableFrames>(&mut self, index: usize, role: Eptp, frames: &mut F) {
        let rights = self.rules.of_role(role).all_rights();
        let root = &mut self.roots[index % ROOTS];
        if root.record != 0 && self.origins.level(root.record, frames) != role.top() {
            self.origins.remove(&mut root.tables, root.record, frames);
            root.record = 0;
        }
        if root.record == 0 {
            root.record = self.origins.add(&mut root.tables, role.top(), 0, Hpa::new(0), 0, frames);
        }
        if root.record != 0 {
            self.origins.set_origin(root.record, Origin::table(role.guest_root(), rights), frames);
            self.origins.mark(root.record, frames);
        }
    }

    fn make_root<F: TableFrames>(&mut self, frames: &mut F) -> Option<usize> {
        if self.made >= ROOTS {
            return None;
        }
        let table = frames.alloc()?;
        *self.root(self.made) = Root::new(table);
        self.made += 1;
        Some(self.made - 1)
    }

    /// Empties one root that has tables: a stale one, or the one longest out of use; so the current one comes last.
    #[cold]
    pub(super) fn make_room<F: TableFrames>(&mut self, frames: &mut F) {
        let with_tables = (0..self.made.min(ROOTS)).filter(|&index| self.roots[index].tables.count > 0);
        if let Some(oldest) = with_tables.min_by_key(|&index| (!self.roots[index].stale, self.roots[index].last_used)) {
            self.drop_contents(oldest, frames);
            self.stats.evictions += 1;
        }
    }

    fn drop_contents<F: TableFrames>(&mut self, index: usize, frames: &mut F) {
        let root = &mut self.roots[index % ROOTS];
        root.stale = false;
        if root.tables.count > 0 {
            root.invept = true;
            self.run = None;
            // vmcs02 may point to the first table of the current one.
            let keep = if index == self.current { Keep::First } else { Keep::Nothing };
            root.drop_sub_pages(keep, &mut self.reserve, frames);
            let top = root.top();
            let mut owner = Owner { tables: &mut root.tables, origins: &mut self.origins, reserve: &mut self.reserve };
            owner.free_below(root.table, top, frames);
        }
        root.tables.unrecorded = self.origins.are_kept() && root.record == 0 && root.role.is_some();
    }
}

/// What owns the tables of a root.
pub(super) struct Owner<'a, const N: usize> {
    pub(super) tables: &'a mut Tables,
    pub(super) origins: &'a mut Origins,
    pub(super) reserve: &'a mut Reserve<N>,
}

impl<const N: usize> Owner<'_, N> {
    /// Frees the table that an entry of `level` references, which is no longer there, and those below it.
    pub(super) fn free<F: TableFrames>(&mut self, entry: u64, level: Level, frames: &mut F) {
        let Some(below) = level.below() else { return };
        let table = Hpa::new(entry & entry::ADDRESS);
        self.tables.count = self.tables.count.saturating_sub(1);
        self.origins.remove(self.tables, entry::number(entry), frames);
        self.free_below(table, below, frames);
        self.reserve.free(table, frames);
    }

    /// Frees the tables that `table` references, directly or not, and clears the entries that do. The search ends with the
    /// last table of the root.
    pub(super) fn free_below<F: TableFrames>(&mut self, table: Hpa, level: Level, frames: &mut F) {
        if level == Level::Pt {
            return;
        }
        for index in 0..512 {
            if self.tables.count == 0 {
                return;
            }
            let at = Hpa::new(table.get() | index << 3);
            let value = frames.read(at);
            if entry::is_present(value) && !entry::is_leaf(value, level) {
                frames.write(at, 0);
                self.free(value, level, frames);
            }
        }
    }
}
