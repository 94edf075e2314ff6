//! Structures of the guest itself whose memory its EPT leads there: tables of the processor, stacks, operands.

use super::{everywhere, no_end_inside, with};
use crate::{
    guest::{self, Exit, Extra, Program, directory_of, forget},
    lab::{LINEAR, Lab, PHYSICAL, Seen, Told},
    place,
};
use core::arch::{asm, global_asm};
use l2_kit::{
    cpu, ept,
    ept::{WRITE_BACK, rights::RWX},
    fields as f,
    pages::{self, LARGE, PAGE},
    setup::{self, Kind, entry_controls, secondary},
    vmx,
};

/// A linear address whose page table is the page under attack.
const WALKED: u64 = LINEAR + 32 * LARGE;

pub fn all(lab: &mut Lab) {
    for (name, attempt) in STRUCTURES {
        everywhere(lab, name, |lab, at| {
            with(lab, Extra::default());
            lab.lead_to(at, WRITE_BACK | RWX);
            let exit = attempt(lab, at);
            forget();
            no_end_inside(exit, at)
        });
    }
    if setup::allowed_one(Kind::Secondary, secondary::VMCS_SHADOWING) {
        for (name, program) in [("operand of VMREAD", vmread_to as Program), ("operand of VMWRITE", vmwrite_from)] {
            everywhere(lab, name, |lab, at| {
                with(lab, Extra { secondary: secondary::VMCS_SHADOWING, ..Extra::default() });
                lab.lead_to(at, WRITE_BACK | RWX);
                vmx::write(f::VMREAD_BITMAP, lab.pages[1]);
                vmx::write(f::VMWRITE_BITMAP, lab.pages[1]);
                lab.words(2)[0] = u64::from(setup::revision()) | 1 << 31;
                let _ = vmx::vmclear(lab.pages[2]);
                vmx::write(f::LINK_POINTER, lab.pages[2]);
                let operand = LINEAR + 8 * lab.random.below(512);
                let exit = lab.execute(program, operand);
                let _ = vmx::vmclear(lab.pages[2]);
                no_end_inside(exit, at)
            });
        }
    }
    for (name, field) in [
        ("PDPTEs of a guest without EPT", f::GUEST_CR3),
        ("page-directory pointer of a guest in PAE mode", f::GUEST_PDPTE0),
    ] {
        everywhere(lab, name, |lab, at| {
            with(lab, Extra::default());
            for (field, off) in [
                (f::ENTRY_CONTROLS, entry_controls::IA32E),
                (f::SECONDARY_CONTROLS, if field == f::GUEST_CR3 { secondary::EPT } else { 0 }),
            ] {
                vmx::write(field, vmx::read(field) & !u64::from(off));
            }
            lab.guest.start(guest::nothing, 1);
            vmx::write(f::GUEST_CS_AR, 0xC09B);
            if field == f::GUEST_CR3 {
                vmx::write(field, at);
            } else {
                [f::GUEST_PDPTE0, f::GUEST_PDPTE1, f::GUEST_PDPTE2, f::GUEST_PDPTE3]
                    .into_iter()
                    .for_each(|pdpte| vmx::write(pdpte, at | 1));
            }
            no_end_inside(lab.run(), at)
        });
    }
    across(lab);
}

