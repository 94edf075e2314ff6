//! What a boot needs from the machine: a compiler for the bare-metal target, an emulator, a boot disk maker, kernels.
//!
//! Beside them stands what every part of the host program uses: where things are ([`paths`]), how programs are started
//! ([`proc`]), what the user sees ([`ui`], [`output`]) and how it ends ([`error`]).

pub mod apt;
pub mod bochs;
pub mod error;
pub mod grub;
pub mod initramfs;
pub mod linux;
pub mod output;
pub mod paths;
pub mod proc;
pub mod programs;
pub mod qemu;
pub mod release;
pub mod sources;
pub mod sysroot;
pub mod tcg;
pub mod toolchain;
pub mod ui;
pub mod xen;

use anyhow::Result;
use std::path::{Path, PathBuf};

/// Something that must be there, and the package that brings it.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// A program's name, or absolute paths of which one must exist
    pub what: What,
    /// The Debian package
    pub package: &'static str,
}

/// How a [`Need`] is looked for.
#[derive(Clone, Copy, Debug)]
pub enum What {
    /// A program on PATH
    Program(&'static str),
    /// One of these files
    File(&'static [&'static str]),
}

impl Need {
    /// A program.
    pub const fn program(name: &'static str, package: &'static str) -> Self {
        Need { what: What::Program(name), package }
    }

    /// A file at one of these places.
    pub const fn file(places: &'static [&'static str], package: &'static str) -> Self {
        Need { what: What::File(places), package }
    }

    /// Where it is, if it is there.
    pub fn find(&self) -> Option<PathBuf> {
        match self.what {
            What::Program(name) => program(name),
            What::File(places) => places.iter().map(PathBuf::from).find(|p| p.exists()),
        }
    }
}

/// A program on PATH, or where system tools are when PATH forgets them.
pub fn program(name: &str) -> Option<PathBuf> {
    which::which(name)
        .ok()
        .or_else(|| ["/usr/bin", "/usr/sbin", "/sbin"].iter().map(|d| Path::new(d).join(name)).find(|p| p.is_file()))
}

/// Installs what is missing among `needs`.
///
/// # Errors
/// As [`apt::install`].
pub fn require(ui: &crate::ui::Ui, needs: &[Need], why: &str) -> Result<()> {
    let missing: Vec<&str> = needs.iter().filter(|n| n.find().is_none()).map(|n| n.package).collect();
    if missing.is_empty() { Ok(()) } else { apt::install(ui, &missing, why) }
}
