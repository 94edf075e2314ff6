//! Storms and loops: whatever a guest does, its hypervisor and the one below go on, and no exit takes long.

use crate::{
    guest::{self, Exit, Extra, Program, directory_of, forget},
    lab::{LINEAR, Lab, PHYSICAL, Seen, Told},
};
use core::arch::global_asm;
use l2_kit::{
    apic, caps,
    ept::{WRITE_BACK, rights::RWX},
    fields as f,
    pages::{self, LARGE, PAGE},
    setup::{self, Kind, VMX_MISC, exit_controls, pin, primary as p, secondary as s},
    vmx::{self, reason as r},
};

/// Exits of a storm.
const MANY: u64 = 64;

/// Programs that do the same again and again.
macro_rules! storms {
    ($($name:ident: $($instruction:literal)+;)*) => {
        global_asm!(
            ".pushsection .text.attacks_storms, \"ax\"",
            $(
                concat!("attacks_storm_", stringify!($name), ":"),
                $($instruction,)+
                concat!("jmp attacks_storm_", stringify!($name)),
            )*
            // Handlers that come back to what faulted, without and with an error code on the stack
            "attacks_again: iretq",
            "attacks_again_error: add rsp, 8",
            "iretq",
            ".popsection",
        );
        mod storm {
            unsafe extern "C" {
                $(
                    #[link_name = concat!("attacks_storm_", stringify!($name))]
                    pub safe fn $name(argument: u64) -> u64;
                )*
            }
        }
    };
}

storms! {
    cpuid: "cpuid";
    hlt: "hlt";
    invlpg: "invlpg [rsp]";
    rdtsc: "rdtsc";
    rdpmc: "rdpmc";
    mov_to_cr3: "mov rax, cr3" "mov cr3, rax";
    mov_dr: "mov rax, dr7";
    out: "out 0x80, al";
    rdmsr: "mov ecx, 0xC0000082" "rdmsr";
    wrmsr: "mov ecx, 0xC0000082" "xor eax, eax" "xor edx, edx" "wrmsr";
    pause: "pause";
    monitor: "mov rax, rsp" "xor ecx, ecx" "xor edx, edx" "monitor";
    mwait: "xor eax, eax" "xor ecx, ecx" "mwait";
    vmcall: "vmcall";
    vmxoff: "vmxoff";
    vmlaunch: "vmlaunch";
    vmresume: "vmresume";
    vmptrst: "vmptrst [rsp - 64]";
    vmread: "vmread rax, rcx";
    vmwrite: "vmwrite rax, rcx";
    invept: "invept rax, [rsp - 64]";
    invvpid: "invvpid rax, [rsp - 64]";
    wbinvd: "wbinvd";
    invd: "invd";
    sgdt: "sgdt [rsp - 64]";
    str: "str ax";
    ud2: "ud2";
    int3: "int3";
    divide: "xor ecx, ecx" "div ecx";
    xsetbv: "xor ecx, ecx" "mov eax, 1" "xor edx, edx" "xsetbv";
    read: "mov rax, [rdi]";
    write: "mov [rdi], rax";
    fetch: "jmp rdi";
    push: "mov rsp, rdi" "push rax";
    nop: "nop";
    sti: "sti" "nop";
    step: "pushfq" "or qword ptr [rsp], 0x100" "popfq" "nop";
}

unsafe extern "C" {
    static attacks_again: u8;
    static attacks_again_error: u8;
}

/// An exit again and again: the controls that make it, and the program.
struct Storm {
    name: &'static str,
    extra: Extra,
    program: Program,
    reason: u32,
    /// The exit leaves RIP after the instruction, or at its start
    skip: bool,
}

const NONE: Extra = Extra { pin: 0, primary: 0, secondary: 0, exit: 0, entry: 0 };
const fn primary(bits: u32) -> Extra {
    Extra { primary: bits, ..NONE }
}
const fn secondary(bits: u32) -> Extra {
    Extra { secondary: bits, ..NONE }
}
const fn storm(name: &'static str, extra: Extra, program: Program, reason: u32) -> Storm {
    Storm { name, extra, program, reason, skip: true }
}
const fn stays(name: &'static str, extra: Extra, program: Program, reason: u32) -> Storm {
    Storm { skip: false, ..storm(name, extra, program, reason) }
}

