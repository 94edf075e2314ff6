//! KVM's own counters of a vCPU: a file of named numbers.
//!
//! Source: Linux documentation, "The Definitive KVM API Documentation", KVM_GET_STATS_FD.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

/// `_IO(KVMIO, 0xce)`
const KVM_GET_STATS_FD: libc::c_ulong = 0xAECE;

/// The counters that are reported, by KVM's name and by ours.
pub const NAMES: [(&str, &str); 4] =
    [("exits", "l0_exits"), ("nested_run", "l0_nested_runs"), ("io_exits", "l0_io_exits"), ("pf_taken", "l0_faults")];

/// The open counters of a machine's vCPUs.
pub struct Stats {
    files: Vec<File>,
    /// Where each of [`NAMES`] is in each file; a KVM that does not count it has `None`
    offsets: [Option<u64>; NAMES.len()],
}

/// Values at one moment.
pub type Snapshot = [u64; NAMES.len()];

impl Stats {
    /// Opens the counters of all vCPUs.
    ///
    /// # Errors
    /// If this KVM has none.
    pub fn open(vcpus: &[impl AsRawFd]) -> Result<Self> {
        let files = vcpus.iter().map(open).collect::<Result<Vec<_>>>()?;
        let first = files.first().context("a machine without a CPU")?;
        let mut header = [0; 24];
        first.read_exact_at(&mut header, 0).context("KVM's counters have no header")?;
        // The order is the same in the files of all vCPUs.
        let offsets = offsets(&header, |buffer, at| first.read_exact_at(buffer, at).is_ok())?;
        Ok(Stats { files, offsets })
    }

    /// Counters of a machine that has none.
    #[cfg(test)]
    pub fn none() -> Self {
        Stats { files: Vec::new(), offsets: [None; NAMES.len()] }
    }

    /// Reads all counters, those of all vCPUs together. One that cannot be read is 0.
    pub fn snapshot(&self) -> Snapshot {
        self.offsets.map(|offset| {
            let Some(at) = offset else { return 0 };
            let mut value = [0; 8];
            let read = |file: &File| file.read_exact_at(&mut value, at).map_or(0, |()| u64::from_le_bytes(value));
            self.files.iter().map(read).sum()
        })
    }

    /// What happened between two moments, as fields of a record.
    pub fn fields(&self, from: &Snapshot, to: &Snapshot) -> String {
        let mut text = String::new();
        for (i, (_, name)) in NAMES.iter().enumerate() {
            if self.offsets[i].is_some() {
                text.push_str(&format!(" {name}={}", to[i].saturating_sub(from[i])));
            }
        }
        text
    }
}

fn open(vcpu: &impl AsRawFd) -> Result<File> {
    // SAFETY: the request takes no argument and returns a new descriptor.
    let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD) };
    ensure!(fd >= 0, "this KVM has no counters to read: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Finds the counters: header {flags, name size, count, id offset, descriptor offset, data offset}; a descriptor is
/// {flags, exponent: 16 bits, size: 16 bits, offset, bucket size, name}.
fn offsets(header: &[u8; 24], read: impl Fn(&mut [u8], u64) -> bool) -> Result<[Option<u64>; NAMES.len()]> {
    let word =
        |bytes: &[u8], at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
    let (name_size, count) = (word(header, 4), word(header, 8));
    let (descriptors, data) = (u64::from(word(header, 16)), u64::from(word(header, 20)));
    ensure!(name_size <= 256 && count <= 4096, "KVM's counters have a strange header");
    let mut found = [None; NAMES.len()];
    let size = 16 + u64::from(name_size);
    let mut descriptor = vec![0; size as usize];
    for i in 0..u64::from(count) {
        ensure!(read(&mut descriptor, descriptors + i * size), "KVM's counters end too early");
        let name = descriptor[16..].split(|b| *b == 0).next().unwrap_or_default();
        if let Some(n) = NAMES.iter().position(|(theirs, _)| theirs.as_bytes() == name) {
            found[n] = Some(data + u64::from(word(&descriptor, 8)));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_name() {
        let mut file = Vec::new();
        for word in [0u32, 16, 3, 24, 24, 24 + 3 * 32] {
            file.extend(word.to_le_bytes());
        }
        for (offset, name) in [(0u32, "exits"), (8, "halt_exits"), (16, "nested_run")] {
            file.extend([0; 8]);
            file.extend(offset.to_le_bytes());
            file.extend([0; 4]);
            let mut name = name.as_bytes().to_vec();
            name.resize(16, 0);
            file.extend(name);
        }
        let header: [u8; 24] = file[..24].try_into().unwrap();
        let read = |buffer: &mut [u8], at: u64| {
            let at = at as usize;
            file.get(at..at + buffer.len()).is_some_and(|bytes| {
                buffer.copy_from_slice(bytes);
                true
            })
        };
        assert_eq!(offsets(&header, read).unwrap(), [Some(120), Some(136), None, None]);
        assert!(offsets(&header, |_, _| false).is_err());
    }
}
