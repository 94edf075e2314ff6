//! The slots: as many as L2 uses vmcs12s, up to a bound.
//!
//! Each slot lies in a frame, with the frames of its vmcs02, bitmaps and MSR areas beside it. More are made when L2 makes more
//! vmcs12s active, and given back when it leaves VMX operation. Only when there are [`SLOTS`], or no frame is left, does
//! the least recently used vmcs12 go back to its page in L2's memory, which costs a read of every field.

use crate::hw::held::Held;
use crate::hw::phys::DirectMap;
use crate::hw::vmx::Region;
use crate::mm::{Frame, FramePool, FrameRun, PhysMem};
use crate::vmcs::msr_bitmap::MsrBitmap02;
use crate::vmcs::msr_lists::{AREA_FRAMES, MsrLists};
use crate::vmcs::slot::Slot;
use crate::vmcs::vmcs02::Vmcs02;
use crate::vmx::bitmap::BitmapPage;
use arrayvec::ArrayVec;
use core::ops::{Index, IndexMut};

/// How many vmcs12s can be active at once; a further VMPTRLD writes the least recently used one back.
pub const SLOTS: usize = 64;
/// Slots that there are from the start on.
const FIRST_SLOTS: usize = 2;
/// Frames of one: itself, vmcs02, MSR bitmap, VMREAD and VMWRITE bitmap, two MSR areas.
const SLOT_FRAMES: usize = 5 + 2 * AREA_FRAMES;
/// Further slots leave so many frames to the tables of ept02.
const LEFT_FRAMES: usize = 64;

/// Which slot. Only [`Slots`] makes one, for a slot that there is.
///
/// It is kept in the slot of another vmcs12, in `cpu::Operation` and in `cpu::Events`: while L2 is in VMX operation, in which there are
/// never fewer slots. So it leads to its slot, and indexing cannot panic (invariant I6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotId(u8);

const _: () = assert!(SLOTS <= u8::MAX as usize);

/// The slots of one CPU.
pub struct Slots(ArrayVec<Held<Slot>, SLOTS>);

impl Slots {
    /// The first ones; `None` if the frames do not suffice.
    pub fn new(frames: &mut FramePool, phys: &DirectMap, revision: u32) -> Option<Self> {
        let mut slots = Slots(ArrayVec::new());
        for _ in 0..FIRST_SLOTS {
            slots.add(frames, phys, revision)?;
        }
        Some(slots)
    }

    /// Of the slot in this place, which is there.
    const fn id(index: usize) -> SlotId {
        SlotId(index as u8)
    }

    /// All of them, in an order that lasts.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.0.iter().map(|slot| &**slot)
    }

    /// The same, to change them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.0.iter_mut().map(|slot| &mut **slot)
    }

    /// Which slots there are.
    pub fn ids(&self) -> impl Iterator<Item = SlotId> + use<> {
        (0..self.0.len()).map(Self::id)
    }

    /// The first slot that `is` says.
    #[inline(always)]
    pub fn find(&self, is: impl Fn(&Slot) -> bool) -> Option<SlotId> {
        self.iter().position(is).map(Self::id)
    }

    /// The slot whose vmcs12 is longest out of use, inactive ones first.
    pub fn least_used(&self) -> SlotId {
        let age = |(_, slot): &(usize, &Slot)| (slot.active, slot.used);
        // There are always the first ones.
        Self::id(self.iter().enumerate().min_by_key(age).map_or(0, |(index, _)| index))
    }

    /// Makes a further slot, whose vmcs02 has nothing but the revision identifier; `None` at the bound, or if too few frames are left.
    #[cold]
    pub fn add(&mut self, frames: &mut FramePool, phys: &DirectMap, revision: u32) -> Option<SlotId> {
        let further = self.0.len() >= FIRST_SLOTS;
        let enough = SLOT_FRAMES + if further { LEFT_FRAMES } else { 0 };
        if self.0.is_full() || frames.available() < enough {
            return None;
        }
        let slot = make(frames, phys, revision)?;
        let slot = Held::new(slot, frames, phys).map_err(|slot| slot.give_back(frames)).ok()?;
        self.0.push(slot);
        Some(Self::id(self.0.len() - 1))
    }

    /// Gives the slots beyond the first ones back; `clear` executes VMCLEAR on the vmcs02 of each. L2 has left VMX operation, so that
    /// nobody keeps a [`SlotId`]: each slot is free.
    pub fn shrink(&mut self, frames: &mut FramePool, mut clear: impl FnMut(Region)) {
        while self.0.len() > FIRST_SLOTS {
            let Some(slot) = self.0.pop() else { return };
            clear(slot.vmcs02.region());
            slot.free(frames).give_back(frames);
        }
    }
}

/// A free slot on frames of its own; one that is refused gives back what it has.
fn make(frames: &mut FramePool, phys: &DirectMap, revision: u32) -> Option<Slot> {
    let mut single: ArrayVec<Frame, 4> = ArrayVec::new();
    let mut areas: ArrayVec<FrameRun, 2> = ArrayVec::new();
    single.extend((0..4).map_while(|_| frames.alloc(phys)));
    areas.extend((0..2).map_while(|_| frames.alloc_run(phys, AREA_FRAMES)));
    let (single, areas) = match (single.into_inner(), areas.into_inner()) {
        (Ok(single), Ok(areas)) => (single, areas),
        (single, areas) => {
            let single = single.map_or_else(|few| few, ArrayVec::from);
            let areas = areas.map_or_else(|few| few, ArrayVec::from).into_iter().flat_map(FrameRun::into_frames);
            single.into_iter().chain(areas).for_each(|frame| frames.free(frame));
            return None;
        }
    };
    let ([vmcs02, msr_bitmap, read, write], [entry_load, exit_load]) = (single, areas);
    // Merging writes only what is not all ones.
    for bitmap in [&read, &write] {
        phys.write_words(bitmap.at(0), &BitmapPage::SET.0);
    }
    let vmcs02 = Vmcs02::new(vmcs02, phys, revision);
    let msr_bitmap = MsrBitmap02::new(msr_bitmap, phys);
    Some(Slot::new(vmcs02, msr_bitmap, [read, write], MsrLists::new(entry_load, exit_load)))
}

impl Index<SlotId> for Slots {
    type Output = Slot;
    #[inline(always)]
    fn index(&self, id: SlotId) -> &Slot {
        &self.0[usize::from(id.0)]
    }
}

impl IndexMut<SlotId> for Slots {
    #[inline(always)]
    fn index_mut(&mut self, id: SlotId) -> &mut Slot {
        &mut self.0[usize::from(id.0)]
    }
}
