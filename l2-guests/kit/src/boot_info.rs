//! What the loader says: command line and modules, from multiboot, multiboot2 or PVH information.
//!
//! Sources: Multiboot Specification 0.6.96, "Boot information format"; Multiboot2 Specification 2.0, "Boot information";
//! Xen public headers, "start_info".

use arrayvec::ArrayVec;

/// EAX at entry from a multiboot loader.
pub const MULTIBOOT1: u32 = 0x2BAD_B002;
/// EAX at entry from a multiboot2 loader.
pub const MULTIBOOT2: u32 = 0x36D7_6289;
/// First word of PVH's start information; the boot code puts it into EAX.
pub const PVH: u32 = 0x336E_C578;

const MAX_MODULES: usize = 8;

/// A file that was loaded with the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Module {
    /// First byte
    pub start: u64,
    /// Size in bytes
    pub size: u64,
}

const MAX_RANGES: usize = 32;

/// A range of the memory map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// First byte
    pub start: u64,
    /// First byte after it
    pub end: u64,
    /// Memory for whoever wants it
    pub usable: bool,
}

/// What the guest uses of the loader's information.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BootInfo {
    /// Name of the protocol
    pub loader: &'static str,
    /// Command line without the image's name; empty if there is none or it is not UTF-8
    pub command_line: &'static str,
    /// Modules in order, at most eight
    pub modules: ArrayVec<Module, MAX_MODULES>,
    /// The memory map as the loader gives it, at most 32 ranges
    pub memory: ArrayVec<Range, MAX_RANGES>,
}

/// Reads physical memory.
pub trait Memory {
    /// `len` bytes from `address`, or fewer if there is no more.
    fn bytes(&self, address: u64, len: usize) -> &'static [u8];

    /// A 32-bit value, 0 if there is none.
    fn u32(&self, address: u64) -> u32 {
        self.bytes(address, 4).try_into().map(u32::from_le_bytes).unwrap_or(0)
    }

    /// A 64-bit value, 0 if there is none.
    fn u64(&self, address: u64) -> u64 {
        u64::from(self.u32(address)) | u64::from(self.u32(address.wrapping_add(4))) << 32
    }

    /// Text up to the first zero byte.
    fn text(&self, address: u64) -> &'static str {
        let bytes = self.bytes(address, 4096);
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        bytes.get(..end).and_then(|b| core::str::from_utf8(b).ok()).unwrap_or("").trim()
    }
}

impl BootInfo {
    /// Reads what the boot code got in EAX and EBX.
    pub fn read(memory: &impl Memory, magic: u32, info: u64) -> Self {
        match magic {
            MULTIBOOT1 => Self::multiboot1(memory, info),
            MULTIBOOT2 => Self::multiboot2(memory, info),
            PVH => Self::pvh(memory, info),
            _ => Self { loader: "unknown", command_line: "", modules: ArrayVec::new(), memory: ArrayVec::new() },
        }
    }

    fn multiboot1(memory: &impl Memory, info: u64) -> Self {
        let flags = memory.u32(info);
        let mut modules = ArrayVec::new();
        if flags & 1 << 3 != 0 {
            let (count, list) = (memory.u32(info + 20), u64::from(memory.u32(info + 24)));
            for entry in (0..u64::from(count)).map(|i| list + i * 16) {
                let (start, end) = (u64::from(memory.u32(entry)), u64::from(memory.u32(entry + 4)));
                let _ = modules.try_push(Module { start, size: end.saturating_sub(start) });
            }
        }
        let command_line = if flags & 1 << 2 != 0 { memory.text(u64::from(memory.u32(info + 16))) } else { "" };
        // A multiboot loader puts the image's name first.
        let mut map = ArrayVec::new();
        if flags & 1 << 6 != 0 {
            let (mut entry, end) = (u64::from(memory.u32(info + 48)), u64::from(memory.u32(info + 44)));
            let end = entry + end;
            while entry < end {
                add(&mut map, memory, entry + 4);
                entry += u64::from(memory.u32(entry)).max(16) + 4;
            }
        }
        Self { loader: "multiboot", command_line: without_name(command_line), modules, memory: map }
    }

