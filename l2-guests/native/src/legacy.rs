//! A guest outside of IA-32e mode that runs nothing but the code under test: all its exceptions exit, so it needs no handlers.

use crate::{
    case::{self, Case, Mode},
    guest, instructions, log, matrix,
    situation::Memory,
};
use l2_kit::{
    cpu,
    ept::{Ept, WRITE_BACK, rights},
    fields as f,
    pages::{self, PAGE},
    setup::{self, Controls, Kind, Missing, entry_controls, exit_controls, primary, secondary},
    trap,
    vcpu::Vcpu,
    vmx::{self, reason as r},
};

const MOST_EXITS: u32 = 12;
const TF: u64 = 1 << 8;
const RF: u64 = 1 << 16;
const BS: u64 = 1 << 14;
const CR0_PE: u64 = cpu::CR0_PE;
const CR4_PSE: u64 = 1 << 4;
/// Of page tables: present, writable, user; a large page.
const ALL: u64 = 7;
const LARGE: u64 = 0x80;
/// Data, read and write, accessed; expand-down; present, of a non-system segment; 32-bit
const DATA: u64 = 0x4093;
const EXPAND_DOWN: u64 = 0x4097;
const UNUSABLE: u64 = 1 << 16;

struct Guest {
    vcpu: Vcpu,
    ept: Ept,
    /// CR3 of 32-bit and of PAE paging, and the tables of the operand's pages
    paged: [u64; 2],
    tables: [u64; 2],
    shadow: u64,
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let needed = secondary::UNRESTRICTED | secondary::VMCS_SHADOWING;
    if !setup::allowed_one(Kind::Secondary, needed) {
        l2_kit::report::say("no unrestricted guests with VMCS shadowing");
        return Ok(());
    }
    let mut guest = Guest::new(needed)?;
    matrix("legacy guest", instructions::OF_A_GUEST, &Mode::LEGACY, |_, _| true, &mut |case| guest.run(case));
    let _ = vmx::vmclear(guest.vcpu.vmcs);
    Ok(())
}

fn write32(table: u64, index: u64, value: u64) {
    // SAFETY: a page of the test's own.
    unsafe { core::ptr::write_volatile((table + 4 * index) as *mut u32, value as u32) };
}

fn write64(table: u64, index: u64, value: u64) {
    // SAFETY: as above.
    unsafe { core::ptr::write_volatile((table + 8 * index) as *mut u64, value) };
}

impl Guest {
    fn new(needed: u32) -> Result<Self, Missing> {
        let vcpu = Vcpu::new(setup::revision()).map_err(|o| Missing::Instruction("VMCLEAR or VMPTRLD", o))?;
        setup::write_controls(&Controls {
            primary: primary::MSR_BITMAPS,
            secondary: secondary::EPT | needed,
            exit: exit_controls::SAVE_DEBUG | exit_controls::LOAD_EFER,
            entry: entry_controls::LOAD_DEBUG | entry_controls::LOAD_EFER,
            ..Controls::default()
        })?;
        let ept = Ept::identity();
        vmx::write(f::EPTP, ept.pointer());
        for bitmap in [f::MSR_BITMAP, f::VMREAD_BITMAP, f::VMWRITE_BITMAP] {
            vmx::write(bitmap, pages::address(pages::page()));
        }
        setup::write_host_state();
        vmx::write(f::EXCEPTION_BITMAP, 0xFFFF_FFFF);
        let page = || pages::address(pages::page());
        let (narrow, narrow_table) = (page(), page());
        for megabytes in 0..1024 {
            write32(narrow, megabytes, megabytes << 22 | ALL | LARGE);
        }
        write32(narrow, case::WINDOW >> 22, narrow_table | ALL);
        let (pointers, wide_table) = (page(), page());
        for gigabyte in 0..4 {
            let directory = page();
            for megabytes in 0..512 {
                write64(directory, megabytes, gigabyte << 30 | megabytes << 21 | ALL | LARGE);
            }
            write64(pointers, gigabyte, directory | 1);
            if gigabyte == case::WINDOW >> 30 {
                write64(directory, case::WINDOW >> 21 & 511, wide_table | ALL);
            }
        }
        // At 4 GiB the operand's second page follows the first one.
        let [first, second] = case::window();
        let (low, high) = (page(), page());
        for n in 0..1024 {
            write32(low, n, if n == 0 { second } else { n << 12 } | ALL);
            write32(high, n, if n == 1023 { first } else { 0xFFC0_0000 | n << 12 } | ALL);
        }
        write32(narrow, 0, low | ALL);
        write32(narrow, 1023, high | ALL);
        let (low, high) = (page(), page());
        for n in 0..512 {
            write64(low, n, if n == 0 { second } else { n << 12 } | ALL);
            write64(high, n, if n == 511 { first } else { 0xFFE0_0000 | n << 12 } | ALL);
        }
        // SAFETY: the test's own tables.
        let directory = |n: u64| unsafe { *((pointers + 8 * n) as *const u64) } & !0xFFF;
        write64(directory(0), 0, low | ALL);
        write64(directory(3), 511, high | ALL);
        let shadow = guest::shadow_region();
        Ok(Self { vcpu, ept, paged: [narrow, pointers], tables: [narrow_table, wide_table], shadow })
    }

