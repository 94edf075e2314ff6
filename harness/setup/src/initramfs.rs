//! An initial file system for Linux: a cpio archive of a few files.
//!
//! Source: Linux documentation, "initramfs buffer format" (the "newc" format).

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// An archive that grows file by file.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    files: u32,
}

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

impl Archive {
    /// Adds a file that may be executed.
    ///
    /// # Errors
    /// If it is too long for the format.
    pub fn add(&mut self, name: &str, data: &[u8]) -> Result<()> {
        self.entry(name, PROGRAM, data)
    }

    /// Adds a file of the host.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn add_file(&mut self, name: &str, path: &Path) -> Result<()> {
        let data = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        self.add(name, &data)
    }

    /// Adds an empty folder.
    ///
    /// # Errors
    /// Never; as [`Self::add`].
    pub fn add_folder(&mut self, name: &str) -> Result<()> {
        self.entry(name, FOLDER, &[])
    }

    /// Adds folders of the host, with the files in them.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn add_folders(&mut self, base: &Path, names: &[&str]) -> Result<()> {
        for folder in names {
            self.add_folder(folder)?;
            let mut files: Vec<PathBuf> = std::fs::read_dir(base.join(folder))?.flatten().map(|e| e.path()).collect();
            files.sort();
            for path in files {
                let name = path.file_name().and_then(|n| n.to_str()).context("a file has a strange name")?;
                self.add_file(&format!("{folder}/{name}"), &path)?;
            }
        }
        Ok(())
    }

    /// The whole archive.
    ///
    /// # Errors
    /// Never; as [`Self::add`].
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<()> {
        let size = u32::try_from(data.len()).with_context(|| format!("{name} is too long for an initramfs"))?;
        self.files += 1;
        // Magic; inode, mode, owner, group, links, time, size, device and its node (two each), length of the name, checksum.
        let fields = [self.files, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend(b"070701");
        fields.iter().for_each(|f| self.bytes.extend(format!("{f:08x}").bytes()));
        self.bytes.extend(name.bytes().chain([0]));
        self.pad();
        self.bytes.extend(data);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_the_last_is_the_trailer() {
        let mut archive = Archive::default();
        archive.add_folder("dev").unwrap();
        archive.add("init", b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        let text = |range: std::ops::Range<usize>| String::from_utf8_lossy(&bytes[range]).into_owned();
        assert_eq!(text(0..6), "070701");
        assert_eq!(text(14..22), format!("{FOLDER:08x}"));
        assert_eq!(text(110..113), "dev");
        // The second entry starts at a multiple of four.
        let second = 116;
        assert_eq!(text(second..second + 6), "070701");
        assert_eq!(text(second + 54..second + 62), "00000005");
        assert_eq!(text(second + 116..second + 121), "hello");
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
        assert_eq!(bytes.len() % 4, 0);
    }
}
