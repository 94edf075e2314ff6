//! Words in `src/`: in code digits are roles (`vmcs12`, `ept02`), and L0 to L3 stand in what people read. A flag of the processor
//! has one place.

mod source;

use source::{File, files};
use std::collections::{BTreeMap, BTreeSet};

/// Names that are not ours: the crate of records and the counters in it, whose names people read, and names of the SDM.
const GIVEN: [&str; 8] =
    ["l2_protocol", "EXITS_OF_L2", "EXITS_OF_L3", "ExitsL2", "ExitsL3", "L1Ticks", "L1", "IA32_L3_QOS_CFG"];

/// The identifiers of a file.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// Whether a part of an identifier, `l2` of `exit_of_l2` or `L2` of `L2Wants`, is a level.
fn says_level(word: &str) -> bool {
    let bytes = word.as_bytes();
    (0..bytes.len().saturating_sub(1)).any(|at| {
        let begins = at == 0 || bytes[at - 1] == b'_' || bytes[at] == b'L' && bytes[at - 1].is_ascii_lowercase();
        let ends = bytes.get(at + 2).is_none_or(|next| *next == b'_' || next.is_ascii_uppercase() || *next == b's');
        begins && bytes[at].eq_ignore_ascii_case(&b'L') && (b'0'..=b'3').contains(&bytes[at + 1]) && ends
    })
}

fn named_for_a_level(file: &File) -> impl Iterator<Item = String> {
    let found = words(&file.text).filter(|word| says_level(word) && !GIVEN.contains(word));
    found.map(|word| format!("{}: {word}", file.module.join("::")))
}

#[test]
fn no_identifier_says_a_level() {
    let files = files("src");
    assert!(files.len() > 100);
    let wrong: Vec<String> = files.iter().flat_map(named_for_a_level).collect();
    assert!(wrong.is_empty(), "roles in code, levels in what people read:\n{}", wrong.join("\n"));
}

#[test]
fn a_level_is_found_in_every_place_of_an_identifier() {
    for word in ["l2", "L2", "l3_exit", "exit_of_l2", "ForL2", "L2Wants", "of_l3_too", "LEAST_FOR_L2", "l2s"] {
        assert!(says_level(word), "{word}");
    }
    for word in ["vmcs12", "CTL2", "ctl2", "IA32_PM_CTL1", "pml4", "null2", "l10", "L2x", "SSL3v"] {
        assert!(!says_level(word), "{word}");
    }
}

/// A flag of a register (`EFER_LMA`, `CR0_PE`, `RFLAGS_AC`) has its number in `x86/` or in the crate `x86_64`, and nowhere else.
#[test]
fn no_flag_of_a_register_is_a_number_outside_of_x86() {
    let registers = ["EFER_", "CR0_", "CR4_", "RFLAGS_", "DR7_"];
    let mut wrong = Vec::new();
    for file in files("src").iter().filter(|file| file.module.first().is_none_or(|top| top != "x86")) {
        for item in file.text.split("const ").skip(1) {
            let value = item.split(';').next().unwrap().split_once('=').map_or("", |(_, value)| value);
            if registers.iter().any(|register| item.starts_with(register)) && value.contains("<<") {
                wrong.push(format!("{}: {}", file.module.join("::"), item.split(';').next().unwrap()));
            }
        }
    }
    assert!(wrong.is_empty(), "flags by number:\n{}", wrong.join("\n"));
}

/// Which strategy of field access runs is chosen in `boot::identity`, and known in `vmcs::access` alone: everybody else calls a method
/// or takes what it gives. A third strategy is one file.
#[test]
fn nobody_asks_which_strategy_of_field_access_runs() {
    // What names a strategy, and who may: the choice, and what is told of it (in words, and to programs).
    let names = [
        ("Strategy::", &["boot::identity"][..]),
        ("Reached::", &[]),
        ("Way::", &[]),
        (".description()", &["run::start", "emul::cpuid"]),
    ];
    let mut wrong = Vec::new();
    let files = files("src");
    for file in files.iter().filter(|file| !file.module.starts_with(&["vmcs".into(), "access".into()])) {
        let module = file.module.join("::");
        for (name, may) in names.iter().filter(|(name, _)| file.text.contains(name)) {
            if !may.contains(&module.as_str()) {
                wrong.push(format!("{module}: {name} ({may:?} may)"));
            }
        }
    }
    assert!(wrong.is_empty(), "which strategy runs:\n{}", wrong.join("\n"));

    // And no method of the interface answers a yes or no but the one about the processor's fields.
    let interface = files.iter().find(|file| file.module == ["vmcs", "access"]).unwrap();
    let answers: Vec<&str> = interface
        .text
        .split("pub fn ")
        .skip(1)
        .filter_map(|function| {
            let head = function.split('{').next().unwrap();
            head.contains("-> bool").then(|| head.split('(').next().unwrap())
        })
        .collect();
    assert_eq!(answers, ["has"]);
}

