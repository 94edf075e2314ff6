//! Unrestricted guests in each paging mode: IA32_EFER, IA32_PAT, DR7 and IA32_DEBUGCTL, loaded by the entry or not, saved by
//! the exit or not, loaded by the exit or not: all combinations, each judged by the SDM ("Loading Guest Control Registers,
//! Debug Registers, and MSRs", "Saving Control Registers, Debug Registers, and MSRs", "Loading Host Control Registers, Debug
//! Registers, MSRs").
//!
//! The guest begins without paging and switches to the mode, or is entered in it. Where there is no IA32_DEBUGCTL it is 0
//! throughout.

use crate::guest::{DONE, Exit, Guest, Program};
use core::{
    arch::global_asm,
    sync::atomic::{AtomicU32, Ordering},
};
use l2_kit::{
    Check, cpu, descriptors as d, fields as f, pages,
    protocol::Hex,
    serial::Serial,
    setup::{Controls, Kind, Missing, allowed_one, entry_controls as entry, exit_controls as exit, secondary},
    vmx::{self, reason as r},
};

const LME: u64 = 1 << 8;
const LMA: u64 = 1 << 10;
const SCE: u64 = 1;
const CR4_PSE: u64 = 1 << 4;
const CS32: u64 = 0xC09B;
const DEFAULT_PAT: u64 = 0x0007_0406_0007_0406;
/// The guest's field, the host's field, and our own.
const PATS: [u64; 3] = [DEFAULT_PAT & !0xFF00, DEFAULT_PAT & !0xFF_0000, DEFAULT_PAT & !0xFF];
/// The guest's field, and our own: breakpoints that are not enabled.
const DR7S: [u64; 2] = [0x700, 0x400 | 1 << 16];
/// IA32_DEBUGCTL likewise: BTF, which does nothing without RFLAGS.TF, and LBR.
const DEBUGCTLS: [u64; 2] = [2, 1];

global_asm!(
    ".pushsection .text.vmxtest_unrestricted, \"ax\"",
    ".code32",
    "vmxtest_unrestricted:",
    "mov ecx, {efer}",
    "rdmsr",
    "mov ebp, eax",
    "mov cr4, esi",
    "mov cr3, edi",
    "mov cr0, ebx",
    "jmp 1f",
    "1: mov ecx, {efer}",
    "rdmsr",
    "mov esi, eax",
    "mov ecx, {pat}",
    "rdmsr",
    "mov edi, eax",
    "xor eax, eax",
    "mov ecx, {debugctl}",
    "cmp dword ptr [{has_debugctl}], 0",
    "je 2f",
    "rdmsr",
    "2: mov edx, eax",
    "mov eax, {done}",
    "vmcall",
    ".code64",
    ".popsection",
    efer = const cpu::EFER,
    pat = const cpu::PAT,
    debugctl = const cpu::DEBUGCTL,
    has_debugctl = sym HAS_DEBUGCTL,
    done = const DONE,
);

/// There is an IA32_DEBUGCTL; a guest reads it too.
static HAS_DEBUGCTL: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" {
    fn vmxtest_unrestricted();
}

/// A paging mode.
#[derive(Clone, Copy)]
struct Mode {
    name: &'static str,
    paging: bool,
    cr4: u64,
    tables: u64,
    /// The mode that MOV to CR0 begins with IA32_EFER.LME as here.
    lme: Option<bool>,
}

const PAE: &str = "PAE";

