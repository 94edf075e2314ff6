//! What a release has ready: the images, Bochs, and which compiler made them. `./nvmx release` makes one, the front door finds it
//! by its folder `release/` and names that in `NVMX_RELEASE`.

use crate::error::Stop;
use crate::toolchain::Toolchain;
use anyhow::Result;
use std::path::{Path, PathBuf};

/// The folder of a release.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Release {
    folder: PathBuf,
}

impl Release {
    /// The one that this program is from, if it is from one.
    pub fn find() -> Option<Self> {
        let folder = std::env::var_os("NVMX_RELEASE").filter(|folder| !folder.is_empty())?;
        Some(Release { folder: folder.into() })
    }

    /// In this folder.
    pub fn in_folder(folder: &Path) -> Self {
        Release { folder: folder.to_path_buf() }
    }

    /// Bochs.
    pub fn bochs(&self) -> PathBuf {
        self.folder.join("bochs/bochs")
    }

    /// Where the images are.
    pub fn image_folder(&self) -> PathBuf {
        self.folder.join("images")
    }

    /// Where the words about the compiler are.
    pub fn compiler_file(&self) -> PathBuf {
        self.folder.join("compiler")
    }

    /// The compiler that made the images. It is not here: what needs one cannot be built.
    ///
    /// # Errors
    /// [`Stop::Environment`] if the release is not whole.
    pub fn toolchain(&self) -> Result<Toolchain> {
        let nowhere = PathBuf::from("/nonexistent");
        let text = std::fs::read_to_string(self.compiler_file())
            .map_err(|error| Stop::environment(format!("the release is not whole: compiler: {error}")))?;
        // What people read, and below it what counts depend on.
        let (text, version) = text.trim().split_once('\n').unwrap_or((text.trim(), "unknown"));
        let (text, version) = (text.into(), version.into());
        Ok(Toolchain { cargo: nowhere.clone(), rustc: nowhere, linker: None, text, version })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_names_its_compiler() {
        let folder = tempfile::tempdir().unwrap();
        let release = Release::in_folder(folder.path());
        assert!(release.toolchain().unwrap_err().to_string().contains("not whole"));
        std::fs::write(release.compiler_file(), "rustc 1.99\n").unwrap();
        assert_eq!(release.toolchain().unwrap().text, "rustc 1.99");
    }
}
