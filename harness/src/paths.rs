//! Where things are: the checkout, its build folder, the cache, and the lock on it.

use crate::proc;
use crate::ui::Ui;
use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The folders of one checkout.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The checkout
    pub root: PathBuf,
    /// `target/` of the checkout
    pub target: PathBuf,
    /// What is kept between checkouts: Bochs, the sysroot
    pub cache: PathBuf,
}

impl Paths {
    /// Finds the checkout and makes the cache folder.
    ///
    /// # Errors
    /// If no cache folder can be made.
    pub fn find() -> Result<Self> {
        let root = match std::env::var_os("NVMX_ROOT") {
            Some(root) => PathBuf::from(root),
            None => Path::new(env!("CARGO_MANIFEST_DIR")).join(".."),
        };
        let root = root.canonicalize().with_context(|| format!("no checkout at {}", root.display()))?;
        let target = root.join("target");
        let candidates = cache_candidates(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME"), &target);
        let cache = candidates
            .iter()
            .find(|folder| std::fs::create_dir_all(folder).is_ok() && writable(folder))
            .with_context(|| format!("cannot make a cache folder; tried {candidates:?}"))?;
        Ok(Paths { cache: cache.clone(), root, target })
    }

    /// The folder in which boots leave their files.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn boots(&self) -> Result<PathBuf> {
        let folder = self.target.join("nvmx").join("boots");
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder)
    }

    /// Keeps other runs out of the cache and the build folder until dropped.
    ///
    /// # Errors
    /// If the lock file cannot be made, or after Ctrl-C while waiting.
    pub fn lock(&self, ui: &Ui) -> Result<Lock> {
        let file = self.cache.join("lock");
        let lock = File::create(&file).with_context(|| format!("cannot make {}", file.display()))?;
        let mut step = None;
        while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            step.get_or_insert_with(|| ui.step("waiting for another nvmx that sets things up"));
            proc::check_interrupt()?;
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(Lock { _file: lock })
    }
}

/// The right to change the cache. The operating system takes it back when the process ends.
pub struct Lock {
    _file: File,
}

fn cache_candidates(xdg: Option<std::ffi::OsString>, home: Option<std::ffi::OsString>, target: &Path) -> Vec<PathBuf> {
    let set = |v: Option<std::ffi::OsString>| v.filter(|v| Path::new(v).is_absolute()).map(PathBuf::from);
    let base = set(xdg).or_else(|| set(home).map(|home| home.join(".cache")));
    base.map(|base| base.join("nvmx")).into_iter().chain([target.join("nvmx").join("cache")]).collect()
}

/// Copies the files of a folder and those below it over what is there.
///
/// # Errors
/// If one cannot be read or written.
pub fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from)? {
        let (path, target) = entry.map(|e| (e.path(), to.join(e.file_name())))?;
        if path.is_dir() {
            std::fs::create_dir_all(&target)?;
            copy_tree(&path, &target)?;
        } else {
            std::fs::copy(&path, &target).with_context(|| format!("cannot write {}", target.display()))?;
        }
    }
    Ok(())
}

fn writable(folder: &Path) -> bool {
    tempfile::Builder::new().prefix(".probe").tempfile_in(folder).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_the_user_wants_it_else_in_home_else_in_the_checkout() {
        let target = Path::new("/repo/target");
        let inside = PathBuf::from("/repo/target/nvmx/cache");
        let of =
            |xdg: Option<&str>, home: Option<&str>| cache_candidates(xdg.map(Into::into), home.map(Into::into), target);
        assert_eq!(of(Some("/x"), Some("/home/me")), [PathBuf::from("/x/nvmx"), inside.clone()]);
        assert_eq!(of(None, Some("/home/me")), [PathBuf::from("/home/me/.cache/nvmx"), inside.clone()]);
        assert_eq!(of(Some("relative"), None), [inside]);
    }
}