/// Name, and the attempt with the page under attack leading to the address.
type Structure = (&'static str, fn(&mut Lab, u64) -> Exit);

const STRUCTURES: [Structure; 12] = [
    ("GDT", |lab, _| field_and_run(lab, f::GUEST_GDTR_BASE, LINEAR, load_segment, 0x10)),
    ("IDT", |lab, _| {
        vmx::write(f::EXCEPTION_BITMAP, 0);
        field_and_run(lab, f::GUEST_IDTR_BASE, LINEAR, breakpoint, 0)
    }),
    ("IDT of an injected event", |lab, _| {
        vmx::write(f::EXCEPTION_BITMAP, 0);
        vmx::write(f::ENTRY_INTERRUPTION_INFO, 1 << 31 | 6 << 8 | 3);
        vmx::write(f::ENTRY_INSTRUCTION_LENGTH, 1);
        field_and_run(lab, f::GUEST_IDTR_BASE, LINEAR, guest::nothing, 0)
    }),
    ("TSS", |lab, _| field_and_run(lab, f::GUEST_TR_BASE, LINEAR, interrupt_8, 0)),
    ("LDT", |lab, _| {
        vmx::write(f::GUEST_LDTR_AR, 0x82);
        vmx::write(f::GUEST_LDTR_LIMIT, 0xFFFF);
        field_and_run(lab, f::GUEST_LDTR_BASE, LINEAR, load_segment, 0x14)
    }),
    ("stack", |lab, _| {
        lab.guest.start(push, 5);
        vmx::write(f::GUEST_RSP, LINEAR + 0x800);
        lab.run()
    }),
    ("page table", |lab, at| {
        if !in_range(at) {
            place::put(at, WALKED >> 12, lab.pages[4] | 0x63);
        }
        set_directory_entry(lab.guest.cr3, WALKED, PHYSICAL | 0x67);
        lab.execute(guest::read, WALKED)
    }),
    ("page directory", |lab, at| {
        if !in_range(at) {
            place::put(at, WALKED >> 21, lab.pages[4] & !(LARGE - 1) | 0xE3);
        }
        let within = lab.pages[4] & (LARGE - 1);
        with_pointer_entry(lab.guest.cr3, WALKED, PHYSICAL | 0x67, || lab.guest.execute(guest::read, WALKED + within))
    }),
    ("root of page tables", |lab, at| {
        if !in_range(at) {
            // SAFETY: as above; the guest's own root.
            unsafe { core::ptr::copy(lab.guest.cr3 as *const u8, at as *mut u8, PAGE as usize) };
        }
        field_and_run(lab, f::GUEST_CR3, PHYSICAL, guest::nothing, 0)
    }),
    ("operand of LGDT", |lab, _| lab.execute(lgdt, LINEAR + 0x100)),
    ("operand of CMPXCHG16B", |lab, _| lab.execute(exchange, LINEAR + 0x100)),
    ("operand of REP MOVSB", |lab, _| lab.execute(copy, LINEAR + 0x100)),
];

fn in_range(at: u64) -> bool {
    let (start, end) = place::range();
    (start..end).contains(&at)
}

fn field_and_run(lab: &mut Lab, field: u32, value: u64, program: Program, argument: u64) -> Exit {
    lab.guest.start(program, argument);
    vmx::write(field, value);
    lab.run()
}

/// Accesses of the guest that begin beside the range and end in it, or the other way round.
fn across(lab: &mut Lab) {
    const ACCESSES: [(&str, Program); 7] = [
        ("read", guest::read),
        ("write", guest::write),
        ("locked write", unaligned),
        ("fetch", guest::call),
        ("push", push_at),
        ("REP MOVSB", copy),
        ("LGDT", lgdt),
    ];
    const READS: [&str; 3] = ["read", "fetch", "LGDT"];
    for upper in [false, true] {
        for (name, program) in ACCESSES {
            let edge = if upper { "upper" } else { "lower" };
            lab.attack(format_args!("{name} across the {edge} edge"), Told::Answered, |lab| {
                with(lab, Extra::default());
                // A move goes up to the edge; on the bare machine there is no edge.
                lab.beside = name == "REP MOVSB" || place::is_bare() && !READS.contains(&name);
                let (start, end) = place::range();
                let edge = if upper { end } else { start };
                for page in [edge - PAGE, edge] {
                    place::fill(page);
                }
                lab.guest.ept.set(PHYSICAL, PAGE, (edge - PAGE) | WRITE_BACK | RWX);
                lab.guest.ept.set(PHYSICAL + PAGE, PAGE, edge | ept::WRITE_BACK | RWX);
                lab.guest.map_linear(LINEAR + PAGE, PHYSICAL + PAGE);
                forget();
                let before = 1 + lab.random.below(7);
                let exit = lab.execute(program, LINEAR + PAGE - before);
                lab.guest.ept.set(PHYSICAL + PAGE, PAGE, 0);
                lab.guest.map_linear(LINEAR + PAGE, 0);
                forget();
                Seen::of(exit).escaped_if(!place::is_bare() && matches!(exit, Exit::Done(_)))
            });
        }
    }
}

/// Sets an entry of the page directory for `linear`.
fn set_directory_entry(root: u64, linear: u64, entry: u64) {
    pages::set_entry(root, linear, 0);
    place::put(directory_of(root, linear), linear >> 21, entry);
}

/// Runs with another entry of the page-directory-pointer table for `linear`.
fn with_pointer_entry(root: u64, linear: u64, entry: u64, f: impl FnOnce() -> Exit) -> Exit {
    // SAFETY: as above.
    let pointers = unsafe { pages::at(root) }[(linear >> 39) as usize & 511] & 0x000F_FFFF_FFFF_F000;
    let index = (linear >> 30) as usize & 511;
    // SAFETY: as above.
    let before = core::mem::replace(&mut unsafe { pages::at(pointers) }[index], entry);
    let exit = f();
    place::put(pointers, index as u64, before);
    exit
}

extern "C" fn load_segment(selector: u64) -> u64 {
    // SAFETY: a segment of a guest that does not use it.
    unsafe { asm!("mov fs, {:x}", in(reg) selector, options(nostack)) };
    selector
}

/// By a gate whose stack stands in the TSS.
extern "C" fn interrupt_8(_: u64) -> u64 {
    // SAFETY: the guest does not come back if its stack is bad.
    unsafe { asm!("int 8", options(nostack)) };
    1
}

extern "C" fn breakpoint(_: u64) -> u64 {
    // SAFETY: the exception is the experiment.
    unsafe { asm!("int3", options(nostack)) };
    1
}

extern "C" fn vmread_to(at: u64) -> u64 {
    l2_kit::vmx!("vmread [{a}], {f}", a = in(reg) at, f = in(reg) u64::from(f::GUEST_RIP)).succeeded().into()
}

extern "C" fn vmwrite_from(at: u64) -> u64 {
    l2_kit::vmx!("vmwrite {f}, [{a}]", a = in(reg) at, f = in(reg) u64::from(f::GUEST_RIP)).succeeded().into()
}

extern "C" fn copy(at: u64) -> u64 {
    // SAFETY: from this image to the page under attack.
    unsafe {
        asm!("rep movsb", inout("rcx") 32u64 => _, inout("rsi") at - at % PAGE + 0xF00 => _, inout("rdi") at => _);
    }
    1
}

extern "C" fn lgdt(at: u64) -> u64 {
    let mut own = l2_kit::descriptors::TablePointer::default();
    // SAFETY: no segment is loaded with the other GDT.
    unsafe {
        asm!("sgdt [{o}]", "lgdt [{a}]", "lgdt [{o}]", o = in(reg) &raw mut own, a = in(reg) at, options(nostack))
    };
    1
}

extern "C" fn unaligned(at: u64) -> u64 {
    // SAFETY: the page under attack.
    unsafe { asm!("lock xadd [{}], {}", in(reg) at, inout(reg) 1u64 => _, options(nostack)) };
    1
}

extern "C" fn exchange(at: u64) -> u64 {
    let _ = cpu::cr0();
    // SAFETY: as above; RBX, which asm blocks may not name, is put back.
    unsafe {
        asm!("mov {b}, rbx", "xor ebx, ebx", "lock cmpxchg16b [{a}]", "mov rbx, {b}", a = in(reg) at, b = out(reg) _,
            inout("rax") 0u64 => _, inout("rdx") 0u64 => _, in("rcx") 0u64, options(nostack));
    }
    1
}

global_asm!(
    ".pushsection .text.attacks_push, \"ax\"",
    "attacks_push:",
    "push rdi",
    "pop rbx",
    "mov eax, 0xD0E",
    "vmcall",
    "attacks_push_at:",
    "mov rbx, rsp",
    "lea rsp, [rdi + 8]",
    "push rdi",
    "mov rsp, rbx",
    "mov eax, 1",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    #[link_name = "attacks_push"]
    safe fn push(argument: u64) -> u64;
    #[link_name = "attacks_push_at"]
    safe fn push_at(argument: u64) -> u64;
}
