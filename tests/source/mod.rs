//! The files of a crate as text.

use std::fs;
use std::path::Path;

/// A path of names from the root of a crate.
pub type Module = Vec<String>;

/// One file: its module, and its text without comments, strings and tests.
pub struct File {
    /// Its module
    pub module: Module,
    /// Its code
    pub text: String,
}

/// The files of a folder.
pub fn files(source: &str) -> Vec<File> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
    let mut found = Vec::new();
    let mut folders = vec![source.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let place = path.strip_prefix(&source).unwrap().with_extension("");
            let mut module: Module = place.iter().map(|part| part.to_str().unwrap().to_string()).collect();
            if path.extension().is_none_or(|extension| extension != "rs") || module == ["main"] {
                continue;
            }
            if module.last().is_some_and(|last| last == "mod") {
                module.pop();
            }
            // A file of tests alone.
            if module.last().is_some_and(|last| last == "tests") {
                continue;
            }
            if module == ["lib"] {
                module.clear();
            }
            found.push(File { module, text: code(&fs::read_to_string(&path).unwrap()) });
        }
    }
    found
}

/// The text without comments, strings and the tests at its end.
pub fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let mut kept = String::new();
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '/' if rest.peek() == Some(&'/') => {
                rest.by_ref().take_while(|c| *c != '\n').for_each(drop);
                kept.push('\n');
            }
            '"' => {
                while let Some(c) = rest.next() {
                    match c {
                        '\\' => drop(rest.next()),
                        '"' => break,
                        _ => {}
                    }
                }
                kept.push_str("\"\"");
            }
            // A character, which may be a quotation mark; a lifetime has no second one.
            '\'' => {
                let ahead: Vec<char> = rest.clone().take(2).collect();
                if ahead.first() == Some(&'\\') {
                    rest.by_ref().take(2).for_each(drop);
                    rest.by_ref().take_while(|c| *c != '\'').for_each(drop);
                } else if ahead.get(1) == Some(&'\'') {
                    rest.by_ref().take(2).for_each(drop);
                }
            }
            c => kept.push(c),
        }
    }
    kept
}
