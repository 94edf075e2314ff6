//! Memory operands of VMX instructions: instruction information, segments, L2's page tables, and the access itself. Whatever
//! L2 sets up, nvmx's own range is neither read nor written, an access that fails writes nothing, and what is written is read back.
#![no_main]

#[path = "../input.rs"]
mod input;

use input::Input;
use libfuzzer_sys::fuzz_target;
use nvmx::addr::Hpa;
use nvmx::mm::linear::{Keys, Paging};
use nvmx::mm::phys::VecMem;
use nvmx::mm::{GuestMemory, Span};
use nvmx::vmx::instr::{CpuMode, Direction, InstructionInfo, MemoryOperand, decode_field_access};
use nvmx::vmx::{Field, Fields};
use nvmx::x86::lam::Masking;

const PAGES: u64 = 16;
const OWN: Span = Span::new(0xD000, 0xE000);
const SECRET: u8 = 0xA5;
/// The low bits of each index into a table, and the offset.
const FIRST_ENTRIES: u64 = 0x000F_0783_C1E0_FFFF;

/// All fields of a segment, whichever is asked for.
struct Segments([u64; 3]);

impl Fields for Segments {
    fn get(&self, field: Field) -> u64 {
        // Base, limit and rights are of natural width, 32 bits, and 32 bits from the first of the rights on.
        match field as u32 {
            0x4800..=0x4813 => self.0[1] & 0xFFFF_FFFF,
            0x4814..=0x4823 => self.0[2] & 0xFFFF_FFFF,
            _ => self.0[0],
        }
    }
}

fn own(memory: &VecMem) -> Vec<u8> {
    memory.bytes(OWN.start(), OWN.len() as usize)
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let memory = VecMem::new((PAGES << 12) as usize);
    memory.write_bytes(Hpa::new(OWN.start()), &[SECRET; 0x1000]);
    let mut gprs = [0; 16];
    gprs.iter_mut().for_each(|gpr| *gpr = input.word());
    let segment = Segments([input.word(), input.word(), input.word()]);
    let mode = match input.u8() % 3 {
        0 => CpuMode::Protected,
        1 => CpuMode::Long64 { linear_width: 48, masking: Masking::OFF },
        _ => CpuMode::Long64 { linear_width: 57, masking: Masking::OFF },
    };
    let direction = if input.u8() % 2 == 0 { Direction::Load } else { Direction::Store };
    let bytes = input.pick(&[4, 8, 16]);
    let info = InstructionInfo(input.u32());
    let operand = MemoryOperand { info, displacement: input.word(), bytes, direction };
    let linear = operand.linear_address(mode, |n| gprs[usize::from(n % 16)], &segment);

    let width = 36 + u32::from(input.u8() % 17);
    let flags = input.u16();
    let flag = |number: u32, bit: u32| u64::from(flags >> number & 1) << bit;
    let paging = Paging {
        // Without paging there is little to see.
        cr0: flag(0, 16) | (1 - flag(1, 0) * flag(2, 0)) << 31,
        cr3: input.below(PAGES) << 12 | input.word() & 0xFFF,
        // PSE, PAE, LA57, SMAP
        cr4: flag(3, 4) | flag(4, 5) | flag(5, 12) | flag(6, 21),
        // LMA, NXE
        efer: flag(7, 10) | flag(8, 11),
        rflags: flag(9, 18),
        pdptes: [(); 4].map(|()| input.below(PAGES) << 12 | u64::from(input.u8())),
        keys: Keys { user: u32::from(input.u8()) * 0x0101_0101, supervisor: u32::from(input.u8()) * 0x0101_0101 },
        physical_width: width,
    };
    // Entries of L2's tables: small indexes, so that a walk meets them.
    while !input.is_empty() {
        let at = input.below(PAGES) << 12 | input.below(16) << 3;
        let entry = input.below(PAGES) << 12 | u64::from(input.u8()) | (input.word() & 0xFFF0_0000_0000_0000);
        if !(OWN.start()..OWN.end()).contains(&at) {
            memory.write_u64(Hpa::new(at), entry);
        }
    }
    let guest = GuestMemory::new(&memory, OWN, width as u8);
    // As a rule an address whose way through the tables uses their first entries.
    let linear = linear.unwrap_or(0) & if flags >> 10 & 1 == 0 { FIRST_ENTRIES } else { !0 };
    let mut read = [0; 16];
    let read = &mut read[..bytes as usize];
    if paging.read(&guest, linear, read).is_ok() {
        assert!(read.iter().any(|byte| *byte != SECRET), "nvmx's memory was read");
    }
    let written: Vec<u8> = (1..=bytes as u8).collect();
    if paging.write(&guest, linear, &written).is_ok() {
        let mut again = [0; 16];
        let again = &mut again[..bytes as usize];
        // Unless the operand lies in the tables that translate it.
        if paging.read(&guest, linear, again).is_ok() && paging.write(&guest, linear, &written).is_ok() {
            let _ = paging.read(&guest, linear, again);
        }
    }
    assert!(own(&memory).iter().all(|byte| *byte == SECRET), "nvmx's memory was written");
    if let Some(info) = decode_field_access(data) {
        assert!(info.is_register() && data.len() <= 4);
    }
});
