//! The boot information that L2 gets.
//!
//! Sources: Multiboot Specification 0.6.96 and Multiboot2 Specification 2.0, "Boot information format".

use crate::addr::Gpa;
use crate::boot::extras::{APM_SIZE, Extras, Framebuffer, MAX_COLOURS, MAX_DRIVES, MAX_TAGS, VBE_BLOCKS};
use crate::boot::guest_image::plan::INFO_SIZE;
use crate::boot::guest_image::{LoadError, Protocol};
use crate::boot::info::{Module, Rsdp};
use crate::boot::multiboot::{layout, tag};
use crate::mm::map::MAX_RANGES;
use crate::mm::{GuestMemory, MemoryMap, PhysMem, Span};

/// How nvmx calls itself as a loader.
const LOADER: &str = "nvmx";
const MAP_ENTRY: u64 = 24;

// The largest boot information of either protocol fits, without the text of modules: headers and tags, the map, the RSDP, what is
// handed on.
const _: () = {
    let extras = (MAX_DRIVES + APM_SIZE + VBE_BLOCKS + MAX_COLOURS + MAX_TAGS) as u64;
    assert!(1024 + MAX_RANGES as u64 * MAP_ENTRY + extras <= INFO_SIZE);
};

/// What L2 is told.
#[derive(Clone, Copy, Debug)]
pub struct Told<'a> {
    /// Its command line.
    pub command_line: &'a [u8],
    /// Its modules.
    pub modules: &'a [Module<'a>],
    /// Its memory map.
    pub memory: &'a MemoryMap,
    /// The ACPI root pointer; only multiboot2 carries it.
    pub rsdp: Option<&'a Rsdp>,
    /// What the loader said and nvmx does not use.
    pub extras: &'a Extras,
}

/// Writes the boot information to the start of `at`.
pub fn write<P: PhysMem>(
    protocol: Protocol,
    told: &Told<'_>,
    guest: &GuestMemory<P>,
    at: Span,
) -> Result<(), LoadError> {
    let mut out = Writer { guest, at: at.start(), end: at.end() };
    match protocol {
        Protocol::Multiboot1 => multiboot1(told, &mut out),
        Protocol::Multiboot2 => multiboot2(told, &mut out),
        // `linux::write`
        Protocol::Linux | Protocol::BootSector => Ok(()),
    }
}

/// KiB of usable memory from `start` on without a gap.
fn kib_from(memory: &MemoryMap, start: u64) -> u32 {
    let run = memory.usable().find(|span| span.contains(Span::sized(start, 1)));
    run.map_or(0, |span| u32::try_from((span.end() - start) >> 10).unwrap_or(u32::MAX))
}

/// The fixed part first, then what it points to.
fn multiboot1<P: PhysMem>(told: &Told<'_>, out: &mut Writer<'_, P>) -> Result<(), LoadError> {
    let info = out.at;
    out.bytes(&[0; layout::SIZE as usize])?;
    let name = out.text(LOADER.as_bytes())?;
    let command_line = out.text(told.command_line)?;
    out.align(8);
    let modules = out.at;
    let mut string = modules + layout::MODULE_SIZE * told.modules.len() as u64;
    for Module { place, command_line, .. } in told.modules {
        out.words(&[place.start() as u32, place.end() as u32, string as u32, 0])?;
        string += command_line.len() as u64 + 1;
    }
    told.modules.iter().try_for_each(|module| out.text(module.command_line).map(drop))?;
    let map = out.at;
    for range in told.memory.iter() {
        out.words(&[20])?;
        out.quads(&[range.span.start(), range.span.len()])?;
        out.words(&[range.kind.e820()])?;
    }
    let map_length = out.at - map;

    let flags =
        layout::HAS_MEMORY | layout::HAS_COMMAND_LINE | layout::HAS_MODULES | layout::HAS_MAP | layout::HAS_LOADER_NAME;
    let fields = [
        (layout::FLAGS, flags),
        (layout::MEM_LOWER, kib_from(told.memory, 0)),
        (layout::MEM_UPPER, kib_from(told.memory, 1 << 20)),
        (layout::COMMAND_LINE, command_line as u32),
        (layout::MODULES_COUNT, told.modules.len() as u32),
        (layout::MODULES, modules as u32),
        (layout::MAP_LENGTH, map_length as u32),
        (layout::MAP, map as u32),
        (layout::LOADER_NAME, name as u32),
    ];
    let mut end = out.at;
    for (offset, value) in fields {
        out.at = info + offset;
        out.words(&[value])?;
    }
    let Extras { boot_device, drives, config_table, apm, vbe, framebuffer, .. } = told.extras;
    // What is pointed to goes behind the rest.
    let mut append = |out: &mut Writer<'_, P>, bytes: &[u8], pointer: u64| -> Result<(), LoadError> {
        out.at = end.next_multiple_of(8);
        let at = out.at;
        out.bytes(bytes)?;
        end = out.at;
        out.at = info + pointer;
        out.words(&[at as u32])
    };
    let mut more = 0;
    if let Some(numbers) = boot_device {
        more |= layout::HAS_BOOT_DEVICE;
        out.at = info + layout::BOOT_DEVICE;
        out.words(&[u32::from_be_bytes(numbers.map(|number| u8::try_from(number).unwrap_or(u8::MAX)))])?;
    }
    if !drives.is_empty() {
        more |= layout::HAS_DRIVES;
        append(out, drives, layout::DRIVES)?;
        out.at = info + layout::DRIVES_LENGTH;
        out.words(&[drives.len() as u32])?;
    }
    if let Some(table) = config_table {
        more |= layout::HAS_CONFIG_TABLE;
        out.at = info + layout::CONFIG_TABLE;
        out.words(&[*table])?;
    }
    if let Some(apm) = apm {
        more |= layout::HAS_APM;
        append(out, apm, layout::APM)?;
    }
    if let Some(vbe) = vbe {
        more |= layout::HAS_VBE;
        let (control, mode) = vbe.blocks.split_at(512);
        append(out, control, layout::VBE_CONTROL)?;
        append(out, mode, layout::VBE_MODE_INFO)?;
        out.at = info + layout::VBE_FIELDS;
        out.bytes(&vbe.fields)?;
    }
    if let Some(Framebuffer { fields, colours }) = framebuffer {
        more |= layout::HAS_FRAMEBUFFER;
        out.at = info + layout::FRAMEBUFFER;
        out.bytes(fields)?;
        if framebuffer.as_ref().is_some_and(Framebuffer::is_indexed) {
            append(out, colours, layout::PALETTE)?;
            out.at = info + layout::PALETTE_LENGTH;
            out.bytes(&(colours.len() as u16 / 3).to_le_bytes())?;
        } else {
            out.at = info + layout::COLOURS;
            out.bytes(colours)?;
        }
    }
    out.at = info + layout::FLAGS;
    out.words(&[flags | more])
}

