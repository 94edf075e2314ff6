//! Reading the image: its multiboot header and what it says about loading.
//!
//! Sources: Multiboot Specification 0.6.96 and Multiboot2 Specification 2.0, "OS image format"; System V ABI, "ELF
//! header" and "Program header".

use arrayvec::ArrayVec;

use crate::boot::guest_image::file::File;
use crate::boot::guest_image::plan::PLACES;
use crate::boot::guest_image::{LoadError, Protocol, elf};
use crate::{
    boot::{extras::Extras, multiboot::tag},
    mm::{PhysMem, Span},
};

/// Most loadable segments of an image.
pub const MAX_SEGMENTS: usize = 16;

/// A piece of the file and where it belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileSegment {
    /// Where it starts in the file.
    pub offset: u64,
    /// Bytes from the file.
    pub in_file: u64,
    /// Where it goes.
    pub to: Span,
    /// The rest of `to` is to be zeros; else it is only room.
    pub zeroed: bool,
}

/// Segments of an image.
pub type Segments = ArrayVec<FileSegment, MAX_SEGMENTS>;

/// What the file says about loading it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    /// How it wants to be started.
    pub protocol: Protocol,
    /// Physical address of its first instruction.
    pub entry: u64,
    /// What is loaded.
    pub segments: Segments,
    /// Modules must end here or below it.
    pub modules_end: u64,
}

const MULTIBOOT1_MAGIC: u32 = 0x1BAD_B002;
/// Bytes up to and with the entry address.
const MULTIBOOT1_SIZE: u64 = 32;
const MULTIBOOT1_SEARCH: u64 = 8192;
/// Flags 0 and 1 ask for what nvmx gives anyway: modules on page boundaries, the memory map.
const MULTIBOOT1_KNOWN: u32 = 0b11;
const MULTIBOOT1_VIDEO: u32 = 1 << 2;
const MULTIBOOT1_ADDRESSES: u32 = 1 << 16;

const MULTIBOOT2_MAGIC: u32 = 0xE852_50D6;
const MULTIBOOT2_SEARCH: u64 = 32768;
const TAG_OPTIONAL: u16 = 1;

/// Where multiboot headers say that the image goes; all zero when the ELF headers decide.
struct Addresses {
    header: u32,
    load: u32,
    load_end: u32,
    bss_end: u32,
}

impl Image {
    /// Reads the headers. An image with both multiboot headers is started by multiboot 1. It is an ELF file, or one piece
    /// whose header has addresses. `extras` is what L2 can be told beyond the map, the modules and the command lines.
    pub fn read<M: PhysMem>(file: &File<'_, M>, extras: &Extras) -> Result<Self, LoadError> {
        let image = if let Some(at) = find_multiboot1(file) {
            Self::multiboot1(file, at, extras)?
        } else if let Some(at) = find_multiboot2(file) {
            Self::multiboot2(file, at, extras)?
        } else {
            elf::check(file)?;
            return Err(LoadError::NoHeader { size: file.len() });
        };
        let first = Span::sized(image.entry, 1);
        match image.segments.iter().any(|segment| segment.to.contains(first)) {
            true => Ok(image),
            false => Err(LoadError::BrokenHeader("its entry point lies outside of what is loaded")),
        }
    }

    fn multiboot1<M: PhysMem>(file: &File<'_, M>, at: u64, extras: &Extras) -> Result<Self, LoadError> {
        let field = |offset| file.u32(at + offset).ok_or(LoadError::BrokenHeader("it is cut short"));
        let flags = field(4)?;
        if flags & MULTIBOOT1_VIDEO != 0 && !extras.has_screen() {
            return Err(LoadError::Unsupported("a video mode"));
        }
        if flags & 0xFFFF & !(MULTIBOOT1_KNOWN | MULTIBOOT1_VIDEO) != 0 {
            return Err(LoadError::Unsupported("an unknown multiboot feature"));
        }
        let (protocol, modules_end) = (Protocol::Multiboot1, PLACES.end());
        if flags & MULTIBOOT1_ADDRESSES != 0 {
            let addresses =
                Addresses { header: field(12)?, load: field(16)?, load_end: field(20)?, bss_end: field(24)? };
            let segments = flat_file(file, at, MULTIBOOT1_SIZE, &addresses)?;
            return Ok(Self { protocol, entry: field(28)?.into(), segments, modules_end });
        }
        let (entry, segments) = elf::check(file).and_then(|()| elf::read(file))?;
        Ok(Self { protocol, entry, segments, modules_end })
    }

