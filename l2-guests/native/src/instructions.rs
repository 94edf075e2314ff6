//! The instructions, with their registers and operands.

use crate::case::Mode;

/// Register values of an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Value {
    /// This
    Is(u64),
    /// CR0 with these bits changed
    Cr0(u64),
    /// CR4 with these bits changed
    Cr4(u64),
    /// EAX and EDX of an MSR as it is
    Msr(u32),
    /// EAX and EDX of XCR0 as it is
    Xcr0,
}

/// The register that addresses the operand, and so its segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Base {
    /// RDI: in DS
    Rdi,
    /// RBP: in SS, where a bad address is #SS
    Rbp,
}

/// What is in memory there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operand {
    /// There is none.
    None,
    /// These bytes are read: a VMCS region's address.
    Region,
    /// The address of another region
    OtherRegion,
    /// As [`Self::Region`], and the instruction ends before it looks.
    Untouched,
    /// A number
    Number(u32, u64),
    /// So many bytes are written.
    Written(u32),
}

impl Operand {
    /// Bytes of it.
    pub fn bytes(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Region | Self::OtherRegion | Self::Untouched => 8,
            Self::Number(bytes, _) | Self::Written(bytes) => bytes,
        }
    }

    /// Whether the instruction reads or writes it.
    pub fn is_touched(self) -> bool {
        !matches!(self, Self::None | Self::Untouched)
    }

    /// Whether the instruction writes it.
    pub fn is_written(self) -> bool {
        matches!(self, Self::Written(_))
    }
}

impl Instruction {
    /// Bytes of the operand: those of VMREAD and VMWRITE have the size of the mode.
    pub fn bytes(&self, mode: Mode) -> u32 {
        let natural = matches!(self.code, [0x0F, 0x78 | 0x79, ..]);
        if natural && !mode.is_64() { self.operand.bytes().min(4) } else { self.operand.bytes() }
    }
}

/// An instruction.
pub struct Instruction {
    /// Its name
    pub name: &'static str,
    /// Its bytes, the same in each mode but for an address-size prefix in 16-bit code
    pub code: &'static [u8],
    /// RAX, and with [`Value::Msr`] and [`Value::Xcr0`] RDX
    pub rax: Value,
    /// RCX
    pub rcx: u64,
    /// RSI
    pub rsi: u64,
    /// Memory operand
    pub operand: Operand,
    /// ... and what addresses it
    pub base: Base,
    /// Whether it wants a current VMCS
    pub current: bool,
    /// What counts of RAX, RBX, RCX, RDX afterwards
    pub compared: [u64; 4],
}

const ALL: [u64; 4] = [u64::MAX; 4];

const fn plain(name: &'static str, code: &'static [u8]) -> Instruction {
    let (rax, rcx, rsi, operand, base) = (Value::Is(0), 0, 0, Operand::None, Base::Rdi);
    Instruction { name, code, rax, rcx, rsi, operand, base, current: false, compared: ALL }
}

const fn cpuid(name: &'static str, leaf: u64, subleaf: u64, compared: [u64; 4]) -> Instruction {
    Instruction { rax: Value::Is(leaf), rcx: subleaf, compared, ..plain(name, &[0x0F, 0xA2]) }
}

const fn rdmsr(name: &'static str, msr: u64, compared: [u64; 4]) -> Instruction {
    Instruction { rcx: msr, compared, ..plain(name, &[0x0F, 0x32]) }
}

const fn wrmsr(name: &'static str, msr: u64, rax: Value) -> Instruction {
    Instruction { rcx: msr, rax, ..plain(name, &[0x0F, 0x30]) }
}

const fn control(name: &'static str, code: &'static [u8], rax: Value) -> Instruction {
    Instruction { rax, ..plain(name, code) }
}

const fn vmx(name: &'static str, code: &'static [u8], rsi: u64, operand: Operand) -> Instruction {
    Instruction { rsi, operand, current: true, ..plain(name, code) }
}

