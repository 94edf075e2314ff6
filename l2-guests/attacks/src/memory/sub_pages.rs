//! Sub-page write permissions: each table of them in each place, with entries that no processor accepts, and the page itself. A write
//! that the table allows reaches the page, and nothing else reaches anything.

use super::{everywhere, no_end_inside, with};
use crate::{
    guest::{self, Exit, Extra, forget},
    lab::{LINEAR, Lab, PHYSICAL, Seen, Told},
};
use l2_kit::{
    cpu,
    ept::{WRITE_BACK, rights::R},
    fields as f,
    setup::{self, Kind, secondary},
    vmx,
};

/// In the leaf: the table has a say.
const SUB_PAGES: u64 = 1 << 61;
const VALID: u64 = 1;
const ALL: u64 = 0x5555_5555_5555_5555;
/// Basic exit reason of an entry that is missing or wrong.
const SPP_EVENT: Exit = Exit::Reason(66);
/// The tables are spare pages, the first one first; the page is another one.
const TABLES: [usize; 4] = [1, 2, 3, 4];
const PAGE: usize = 5;
const NAMES: [&str; 4] = ["first", "second", "third", "last"];

pub fn all(lab: &mut Lab) {
    if !setup::allowed_one(Kind::Secondary, secondary::SUB_PAGES) {
        return;
    }
    for (level, name) in (0..).zip(NAMES) {
        everywhere(lab, name_of(name).as_str(), |lab, at| {
            ready(lab);
            if level == 0 {
                vmx::write(f::SPPTP, at);
            } else {
                set(lab, level - 1, at | VALID);
            }
            let exit = write(lab);
            // Memory that is not there is all ones, and memory beside is zero: neither allows a write.
            no_end_inside(exit, at).escaped_if(matches!(exit, Exit::Done(_)))
        });
    }
    everywhere(lab, "page that sub-page permissions let be written", |lab, at| {
        ready(lab);
        lead_to(lab, at);
        no_end_inside(write(lab), at)
    });
    let width = u64::from(cpu::cpuid(0x8000_0008, 0)[0] & 0xFF);
    for (level, name) in (0..3).zip(NAMES) {
        lab.attack(format_args!("reserved bits in the {name} table of sub-page permissions"), Told::Same, |lab| {
            ready(lab);
            let reserved = (1..12).chain(width..64).nth(lab.random.below(11 + 64 - width) as usize);
            let next = lab.pages[TABLES[level + 1]];
            set(lab, level, next | VALID | reserved.map_or(0, |bit| 1 << bit));
            let exit = write(lab);
            Seen::of(exit).escaped_if(exit != SPP_EVENT)
        });
    }
    lab.attack(format_args!("bits of no sub-page in the last table of permissions"), Told::Same, |lab| {
        ready(lab);
        let bit = 2 * lab.random.below(32) + 1;
        set(lab, 3, ALL | 1 << bit);
        let exit = write(lab);
        Seen::of(exit).escaped_if(exit != SPP_EVENT)
    });
    lab.attack(format_args!("a table of sub-page permissions that is its own last one"), Told::Same, |lab| {
        ready(lab);
        // Its word for the page is an entry too: the page's first piece can be written, and the entry is not what a processor takes.
        let table = lab.pages[TABLES[2]];
        set(lab, 2, table | VALID);
        let exit = write(lab);
        Seen::of(exit)
    });
    lab.attack(format_args!("a pointer to sub-page permissions beyond the address width"), Told::Same, |lab| {
        ready(lab);
        vmx::write(f::SPPTP, lab.pages[TABLES[0]] | 1 << (width + lab.random.below(64 - width)));
        let exit = write(lab);
        Seen::of(exit).escaped_if(!matches!(exit, Exit::Refused(_)))
    });
    lab.attack(format_args!("sub-page permissions that are given and taken back"), Told::Same, |lab| {
        ready(lab);
        let (mut wrong, mut reached) = (0, 0);
        for _ in 0..8 {
            let piece = lab.random.below(32);
            let allows = lab.random.below(2) == 0;
            set(lab, 3, if allows { 1 << (2 * piece) } else { ALL & !(1 << (2 * piece)) });
            let exit = lab.execute(guest::write, LINEAR + piece * 128);
            reached += u64::from(allows);
            wrong += u64::from(matches!(exit, Exit::Done(_)) != allows);
            forget();
        }
        Seen::of(reached).escaped_if(wrong != 0)
    });
}

fn name_of(name: &str) -> l2_kit::arrayvec::ArrayString<48> {
    let mut text = l2_kit::arrayvec::ArrayString::new();
    let _ = core::fmt::Write::write_fmt(&mut text, format_args!("{name} table of sub-page permissions"));
    text
}

/// The guest under the control, with a table that allows all of its page.
fn ready(lab: &mut Lab) {
    with(lab, Extra { secondary: secondary::SUB_PAGES, ..Extra::default() });
    for level in 0..3 {
        let next = lab.pages[TABLES[level + 1]];
        set(lab, level, next | VALID);
    }
    set(lab, 3, ALL);
    vmx::write(f::SPPTP, lab.pages[TABLES[0]]);
    let page = lab.pages[PAGE];
    lead_to(lab, page);
}

/// The entry for the page in the table of a level.
fn set(lab: &mut Lab, level: usize, entry: u64) {
    lab.words(TABLES[level])[(PHYSICAL >> (39 - 9 * level)) as usize & 511] = entry;
}

fn lead_to(lab: &mut Lab, at: u64) {
    lab.lead_to(at, WRITE_BACK | R | SUB_PAGES);
}

fn write(lab: &mut Lab) -> Exit {
    forget();
    let exit = lab.execute(guest::write, LINEAR);
    forget();
    exit
}
