//! What `--l2` names: a guest of `l2-guests/`, Linux, Xen, or the user's own image or project.

pub mod build;
pub mod template;

use crate::backend::{self, Drive, Medium, Payload, Protocol};
use crate::session::Session;
use anyhow::{Context, Result};
use nvmx_setup::error::Stop;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// What names Linux with KVM.
pub const LINUX_KVM: &str = "linux-kvm";
/// What names Xen.
pub const XEN: &str = "xen";

/// A guest hypervisor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum L2 {
    /// One of `l2-guests/`
    Guest(String),
    /// Linux with KVM
    LinuxKvm,
    /// Xen with Linux
    Xen,
    /// An image that is there
    File(PathBuf),
    /// A folder in which `make` or `cargo` builds one
    Project(PathBuf),
}

impl L2 {
    /// Finds what the user means: a name of ours goes first, `./NAME` is always a path.
    ///
    /// # Errors
    /// [`Stop::Usage`] if it is a path and nothing is there.
    pub fn find(text: &str, root: &Path) -> Result<Self> {
        match text {
            LINUX_KVM => return Ok(L2::LinuxKvm),
            XEN => return Ok(L2::Xen),
            "" => return Err(Stop::Usage("--l2 names nothing".into()).into()),
            _ => {}
        }
        let is_path = text.contains('/');
        if !is_path && root.join("l2-guests").join(text).join("Cargo.toml").is_file() {
            return Ok(L2::Guest(text.into()));
        }
        let path = PathBuf::from(text);
        match std::fs::metadata(&path) {
            Ok(found) if found.is_dir() => Ok(L2::Project(path)),
            Ok(_) => Ok(L2::File(path)),
            Err(error) if is_path => Err(Stop::Usage(format!("--l2 {text}: {error}")).into()),
            Err(_) => Ok(L2::Guest(text.into())),
        }
    }
}

/// Beyond this a header is not looked for.
const HEAD: usize = 36 * 1024;
const MULTIBOOT1: u32 = 0x1BAD_B002;
const MULTIBOOT2: u32 = 0xE852_50D6;

/// By which protocol a boot loader starts an image.
///
/// # Errors
/// [`Stop::Usage`] if by none, with what it looks like.
pub fn protocol(path: &Path) -> Result<Protocol> {
    let mut head = Vec::new();
    let mut file = File::open(path).map_err(|e| Stop::Usage(format!("{}: {e}", path.display())))?;
    file.by_ref()
        .take(HEAD as u64)
        .read_to_end(&mut head)
        .with_context(|| format!("cannot read {}", path.display()))?;
    of_head(&head).map_err(|what| Stop::Usage(format!("{} cannot be L2: {what}", path.display())).into())
}

fn of_head(head: &[u8]) -> Result<Protocol, String> {
    let word = |at: usize| head.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
    let sums = |magic: u32, at: usize, words: usize| {
        (0..words).fold(0u32, |sum, i| sum.wrapping_add(word(at + 4 * i))) == 0 && word(at) == magic
    };
    // As nvmx does: an image with both headers is started by the first.
    if (0..head.len().min(8192)).step_by(4).any(|at| sums(MULTIBOOT1, at, 3)) {
        return Ok(Protocol::Multiboot1);
    }
    if (0..head.len().min(32768)).step_by(8).any(|at| sums(MULTIBOOT2, at, 4)) {
        return Ok(Protocol::Multiboot2);
    }
    let boot_sector = head.get(510..512) == Some(&[0x55, 0xAA]);
    if boot_sector && head.get(0x202..0x206) == Some(b"HdrS") {
        return Ok(Protocol::Linux);
    }
    if head.get(0x8001..0x8006) == Some(b"CD001") || boot_sector && head.get(..2) != Some(b"MZ") {
        return Ok(Protocol::Firmware);
    }
    Err(match head {
        [0x7F, b'E', b'L', b'F', ..] => {
            "it is an ELF file without a multiboot or multiboot2 header in its first 8 or 32 KiB"
        }
        [b'M', b'Z', ..] => "it is a UEFI application (or a DOS program), and the machine has a BIOS, no UEFI",
        [] => "it is empty",
        _ => "it has neither a multiboot header, nor that of a Linux kernel (bzImage), nor a boot sector",
    }
    .into())
}

/// What a drive with this image reads: an image that boots both ways is a CD, unless its name ends in `.img`.
///
/// # Errors
/// If it cannot be read.
pub fn drive(path: &Path) -> Result<Drive> {
    let mut mark = [0; 5];
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let cd = file.read_exact_at(&mut mark, 0x8001).is_ok() && &mark == b"CD001";
    let named_disk = path.extension().is_some_and(|end| end == "img");
    let medium = if cd && !named_disk { Medium::Cd } else { Medium::Disk };
    Ok(Drive { path: path.to_path_buf(), medium })
}