/// A list of tags behind the total size.
fn multiboot2<P: PhysMem>(told: &Told<'_>, out: &mut Writer<'_, P>) -> Result<(), LoadError> {
    let info = out.at;
    out.at += 8;
    out.tag(tag::COMMAND_LINE, |out| out.text(told.command_line).map(drop))?;
    out.tag(tag::LOADER_NAME, |out| out.text(LOADER.as_bytes()).map(drop))?;
    for module in told.modules {
        out.tag(tag::MODULE, |out| {
            out.words(&[module.place.start() as u32, module.place.end() as u32])?;
            out.text(module.command_line).map(drop)
        })?;
    }
    out.tag(tag::MEMORY, |out| out.words(&[kib_from(told.memory, 0), kib_from(told.memory, 1 << 20)]))?;
    out.tag(tag::MAP, |out| {
        out.words(&[MAP_ENTRY as u32, 0])?;
        told.memory.iter().try_for_each(|range| {
            out.quads(&[range.span.start(), range.span.len()])?;
            out.words(&[range.kind.e820(), 0])
        })
    })?;
    if let Some(rsdp) = told.rsdp {
        let kind = if rsdp.len() > 20 { tag::RSDP_NEW } else { tag::RSDP_OLD };
        out.tag(kind, |out| out.bytes(rsdp))?;
    }
    let Extras { boot_device, apm, vbe, framebuffer, tags, .. } = told.extras;
    if let Some([drive, partition, sub, _]) = boot_device {
        out.tag(tag::BOOT_DEVICE, |out| out.words(&[*drive, *partition, *sub]))?;
    }
    if let Some(vbe) = vbe {
        out.tag(tag::VBE, |out| out.bytes(&vbe.fields).and_then(|()| out.bytes(&vbe.blocks)))?;
    }
    if let Some(framebuffer) = framebuffer {
        out.tag(tag::FRAMEBUFFER, |out| {
            out.bytes(&framebuffer.fields)?;
            out.bytes(&[0; 2])?;
            if framebuffer.is_indexed() {
                out.bytes(&(framebuffer.colours.len() as u16 / 3).to_le_bytes())?;
            }
            out.bytes(&framebuffer.colours)
        })?;
    }
    if let Some(apm) = apm {
        out.tag(tag::APM, |out| out.bytes(apm))?;
    }
    out.bytes(tags)?;
    out.tag(tag::END, |_| Ok(()))?;
    let total = out.at - info;
    out.at = info;
    out.words(&[total as u32, 0])
}

/// Writes ascending into L2's memory, never beyond `end`.
struct Writer<'a, P> {
    guest: &'a GuestMemory<P>,
    at: u64,
    end: u64,
}

impl<P: PhysMem> Writer<'_, P> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        let no_room = LoadError::NoRoom { bytes: bytes.len() as u64 };
        let next = self.at + bytes.len() as u64;
        if next > self.end {
            return Err(no_room);
        }
        self.guest.write_bytes(Gpa::new(self.at), bytes).map_err(|_| no_room)?;
        self.at = next;
        Ok(())
    }

    fn words(&mut self, words: &[u32]) -> Result<(), LoadError> {
        words.iter().try_for_each(|word| self.bytes(&word.to_le_bytes()))
    }

    fn quads(&mut self, quads: &[u64]) -> Result<(), LoadError> {
        quads.iter().try_for_each(|quad| self.bytes(&quad.to_le_bytes()))
    }

    /// Writes a zero-terminated string; its address.
    fn text(&mut self, text: &[u8]) -> Result<u64, LoadError> {
        let at = self.at;
        self.bytes(text)?;
        self.bytes(&[0])?;
        Ok(at)
    }

    fn align(&mut self, to: u64) {
        self.at = self.at.next_multiple_of(to);
    }

    /// Writes a tag: type, size, content, then up to the next multiple of 8.
    fn tag(&mut self, kind: u32, content: impl FnOnce(&mut Self) -> Result<(), LoadError>) -> Result<(), LoadError> {
        let start = self.at;
        self.at += 8;
        content(self)?;
        let end = self.at;
        self.at = start;
        self.words(&[kind, (end - start) as u32])?;
        self.at = end;
        self.align(8);
        Ok(())
    }
}
