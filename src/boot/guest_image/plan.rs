//! Deciding where everything goes before a byte is moved.
//!
//! The image goes where it was linked. The loader knew nothing of that, so modules may lie in its way, the image's own
//! file included. Those are copied out of the way first, to places that nothing else uses: no order of copying can then
//! destroy a source.

use crate::boot::guest_image::LoadError;
use crate::boot::guest_image::header::Image;
use crate::{
    boot::info::Module,
    mm::{MemoryMap, Span},
};

/// Room for the boot information of L2 without what is as long as the loader made it.
pub const INFO_SIZE: u64 = 0x4000;
/// Of each module an entry or a tag, the zero behind its command line and what aligns it.
const INFO_PER_MODULE: u64 = 16 + 1 + 8;

/// ESP as GRUB leaves it, for images that push before they have a stack of their own.
pub const GRUBS_STACK: u64 = 0x7_FF00;

const PAGE: u64 = 4096;
/// 32-bit protocols: everything below 4 GiB; and nothing in the first MiB, which firmware and trampolines use.
pub const PLACES: Span = Span::new(1 << 20, 1 << 32);

/// Where everything goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Where the image's file is read from; another place than now when the image overlaps it.
    pub file: Span,
    /// The boot information.
    pub info: Span,
    /// The top of L2's first stack: a page of usable memory below it that nothing else uses.
    pub stack: u64,
}

/// Plans the loading of `image`. `file` is the image's module, `modules` are those for L2, which get their places; `memory` is L2's
/// memory map.
pub fn plan(
    image: &Image,
    file: &Module<'_>,
    modules: &mut [Module<'_>],
    memory: &MemoryMap,
    own: Span,
) -> Result<Plan, LoadError> {
    let (line, file) = (file.command_line, file.span);
    for (n, segment) in image.segments.iter().enumerate() {
        let to = segment.to;
        if to.overlaps(own) {
            return Err(LoadError::OverlapsNvmx { wanted: to, own });
        }
        if !memory.is_usable(to) {
            return Err(LoadError::NoMemory(to));
        }
        if let Some(other) = image.segments.iter().take(n).find(|other| other.to.overlaps(to)) {
            return Err(LoadError::SegmentsOverlap(other.to, to));
        }
    }

    let mut free = memory.clone();
    let occupied = image.segments.iter().map(|s| s.to).chain([file, own]).chain(modules.iter().map(|m| m.span));
    occupied.for_each(|span| free.occupy(span.outer_pages()));
    // Below what is placed from here on.
    let grubs_is_free = free.is_usable(Span::new(GRUBS_STACK & !(PAGE - 1), GRUBS_STACK));
    let mut place = |bytes: u64, end: u64| -> Result<Span, LoadError> {
        let no_room = LoadError::NoRoom { bytes };
        let pages = bytes.checked_next_multiple_of(PAGE).ok_or(no_room.clone())?;
        let found = free.highest_free(pages, PAGE, PLACES.intersection(Span::new(0, end))).ok_or(no_room)?;
        free.occupy(found);
        Ok(Span::sized(found.start(), bytes))
    };

    let in_the_way = |span: Span| image.segments.iter().any(|s| s.to.overlaps(span));
    let file_place = if in_the_way(file) { place(file.len(), PLACES.end())? } else { file };
    let mut info = INFO_SIZE + line.len() as u64;
    for module in modules {
        if in_the_way(module.span) || module.span.end() > image.modules_end {
            module.place = place(module.span.len(), image.modules_end)?;
        }
        info += INFO_PER_MODULE + module.command_line.len() as u64;
    }
    let info = place(info, PLACES.end())?;
    let stack = if grubs_is_free { GRUBS_STACK } else { place(PAGE, PLACES.end())?.end() };
    Ok(Plan { file: file_place, info, stack })
}
