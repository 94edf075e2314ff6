//! A look into a machine that hangs: nvmx keeps the last exits in a marked block of its memory, and the emulator's process
//! holds that memory.

use l2_protocol::abi::{LAST_EXITS_MARK, LAST_EXITS_WORDS, NO_LAST_EXIT};
use nvmx::vmx::ExitReason;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Guest memory is the emulator's only mapping of at least this size.
const SMALLEST: u64 = 8 << 20;
const CHUNK: usize = 1 << 20;
const BLOCK: usize = LAST_EXITS_WORDS * 8;

/// The last exits of L2 and L3 on each CPU of the machine that this process emulates; nothing if it cannot be read.
pub fn last_exits(process: u32) -> Vec<String> {
    let Ok(maps) = std::fs::read_to_string(format!("/proc/{process}/maps")) else { return Vec::new() };
    let Ok(memory) = File::open(format!("/proc/{process}/mem")) else { return Vec::new() };
    let mut found = Vec::new();
    for (start, end) in maps.lines().filter_map(writable).filter(|(start, end)| end - start >= SMALLEST) {
        let mut chunk = vec![0; CHUNK + BLOCK];
        let mut at = start;
        while at < end {
            let want = (end - at).min(chunk.len() as u64) as usize;
            // A page that cannot be read holds nothing of ours.
            if memory.read_exact_at(&mut chunk[..want], at).is_ok() {
                found.extend(blocks(&chunk[..want], at));
            }
            at += CHUNK as u64;
        }
    }
    found.dedup();
    found
}

/// The bounds of a writable mapping, from a line of `/proc/PID/maps`.
fn writable(line: &str) -> Option<(u64, u64)> {
    let mut words = line.split(' ');
    let (start, end) = words.next()?.split_once('-')?;
    let rights = words.next()?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    rights.starts_with("rw").then_some((number(start)?, number(end)?))
}

/// The blocks in a piece of memory whose first byte has this address.
fn blocks(memory: &[u8], address: u64) -> Vec<String> {
    let mut texts = Vec::new();
    let mark = LAST_EXITS_MARK.to_le_bytes();
    for at in memchr::memmem::find_iter(memory, &mark).filter(|at| at % 8 == 0) {
        let word = |i: usize| {
            let bytes = memory.get(at + i * 8..at + i * 8 + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        // The block knows its linear address; a copy of the mark in nvmx's code does not.
        let here = address + at as u64;
        let genuine = word(1).is_some_and(|this| this >> 63 == 1 && this % 4096 == here % 4096);
        if let (true, Some(l2), Some(l3)) = (genuine, word(2), word(3)) {
            texts.push(format!("last exit of L2: {}", exit(l2)));
            texts.push(format!("last exit of L3: {}", exit(l3)));
        }
    }
    texts
}

fn exit(reason: u64) -> String {
    match reason as u32 {
        NO_LAST_EXIT => "none yet".into(),
        reason => ExitReason(reason).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(words: [u64; 4]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    #[test]
    fn a_genuine_block_is_found_and_a_copy_of_its_mark_is_not() {
        let mut memory = vec![0; 64];
        memory.extend(block([LAST_EXITS_MARK, 0xFFFF_8000_0000_5040, 10, NO_LAST_EXIT.into()]));
        memory.extend(block([LAST_EXITS_MARK, 0, 1, 2]));
        let texts = blocks(&memory, 0x7F00_0000_0000);
        assert_eq!(texts, ["last exit of L2: CPUID", "last exit of L3: none yet"]);
        assert!(blocks(&memory, 0x7F00_0000_0008).is_empty());
    }

    #[test]
    fn only_writable_mappings_are_read() {
        let line = "7f00-8f00 rw-p 00000000 00:00 0";
        assert_eq!(writable(line), Some((0x7F00, 0x8F00)));
        assert_eq!(writable("7f00-8f00 r-xp 00000000 00:00 0 /x"), None);
    }

    #[test]
    fn the_memory_of_a_process_is_read() {
        // Ours: the emulator is a child, which is as readable.
        let mut memory = vec![0u8; SMALLEST as usize * 2];
        let offset = memory.as_ptr().align_offset(4096) + 8192;
        let words = block([LAST_EXITS_MARK, 0xFFFF_8000_0000_0000, 18, 48]);
        memory[offset..offset + words.len()].copy_from_slice(&words);
        let texts = last_exits(std::process::id());
        assert!(texts.contains(&"last exit of L2: VMCALL".to_string()), "{texts:?}");
        assert!(texts.contains(&"last exit of L3: EPT_VIOLATION".to_string()));
        drop(memory);
    }
}
