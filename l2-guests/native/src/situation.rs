//! The situations that an instruction is executed in.

use crate::{
    case::Mode,
    instructions::{Base, Instruction},
};
use arrayvec::ArrayString;
use core::fmt::Write;
use l2_kit::{Check, Global, arrayvec, serial::Serial};

/// What comes before the instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Before {
    /// Nothing: it is the first one after the IRET.
    Nothing,
    /// MOV SS from a register
    MovSs,
    /// MOV SS from memory that has a data breakpoint
    MovSsWatched,
    /// STI
    Sti,
}

/// Where the code lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum At {
    /// Somewhere
    Somewhere,
    /// At the end of the segment: the next instruction pointer is 2^32, or 2^16 in 16-bit code
    End,
}

/// A data breakpoint, DR0 and, if `twins`, DR2 on the same place, disabled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watch {
    /// Offset of its address from the operand
    pub offset: i64,
    /// R/W and LEN
    pub kind: u64,
    /// Whether it is enabled
    pub enabled: bool,
}

/// Where the operand lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Memory {
    /// In one page
    Whole,
    /// So many bytes before a page that is there
    Crossing(u64),
    /// ... that is missing
    Missing(u64),
    /// ... that is read-only
    ReadOnly(u64),
    /// ... that is not canonical
    NotCanonical(u64),
    /// So many bytes before the end of its segment
    Limit(u64),
    /// So many bytes below the beginning of its segment, which expands down
    ExpandDown(u64),
    /// So many bytes before the end of the address space of 32 bits
    Wrap(u64),
}

/// A situation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Situation {
    /// RFLAGS.TF
    pub single_step: bool,
    /// RFLAGS.RF
    pub resume: bool,
    /// Instruction breakpoint, in DR1
    pub breakpoint: bool,
    /// What comes before the instruction
    pub before: Before,
    /// Where the code lies
    pub at: At,
    /// Data breakpoints, in DR0 and DR2
    pub watches: [Option<Watch>; 2],
    /// Where the operand lies
    pub memory: Memory,
}

const PLAIN: Situation = Situation {
    single_step: false,
    resume: false,
    breakpoint: false,
    before: Before::Nothing,
    at: At::Somewhere,
    watches: [None; 2],
    memory: Memory::Whole,
};

/// R/W and LEN of DR7
const WRITES: u64 = 0b01;
const ACCESSES: u64 = 0b11;
const LEN: [u64; 4] = [0b0000, 0b0100, 0b1100, 0b1000];

/// The names of lists
const LETTERS: &[u8; 52] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
/// A list of situations: bytes of the operand, which kind of mode, whether the operand is written, its base
type List = Option<(u32, u8, bool, Base)>;
/// Those that were printed
static LISTS: Global<[List; LETTERS.len()]> = Global::new([None; LETTERS.len()]);

/// The letter of the list of situations that suit.
pub fn list(instruction: &Instruction, mode: Mode) -> char {
    let kind = match mode {
        Mode::Kernel64 => 0,
        Mode::User64 => 1,
        Mode::Narrow32 | Mode::Pae32 => 3,
        Mode::Flat32 => 4,
        _ => 2,
    };
    let bytes = if has_operands(mode) { instruction.bytes(mode) } else { 0 };
    let key = Some((bytes, kind, instruction.operand.is_written(), instruction.base));
    let mut lists = LISTS.get();
    let number = lists.iter().position(|list| *list == key || list.is_none()).expect("a letter for each list");
    let letter = char::from(LETTERS[number]);
    if lists[number].is_none() {
        lists[number] = key;
        LISTS.set(lists);
        let mut names = ArrayString::<4096>::new();
        each(instruction, mode, |name, _| {
            let _ = write!(names, "{}{name}", if names.is_empty() { "" } else { "," });
        });
        let (mut out, names) = (Serial, names.as_str());
        Check::new(&mut out, format_args!("situations {letter}")).fact("names", names).end();
    }
    letter
}

/// Prints the lists of an instruction that were not printed yet.
pub fn print_lists(instruction: &Instruction, modes: &[Mode]) {
    modes.iter().for_each(|mode| _ = list(instruction, *mode));
}

/// Calls `f` with the name of each situation that suits.
pub fn each(instruction: &Instruction, mode: Mode, mut f: impl FnMut(&str, Situation)) {
    if instruction.base == Base::Rbp {
        by_the_stack(instruction, mode, f);
        return;
    }
    // Flags, what comes before, breakpoints: all combinations.
    for before in [Before::Nothing, Before::MovSs, Before::Sti] {
        for bits in 0..8u32 {
            let (single_step, breakpoint, resume) = (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0);
            // RF is for the first instruction.
            if resume && before != Before::Nothing {
                continue;
            }
            let mut name = ArrayString::<32>::new();
            let _ = name.write_str(match before {
                Before::MovSs => "movss",
                Before::Sti => "sti",
                _ => "plain",
            });
            for (on, word) in [(single_step, "_tf"), (breakpoint, "_bp"), (resume, "_rf")] {
                let _ = name.write_str(if on { word } else { "" });
            }
            f(&name, Situation { single_step, resume, breakpoint, before, ..PLAIN });
        }
    }
    f("movss_watched", Situation { before: Before::MovSsWatched, ..PLAIN });
    f("movss_watched_tf", Situation { before: Before::MovSsWatched, single_step: true, ..PLAIN });
    if mode != Mode::Kernel64 && mode != Mode::User64 {
        f("end", Situation { at: At::End, ..PLAIN });
        f("end_tf", Situation { at: At::End, single_step: true, ..PLAIN });
        f("end_bp", Situation { at: At::End, breakpoint: true, ..PLAIN });
        f("end_bp_rf", Situation { at: At::End, breakpoint: true, resume: true, ..PLAIN });
    }
    if has_operands(mode) && instruction.operand.bytes() != 0 {
        operands(instruction, mode, f);
    }
}

