//! Putting a Linux kernel and its initial file system into memory.
//!
//! Source: Linux documentation, "The Linux/x86 Boot Protocol": "The Real-Mode Kernel Header", "32-bit Boot Protocol"; "Zero
//! Page".

use crate::multiboot;
use crate::multiboot::{File, Start, put};
use anyhow::{Context, Result, ensure};

/// Where the zero page goes, and the command line after it.
const ZERO_PAGE: usize = 0x1_0000;
const COMMAND_LINE: usize = 0x1_1000;
const COMMAND_LINE_MAX: usize = 2047;
/// Where the kernel wants to be loaded and entered.
const KERNEL: usize = 1 << 20;

// Offsets in the header and in the zero page.
const SETUP_SECTORS: usize = 0x1F1;
const HEADER_END: usize = 0x201;
const MAGIC: usize = 0x202;
const LOADER: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const INITRD: usize = 0x218;
const INITRD_SIZE: usize = 0x21C;
const COMMAND_LINE_POINTER: usize = 0x228;
const E820_COUNT: usize = 0x1E8;
const E820: usize = 0x2D0;

/// Whether the file is a Linux kernel.
pub fn is_kernel(data: &[u8]) -> bool {
    data.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
}

/// Loads kernel, initial file system (the first module), command line, zero page.
///
/// # Errors
/// What does not fit.
pub fn load(memory: &mut [u8], kernel: &File<'_>, modules: &[File<'_>]) -> Result<Start> {
    let byte = |at: usize| kernel.data.get(at).copied().map(usize::from).unwrap_or(0);
    let sectors = if byte(SETUP_SECTORS) == 0 { 4 } else { byte(SETUP_SECTORS) };
    let payload = kernel.data.get((sectors + 1) * 512..).context("the kernel is shorter than its header says")?;
    put(memory, KERNEL, payload).context("the kernel does not fit")?;

    let header = kernel.data.get(SETUP_SECTORS..MAGIC + byte(HEADER_END)).context("the kernel's header is cut off")?;
    put(memory, ZERO_PAGE + SETUP_SECTORS, header)?;
    put(memory, ZERO_PAGE + LOADER, &[0xFF])?;
    put(memory, ZERO_PAGE + LOAD_FLAGS, &[byte(LOAD_FLAGS) as u8 | 1])?;
    ensure!(kernel.line.len() <= COMMAND_LINE_MAX, "the kernel's command line is too long");
    put(memory, COMMAND_LINE, &[kernel.line.as_bytes(), &[0]].concat())?;
    put(memory, ZERO_PAGE + COMMAND_LINE_POINTER, &(COMMAND_LINE as u32).to_le_bytes())?;
    if let Some(initrd) = modules.first() {
        // At the top, where the kernel's decompressor does not come.
        let room = memory.len().checked_sub(initrd.data.len()).context("the initial file system does not fit")?;
        let at = room & !0xFFF;
        ensure!(at > KERNEL + payload.len(), "kernel and initial file system do not fit");
        put(memory, at, initrd.data)?;
        put(memory, ZERO_PAGE + INITRD, &(at as u32).to_le_bytes())?;
        put(memory, ZERO_PAGE + INITRD_SIZE, &(initrd.data.len() as u32).to_le_bytes())?;
    }
    let ranges = multiboot::ranges(memory.len() as u64);
    put(memory, ZERO_PAGE + E820_COUNT, &[ranges.len() as u8])?;
    for (i, (base, length, kind)) in ranges.iter().enumerate() {
        let entry = [&base.to_le_bytes()[..], &length.to_le_bytes(), &kind.to_le_bytes()].concat();
        put(memory, ZERO_PAGE + E820 + i * 20, &entry)?;
    }
    Ok(Start { entry: KERNEL as u32, info: ZERO_PAGE as u32 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_zero_page_and_file_system_are_where_the_protocol_says() {
        let mut image = vec![0; 512 * 3];
        image[SETUP_SECTORS] = 1;
        image[HEADER_END] = 0x6A;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[1024..1028].copy_from_slice(b"code");
        assert!(is_kernel(&image) && !is_kernel(b"short"));
        let mut memory = vec![0; 4 << 20];
        let initrd = [7; 5000];
        let start =
            load(&mut memory, &File { data: &image, line: "quiet" }, &[File { data: &initrd, line: "" }]).unwrap();
        assert_eq!(start, Start { entry: 0x10_0000, info: 0x1_0000 });
        assert_eq!(&memory[KERNEL..KERNEL + 4], b"code");
        let word = |at: usize| u32::from_le_bytes(memory[ZERO_PAGE + at..][..4].try_into().unwrap()) as usize;
        assert_eq!(&memory[word(COMMAND_LINE_POINTER)..][..6], b"quiet\0");
        assert_eq!((word(INITRD_SIZE), word(INITRD) % 4096), (5000, 0));
        assert_eq!(memory[word(INITRD)..][..5000], initrd);
        assert_eq!(memory[ZERO_PAGE + E820_COUNT], 3);
        assert!(load(&mut vec![0; 1 << 20], &File { data: &image, line: "" }, &[]).is_err());
    }
}
