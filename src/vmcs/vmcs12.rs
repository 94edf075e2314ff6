//! nvmx's copy of a vmcs12, and the page in L2's memory that it comes from and goes back to.
//!
//! A field whose [`Home`] is `Cache` always lives here. One whose home is vmcs02 lives here only while its bit in `valid`
//! is set; `dirty` marks the values here that vmcs02 does not have yet.
//!
//! The page's layout is nvmx's own business (SDM vol. 3C, "VMCS Data" is implementation-specific): after the revision
//! identifier and the abort indicator follow the launch state and one 64-bit slot a field, in the order of the table.

use crate::addr::Gpa;
use crate::mm::PhysMem;
use crate::mm::guest::{GuestMemory, NotOwned};
use crate::vmx::FieldAccess;
use crate::vmx::field::{Field, Fields, Home};

const LAUNCH_OFFSET: u64 = 8;
const VALUES_OFFSET: u64 = 16;
const LAUNCHED: u64 = 1;

/// A set of fields.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FieldSet([u64; FieldSet::WORDS]);

impl FieldSet {
    const WORDS: usize = Field::COUNT.div_ceil(64);

    /// No field.
    pub const EMPTY: FieldSet = FieldSet([0; Self::WORDS]);

    /// The fields whose value L2 sees lives in nvmx's copy, always.
    pub const CACHED: FieldSet = {
        let mut set = Self::EMPTY;
        let mut i = 0;
        while i < Field::COUNT {
            if matches!(Field::ALL[i].home(), Home::Cache) {
                set.0[i / 64] |= 1 << (i % 64);
            }
            i += 1;
        }
        set
    };

    /// Those that `is` says.
    pub fn of(is: impl Fn(Field) -> bool) -> Self {
        let mut set = Self::EMPTY;
        Field::ALL.iter().filter(|field| is(**field)).for_each(|field| set.insert(*field));
        set
    }

    /// Adds a field.
    #[inline(always)]
    pub const fn insert(&mut self, field: Field) {
        let i = field.index();
        self.0[i / 64] |= 1 << (i % 64);
    }

    /// Takes a field out.
    #[inline(always)]
    pub const fn remove(&mut self, field: Field) {
        let i = field.index();
        self.0[i / 64] &= !(1 << (i % 64));
    }

    /// Is it in?
    #[inline(always)]
    pub const fn contains(&self, field: Field) -> bool {
        let i = field.index();
        self.0[i / 64] >> (i % 64) & 1 == 1
    }

    /// True when no field is in.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.0.iter().fold(0, |all, word| all | word) == 0
    }

    /// The fields that are in this set and not in `others`.
    pub fn without(self, others: &FieldSet) -> FieldSet {
        FieldSet(core::array::from_fn(|i| self.0[i] & !others.0[i]))
    }

    /// The fields in it, in the order of the table.
    pub fn iter(self) -> impl Iterator<Item = Field> {
        self.0.into_iter().enumerate().flat_map(|(word, mut bits)| {
            core::iter::from_fn(move || {
                let others = bits & bits.checked_sub(1)?;
                let first = core::mem::replace(&mut bits, others).trailing_zeros() as usize;
                Field::ALL.get(word * 64 + first).copied()
            })
        })
    }
}

/// The copy.
pub struct Vmcs12 {
    values: [u64; Field::COUNT],
    /// Fields whose value here is what L2 sees.
    pub valid: FieldSet,
    /// Fields that vmcs02 does not have yet.
    pub dirty: FieldSet,
    /// Exits of L3 that L2 saw since its VMLAUNCH. None: the launch state is clear.
    pub exits: u64,
}

impl Default for Vmcs12 {
    fn default() -> Self {
        Self::new()
    }
}

impl Vmcs12 {
    /// All fields zero.
    pub const fn new() -> Self {
        Vmcs12 { values: [0; Field::COUNT], valid: FieldSet::CACHED, dirty: FieldSet::EMPTY, exits: 0 }
    }

    /// Launch state: a VMLAUNCH entered.
    #[inline(always)]
    pub fn is_launched(&self) -> bool {
        self.exits != 0
    }

    /// The value here; meaningful while the field is valid.
    #[inline(always)]
    pub fn get(&self, field: Field) -> u64 {
        self.values[field.index()]
    }

    /// Sets a value without marking anything: for fields that live here.
    #[inline(always)]
    pub fn set(&mut self, field: Field, value: u64) {
        self.values[field.index()] = value & field.mask();
    }

