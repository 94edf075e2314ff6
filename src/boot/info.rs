//! What the loader says, as an owned value: nothing of the loader's memory is needed afterwards.

use core::fmt;

use arrayvec::{ArrayString, ArrayVec};

use crate::{
    addr::Hpa,
    boot::extras::Extras,
    mm::{MemoryMap, PhysMem, Span, map::TooManyRanges},
};

/// Most modules that nvmx takes.
pub const MAX_MODULES: usize = 16;
/// Longest command line of nvmx or of a module, in bytes.
pub const MAX_COMMAND_LINE: usize = 512;

/// A command line.
pub type CommandLine = ArrayString<MAX_COMMAND_LINE>;

/// The first 36 bytes of the RSDP; 20 in ACPI 1.0.
pub type Rsdp = ArrayVec<u8, 36>;

/// A boot module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Module {
    /// Where the loader put it.
    pub span: Span,
    /// Its command line, without the file's name.
    pub command_line: CommandLine,
}

/// Modules in the loader's order.
pub type Modules = ArrayVec<Module, MAX_MODULES>;

/// The protocol by which nvmx itself was loaded.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum LoadedBy {
    /// Multiboot, the first version: it has no place for ACPI's root pointer
    #[default]
    Multiboot1,
    /// Multiboot2
    Multiboot2,
    /// PVH
    Pvh,
}

/// The loader's information.
#[derive(Clone, Default, Debug)]
pub struct BootInfo {
    /// How nvmx was loaded.
    pub protocol: LoadedBy,
    /// How the loader calls itself; empty if it does not.
    pub loader: ArrayString<64>,
    /// nvmx's command line, without the file's name.
    pub command_line: CommandLine,
    /// The machine's memory.
    pub memory: MemoryMap,
    /// Bytes of memory that nobody uses, since the loader's map has more ranges than nvmx keeps.
    pub given_up: u64,
    /// Boot modules; the first is L2.
    pub modules: Modules,
    /// The ACPI root pointer, if the loader gave it.
    pub rsdp: Option<Rsdp>,
    /// What only L2 may want to know.
    pub extras: Extras,
}

/// Boot information that nvmx cannot use.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum InfoError {
    /// Started by none of the protocols that nvmx speaks.
    UnknownProtocol(u32),
    /// The information contradicts its format.
    Malformed(&'static str),
    /// There is no memory map.
    NoMemoryMap,
    /// More ranges in the memory map than nvmx keeps.
    TooManyRanges,
    /// More modules than nvmx takes.
    TooManyModules,
    /// A command line that is longer than nvmx takes.
    CommandLineTooLong,
}

impl fmt::Display for InfoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownProtocol(magic) => {
                write!(f, "the loader spoke neither multiboot, multiboot2 nor PVH (EAX was {magic:#x})")
            }
            Self::Malformed(what) => write!(f, "the loader's boot information is malformed: {what}"),
            Self::NoMemoryMap => f.write_str("the loader gave no memory map"),
            Self::TooManyRanges => f.write_str("the loader's memory map has too many ranges"),
            Self::TooManyModules => write!(f, "more than {MAX_MODULES} modules"),
            Self::CommandLineTooLong => {
                write!(f, "a command line (nvmx's or a module's) is longer than {MAX_COMMAND_LINE} bytes")
            }
        }
    }
}

impl From<TooManyRanges> for InfoError {
    fn from(_: TooManyRanges) -> Self {
        Self::TooManyRanges
    }
}

/// Reads a zero-terminated string of at most `N` bytes; bytes that are no ASCII become `?`. `None` when it is longer.
pub(super) fn read_text<const N: usize>(at: Hpa, memory: &impl PhysMem) -> Option<ArrayString<N>> {
    let mut text = ArrayString::new();
    for offset in 0..=N as u64 {
        let mut byte = [0];
        memory.read_bytes(at.checked_add(offset)?, &mut byte);
        if byte == [0] {
            return Some(text);
        }
        let c = char::from(byte[0]);
        text.try_push(if c.is_ascii() { c } else { '?' }).ok()?;
    }
    None
}

/// Reads a command line; none at all when `at` is 0.
pub(super) fn read_command_line(at: Hpa, memory: &impl PhysMem) -> Result<CommandLine, InfoError> {
    if at.get() == 0 {
        return Ok(CommandLine::new());
    }
    read_text(at, memory).ok_or(InfoError::CommandLineTooLong)
}
