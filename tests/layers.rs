//! One direction, in `src/` and in the host program: each folder uses only what stands above it, and inside a folder no circle has
//! more than three files.

mod imports;
mod source;

use imports::{Edges, circles, edges, upward};
use source::{File, Module, code, files};
use std::collections::BTreeSet;

/// From top to bottom: a line may use the lines above it. docs/adr/0017-one-direction.md says why.
const SRC: [&str; 17] = [
    "addr", "sync", "x86", "vmx", "mm", "trace", "ept", "rules", "boot", "hw", "vmcs", "cpu", "guest", "emul",
    "nested", "run", "lib",
];

/// Most files of one circle.
const LARGEST_CIRCLE: usize = 3;

/// The same for the host program: what is written and measured, what runs, what reads it, what people ask for.
const HARNESS: [&str; 17] = [
    "text",
    "clock",
    "shard",
    "image",
    "backend",
    "trace",
    "transcript",
    "boot",
    "clamp",
    "cli",
    "session",
    "report",
    "sweep",
    "l2",
    "lab",
    "suite",
    "cmd",
];

/// And for the crate that sets up what it needs.
const SETUP: [&str; 19] = [
    "error",
    "proc",
    "output",
    "ui",
    "paths",
    "need",
    "apt",
    "initramfs",
    "programs",
    "sources",
    "toolchain",
    "release",
    "bochs",
    "grub",
    "tcg",
    "linux",
    "qemu",
    "xen",
    "lib",
];

/// Fails if a use of the files there goes against the order, or a circle is large; `least` uses must be found.
fn held(source: &str, order: &[&str], least: usize) {
    let files = files(source);
    let edges = edges(&files);
    assert!(edges.len() > least, "only {} uses were found in {source}", edges.len());
    let wrong = upward(&edges, order);
    assert!(wrong.is_empty(), "{source}: against the order of tests/layers.rs:\n{}", wrong.join("\n"));
    let named = |circle: &BTreeSet<Module>| {
        let inside = edges.iter().filter(|((from, to), _)| circle.contains(from) && circle.contains(to));
        let uses = inside.map(|((from, to), path)| format!("\n{} uses {} ({path})", from.join("::"), to.join("::")));
        format!("{source}: a circle of {} files:{}", circle.len(), uses.collect::<String>())
    };
    let large: Vec<String> = circles(&edges).iter().filter(|circle| circle.len() > LARGEST_CIRCLE).map(named).collect();
    assert!(large.is_empty(), "{}", large.join("\n"));
}

#[test]
fn each_folder_of_src_uses_only_what_stands_above_it_and_no_circle_is_large() {
    held("src", &SRC, 500);
}

#[test]
fn each_part_of_the_host_program_uses_only_what_stands_above_it_and_no_circle_is_large() {
    held("harness/src", &HARNESS, 250);
}

#[test]
fn each_part_of_its_set_up_uses_only_what_stands_above_it() {
    held("harness/setup/src", &SETUP, 30);
}

/// Files as they could be.
fn sample(files: &[(&str, &str)]) -> Edges {
    let module = |path: &str| path.split("::").filter(|word| !word.is_empty()).map(str::to_string).collect();
    let files = files.iter().map(|(path, text)| File { module: module(path), text: code(text) });
    edges(&files.collect::<Vec<_>>())
}

#[test]
fn a_use_against_the_order_is_named_in_whichever_form() {
    for text in [
        "use crate::nested::entry;",
        "use crate::{addr::Hpa, nested::{entry::{self, enter}}};",
        "fn f() { crate::nested::entry::enter() }",
        "use super::super::nested::Entry;",
        "const QUOTE: char = '\"'; use crate::nested::Entry; const OTHER: char = '\"';",
    ] {
        let edges = sample(&[
            ("", "pub mod nested; pub mod mm;"),
            ("addr", ""),
            ("mm", "mod map;"),
            ("mm::map", text),
            ("nested", "mod entry; pub use entry::Entry;"),
            ("nested::entry", "use crate::mm::map; pub struct Entry<'a>(&'a u8);"),
        ]);
        let wrong = upward(&edges, &SRC);
        assert_eq!(wrong.len(), 1, "{text}: {wrong:?}");
        assert!(wrong[0].starts_with("mm::map uses nested::entry ("), "{text}: {wrong:?}");
    }
}

#[test]
fn comments_strings_and_tests_are_no_uses() {
    let text = "// crate::nested::entry::f()\nconst S: &str = \"crate::nested::entry\";\n#[cfg(test)]\nmod tests { use crate::nested::entry; }";
    let edges = sample(&[("", ""), ("mm", text), ("nested", ""), ("nested::entry", "")]);
    assert!(edges.is_empty(), "{edges:?}");
}

#[test]
fn a_circle_is_found_with_all_its_files() {
    let edges = sample(&[
        ("mm", "mod a; mod b; mod c; mod d; pub use d::D;"),
        ("mm::a", "use super::b;"),
        ("mm::b", "use super::c::x;"),
        ("mm::c", "use crate::mm::{D};"),
        ("mm::d", "fn f() { super::a::f() }"),
        ("mm::e", "use super::a;"),
    ]);
    let circles = circles(&edges);
    assert_eq!(circles.len(), 1);
    assert_eq!(circles[0].len(), 4);
}
