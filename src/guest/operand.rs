//! Operands of a guest's instructions: registers, and memory through its segments and page tables. The guest is that of the
//! current VMCS: L2, or L3 where nvmx completes an instruction for it.
//!
//! Source: SDM vol. 3C, tables "Format of the VM-Exit Instruction-Information Field as Used for ...".

use crate::addr::{Gpa, PAGE_SIZE};
use crate::cpu::{Cpu, Operation};
use crate::ept::{EptRules, Eptp};
use crate::guest::nested_memory::NestedView;
use crate::guest::{Stop, inject};
use crate::hw::phys::DirectMap;
use crate::hw::{cr, msr};
use crate::mm::linear::{Keys, Paging};
use crate::mm::plain_read::PlainRead;
use crate::rules::merge::Duties;
use crate::vmcs::access::InfoFrom;
use crate::vmcs::slots::SlotId;
use crate::vmx::Field;
use crate::vmx::field::{Fields, PDPTES};
use crate::vmx::instr::{CpuMode, Direction, InstructionInfo, MemoryOperand, decode_field_access};
use crate::vmx::segment::{AccessRights, Segment};
use crate::x86::RFlags;
use crate::x86::lam::Masking;
use crate::x86::msr::IA32_PKRS;
use crate::x86::{Cr4, DataAccess, Fault, debug, efer};

const RSP: u8 = 4;

/// The register operand that names a field for VMREAD and VMWRITE, a type for INVEPT and INVVPID: 32 bits of it outside 64-bit mode.
#[inline(always)]
pub fn second_register(cpu: &mut Cpu, info: InstructionInfo) -> u64 {
    let value = gpr(cpu, info.reg2());
    cut(cpu, value)
}

/// True in IA-32e mode, which is 64-bit mode for a VMX instruction that exits, VMCALL excepted. For all others ask
/// [`is_64_bit_code`].
#[inline(always)]
pub fn in_64_bit_mode(cpu: &mut Cpu) -> bool {
    efer(cpu) & efer::LMA != 0
}

/// True in 64-bit mode, false in compatibility mode too.
pub fn is_64_bit_code(cpu: &mut Cpu) -> bool {
    in_64_bit_mode(cpu) && AccessRights(cpu.vmx.read(Field::GUEST_CS_AR_BYTES) as u32).is_64_bit_code()
}

/// #GP(0) above CPL 0. The DPL of SS is the CPL.
#[inline(always)]
pub fn require_cpl0(cpu: &mut Cpu) -> Result<(), Fault> {
    match cpu.vmx.read(Field::GUEST_SS_AR_BYTES) >> 5 & 3 {
        0 => Ok(()),
        _ => Err(Fault::GeneralProtection(0)),
    }
}

/// IA32_EFER of the guest. L2's is known in VMX operation, where paging, and so LMA, stays as it is.
#[inline(always)]
fn efer(cpu: &mut Cpu) -> u64 {
    match cpu.nested.operation {
        Operation::Root { .. } => cpu.tracked.efer(),
        _ => cpu.vmx.read(Field::GUEST_IA32_EFER),
    }
}

/// A general-purpose register by number.
#[inline(always)]
pub fn gpr(cpu: &mut Cpu, number: u8) -> u64 {
    match number {
        RSP => cpu.vmx.read(Field::GUEST_RSP),
        n => cpu.regs.gpr.get(n as usize).copied().unwrap_or(0),
    }
}

#[inline(always)]
fn set_gpr(cpu: &mut Cpu, number: u8, value: u64) {
    match number {
        RSP => cpu.vmx.write(Field::GUEST_RSP, value),
        n => {
            if let Some(register) = cpu.regs.gpr.get_mut(n as usize) {
                *register = value;
            }
        }
    }
}

/// Base, limit and rights of one segment, where they count.
struct OneSegment(Option<[(Field, u64); 3]>);

impl Fields for OneSegment {
    fn get(&self, field: Field) -> u64 {
        self.0.and_then(|fields| fields.into_iter().find(|(f, _)| *f == field)).map_or(0, |(_, value)| value)
    }
}

