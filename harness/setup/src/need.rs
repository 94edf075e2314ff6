//! What must be there, and where it is looked for.

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
