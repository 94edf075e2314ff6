//! Memory operands in every addressing form, and operands that fault.
//!
//! The test's memory has linear addresses above 4 GiB that differ from the physical ones, so that a hypervisor that takes
//! one for the other is found out. Sources: SDM "Format of the VM-Exit Instruction-Information Field", the fault lists of
//! the instructions, "Canonical Addressing".

use crate::expect::{GP, Got, PF_READ, PF_READ_ONLY, PF_WRITE, SS, SUCCEED, expect_fault, got};
use core::{arch::asm, ptr};
use l2_kit::{
    Check, Global, caps,
    cpu::{self, FS_BASE, GS_BASE},
    fields as f,
    pages::{self, Access, PAGE},
    protocol::Hex,
    serial::Serial,
    setup, trap, vmx,
    vmx::Outcome,
};

/// Linear addresses of the four pages: writable, missing, read-only, missing until it is touched.
const WRITABLE: u64 = 5 << 30;
const MISSING: u64 = WRITABLE + PAGE;
const READ_ONLY: u64 = WRITABLE + 2 * PAGE;
const LATE: u64 = WRITABLE + 3 * PAGE;
/// Where the forms point to.
const TARGET: u64 = WRITABLE + 0x100;
/// The last canonical bytes of the lower half: eight bytes from here leave it.
const EDGE: u64 = 0x0000_7FFF_FFFF_FFFC;
const NOT_CANONICAL: u64 = 1 << 62;

const PATTERN: u64 = 0x1122_3344_5566_7788;
const OTHER: u64 = 0x0000_7701_2345_6789;

/// A page below 2 GiB with a name, for absolute and RIP-relative operands.
#[repr(C, align(4096))]
struct Low(Global<[u64; 512]>);
static LOW: Low = Low(Global::new([0; 512]));

/// Fields that a hypervisor may keep in different places.
const FIELDS: [(&str, u32); 3] =
    [("guest_rip", f::GUEST_RIP), ("host_rip", f::HOST_RIP), ("tsc_offset", f::TSC_OFFSET)];

/// All of it, with a VMCS of its own.
pub fn all() {
    let region = setup::region();
    let ready = vmx::vmclear(region).succeeded() && vmx::vmptrld(region).succeeded();
    Check::new(&mut Serial, "operands: a VMCS").expect("ready", ready, true).end();
    let own = cpu::cr3();
    let tables = pages::identity_tables(Access::Kernel);
    let (a, b) = (pages::address(pages::page()), pages::address(pages::page()));
    pages::set_entry(tables, WRITABLE, a | 3);
    pages::set_entry(tables, MISSING, 0);
    pages::set_entry(tables, READ_ONLY, b | 1);
    cpu::set_cr3(tables);
    forms();
    other_instructions(region);
    faults();
    restart();
    cpu::set_cr3(own);
    keys();
    let _ = vmx::vmclear(region);
}

fn peek(address: u64) -> u64 {
    // SAFETY: the test's own memory.
    unsafe { ptr::read_volatile(address as *const u64) }
}

fn poke(address: u64, value: u64) {
    // SAFETY: the test's own memory.
    unsafe { ptr::write_volatile(address as *mut u64, value) };
}

/// VMREAD to and VMWRITE from memory in one addressing form.
fn form(name: &str, target: u64, read: impl Fn(u64) -> Outcome, write: impl Fn(u64) -> Outcome) {
    for (field_name, field) in FIELDS {
        vmx::write(field, PATTERN);
        poke(target, 0);
        let vmread = got(|| read(field.into()));
        let stored = peek(target);
        poke(target, OTHER);
        let vmwrite = got(|| write(field.into()));
        Check::new(&mut Serial, format_args!("operand {name} {field_name}"))
            .expect("vmread", vmread, SUCCEED)
            .expect("stored", Hex(stored), Hex(PATTERN))
            .expect("vmwrite", vmwrite, SUCCEED)
            .expect("written", Hex(vmx::read(field)), Hex(OTHER))
            .end();
    }
}

/// The same text for VMREAD and VMWRITE, with register operands.
macro_rules! form {
    ($text:literal, $target:expr $(, $register:tt = $value:expr)*) => {
        form(
            $text,
            $target,
            |field| l2_kit::vmx!(concat!("vmread ", $text, ", {f}"), f = in(reg) field $(, in($register) $value)*),
            |field| l2_kit::vmx!(concat!("vmwrite {f}, ", $text), f = in(reg) field $(, in($register) $value)*),
        )
    };
}

