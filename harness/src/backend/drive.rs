//! A drive of L2's: its image, and the boot sectors in it.
//!
//! Source: "El Torito" Bootable CD-ROM Format Specification 1.0, "Booting Catalog"; BIOS Boot Specification 1.01, "Boot via INT 19h".

use super::{Drive, Medium};
use anyhow::{Context, Result};
use nvmx_setup::error::Stop;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The drive's image in a boot's folder: no name of the user's stands in a configuration.
pub const NAME: &str = "drive";

const SECTOR: u64 = 512;
const CD_SECTOR: u64 = 2048;
/// Bochs counts cylinders of 16 heads and 63 sectors.
const CYLINDER: u64 = 16 * 63 * SECTOR;
/// A boot image beyond this does not fit below 640 KiB.
const MOST: u64 = 0x9_0000 - 0x7C00;

/// Puts the drive's image into the folder: the file itself, or a copy with whole cylinders.
///
/// # Errors
/// If it cannot be read or copied.
pub fn put(drive: &Drive, folder: &Path) -> Result<()> {
    let (from, to) = (std::path::absolute(&drive.path)?, folder.join(NAME));
    let bytes = std::fs::metadata(&from).with_context(|| format!("cannot read {}", from.display()))?.len();
    if drive.medium == Medium::Cd || bytes % CYLINDER == 0 {
        std::os::unix::fs::symlink(&from, &to)?;
        return Ok(());
    }
    std::fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
    File::options().write(true).open(&to)?.set_len(bytes.next_multiple_of(CYLINDER))?;
    Ok(())
}

/// What firmware would load of the drive and start.
///
/// # Errors
/// [`Stop::Usage`] if there is nothing that it would start.
pub fn boot_sectors(drive: &Drive) -> Result<Vec<u8>> {
    let file = File::open(&drive.path).with_context(|| format!("cannot read {}", drive.path.display()))?;
    let found = match drive.medium {
        Medium::Disk => of_disk(&file),
        Medium::Cd => of_cd(&file),
    };
    found.map_err(|what| Stop::Usage(format!("{} cannot be L2: {what}", drive.path.display())).into())
}

fn read(file: &File, at: u64, bytes: u64) -> Result<Vec<u8>, String> {
    let mut content = vec![0; usize::try_from(bytes).map_err(|e| e.to_string())?];
    file.read_exact_at(&mut content, at).map_err(|_| format!("it ends before byte {}", at + bytes))?;
    Ok(content)
}

fn of_disk(file: &File) -> Result<Vec<u8>, String> {
    let sector = read(file, 0, SECTOR)?;
    let marked = sector.get(510..512) == Some(&[0x55, 0xAA]);
    if marked { Ok(sector) } else { Err("its first sector is no boot sector".into()) }
}

fn of_cd(file: &File) -> Result<Vec<u8>, String> {
    let record = read(file, 17 * CD_SECTOR, CD_SECTOR)?;
    if record.get(..7) != Some(b"\0CD001\x01") || record.get(7..30) != Some(b"EL TORITO SPECIFICATION") {
        return Err("it is a CD image without a boot record (El Torito)".into());
    }
    let word = |bytes: &[u8], at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let catalog = read(file, u64::from(word(&record, 0x47).unwrap_or(0)) * CD_SECTOR, 64)?;
    let entry = &catalog[32..];
    match (catalog[0], catalog[1], entry[0], entry[1] & 0xF) {
        (1, 0, 0x88, 0) => {}
        (1, 0, 0x88, _) => return Err("its boot image stands for a floppy or hard disk, and nvmx emulates none".into()),
        (1, _, 0x88, _) => return Err("its boot image is for UEFI, and the machine has a BIOS".into()),
        _ => return Err("its boot catalog has no entry that boots".into()),
    }
    let sectors = u64::from(u16::from_le_bytes([entry[6], entry[7]]));
    let bytes = sectors * SECTOR;
    if bytes == 0 || bytes > MOST {
        return Err(format!("its boot image has {sectors} sectors, which firmware does not load"));
    }
    read(file, u64::from(word(entry, 8).unwrap_or(0)) * CD_SECTOR, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn image(folder: &Path, content: &[u8]) -> PathBuf {
        let path = folder.join("image");
        std::fs::write(&path, content).unwrap();
        path
    }

    /// A CD whose catalog is its sector 19, and its boot image sector 20.
    fn cd(platform: u8, media: u8, sectors: u16) -> Vec<u8> {
        let mut cd = vec![0; 24 * CD_SECTOR as usize];
        let at = |sector: usize| sector * CD_SECTOR as usize;
        cd[at(17)..at(17) + 7].copy_from_slice(b"\0CD001\x01");
        cd[at(17) + 7..at(17) + 30].copy_from_slice(b"EL TORITO SPECIFICATION");
        cd[at(17) + 0x47] = 19;
        (cd[at(19)], cd[at(19) + 1]) = (1, platform);
        (cd[at(19) + 32], cd[at(19) + 33]) = (0x88, media);
        cd[at(19) + 38..at(19) + 40].copy_from_slice(&sectors.to_le_bytes());
        cd[at(19) + 40] = 20;
        cd[at(20)] = 0xFA;
        cd
    }

    #[test]
    fn the_boot_image_of_a_cd_is_found_by_its_catalog() {
        let folder = tempfile::tempdir().unwrap();
        let of = |content: &[u8]| {
            boot_sectors(&Drive { path: image(folder.path(), content), medium: Medium::Cd }).map_err(|e| e.to_string())
        };
        let found = of(&cd(0, 0, 4)).unwrap();
        assert_eq!((found.len(), found[0]), (2048, 0xFA));
        for (content, text) in [
            (cd(0xEF, 0, 4), "UEFI"),
            (cd(0, 2, 4), "floppy"),
            (cd(0, 0, 0), "0 sectors"),
            (cd(0, 0, 2000), "2000 sectors"),
            (cd(0, 0, 100), "it ends before byte"),
            (vec![0; 24 * 2048], "without a boot record"),
            (vec![0; 100], "it ends before byte"),
        ] {
            assert!(of(&content).unwrap_err().contains(text), "{text}");
        }
    }

    #[test]
    fn a_disk_boots_by_its_first_sector_and_gets_whole_cylinders() {
        let folder = tempfile::tempdir().unwrap();
        let mut content = vec![0; 3000];
        let drive = |content: &[u8]| Drive { path: image(folder.path(), content), medium: Medium::Disk };
        assert!(boot_sectors(&drive(&content)).unwrap_err().to_string().contains("no boot sector"));
        content[510..512].copy_from_slice(&[0x55, 0xAA]);
        assert_eq!(boot_sectors(&drive(&content)).unwrap().len(), 512);
        let place = folder.path().join("boot");
        std::fs::create_dir(&place).unwrap();
        put(&drive(&content), &place).unwrap();
        assert_eq!(std::fs::metadata(place.join(NAME)).unwrap().len(), CYLINDER);
        assert_eq!(std::fs::metadata(folder.path().join("image")).unwrap().len(), 3000);
    }
}