const STORMS: &[Storm] = &[
    storm("CPUID", NONE, storm::cpuid, 10),
    storm("HLT", primary(p::HLT), storm::hlt, 12),
    storm("INVLPG", primary(p::INVLPG), storm::invlpg, 14),
    storm("RDPMC", primary(p::RDPMC), storm::rdpmc, 15),
    storm("RDTSC", primary(p::RDTSC), storm::rdtsc, 16),
    storm("MOV to CR3", primary(p::CR3_LOAD), storm::mov_to_cr3, 28),
    storm("MOV DR", primary(p::MOV_DR), storm::mov_dr, 29),
    storm("OUT", primary(p::UNCONDITIONAL_IO), storm::out, 30),
    storm("RDMSR", NONE, storm::rdmsr, 31),
    storm("WRMSR", NONE, storm::wrmsr, 32),
    storm("PAUSE", primary(p::PAUSE), storm::pause, 40),
    storm("MONITOR", primary(p::MONITOR), storm::monitor, 39),
    storm("MWAIT", primary(p::MWAIT), storm::mwait, 36),
    storm("VMCALL", NONE, storm::vmcall, 18),
    storm("VMXOFF", NONE, storm::vmxoff, 26),
    storm("VMLAUNCH", NONE, storm::vmlaunch, 20),
    storm("VMRESUME", NONE, storm::vmresume, 24),
    storm("VMPTRST", NONE, storm::vmptrst, 22),
    storm("VMREAD", NONE, storm::vmread, 23),
    storm("VMWRITE", NONE, storm::vmwrite, 25),
    storm("INVEPT", NONE, storm::invept, 50),
    storm("INVVPID", NONE, storm::invvpid, 53),
    storm("WBINVD", secondary(s::WBINVD), storm::wbinvd, 54),
    storm("INVD", NONE, storm::invd, 13),
    storm("SGDT", secondary(s::DESCRIPTOR_TABLES), storm::sgdt, 46),
    storm("STR", secondary(s::DESCRIPTOR_TABLES), storm::str, 47),
    storm("XSETBV", NONE, storm::xsetbv, 55),
    stays("#UD", NONE, storm::ud2, 0),
    stays("#BP", NONE, storm::int3, 0),
    stays("#DE", NONE, storm::divide, 0),
    stays("single steps", NONE, storm::step, 0),
    stays("EPT violation by a read", NONE, storm::read, r::EPT_VIOLATION),
    stays("EPT violation by a write", NONE, storm::write, r::EPT_VIOLATION),
    stays("EPT violation by a fetch", NONE, storm::fetch, r::EPT_VIOLATION),
    stays("EPT violation by a push", NONE, storm::push, r::EPT_VIOLATION),
    stays("timer of 0", Extra { pin: pin::PREEMPTION_TIMER, ..NONE }, storm::nop, r::PREEMPTION_TIMER),
    stays("monitor trap flag", primary(p::TRAP_FLAG), storm::nop, 37),
    stays("interrupt window", primary(p::INTERRUPT_WINDOW), storm::sti, r::INTERRUPT_WINDOW),
];

pub fn all(lab: &mut Lab) {
    for storm in STORMS {
        let offered = setup::allowed_one(Kind::Pin, storm.extra.pin)
            && setup::allowed_one(Kind::Primary, storm.extra.primary)
            && setup::allowed_one(Kind::Secondary, storm.extra.secondary);
        if offered {
            lab.attack(format_args!("storm of {}", storm.name), Told::Same, |lab| rage(lab, storm));
        }
    }
    delivery(lab);
    loops(lab);
    entries(lab);
    messages(lab);
    tables(lab);
}

fn rage(lab: &mut Lab, storm: &Storm) -> Seen {
    lab.with(storm.extra);
    vmx::write(f::EXCEPTION_BITMAP, 0xFFFF_FFFF);
    // SAFETY: the lab's own page.
    unsafe { l2_kit::pages::at(lab.guest.msr_bitmap) }.fill(!0);
    lab.lead_to(0, 0);
    vmx::write(f::PREEMPTION_TIMER, 0);
    lab.guest.start(storm.program, LINEAR + 0x100);
    let mut reasons = 0;
    for _ in 0..MANY {
        let exit = lab.run();
        reasons += u64::from(exit == Exit::Reason(storm.reason));
        if storm.skip {
            lab.guest.skip();
        }
    }
    Seen::of(format_args!("{reasons} of {MANY}"))
}