/// For operands based on RSP or RBP: the register is exchanged for the one instruction.
macro_rules! exchanged {
    ($register:literal, $text:literal, $base:expr) => {
        form(
            $text,
            TARGET,
            |field| exchanged!(@ $register, concat!("vmread ", $text, ", {f}"), $base, field),
            |field| exchanged!(@ $register, concat!("vmwrite {f}, ", $text), $base, field),
        )
    };
    (@ $register:literal, $instruction:expr, $base:expr, $field:expr) => {{
        let failed: u64;
        // SAFETY: interrupts are off, so nobody uses the stack between the exchanges; faults have a stack of their own.
        unsafe {
            asm!(
                concat!("xchg ", $register, ", {b}"), $instruction, concat!("xchg ", $register, ", {b}"),
                "setbe {s:l}", "movzx {s:e}, {s:l}",
                b = inout(reg) $base => _, f = in(reg) $field, s = out(reg) failed,
            );
        }
        if failed == 0 { Outcome::Succeed } else { Outcome::Strange(failed) }
    }};
}

fn forms() {
    form!("[rax]", TARGET, "rax" = TARGET);
    form!("[r12]", TARGET, "r12" = TARGET);
    form!("[r13]", TARGET, "r13" = TARGET);
    form!("[rdi + 0x7f]", TARGET, "rdi" = TARGET - 0x7F);
    form!("[rsi - 0x80]", TARGET, "rsi" = TARGET + 0x80);
    form!("[r8 + 0x12345678]", TARGET, "r8" = TARGET - 0x1234_5678);
    form!("[r9 - 0x12345678]", TARGET, "r9" = TARGET + 0x1234_5678);
    form!("[rax + rcx]", TARGET, "rax" = TARGET - 0x99, "rcx" = 0x99u64);
    form!("[rax + rcx*2 + 8]", TARGET, "rax" = TARGET + 0x10 - 8, "rcx" = -8i64);
    form!("[r13 + r14*4 - 16]", TARGET, "r13" = TARGET - 12 + 16, "r14" = 3u64);
    form!("[r12 + r15*8 + 0x1000]", TARGET, "r12" = TARGET - 0x1000 - 8 * 0x77, "r15" = 0x77u64);
    form!("[rcx*8 + 0x1000]", TARGET, "rcx" = (TARGET - 0x1000) / 8);
    form!("[rcx*8 - 0x40000000]", TARGET, "rcx" = (TARGET + 0x4000_0000) / 8);
    let low = pages::address(&LOW) + 0x40;
    form!("[eax]", low, "rax" = low | 0xFFFF_FFFF_0000_0000);
    form!("[eax + ecx*4 + 8]", low, "rax" = low - 8 + 0x8000_0000, "rcx" = 0x2000_0000u64);
    let (fs, gs) = (cpu::rdmsr(FS_BASE), cpu::rdmsr(GS_BASE));
    cpu::wrmsr(FS_BASE, WRITABLE - 0x5000);
    cpu::wrmsr(GS_BASE, 0xFFFF_8000_0000_0000);
    form!("fs:[rax + 0x10]", TARGET, "rax" = 0x5000u64 + 0x100 - 0x10);
    form!("gs:[rax + rcx*8]", TARGET, "rax" = TARGET - 0x80 + 0x0000_8000_0000_0000, "rcx" = 0x10u64);
    form!("ds:[rax]", TARGET, "rax" = TARGET);
    form!("fs:[eax]", TARGET, "rax" = 0xFFFF_FFFF_0000_5100u64);
    cpu::wrmsr(FS_BASE, fs);
    cpu::wrmsr(GS_BASE, gs);
    form(
        "[rip + symbol]",
        pages::address(&LOW),
        |field| l2_kit::vmx!("vmread [rip + {s}], {f}", f = in(reg) field, s = sym LOW),
        |field| l2_kit::vmx!("vmwrite {f}, [rip + {s}]", f = in(reg) field, s = sym LOW),
    );
    form(
        "[symbol]",
        pages::address(&LOW) + 8,
        |field| l2_kit::vmx!("vmread [{s} + 8], {f}", f = in(reg) field, s = sym LOW),
        |field| l2_kit::vmx!("vmwrite {f}, [{s} + 8]", f = in(reg) field, s = sym LOW),
    );
    exchanged!("rsp", "[rsp]", TARGET);
    exchanged!("rsp", "[rsp + 0x28]", TARGET - 0x28);
    exchanged!("rbp", "[rbp]", TARGET);
    exchanged!("rbp", "[rbp - 0x200]", TARGET + 0x200);
}