/// With its operand at RBP.
const fn stack(name: &'static str, code: &'static [u8], rsi: u64, operand: Operand) -> Instruction {
    Instruction { base: Base::Rbp, ..vmx(name, code, rsi, operand) }
}

/// Bit 40: beyond what counts of a register outside of 64-bit mode.
const HIGH: u64 = 1 << 40;
const NE: u64 = 1 << 5;
const VMXE: u64 = 1 << 13;
const SMXE: u64 = 1 << 14;
const ET: u64 = 1 << 4;
const AM: u64 = 1 << 18;
const NW: u64 = 1 << 29;
/// PE and TS, of what LMSW takes
const LMSW: u64 = 0x9;
const GUEST_RIP: u64 = 0x681E;
const HOST_RIP: u64 = 0x6C16;
const EXIT_REASON: u64 = 0x4402;
const NO_FIELD: u64 = 0x6FFE;
const NOTHING: [u64; 4] = [0; 4];

/// CPUID leaf 1 without what a hypervisor changes: VMX, SMX and the hypervisor's bit, and the debug store.
const LEAF_1: [u64; 4] = [u64::MAX, u64::MAX, 1 << 27, !(1 << 21)];
/// CPUID leaf 7 without what nvmx does not show: docs/msrs.md.
const LEAF_7: [u64; 4] =
    [u64::MAX, !(1 << 2 | 1 << 14 | 1 << 25), !(1 << 13 | 1 << 30), !(1 << 18 | 1 << 19 | 1 << 30)];

/// CPUID leaf 6 without what nvmx does not show: docs/msrs.md.
const LEAF_6: [u64; 4] = [!(1 << 19 | 1 << 23), u64::MAX, !0xFF00, 0];
/// CPUID leaf 7, subleaf 1, likewise.
const LEAF_7_1: [u64; 4] = [!(1 << 8 | 1 << 17 | 1 << 27), u64::MAX, u64::MAX, !(1 << 15)];

