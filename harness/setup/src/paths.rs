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
        Self::look(|folder| std::fs::create_dir_all(folder).is_ok() && writable(folder))
    }

    /// [`Self::find`] that makes nothing: the cache folder is where it would be made.
    ///
    /// # Errors
    /// If there is no checkout.
    pub fn found() -> Result<Self> {
        // The nearest folder above that is there decides.
        Self::look(|folder| {
            let there = folder.ancestors().find(|above| above.exists());
            there.is_some_and(|above| rustix::fs::access(above, rustix::fs::Access::WRITE_OK).is_ok())
        })
    }

    fn look(usable: impl Fn(&Path) -> bool) -> Result<Self> {
        let root = match std::env::var_os("NVMX_ROOT") {
            Some(root) => PathBuf::from(root),
            None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."),
        };
        let root = root.canonicalize().with_context(|| format!("no checkout at {}", root.display()))?;
        let target = root.join("target");
        let candidates = cache_candidates(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME"), &target);
        let cache = candidates
            .iter()
            .find(|folder| usable(folder))
            .with_context(|| format!("cannot make a cache folder; tried {candidates:?}"))?;
        Ok(Paths { cache: cache.clone(), root, target })
    }

    /// Clears what set-ups that were killed left in the cache. Only who holds the lock may: nobody else works there then.
    pub fn clear_stale(&self, _lock: &Lock) {
        for entry in std::fs::read_dir(&self.cache).into_iter().flatten().flatten() {
            if is_temporary(&entry.file_name().to_string_lossy()) {
                // What cannot be removed does no harm.
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
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

/// Whether a name in the cache is that of a folder in which something was being made: a word and six random characters.
fn is_temporary(name: &str) -> bool {
    let made = ["bochs-", "sysroot-", ".qemu-", ".linux-", ".xen-", ".apt-"];
    let rest = made.iter().find_map(|prefix| name.strip_prefix(prefix));
    rest.is_some_and(|rest| rest.len() == 6 && rest.bytes().all(|b| b.is_ascii_alphanumeric()))
}

fn writable(folder: &Path) -> bool {
    tempfile::Builder::new().prefix(".probe").tempfile_in(folder).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_being_made_is_temporary() {
        for name in ["bochs-a1B2c3", "sysroot-xyzXYZ", ".linux-012345"] {
            assert!(is_temporary(name), "{name}");
        }
        for name in ["bochs-3.0-8a9b49621b38d255", "sysroot-1.96.0-117c026f85b14fbe", "lock", "linux-nvmx1-6.1.0"] {
            assert!(!is_temporary(name), "{name}");
        }
    }

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