/// What is loaded and saved.
#[derive(Clone, Copy)]
struct Choice {
    entry: u32,
    exit: u32,
    /// IA32_EFER.LME in the guest's field.
    lme: bool,
    /// It begins in the mode.
    direct: bool,
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let loads = entry::LOAD_EFER | entry::LOAD_PAT;
    let exits = exit::SAVE_EFER | exit::LOAD_EFER | exit::SAVE_PAT | exit::LOAD_PAT;
    let unrestricted = secondary::EPT | secondary::UNRESTRICTED;
    if !allowed_one(Kind::Secondary, unrestricted)
        || !allowed_one(Kind::Entry, loads)
        || !allowed_one(Kind::Exit, exits)
    {
        Check::new(&mut Serial, "unrestricted guests").fact("offered", false).end();
        return Ok(());
    }
    let mut guest = Guest::new(Controls { secondary: unrestricted, ..Controls::default() })?;
    HAS_DEBUGCTL.store(u32::from(has_debugctl()), Ordering::Relaxed);
    let zero = cpu::cr4() & !(cpu::CR4_PAE | CR4_PSE);
    let plain = Mode { name: "no paging", paging: false, cr4: zero, tables: 0, lme: None };
    let modes = [
        plain,
        Mode { name: "32-bit", paging: true, cr4: zero | CR4_PSE, tables: tables_32(), lme: Some(false) },
        Mode { name: PAE, paging: true, cr4: zero | cpu::CR4_PAE, tables: tables_pae(guest.cr3), lme: Some(false) },
        Mode { name: "4-level", paging: true, cr4: zero | cpu::CR4_PAE, tables: guest.cr3, lme: Some(true) },
    ];
    for mode in modes {
        for direct in [false, true] {
            for lme in [false, true] {
                // What is entered in a mode has the LME of the mode; the SDM asks for it.
                if !direct || mode.lme == Some(lme) {
                    for loads in 0..8 {
                        combinations(&mut guest, mode, direct, lme, loads);
                    }
                }
            }
        }
    }
    Ok(())
}

/// IA32_DEBUGCTL is there and keeps its bits.
fn has_debugctl() -> bool {
    let kept = DEBUGCTLS.iter().all(|value| {
        cpu::try_wrmsr(cpu::DEBUGCTL, *value).is_ok() && cpu::try_rdmsr(cpu::DEBUGCTL).is_ok_and(|got| got == *value)
    });
    _ = cpu::try_wrmsr(cpu::DEBUGCTL, 0);
    kept
}

/// Pages of 4 MiB, one to one.
fn tables_32() -> u64 {
    let directory = pages::page();
    for (pair, word) in (0u64..).zip(directory.iter_mut()) {
        let large = |n: u64| (2 * pair + n) << 22 | 0x83;
        *word = large(1) << 32 | large(0);
    }
    pages::address(directory)
}

/// The directories of tables of four levels under four PDPTEs. Read as tables of four levels they have no code: what would be
/// a page of 1 GiB is a table, whose first entry is not present.
fn tables_pae(root: u64) -> u64 {
    let pointers = pages::page();
    // SAFETY: the tables are this image's, and nobody holds a reference to them.
    let level3 = unsafe { pages::at(pages::at(root)[0] & !0xFFF) };
    for (word, entry) in pointers.iter_mut().zip(level3).take(4) {
        *word = *entry & !0xFFF | 1;
    }
    let (directory, small) = (pages::page(), pages::page());
    // SAFETY: as above.
    directory.copy_from_slice(unsafe { pages::at(pointers[0] & !0xFFF) });
    for (page, word) in (0u64..).zip(small.iter_mut()).skip(1) {
        *word = page << 12 | 3;
    }
    directory[0] = pages::address(small) | 3;
    pointers[0] = pages::address(directory) | 1;
    pages::address(pointers)
}

/// A processor that reads PDPTEs as entries of tables of four levels marks them as accessed, which is reserved in PDPTEs.
fn clear_accessed(pdptes: u64) {
    // SAFETY: as above.
    unsafe { pages::at(pdptes) }.iter_mut().for_each(|word| *word &= !(1 << 5));
}

/// All that an exit may save and load, with one choice of what the entry loads.
fn combinations(guest: &mut Guest, mode: Mode, direct: bool, lme: bool, loads: u32) {
    let bit = |n: u32, of: u32, control: u32| if n >> of & 1 == 1 { control } else { 0 };
    let entry = bit(loads, 0, entry::LOAD_EFER) | bit(loads, 1, entry::LOAD_PAT) | bit(loads, 2, entry::LOAD_DEBUG);
    let (mut right, mut seen, mut first) = (0, 0u64, None);
    for n in 0..32 {
        let exit = bit(n, 0, exit::SAVE_EFER)
            | bit(n, 1, exit::SAVE_PAT)
            | bit(n, 2, exit::SAVE_DEBUG)
            | bit(n, 3, exit::LOAD_EFER)
            | bit(n, 4, exit::LOAD_PAT);
        let choice = Choice { entry, exit, lme, direct };
        let (got, wanted) = one(guest, mode, choice);
        // Not IA32_DEBUGCTL, which not every hypervisor keeps.
        seen = got[..13].iter().fold(seen, |sum, word| sum.rotate_left(7) ^ word);
        match got == wanted {
            true => right += 1,
            false => first = first.or(got.iter().zip(wanted).position(|(got, wanted)| *got != wanted)),
        }
    }
    let begins = if direct { "entered" } else { "switched to" };
    let mut out = Serial;
    let check = Check::new(
        &mut out,
        format_args!("unrestricted: {}, {begins}, LME {}, entry loads {loads:03b}", mode.name, u8::from(lme)),
    )
    .expect("as_the_sdm_says", right, 32)
    .fact("seen", Hex(seen));
    match first {
        Some(place) => check.fact("first_wrong", PLACES[place]).end(),
        None => check.end(),
    }
}