/// Events whose delivery fails in each way.
fn delivery(lab: &mut Lab) {
    const WAYS: [&str; 5] =
        ["no IDT", "an IDT without memory", "an IDT that EPT does not map", "gates without code", "no stack"];
    for way in WAYS {
        lab.attack(format_args!("events delivered with {way}"), Told::Same, |lab| {
            let mut reasons = [0u64; 64];
            for turn in 0..MANY {
                lab.guest.vcpu.registers.rax = 0;
                if turn == 0 {
                    lab.with(Extra::default());
                    lab.lead_to(0, 0);
                }
                lab.guest.start(guest::nothing, 1);
                match way {
                    "no IDT" => vmx::write(f::GUEST_IDTR_LIMIT, 0),
                    "an IDT without memory" => vmx::write(f::GUEST_IDTR_BASE, LINEAR + 64 * PAGE),
                    "an IDT that EPT does not map" => vmx::write(f::GUEST_IDTR_BASE, LINEAR),
                    "gates without code" => {
                        let page = lab.pages[5];
                        vmx::write(f::GUEST_IDTR_BASE, page);
                    }
                    _ => vmx::write(f::GUEST_RSP, LINEAR + 0x800),
                }
                // The last two have stacks of their own in this image.
                let vectors = [0u64, 3, 6, 0x20, 0xF0, 1, 17, 13, 14];
                let count = if way == "no stack" { 7 } else { vectors.len() };
                let vector = lab.random.pick(&vectors[..count]);
                let kind = match vector {
                    3 => 6,
                    0x20.. => 0,
                    _ => 3u64,
                };
                let has_error = matches!(vector, 13 | 14 | 17);
                let error = if has_error { 1 << 11 } else { 0 };
                if kind == 0 {
                    vmx::write(f::GUEST_RFLAGS, 0x202);
                }
                vmx::write(f::ENTRY_INTERRUPTION_INFO, 1 << 31 | error | kind << 8 | vector);
                vmx::write(f::ENTRY_EXCEPTION_ERROR, 0);
                vmx::write(f::ENTRY_INSTRUCTION_LENGTH, 1);
                if let Exit::Reason(reason) = lab.run() {
                    reasons[reason as usize & 63] += 1;
                }
            }
            let [triple, violation] = [r::TRIPLE_FAULT, r::EPT_VIOLATION].map(|reason| reasons[reason as usize]);
            Seen::of(format_args!("{triple} triple faults, {violation} EPT violations"))
        });
    }
}

/// Faults whose handler comes back to what faulted, without an end: the timer ends them.
fn loops(lab: &mut Lab) {
    let timer = Extra { pin: pin::PREEMPTION_TIMER, ..NONE };
    if !setup::allowed_one(Kind::Pin, timer.pin) {
        return;
    }
    const LOOPS: [(&str, Program, u8, bool); 5] = [
        ("#UD", storm::ud2, 6, false),
        ("#DE", storm::divide, 0, false),
        ("#PF", storm::read, 14, true),
        ("#DB", storm::step, 1, false),
        ("#PF of a push", storm::push, 14, true),
    ];
    for (name, program, vector, error) in LOOPS {
        lab.attack(format_args!("an endless loop of {name}"), Told::Same, |lab| {
            lab.with(timer);
            let handler = if error { &raw const attacks_again_error } else { &raw const attacks_again } as u64;
            let gates = lab.words(5);
            let gate = handler & 0xFFFF | 8 << 16 | 0x8E << 40 | (handler >> 16 & 0xFFFF) << 48;
            gates[2 * usize::from(vector)] = gate;
            lab.guest.start(program, LINEAR + 64 * PAGE);
            vmx::write(f::GUEST_IDTR_BASE, lab.pages[5]);
            let mut ended = 0;
            for _ in 0..16 {
                vmx::write(f::PREEMPTION_TIMER, 40 + lab.random.below(40));
                let exit = lab.run();
                // A push without a stack has no end but a triple fault.
                ended += u64::from(matches!(exit, Exit::Reason(r::PREEMPTION_TIMER | r::TRIPLE_FAULT)));
            }
            Seen::of(ended)
        });
    }
}