    /// The pages of the operand: by page tables, and for a guest without them by EPT.
    fn map(&self, memory: Memory) {
        let [first, second] = case::window();
        let (entry, right) = match memory {
            Memory::Missing(_) => (0, 0),
            Memory::ReadOnly(_) => (second | 5, second | WRITE_BACK | rights::R),
            _ => (second | ALL, second | WRITE_BACK | rights::RWX),
        };
        let index = case::WINDOW >> 12;
        for (n, entry) in [(index, first | ALL), (index + 1, entry)] {
            write32(self.tables[0], n & 1023, entry);
            write64(self.tables[1], n & 511, entry);
        }
        self.ept.set(case::WINDOW, PAGE, first | WRITE_BACK | rights::RWX);
        self.ept.set(case::WINDOW + PAGE, PAGE, right);
        let _ = vmx::invept(2, [0, 0]);
    }

    fn run(&mut self, case: &Case) {
        case.prepare();
        self.map(case.situation.memory);
        guest::fill_shadow(self.vcpu.vmcs, self.shadow);
        self.vcpu.launched = false;
        self.write_state(case);
        let (dr7, addresses) = case::breakpoints();
        case::set_addresses(addresses);
        vmx::write(f::GUEST_DR7, dr7);
        cpu::set_cr2(case::CR2_UNTOUCHED);
        for _ in 0..MOST_EXITS {
            if let Err(outcome) = self.vcpu.run() {
                log::add(format_args!(",refused:{outcome}"));
                break;
            }
            if !self.exit() {
                break;
            }
        }
        case::set_addresses([0; 4]);
    }

