//! The slots: as many as L2 uses vmcs12s, up to a bound.
//!
//! Each slot lies in a frame, with the frames of its vmcs02, bitmaps and MSR areas beside it. More are made when L2 makes more
//! vmcs12s active, and given back when it leaves VMX operation. Only when there are [`SLOTS`], or no frame is left, does
//! the least recently used vmcs12 go back to its page in L2's memory, which costs a read of every field.

use crate::addr::Hpa;
use crate::hw::held::Held;
use crate::hw::phys::DirectMap;
use crate::mm::{Frame, FramePool, PhysMem};
use crate::vmcs::msr_lists::{AREA_FRAMES, MsrLists};
use crate::vmcs::slot::Slot;
use crate::vmx::bitmap::BitmapPage;
use arrayvec::ArrayVec;
use core::ops::{Index, IndexMut};

/// How many vmcs12s can be active at once; a further VMPTRLD writes the least recently used one back.
pub const SLOTS: usize = 64;
/// Slots that there are from the start on.
pub const FIRST_SLOTS: usize = 2;
/// Frames of one: itself, vmcs02, MSR bitmap, VMREAD and VMWRITE bitmap, two MSR areas.
const SLOT_FRAMES: usize = 5 + 2 * AREA_FRAMES;
/// Further slots leave so many frames to the tables of ept02.
const LEFT_FRAMES: usize = 64;

/// The slots of one CPU, by index.
///
/// An index comes from [`Slots::find`], from [`Slots::add`], or from a search of the slots. While it is kept there are never fewer
/// slots: [`Slots::shrink`] is for the time outside VMX operation, when nobody keeps one. No value of a guest becomes one, so
/// indexing cannot panic (invariant I6).
#[derive(Default)]
pub struct Slots(ArrayVec<Held<Slot>, SLOTS>);

impl Slots {
    /// No slots.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The slot with this index.
    #[inline(always)]
    pub fn get(&self, index: usize) -> Option<&Slot> {
        self.0.get(index).map(|slot| &**slot)
    }

    /// The same, to change it.
    #[inline(always)]
    pub fn get_mut(&mut self, index: usize) -> Option<&mut Slot> {
        self.0.get_mut(index).map(|slot| &mut **slot)
    }

    /// All of them, in the order of their indexes.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.0.iter().map(|slot| &**slot)
    }

    /// The index of the first slot that `is` says.
    #[inline(always)]
    pub fn find(&self, is: impl Fn(&Slot) -> bool) -> Option<usize> {
        self.iter().position(is)
    }

    /// Makes a further slot, whose vmcs02 has nothing but the revision identifier; `None` at the bound, or if too few frames are left.
    #[cold]
    pub fn add(&mut self, frames: &mut FramePool, phys: &DirectMap, revision: u32) -> Option<usize> {
        let further = self.0.len() >= FIRST_SLOTS;
        let enough = SLOT_FRAMES + if further { LEFT_FRAMES } else { 0 };
        if self.0.is_full() || frames.available() < enough {
            return None;
        }
        // One that is refused gives back what it has.
        let mut taken: ArrayVec<Hpa, SLOT_FRAMES> = ArrayVec::new();
        let slot = make(frames, phys, revision, &mut taken)
            .and_then(|slot| Held::new(slot, frames, phys).ok())
            .or_else(|| {
                taken.iter().for_each(|frame| frames.free(Frame::from_hpa(*frame)));
                None
            })?;
        self.0.push(slot);
        Some(self.0.len() - 1)
    }

    /// Gives the slots beyond the first ones back; `clear` executes VMCLEAR on the vmcs02 of each.
    pub fn shrink(&mut self, frames: &mut FramePool, mut clear: impl FnMut(Hpa)) {
        while self.0.len() > FIRST_SLOTS {
            let Some(slot) = self.0.pop() else { return };
            clear(slot.vmcs02());
            let slot = slot.free(frames);
            slot.frames().for_each(|frame| frames.free(Frame::from_hpa(frame)));
        }
    }
}

/// A free slot on frames of its own, which `taken` lists.
fn make(
    frames: &mut FramePool,
    phys: &DirectMap,
    revision: u32,
    taken: &mut ArrayVec<Hpa, SLOT_FRAMES>,
) -> Option<Slot> {
    let mut some = |count: usize| {
        let first = frames.alloc_contiguous(phys, count)?;
        taken.extend((0..count as u64).map(|n| Hpa::new(first.get() + n * crate::addr::PAGE_SIZE)));
        Some(first)
    };
    let (vmcs02, msr_bitmap) = (some(1)?, some(1)?);
    let shadow_bitmaps = (some(1)?, some(1)?);
    let lists = MsrLists::new(some(AREA_FRAMES)?, some(AREA_FRAMES)?);
    phys.write_u64(vmcs02, revision.into());
    // Merging writes only what is not all ones.
    for bitmap in [msr_bitmap, shadow_bitmaps.0, shadow_bitmaps.1] {
        phys.write_words(bitmap, &BitmapPage::SET.0);
    }
    Some(Slot::new(vmcs02, msr_bitmap, shadow_bitmaps, lists))
}

impl Index<usize> for Slots {
    type Output = Slot;
    #[inline(always)]
    fn index(&self, index: usize) -> &Slot {
        &self.0[index]
    }
}

impl IndexMut<usize> for Slots {
    #[inline(always)]
    fn index_mut(&mut self, index: usize) -> &mut Slot {
        &mut self.0[index]
    }
}
