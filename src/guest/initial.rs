//! The states in which a processor begins to run L2, written to vmcs01: as a boot protocol asks, and after an INIT.
//!
//! Source: SDM vol. 3A, "Processor Initialization", table "IA-32 and Intel 64 Processor States Following Power-up, Reset,
//! or INIT"; vol. 3C, "Checks on Guest Segment Registers" (the form in which an unusable or real-mode segment is entered).

use crate::boot::guest_image::{Protocol, Start};
use crate::cpu::Cpu;
use crate::mm::Span;
use crate::vmcs::access::VmxOperation;
use crate::vmcs::vmcs01;
use crate::vmx::Field;
use crate::vmx::segment::{AccessRights, Segment};
use crate::x86::rflags::{self, RFlags};
use crate::x86::{Cr0, Cr4};

/// Selector, base, limit, access rights.
type SegmentValues = (u16, u64, u32, u64);

const UNUSABLE: SegmentValues = (0, 0, 0, AccessRights::UNUSABLE as u64);
const BUSY_TSS: u64 = AccessRights::BUSY_TSS.0 as u64;
const LDT: u64 = AccessRights::LOCAL_TABLE.0 as u64;
/// CR0.ET, which is always 1.
const CR0_ET: Cr0 = Cr0::ET;

/// 32-bit protected mode without paging, flat segments: the machine state of the boot protocols. A boot sector: real mode.
pub fn write_boot_state(cpu: &mut Cpu, start: &Start) {
    if start.protocol == Protocol::BootSector {
        return write_sector_state(cpu, start);
    }
    let code = (0x10, 0, u32::MAX, AccessRights::CODE_32.0.into());
    let data = (0x18, 0, u32::MAX, AccessRights::DATA_32.0.into());
    write_segments(cpu, code, data, UNUSABLE, (0, 0, 0x67, BUSY_TSS));
    write_rest(cpu, Cr0::PE | Cr0::NE | CR0_ET, start.entry.get());
    cpu.vmx.write(Field::GUEST_GDTR_BASE, start.gdt.map_or(0, Span::start));
    cpu.vmx.write(Field::GUEST_GDTR_LIMIT, start.gdt.map_or(0, |gdt| gdt.len().saturating_sub(1)));
    cpu.vmx.write(Field::GUEST_RSP, start.esp.get());
    cpu.regs.gpr = [0; 16];
    cpu.regs.gpr[0] = start.eax as u64;
    cpu.regs.gpr[3] = start.ebx.get();
    cpu.regs.gpr[6] = start.esi.get();
}

/// Real mode with interrupts on, as firmware jumps to a boot sector: segments and vectors at 0.
fn write_sector_state(cpu: &mut Cpu, start: &Start) {
    write_init_state(cpu, start.edx);
    for (field, value) in [
        (Segment::Cs.selector(), 0),
        (Segment::Cs.base(), 0),
        (Field::GUEST_IDTR_LIMIT, 0x3FF),
        (Field::GUEST_RIP, start.entry.get()),
        (Field::GUEST_RSP, start.esp.get()),
        (Field::GUEST_RFLAGS, RFlags::INTERRUPT_FLAG.bits() | rflags::FIXED),
    ] {
        cpu.vmx.write(field, value);
    }
}

/// The state after an INIT but for what is not in vmcs01. SYSENTER's MSRs and IA32_PAT keep their values. `signature` is
/// that of the processor, for EDX.
pub fn write_init_state(cpu: &mut Cpu, signature: u32) {
    const PRESENT_DATA: u64 = AccessRights::DATA_16.0 as u64;
    let code = (0xF000, 0xFFFF_0000, 0xFFFF, PRESENT_DATA);
    let data = (0, 0, 0xFFFF, PRESENT_DATA);
    write_segments(cpu, code, data, (0, 0, 0xFFFF, LDT), (0, 0, 0xFFFF, BUSY_TSS));
    write_rest(cpu, Cr0::NE | CR0_ET, 0xFFF0);
    cpu.vmx.write(Field::GUEST_GDTR_BASE, 0);
    cpu.vmx.write(Field::GUEST_GDTR_LIMIT, 0xFFFF);
    cpu.vmx.write(Field::GUEST_IDTR_LIMIT, 0xFFFF);
    cpu.regs.gpr = [0; 16];
    cpu.regs.gpr[2] = u64::from(signature);
}

fn write_segments(cpu: &mut Cpu, cs: SegmentValues, data: SegmentValues, ldtr: SegmentValues, tr: SegmentValues) {
    let vmx = &mut cpu.vmx;
    for (segment, (selector, base, limit, rights)) in [
        (Segment::Cs, cs),
        (Segment::Ss, data),
        (Segment::Ds, data),
        (Segment::Es, data),
        (Segment::Fs, data),
        (Segment::Gs, data),
        (Segment::Ldtr, ldtr),
        (Segment::Tr, tr),
    ] {
        vmx.write(segment.selector(), u64::from(selector));
        vmx.write(segment.base(), base);
        vmx.write(segment.limit(), u64::from(limit));
        vmx.write(segment.rights(), rights);
    }
}

/// What is the same in both: no paging, no interrupts, nothing pending, active.
fn write_rest(cpu: &mut Cpu, cr0: Cr0, rip: u64) {
    let entry = vmcs01::entry(&cpu.config.hardware);
    for (field, value) in [
        (Field::VM_ENTRY_CONTROLS, entry.bits() as u64),
        (Field::VM_ENTRY_INTR_INFO_FIELD, 0),
        (Field::VM_ENTRY_MSR_LOAD_COUNT, 0),
        (Field::GUEST_CR0, cr0.bits()),
        (Field::CR0_READ_SHADOW, (cr0 - Cr0::NE).bits()),
        (Field::GUEST_CR3, 0),
        (Field::GUEST_CR4, Cr4::VMXE.bits()),
        (Field::CR4_READ_SHADOW, 0),
        (Field::GUEST_IDTR_BASE, 0),
        (Field::GUEST_IDTR_LIMIT, 0),
        (Field::GUEST_RIP, rip),
        (Field::GUEST_RSP, 0),
        (Field::GUEST_RFLAGS, 2),
        (Field::GUEST_DR7, 0x400),
        (Field::GUEST_IA32_DEBUGCTL, 0),
        (Field::GUEST_IA32_EFER, 0),
        (Field::GUEST_INTERRUPTIBILITY_INFO, 0),
        (Field::GUEST_ACTIVITY_STATE, 0),
        (Field::GUEST_PENDING_DBG_EXCEPTIONS, 0),
    ] {
        cpu.vmx.write(field, value);
    }
    vmcs01::confine(&mut cpu.vmx, &cpu.config, VmxOperation::Off);
}
