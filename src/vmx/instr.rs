//! The operands of VMX instructions: what the instruction-information field says, and the linear address that it means.
//!
//! Source: Intel SDM vol. 3C (December 2024), tables "Format of the VM-Exit Instruction-Information Field as Used for
//! INVEPT, INVPCID, and INVVPID", "... for VMCLEAR, VMPTRLD, VMPTRST, VMXON, XRSTORS, and XSAVES", "... for VMREAD and
//! VMWRITE", and "Exit Qualification" for the displacement; segment rules: vol. 3A, "Limit Checking", "Type Checking".

use super::field::Fields;
use super::segment::{AccessRights, Segment};
use crate::x86::Fault;
use crate::x86::lam::Masking;

/// The VM-exit instruction-information field. One layout serves all VMX instructions; what an instruction does not use is
/// undefined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct InstructionInfo(pub u32);

impl InstructionInfo {
    /// The index register is multiplied by 2 to this power.
    pub const fn scale(self) -> u32 {
        self.0 & 3
    }

    /// VMREAD, VMWRITE: number of the register operand (bits 6:3), if [`Self::is_register`].
    pub const fn reg1(self) -> u8 {
        (self.0 >> 3) as u8 & 0xF
    }

    /// The bits that an offset can have: 16, 32 or 64 of them.
    pub const fn address_mask(self) -> u64 {
        match (self.0 >> 7) & 7 {
            0 => 0xFFFF,
            1 => 0xFFFF_FFFF,
            _ => u64::MAX,
        }
    }

    /// VMREAD, VMWRITE: the operand is a register and not memory.
    pub const fn is_register(self) -> bool {
        self.0 & 1 << 10 != 0
    }

    /// Segment of the memory operand; a value the processor never reports gives `None`.
    pub const fn segment(self) -> Option<Segment> {
        Segment::from_number((self.0 >> 15) as u8 & 7)
    }

    /// Number of the index register.
    pub const fn index(self) -> Option<u8> {
        if self.0 & 1 << 22 == 0 { Some((self.0 >> 18) as u8 & 0xF) } else { None }
    }

    /// Number of the base register.
    pub const fn base(self) -> Option<u8> {
        if self.0 & 1 << 27 == 0 { Some((self.0 >> 23) as u8 & 0xF) } else { None }
    }

    /// VMREAD, VMWRITE: number of the register with the field encoding. INVEPT, INVVPID, INVPCID: with the type.
    pub const fn reg2(self) -> u8 {
        (self.0 >> 28) as u8
    }

    /// Offset of the memory operand in its segment. `displacement` is the exit qualification, which for an address
    /// relative to RIP already has RIP in it. `gpr` gives registers by number (0 = RAX .. 15 = R15; 4 is RSP).
    pub fn offset(self, displacement: u64, gpr: impl Fn(u8) -> u64) -> u64 {
        let base = self.base().map_or(0, &gpr);
        let index = self.index().map_or(0, &gpr) << self.scale();
        displacement.wrapping_add(base).wrapping_add(index) & self.address_mask()
    }
}

/// The instruction information of a VMREAD or VMWRITE between registers, from its bytes in 64-bit mode; `None` for any
/// other form. Source: SDM vol. 2A, "Instruction Format"; vol. 3C, "VMREAD" and "VMWRITE" (0F 78 /r, 0F 79 /r).
pub fn decode_field_access(code: &[u8]) -> Option<InstructionInfo> {
    const REGISTER_OPERAND: u32 = 1 << 10;
    let (rex, code) = match code {
        [rex @ 0x40..=0x4F, rest @ ..] => (u32::from(*rex), rest),
        _ => (0, code),
    };
    let [0x0F, 0x78 | 0x79, modrm @ 0xC0..=0xFF] = code else { return None };
    let modrm = u32::from(*modrm);
    let field = modrm >> 3 & 7 | (rex >> 2 & 1) << 3;
    let value = modrm & 7 | (rex & 1) << 3;
    Some(InstructionInfo(REGISTER_OPERAND | value << 3 | field << 28))
}

/// The address behind an instruction of `length` bytes at `rip`. Outside of 64-bit mode, 16-bit code included, an instruction
/// pointer has 32 bits: what lies beyond a code segment is found by its limit, at the next fetch. Whether the code is 64-bit
/// is asked only where it matters.
#[inline(always)]
pub fn behind(rip: u64, length: u64, is_64_bit: impl FnOnce() -> bool) -> u64 {
    let next = rip.wrapping_add(length);
    if (next ^ rip) >> 32 != 0 && !is_64_bit() { next & 0xFFFF_FFFF } else { next }
}

