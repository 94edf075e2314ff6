//! Objects in frames of nvmx's own: a place that lasts and can be given back, without a heap.

use core::marker::PhantomData;
use core::mem::{align_of, size_of};
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use crate::addr::{Hpa, PAGE_SIZE};
use crate::hw::phys::DirectMap;
use crate::mm::FramePool;

/// A value that lies in a frame of its own. Dropping it leaks the frame; [`Held::free`] gives it back.
pub struct Held<T> {
    place: NonNull<T>,
    /// The frame: on a host the place does not tell it. On the machine a slot's place is one word.
    #[cfg(not(target_os = "none"))]
    at: Hpa,
    owns: PhantomData<T>,
}

impl<T> Held<T> {
    /// Moves a value into a frame; gives it back if there is none.
    pub fn new(value: T, frames: &mut FramePool, phys: &DirectMap) -> Result<Self, T> {
        const { assert!(size_of::<T>() as u64 <= PAGE_SIZE && align_of::<T>() as u64 <= PAGE_SIZE) };
        let Some(frame) = frames.alloc(phys) else { return Err(value) };
        let Some(place) = phys.linear(frame.hpa(), PAGE_SIZE).and_then(NonNull::new) else {
            frames.free(frame);
            return Err(value);
        };
        // The place stands for it from here on.
        let _at = frame.into_hpa();
        let place = place.cast::<T>();
        // SAFETY: 1. the frame is mapped and writable through the direct map for good (condition 1 of `DirectMap::new`), and
        // large and aligned enough for a T. 2. The pool gave it away just now: nobody else reaches it while `self` lives.
        unsafe { place.write(value) };
        Ok(Held {
            place,
            #[cfg(not(target_os = "none"))]
            at: _at,
            owns: PhantomData,
        })
    }

    /// Gives the frame back and returns the value.
    pub fn free(self, frames: &mut FramePool) -> T {
        // SAFETY: the place holds a T, which moves out; `self` ends here.
        let value = unsafe { self.place.read() };
        #[cfg(target_os = "none")]
        let at = Hpa::new(self.place.as_ptr() as u64 - crate::hw::phys::DIRECT_MAP);
        #[cfg(not(target_os = "none"))]
        let at = self.at;
        frames.free_at(at);
        value
    }
}

impl<T> Deref for Held<T> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: the place holds a T that only `self` reaches.
        unsafe { self.place.as_ref() }
    }
}

impl<T> DerefMut for Held<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above; `self` is borrowed mutably.
        unsafe { self.place.as_mut() }
    }
}
