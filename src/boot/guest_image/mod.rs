//! L2's image: from the first boot module to a loaded guest hypervisor that waits for its first instruction.

mod elf;
mod error;
mod file;
mod header;
mod info;
mod linux;
mod plan;
mod sector;
#[cfg(test)]
mod tests;

pub use error::LoadError;

use self::{file::File, header::Image};
use crate::{
    addr::{Gpa, Hpa},
    boot::{
        extras::Extras,
        info::{Module, Rsdp},
    },
    mm::{GuestMemory, MemoryMap, NotOwned, PhysMem, Span},
};

/// The protocol by which L2 is started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// Multiboot 1: EAX = 0x2BADB002
    Multiboot1,
    /// Multiboot 2: EAX = 0x36D76289
    Multiboot2,
    /// Linux boot protocol, 32-bit entry: ESI points to the zero page
    Linux,
    /// Firmware's: real mode at 0000:7C00, DL is the drive
    BootSector,
}

impl Protocol {
    /// What EAX holds at L2's first instruction.
    const fn magic(self) -> u32 {
        match self {
            Self::Linux | Self::BootSector => 0,
            Self::Multiboot1 => 0x2BAD_B002,
            Self::Multiboot2 => 0x36D7_6289,
        }
    }
}

/// How L2's first processor starts: 32-bit protected mode, paging off, flat 4 GiB code and data segments, A20 on,
/// interrupts off (a boot sector: real mode, interrupts on); IDTR undefined, ESP undefined by the protocols and here the top of a free page, since images that rely on
/// GRUB's exist. Code is selector 0x10, data 0x18, as Linux wants them; multiboot leaves that open.
///
/// Source: Multiboot specification and Multiboot2 specification, "Machine state"; Linux documentation, "The Linux/x86 Boot
/// Protocol", "32-bit Boot Protocol".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Start {
    /// The protocol that L2's header asks for.
    pub protocol: Protocol,
    /// EIP
    pub entry: Gpa,
    /// EAX
    pub eax: u32,
    /// EBX: the boot information of the multiboot protocols; 0 for Linux
    pub ebx: Gpa,
    /// EDX: the drive that a boot sector is from; 0 for the others
    pub edx: u32,
    /// ESI: Linux's zero page; 0 for multiboot
    pub esi: Gpa,
    /// ESP
    pub esp: Gpa,
    /// GDTR: the table in L2's memory that has those selectors, for Linux
    pub gdt: Option<Span>,
}

/// Loads the first of `modules` as L2, with the others as its modules and its own command line. `memory` is L2's memory
/// map, in which nvmx's range is not usable; `extras` is handed on. The modules get their places.
///
/// Nothing is moved before everything is known to fit.
pub fn load<P: PhysMem>(
    guest: &GuestMemory<P>,
    memory: &MemoryMap,
    modules: &mut [Module<'_>],
    rsdp: Option<&Rsdp>,
    extras: &Extras,
) -> Result<Start, LoadError> {
    let Some((first, rest)) = modules.split_first_mut() else { return Err(LoadError::NoModule) };
    let command_line = first.command_line;
    if let Some(drive) = sector::drive(command_line) {
        return match rest.len() {
            0 => sector::load(guest, memory, first.span, drive?),
            count => Err(LoadError::TooManyForSector(count)),
        };
    }
    let file = File::new(guest.phys(), first.span);
    let image = if linux::is_kernel(&file) { linux::read(&file, memory)? } else { Image::read(&file, extras)? };
    let plan = plan::plan(&image, first, rest, memory, guest.own())?;

    rest.iter().try_for_each(|module| copy(guest, module.span, module.place))?;
    copy(guest, first.span, plan.file)?;
    for segment in &image.segments {
        let (content, zeros) = (segment.in_file, segment.to.len() - segment.in_file);
        let to = segment.to.start();
        copy(guest, Span::sized(plan.file.start() + segment.offset, content), Span::sized(to, content))?;
        if segment.zeroed {
            owned(guest, Span::sized(to + content, zeros), |to| guest.zero(to))?;
        }
    }
    let told = info::Told { command_line, modules: rest, memory, rsdp, extras };
    let (info, none) = (Gpa::new(plan.info.start()), Gpa::new(0));
    let (ebx, esi, gdt) = if image.protocol == Protocol::Linux {
        let file = File::new(guest.phys(), plan.file);
        (none, info, Some(linux::write(&file, &told, guest, plan.info)?))
    } else {
        info::write(image.protocol, &told, guest, plan.info)?;
        (info, none, None)
    };
    let (entry, esp) = (Gpa::new(image.entry), Gpa::new(plan.stack));
    Ok(Start { protocol: image.protocol, entry, eax: image.protocol.magic(), ebx, edx: 0, esi, esp, gdt })
}

/// Copies within L2's memory, unless it already lies there.
fn copy<P: PhysMem>(guest: &GuestMemory<P>, from: Span, to: Span) -> Result<(), LoadError> {
    if from != to {
        owned(guest, to, |to| guest.copy(Hpa::new(from.start()), to))?;
    }
    Ok(())
}

/// Does it with L2's memory at `to`, if all of it is L2's.
fn owned<P: PhysMem>(
    guest: &GuestMemory<P>,
    to: Span,
    write: impl FnOnce(Span) -> Result<(), NotOwned>,
) -> Result<(), LoadError> {
    write(to).map_err(|_| LoadError::OverlapsNvmx { wanted: to, own: guest.own() })
}
