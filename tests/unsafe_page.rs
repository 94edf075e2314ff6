//! docs/unsafe.md lists every function with unsafe code, with as many blocks as it has.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

mod source;

const PAGE: &str = include_str!("../docs/unsafe.md");

/// How often a line of code has this text; comments do not count.
fn count(text: &str, what: &str) -> usize {
    text.lines().map(|line| line.split("//").next().unwrap_or_default().matches(what).count()).sum()
}

/// Blocks and functions, by file and by the function that they stand in: the last one whose head came before.
type Counts = BTreeMap<(String, String), (usize, usize)>;

fn files(folder: &Path, found: &mut Counts, root: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found, root);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let file = path.strip_prefix(root).unwrap().display().to_string();
            let mut function = String::new();
            for line in fs::read_to_string(&path).unwrap().lines() {
                if let Some(name) = head(line) {
                    function = name.to_string();
                }
                let counts = (count(line, "unsafe {"), count(line, "unsafe fn ") + count(line, "unsafe impl "));
                if counts != (0, 0) {
                    let sum = found.entry((file.clone(), function.clone())).or_default();
                    *sum = (sum.0 + counts.0, sum.1 + counts.1);
                }
            }
        }
    }
}

/// The name of the function whose head is in this line.
fn head(line: &str) -> Option<&str> {
    let code = line.split("//").next()?;
    let (before, rest) = code.split_once("fn ")?;
    let name = rest.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '$')).next()?;
    (before.is_empty() || before.ends_with([' ', '('])).then_some(name).filter(|name| !name.is_empty())
}

#[test]
fn each_function_with_unsafe_code_is_listed_with_its_blocks() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Counts::new();
    files(&source, &mut found, &source);
    let listed: Counts = PAGE
        .lines()
        .filter_map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let name = |cell: usize| cells.get(cell)?.strip_prefix('`')?.strip_suffix('`');
            let counts = (cells.get(3)?.parse().ok()?, cells.get(4)?.parse().ok()?);
            Some(((format!("hw/{}", name(1)?), name(2)?.to_string()), counts))
        })
        .collect();
    let difference = |a: &Counts, b: &Counts| {
        a.iter().filter(|(k, v)| b.get(k) != Some(v)).map(|(k, v)| format!("{k:?} {v:?}")).collect::<Vec<_>>()
    };
    let (only_page, only_code) = (difference(&listed, &found), difference(&found, &listed));
    assert!(
        only_page.is_empty() && only_code.is_empty(),
        "on docs/unsafe.md alone {only_page:#?}, in the code alone {only_code:#?}"
    );
}

#[test]
fn a_head_is_found_in_whichever_form() {
    for (line, name) in [
        ("    pub unsafe fn wrmsr_safe(index: u32)", Some("wrmsr_safe")),
        ("    extern \"C\" fn landing<T>(job: u8)", Some("landing")),
        ("        pub unsafe fn $write(value: u64) {", Some("$write")),
        ("// fn no", None),
        ("let run: fn(T) -> ! = f;", None),
    ] {
        assert_eq!(head(line), name, "{line}");
    }
}

/// Powers that a type alone cannot keep to their owner: what has them in the name, and who may use it. Below are docs/unsafe.md's
/// words for the same.
#[test]
fn what_leads_to_tables_is_used_where_tables_are_built_alone() {
    let powers = [
        (".alloc_table(", &["ept::machine"][..]),
        (".free_table(", &["ept::machine"]),
        (".table_entry(", &["ept::machine"]),
        ("Place::anywhere", &[]),
        ("Place::new", &["mm::frames", "mm::guest", "mm::paging"]),
    ];
    let mut wrong = Vec::new();
    let mut used = vec![false; powers.len()];
    for file in source::files("src") {
        let module = file.module.join("::");
        for (power, used) in powers.iter().zip(&mut used).filter(|((name, _), _)| file.text.contains(name)) {
            *used = true;
            if !power.1.contains(&module.as_str()) {
                wrong.push(format!("{module}: {}", power.0));
            }
        }
        // The same by the trait through which the EPT code has them.
        if file.text.contains("TableFrames") && file.module.first().is_none_or(|top| top != "ept") {
            wrong.push(format!("{module}: TableFrames"));
        }
    }
    assert!(wrong.is_empty(), "a power that is another's:\n{}", wrong.join("\n"));
    assert_eq!(used, [true, true, true, false, true]);
}
