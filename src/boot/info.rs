//! What the loader says.
//!
//! All of it is an owned value but for what has no bound: command lines and the list of modules stay where the loader left them
//! until nvmx has memory of its own ([`BootInfo::keep`]), and nothing is put there before.

use core::fmt;

use arrayvec::{ArrayString, ArrayVec};

use crate::{
    addr::Hpa,
    boot::{extras::Extras, text::Text},
    mm::{MemoryMap, PhysMem, Span, map::TooManyRanges},
};

/// The first 36 bytes of the RSDP; 20 in ACPI 1.0.
pub type Rsdp = ArrayVec<u8, 36>;

/// A boot module as the loader lists it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ListedModule {
    /// Where the loader put it.
    pub span: Span,
    /// Its command line, without the file's name.
    pub line: Text,
}

/// A boot module, and all that L2 is told of it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Module<'a> {
    /// Where the loader put it.
    pub span: Span,
    /// Where L2 finds it: elsewhere if it lay in L2's way.
    pub place: Span,
    /// Its command line, without the file's name.
    pub command_line: &'a [u8],
}

/// Where the list of modules is, in the format of the protocol.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct ModuleList {
    /// The first entry, or the first tag of multiboot2.
    pub first: u64,
    /// What lies behind the last.
    pub end: u64,
    /// Modules in it.
    pub count: u32,
    /// Command lines start with the file's name.
    pub named: bool,
}

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
    pub command_line: Text,
    /// The machine's memory.
    pub memory: MemoryMap,
    /// Bytes of memory that nobody uses, since the loader's map has more ranges than nvmx keeps.
    pub given_up: u64,
    /// Where the modules are listed; see [`Self::modules`].
    pub(super) list: ModuleList,
    /// Bytes of the modules' command lines.
    pub(super) text: u64,
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
    for offset in 0.. {
        let mut byte = [0];
        memory.read_bytes(at.checked_add(offset)?, &mut byte);
        if byte == [0] {
            break;
        }
        let c = char::from(byte[0]);
        text.try_push(if c.is_ascii() { c } else { '?' }).ok()?;
    }
    Some(text)
}