    fn write_state(&mut self, case: &Case) {
        setup::write_guest_state(0, false);
        let start = case::start();
        let (mode, memory) = (case.mode, case.situation.memory);
        let paging = match mode {
            Mode::Narrow32 | Mode::NarrowUser32 => Some((self.paged[0], CR4_PSE)),
            Mode::Pae32 => Some((self.paged[1], cpu::CR4_PAE)),
            _ => None,
        };
        let (cr3, cr4) = paging.unwrap_or((0, 0));
        let pg = if paging.is_some() { cpu::CR0_PG } else { 0 };
        let pe = if mode == Mode::Real { 0 } else { CR0_PE };
        let dpl = u64::from(mode.ring()) << 5;
        let code = 0x9B | dpl | if mode.is_16() { 0 } else { 1 << 14 };
        let data = match memory {
            Memory::ExpandDown(_) => EXPAND_DOWN | dpl,
            _ => DATA | dpl,
        };
        let limit = case.limit();
        // All of 4 GiB has to be granular.
        let granular = |limit: u64| if limit > 0xF_FFFF { 1 << 15 } else { 0 };
        let code_limit = if mode.is_16() { 0xFFFF } else { 0xFFFF_FFFF };
        for (field, value) in [
            (f::LINK_POINTER, self.shadow),
            (f::GUEST_CR0, cpu::cr0() & !(CR0_PE | cpu::CR0_PG) | pe | pg),
            (f::GUEST_CR3, cr3),
            (f::GUEST_CR4, cpu::CR4_VMXE | cr4),
            (f::GUEST_EFER, 0),
            (f::GUEST_CS, u64::from(mode.ring()) | 8),
            (f::GUEST_CS_BASE, case.place.base & 0xFFFF_FFFF),
            (f::GUEST_CS_LIMIT, code_limit),
            (f::GUEST_CS_AR, code | granular(code_limit)),
            (f::GUEST_SS, u64::from(mode.ring()) | 0x10),
            (f::GUEST_SS_AR, DATA | dpl | granular(0xFFFF_FFFF)),
            (f::GUEST_DS, u64::from(mode.ring()) | 0x10),
            (f::GUEST_DS_BASE, case.segment_base()),
            (f::GUEST_DS_LIMIT, limit),
            (f::GUEST_DS_AR, data | granular(limit)),
            (f::GUEST_ES_AR, UNUSABLE),
            (f::GUEST_RIP, start.rip),
            (f::GUEST_RSP, start.rsp),
            (f::GUEST_RFLAGS, start.rflags),
        ] {
            vmx::write(field, value);
        }
        if mode == Mode::Pae32 {
            for number in 0..4u32 {
                // SAFETY: the test's own tables.
                let entry = unsafe { *((self.paged[1] + u64::from(number) * 8) as *const u64) };
                vmx::write(f::GUEST_PDPTE0 + 2 * number, entry);
            }
        }
        let registers = &mut *self.vcpu.registers;
        (registers.rax, registers.rbx, registers.rcx, registers.rdx) = (start.rax, start.rbx, start.rcx, start.rdx);
        (registers.rsi, registers.rbp) = (start.rsi, start.rbp);
        registers.rdi = start.rdi.wrapping_sub(case.segment_base()) & 0xFFFF_FFFF;
    }

    /// Handles an exit; true if the guest goes on.
    fn exit(&mut self) -> bool {
        let reason = vmx::read(f::EXIT_REASON) as u32;
        guest::cut_rip();
        guest::say(reason);
        if reason != r::EXCEPTION_OR_NMI {
            log::add(format_args!("q{:x}", vmx::read(f::EXIT_QUALIFICATION)));
            if reason == r::EPT_VIOLATION {
                let [linear, physical] = [f::GUEST_LINEAR_ADDRESS, f::GUEST_PHYSICAL_ADDRESS].map(vmx::read);
                log::add(format_args!("l{}g{physical:x}", case::operand_offset(linear)));
            }
            return false;
        }
        let (info, qualification, _) = guest::exception();
        let flags = vmx::read(f::GUEST_RFLAGS);
        match info as u8 {
            trap::BP => {
                let registers = &*self.vcpu.registers;
                case::completed([
                    registers.rax,
                    registers.rbx,
                    registers.rcx,
                    registers.rdx,
                    registers.rsi,
                    registers.rdi,
                    registers.rbp,
                    flags,
                    vmx::read(f::GUEST_CS),
                    vmx::read(f::GUEST_SS),
                ]);
                false
            }
            trap::DB => {
                let on = case::debugged(qualification, vmx::read(f::GUEST_RIP));
                let stepped = if qualification & BS != 0 { flags & !TF } else { flags };
                vmx::write(f::GUEST_RFLAGS, stepped | if on { RF } else { 0 });
                true
            }
            _ => case::faulted(flags & RF != 0),
        }
    }
}
