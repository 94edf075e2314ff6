//! Files that the user names: `-` is standard output, a regular file is replaced whole or not at all, and anything else (a
//! device, a pipe) is written to as it is. What cannot be written is told before the work begins.

use crate::error::Stop;
use anyhow::{Context, Result};
use rustix::fs::{Access, access};
use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Component, Path, PathBuf};

/// A place for the user's output, looked at beforehand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Output {
    /// As the user wrote it
    named: PathBuf,
    way: Way,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Way {
    Stdout,
    /// A new file with the rights that the user's mask leaves, or another one in the place of a regular file
    Whole(PathBuf),
    /// Opened and written
    Through(PathBuf),
}

impl Output {
    /// Looks at the place and writes nothing.
    ///
    /// # Errors
    /// [`Stop::Usage`] if it cannot be written.
    pub fn prepare(path: &Path) -> Result<Self> {
        let way = way(path).map_err(|why| Stop::Usage(format!("cannot write {}: {why}", path.display())))?;
        Ok(Output { named: path.to_path_buf(), way })
    }

    /// As the user wrote it.
    pub fn name(&self) -> std::path::Display<'_> {
        self.named.display()
    }

    /// Whether it is standard output, which then gets nothing else.
    pub fn is_stdout(&self) -> bool {
        self.way == Way::Stdout
    }

    /// Writes the whole text.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, text: &str) -> Result<()> {
        self.write_bytes(text.as_bytes())
    }

    /// [`Self::write`] of what is no text.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_bytes(&self, text: &[u8]) -> Result<()> {
        let problem = || format!("cannot write {}", self.named.display());
        match &self.way {
            Way::Stdout => {
                let mut out = std::io::stdout().lock();
                let written = out.write_all(text).and_then(|()| out.flush());
                written.map_err(|e| Stop::Guest(format!("cannot write standard output: {e}")).into())
            }
            Way::Through(path) => {
                let mut file =
                    OpenOptions::new().write(true).truncate(is_regular(path)).open(path).with_context(problem)?;
                file.write_all(text).with_context(problem)
            }
            Way::Whole(path) => whole(path, text).with_context(problem),
        }
    }
}

fn is_regular(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.is_file())
}

/// How a place is written; else why not.
fn way(path: &Path) -> Result<Way, String> {
    if ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|name| path == Path::new(name)) {
        return Ok(Way::Stdout);
    }
    if path.as_os_str().is_empty() {
        return Err("it has no name".into());
    }
    let target = follow(path)?;
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => Err("it is a folder".into()),
        Ok(found) if found.file_type().is_socket() => Err("it is a socket".into()),
        Ok(found) => {
            access(path, Access::WRITE_OK).map_err(|e| reason(e.into()))?;
            // Names in /proc and /dev/fd stand for open files; other names of the same file must go on naming it.
            let alone =
                found.is_file() && found.nlink() == 1 && !target.starts_with("/proc") && !path.starts_with("/dev");
            let replaceable = alone && folder_of(&target).is_ok_and(|folder| access(folder, Access::WRITE_OK).is_ok());
            Ok(if replaceable { Way::Whole(target) } else { Way::Through(path.to_path_buf()) })
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if matches!(target.components().next_back(), None | Some(Component::ParentDir | Component::CurDir))
                || path.as_os_str().to_string_lossy().ends_with('/')
            {
                return Err("it names no file".into());
            }
            let folder = folder_of(&target)?;
            if !folder.is_dir() {
                return Err(format!("there is no folder {}", folder.display()));
            }
            access(folder, Access::WRITE_OK).map_err(|e| format!("{}: {}", folder.display(), reason(e.into())))?;
            Ok(Way::Whole(target))
        }
        Err(error) => Err(reason(error)),
    }
}

fn reason(error: std::io::Error) -> String {
    match error.kind() {
        ErrorKind::PermissionDenied => "it may not be written by you".into(),
        ErrorKind::ReadOnlyFilesystem => "the file system is read-only".into(),
        _ => error.to_string(),
    }
}

/// Where symbolic links lead, the file itself need not exist.
fn follow(path: &Path) -> Result<PathBuf, String> {
    const MOST: usize = 40;
    let mut at = path.to_path_buf();
    for _ in 0..MOST {
        let Ok(next) = std::fs::read_link(&at) else { return Ok(at) };
        at = folder_of(&at)?.join(next);
    }
    Err("too many symbolic links".into())
}