/// Situations of an operand in SS: only its address differs. The segment keeps its full limit, since the handlers use it too.
fn by_the_stack(instruction: &Instruction, mode: Mode, mut f: impl FnMut(&str, Situation)) {
    f("plain", PLAIN);
    f("plain_tf", Situation { single_step: true, ..PLAIN });
    if !has_operands(mode) {
        return;
    }
    for inside in 0..u64::from(instruction.bytes(mode)) {
        let mut one = |name: &str, memory| {
            let mut text = ArrayString::<32>::new();
            let _ = write!(text, "{name}_{inside}");
            f(&text, Situation { memory, ..PLAIN });
        };
        one("missing", Memory::Missing(inside));
        if mode == Mode::Kernel64 {
            one("noncanonical", Memory::NotCanonical(inside));
        }
        if inside != 0 {
            one("crossing", Memory::Crossing(inside));
        }
    }
}

/// Operands are looked at in ring 0, and not in compatibility mode.
fn has_operands(mode: Mode) -> bool {
    matches!(mode, Mode::Kernel64 | Mode::Narrow32 | Mode::Pae32 | Mode::Flat32)
}

fn operands(instruction: &Instruction, mode: Mode, mut f: impl FnMut(&str, Situation)) {
    let bytes = u64::from(instruction.bytes(mode));
    let mut one = |name: core::fmt::Arguments<'_>, situation: Situation| {
        let mut text = ArrayString::<32>::new();
        let _ = text.write_fmt(name);
        f(&text, situation);
    };
    let watch = |offset, kind| Some(Watch { offset, kind, enabled: true });
    for (length, name) in LEN.into_iter().zip([1, 2, 4, 8]) {
        for offset in [-8i64, -4, -1, 0, 3, 7, 8, 15, 16] {
            for (rw, word) in [(WRITES, "w"), (ACCESSES, "rw")] {
                let sign = if offset < 0 { "m" } else { "" };
                one(
                    format_args!("watch_{word}{name}_{sign}{}", offset.unsigned_abs()),
                    Situation { watches: [watch(offset, rw | length), None], ..PLAIN },
                );
            }
        }
    }
    let disabled = |offset, kind| Some(Watch { offset, kind, enabled: false });
    let whole = watch(0, ACCESSES | LEN[3]);
    for (name, situation) in [
        ("watch_off", Situation { watches: [disabled(0, ACCESSES), None], ..PLAIN }),
        ("watch_twins", Situation { watches: [whole, disabled(4, ACCESSES)], ..PLAIN }),
        ("watch_both", Situation { watches: [whole, watch(4, ACCESSES)], ..PLAIN }),
        ("watch_tf", Situation { watches: [whole, None], single_step: true, ..PLAIN }),
        ("watch_bp", Situation { watches: [whole, None], breakpoint: true, ..PLAIN }),
        ("watch_movss", Situation { watches: [whole, None], before: Before::MovSs, ..PLAIN }),
        ("watch_movss_tf", Situation { watches: [whole, None], before: Before::MovSs, single_step: true, ..PLAIN }),
        ("watch_sti", Situation { watches: [whole, None], before: Before::Sti, ..PLAIN }),
        ("watch_missing", Situation { watches: [whole, None], memory: Memory::Missing(bytes / 2), ..PLAIN }),
    ] {
        one(format_args!("{name}"), situation);
    }
    for inside in 0..bytes {
        one(format_args!("missing_{inside}"), Situation { memory: Memory::Missing(inside), ..PLAIN });
        one(format_args!("readonly_{inside}"), Situation { memory: Memory::ReadOnly(inside), ..PLAIN });
        let mut more = |name: &str, memory| one(format_args!("{name}_{inside}"), Situation { memory, ..PLAIN });
        match mode {
            Mode::Kernel64 => more("noncanonical", Memory::NotCanonical(inside)),
            _ => {
                more("limit", Memory::Limit(inside));
                more("expanddown", Memory::ExpandDown(inside));
            }
        }
        if inside != 0 && matches!(mode, Mode::Narrow32 | Mode::Pae32) {
            more("wrap", Memory::Wrap(inside));
        }
        if inside != 0 {
            one(format_args!("crossing_{inside}"), Situation { memory: Memory::Crossing(inside), ..PLAIN });
            one(
                format_args!("crossing_{inside}_watch"),
                Situation {
                    memory: Memory::Crossing(inside),
                    watches: [watch(bytes as i64 - 1, ACCESSES), None],
                    ..PLAIN
                },
            );
        }
    }
    for (name, situation) in [
        ("missing_tf", Situation { memory: Memory::Missing(bytes / 2), single_step: true, ..PLAIN }),
        ("missing_bp", Situation { memory: Memory::Missing(bytes / 2), breakpoint: true, ..PLAIN }),
        ("missing_movss", Situation { memory: Memory::Missing(bytes / 2), before: Before::MovSs, ..PLAIN }),
        (
            "missing_movss_tf",
            Situation { memory: Memory::Missing(bytes / 2), before: Before::MovSs, single_step: true, ..PLAIN },
        ),
        ("missing_sti", Situation { memory: Memory::Missing(bytes / 2), before: Before::Sti, ..PLAIN }),
        ("crossing_tf", Situation { memory: Memory::Crossing(bytes / 2), single_step: true, ..PLAIN }),
    ] {
        one(format_args!("{name}"), situation);
    }
}
