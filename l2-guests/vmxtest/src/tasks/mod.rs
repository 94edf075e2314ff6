//! Task switches: 32-bit code that jumps to tasks, calls them, returns from them, and is interrupted by them.
//!
//! Outside of VMX operation, in a world that is made anew for each case. In VMX non-root operation a task switch always exits,
//! so under nvmx each of them is made by software, and must come out as the processor makes it.
//!
//! Source: SDM vol. 3A, "Task Switching", table "Exception Conditions Checked During a Task Switch". Not printed is the busy
//! flag of a task that a failed JMP was to leave: Bochs clears it before it finds the page fault.

mod world;

use core::fmt;
use l2_kit::{Check, protocol::Hex, protocol::Value, report, serial::Serial};
use world::{INT, INTERRUPT, Page, Paging, Trigger, World, descriptor, selector::*};

const TS: u32 = 10;
const NP: u32 = 11;
const SS: u32 = 12;
const GP: u32 = 13;
const PF: u32 = 14;
const DF: u8 = 8;
/// Bits of IA32_DEBUGCTL
const LBR: u64 = 1;
const BTF: u64 = 2;
/// EXT of an error code
const EXT: u16 = 1;
/// In a TSS
const LINK: u32 = 0x00;
const CR3: u32 = 0x1C;
const EIP: u32 = 0x20;
const EFLAGS: u32 = 0x24;
const ESP: u32 = 0x38;
const ES_AT: u32 = 0x48;
const CS_AT: u32 = 0x4C;
const SS_AT: u32 = 0x50;
const DS_AT: u32 = 0x54;
const FS_AT: u32 = 0x58;
const GS_AT: u32 = 0x5C;
const LDT_AT: u32 = 0x60;
const T_AT: u32 = 0x64;

/// Where a case ends: what was reached, the error code there, TR.
type End = (u32, u32, u16);

/// In a new task.
const fn task(tr: u16) -> End {
    (1, 0, tr)
}
/// In a new task with an error code on its stack.
const fn task_with(tr: u16, code: u32) -> End {
    (1, code, tr)
}
/// After the trigger.
const BACK: End = (2, 0, OLD);
/// In a trap's handler.
const fn trap(vector: u32, error: u16, tr: u16) -> End {
    (0x100 | vector, error as u32, tr)
}

