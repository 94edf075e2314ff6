//! Where a boot records its exits.

use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Where the exits of a boot are recorded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recording {
    by: By,
    /// nvmx, to know it among the images
    pub nvmx: PathBuf,
}

/// Who records.
#[derive(Clone, PartialEq, Eq, Debug)]
enum By {
    /// The emulator, into this folder; `None`: that of the boot
    Emulator(Option<PathBuf>),
    /// nvmx itself, which tells it at its end
    Nvmx,
}

impl Recording {
    /// By the emulator, in this folder.
    pub fn new(folder: &TempDir, nvmx: &Path) -> Self {
        Recording { by: By::Emulator(Some(folder.path().to_path_buf())), nvmx: nvmx.to_path_buf() }
    }

    /// By the emulator, beside the other files of the boot.
    pub fn kept(nvmx: &Path) -> Self {
        Recording { by: By::Emulator(None), nvmx: nvmx.to_path_buf() }
    }

    /// By nvmx.
    pub fn told(nvmx: &Path) -> Self {
        Recording { by: By::Nvmx, nvmx: nvmx.to_path_buf() }
    }

    /// The emulator's log of the boot with this name: in the session's folder, or relative to the boot's.
    pub fn log(&self, name: &str) -> Option<PathBuf> {
        let By::Emulator(folder) = &self.by else { return None };
        let file = format!("{}.exits", name.replace('/', "-"));
        Some(folder.as_ref().map_or(PathBuf::from(&file), |folder| folder.join(&file)))
    }
}