fn folder_of(path: &Path) -> Result<&Path, String> {
    match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Ok(Path::new(".")),
        Some(folder) => Ok(folder),
        None => Err("it is a folder".into()),
    }
}

/// Another file in the place of the old one, with its rights and owner; a new one has those that the user's mask leaves.
fn whole(path: &Path, text: &[u8]) -> std::io::Result<()> {
    let folder = folder_of(path).map_err(std::io::Error::other)?;
    let old: Option<Metadata> = std::fs::metadata(path).ok();
    let mut file =
        tempfile::Builder::new().prefix(".nvmx-").permissions(Permissions::from_mode(0o666)).tempfile_in(folder)?;
    file.write_all(text)?;
    if let Some(old) = old {
        let new: &File = file.as_file();
        let owned = new.metadata()?;
        if (owned.uid(), owned.gid()) != (old.uid(), old.gid())
            && fchown(new, Some(old.uid()), Some(old.gid())).is_err()
        {
            // Another's file that may be written but not be given away.
            return std::fs::write(path, text);
        }
        new.set_permissions(old.permissions())?;
    }
    file.as_file().sync_data()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::process::Command;

    fn write(path: &Path, text: &str) -> Result<()> {
        Output::prepare(path)?.write(text)
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn error(path: &Path) -> String {
        Output::prepare(path).unwrap_err().to_string()
    }

    #[test]
    fn a_regular_file_is_replaced_whole_and_keeps_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.json");
        let output = Output::prepare(&path).unwrap();
        assert!(!path.exists(), "a look must not make the file");
        output.write("one").unwrap();
        assert_eq!(mode(&path) & 0o600, 0o600);
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        output.write("two").unwrap();
        assert_eq!((std::fs::read_to_string(&path).unwrap().as_str(), mode(&path)), ("two", 0o640));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn links_are_followed_and_stay_links() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("deep")).unwrap();
        symlink("deep/file", at("link")).unwrap();
        symlink("link", at("to-link")).unwrap();
        for text in ["new", "old"] {
            write(&at("to-link"), text).unwrap();
            assert_eq!(std::fs::read_to_string(at("deep/file")).unwrap(), text);
        }
        assert!(at("link").is_symlink() && at("to-link").is_symlink() && !at("deep/file").is_symlink());
        symlink("round", at("round")).unwrap();
        assert!(error(&at("round")).contains("too many symbolic links"));
        std::fs::hard_link(at("deep/file"), at("other-name")).unwrap();
        write(&at("deep/file"), "both").unwrap();
        assert_eq!(std::fs::read_to_string(at("other-name")).unwrap(), "both");
    }

    #[test]
    fn devices_and_pipes_are_written_to_and_stay_what_they_are() {
        let null = Path::new("/dev/null");
        write(null, "text").unwrap();
        assert!(std::fs::metadata(null).unwrap().file_type().is_char_device());
        let full = Path::new("/dev/full");
        if full.exists() {
            assert!(format!("{:#}", write(full, "text").unwrap_err()).contains("No space left"));
            assert!(std::fs::metadata(full).unwrap().file_type().is_char_device());
        }
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || std::fs::read_to_string(pipe).unwrap()
        });
        write(&pipe, "through").unwrap();
        assert_eq!(reader.join().unwrap(), "through");
        assert!(std::fs::metadata(&pipe).unwrap().file_type().is_fifo());
    }

    #[test]
    fn what_cannot_be_written_is_told_beforehand() {
        let folder = tempfile::tempdir().unwrap();
        assert!(error(folder.path()).ends_with("it is a folder"));
        assert!(error(&folder.path().join("no/such")).contains("there is no folder"));
        assert!(error(&folder.path().join("new/")).contains("names no file"));
        assert!(error(Path::new("")).contains("it has no name"));
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(error(&socket).ends_with("it is a socket"));
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(error(&file.join("below")).contains("Not a directory"));
        assert_eq!(crate::error::Stop::Usage(String::new()).code(), 2);
    }

    #[test]
    fn standard_output_has_several_names() {
        for name in ["-", "/dev/stdout", "/dev/fd/1"] {
            assert!(Output::prepare(Path::new(name)).unwrap().is_stdout());
        }
    }
}