/// The instructions with operands of 64 and 128 bits, through linear addresses that are not physical ones.
fn other_instructions(region: u64) {
    poke(TARGET, region);
    let clear = got(|| l2_kit::vmx!("vmclear [rax + rcx*8]", in("rax") TARGET - 0x80, in("rcx") 0x10u64));
    let load = got(|| l2_kit::vmx!("vmptrld [rax - 0x30]", in("rax") TARGET + 0x30));
    poke(TARGET, 0);
    let store = got(|| l2_kit::vmx!("vmptrst [rax + rcx*2]", in("rax") TARGET - 0x20, in("rcx") 0x10u64));
    Check::new(&mut Serial, "operands of pointers")
        .expect("vmclear", clear, SUCCEED)
        .expect("vmptrld", load, SUCCEED)
        .expect("vmptrst", store, SUCCEED)
        .expect("same", peek(TARGET) == region, true)
        .end();
    // A 16-bit field fills all 64 bits.
    vmx::write(f::GUEST_CS, 0x1234);
    poke(TARGET, u64::MAX);
    let outcome = l2_kit::vmx!("vmread [rax], {f}", in("rax") TARGET, f = in(reg) u64::from(f::GUEST_CS));
    Check::new(&mut Serial, "vmread of a 16-bit field to memory")
        .expect("result", outcome, Outcome::Succeed)
        .expect("stored", Hex(peek(TARGET)), Hex(0x1234))
        .end();
    // Descriptors may cross a page boundary if both pages are there.
    let capabilities = caps::get(setup::VMX_EPT_VPID_CAP);
    if capabilities >> 26 & 1 != 0 {
        poke(TARGET, 0);
        poke(TARGET + 8, 0);
        let invept = got(|| l2_kit::vmx!("invept {k}, [rax + 0x20]", k = in(reg) 2u64, in("rax") TARGET - 0x20));
        Check::new(&mut Serial, "operand of invept").expect("result", invept, SUCCEED).end();
    }
}

const RIP: u64 = f::GUEST_RIP as u64;

fn faults() {
    let read_to = |at: u64| move || l2_kit::vmx!("vmread [rax], {f}", in("rax") at, f = in(reg) RIP);
    let write_from = |at: u64| move || l2_kit::vmx!("vmwrite {f}, [rax]", in("rax") at, f = in(reg) RIP);
    expect_fault("vmread to a missing page", read_to(MISSING + 8), PF_WRITE, MISSING + 8);
    expect_fault("vmread to a read-only page", read_to(READ_ONLY + 8), PF_READ_ONLY, READ_ONLY + 8);
    expect_fault("vmread into a missing page", read_to(MISSING - 4), PF_WRITE, MISSING);
    expect_fault("vmread to no canonical address", read_to(NOT_CANONICAL), GP, 0);
    expect_fault("vmread over the canonical edge", read_to(EDGE), GP, 0);
    expect_fault("vmwrite from a missing page", write_from(MISSING), PF_READ, MISSING);
    expect_fault("vmwrite from into a missing page", write_from(MISSING - 1), PF_READ, MISSING);
    expect_fault("vmwrite from no canonical address", write_from(NOT_CANONICAL), GP, 0);
    let fs = |at: u64| move || l2_kit::vmx!("vmwrite {f}, fs:[rax]", in("rax") at, f = in(reg) RIP);
    expect_fault("vmwrite from no canonical address by fs", fs(NOT_CANONICAL), GP, 0);
    let stack = |at: u64| move || exchanged!(@ "rbp", "vmread [rbp + 8], {f}", at, RIP);
    expect_fault("vmread by rbp to no canonical address", stack(NOT_CANONICAL), SS, 0);
    let stack = |at: u64| move || exchanged!(@ "rsp", "vmwrite {f}, [rsp]", at, RIP);
    expect_fault("vmwrite by rsp from no canonical address", stack(NOT_CANONICAL), SS, 0);
    expect_fault("vmwrite by rsp from a missing page", stack(MISSING), PF_READ, MISSING);
    expect_fault("vmptrst to a missing page", || l2_kit::vmx!("vmptrst [rax]", in("rax") MISSING), PF_WRITE, MISSING);
    expect_fault(
        "vmptrst to a read-only page",
        || l2_kit::vmx!("vmptrst [rax]", in("rax") READ_ONLY),
        PF_READ_ONLY,
        READ_ONLY,
    );
    expect_fault("vmptrst to no canonical address", || l2_kit::vmx!("vmptrst [rax]", in("rax") NOT_CANONICAL), GP, 0);
    expect_fault("vmptrld from a missing page", || l2_kit::vmx!("vmptrld [rax]", in("rax") MISSING), PF_READ, MISSING);
    expect_fault("vmptrld from no canonical address", || l2_kit::vmx!("vmptrld [rax]", in("rax") NOT_CANONICAL), GP, 0);
    expect_fault("vmclear from a missing page", || l2_kit::vmx!("vmclear [rax]", in("rax") MISSING), PF_READ, MISSING);
    let capabilities = caps::get(setup::VMX_EPT_VPID_CAP);
    if capabilities >> 20 & 1 != 0 {
        let invept = |at: u64| move || l2_kit::vmx!("invept {k}, [rax]", k = in(reg) 1u64, in("rax") at);
        expect_fault("invept from a missing page", invept(MISSING), PF_READ, MISSING);
        expect_fault("invept from into a missing page", invept(MISSING - 8), PF_READ, MISSING);
        expect_fault("invept from no canonical address", invept(NOT_CANONICAL), GP, 0);
    }
    if capabilities >> 32 & 1 != 0 {
        let invvpid = |at: u64| move || l2_kit::vmx!("invvpid {k}, [rax]", k = in(reg) 1u64, in("rax") at);
        expect_fault("invvpid from a missing page", invvpid(MISSING), PF_READ, MISSING);
        expect_fault("invvpid from no canonical address", invvpid(NOT_CANONICAL), GP, 0);
    }
}