/// The linear address of the memory operand of the instruction that exited.
pub fn linear(cpu: &mut Cpu, bytes: u32, direction: Direction) -> Result<u64, Fault> {
    let info = InstructionInfo(cpu.vmx.read(Field::VMX_INSTRUCTION_INFO) as u32);
    let displacement = cpu.vmx.read(Field::EXIT_QUALIFICATION);
    let long = in_64_bit_mode(cpu);
    let cr4 = if long { Cr4::from_bits_retain(cpu.vmx.read(Field::GUEST_CR4)) } else { Cr4::empty() };
    let linear_width = if cr4.contains(Cr4::LA57) { 57 } else { 48 };
    let mode = if long { CpuMode::Long64 { linear_width, masking: masking(cpu, cr4) } } else { CpuMode::Protected };
    let segment = info.segment().unwrap_or(Segment::Ds);
    let counts = !long || matches!(segment, Segment::Fs | Segment::Gs);
    let state = OneSegment(counts.then(|| segment_state(cpu, segment)));
    let rsp = cpu.vmx.read(Field::GUEST_RSP);
    let gpr = |n: u8| if n == RSP { rsp } else { cpu.regs.gpr.get(n as usize).copied().unwrap_or(0) };
    let at = MemoryOperand { info, displacement, bytes, direction }.linear_address(mode, gpr, &state)?;
    if cr4.contains(Cr4::LASS) {
        separate(cpu, cr4, at, bytes, segment)?;
    }
    Ok(at)
}

#[inline(never)]
fn segment_state(cpu: &mut Cpu, segment: Segment) -> [(Field, u64); 3] {
    [segment.base(), segment.limit(), segment.rights()].map(|field| (field, cpu.vmx.read(field)))
}

/// Which pointers the guest tags; a processor without LAM is not asked.
#[inline(always)]
fn masking(cpu: &mut Cpu, cr4: Cr4) -> Masking {
    if cpu.config.offered.cr3_flags == 0 {
        return Masking::OFF;
    }
    Masking { cr3: cpu.vmx.read(Field::GUEST_CR3), cr4 }
}

/// Linear-address-space separation: with SMAP on, the supervisor has no business in the lower half unless RFLAGS.AC says so
/// (SDM vol. 3A, "Linear-Address-Space Separation (LASS)").
#[cold]
#[inline(never)]
fn separate(cpu: &mut Cpu, cr4: Cr4, first: u64, bytes: u32, segment: Segment) -> Result<(), Fault> {
    const RFLAGS_AC: u64 = RFlags::ALIGNMENT_CHECK.bits();
    const UPPER: u64 = 1 << 63;
    let last = first.wrapping_add(u64::from(bytes).saturating_sub(1));
    match !cr4.contains(Cr4::SMAP) || first & last & UPPER != 0 || cpu.vmx.read(Field::GUEST_RFLAGS) & RFLAGS_AC != 0 {
        true => Ok(()),
        false if segment == Segment::Ss => Err(Fault::StackSegment(0)),
        false => Err(Fault::GeneralProtection(0)),
    }
}

/// What the guest's paging depends on.
#[inline]
pub fn paging(cpu: &mut Cpu) -> Paging {
    let efer = efer(cpu);
    let vmx = &mut cpu.vmx;
    // The PDPTE registers mean something with PAE paging alone.
    let pdptes = match efer & efer::LMA {
        0 => PDPTES.map(|field| vmx.read(field)),
        _ => [0; 4],
    };
    let mut paging = Paging {
        cr0: vmx.read(Field::GUEST_CR0),
        cr3: vmx.read(Field::GUEST_CR3),
        cr4: vmx.read(Field::GUEST_CR4),
        keys: Keys::OPEN,
        efer,
        rflags: vmx.read(Field::GUEST_RFLAGS),
        pdptes,
        physical_width: cpu.config.offered.physical_width,
    };
    if paging.cr4 & (Cr4::PKE | Cr4::PKS).bits() != 0 {
        paging.keys = keys(paging.cr4);
    }
    paging
}

