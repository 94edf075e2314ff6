//! Why L2 cannot be loaded, in words for the person who built or named the image.

use core::fmt;

use crate::mm::Span;

/// What is wrong with the first module, or with the place that it asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LoadError {
    /// There is no module.
    NoModule,
    /// It is no ELF file for this processor, nor does a multiboot header say where it goes.
    NotElf {
        /// Its size in bytes.
        size: u64,
        /// Its first bytes; zeros behind its end.
        first: [u8; 8],
    },
    /// The ELF file contradicts its format.
    BrokenElf(&'static str),
    /// It has no multiboot header.
    NoHeader {
        /// Its size in bytes.
        size: u64,
    },
    /// The multiboot header contradicts its format.
    BrokenHeader(&'static str),
    /// The Linux kernel contradicts its format.
    BrokenLinux(&'static str),
    /// The Linux kernel is too old.
    OldLinux {
        /// Its boot protocol.
        version: u16,
        /// What nvmx needs.
        oldest: u16,
    },
    /// More modules than one, which Linux takes for its initial file system.
    TooManyForLinux(usize),
    /// More modules than a boot sector.
    TooManyForSector(usize),
    /// The number of a boot sector's drive is none.
    BadDrive,
    /// The command line is too long for the Linux kernel.
    LineTooLongForLinux {
        /// Bytes that it takes.
        longest: u32,
    },
    /// The header requires what nvmx does not provide.
    Unsupported(&'static str),
    /// The multiboot2 header requires a kind of information that nvmx does not provide.
    UnsupportedInformation(u32),
    /// It wants to lie where nvmx lies.
    OverlapsNvmx {
        /// Where it wants to lie.
        wanted: Span,
        /// nvmx's range.
        own: Span,
    },
    /// It wants to lie where there is no usable memory.
    NoMemory(Span),
    /// Two of its segments overlap.
    SegmentsOverlap(Span, Span),
    /// No room for what must be moved out of the image's way, or for the boot information.
    NoRoom {
        /// Bytes.
        bytes: u64,
    },
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const EXPECTED: &str = "expected is an ELF image (32 or 64 bit, x86) with a multiboot or multiboot2 header, \
                                any file whose multiboot header has address fields, or a Linux kernel (bzImage)";
        match self {
            Self::NoModule => {
                write!(f, "no boot module: nvmx needs the image of L2 as its first module; {EXPECTED}")
            }
            Self::NotElf { size, first } => {
                write!(
                    f,
                    "the first module is no x86 ELF file and has no multiboot header with address fields: {size} bytes, the first are"
                )?;
                for byte in first.iter().take(usize::try_from(*size).unwrap_or(usize::MAX)) {
                    write!(f, " {byte:02x}")?;
                }
                write!(f, "; {EXPECTED}")
            }
            Self::BrokenElf(what) => write!(f, "the first module is a broken ELF file: {what}"),
            Self::NoHeader { size } => write!(
                f,
                "the first module ({size} bytes) is an ELF file without a multiboot header in its first 8 KiB or a \
                 multiboot2 header in its first 32 KiB; {EXPECTED}"
            ),
            Self::BrokenHeader(what) => write!(f, "the multiboot header of the first module is broken: {what}"),
            Self::BrokenLinux(what) => write!(f, "the first module is a broken Linux kernel: {what}"),
            Self::OldLinux { version, oldest } => {
                let [minor, major] = version.to_le_bytes();
                let [least, of] = oldest.to_le_bytes();
                write!(
                    f,
                    "the first module is a Linux kernel with boot protocol {major}.{minor}; nvmx needs {of}.{least} or newer"
                )
            }
            Self::TooManyForLinux(count) => write!(
                f,
                "the first module is a Linux kernel and takes one module, its initial file system; there are {count} modules \
                 for it"
            ),
            Self::TooManyForSector(count) => {
                write!(f, "the first module is a boot sector and takes no modules; there are {count} for it")
            }
            Self::BadDrive => {
                write!(f, "the first module is a boot sector: expected is boot-sector=0x80, the drive's number in DL")
            }
            Self::LineTooLongForLinux { longest } => {
                write!(f, "the Linux kernel takes a command line of at most {longest} bytes")
            }
            Self::Unsupported(what) => write!(f, "the first module requires {what}, which nvmx does not provide"),
            Self::UnsupportedInformation(kind) => {
                write!(
                    f,
                    "the first module requires multiboot2 information of type {kind}, which nvmx does not provide"
                )
            }
            Self::OverlapsNvmx { wanted, own } => {
                write!(f, "the first module wants to be loaded at {wanted}, which overlaps nvmx at {own}")
            }
            Self::NoMemory(wanted) => {
                write!(f, "the first module wants to be loaded at {wanted}, where there is no usable memory")
            }
            Self::SegmentsOverlap(a, b) => write!(f, "segments of the first module overlap: {a} and {b}"),
            Self::NoRoom { bytes } => write!(
                f,
                "too little memory: no free {} KiB beside the image of L2 for its modules and boot information",
                bytes.div_ceil(1024)
            ),
        }
    }
}