/// What is looked at.
const PLACES: [&str; 15] = [
    "result",
    "efer_at_entry",
    "efer_in_mode",
    "pat_in_guest",
    "long_mode_control",
    "saved_efer",
    "saved_pat",
    "saved_dr7",
    "own_efer",
    "own_pat",
    "own_dr7",
    "own_debugctl",
    "saved_cr0_paging",
    "debugctl_in_guest",
    "saved_debugctl",
];

fn one(guest: &mut Guest, mode: Mode, choice: Choice) -> ([u64; 15], [u64; 15]) {
    let has_debugctl = HAS_DEBUGCTL.load(Ordering::Relaxed) != 0;
    let debugctls = DEBUGCTLS.map(|value| if has_debugctl { value } else { 0 });
    let Choice { direct, lme, .. } = choice;
    let loads = |control| choice.entry & control != 0;
    let exits = |control| choice.exit & control != 0;
    let own = cpu::rdmsr(cpu::EFER);
    let controls = [f::ENTRY_CONTROLS, f::EXIT_CONTROLS].map(vmx::read);
    let ia32e = direct && mode.lme == Some(true);
    let cr0 = cpu::cr0() & !cpu::CR0_PG;
    let with_paging = cr0 | if mode.paging { cpu::CR0_PG } else { 0 };
    let (bit_lme, bit_lma) = (if lme { LME } else { 0 }, if ia32e { LMA } else { 0 });
    let field_efer = own & !(LME | LMA | SCE) | bit_lme | bit_lma;

    let bits = |on, control: u32| if on { u64::from(control) } else { 0 };
    // SAFETY: a label is entered as a function is, by the guest that starts there; this image lies below 4 GiB.
    let program: Program = unsafe { core::mem::transmute(vmxtest_unrestricted as *const ()) };
    guest.start(program, mode.tables);
    for (field, value) in [
        (
            f::ENTRY_CONTROLS,
            controls[0] & !u64::from(entry::IA32E) | u64::from(choice.entry) | bits(ia32e, entry::IA32E),
        ),
        (f::EXIT_CONTROLS, controls[1] & !u64::from(exit::SAVE_DEBUG) | u64::from(choice.exit)),
        (f::GUEST_CR0, if direct { with_paging } else { cr0 }),
        (f::GUEST_CR3, if direct { mode.tables } else { 0 }),
        (f::GUEST_CR4, if direct { mode.cr4 } else { cpu::cr4() & !(cpu::CR4_PAE | CR4_PSE) }),
        (f::GUEST_CS, d::KERNEL_CODE32.into()),
        (f::GUEST_CS_AR, CS32),
        (f::GUEST_IDTR_LIMIT, 0),
        (f::GUEST_EFER, field_efer),
        (f::GUEST_PAT, PATS[0]),
        (f::GUEST_DR7, DR7S[0]),
        (f::GUEST_DEBUGCTL, debugctls[0]),
        (f::HOST_EFER, own & !SCE),
        (f::HOST_PAT, PATS[1]),
    ] {
        vmx::write(field, value);
    }
    if mode.name == PAE {
        clear_accessed(mode.tables);
    }
    // PDPTEs of an entry in PAE mode come out of their fields.
    if direct && mode.name == PAE {
        for (n, field) in [f::GUEST_PDPTE0, f::GUEST_PDPTE1, f::GUEST_PDPTE2, f::GUEST_PDPTE3].into_iter().enumerate() {
            // SAFETY: `tables_pae` made the page.
            vmx::write(field, unsafe { (mode.tables as *const u64).add(n).read_volatile() });
        }
    }
    let registers = &mut guest.vcpu.registers;
    (registers.rsi, registers.rdi, registers.rbx) = (mode.cr4, mode.tables, with_paging);
    cpu::wrmsr(cpu::EFER, own | SCE);
    cpu::wrmsr(cpu::PAT, PATS[2]);
    cpu::set_dr7(DR7S[1]);
    if has_debugctl {
        cpu::wrmsr(cpu::DEBUGCTL, debugctls[1]);
    }
    let result = guest.run();
    let after = [cpu::rdmsr(cpu::EFER), cpu::rdmsr(cpu::PAT), cpu::dr7()];
    let debugctl = if has_debugctl { cpu::rdmsr(cpu::DEBUGCTL) } else { 0 };
    cpu::wrmsr(cpu::EFER, own);
    cpu::wrmsr(cpu::PAT, DEFAULT_PAT);
    cpu::set_dr7(0x400);
    let done = matches!(result, Exit::Done(_));
    let registers = &guest.vcpu.registers;
    let seen = [registers.rbp, registers.rsi, registers.rdi, registers.rdx];
    let in_guest = |value| if done { value } else { 0 };
    let got = [
        if done { 0 } else { u64::from(matches!(result, Exit::Reason(r::TRIPLE_FAULT, _))) },
        seen[0] & 0xFFFF_FFFF,
        in_guest(seen[1] & 0xFFFF_FFFF),
        in_guest(seen[2] & 0xFFFF_FFFF),
        vmx::read(f::ENTRY_CONTROLS) & u64::from(entry::IA32E),
        vmx::read(f::GUEST_EFER),
        vmx::read(f::GUEST_PAT),
        vmx::read(f::GUEST_DR7),
        after[0],
        after[1],
        after[2],
        debugctl,
        vmx::read(f::GUEST_CR0) & cpu::CR0_PG,
        in_guest(seen[3] & 0xFFFF_FFFF),
        vmx::read(f::GUEST_DEBUGCTL),
    ];

    // What the SDM says. Without "load IA32_EFER" LMA follows the control, and so does LME with paging; else LME stays.
    let entered = match loads(entry::LOAD_EFER) {
        true => field_efer,
        false if direct => (own | SCE) & !(LME | LMA) | if ia32e { LME | LMA } else { 0 },
        false => (own | SCE) & !LMA,
    };
    let runs_lme = entered & LME != 0;
    let pae = mode.cr4 & cpu::CR4_PAE != 0;
    // Paging with LME is 4-level paging, which needs PAE; the tables of another mode have reserved bits or no code.
    let goes = direct || mode.lme.is_none_or(|lme| lme == runs_lme);
    let paging = if direct || goes || runs_lme && pae { with_paging & cpu::CR0_PG } else { 0 };
    let last = entered | if paging != 0 && runs_lme { LMA } else { 0 };
    let pat = if loads(entry::LOAD_PAT) { PATS[0] } else { PATS[2] };
    let dr7 = if loads(entry::LOAD_DEBUG) { DR7S[0] } else { DR7S[1] };
    let debugs = debugctls[usize::from(!loads(entry::LOAD_DEBUG))];
    let wanted = [
        u64::from(!goes),
        entered & 0xFFFF_FFFF,
        in_guest(last),
        in_guest(pat & 0xFFFF_FFFF),
        bits(last & LMA != 0, entry::IA32E),
        if exits(exit::SAVE_EFER) { last } else { field_efer },
        if exits(exit::SAVE_PAT) { pat } else { PATS[0] },
        if exits(exit::SAVE_DEBUG) { dr7 } else { DR7S[0] },
        if exits(exit::LOAD_EFER) { own & !SCE } else { last | LME | LMA },
        if exits(exit::LOAD_PAT) { PATS[1] } else { pat },
        0x400,
        0,
        paging,
        in_guest(debugs),
        if exits(exit::SAVE_DEBUG) { debugs } else { debugctls[0] },
    ];
    vmx::write(f::ENTRY_CONTROLS, controls[0]);
    vmx::write(f::EXIT_CONTROLS, controls[1]);
    (got, wanted)
}
