//! Tables and pages of the guest's EPT, in every role, in every place; tables that contain themselves.

use super::{enter, everywhere, no_end_inside, with};
use crate::{
    guest::{self, Exit, Extra, Program, forget},
    lab::{LINEAR, Lab, Seen, Told},
    place::{self, Place},
};
use core::{arch::asm, ptr};
use l2_kit::{
    caps,
    ept::{LARGE_BIT, WRITE_BACK, rights::RWX},
    fields as f,
    pages::{self, LARGE, PAGE},
    setup, vmx,
};

/// A physical address under an entry of the root that nothing else is under, and a linear address for it.
const FAR: u64 = 1 << 39;
const FAR_LINEAR: u64 = LINEAR + PAGE;
/// A page that leads to itself at all levels: entry 1 each time.
const SELF: u64 = 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12;
const GIB: u64 = 1 << 30;

const LEVELS: [&str; 4] = ["PT", "PD", "PDPT", "PML4"];

pub fn all(lab: &mut Lab) {
    for flags in [false, true] {
        if flags && caps::get(setup::VMX_EPT_VPID_CAP) >> 21 & 1 == 0 {
            continue;
        }
        let with_flags = if flags { " with flags" } else { "" };
        for (level, name) in (0..4).zip(LEVELS) {
            everywhere(lab, &name_of(format_args!("EPT {name}{with_flags}")), |lab, at| {
                with(lab, Extra::default());
                table(lab, at, level, flags);
                no_end_inside(access(lab, guest::read, FAR_LINEAR), at)
            });
        }
    }
    let has_1g = caps::get(setup::VMX_EPT_VPID_CAP) >> 17 & 1 != 0;
    for (size, name, offered) in [(PAGE, "4K", true), (LARGE, "2M", true), (GIB, "1G", has_1g)] {
        for (kind, program) in [
            ("read", guest::read as Program),
            ("written", guest::write),
            ("modified", modify),
            ("fetched", guest::call),
        ] {
            if !offered {
                continue;
            }
            everywhere(lab, &name_of(format_args!("{name} page {kind}")), |lab, at| {
                with(lab, Extra::default());
                chain(lab);
                leaf(lab, at, size, RWX);
                lab.guest.map_linear(FAR_LINEAR, FAR | at & (size - 1) & !(PAGE - 1));
                if kind == "fetched" && !inside(at) {
                    // SAFETY: ordinary memory beside the range: `mov eax, 0x77; ret`.
                    unsafe { ptr::write_volatile(at as *mut u64, 0x9090_C300_0000_77B8) };
                }
                no_end_inside(access(lab, program, FAR_LINEAR), at)
            });
        }
    }
    rights(lab);
    contain_themselves(lab);
}

fn name_of(name: core::fmt::Arguments<'_>) -> l2_kit::arrayvec::ArrayString<48> {
    let mut text = l2_kit::arrayvec::ArrayString::new();
    let _ = core::fmt::Write::write_fmt(&mut text, name);
    text
}

fn inside(at: u64) -> bool {
    let (start, end) = place::range();
    (start..end).contains(&at)
}

/// From the root to a page: PDPT, PD, PT and the page are spare pages 1 to 4, each led to by its entry 0.
fn chain(lab: &mut Lab) {
    for level in 1..4 {
        let next = lab.pages[level + 1];
        lab.words(level)[0] = next | if level == 3 { WRITE_BACK } else { 0 } | RWX;
    }
    lab.words(4)[0] = 0xA;
    let first = lab.pages[1];
    lab.guest.ept.set_entry(FAR, 3, first | RWX);
    lab.guest.map_linear(FAR_LINEAR, FAR);
}

/// One of the tables of [`chain`] lies at `at`; beside the range with its content.
fn table(lab: &mut Lab, at: u64, level: usize, flags: bool) {
    chain(lab);
    if !inside(at) {
        let from = if level == 3 { lab.guest.ept.pointer() & !0xFFF } else { lab.pages[3 - level] };
        // SAFETY: a page of tables, and one of ordinary memory that nothing else uses.
        unsafe { ptr::copy(from as *const u8, at as *mut u8, PAGE as usize) };
    }
    match level {
        3 => {}
        2 => lab.guest.ept.set_entry(FAR, 3, at | RWX),
        _ => lab.words(2 - level)[0] = at | RWX,
    }
    let root = if level == 3 { at } else { lab.guest.ept.pointer() & !0xFFF };
    vmx::write(f::EPTP, root | 3 << 3 | 6 | u64::from(flags) << 6);
}

/// The page of [`chain`] is of this size and holds `at`.
fn leaf(lab: &mut Lab, at: u64, size: u64, rights: u64) {
    let (table, bits) = match size {
        PAGE => (3, 0),
        LARGE => (2, LARGE_BIT),
        _ => (1, LARGE_BIT),
    };
    lab.words(table)[0] = at & !(size - 1) | bits | WRITE_BACK | rights;
}

fn access(lab: &mut Lab, program: Program, linear: u64) -> Exit {
    forget();
    let exit = lab.execute(program, linear);
    lab.guest.ept.set_entry(FAR, 3, 0);
    forget();
    exit
}