/// The registers of the protection keys that are on, which stay the guest's in nvmx.
#[cold]
#[inline(never)]
fn keys(cr4: u64) -> Keys {
    let cr4 = Cr4::from_bits_retain(cr4);
    Keys {
        user: if cr4.contains(Cr4::PKE) { cr::pkru() } else { 0 },
        supervisor: if cr4.contains(Cr4::PKS) { msr::rdmsr_safe(IA32_PKRS).unwrap_or(0) as u32 } else { 0 },
    }
}

/// Reads one or two words of the guest's memory at a linear address.
#[inline(always)]
pub fn read_words<const N: usize>(cpu: &mut Cpu, linear: u64) -> Result<[u64; N], Stop> {
    const { assert!(N == 1 || N == 2, "as many as an operand has") };
    match plain_words(cpu, linear) {
        Some(words) => Ok(words),
        None => {
            let mut bytes = [0; 16];
            read(cpu, linear, &mut bytes[..8 * N])?;
            let both = u128::from_le_bytes(bytes);
            Ok(core::array::from_fn(|n| (both >> (64 * n)) as u64))
        }
    }
}

/// The same where it is L2's memory, in one page that is simply there, and no breakpoint watches data.
#[inline(always)]
fn plain_words<const N: usize>(cpu: &mut Cpu, linear: u64) -> Option<[u64; N]> {
    let in_one_page = linear & (PAGE_SIZE - 1) <= PAGE_SIZE - 8 * N as u64;
    if matches!(cpu.nested.operation, Operation::NonRoot { .. })
        || !in_one_page
        || debug::any_enabled(cpu.vmx.read(Field::GUEST_DR7))
    {
        return None;
    }
    let paging = PlainRead {
        efer: efer(cpu),
        cr3: cpu.vmx.read(Field::GUEST_CR3),
        cr4: cpu.vmx.read(Field::GUEST_CR4),
        physical_width: cpu.config.offered.physical_width,
    };
    let (at, _) = paging.page(&cpu.guest, linear)?;
    let mut words = [0; N];
    for (n, word) in words.iter_mut().enumerate() {
        *word = cpu.guest.read_u64(Gpa::new(at.get() + 8 * n as u64)).ok()?;
    }
    Some(words)
}

/// Reads the guest's memory at a linear address.
pub fn read(cpu: &mut Cpu, linear: u64, into: &mut [u8]) -> Result<(), Stop> {
    match cpu.nested.operation {
        Operation::NonRoot { current, .. } => nested_view(cpu, current).read(linear, into)?,
        _ => paging(cpu).read(&cpu.guest, linear, into)?,
    }
    meet_breakpoints(cpu, linear, into.len(), DataAccess::Read);
    Ok(())
}

/// Writes the guest's memory at a linear address.
pub fn write(cpu: &mut Cpu, linear: u64, bytes: &[u8]) -> Result<(), Stop> {
    match cpu.nested.operation {
        Operation::NonRoot { current, .. } => nested_view(cpu, current).write(linear, bytes)?,
        _ => paging(cpu).write(&cpu.guest, linear, bytes)?,
    }
    meet_breakpoints(cpu, linear, bytes.len(), DataAccess::Write);
    Ok(())
}

/// Data breakpoints on an operand that was accessed trap behind the instruction, which no longer faults. DR7 is in the VMCS,
/// the addresses are in the processor.
fn meet_breakpoints(cpu: &mut Cpu, linear: u64, bytes: usize, access: DataAccess) {
    let dr7 = cpu.vmx.read(Field::GUEST_DR7);
    if debug::any_enabled(dr7) {
        let paging = paging(cpu);
        let addresses = cr::breakpoint_addresses();
        let pieces = paging.pieces(linear, bytes);
        let met = pieces.map(|(at, len)| debug::data_breakpoints(dr7, addresses, at, len as u64, access));
        let [first, second] = met;
        if first | second != 0 {
            inject::pend_debug(&mut cpu.vmx, first | second);
        }
    }
}

