//! What uses what among the files of a crate.
//!
//! Read from the text: `use` items with their trees, paths that begin with `crate`, `self` or `super`, and paths through a
//! module that the file declares or imports. Tests inside the files are left out, and so is `main.rs`, which uses everything. A
//! name that a `mod.rs` re-exports counts as the file that has it.

use crate::source::{File, Module};
use std::collections::{BTreeMap, BTreeSet};

/// What uses what, and by which path.
pub type Edges = BTreeMap<(Module, Module), String>;

/// The paths of a use tree: `a::{b, c::{self, d as e}}` has three.
fn leaves(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((before, inside)) = tree.split_once('{') else {
        return vec![tree.split(" as ").next().unwrap().split_whitespace().collect()];
    };
    let inside = inside.trim_end().strip_suffix('}').unwrap_or(inside);
    let mut parts = vec![String::new()];
    let mut depth = 0;
    for c in inside.chars() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        match c {
            ',' if depth == 0 => parts.push(String::new()),
            c => parts.last_mut().unwrap().push(c),
        }
    }
    let before: String = before.split_whitespace().collect();
    let parts = parts.iter().filter(|part| !part.trim().is_empty());
    parts
        .flat_map(|part| leaves(part))
        .map(|leaf| if leaf == "self" { before.trim_end_matches("::").to_string() } else { format!("{before}{leaf}") })
        .collect()
}

/// A word or a path at the beginning of `text`, and what follows.
fn path_at(text: &str) -> &str {
    let mut end = 0;
    loop {
        let word = text[end..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').count();
        if word == 0 {
            return text[..end].trim_end_matches(':');
        }
        end += word;
        if !text[end..].starts_with("::") {
            return &text[..end];
        }
        end += 2;
    }
}

/// The `use` items of a file, with "re-exports" or not, and every other path in it.
fn paths(text: &str) -> (Vec<(bool, String)>, Vec<String>) {
    let (mut uses, mut others) = (Vec::new(), Vec::new());
    let mut at = 0;
    let mut public = false;
    while at < text.len() {
        let rest = &text[at..];
        let path = path_at(rest);
        match path {
            "" => {
                let c = rest.chars().next().unwrap();
                if matches!(c, ';' | '{' | '}') {
                    public = false;
                }
                at += c.len_utf8();
            }
            "use" => {
                let tree = rest[3..].split(';').next().unwrap();
                uses.extend(leaves(tree).into_iter().map(|leaf| (public, leaf)));
                at += 3 + tree.len();
                public = false;
            }
            _ => {
                public |= path == "pub";
                if path.contains("::") {
                    others.push(path.to_string());
                }
                at += path.len();
            }
        }
    }
    (uses, others)
}

/// The path from the root of the crate, if it leads into the crate.
fn absolute(path: &str, module: &Module, modules: &BTreeSet<Module>) -> Option<Module> {
    let mut words: Vec<&str> = path.split("::").collect();
    let mut from = module.clone();
    match words.first().copied()? {
        "crate" => {
            from.clear();
            words.remove(0);
        }
        "self" => drop(words.remove(0)),
        "super" => {
            while words.first() == Some(&"super") {
                from.pop();
                words.remove(0);
            }
        }
        // A module that the file declares.
        first => {
            from.push(first.to_string());
            if !modules.contains(&from) {
                return None;
            }
            from.pop();
        }
    }
    from.extend(words.into_iter().map(str::to_string));
    Some(from)
}

/// The uses of these files among each other.
pub fn edges(files: &[File]) -> Edges {
    let modules: BTreeSet<Module> = files.iter().map(|file| file.module.clone()).collect();
    let mut exported: BTreeMap<Module, Module> = BTreeMap::new();
    let mut used = Vec::new();
    for file in files {
        let (uses, others) = paths(&file.text);
        for (public, path) in uses {
            let Some(to) = absolute(&path, &file.module, &modules) else { continue };
            if public {
                let name = to.last().cloned().unwrap_or_default();
                exported.insert([file.module.clone(), vec![name]].concat(), to);
            } else {
                used.push((file.module.clone(), to, path));
            }
        }
        for path in others {
            if let Some(to) = absolute(&path, &file.module, &modules) {
                used.push((file.module.clone(), to, path));
            }
        }
    }
    let home = |mut path: Module| {
        for _ in 0..8 {
            let found = (0..=path.len()).rev().find(|n| exported.contains_key(&path[..*n]));
            let Some(n) = found else { break };
            path = [exported[&path[..n]].clone(), path[n..].to_vec()].concat();
        }
        while !modules.contains(&path) {
            path.pop()?;
        }
        Some(path)
    };
    let mut edges = Edges::new();
    for (from, to, path) in used {
        match home(to) {
            Some(to) if to != from => drop(edges.entry((from, to)).or_insert(path)),
            _ => {}
        }
    }
    edges
}

/// The folder of a module, or the file at the top.
fn top(module: &Module) -> &str {
    module.first().map_or("lib", String::as_str)
}

/// The uses that go against the order.
pub fn upward(edges: &Edges, order: &[&str]) -> Vec<String> {
    let place = |module: &Module| {
        let top = top(module);
        order.iter().position(|name| *name == top).unwrap_or_else(|| panic!("{top} has no place in the order"))
    };
    let wrong = edges.iter().filter(|((from, to), _)| place(from) < place(to));
    wrong.map(|((from, to), path)| format!("{} uses {} ({path})", from.join("::"), to.join("::"))).collect()
}

/// The circles inside a folder, as sets of files.
pub fn circles(edges: &Edges) -> Vec<BTreeSet<Module>> {
    let mut reach: BTreeMap<&Module, BTreeSet<&Module>> = BTreeMap::new();
    for (from, to) in edges.keys().filter(|(from, to)| top(from) == top(to)) {
        reach.entry(from).or_default().insert(to);
    }
    loop {
        let mut grew = false;
        for from in reach.keys().copied().collect::<Vec<_>>() {
            let further: BTreeSet<&Module> =
                reach[from].iter().filter_map(|via| reach.get(*via)).flatten().copied().collect();
            let all = reach.get_mut(from).unwrap();
            let before = all.len();
            all.extend(further);
            grew |= all.len() > before;
        }
        if !grew {
            break;
        }
    }
    let leads = |from: &Module, to: &Module| reach.get(from).is_some_and(|all| all.contains(to));
    let inside = reach.keys().filter(|module| leads(module, module));
    let circle =
        |module: &Module| reach[module].iter().filter(|to| leads(to, module)).map(|to| (*to).clone()).collect();
    inside.map(|module| circle(module)).collect::<BTreeSet<BTreeSet<Module>>>().into_iter().collect()
}