/// Outside of VMX operation.
pub const OUTSIDE: &[Instruction] = &[
    cpuid("cpuid 0", 0, 0, ALL),
    cpuid("cpuid 1", 1, 0, LEAF_1),
    cpuid("cpuid 7", 7, 0, LEAF_7),
    cpuid("cpuid 0xd", 0xD, 0, ALL),
    cpuid("cpuid 0xd.1", 0xD, 1, ALL),
    cpuid("cpuid 0x80000001", 0x8000_0001, 0, ALL),
    cpuid("cpuid 0x80000008", 0x8000_0008, 0, ALL),
    control("mov cr0 with NE cleared", &[0x0F, 0x22, 0xC0], Value::Cr0(NE)),
    control("mov cr0 with NE cleared and a high bit", &[0x0F, 0x22, 0xC0], Value::Cr0(NE | HIGH)),
    control("mov cr4 with VMXE cleared", &[0x0F, 0x22, 0xE0], Value::Cr4(VMXE)),
    control("mov cr4 with VMXE cleared and a high bit", &[0x0F, 0x22, 0xE0], Value::Cr4(VMXE | HIGH)),
    control("mov cr4 with SMXE", &[0x0F, 0x22, 0xE0], Value::Cr4(SMXE)),
    plain("invd", &[0x0F, 0x08]),
    plain("vmxoff", &[0x0F, 0x01, 0xC4]),
    vmx("vmread", &[0x0F, 0x78, 0xF0], GUEST_RIP, Operand::None),
    vmx("vmptrld", &[0x0F, 0xC7, 0x37], 0, Operand::Region),
    vmx("vmptrst", &[0x0F, 0xC7, 0x3F], 0, Operand::Untouched),
    vmx("vmxon of no region", &[0xF3, 0x0F, 0xC7, 0x37], 0, Operand::Number(8, 0x123)),
    vmx("invvpid", &[0x66, 0x0F, 0x38, 0x81, 0x37], 2, Operand::Untouched),
    plain("vmcall", &[0x0F, 0x01, 0xC1]),
    plain("vmlaunch", &[0x0F, 0x01, 0xC2]),
    plain("getsec", &[0x0F, 0x37]),
    cpuid("cpuid 6", 6, 0, LEAF_6),
    cpuid("cpuid 7.1", 7, 1, LEAF_7_1),
    cpuid("cpuid 0xd.2", 0xD, 2, ALL),
    cpuid("cpuid 0x19", 0x19, 0, ALL),
    cpuid("cpuid 0x80000000", 0x8000_0000, 0, ALL),
    Instruction { compared: NOTHING, ..plain("rdtsc", &[0x0F, 0x31]) },
    rdmsr("rdmsr 0x480", 0x480, NOTHING),
    wrmsr("wrmsr pat, bad", 0x277, Value::Is(2)),
    control("xsetbv", &[0x0F, 0x01, 0xD1], Value::Xcr0),
    control("xsetbv, bad", &[0x0F, 0x01, 0xD1], Value::Is(0)),
    Instruction { rcx: 1, ..control("xsetbv of no register", &[0x0F, 0x01, 0xD1], Value::Xcr0) },
    plain("clts", &[0x0F, 0x06]),
    plain("smsw", &[0x0F, 0x01, 0xE0]),
    control("lmsw", &[0x0F, 0x01, 0xF0], Value::Is(LMSW)),
    control("lmsw of nothing", &[0x0F, 0x01, 0xF0], Value::Is(0)),
    control("mov cr0 with NW", &[0x0F, 0x22, 0xC0], Value::Cr0(NW)),
    control("mov cr0 with AM, ET and a reserved bit", &[0x0F, 0x22, 0xC0], Value::Cr0(AM | ET | 1 << 12)),
    control("mov cr4 with bit 31", &[0x0F, 0x22, 0xE0], Value::Cr4(VMXE | 1 << 31)),
];