/// L3's memory; vmcs02 is current.
fn nested_view(cpu: &mut Cpu, id: SlotId) -> NestedView<'_, DirectMap> {
    let paging = paging(cpu);
    let slot = &cpu.nested.slots[id];
    let has_ept = slot.merged.is_some_and(|m| !m.duties.contains(Duties::LOAD_PDPTES));
    let eptp12 = has_ept.then(|| Eptp::new(slot.vmcs12.get(Field::EPT_POINTER)));
    let has_sub_pages = slot.has_duty(Duties::POINT_TO_SUB_PAGES);
    let spptp12 = has_sub_pages.then(|| Gpa::new(slot.vmcs12.get(Field::SUB_PAGE_PERMISSION_TABLE_POINTER)));
    NestedView { guest: &cpu.guest, eptp12, spptp12, rules: EptRules::of(&cpu.config.offered), paging }
}

/// The instruction information of VMREAD or VMWRITE.
#[inline(always)]
pub fn field_access_info(cpu: &mut Cpu) -> InstructionInfo {
    let from_code = if cpu.config.access.info_from() == InfoFrom::Code { info_from_code(cpu) } else { None };
    from_code.unwrap_or_else(|| InstructionInfo(cpu.vmx.read(Field::VMX_INSTRUCTION_INFO) as u32))
}

/// The same from the bytes of the instruction, if it is L2's. Code that data accesses cannot read is no error: the field tells as well.
#[inline(never)]
fn info_from_code(cpu: &mut Cpu) -> Option<InstructionInfo> {
    if matches!(cpu.nested.operation, Operation::NonRoot { .. }) || !in_64_bit_mode(cpu) {
        return None;
    }
    let rip = cpu.vmx.read(Field::GUEST_RIP);
    let mut bytes = [0; 5];
    let len = bytes.len().min(cpu.vmx.read(Field::VM_EXIT_INSTRUCTION_LEN) as usize);
    paging(cpu).read(&cpu.guest, rip, &mut bytes[..len]).ok()?;
    decode_field_access(&bytes[..len])
}

/// A register or memory operand of VMREAD and VMWRITE has 64 bits in 64-bit mode, else 32.
#[inline(always)]
fn cut(cpu: &mut Cpu, value: u64) -> u64 {
    if in_64_bit_mode(cpu) { value } else { value & 0xFFFF_FFFF }
}

/// Bytes of such an operand.
fn width(cpu: &mut Cpu) -> u32 {
    if in_64_bit_mode(cpu) { 8 } else { 4 }
}

/// The source operand of VMWRITE.
#[inline(always)]
pub fn load(cpu: &mut Cpu, info: InstructionInfo) -> Result<u64, Stop> {
    if info.is_register() {
        let value = gpr(cpu, info.reg1());
        return Ok(cut(cpu, value));
    }
    load_memory(cpu)
}

#[inline(never)]
fn load_memory(cpu: &mut Cpu) -> Result<u64, Stop> {
    let bytes = width(cpu);
    let linear = linear(cpu, bytes, Direction::Load)?;
    let mut buffer = [0; 8];
    read(cpu, linear, &mut buffer[..bytes as usize])?;
    Ok(u64::from_le_bytes(buffer))
}

/// The destination operand of VMREAD.
#[inline(always)]
pub fn store(cpu: &mut Cpu, info: InstructionInfo, value: u64) -> Result<(), Stop> {
    if info.is_register() {
        let value = cut(cpu, value);
        set_gpr(cpu, info.reg1(), value);
        return Ok(());
    }
    store_memory(cpu, value)
}

#[inline(never)]
fn store_memory(cpu: &mut Cpu, value: u64) -> Result<(), Stop> {
    let bytes = width(cpu);
    let linear = linear(cpu, bytes, Direction::Store)?;
    write(cpu, linear, &value.to_le_bytes()[..bytes as usize])
}