/// Rights of key 1 in PKRU and IA32_PKRS: no data, no writes.
const NO_ACCESS: u64 = 0b01 << 2;
const NO_WRITES: u64 = 0b10 << 2;
/// Bits of CR4, and of CPUID 7, ECX
const PKE: u64 = 1 << 22;
const PKS: u64 = 1 << 24;
const HAS_PKU: u32 = 1 << 3;
const HAS_PKS: u32 = 1 << 31;
const IA32_PKRS: u32 = 0x6E1;

/// A page with protection key 1, user-mode and supervisor-mode (SDM vol. 3A, "Protection Keys").
fn keys() {
    for (kind, has, on, access) in [("user", HAS_PKU, PKE, Access::User), ("supervisor", HAS_PKS, PKS, Access::Kernel)]
    {
        if cpu::cpuid(7, 0)[2] & has == 0 {
            Check::new(&mut Serial, format_args!("protection keys, {kind}")).fact("offered", false).end();
            continue;
        }
        let (own, cr4) = (cpu::cr3(), cpu::cr4());
        let tables = pages::identity_tables(access);
        let flags = if access == Access::User { 7 } else { 3 };
        pages::set_entry(tables, WRITABLE, pages::address(pages::page()) | flags | 1 << 59);
        cpu::set_cr3(tables);
        cpu::set_cr4(cr4 | on);
        let rights = |value: u64| match on {
            // SAFETY: key 1 is that of the one page.
            PKE => unsafe { asm!("wrpkru", in("eax") value as u32, in("ecx") 0, in("edx") 0) },
            _ => cpu::wrmsr(IA32_PKRS, value),
        };
        let at = WRITABLE + 0x18;
        let read = || got(|| l2_kit::vmx!("vmread [rax], {f}", in("rax") at, f = in(reg) RIP));
        let write = || got(|| l2_kit::vmx!("vmwrite {f}, [rax]", in("rax") at, f = in(reg) RIP));
        let store = || got(|| l2_kit::vmx!("vmptrst [rax]", in("rax") at));
        let fault = |code| Got::Fault(trap::PF, code);
        let cases = [
            ("open", 0, SUCCEED, SUCCEED),
            ("no writes", NO_WRITES, SUCCEED, fault(0x23)),
            ("no access", NO_ACCESS, fault(0x21), fault(0x23)),
        ];
        // Bochs lets a supervisor access user-mode pages whose key refuses all data.
        for (name, value, reads, writes) in cases.into_iter().filter(|(.., reads, _)| on == PKS || *reads == SUCCEED) {
            rights(value);
            let (vmread, vmwrite, vmptrst) = (read(), write(), store());
            rights(0);
            Check::new(&mut Serial, format_args!("protection keys, {kind}: {name}"))
                .expect("vmread", vmread, writes)
                .expect("vmwrite", vmwrite, reads)
                .expect("vmptrst", vmptrst, writes)
                .end();
        }
        cpu::set_cr4(cr4);
        cpu::set_cr3(own);
    }
}

static FRAME: Global<u64> = Global::new(0);
static PAGE_FAULTS: Global<u64> = Global::new(0);

/// A page fault on an operand is restartable: the handler maps the page, and the instruction runs again.
fn restart() {
    FRAME.set(pages::address(pages::page()));
    let before = trap::hook(
        trap::PF,
        Some(|frame| {
            PAGE_FAULTS.set(PAGE_FAULTS.get() + 1);
            let late = cpu::cr2() & !(PAGE - 1) == LATE && frame.error == 2;
            if late {
                pages::set_entry(cpu::cr3(), LATE, FRAME.get() | 3);
            }
            late
        }),
    );
    vmx::write(f::GUEST_RIP, PATTERN);
    let outcome = got(|| l2_kit::vmx!("vmread [rax], {f}", in("rax") LATE + 0x18, f = in(reg) RIP));
    trap::hook(trap::PF, before);
    Check::new(&mut Serial, "vmread again after a page fault")
        .expect("result", outcome, SUCCEED)
        .expect("faults", PAGE_FAULTS.get(), 1)
        .expect("stored", Hex(peek(LATE + 0x18)), Hex(PATTERN))
        .end();
}