/// In VMX root operation.
pub const INSIDE: &[Instruction] = &[
    cpuid("cpuid 0x80000001", 0x8000_0001, 0, ALL),
    rdmsr("rdmsr 0x480", 0x480, NOTHING),
    rdmsr("rdmsr 0x3a", 0x3A, ALL),
    wrmsr("wrmsr 0x480", 0x480, Value::Is(0)),
    wrmsr("wrmsr 0x3a", 0x3A, Value::Is(0)),
    wrmsr("wrmsr pat", 0x277, Value::Msr(0x277)),
    wrmsr("wrmsr pat, bad", 0x277, Value::Is(2)),
    wrmsr("wrmsr sysenter_cs", 0x174, Value::Msr(0x174)),
    wrmsr("wrmsr efer", 0xC000_0080, Value::Msr(0xC000_0080)),
    wrmsr("wrmsr efer, bad", 0xC000_0080, Value::Is(2)),
    control("xsetbv", &[0x0F, 0x01, 0xD1], Value::Xcr0),
    control("xsetbv, bad", &[0x0F, 0x01, 0xD1], Value::Is(0)),
    control("mov cr0 with NE cleared", &[0x0F, 0x22, 0xC0], Value::Cr0(NE)),
    control("mov cr4 with VMXE cleared", &[0x0F, 0x22, 0xE0], Value::Cr4(VMXE)),
    plain("invd", &[0x0F, 0x08]),
    plain("getsec", &[0x0F, 0x37]),
    plain("vmfunc", &[0x0F, 0x01, 0xD4]),
    vmx("vmxon", &[0xF3, 0x0F, 0xC7, 0x37], 0, Operand::Untouched),
    vmx("vmclear", &[0x66, 0x0F, 0xC7, 0x37], 0, Operand::OtherRegion),
    vmx("vmptrld", &[0x0F, 0xC7, 0x37], 0, Operand::OtherRegion),
    vmx("vmptrst", &[0x0F, 0xC7, 0x3F], 0, Operand::Written(8)),
    vmx("vmread", &[0x0F, 0x78, 0xF0], HOST_RIP, Operand::None),
    vmx("vmread of no field", &[0x0F, 0x78, 0xF0], NO_FIELD, Operand::None),
    vmx("vmread to memory", &[0x0F, 0x78, 0x37], GUEST_RIP, Operand::Written(8)),
    vmx("vmread to memory, host_rip", &[0x0F, 0x78, 0x37], HOST_RIP, Operand::Written(8)),
    vmx("vmwrite", &[0x0F, 0x79, 0xF0], GUEST_RIP, Operand::None),
    vmx("vmwrite from memory", &[0x0F, 0x79, 0x37], GUEST_RIP, Operand::Number(8, 0x1234)),
    vmx("vmwrite from memory, host_rip", &[0x0F, 0x79, 0x37], HOST_RIP, Operand::Number(8, 0x1234)),
    vmx("vmwrite from memory, no field", &[0x0F, 0x79, 0x37], NO_FIELD, Operand::Number(8, 0x1234)),
    plain("vmlaunch", &[0x0F, 0x01, 0xC2]),
    plain("vmresume", &[0x0F, 0x01, 0xC3]),
    plain("vmcall", &[0x0F, 0x01, 0xC1]),
    // nvmx shows no BTS and no PEBS there.
    Instruction { compared: NOTHING, ..wrmsr("wrmsr misc_enable", 0x1A0, Value::Msr(0x1A0)) },
    wrmsr("wrmsr mtrr_def_type", 0x2FF, Value::Msr(0x2FF)),
    wrmsr("wrmsr mtrr_def_type, bad", 0x2FF, Value::Is(2)),
    wrmsr("wrmsr apic_base", 0x1B, Value::Msr(0x1B)),
    wrmsr("wrmsr apic_base, bad", 0x1B, Value::Is(1)),
    Instruction { rcx: 1, ..control("xsetbv of no register", &[0x0F, 0x01, 0xD1], Value::Xcr0) },
    control("lmsw", &[0x0F, 0x01, 0xF0], Value::Is(LMSW)),
    control("mov cr0 with NW", &[0x0F, 0x22, 0xC0], Value::Cr0(NW)),
    control("mov cr4 with SMXE", &[0x0F, 0x22, 0xE0], Value::Cr4(SMXE)),
    vmx("vmclear of no region", &[0x66, 0x0F, 0xC7, 0x37], 0, Operand::Number(8, 0x123)),
    vmx("vmptrld of no region", &[0x0F, 0xC7, 0x37], 0, Operand::Number(8, 0x123)),
    vmx("vmptrld of no revision", &[0x0F, 0xC7, 0x37], 0, Operand::Number(8, 0)),
    vmx("vmwrite of a read-only field", &[0x0F, 0x79, 0xF0], EXIT_REASON, Operand::None),
    vmx("invvpid with reserved bits", &[0x66, 0x0F, 0x38, 0x81, 0x37], 1, Operand::Number(16, 1 << 16)),
    vmx("invept of no pointer", &[0x66, 0x0F, 0x38, 0x80, 0x37], 1, Operand::Number(16, 1 << 63)),
    vmx("invept", &[0x66, 0x0F, 0x38, 0x80, 0x37], 2, Operand::Number(16, 0)),
    vmx("invept of no type", &[0x66, 0x0F, 0x38, 0x80, 0x37], 7, Operand::Number(16, 0)),
    vmx("invvpid", &[0x66, 0x0F, 0x38, 0x81, 0x37], 2, Operand::Number(16, 0)),
    stack("vmxon by the stack", &[0xF3, 0x0F, 0xC7, 0x75, 0], 0, Operand::Untouched),
    stack("vmclear by the stack", &[0x66, 0x0F, 0xC7, 0x75, 0], 0, Operand::OtherRegion),
    stack("vmptrld by the stack", &[0x0F, 0xC7, 0x75, 0], 0, Operand::OtherRegion),
    stack("vmptrst by the stack", &[0x0F, 0xC7, 0x7D, 0], 0, Operand::Written(8)),
    stack("vmread to the stack", &[0x0F, 0x78, 0x75, 0], GUEST_RIP, Operand::Written(8)),
    stack("vmwrite from the stack", &[0x0F, 0x79, 0x75, 0], HOST_RIP, Operand::Number(8, 0x1234)),
    stack("invept by the stack", &[0x66, 0x0F, 0x38, 0x80, 0x75, 0], 2, Operand::Number(16, 0)),
    stack("invvpid by the stack", &[0x66, 0x0F, 0x38, 0x81, 0x75, 0], 2, Operand::Number(16, 0)),
];