/// What the instruction does to its memory operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// Reads it: VMXON, VMPTRLD, VMCLEAR, VMWRITE, INVEPT, INVVPID
    Load,
    /// Writes it: VMPTRST, VMREAD
    Store,
}

/// The two modes in which a VMX instruction exits; in all others it is #UD.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CpuMode {
    /// Protected mode outside of IA-32e mode
    Protected,
    /// 64-bit mode, with this linear-address width
    Long64 {
        /// 48 or 57.
        linear_width: u32,
        /// What pointers to data do not say.
        masking: Masking,
    },
}

/// A memory operand, as an exit reports it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryOperand {
    /// Instruction information.
    pub info: InstructionInfo,
    /// Exit qualification.
    pub displacement: u64,
    /// Size of the operand; not 0.
    pub bytes: u32,
    /// What happens to it.
    pub direction: Direction,
}

impl MemoryOperand {
    /// The linear address of the first byte. The others follow it, around the end of the address space where that is
    /// allowed: at 4 GiB outside of 64-bit mode.
    ///
    /// `state` is asked for base, limit and rights of one segment only, and in 64-bit mode for no more than the base of
    /// FS or GS.
    ///
    /// # Errors
    /// #SS(0) for the stack segment and #GP(0) for any other: outside of the segment's limit, against its type, unusable,
    /// or not canonical.
    pub fn linear_address(&self, mode: CpuMode, gpr: impl Fn(u8) -> u64, state: &impl Fields) -> Result<u64, Fault> {
        let segment = self.info.segment().ok_or(Fault::GeneralProtection(0))?;
        let fault = match segment {
            Segment::Ss => Fault::StackSegment(0),
            _ => Fault::GeneralProtection(0),
        };
        let offset = self.info.offset(self.displacement, gpr);
        match mode {
            CpuMode::Long64 { linear_width, masking } => {
                let base = match segment {
                    Segment::Fs | Segment::Gs => state.get(segment.base()),
                    _ => 0,
                };
                self.in_64_bit_mode(masking.address(base.wrapping_add(offset)), linear_width).ok_or(fault)
            }
            CpuMode::Protected => {
                let base = state.get(segment.base());
                let limit = state.get(segment.limit());
                let rights = AccessRights(state.get(segment.rights()) as u32);
                if !self.type_allows(rights) {
                    return Err(Fault::GeneralProtection(0));
                }
                self.in_protected_mode(offset & 0xFFFF_FFFF, base, limit, rights).ok_or(fault)
            }
        }
    }

    fn last(&self, first: u64) -> u64 {
        first.wrapping_add(u64::from(self.bytes).saturating_sub(1))
    }

    fn in_64_bit_mode(&self, first: u64, linear_width: u32) -> Option<u64> {
        let last = self.last(first);
        let canonical = |address: u64| match linear_width.checked_sub(1) {
            Some(top @ 0..=63) => matches!((address as i64) >> top, 0 | -1),
            _ => true,
        };
        (canonical(first) && canonical(last)).then_some(first)
    }

    /// An unusable segment has no type: the caller's limit check refuses it with the fault of that segment.
    fn type_allows(&self, rights: AccessRights) -> bool {
        rights.is_unusable()
            || match self.direction {
                Direction::Load => !rights.is_code() || rights.is_readable_code(),
                Direction::Store => rights.is_writable_data(),
            }
    }

    /// At an effective limit of 4 GiB the SDM leaves it to the processor whether an operand that wraps faults; here it
    /// does not in a flat segment.
    fn in_protected_mode(&self, first: u64, base: u64, limit: u64, rights: AccessRights) -> Option<u64> {
        if rights.is_unusable() {
            return None;
        }
        let last = self.last(first);
        let flat = base == 0 && limit == 0xFFFF_FFFF;
        let inside = if rights.is_expand_down() {
            let top = if rights.is_32_bit() { 0xFFFF_FFFF } else { 0xFFFF };
            first > limit && last <= top
        } else {
            last <= limit || flat
        };
        inside.then_some(base.wrapping_add(first) & 0xFFFF_FFFF)
    }
}