    fn multiboot2(memory: &impl Memory, info: u64) -> Self {
        let end = info + u64::from(memory.u32(info));
        let (modules, map) = (ArrayVec::new(), ArrayVec::new());
        let mut found = Self { loader: "multiboot2", command_line: "", modules, memory: map };
        let mut tag = info + 8;
        while tag < end {
            let size = u64::from(memory.u32(tag + 4));
            match memory.u32(tag) {
                1 => found.command_line = memory.text(tag + 8),
                3 => {
                    let (start, stop) = (u64::from(memory.u32(tag + 8)), u64::from(memory.u32(tag + 12)));
                    let _ = found.modules.try_push(Module { start, size: stop.saturating_sub(start) });
                }
                6 => {
                    let step = u64::from(memory.u32(tag + 8)).max(24);
                    let entries = (tag + 16..tag + size.max(16)).step_by(step as usize);
                    entries.for_each(|entry| add(&mut found.memory, memory, entry));
                }
                0 => break,
                _ => {}
            }
            tag += size.max(8).next_multiple_of(8);
        }
        found
    }

    fn pvh(memory: &impl Memory, info: u64) -> Self {
        let (count, list) = (memory.u32(info + 12), memory.u64(info + 16));
        let mut modules = ArrayVec::new();
        for entry in (0..u64::from(count)).map(|i| list + i * 32) {
            let _ = modules.try_push(Module { start: memory.u64(entry), size: memory.u64(entry + 8) });
        }
        let (entries, map_at) = (memory.u32(info + 48), memory.u64(info + 40));
        let mut map = ArrayVec::new();
        (0..u64::from(entries)).for_each(|i| add(&mut map, memory, map_at + i * 24));
        Self { loader: "pvh", command_line: memory.text(memory.u64(info + 24)), modules, memory: map }
    }

    /// The value of the option `key` on the command line: see [`option`].
    pub fn option(&self, key: &str) -> Option<&'static str> {
        option(self.command_line, key)
    }
}

/// Adds the range at `entry`: start, length, and 1 if it is usable, as all three protocols have it.
fn add(map: &mut ArrayVec<Range, MAX_RANGES>, memory: &impl Memory, entry: u64) {
    let start = memory.u64(entry);
    let end = start.saturating_add(memory.u64(entry + 8));
    let _ = map.try_push(Range { start, end, usable: memory.u32(entry + 16) == 1 });
}

/// The value of `key=value`, or `""` for a bare `key`; `None` if the command line has neither.
pub fn option<'a>(command_line: &'a str, key: &str) -> Option<&'a str> {
    command_line.split_ascii_whitespace().find_map(|word| match word.strip_prefix(key)? {
        "" => Some(""),
        rest => rest.strip_prefix('='),
    })
}

/// The first word whose name is none of these, nor one of the kit's own.
#[cfg(any(test, target_os = "none"))]
pub(crate) fn unknown<'a>(command_line: &'a str, names: &[&str]) -> Option<&'a str> {
    let mut words = command_line.split_ascii_whitespace().map(|word| word.split('=').next().unwrap_or(word));
    words.find(|name| !matches!(*name, "caps" | "high") && !names.contains(name))
}

