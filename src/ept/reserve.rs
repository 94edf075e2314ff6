//! The frames of ept02: a budget on the pool, and frames held back so that the last root can always go on.

use super::{OutOfFrames, TableFrames};
use crate::addr::Hpa;
use arrayvec::ArrayVec;

/// Owns `N` frames from the start and at most `budget` more while they are in use.
#[derive(Debug)]
pub(super) struct Reserve<const N: usize> {
    held: ArrayVec<Hpa, N>,
    /// Frames owned beyond `N`.
    extra: u32,
    budget: u32,
}

impl<const N: usize> Reserve<N> {
    pub(super) fn new<F: TableFrames>(budget: u32, frames: &mut F) -> Result<Self, OutOfFrames> {
        let mut held = ArrayVec::new();
        while !held.is_full() {
            match frames.alloc() {
                Some(frame) => held.push(frame),
                None => {
                    held.into_iter().for_each(|frame| frames.free(frame));
                    return Err(OutOfFrames);
                }
            }
        }
        Ok(Self { held, extra: 0, budget })
    }

    /// A frame of zeros: from the pool while the budget lasts, then from those held.
    pub(super) fn alloc<F: TableFrames>(&mut self, frames: &mut F) -> Option<Hpa> {
        if self.extra < self.budget {
            if let Some(frame) = frames.alloc() {
                self.extra += 1;
                return Some(frame);
            }
        }
        let frame = self.held.pop()?;
        frames.clear(frame);
        Some(frame)
    }

    /// Takes a frame back; what is held is filled up first.
    pub(super) fn free<F: TableFrames>(&mut self, frame: Hpa, frames: &mut F) {
        if self.held.try_push(frame).is_err() {
            self.extra = self.extra.saturating_sub(1);
            frames.free(frame);
        }
    }
}