/// The function that a literal at `at` is an argument of, if it is one.
fn called_with(text: &str, at: usize, literal: &str) -> Option<String> {
    let (before, behind) = (text[..at].trim_end(), text[at + literal.len()..].trim_start());
    if !before.ends_with([',', '(']) || !behind.starts_with([',', ')']) {
        return None;
    }
    let mut depth = 0;
    let open = before.char_indices().rev().find(|(_, c)| {
        match c {
            ')' | ']' | '}' => depth += 1,
            '(' | '[' | '{' if depth == 0 => return true,
            '(' | '[' | '{' => depth -= 1,
            _ => {}
        }
        false
    })?;
    let head = before[..open.0].trim_end();
    let name = head.rsplit(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).next()?;
    (open.1 == '(' && !name.is_empty()).then(|| name.to_string())
}

/// Functions to which a bare `true` or `false` says enough: setters, and what stores or replaces a value.
fn takes_a_bare_bool(function: &str) -> bool {
    let last = function.rsplit("::").next().unwrap_or_default();
    ["set", "put", "store", "swap", "unwrap_or", "map_or"].iter().any(|word| last.starts_with(word))
        || last.starts_with(char::is_uppercase)
        || ["AtomicBool::new", "Cell::new", "in", "match", "if", "let"].contains(&function)
}

/// Where a word would tell more than `true`, there is an enum, or another name.
#[test]
fn no_call_says_true_or_false_where_a_word_would_tell() {
    let mut wrong = Vec::new();
    for file in files("src") {
        for literal in ["true", "false"] {
            let calls = file.text.match_indices(literal).filter_map(|(at, _)| called_with(&file.text, at, literal));
            wrong.extend(
                calls
                    .filter(|name| !takes_a_bare_bool(name))
                    .map(|name| format!("{}: {name}(.. {literal} ..)", file.module.join("::"))),
            );
        }
    }
    assert!(wrong.is_empty(), "a word instead of a bool:\n{}", wrong.join("\n"));
}

#[test]
fn a_bool_is_found_among_arguments_alone() {
    let found = |text: &str| {
        let at = text.find("true").unwrap();
        called_with(text, at, "true").filter(|name| !takes_a_bare_bool(name))
    };
    assert_eq!(found("f(a, g(b), true)").as_deref(), Some("f"));
    assert_eq!(found("x.walk(\n    true,\n    b,\n)").as_deref(), Some("walk"));
    assert_eq!(found("a::Kind::of(true)").as_deref(), Some("a::Kind::of"));
    for text in [
        "(a, true) = b",
        "match (x, true) { .. }",
        "if let (Some(a), true) = b",
        "set_x(true)",
        "[true, false]",
        "S { a: true }",
        "Some(true)",
    ] {
        assert_eq!(found(text), None, "{text}");
    }
}

/// Whole words after `word` at the beginning of an item, with the text up to `end`.
fn items<'a>(text: &'a str, word: &'a str, end: char) -> impl Iterator<Item = (&'a str, &'a str)> {
    let starts = text.match_indices(word).filter(|(at, _)| {
        let before = text[..*at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && c != '_')
    });
    starts.filter_map(move |(at, _)| {
        let item = text[at + word.len()..].split(end).next()?;
        let name = words(item).next()?;
        item.starts_with(name).then_some((name, item))
    })
}

/// One name, one type: a reader who meets it knows which.
#[test]
fn no_two_types_have_one_name() {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in files("src") {
        for word in ["struct ", "enum ", "trait ", "union "] {
            for (name, _) in items(&file.text, word, '\n') {
                found.entry(name.to_string()).or_default().insert(file.module.join("::"));
            }
        }
    }
    assert!(found.len() > 150, "only {} types were found", found.len());
    let twice: Vec<String> = found.iter().filter(|(_, at)| at.len() > 1).map(|t| format!("{t:?}")).collect();
    assert!(twice.is_empty(), "types of one name:\n{}", twice.join("\n"));
}

/// A bit, an address or a number of the machine has one place. The same name with the same number elsewhere is a copy.
#[test]
fn no_number_of_the_machine_is_written_twice() {
    let mut found: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
    for file in files("src") {
        for (name, item) in items(&file.text, "const ", ';') {
            let value = item.split_once('=').map_or("", |(_, value)| value.trim());
            let plain = value.chars().all(|c| c.is_ascii_hexdigit() || " x_<>|&!()+-*".contains(c));
            if plain && (value.contains("<<") || value.contains("0x")) {
                let value = value.replace('_', "").to_lowercase();
                found.entry((name.to_string(), value)).or_default().insert(file.module.join("::"));
            }
        }
    }
    assert!(found.len() > 100, "only {} constants were found", found.len());
    let twice: Vec<String> = found.iter().filter(|(_, at)| at.len() > 1).map(|t| format!("{t:?}")).collect();
    assert!(twice.is_empty(), "numbers that are written twice:\n{}", twice.join("\n"));
}