/// What a guest's hypervisor lets it execute.
pub const OF_A_GUEST: &[Instruction] = &[
    rdmsr("rdmsr 0x480", 0x480, NOTHING),
    rdmsr("rdmsr 0x3a", 0x3A, ALL),
    wrmsr("wrmsr 0x480", 0x480, Value::Is(0)),
    wrmsr("wrmsr pat", 0x277, Value::Msr(0x277)),
    wrmsr("wrmsr pat, bad", 0x277, Value::Is(2)),
    vmx("vmread", &[0x0F, 0x78, 0xF0], HOST_RIP, Operand::None),
    vmx("vmread of no field", &[0x0F, 0x78, 0xF0], NO_FIELD, Operand::None),
    vmx("vmread to memory", &[0x0F, 0x78, 0x37], GUEST_RIP, Operand::Written(8)),
    vmx("vmread to memory, host_rip", &[0x0F, 0x78, 0x37], HOST_RIP, Operand::Written(8)),
    vmx("vmwrite", &[0x0F, 0x79, 0xF0], HOST_RIP, Operand::None),
    vmx("vmwrite from memory", &[0x0F, 0x79, 0x37], GUEST_RIP, Operand::Number(8, 0x1234)),
    vmx("vmwrite from memory, host_rip", &[0x0F, 0x79, 0x37], HOST_RIP, Operand::Number(8, 0x1234)),
    stack("vmread to the stack", &[0x0F, 0x78, 0x75, 0], HOST_RIP, Operand::Written(8)),
    stack("vmwrite from the stack", &[0x0F, 0x79, 0x75, 0], HOST_RIP, Operand::Number(8, 0x1234)),
    plain("vmfunc", &[0x0F, 0x01, 0xD4]),
    Instruction { rcx: 1, ..plain("vmfunc, no function", &[0x0F, 0x01, 0xD4]) },
    cpuid("cpuid", 0, 0, NOTHING),
    plain("invd", &[0x0F, 0x08]),
    control("xsetbv", &[0x0F, 0x01, 0xD1], Value::Xcr0),
    rdmsr("rdmsr of no msr", 0x2000, ALL),
    wrmsr("wrmsr efer, bad", 0xC000_0080, Value::Is(2)),
    // nvmx shows no BTS and no PEBS there.
    Instruction { compared: NOTHING, ..wrmsr("wrmsr misc_enable", 0x1A0, Value::Msr(0x1A0)) },
    wrmsr("wrmsr mtrr_def_type", 0x2FF, Value::Msr(0x2FF)),
    wrmsr("wrmsr apic_base", 0x1B, Value::Msr(0x1B)),
    wrmsr("wrmsr apic_base, bad", 0x1B, Value::Is(1)),
    vmx("vmptrst", &[0x0F, 0xC7, 0x3F], 0, Operand::Untouched),
    vmx("vmread of a read-only field", &[0x0F, 0x78, 0xF0], EXIT_REASON, Operand::None),
    vmx("vmwrite of a read-only field", &[0x0F, 0x79, 0xF0], EXIT_REASON, Operand::None),
];
