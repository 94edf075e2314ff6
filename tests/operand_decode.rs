//! Operands of VMX instructions: instruction information packed by a table of its own, addresses by plain integers.

mod core_support;

use core_support::Vmcs;
use nvmx::vmx::instr::{CpuMode, Direction, InstructionInfo, MemoryOperand, behind};
use nvmx::vmx::segment::Segment;
use nvmx::vmx::{Field, Fields};
use nvmx::x86::lam::{CR3_U57, Masking};
use nvmx::x86::{Cr4, Fault};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use std::cell::RefCell;

/// What an assembler would know about the operand.
#[derive(Clone, Debug)]
struct Operand {
    /// Address size in bits.
    size: u32,
    segment: u32,
    base: Option<u32>,
    index: Option<u32>,
    scale: u32,
    displacement: i32,
    /// Instruction-information bits without a meaning here, which the processor may set.
    undefined: u32,
}

impl Operand {
    fn info(&self) -> InstructionInfo {
        let size = match self.size {
            16 => 0,
            32 => 1,
            _ => 2,
        };
        const NONE: u32 = 1 << 4;
        let register = |register: Option<u32>| register.unwrap_or(NONE);
        let defined =
            self.scale | size << 7 | self.segment << 15 | register(self.index) << 18 | register(self.base) << 23;
        // Reg1, bits 14:11 and Reg2; the number in a register field that is not valid.
        let mut undefined = self.undefined & 0xF000_7878;
        if self.index.is_none() {
            undefined |= self.undefined & 0xF << 18;
        }
        if self.base.is_none() {
            undefined |= self.undefined & 0xF << 23;
        }
        InstructionInfo(defined | undefined)
    }

    /// Offset by wide integers: no wrapping until the end.
    fn offset(&self, gprs: &[u64; 16]) -> u64 {
        let register = |r: Option<u32>| r.map_or(0, |r| i128::from(gprs[r as usize]));
        let sum = i128::from(self.displacement) + register(self.base) + register(self.index) * (1 << self.scale);
        sum.rem_euclid(1 << self.size) as u64
    }

    fn memory(&self, bytes: u32, direction: Direction) -> MemoryOperand {
        let displacement = i64::from(self.displacement) as u64;
        MemoryOperand { info: self.info(), displacement, bytes, direction }
    }
}

fn registers() -> impl Strategy<Value = [u64; 16]> {
    let edge =
        select(vec![0, 1, 0xFFFF, 0x1_0000, 0xFFFF_FFFF, 1 << 32, 1 << 46, (1 << 47) - 1, u64::MAX << 47, u64::MAX]);
    prop::array::uniform16(prop_oneof![any::<u64>(), edge, 0u64..0x2_0000])
}

fn operands(sizes: Vec<u32>) -> impl Strategy<Value = Operand> {
    let displacement = prop_oneof![any::<i32>(), -64i32..64];
    (select(sizes), 0u32..6, option::of(0u32..16), option::of(0u32..16), 0u32..4, displacement, any::<u32>()).prop_map(
        |(size, segment, base, index, scale, displacement, undefined)| Operand {
            size,
            segment,
            base,
            index,
            scale,
            displacement,
            undefined,
        },
    )
}

const SEGMENTS: [Segment; 6] = [Segment::Es, Segment::Cs, Segment::Ss, Segment::Ds, Segment::Fs, Segment::Gs];

fn fault(segment: u32) -> Fault {
    if segment == 2 { Fault::StackSegment(0) } else { Fault::GeneralProtection(0) }
}

fn directions() -> impl Strategy<Value = Direction> {
    select(vec![Direction::Load, Direction::Store])
}

fn canonical(address: u128) -> bool {
    address < 1 << 47 || (0xFFFF_8000_0000_0000..1 << 64).contains(&address)
}

/// May this type of segment be accessed so?
fn permitted(kind: u32, direction: Direction) -> bool {
    match direction {
        Direction::Load => !matches!(kind, 8 | 9 | 12 | 13),
        Direction::Store => matches!(kind, 2 | 3 | 6 | 7),
    }
}