/// Name, trigger, what is special, where it ends.
type Case = (&'static str, Trigger, fn(&mut World), End);

use Trigger::{Call, Cr3, Gp, Int, Int3, Interrupt, Iret, Jmp, LongMode, Nmi, Pf, Ud};

#[rustfmt::skip]
const CASES: &[Case] = &[
    ("JMP", Jmp(NEW), |_| {}, task(NEW)),
    ("CALL", Call(NEW), |_| {}, task(NEW)),
    ("CALL and IRET", Call(NEW), |w| w.then = 1, BACK),
    ("JMP by a task gate", Jmp(GATE), |_| {}, task(NEW)),
    ("CALL by a task gate", Call(GATE), |w| w.then = 1, BACK),
    ("INT by a task gate", Int, |w| w.task_gate(INT, NEW), task(NEW)),
    ("INT by a task gate and IRET", Int, |w| { w.task_gate(INT, NEW); w.then = 1 }, BACK),
    ("INT3 by a task gate", Int3, |w| { w.task_gate(3, NEW); w.then = 1 }, BACK),
    ("#UD by a task gate", Ud, |w| w.task_gate(6, NEW), task(NEW)),
    ("#GP by a task gate", Gp, |w| w.task_gate(13, NEW), task_with(NEW, 0xFFF8)),
    ("an interrupt by a task gate", Interrupt, |w| { w.eflags |= 1 << 9; w.task_gate(INTERRUPT, NEW); w.then = 1 }, BACK),
    ("an NMI by a task gate", Nmi, |w| { w.task_gate(2, NEW); w.then = 1 }, BACK),
    ("IRET with NT", Iret, World::nested, task(NEW)),
    ("flags of the old task", Jmp(NEW), |w| w.eflags = 0x8D7 | 0x4000, task(NEW)),
    ("flags of the new task", Jmp(NEW), |w| w.put32(Page::New, EFLAGS, 0x7FFF & !0x100), task(NEW)),
    ("single step in the new task", Jmp(NEW), |w| w.put32(Page::New, EFLAGS, 0x102), trap(1, 0, NEW)),
    ("local breakpoints end", Jmp(NEW), |w| w.dr7 = 0x7FF, task(NEW)),
    ("debug trap", Jmp(NEW), |w| w.put16(Page::New, T_AT, 1), trap(1, 0, NEW)),
    ("debug trap, last branches and branch steps", Jmp(NEW), |w| { w.put16(Page::New, T_AT, 1); w.debugctl = LBR | BTF }, trap(1, 0, NEW)),
    ("last branches", Jmp(NEW), |w| w.debugctl = LBR, task(NEW)),
    ("debug trap by CALL", Call(NEW), |w| w.put16(Page::New, T_AT, 1), trap(1, 0, NEW)),
    ("ring 3", Jmp(NEW), |w| w.new_is_user(), trap(0x31, 0, NEW)),
    ("error code for ring 3", Gp, |w| { w.task_gate(13, NEW); w.new_is_user() }, trap(0x31, 0, NEW)),
    ("to a 16-bit TSS", Jmp(NEW), |w| w.new_is_16_bit(), task(NEW)),
    ("CALL to a 16-bit TSS and IRET", Call(NEW), |w| { w.new_is_16_bit(); w.then = 1 }, BACK),
    ("error code with a 16-bit TSS", Gp, |w| { w.task_gate(13, NEW); w.new_is_16_bit() }, task_with(NEW, 0xFFF8)),
    ("from a 16-bit TSS", Jmp(NEW), |w| w.old_is_16_bit(), task(NEW)),
    ("CALL from a 16-bit TSS", Call(NEW), |w| w.old_is_16_bit(), task(NEW)),
    ("with an LDT", Jmp(NEW), |w| { w.put16(Page::New, LDT_AT, LDT); w.put16(Page::New, DS_AT, LOCAL) }, task(NEW)),
    ("another CR3", Jmp(NEW), |w| w.put32(Page::New, CR3, w.other_cr3()), task(NEW)),
    ("a segment is marked accessed", Jmp(NEW), |w| w.put16(Page::New, FS_AT, FRESH), task(NEW)),
    ("conforming code", Jmp(NEW), |w| w.put16(Page::New, CS_AT, CONFORMING), task(NEW)),
    ("null data segments", Jmp(NEW), |w| { w.put16(Page::New, FS_AT, 0); w.put16(Page::New, GS_AT, 3) }, task(NEW)),
    ("a TSS across pages", Jmp(NEW), |w| {
        w.gdt(NEW, descriptor(w.at(Page::New) + 0xFD0, 0x67, 0x89));
        for at in (0..0x68).step_by(4) { w.put32(Page::New, 0xFD0 + at, w.word(Page::New, at)) }
    }, task(NEW)),
    // The descriptor of the new TSS
    ("no TSS", Jmp(DATA), |w| w.gdt(DATA, descriptor(0, 0xF_FFFF, 0xC093)), trap(GP, DATA, OLD)),
    ("a TSS that is not present", Jmp(NEW), |w| w.gdt(NEW, descriptor(w.at(Page::New), 0x67, 0x09)), trap(NP, NEW, OLD)),
    ("a TSS that is not present, INT", Int, |w| { w.task_gate(INT, NEW); w.gdt(NEW, descriptor(w.at(Page::New), 0x67, 0x09)) },
        trap(NP, NEW, OLD)),
    ("a TSS that is not present, #UD", Ud, |w| { w.task_gate(6, NEW); w.gdt(NEW, descriptor(w.at(Page::New), 0x67, 0x09)) },
        trap(NP, NEW | EXT, OLD)),
    ("a busy TSS", Jmp(NEW), |w| w.gdt(NEW, descriptor(w.at(Page::New), 0x67, 0x8B)), trap(GP, NEW, OLD)),
    ("the TSS of the task itself", Call(OLD), |_| {}, trap(GP, OLD, OLD)),
    ("a short TSS", Jmp(NEW), |w| w.gdt(NEW, descriptor(w.at(Page::New), 0x66, 0x89)), trap(TS, NEW, OLD)),
    ("a short 16-bit TSS", Call(NEW), |w| { w.new_is_16_bit(); w.gdt(NEW, descriptor(w.at(Page::New), 0x2A, 0x81)) },
        trap(TS, NEW, OLD)),
    ("IRET to an available TSS", Iret, |w| { w.nested(); w.gdt(NEW, descriptor(w.at(Page::New), 0x67, 0x89)) },
        trap(TS, NEW, OLD)),
    ("IRET to no TSS", Iret, |w| { w.nested(); w.put16(Page::Old, LINK, DATA) }, trap(TS, DATA, OLD)),
    ("IRET to a short TSS", Iret, |w| { w.nested(); w.gdt(NEW, descriptor(w.at(Page::New), 0x20, 0x8B)) }, trap(TS, NEW, OLD)),
    // The old TSS
    ("a short old TSS", Jmp(NEW), |w| w.gdt(OLD, descriptor(w.at(Page::Old), 0x5E, 0x89)), trap(TS, OLD, OLD)),
    ("an old TSS that just does", Jmp(NEW), |w| w.gdt(OLD, descriptor(w.at(Page::Old), 0x5F, 0x89)), task(NEW)),
    // What the new task loads
    ("LDT in the LDT", Jmp(NEW), |w| w.put16(Page::New, LDT_AT, LDT | 4), trap(TS, LDT | 4, NEW)),
    ("LDT beyond the GDT", Jmp(NEW), |w| w.put16(Page::New, LDT_AT, 0x1000), trap(TS, 0x1000, NEW)),
    ("LDT that is none", Jmp(NEW), |w| w.put16(Page::New, LDT_AT, DATA), trap(TS, DATA, NEW)),
    ("LDT that is not present", Jmp(NEW), |w| { w.gdt(LDT, descriptor(w.at(Page::Ldt), 0xFFF, 2)); w.put16(Page::New, LDT_AT, LDT) },
        trap(TS, LDT, NEW)),
    ("SS null", Jmp(NEW), |w| w.put16(Page::New, SS_AT, 0), trap(TS, 0, NEW)),
    ("SS beyond the GDT", Call(NEW), |w| w.put16(Page::New, SS_AT, 0x2000), trap(TS, 0x2000, NEW)),
    ("SS is code", Jmp(NEW), |w| w.put16(Page::New, SS_AT, CODE), trap(TS, CODE, NEW)),
    ("SS is read-only", Jmp(NEW), |w| w.put16(Page::New, SS_AT, READ_ONLY), trap(TS, READ_ONLY, NEW)),
    ("SS is not present", Jmp(NEW), |w| w.put16(Page::New, SS_AT, ABSENT), trap(SS, ABSENT, NEW)),
    ("SS of another ring", Jmp(NEW), |w| w.put16(Page::New, SS_AT, DATA3), trap(TS, DATA3 & !3, NEW)),
    ("SS with another RPL", Jmp(NEW), |w| w.put16(Page::New, SS_AT, DATA | 1), trap(TS, DATA, NEW)),
    ("SS in an LDT that is not there", Jmp(NEW), |w| w.put16(Page::New, SS_AT, LOCAL), trap(TS, LOCAL, NEW)),
    ("DS beyond the GDT", Jmp(NEW), |w| w.put16(Page::New, DS_AT, 0x3000), trap(TS, 0x3000, NEW)),
    ("DS is a system segment", Jmp(NEW), |w| w.put16(Page::New, DS_AT, LDT), trap(TS, LDT, NEW)),
    ("ES is code that cannot be read", Jmp(NEW), |w| w.put16(Page::New, ES_AT, EXECUTE_ONLY), trap(TS, EXECUTE_ONLY, NEW)),
    ("FS is not present", Jmp(NEW), |w| w.put16(Page::New, FS_AT, ABSENT), trap(NP, ABSENT, NEW)),
    ("GS with too high an RPL", Jmp(NEW), |w| w.put16(Page::New, GS_AT, DATA | 3), trap(TS, DATA, NEW)),
    ("DS of ring 0 for ring 3", Jmp(NEW), |w| { w.new_is_user(); w.put16(Page::New, DS_AT, DATA) }, trap(TS, DATA, NEW)),
    ("CS null", Jmp(NEW), |w| w.put16(Page::New, CS_AT, 0), trap(TS, 0, NEW)),
    ("CS beyond the GDT", Call(NEW), |w| w.put16(Page::New, CS_AT, 0x4000), trap(TS, 0x4000, NEW)),
    ("CS is data", Jmp(NEW), |w| w.put16(Page::New, CS_AT, DATA), trap(TS, DATA, NEW)),
    ("CS is not present", Jmp(NEW), |w| w.put16(Page::New, CS_AT, ABSENT_CODE), trap(NP, ABSENT_CODE, NEW)),
    ("CS of another ring", Jmp(NEW), |w| w.put16(Page::New, CS_AT, CODE3 & !3), trap(TS, CODE3 & !3, NEW)),
    ("CS is not present, by INT", Int, |w| { w.task_gate(INT, NEW); w.put16(Page::New, CS_AT, ABSENT_CODE) },
        trap(NP, ABSENT_CODE, NEW)),
    ("CS is not present, by #UD", Ud, |w| { w.task_gate(6, NEW); w.put16(Page::New, CS_AT, ABSENT_CODE) },
        trap(NP, ABSENT_CODE | EXT, NEW)),
    ("CS is not present, by IRET", Iret, |w| { w.nested(); w.put16(Page::New, CS_AT, ABSENT_CODE) }, trap(NP, ABSENT_CODE, NEW)),
    ("EIP beyond CS", Jmp(NEW), |w| { w.put16(Page::New, CS_AT, NEAR); w.put32(Page::New, EIP, 0x1_0000) }, trap(GP, 0, NEW)),
    // Faults on faults
    ("bad SS in the task of #GP", Gp, |w| { w.task_gate(13, NEW); w.put16(Page::New, SS_AT, 0); w.task_gate(DF, OTHER) },
        task(OTHER)),
    ("#GP whose TSS is not present", Gp, |w| {
        w.task_gate(13, NEW); w.gdt(NEW, descriptor(w.at(Page::New), 0x67, 0x09)); w.task_gate(DF, OTHER)
    }, task(OTHER)),
    ("no stack for the error code", Gp, |w| {
        w.task_gate(13, NEW); w.put16(Page::New, SS_AT, STACK16); w.put32(Page::New, ESP, 0x1002); w.task_gate(DF, OTHER)
    }, task(OTHER)),
    ("bad DS in the task of #UD", Ud, |w| { w.task_gate(6, NEW); w.put16(Page::New, DS_AT, LDT) }, trap(TS, LDT | EXT, NEW)),
    ("an invalid TSS has a task of its own", Jmp(NEW), |w| { w.put16(Page::New, SS_AT, 0); w.task_gate(10, OTHER) }, task(OTHER)),
];

/// Without paging only.
const UNPAGED: &[Case] = &[("long mode with a 16-bit TSS", LongMode, |w| w.old_is_16_bit(), trap(GP, 0, OLD))];

/// With paging only.
#[rustfmt::skip]
const PAGED: &[Case] = &[
    ("#PF by a task gate", Pf, |w| w.task_gate(14, NEW), task_with(NEW, 0)),
    ("virtual-8086 mode", Jmp(NEW), |w| w.new_is_8086(), trap(GP, 0, NEW)),
    ("CALL to virtual-8086 mode", Call(NEW), |w| w.new_is_8086(), trap(GP, 0, NEW)),
    ("error code for virtual-8086 mode", Pf, |w| { w.task_gate(14, NEW); w.new_is_8086() }, trap(GP, 0, NEW)),
    ("bad LDT in virtual-8086 mode", Jmp(NEW), |w| { w.new_is_8086(); w.put16(Page::New, LDT_AT, DATA) }, trap(TS, DATA, NEW)),
    ("a new TSS that is not mapped", Jmp(NEW), |w| w.map(Page::New, false, true), trap(PF, 0, OLD)),
    ("a new TSS that is read-only, JMP", Jmp(NEW), |w| w.map(Page::New, true, false), task(NEW)),
    ("a new TSS that is read-only, CALL", Call(NEW), |w| w.map(Page::New, true, false), trap(PF, 3, OLD)),
    ("an old TSS that is read-only", Call(NEW), |w| w.map(Page::Old, true, false), trap(PF, 3, OLD)),
    ("an old TSS that is not mapped", Jmp(NEW), |w| w.map(Page::Old, false, false), trap(PF, 2, OLD)),
    ("a new TSS whose second page is not mapped", Jmp(NEW), |w| {
        w.gdt(NEW, descriptor(w.at(Page::New) + 0xFD0, 0x67, 0x89));
        w.map(Page::Other, false, false);
        w.gdt(NEW, descriptor(w.at(Page::Other) - 0x30, 0x67, 0x89));
    }, trap(PF, 0, OLD)),
    ("a GDT that is read-only, accessed", Int, |w| {
        w.task_gate(INT, NEW); w.map(Page::Gdt, true, true); w.put16(Page::New, GS_AT, FRESH)
    }, task(NEW)),
    ("an LDT that is not mapped", Jmp(NEW), |w| {
        w.put16(Page::New, LDT_AT, LDT); w.put16(Page::New, DS_AT, LOCAL); w.map(Page::Ldt, false, false)
    }, trap(PF, 0, NEW)),
    ("an error code for a stack that is not mapped", Gp, |w| {
        w.task_gate(13, NEW); w.map(Page::NewStack, false, false); w.put32(Page::New, ESP, w.top(Page::NewStack));
        w.new_is_user()
    }, trap(PF, 6, NEW)),
];

/// All words of a note.
struct Words([u32; 32]);

impl Value for Words {
    fn write_to(&self, out: &mut dyn fmt::Write) -> fmt::Result {
        self.0.iter().enumerate().try_for_each(|(n, word)| match n {
            0 => write!(out, "{word:x}"),
            _ => write!(out, ",{word:x}"),
        })
    }
}

/// All cases in each kind of paging. `outside` is an address where memory of the hypervisor below lies, or 0.
pub fn all(outside: u32) {
    let before = report::checks();
    // Nothing answers there, so the PDPTEs are refused.
    let lost: &[Case] = &[("MOV to CR3, PDPTEs that are not L2's", Cr3(outside), |_| {}, trap(GP, 0, OLD))];
    for (mode, paging) in [("no paging", Paging::Off), ("paging", Paging::Wide32), ("PAE paging", Paging::Pae)] {
        let paged: &[Case] = if paging == Paging::Off { UNPAGED } else { PAGED };
        let lost = if paging == Paging::Pae && outside != 0 { lost } else { &[] };
        for (name, trigger, special, wanted) in [CASES, paged, lost].into_iter().flatten() {
            let mut world = World::new(paging);
            special(&mut world);
            let mut out = Serial;
            let mut check = Check::new(&mut out, format_args!("task switch, {mode}: {name}"));
            let mut last = (0, 0, 0);
            let (notes, debugctl) = world.run(*trigger);
            for (key, note) in ["first", "second", "third"].into_iter().zip(notes) {
                check = check.fact(key, Words(note.all()));
                last = (note.id(), note.error(), note.tr() as u16);
            }
            let code = |(id, error, tr): End| {
                // What is on the stack of one that went on is its own.
                let error = if id == 2 { 0 } else { error };
                Hex(u64::from(id) << 48 | u64::from(error) << 16 | u64::from(tr))
            };
            if world.debugctl != 0 {
                check = check.fact("debugctl", Hex(debugctl));
                // A debug exception clears both.
                check = check.expect("cleared", debugctl == 0, last.0 == 0x101);
            }
            // A JMP that failed on a page: see above.
            let failed = last.0 == 0x100 | PF && matches!(trigger, Jmp(_));
            let pages: &[Page] =
                if failed { &[Page::Old, Page::New] } else { &[Page::Gdt, Page::Old, Page::New, Page::Other] };
            check.expect("end", code(last), code(*wanted)).fact("memory", Hex(world.sum(pages).into())).end();
        }
    }
    Check::new(&mut Serial, "part tasks").fact("records", report::checks() - before).end();
}