/// Entries that fail, one after the other, and instructions on VMCSs.
fn entries(lab: &mut Lab) {
    lab.attack(format_args!("storm of entries that controls forbid"), Told::Same, |lab| {
        vmx::write(f::CR3_TARGET_COUNT, 5);
        Seen::of((0..MANY).filter(|_| matches!(lab.execute(guest::nothing, 1), Exit::Refused(_))).count())
    });
    lab.attack(format_args!("storm of entries that the host state forbids"), Told::Same, |lab| {
        vmx::write(f::HOST_CS, 0);
        Seen::of((0..MANY).filter(|_| matches!(lab.execute(guest::nothing, 1), Exit::Refused(_))).count())
    });
    lab.attack(format_args!("storm of entries that the guest state forbids"), Told::Same, |lab| {
        vmx::write(f::GUEST_CR0, 0);
        Seen::of((0..MANY).filter(|_| matches!(lab.execute(guest::nothing, 1), Exit::Failed(_))).count())
    });
    // What the processor has is no attack: it sleeps until an event, which other guests try.
    for (name, state) in [("shutdown", 2), ("wait-for-SIPI", 3), ("4", 4), ("of all ones", u64::from(u32::MAX))] {
        lab.attack(format_args!("activity state {name}"), Told::Same, |lab| {
            let refused = |lab: &mut Lab| {
                lab.guest.start(guest::nothing, 1);
                vmx::write(f::GUEST_ACTIVITY, state);
                matches!(lab.run(), Exit::Failed(_))
            };
            let offered = state < 4 && caps::own_or_0(VMX_MISC) >> (5 + state) & 1 == 1;
            Seen::of((0..MANY).filter(|_| offered || refused(lab)).count())
        });
    }
    // Each sleeps until the timer ends it, at once or a little later.
    for (name, state) in [("HLT", 1u64), ("shutdown", 2)] {
        let offered = caps::own_or_0(VMX_MISC) >> (5 + state) & 1 == 1;
        if !offered || !setup::allowed_one(Kind::Pin, pin::PREEMPTION_TIMER) {
            continue;
        }
        lab.attack(format_args!("storm of entries into the {name} state"), Told::Same, |lab| {
            lab.with(Extra { pin: pin::PREEMPTION_TIMER, ..NONE });
            let mut ended = 0;
            for turn in 0..MANY {
                lab.guest.start(guest::nothing, 1);
                vmx::write(f::GUEST_ACTIVITY, state);
                vmx::write(f::PREEMPTION_TIMER, if turn % 2 == 0 { 0 } else { lab.random.below(40) });
                let exit = lab.run();
                ended += u64::from(exit == Exit::Reason(r::PREEMPTION_TIMER) && vmx::read(f::GUEST_ACTIVITY) == state);
            }
            Seen::of(ended)
        });
    }
    lab.attack(format_args!("storm of VMPTRLD and VMCLEAR of many VMCSs"), Told::Same, |lab| {
        let mut good = 0;
        for turn in 0..MANY {
            let page = lab.pages[(1 + turn % 12) as usize];
            if turn < 12 {
                crate::place::put(page, 0, setup::revision().into());
            }
            good += u64::from(vmx::vmptrld(page).succeeded());
            lab.bracket();
        }
        (1..13).for_each(|page| good += u64::from(vmx::vmclear(lab.pages[page]).succeeded()));
        Seen::of(good)
    });
    lab.attack(format_args!("storm of VMXON and VMXOFF"), Told::Same, |lab| {
        let mut good = 0;
        for _ in 0..MANY / 2 {
            good += u64::from(vmx::vmxoff().succeeded());
            good += u64::from(vmx::vmxon(lab.vmxon_region()).succeeded());
            lab.bracket();
        }
        Seen::of(good)
    });
    lab.attack(format_args!("storm of INVEPT and INVVPID"), Told::Same, |lab| {
        let eptp = lab.guest.ept.pointer();
        let mut good = 0;
        for turn in 0..MANY {
            let outcome = match turn % 4 {
                0 => vmx::invept(1, [eptp, 0]),
                1 => vmx::invept(2, [0, 0]),
                2 => vmx::invvpid(1, [1 + turn % 7, 0]),
                _ => vmx::invvpid(2, [0, 0]),
            };
            lab.bracket();
            good += u64::from(outcome.succeeded() && lab.execute(guest::nothing, 3) == Exit::Done(3));
        }
        Seen::of(good)
    });
    lab.attack(format_args!("a page that is taken away again and again"), Told::Same, |lab| {
        let (page, mut good) = (lab.pages[4], 0);
        for turn in 0..MANY {
            lab.guest.ept.set(PHYSICAL, PAGE, if turn % 2 == 0 { page | WRITE_BACK | RWX } else { 0 });
            forget();
            let wanted = if turn % 2 == 0 { Exit::Done(0) } else { Exit::Reason(r::EPT_VIOLATION) };
            good += u64::from(lab.execute(guest::read, LINEAR) == wanted);
        }
        Seen::of(good)
    });
}