/// Is every byte of the operand inside of the segment?
fn inside(first: u64, bytes: u32, limit: u64, kind: u32, big: bool) -> bool {
    let upper = if big { 0xFFFF_FFFF } else { 0xFFFF };
    (first..first + u64::from(bytes)).all(|byte| match kind {
        4..=7 => byte > limit && byte <= upper,
        _ => byte <= limit,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn fields_of_the_information_come_back(operand in operands(vec![16, 32, 64])) {
        let info = operand.info();
        prop_assert_eq!(info.scale(), operand.scale);
        prop_assert_eq!(info.address_mask(), if operand.size == 64 { u64::MAX } else { (1 << operand.size) - 1 });
        prop_assert_eq!(info.segment(), Some(SEGMENTS[operand.segment as usize]));
        prop_assert_eq!(info.base().map(u32::from), operand.base);
        prop_assert_eq!(info.index().map(u32::from), operand.index);
        prop_assert_eq!(u32::from(info.reg2()), operand.undefined >> 28);
        prop_assert_eq!(u32::from(info.reg1()), operand.undefined >> 3 & 0xF);
    }

    #[test]
    fn offset_is_the_sum_in_the_address_size(operand in operands(vec![16, 32, 64]), gprs in registers()) {
        let displacement = i64::from(operand.displacement) as u64;
        prop_assert_eq!(operand.info().offset(displacement, |r| gprs[usize::from(r)]), operand.offset(&gprs));
    }

    #[test]
    fn in_64_bit_mode_the_address_is_canonical_from_first_to_last_byte(
        operand in operands(vec![32, 64]),
        gprs in registers(),
        bases in prop::array::uniform2(select(vec![0, 0x1000, (1 << 47) - 8, 0xFFFF_8000_0000_0000, u64::MAX - 7])),
        bytes in select(vec![4u32, 8, 16]),
        direction in directions(),
    ) {
        let mut state = Vmcs::default();
        state.set(Field::GUEST_FS_BASE, bases[0]).set(Field::GUEST_GS_BASE, bases[1]);
        // Everything else of a segment is of no effect in 64-bit mode.
        state.set(Field::GUEST_DS_BASE, 0xDEAD_0000).set(Field::GUEST_DS_AR_BYTES, 0x1_0000);
        let base = match operand.segment {
            4 => bases[0],
            5 => bases[1],
            _ => 0,
        };
        let first = (u128::from(base) + u128::from(operand.offset(&gprs))) % (1 << 64);
        let good = canonical(first) && canonical((first + u128::from(bytes) - 1) % (1 << 64));
        let expected = if good { Ok(first as u64) } else { Err(fault(operand.segment)) };
        let mode = CpuMode::Long64 { linear_width: 48, masking: Masking::OFF };
        let actual = operand.memory(bytes, direction).linear_address(mode, |r| gprs[usize::from(r)], &state);
        prop_assert_eq!(actual, expected);
    }

    #[test]
    fn in_protected_mode_the_segment_decides(
        operand in operands(vec![16, 32]),
        gprs in registers(),
        base in select(vec![0u64, 0x1000, 0xFFFF_0000]),
        limit in select(vec![0u64, 7, 0xFFF, 0xFFFF, 0x1_0FFF, 0x7FFF_FFFF, 0xFFFF_FFFF]),
        kind in 0u32..16,
        big: bool,
        unusable: bool,
        bytes in select(vec![4u32, 8, 16]),
        direction in directions(),
    ) {
        let segment = SEGMENTS[operand.segment as usize];
        let rights = kind | 0x90 | u32::from(big) << 14 | u32::from(unusable) << 16;
        let mut state = Vmcs::default();
        state.set(segment.base(), base).set(segment.limit(), limit).set(segment.rights(), u64::from(rights));

        let first = operand.offset(&gprs);
        let linear = (base + first) % (1 << 32);
        let flat = base == 0 && limit == 0xFFFF_FFFF && !(4..8).contains(&kind);
        let expected = if !unusable && !permitted(kind, direction) {
            Err(Fault::GeneralProtection(0)) // even for the stack segment
        } else if unusable || !inside(first, bytes, limit, kind, big) && !flat {
            Err(fault(operand.segment))
        } else {
            Ok(linear)
        };
        let actual = operand.memory(bytes, direction).linear_address(CpuMode::Protected, |r| gprs[usize::from(r)], &state);
        prop_assert_eq!(actual, expected);
    }
}

#[test]
fn limits_hold_to_the_byte() {
    let operand = Operand { size: 32, segment: 3, base: Some(0), index: None, scale: 0, displacement: 0, undefined: 0 };
    let at = |offset: u64, limit: u64, kind: u32, big: bool| {
        let mut state = Vmcs::default();
        let rights = u64::from(kind | 0x90 | u32::from(big) << 14);
        state.set(Field::GUEST_DS_LIMIT, limit).set(Field::GUEST_DS_AR_BYTES, rights);
        operand.memory(8, Direction::Load).linear_address(CpuMode::Protected, |_| offset, &state).is_ok()
    };
    // Read/write data: the last byte is at the limit.
    assert!(at(0xFF8, 0xFFF, 3, true) && !at(0xFF9, 0xFFF, 3, true));
    assert!(at(0xFFFF_FFF7, 0xFFFF_FFFE, 3, true) && !at(0xFFFF_FFF8, 0xFFFF_FFFE, 3, true));
    // Expand-down: the first byte is above the limit, the last within 16 or 32 bits.
    assert!(at(0x1000, 0xFFF, 7, true) && !at(0xFFF, 0xFFF, 7, true));
    assert!(at(0xFFF8, 0xFFF, 7, false) && !at(0xFFF9, 0xFFF, 7, false) && at(0xFFF9, 0xFFF, 7, true));
}

#[test]
fn an_address_relative_to_rip_has_neither_base_nor_index() {
    let operand = Operand { size: 64, segment: 3, base: None, index: None, scale: 0, displacement: 0, undefined: 0 };
    let memory = MemoryOperand { displacement: 0xFFFF_8000_1234_5678, ..operand.memory(8, Direction::Load) };
    let untouched = |r: u8| -> u64 { panic!("register {r}") };
    let mode = CpuMode::Long64 { linear_width: 48, masking: Masking::OFF };
    assert_eq!(memory.linear_address(mode, untouched, &Vmcs::default()), Ok(0xFFFF_8000_1234_5678));
}

#[test]
fn a_segment_number_that_no_processor_reports_is_a_fault() {
    for number in [6, 7] {
        let operand =
            Operand { size: 64, segment: number, base: None, index: None, scale: 0, displacement: 0, undefined: 0 };
        let memory = operand.memory(8, Direction::Load);
        let result =
            memory.linear_address(CpuMode::Long64 { linear_width: 48, masking: Masking::OFF }, |_| 0, &Vmcs::default());
        assert_eq!(result, Err(Fault::GeneralProtection(0)));
    }
}

#[test]
fn linear_width_of_57_bits_widens_what_is_canonical() {
    let operand = Operand { size: 64, segment: 3, base: Some(0), index: None, scale: 0, displacement: 0, undefined: 0 };
    let at = |address, linear_width| {
        let mode = CpuMode::Long64 { linear_width, masking: Masking::OFF };
        operand.memory(8, Direction::Load).linear_address(mode, |_| address, &Vmcs::default()).is_ok()
    };
    assert!(!at(1 << 47, 48) && at(1 << 47, 57));
    assert!(!at(1 << 56, 57) && at(0xFF00_0000_0000_0000, 57));
    assert!(!at((1 << 47) - 7, 48) && at((1 << 47) - 8, 48));
    assert!(at(u64::MAX - 6, 48), "the lower half follows the upper one");
}

#[test]
fn a_tag_is_dropped_before_the_address_is_judged() {
    let operand = Operand { size: 64, segment: 4, base: Some(0), index: None, scale: 0, displacement: 0, undefined: 0 };
    let mut state = Vmcs::default();
    // The tag may come from the segment's base as well.
    state.set(Field::GUEST_FS_BASE, 0x0200_0000_0000_0000);
    let at = |pointer, cr3, cr4| {
        let mode = CpuMode::Long64 { linear_width: 48, masking: Masking { cr3, cr4 } };
        operand.memory(8, Direction::Load).linear_address(mode, |_| pointer, &state)
    };
    assert_eq!(at(0x1234_5678, CR3_U57, Cr4::empty()), Ok(0x1234_5678));
    assert_eq!(at(0x1234_5678, 0, Cr4::LAM_SUP), Err(Fault::GeneralProtection(0)));
    assert_eq!(at(0xAD00_8000_0000_0000, CR3_U57, Cr4::LAM_SUP), Ok(0xFFFF_8000_0000_0000));
    assert_eq!(at(0xAD00_8000_0000_0000, CR3_U57, Cr4::empty()), Err(Fault::GeneralProtection(0)));
    // 57 bits are kept, of which 48 can be canonical here.
    assert_eq!(at(0x0001_0000_0000_0000, CR3_U57, Cr4::empty()), Err(Fault::GeneralProtection(0)));
}

#[test]
fn no_more_fields_are_read_than_the_mode_needs() {
    struct Log<'a>(&'a RefCell<Vec<Field>>);
    impl Fields for Log<'_> {
        fn get(&self, field: Field) -> u64 {
            self.0.borrow_mut().push(field);
            0
        }
    }
    let mode = CpuMode::Long64 { linear_width: 48, masking: Masking::OFF };
    for segment in 0..6 {
        let operand = Operand { size: 64, segment, base: None, index: None, scale: 0, displacement: 0, undefined: 0 };
        let seen = RefCell::new(Vec::new());
        assert_eq!(operand.memory(8, Direction::Load).linear_address(mode, |_| 0, &Log(&seen)), Ok(0));
        let expected: &[Field] = match segment {
            4 => &[Field::GUEST_FS_BASE],
            5 => &[Field::GUEST_GS_BASE],
            _ => &[],
        };
        assert_eq!(seen.borrow().as_slice(), expected);
    }
}

#[test]
fn instruction_pointers_have_32_bits_outside_of_64_bit_mode() {
    for rip in [0, 0xFFF0, 0xFFFE, 0x7FFF_FFFE, 0xFFFF_FFF0, 0xFFFF_FFFE, 0xFFFF_FFFF] {
        for length in 1..=15 {
            assert_eq!(behind(rip, length, || false), (rip + length) % (1 << 32), "{rip:#x} {length}");
            assert_eq!(behind(rip, length, || true), rip + length, "{rip:#x} {length}");
        }
    }
    assert_eq!(behind(u64::MAX, 2, || true), 1);
    assert_eq!(behind(0x7FFF_FFFF_FFFE, 2, || true), 0x8000_0000_0000, "the fetch faults, not the entry");
}

#[test]
fn register_operands_are_told_from_memory() {
    assert!(InstructionInfo(1 << 10).is_register() && !InstructionInfo(!(1 << 10)).is_register());
}