/// The module by which nvmx starts a drive's boot sector, written into the session's folder.
///
/// # Errors
/// [`Stop::Usage`] if firmware would start nothing of it.
pub fn boot_sector(session: &Session, drive: &Drive, name: &str) -> Result<Payload> {
    let folder = session.paths.target.join("nvmx/sectors");
    std::fs::create_dir_all(&folder)?;
    let path = folder.join(name);
    std::fs::write(&path, backend::drive::boot_sectors(drive)?)?;
    let number = match drive.medium {
        Medium::Disk => 0x80,
        Medium::Cd => 0xE0 + session.backend.cds(),
    };
    Ok(Payload::new(path, format!("boot-sector={number:#x}")))
}

/// `FILE[,ARGS]`: a comma in the file's name is doubled.
///
/// # Errors
/// [`Stop::Usage`] if there is no such file.
pub fn module(text: &str) -> Result<Payload> {
    const COMMA: char = '\u{0}';
    let text = text.replace(",,", &COMMA.to_string());
    let (file, args) = text.split_once(',').unwrap_or((&text, ""));
    payload(&file.replace(COMMA, ","), &args.replace(COMMA, ",,"), "--module")
}

/// A file of the user's that must be there.
///
/// # Errors
/// [`Stop::Usage`] if it is not.
pub fn payload(file: &str, args: &str, option: &str) -> Result<Payload> {
    match std::fs::metadata(file) {
        Ok(found) if found.is_file() => Ok(Payload::new(std::path::absolute(file)?, args)),
        Ok(_) => Err(Stop::Usage(format!("{option} {file}: it is not a file")).into()),
        Err(error) => Err(Stop::Usage(format!("{option} {file}: {error}")).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(magic: u32, words: &[u32]) -> Vec<u8> {
        let sum = words.iter().fold(magic, |sum, word| sum.wrapping_add(*word));
        let all = std::iter::once(magic).chain(words.iter().copied()).chain([0u32.wrapping_sub(sum)]);
        all.flat_map(u32::to_le_bytes).collect()
    }

    #[test]
    fn an_image_is_known_by_its_header_wherever_that_stands() {
        for at in [0, 4, 4096, 8188 - 12] {
            let mut image = vec![0; at];
            image.extend(header(MULTIBOOT1, &[3]));
            assert_eq!(of_head(&image), Ok(Protocol::Multiboot1), "{at}");
        }
        let mut image = vec![0; 16384];
        image.extend(header(MULTIBOOT2, &[0, 24]));
        assert_eq!(of_head(&image), Ok(Protocol::Multiboot2));
        image.splice(64..64 + 12, header(MULTIBOOT1, &[3]));
        assert_eq!(of_head(&image), Ok(Protocol::Multiboot1));
        // A magic number whose checksum is wrong is no header.
        image[72] ^= 1;
        assert_eq!(of_head(&image), Ok(Protocol::Multiboot2));
        let mut linux = vec![0; 0x300];
        linux[510..512].copy_from_slice(&[0x55, 0xAA]);
        assert_eq!(of_head(&linux), Ok(Protocol::Firmware));
        linux[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(of_head(&linux), Ok(Protocol::Linux));
    }

    #[test]
    fn what_cannot_boot_is_told_what_it_is() {
        for (image, text) in [
            (&b"\x7FELF\x02"[..], "ELF file without a multiboot"),
            (b"MZ\x90", "UEFI"),
            (b"", "empty"),
            (b"#!/bin/sh", "neither"),
        ] {
            assert!(of_head(image).unwrap_err().contains(text), "{text}");
        }
        let mut disk = vec![0; 0x9000];
        disk[0x8001..0x8006].copy_from_slice(b"CD001");
        assert_eq!(of_head(&disk), Ok(Protocol::Firmware));
        // A UEFI application with a mark where a boot sector has one.
        let mut both = b"MZ".to_vec();
        both.resize(512, 0);
        both[510..].copy_from_slice(&[0x55, 0xAA]);
        assert!(of_head(&both).unwrap_err().contains("UEFI"));
    }

    #[test]
    fn names_of_ours_go_before_files_and_a_path_must_be_there() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        assert_eq!(L2::find("cascade", &root).unwrap(), L2::Guest("cascade".into()));
        assert_eq!(L2::find("xen", &root).unwrap(), L2::Xen);
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().to_string_lossy().into_owned();
        assert_eq!(L2::find(&text, &root).unwrap(), L2::Project(folder.path().into()));
        let file = folder.path().join("image");
        assert!(L2::find(&file.to_string_lossy(), &root).unwrap_err().to_string().contains("No such file"));
        std::fs::write(&file, "").unwrap();
        assert_eq!(L2::find(&file.to_string_lossy(), &root).unwrap(), L2::File(file));
        // Neither ours nor a file: the list of names is the answer.
        assert_eq!(L2::find("wibble", &root).unwrap(), L2::Guest("wibble".into()));
    }

    #[test]
    fn a_module_is_a_file_and_its_command_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a,b");
        std::fs::write(&file, "").unwrap();
        let text = format!("{},x=1,y", file.to_string_lossy().replace(',', ",,"));
        let payload = module(&text).unwrap();
        assert_eq!((payload.path, payload.args.as_str()), (file, "x=1,y"));
        assert!(module("/no/such").unwrap_err().to_string().starts_with("--module /no/such: "));
        assert!(module("/").unwrap_err().to_string().contains("it is not a file"));
    }
}