    fn multiboot2<M: PhysMem>(file: &File<'_, M>, at: u64, extras: &Extras) -> Result<Self, LoadError> {
        const CUT: LoadError = LoadError::BrokenHeader("it is cut short");
        let end = at + u64::from(file.u32(at + 8).ok_or(CUT)?);
        let (mut addresses, mut entry) = (None, None);
        let mut tag = at + 16;
        loop {
            let (kind, flags) = (file.u16(tag).ok_or(CUT)?, file.u16(tag + 2).ok_or(CUT)?);
            let size = u64::from(file.u32(tag + 4).ok_or(CUT)?);
            if size < 8 || tag + size > end {
                return Err(LoadError::BrokenHeader("a tag reaches beyond its end"));
            }
            let field = |offset| file.u32(tag + offset).ok_or(CUT);
            let required = flags & TAG_OPTIONAL == 0;
            match kind {
                0 => break,
                1 if required => information_request(file, tag, size, extras)?,
                2 => {
                    addresses = Some(Addresses {
                        header: field(8)?,
                        load: field(12)?,
                        load_end: field(16)?,
                        bss_end: field(20)?,
                    });
                }
                3 => entry = Some(u64::from(field(8)?)),
                5 if required && !extras.has_screen() => return Err(LoadError::Unsupported("a framebuffer")),
                // Console flags, module alignment, EFI, relocatable image: nothing to do, or not for a BIOS machine.
                1 | 4..=10 => {}
                _ if required => return Err(LoadError::Unsupported("an unknown multiboot2 feature")),
                _ => {}
            }
            tag += size.next_multiple_of(8);
        }
        let (protocol, modules_end) = (Protocol::Multiboot2, PLACES.end());
        match (addresses, entry) {
            (Some(addresses), Some(entry)) => {
                Ok(Self { protocol, entry, segments: flat_file(file, at, end - at, &addresses)?, modules_end })
            }
            (Some(_), None) => Err(LoadError::BrokenHeader("it has an address tag and no entry tag")),
            (None, entry) => {
                let (elf_entry, segments) = elf::check(file).and_then(|()| elf::read(file))?;
                Ok(Self { protocol, entry: entry.unwrap_or(elf_entry), segments, modules_end })
            }
        }
    }
}

/// Information that nvmx writes for L2: command line, loader's name, modules, basic memory, memory map, RSDPs; and what it
/// hands on, where it was given.
fn information_request<M: PhysMem>(
    file: &File<'_, M>,
    request: u64,
    size: u64,
    extras: &Extras,
) -> Result<(), LoadError> {
    let mut offset = 8;
    while offset + 4 <= size {
        let kind = file.u32(request + offset).ok_or(LoadError::BrokenHeader("it is cut short"))?;
        let own = matches!(kind, tag::COMMAND_LINE..=tag::MEMORY | tag::MAP | tag::RSDP_OLD | tag::RSDP_NEW);
        if !own && !extras.has_tag(kind) {
            return Err(LoadError::UnsupportedInformation(kind));
        }
        offset += 4;
    }
    Ok(())
}

/// The file as one piece, as the address fields say. The header lies at `header_at` of the file and has `header_size` bytes.
fn flat_file<M: PhysMem>(
    file: &File<'_, M>,
    header_at: u64,
    header_size: u64,
    addresses: &Addresses,
) -> Result<Segments, LoadError> {
    let broken = |what| Err(LoadError::BrokenHeader(what));
    let [header, load, load_end, bss_end] =
        [addresses.header, addresses.load, addresses.load_end, addresses.bss_end].map(u64::from);
    // A load address of all ones means: from the start of the file.
    let load = match header.checked_sub(header_at) {
        Some(start) if addresses.load == u32::MAX => start,
        _ => load,
    };
    let Some(before) = header.checked_sub(load) else {
        return broken("its header_addr is below its load_addr, so the header is not loaded");
    };
    let Some(offset) = header_at.checked_sub(before) else {
        return broken("its load_addr is so far below its header_addr that the image would begin before the file");
    };
    // The header was found in the file.
    let available = file.len().saturating_sub(offset);
    let in_file = match load_end {
        0 => available,
        end if end <= load => return broken("its load_end_addr is not above its load_addr"),
        end => end - load,
    };
    if in_file > available {
        return broken("its load_end_addr lies beyond the end of the file");
    }
    if before + header_size > in_file {
        return broken("its load_end_addr cuts off the header");
    }
    let end = match bss_end {
        0 => load + in_file,
        end if end < load + in_file => return broken("its bss_end_addr is below the end of what is loaded"),
        end => end,
    };
    Ok(Segments::from_iter([FileSegment { offset, in_file, to: Span::new(load, end), zeroed: true }]))
}

fn find_multiboot1<M: PhysMem>(file: &File<'_, M>) -> Option<u64> {
    (0..MULTIBOOT1_SEARCH).step_by(4).find(|at| {
        file.u32(*at) == Some(MULTIBOOT1_MAGIC) && {
            let sum = |flags: u32, checksum: u32| MULTIBOOT1_MAGIC.wrapping_add(flags).wrapping_add(checksum);
            file.u32(at + 4).zip(file.u32(at + 8)).is_some_and(|(flags, checksum)| sum(flags, checksum) == 0)
        }
    })
}

fn find_multiboot2<M: PhysMem>(file: &File<'_, M>) -> Option<u64> {
    (0..MULTIBOOT2_SEARCH).step_by(8).find(|at| {
        let word = |offset| file.u32(at + offset);
        // The architecture is 0: 32-bit protected mode of i386.
        word(0) == Some(MULTIBOOT2_MAGIC)
            && word(4) == Some(0)
            && word(8)
                .zip(word(12))
                .is_some_and(|(length, sum)| MULTIBOOT2_MAGIC.wrapping_add(length).wrapping_add(sum) == 0)
    })
}
