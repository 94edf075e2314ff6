//! Putting a multiboot image and its modules into memory.
//!
//! Source: Multiboot Specification 0.6.96, "OS image format", "Machine state", "Boot information format".

use anyhow::{Context, Result, ensure};

/// What EAX holds when the image starts.
pub const MAGIC: u32 = 0x2BAD_B002;
const HEADER_MAGIC: u32 = 0x1BAD_B002;
/// Where the boot information goes: usable memory that no image is linked for.
const INFO: usize = 0x1_0000;
const INFO_END: usize = 0x2_0000;
const PAGE: usize = 4096;

/// A file and its command line.
pub struct File<'a> {
    /// The bytes
    pub data: &'a [u8],
    /// The command line
    pub line: &'a str,
}

/// Where the image starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Start {
    /// EIP
    pub entry: u32,
    /// EBX
    pub info: u32,
}

/// The header's address fields.
struct Header {
    offset: usize,
    header: u32,
    load: u32,
    load_end: u32,
    bss_end: u32,
    entry: u32,
}

impl Header {
    fn find(image: &[u8]) -> Result<Self> {
        let word = |at: usize| image.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
        let is_header = |at: &usize| {
            let (flags, sum) = (word(at + 4), word(at + 8));
            word(*at) == HEADER_MAGIC && HEADER_MAGIC.wrapping_add(flags).wrapping_add(sum) == 0
        };
        let end = image.len().min(8192);
        let offset = (0..end).step_by(4).find(is_header).context("the kernel has no multiboot header")?;
        ensure!(word(offset + 4) & 1 << 16 != 0, "the kernel's multiboot header has no address fields");
        Ok(Header {
            offset,
            header: word(offset + 12),
            load: word(offset + 16),
            load_end: word(offset + 20),
            bss_end: word(offset + 24),
            entry: word(offset + 28),
        })
    }
}

/// Loads the image, the modules after it, and the boot information.
///
/// # Errors
/// What does not fit, or that the image is none.
pub fn load(memory: &mut [u8], kernel: &File<'_>, modules: &[File<'_>]) -> Result<Start> {
    let header = Header::find(kernel.data)?;
    let start = (header.header.checked_sub(header.load))
        .and_then(|before| header.offset.checked_sub(before as usize))
        .context("the kernel's multiboot header has wrong addresses")?;
    let end = match header.load_end {
        0 => kernel.data.len(),
        end => start + (end.checked_sub(header.load).context("the kernel ends before it starts")? as usize),
    };
    let data = kernel.data.get(start..end).context("the kernel's file is shorter than its header says")?;
    ensure!(header.load as usize >= 1 << 20, "the kernel wants to be below 1 MiB");
    put(memory, header.load as usize, data).context("the kernel does not fit")?;

    let mut at = (header.load as usize + data.len()).max(header.bss_end as usize).next_multiple_of(PAGE);
    let mut places = Vec::new();
    for module in modules {
        put(memory, at, module.data).context("a module does not fit")?;
        places.push((at as u32, (at + module.data.len()) as u32));
        at = (at + module.data.len()).next_multiple_of(PAGE);
    }
    write_info(memory, kernel.line, modules, &places)?;
    Ok(Start { entry: header.entry, info: INFO as u32 })
}

/// Flags: memory, command line, modules, memory map, loader's name.
const FLAGS: u32 = 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;