    /// Keeps what was read from vmcs02.
    #[inline(always)]
    pub fn fetched(&mut self, field: Field, value: u64) {
        self.set(field, value);
        self.valid.insert(field);
    }

    /// Keeps the values of all fields of `set` as `read` tells them; each fits its field. Fields that lie next to each other in the table are
    /// read in one go.
    #[inline(always)]
    pub fn fetch(&mut self, set: FieldSet, mut read: impl FnMut(Field) -> u64) {
        for (word, mut bits) in set.0.into_iter().enumerate() {
            self.valid.0[word] |= bits;
            while bits != 0 {
                let first = bits.trailing_zeros();
                let start = word * 64 + first as usize;
                let run = start..start + (bits >> first).trailing_ones() as usize;
                // The carry takes the lowest run of ones away.
                bits &= bits.wrapping_add(1 << first);
                if let (Some(values), Some(fields)) = (self.values.get_mut(run.clone()), Field::ALL.get(run)) {
                    values.iter_mut().zip(fields).for_each(|(value, field)| *value = read(*field));
                }
            }
        }
    }

    /// A value that L2 wrote and vmcs02 must get before the next entry.
    pub fn written(&mut self, field: Field, value: u64) {
        self.fetched(field, value);
        self.dirty.insert(field);
    }

    /// Writes L2's pending values to vmcs02, which is current, for fields that it is `wanted` of.
    pub fn write_dirty(&mut self, vmcs02: &mut impl FieldAccess, wanted: impl Fn(Field) -> bool) {
        for field in self.dirty.iter().filter(|field| wanted(*field)) {
            vmcs02.write(field, self.get(field));
        }
        self.dirty = FieldSet::EMPTY;
    }

    /// Fetches every field that only vmcs02 has, which is current.
    #[inline(always)]
    pub fn fetch_missing(&mut self, vmcs02: &mut impl FieldAccess, exists: &FieldSet) {
        self.fetch(exists.without(&self.valid), |field| vmcs02.read(field));
    }

    /// The revision identifier in the region at `at`, with bit 31.
    pub fn revision(memory: &GuestMemory<impl PhysMem>, at: Gpa) -> Result<u32, NotOwned> {
        Ok(memory.read_u64(at)? as u32)
    }

    /// Copies the region at `at` once; every value is untrusted and masked to its width.
    pub fn load(&mut self, memory: &GuestMemory<impl PhysMem>, at: Gpa) -> Result<(), NotOwned> {
        self.exits = u64::from(memory.read_u64(offset(at, LAUNCH_OFFSET))? == LAUNCHED);
        for (i, field) in Field::ALL.iter().enumerate() {
            self.set(*field, memory.read_u64(offset(at, VALUES_OFFSET + 8 * i as u64))?);
            self.valid.insert(*field);
            if field.home() != Home::Cache {
                self.dirty.insert(*field);
            }
        }
        Ok(())
    }

    /// Writes every value back to the region at `at`: the field-access strategy has completed them.
    pub fn store(&self, memory: &GuestMemory<impl PhysMem>, at: Gpa) -> Result<(), NotOwned> {
        memory.write_u64(offset(at, LAUNCH_OFFSET), self.launch_state())?;
        memory.write_words(offset(at, VALUES_OFFSET), &self.values)
    }

    /// True if the region at `at` holds what [`Vmcs12::store`] would write there.
    pub fn is_stored_at(&self, memory: &GuestMemory<impl PhysMem>, at: Gpa) -> bool {
        memory.read_u64(offset(at, LAUNCH_OFFSET)) == Ok(self.launch_state())
            && memory.holds_words(offset(at, VALUES_OFFSET), &self.values)
    }

    fn launch_state(&self) -> u64 {
        if self.is_launched() { LAUNCHED } else { 0 }
    }

    /// Sets the launch state in the region at `at` to clear, for a region that is not active.
    pub fn clear_region(memory: &GuestMemory<impl PhysMem>, at: Gpa) -> Result<(), NotOwned> {
        memory.write_u64(offset(at, LAUNCH_OFFSET), 0)
    }
}

impl Fields for Vmcs12 {
    #[inline(always)]
    fn get(&self, field: Field) -> u64 {
        Vmcs12::get(self, field)
    }
}

const _: () = assert!(VALUES_OFFSET + 8 * Field::COUNT as u64 <= crate::addr::PAGE_SIZE);

/// Within a region: the base is page-aligned, so the sum cannot overflow.
fn offset(at: Gpa, bytes: u64) -> Gpa {
    Gpa::new(at.page().get() | bytes)
}