/// Rights that are raised without INVEPT and lowered with it, at the range's edge.
fn rights(lab: &mut Lab) {
    for place in [Place::Below, Place::Within] {
        lab.attack(format_args!("rights raised and lowered {}", place.name()), told(place), |lab| {
            with(lab, Extra::default());
            lab.beside = true;
            let at = place.page(lab.random.next());
            place::fill(at);
            chain(lab);
            let mut seen = [Exit::Done(0); 6];
            forget();
            for (i, exit) in seen.iter_mut().enumerate() {
                let rights = [0, 1, 3, 1, 7, 0][i];
                leaf(lab, at, PAGE, rights);
                if matches!(i, 3 | 5) {
                    let _ = vmx::invept(1, [vmx::read(f::EPTP), 0]);
                }
                let program = if rights == 1 { guest::read } else { guest::write };
                *exit = match lab.execute(program, FAR_LINEAR) {
                    Exit::Done(_) => Exit::Done(0),
                    other => other,
                };
            }
            lab.guest.ept.set_entry(FAR, 3, 0);
            let reached = seen.iter().any(|exit| matches!(exit, Exit::Done(_)));
            let wrong = seen[3] != seen[1] && place == Place::Below;
            Seen::of(seen.iter().fold(0u64, |n, exit| n << 1 | u64::from(matches!(exit, Exit::Done(_)))))
                .escaped_if(reached && inside(at) && !place::is_bare() || wrong)
        });
    }
    lab.attack(format_args!("a large page split towards the range"), Told::Answered, |lab| {
        with(lab, Extra::default());
        chain(lab);
        let (at, below) = (Place::First.page(0), Place::Below.page(0));
        place::fill(at);
        leaf(lab, below, LARGE, RWX);
        lab.guest.map_linear(FAR_LINEAR, FAR);
        forget();
        let whole = lab.execute(guest::read, FAR_LINEAR);
        // Without INVEPT, as L2 should not.
        let table = lab.pages[3];
        lab.words(3)[0] = at | WRITE_BACK | RWX;
        lab.words(2)[0] = table | RWX;
        let _ = lab.execute(guest::read, FAR_LINEAR);
        let _ = vmx::invept(2, [0, 0]);
        let split = access(lab, guest::write, FAR_LINEAR);
        no_end_inside(split, at).escaped_if(!matches!(whole, Exit::Done(_)))
    });
}

fn told(place: Place) -> Told {
    if Place::BESIDE.contains(&place) { Told::Same } else { Told::Answered }
}

/// Roots and tables that are their own tables and pages: the guest writes its own EPT.
fn contain_themselves(lab: &mut Lab) {
    /// The root in all four roles.
    fn myself(lab: &mut Lab) -> u64 {
        let root = lab.guest.ept.pointer() & !0xFFF;
        lab.guest.ept.set_entry(FAR, 3, root | RWX);
        lab.guest.map_linear(FAR_LINEAR, SELF);
        forget();
        root
    }
    lab.attack(format_args!("a root in all four roles"), Told::Same, |lab| {
        with(lab, Extra::default());
        let root = myself(lab);
        let exit = access(lab, guest::read, FAR_LINEAR + 8);
        Seen::of(exit == Exit::Done(root | RWX))
    });
    for place in Place::INSIDE {
        lab.attack(format_args!("a guest leads its own EPT to a page {}", place.name()), Told::Answered, |lab| {
            with(lab, Extra::default());
            let at = place.page(lab.random.next());
            place::fill(at);
            let root = myself(lab);
            // Entry 1 of the root is the page that FAR_LINEAR shows; entry 2 becomes a page table entry for the range.
            let entry = at | WRITE_BACK | RWX;
            lab.guest.vcpu.registers.rsi = entry;
            let wrote = lab.execute(store_rsi, FAR_LINEAR + 16);
            lab.guest.map_linear(FAR_LINEAR, SELF & !(511 << 12) | 2 << 12);
            let kind = lab.random.pick(&[guest::read as Program, guest::write, modify]);
            let exit = access(lab, kind, FAR_LINEAR);
            // SAFETY: the root of this guest's tree.
            let words = unsafe { pages::at(root) };
            let arrived = words[2] == entry;
            words[2] = 0;
            no_end_inside(exit, at).escaped_if(!arrived || wrote != Exit::Done(entry))
        });
        lab.attack(format_args!("a guest makes a root of a page {}", place.name()), Told::Answered, |lab| {
            with(lab, Extra::default());
            let at = place.page(lab.random.next());
            place::fill(at);
            vmx::write(f::EPTP, at | 3 << 3 | 6);
            let first = enter(lab);
            let _ = vmx::invept(1, [at | 3 << 3 | 6, 0]);
            no_end_inside(enter(lab), at).escaped_if(matches!(first, Exit::Done(_)))
        });
    }
    lab.attack(format_args!("many roots on one page"), Told::Same, |lab| {
        with(lab, Extra::default());
        let tree = lab.guest.ept.pointer() & !0xFFF;
        let mut sum = 0;
        for turn in 0..24 {
            let root = lab.pages[(turn % 14) as usize];
            // SAFETY: spare pages, and the root of the tree.
            unsafe { ptr::copy(tree as *const u8, root as *mut u8, PAGE as usize) };
            vmx::write(f::EPTP, root | 3 << 3 | 6);
            if turn >= 14 {
                let _ = vmx::invept(1, [root | 3 << 3 | 6, 0]);
            }
            sum += u64::from(lab.execute(guest::nothing, turn) == Exit::Done(turn));
        }
        Seen::of(sum)
    });
}

extern "C" fn modify(address: u64) -> u64 {
    // SAFETY: the page under attack.
    unsafe { asm!("lock add qword ptr [{}], 0", in(reg) address, options(nostack)) };
    1
}

core::arch::global_asm!(
    ".pushsection .text.attacks_store, \"ax\"",
    "attacks_store:",
    "mov [rdi], rsi",
    "mov rax, rsi",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    /// Stores RSI where the argument points: a program.
    #[link_name = "attacks_store"]
    safe fn store_rsi(address: u64) -> u64;
}