/// GRUB's `multiboot` and QEMU put the image's path before the options, with a slash in it.
fn without_name(command_line: &str) -> &str {
    let (first, rest) = command_line.split_once(' ').unwrap_or((command_line, ""));
    if first.contains('/') && !first.contains('=') { rest.trim() } else { command_line }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory that starts at an address; the test's bytes live as long as the program.
    struct Image(u64, &'static [u8]);

    impl Memory for Image {
        fn bytes(&self, address: u64, len: usize) -> &'static [u8] {
            let start = usize::try_from(address.wrapping_sub(self.0)).unwrap_or(usize::MAX).min(self.1.len());
            &self.1[start..start.saturating_add(len).min(self.1.len())]
        }
    }

    fn image(start: u64, words: &[(usize, &[u8])]) -> Image {
        let mut bytes = vec![0; 0x1000];
        for (offset, data) in words {
            bytes[*offset..offset + data.len()].copy_from_slice(data);
        }
        Image(start, bytes.leak())
    }

    fn le(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    #[test]
    fn a_word_that_is_not_known_is_found() {
        assert_eq!(unknown("events=5 caps=1,2 part", &["events", "part"]), None);
        assert_eq!(unknown("events=5 evnts=6", &["events"]), Some("evnts"));
        assert_eq!(unknown("", &[]), None);
    }

    #[test]
    fn multiboot1_gives_command_line_and_modules() {
        let info = le(&[1 << 2 | 1 << 3, 0, 0, 0, 0x8100, 2, 0x8200]);
        let modules = le(&[0x10000, 0x10005, 0, 0, 0x20000, 0x30000, 0, 0]);
        let memory = image(0x8000, &[(0, &info), (0x100, b"/boot/kernel touch=0x10 quiet\0"), (0x200, &modules)]);
        let info = BootInfo::read(&memory, MULTIBOOT1, 0x8000);
        assert_eq!(info.command_line, "touch=0x10 quiet");
        assert_eq!(info.modules[..], [Module { start: 0x10000, size: 5 }, Module { start: 0x20000, size: 0x10000 }]);
    }

    #[test]
    fn multiboot2_gives_command_line_and_modules() {
        let mut tags = le(&[8 + 16 + 24 + 8, 0, 1, 12]);
        tags.extend(b"spin\0\0\0\0");
        tags.extend(le(&[3, 17, 0x10000, 0x10005, 0, 0, 0, 8]));
        let memory = image(0x8000, &[(0, &tags)]);
        let info = BootInfo::read(&memory, MULTIBOOT2, 0x8000);
        assert_eq!(info.command_line, "spin");
        assert_eq!(info.modules[..], [Module { start: 0x10000, size: 5 }]);
    }

    #[test]
    fn pvh_gives_command_line_and_modules() {
        let info = le(&[PVH, 1, 0, 1, 0x8200, 0, 0x8100, 0]);
        let memory = image(0x8000, &[(0, &info), (0x100, b"halt\0"), (0x200, &le(&[0x10000, 0, 5, 0]))]);
        let info = BootInfo::read(&memory, PVH, 0x8000);
        assert_eq!((info.loader, info.command_line), ("pvh", "halt"));
        assert_eq!(info.modules[..], [Module { start: 0x10000, size: 5 }]);
    }

    #[test]
    fn every_protocol_gives_the_memory_map() {
        let range = le(&[0x1000, 0, 0x2000, 0, 1, 0]);
        let wanted = [Range { start: 0x1000, end: 0x3000, usable: true }];
        let info = le(&[1 << 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24, 0x8200]);
        let entry = [&le(&[20])[..], &range[..20]].concat();
        let memory = image(0x8000, &[(0, &info), (0x200, &entry)]);
        assert_eq!(BootInfo::read(&memory, MULTIBOOT1, 0x8000).memory[..], wanted);
        let tags = [le(&[8 + 40 + 8, 0, 6, 40, 24, 0]), range.clone(), le(&[0, 8])].concat();
        assert_eq!(BootInfo::read(&image(0x8000, &[(0, &tags)]), MULTIBOOT2, 0x8000).memory[..], wanted);
        let info = le(&[PVH, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0x8200, 0, 1, 0]);
        assert_eq!(BootInfo::read(&image(0x8000, &[(0, &info), (0x200, &range)]), PVH, 0x8000).memory[..], wanted);
    }

    #[test]
    fn a_broken_tag_ends_the_walk() {
        let tags = le(&[0xFFFF_FFFF, 0, 7, 0, 7, 0]);
        assert_eq!(BootInfo::read(&image(0x8000, &[(0, &tags)]), MULTIBOOT2, 0x8000).command_line, "");
    }

    #[test]
    fn an_option_is_found_by_its_whole_key() {
        assert_eq!(option("touch=0x10 spin", "touch"), Some("0x10"));
        assert_eq!(option("touch=0x10 spin", "spin"), Some(""));
        assert_eq!(option("touch=0x10 spinning", "spin"), None);
    }
}
