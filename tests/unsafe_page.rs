//! docs/unsafe.md lists every file with unsafe code, with as many blocks and functions as it has.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const PAGE: &str = include_str!("../docs/unsafe.md");

/// How often a line of code has this text; comments do not count.
fn count(text: &str, what: &str) -> usize {
    text.lines().map(|line| line.split("//").next().unwrap_or_default().matches(what).count()).sum()
}

fn files(folder: &Path, found: &mut BTreeMap<String, (usize, usize)>, root: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found, root);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let counts = (count(&text, "unsafe {"), count(&text, "unsafe fn ") + count(&text, "unsafe impl "));
            if counts != (0, 0) {
                found.insert(path.strip_prefix(root).unwrap().display().to_string(), counts);
            }
        }
    }
}

#[test]
fn each_file_with_unsafe_code_is_listed_with_its_blocks() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeMap::new();
    files(&source, &mut found, &source);
    let listed: BTreeMap<String, (usize, usize)> = PAGE
        .lines()
        .filter_map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let name = cells.get(1)?.strip_prefix('`')?.strip_suffix('`')?;
            let counts = (cells.get(2)?.parse().ok()?, cells.get(3)?.parse().ok()?);
            Some((format!("hw/{name}"), counts))
        })
        .collect();
    assert_eq!(listed, found, "docs/unsafe.md on the left, the code on the right");
}
