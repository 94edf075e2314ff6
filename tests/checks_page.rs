//! The table in docs/checks.md is that of the code: every rule with its name, its function, and what breaks it in tests.

use nvmx::rules::checks::CheckId;
use std::fmt::Write;
use std::fs;
use std::path::Path;

const BEGIN: &str = "<!-- rules of src/rules/checks: begin -->\n";
const END: &str = "<!-- rules of src/rules/checks: end -->\n";

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The files with rules, by module; the one with their names, and what only maps them, apart.
fn modules() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/rules/checks");
    let mut all: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter_map(|path| Some((path.file_stem()?.to_str()?.to_string(), fs::read_to_string(&path).ok()?)))
        .filter(|(module, _)| module != "id" && module != "mod")
        .collect();
    all.sort();
    all
}

/// The function that decides a rule: named in a list of rules, or the one whose body names the rule.
fn function(modules: &[(String, String)], check: CheckId) -> String {
    let listed = format!("{} => ", check.name());
    for (module, text) in modules {
        let row = text.lines().find_map(|line| line.trim().strip_prefix(&listed)?.strip_suffix(';'));
        if let Some(name) = row {
            assert!(text.contains(&format!("fn {name}")), "{module} has no function {name}");
            return format!("{module}::{name}");
        }
    }
    for (module, text) in modules {
        let mut last = "";
        for line in text.lines() {
            if let Some((_, rest)) = line.split_once("fn ") {
                last = rest.split(['(', '<']).next().unwrap_or("");
            }
            // What only gives the exit qualification decides nothing.
            let named = line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == check.name());
            if named && last != "qualification_of" {
                return format!("{module}::{last}");
            }
        }
    }
    panic!("no function of src/rules/checks decides {check}");
}

fn count(text: &str, word: &str) -> usize {
    text.matches(word).count()
}

fn table() -> String {
    let (modules, host, rules) = (modules(), read("tests/core_support/broken.rs"), read("tests/checks_rules.rs"));
    let boot = read("l2-guests/vmxtest/src/explained.rs");
    let mut out = String::new();
    let mut section = "";
    for &check in CheckId::ALL {
        if check.section() != section {
            section = check.section();
            write!(out, "\n### {section}\n\n| rule | name | code | broken in tests |\n|---|---|---|---|\n").unwrap();
        }
        let cases = count(&host, &format!("(CheckId::{},", check.name()))
            + count(&rules, &format!(", CheckId::{}),", check.name()));
        let booted = if boot.contains(&format!("\"{}\"", check.name())) { ", boot" } else { "" };
        let tests = if cases == 0 { "-".to_string() } else { format!("host{booted}") };
        writeln!(out, "| {} | `{}` | `{}` | {tests} |", check.text(), check.name(), function(&modules, check)).unwrap();
    }
    out
}

#[test]
fn the_table_of_rules_is_that_of_the_code() {
    let page = read("docs/checks.md");
    let table = table();
    let found = page.split_once(BEGIN).and_then(|(_, rest)| rest.split_once(END)).map(|(table, _)| table.trim());
    assert!(found == Some(table.trim()), "put this between the marks of docs/checks.md:\n{table}");
}

#[test]
fn every_name_that_vmxtest_expects_is_one_of_a_rule_or_an_error() {
    let boot = read("l2-guests/vmxtest/src/explained.rs");
    let errors = read("src/vmx/error.rs");
    let names = boot.split('"').skip(1).step_by(2).filter(|word| word.starts_with(|c: char| c.is_uppercase()));
    let mut known = 0;
    for name in names.filter(|name| name.chars().all(char::is_alphanumeric)) {
        let is_error = errors.contains(&format!("    {name} = ")) || name == "FailInvalid";
        assert!(is_error || CheckId::ALL.iter().any(|check| check.name() == name), "{name}");
        known += 1;
    }
    assert!(known > 80, "{known}");
}
