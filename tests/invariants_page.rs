//! docs/invariants.md and docs/past-bugs.md cite tests by name: each of them exists.

use std::fs;
use std::path::Path;

/// All Rust text below a folder.
fn text_below(folder: &Path, into: &mut String) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            text_below(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}

/// All the code that tests can stand in.
fn code() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut code = String::new();
    text_below(&root.join("src"), &mut code);
    text_below(&root.join("tests"), &mut code);
    code
}

fn page(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name)).unwrap()
}

/// The tests that are cited in a text: names in backquotes, without file or module.
fn cited(text: &str) -> Vec<&str> {
    let last = |name: &'_ str| name.rsplit("::").next().map_or(0, str::len);
    let names = text.split('`').skip(1).step_by(2).map(|name| &name[name.len() - last(name)..]);
    // Names of code that are no tests have capitals; a file alone stands without "::".
    names.filter(|name| name.matches('_').count() >= 2 && !name.chars().any(char::is_uppercase)).collect()
}

/// Whether a test of that name exists. "_with_plenty" is the end of a name whose beginning was just given.
fn exists(code: &str, name: &str) -> bool {
    code.contains(&format!("fn {name}(")) || name.starts_with('_') && code.contains(&format!("{name}("))
}

#[test]
fn every_test_that_the_page_of_invariants_names_exists() {
    let (page, code) = (page("invariants.md"), code());
    let tests: Vec<&str> = page.split("\n\n").filter(|p| p.starts_with("Tests:")).flat_map(cited).collect();
    for name in &tests {
        assert!(exists(&code, name), "docs/invariants.md cites `{name}`, which does not exist");
    }
    assert!(tests.len() > 30, "the page cites tests in paragraphs that begin with \"Tests:\": {} found", tests.len());
}

#[test]
fn every_test_that_the_page_of_past_bugs_names_exists() {
    let (page, code) = (page("past-bugs.md"), code());
    // The last column.
    let tests: Vec<&str> = page
        .lines()
        .filter_map(|line| line.strip_suffix(" |")?.rsplit_once(" | "))
        .flat_map(|(_, c)| cited(c))
        .collect();
    for name in &tests {
        assert!(exists(&code, name), "docs/past-bugs.md cites `{name}`, which does not exist");
    }
    assert!(tests.len() > 15, "the page cites tests in the last column of its tables: {} found", tests.len());
}