fn write_info(memory: &mut [u8], line: &str, modules: &[File<'_>], places: &[(u32, u32)]) -> Result<()> {
    let size = memory.len() as u64;
    let mut next = INFO + 128;
    let mut add = |memory: &mut [u8], bytes: &[u8]| -> Result<u32> {
        let at = next;
        ensure!(at + bytes.len() <= INFO_END, "the command lines are too long");
        put(memory, at, bytes)?;
        next = (at + bytes.len()).next_multiple_of(8);
        Ok(at as u32)
    };
    let text = |text: &str| [text.as_bytes(), &[0]].concat();
    let line_at = add(memory, &text(line))?;
    let name_at = add(memory, &text("nvmx-vmm"))?;
    let mut list = Vec::new();
    for (module, (start, end)) in modules.iter().zip(places) {
        let line_at = add(memory, &text(module.line))?;
        [*start, *end, line_at, 0].iter().for_each(|w| list.extend(w.to_le_bytes()));
    }
    let list_at = add(memory, &list)?;
    let mut map = Vec::new();
    for (base, length, kind) in ranges(size) {
        map.extend(20u32.to_le_bytes());
        map.extend(base.to_le_bytes());
        map.extend(length.to_le_bytes());
        map.extend(kind.to_le_bytes());
    }
    let map_at = add(memory, &map)?;
    let upper = (size / 1024 - 1024) as u32;
    let fields = [
        (0, FLAGS),
        (4, 636),
        (8, upper),
        (16, line_at),
        (20, modules.len() as u32),
        (24, list_at),
        (44, map.len() as u32),
        (48, map_at),
        (64, name_at),
    ];
    for (offset, value) in fields {
        put(memory, INFO + offset, &value.to_le_bytes())?;
    }
    Ok(())
}

/// The memory map: start, length, kind (1 usable, 2 reserved).
pub fn ranges(size: u64) -> [(u64, u64, u32); 3] {
    [(0, 0x9_F000, 1), (0x9_F000, 0x6_1000, 2), (1 << 20, size.saturating_sub(1 << 20), 1)]
}

/// Copies bytes into memory.
///
/// # Errors
/// If they do not fit.
pub fn put(memory: &mut [u8], at: usize, bytes: &[u8]) -> Result<()> {
    let place = at.checked_add(bytes.len()).and_then(|end| memory.get_mut(at..end));
    place.with_context(|| format!("no room for {} bytes at {at:#x}", bytes.len()))?.copy_from_slice(bytes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(flags: u32) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        let words = [
            HEADER_MAGIC,
            flags,
            0u32.wrapping_sub(HEADER_MAGIC + flags),
            0x10_0010,
            0x10_0000,
            0x10_0040,
            0x10_2000,
            0x10_0030,
        ];
        words.iter().for_each(|w| bytes.extend(w.to_le_bytes()));
        bytes.resize(64 + 48, 0x90);
        bytes
    }

    #[test]
    fn image_modules_and_information_are_where_the_specification_says() {
        let mut memory = vec![0; 2 << 20];
        let (kernel, module) = (image(1 << 16), [7; 100]);
        let start = load(
            &mut memory,
            &File { data: &kernel, line: "a=1" },
            &[File { data: &module, line: "x" }, File { data: &module, line: "" }],
        );
        assert_eq!(start.unwrap(), Start { entry: 0x10_0030, info: INFO as u32 });
        let word = |at: usize| u32::from_le_bytes(memory[at..at + 4].try_into().unwrap()) as usize;
        let text = |at: usize| memory[at..].split(|b| *b == 0).next().unwrap();
        assert_eq!(word(0x10_0010) as u32, HEADER_MAGIC);
        assert_eq!(text(word(INFO + 16)), b"a=1");
        assert_eq!(word(INFO + 20), 2);
        let list = word(INFO + 24);
        assert_eq!((word(list), word(list + 4), text(word(list + 8))), (0x10_2000, 0x10_2064, &b"x"[..]));
        assert_eq!(word(list + 16), 0x10_3000);
        assert_eq!(memory[0x10_2000..0x10_2064], module);
        assert_eq!(word(INFO + 44), 72);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let mut memory = vec![0; 2 << 20];
        let mut refuse = |data: &[u8]| load(&mut memory, &File { data, line: "" }, &[]).unwrap_err().to_string();
        assert_eq!(refuse(b"hello"), "the kernel has no multiboot header");
        assert_eq!(refuse(&image(0)), "the kernel's multiboot header has no address fields");
        assert_eq!(refuse(&image(1 << 16)[..100]), "the kernel's file is shorter than its header says");
    }
}
