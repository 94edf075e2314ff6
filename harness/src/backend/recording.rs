//! Where a boot records its exits.

use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Where the exits of a boot are recorded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recording {
    /// The folder of the emulator's logs; `None`: that of the boot
    folder: Option<PathBuf>,
    /// nvmx, to know it among the images
    pub nvmx: PathBuf,
}

impl Recording {
    /// In this folder.
    pub fn new(folder: &TempDir, nvmx: &Path) -> Self {
        Recording { folder: Some(folder.path().to_path_buf()), nvmx: nvmx.to_path_buf() }
    }

    /// Beside the other files of the boot.
    pub fn kept(nvmx: &Path) -> Self {
        Recording { folder: None, nvmx: nvmx.to_path_buf() }
    }

    /// The log of the boot with this name: in the session's folder, or relative to the boot's.
    pub fn log(&self, name: &str) -> PathBuf {
        let file = format!("{}.exits", name.replace('/', "-"));
        self.folder.as_ref().map_or(PathBuf::from(&file), |folder| folder.join(&file))
    }
}
