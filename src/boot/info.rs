//! What the loader says, as an owned value: nothing of the loader's memory is needed afterwards.

use core::fmt;

use arrayvec::{ArrayString, ArrayVec};

use crate::{
    addr::Hpa,
    boot::extras::Extras,
    mm::{MemoryMap, PhysMem, Span, map::TooManyRanges},
};

/// Most modules that nvmx takes.
pub const MAX_MODULES: usize = 64;
/// Most bytes of all command lines together: nvmx's and those of the modules.
pub const MAX_COMMAND_LINES: usize = 8 << 10;

/// The text of all command lines, one behind the other.
#[derive(Clone, Default, Debug)]
pub struct CommandLines(ArrayString<MAX_COMMAND_LINES>);

/// A command line in [`CommandLines`]; the default is an empty one.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct CommandLine {
    start: u16,
    end: u16,
}

impl CommandLines {
    /// The text of a command line.
    pub fn get(&self, line: CommandLine) -> &str {
        self.0.get(usize::from(line.start)..usize::from(line.end)).unwrap_or_default()
    }

    /// Adds a command line.
    ///
    /// # Errors
    /// [`InfoError::CommandLinesTooLong`]
    pub fn push(&mut self, line: &str) -> Result<CommandLine, InfoError> {
        let start = self.0.len() as u16;
        self.0.try_push_str(line).map_err(|_| InfoError::CommandLinesTooLong)?;
        Ok(CommandLine { start, end: self.0.len() as u16 })
    }

    /// Reads a zero-terminated command line; bytes that are no ASCII become `?`. None at all when `at` is 0.
    ///
    /// # Errors
    /// [`InfoError::CommandLinesTooLong`]
    pub(super) fn read(&mut self, at: Hpa, memory: &impl PhysMem) -> Result<CommandLine, InfoError> {
        let start = self.0.len() as u16;
        if at.get() != 0 {
            append(at, memory, &mut self.0).ok_or(InfoError::CommandLinesTooLong)?;
        }
        Ok(CommandLine { start, end: self.0.len() as u16 })
    }

    /// A command line without what precedes the place `from` in it, and without the word there.
    pub(super) fn without_file_name(&self, line: CommandLine, from: usize) -> CommandLine {
        let name = self.get(line).get(from..).unwrap_or_default();
        let rest = name.trim_start().split_once(' ').map_or("", |(_, rest)| rest.trim_start());
        CommandLine { start: line.end - rest.len() as u16, end: line.end }
    }
}

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

const _: () = assert!(MAX_COMMAND_LINES <= u16::MAX as usize);

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
    /// All command lines.
    pub lines: CommandLines,
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
    /// Command lines that are longer together than nvmx takes.
    CommandLinesTooLong,
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
            Self::CommandLinesTooLong => {
                write!(
                    f,
                    "the command lines, nvmx's and those of the modules, have more than {MAX_COMMAND_LINES} bytes"
                )
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
    append(at, memory, &mut text).map(|()| text)
}

/// Reads such a string behind what is there; `None` if it has no room.
fn append<const N: usize>(at: Hpa, memory: &impl PhysMem, text: &mut ArrayString<N>) -> Option<()> {
    for offset in 0.. {
        let mut byte = [0];
        memory.read_bytes(at.checked_add(offset)?, &mut byte);
        if byte == [0] {
            return Some(());
        }
        let c = char::from(byte[0]);
        text.try_push(if c.is_ascii() { c } else { '?' }).ok()?;
    }
    None
}