/// Interrupts and NMIs that the guest is hit by.
fn messages(lab: &mut Lab) {
    lab.attack(format_args!("storm of external interrupts"), Told::Same, |lab| {
        lab.with(Extra { pin: pin::EXTERNAL_INTERRUPT, exit: exit_controls::ACKNOWLEDGE, ..NONE });
        let mut exits = 0;
        for turn in 0..MANY {
            apic::send_self(0x60 + (turn % 8) as u8);
            lab.guest.start(storm::nop, 0);
            exits += u64::from(lab.run() == Exit::Reason(r::EXTERNAL_INTERRUPT));
            apic::eoi();
        }
        Seen::of(exits)
    });
    lab.attack(format_args!("storm of NMIs"), Told::Same, |lab| {
        lab.with(Extra { pin: pin::NMI, ..NONE });
        let mut exits = 0;
        for _ in 0..MANY {
            lab.guest.start(send_nmi, 0);
            exits += u64::from(lab.run() == Exit::Reason(r::EXCEPTION_OR_NMI));
        }
        unblock_nmis();
        Seen::of(exits)
    });
}

/// An IRET unblocks the NMIs that the exits by NMI have blocked.
pub fn unblock_nmis() {
    // SAFETY: comes back to the next instruction with the same stack.
    unsafe {
        core::arch::asm!(
            "mov {t}, rsp", "push {ss}", "push {t}", "pushfq", "push {cs}", "lea {t}, [rip + 2f]", "push {t}", "iretq", "2:",
            t = out(reg) _, ss = in(reg) 0x10u64, cs = in(reg) 8u64,
        );
    }
}

/// Sends itself an NMI and waits: a program.
extern "C" fn send_nmi(_: u64) -> u64 {
    apic::send_self_nmi();
    loop {
        core::hint::spin_loop();
    }
}

/// Regions of 2 MiB, each with a page table of its own as far as nvmx can tell.
const REGIONS: u64 = 4096;
/// So many tables nvmx keeps at once, more or less.
const MOST_TABLES: u64 = 2000;
/// Where they begin for the guest, and in its physical memory.
const REGIONS_LINEAR: u64 = 16 << 30;
const REGIONS_PHYSICAL: u64 = 40 << 30;

/// The most that one exit of L2 can ask for: all tables of ept02 are compared with ept12.
fn tables(lab: &mut Lab) {
    lab.attack(format_args!("INVEPT with as many tables as there can be"), Told::Same, |lab| {
        lab.many_tables = true;
        let (ept, cr3) = (lab.guest.ept, lab.guest.cr3);
        let page = lab.pages[4];
        lab.words(9)[0] = page | WRITE_BACK | RWX;
        let table = lab.pages[9];
        for region in 0..REGIONS {
            let (linear, physical) = (REGIONS_LINEAR + region * LARGE, REGIONS_PHYSICAL + region * LARGE);
            if region % 512 == 0 {
                ept.set(physical, LARGE, 0);
                pages::set_entry(cr3, linear, 0);
            }
            ept.set_entry(physical, 1, table | RWX);
            let directory = directory_of(cr3, linear);
            crate::place::put(directory, linear >> 21, physical | 0xE3);
        }
        let (mut seen, eptp) = (0u64, ept.pointer());
        for first in [0, REGIONS / 2] {
            forget();
            lab.guest.vcpu.registers.rsi = MOST_TABLES;
            seen += u64::from(lab.execute(everywhere, REGIONS_LINEAR + first * LARGE) == Exit::Done(0));
            let _ = vmx::invept(1, [eptp, 0]);
            seen += u64::from(lab.execute(guest::nothing, 1) == Exit::Done(1));
        }
        // One table after the other, until there is no room for one more.
        for region in 0..REGIONS / 2 - MOST_TABLES + 64 {
            let linear = REGIONS_LINEAR + (MOST_TABLES + region) * LARGE;
            seen += u64::from(lab.execute(guest::read, linear) == Exit::Done(0));
        }
        // And all of them gone at once.
        (0..REGIONS / 512).for_each(|pointer| ept.set_entry(REGIONS_PHYSICAL + pointer * 512 * LARGE, 2, 0));
        let _ = vmx::invept(1, [eptp, 0]);
        seen += u64::from(lab.execute(guest::nothing, 1) == Exit::Done(1));
        forget();
        Seen::of(seen)
    });
}

global_asm!(
    ".pushsection .text.attacks_everywhere, \"ax\"",
    "attacks_everywhere:",
    "xor eax, eax",
    "2: add rax, [rdi]",
    "add rdi, {large}",
    "dec rsi",
    "jnz 2b",
    "ret",
    ".popsection",
    large = const LARGE,
);

unsafe extern "C" {
    /// Reads in as many regions as RSI says: a program.
    #[link_name = "attacks_everywhere"]
    safe fn everywhere(address: u64) -> u64;
}
