//! The MSR bitmap of a vmcs02: all ones, but for the words in which L3 has used an MSR that neither nvmx nor L2 intercepts.
//!
//! L2 changes its bitmap by a plain store, on any processor, and nothing tells. So nothing that is open is kept over an entry:
//! each open word is made anew of L2's before every one. A closed word needs no look, since it intercepts all. The first access
//! of L3 to an MSR in it exits to nvmx, which opens the word if it finds that nobody wants that exit
//! ([ADR 0020](../../../docs/adr/0020-msr-bitmaps-are-closed-until-used.md)).
//!
//! Source: Intel SDM vol. 3C (December 2024), "MSR-Bitmap Address".

use crate::addr::Hpa;
use crate::mm::{Frame, PhysMem};
use crate::vmx::bitmap::BitmapPage;
use arrayvec::ArrayVec;

/// How many words are open at once: for a further one the oldest is closed. A Linux in L3 uses up to four.
pub const OPEN: usize = 16;

/// The merged MSR bitmap.
#[derive(Debug)]
pub struct MsrBitmap02 {
    /// A frame of nvmx.
    frame: Frame,
    /// L2's page, if it uses one that lies in its memory.
    theirs: Option<Hpa>,
    /// Open words: number and nvmx's part of each.
    open: ArrayVec<(u16, u64), OPEN>,
    /// The oldest of them, when all are in use.
    oldest: usize,
}

impl MsrBitmap02 {
    /// In this frame of nvmx's, with all words closed.
    pub fn new<P: PhysMem>(frame: Frame, phys: &P) -> Self {
        phys.write_words(frame.at(0), &BitmapPage::SET.0);
        Self { frame, theirs: None, open: ArrayVec::new(), oldest: 0 }
    }

    /// Where it lies.
    pub const fn at(&self) -> Hpa {
        self.frame.hpa()
    }

    /// The frame, which is free again.
    pub fn into_frame(self) -> Frame {
        self.frame
    }

    /// L2's bitmap is this page from now on; without one vmcs02 must not use this bitmap.
    pub fn follow<P: PhysMem>(&mut self, phys: &P, theirs: Option<Hpa>) {
        if self.theirs != theirs {
            self.theirs = theirs;
            self.open.drain(..).for_each(|(word, _)| close(&self.frame, word, phys));
        }
    }

    /// L2's bitmap is not known any more.
    pub fn forget(&mut self) {
        self.theirs = None;
    }

    /// Before an entry: what L2 has written into its bitmap counts from now on.
    #[inline(always)]
    pub fn refresh<P: PhysMem>(&self, phys: &P) {
        if let Some(theirs) = self.theirs.filter(|_| !self.open.is_empty()) {
            phys.or_words(theirs, self.frame.at(0), &self.open);
        }
    }

    /// L3 used the MSR of this bit, and nobody wants to see it: opens its word. `ours` are nvmx's words, by number.
    #[cold]
    pub fn open<P: PhysMem>(&mut self, phys: &P, bit: u16, ours: impl Fn(usize) -> u64) {
        let word = bit / 64;
        if !self.open.iter().any(|(open, _)| *open == word) {
            let new = (word, ours(word.into()));
            if self.open.is_full() {
                let (old, _) = core::mem::replace(&mut self.open[self.oldest], new);
                close(&self.frame, old, phys);
                self.oldest = (self.oldest + 1) % OPEN;
            } else {
                self.open.push(new);
            }
        }
        self.refresh(phys);
    }
}

fn close<P: PhysMem>(frame: &Frame, word: u16, phys: &P) {
    phys.write_u64(frame.at(8 * u64::from(word)), u64::MAX);
}
