//! Objects in frames of nvmx's own: a place that lasts and can be given back, without a heap.

use core::marker::PhantomData;
use core::mem::{align_of, size_of};
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use crate::addr::PAGE_SIZE;
use crate::hw::phys::DirectMap;
use crate::mm::{Frame, FramePool};

/// A value that lies in a frame of its own. Dropping it leaks the frame; [`Held::free`] gives it back.
pub struct Held<T> {
    place: NonNull<Inside<T>>,
    owns: PhantomData<T>,
}

/// What lies in the frame: the value, and the frame itself until it goes back.
struct Inside<T> {
    value: T,
    frame: Frame,
}

impl<T> Held<T> {
    /// Moves a value into a frame; gives it back if there is none.
    pub fn new(value: T, frames: &mut FramePool, phys: &DirectMap) -> Result<Self, T> {
        const {
            assert!(size_of::<Inside<T>>() as u64 <= PAGE_SIZE && align_of::<Inside<T>>() as u64 <= PAGE_SIZE);
        }
        let Some(frame) = frames.alloc(phys) else { return Err(value) };
        let Some(place) = phys.linear(frame.hpa(), PAGE_SIZE).and_then(NonNull::new) else {
            frames.free(frame);
            return Err(value);
        };
        let place = place.cast::<Inside<T>>();
        // SAFETY: 1. the frame is mapped and writable through the direct map for good (condition 1 of `DirectMap::new`), and
        // large and aligned enough. 2. The pool gave it away just now, and it moves out of reach: nobody else can write to it
        // while `self` lives.
        unsafe { place.write(Inside { value, frame }) };
        Ok(Held { place, owns: PhantomData })
    }

    /// Gives the frame back and returns the value.
    pub fn free(self, frames: &mut FramePool) -> T {
        // SAFETY: the place holds both, which move out; `self` ends here.
        let Inside { value, frame } = unsafe { self.place.read() };
        frames.free(frame);
        value
    }
}

impl<T> Deref for Held<T> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: the place holds a T that only `self` reaches.
        unsafe { &self.place.as_ref().value }
    }
}

impl<T> DerefMut for Held<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above; `self` is borrowed mutably.
        unsafe { &mut self.place.as_mut().value }
    }
}
