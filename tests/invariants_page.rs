//! docs/invariants.md cites tests by name: each of them exists.

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

#[test]
fn every_test_that_the_page_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/invariants.md")).unwrap();
    let mut code = String::new();
    text_below(&root.join("src"), &mut code);
    text_below(&root.join("tests"), &mut code);

    let paragraphs = page.split("\n\n").filter(|p| p.starts_with("Tests:"));
    let mut cited = 0;
    for paragraph in paragraphs {
        for name in paragraph.split('`').skip(1).step_by(2) {
            // Names of code that are no tests have capitals; a file alone stands without "::".
            let name = name.rsplit("::").next().unwrap_or(name);
            let is_test = name.matches('_').count() >= 2 && !name.chars().any(char::is_uppercase);
            if !is_test {
                continue;
            }
            // "_with_plenty" is the end of a name whose beginning was just given.
            let found =
                code.contains(&format!("fn {name}(")) || name.starts_with('_') && code.contains(&format!("{name}("));
            assert!(found, "docs/invariants.md cites `{name}`, which does not exist");
            cited += 1;
        }
    }
    assert!(cited > 30, "the page cites tests in paragraphs that begin with \"Tests:\": {cited} found");
}
