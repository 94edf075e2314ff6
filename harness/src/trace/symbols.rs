//! Names for addresses: the functions and labels of the images of a boot.

use object::{Object, ObjectSection, ObjectSymbol, SectionKind, SymbolKind};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A label without a size names addresses up to this far after it.
const NEAR: u64 = 1 << 16;

/// The code of one image, by address.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Symbols {
    /// The level whose hypervisor it is
    pub level: u8,
    /// The file's name
    pub image: String,
    /// Address, size (0: a label), name; by address
    list: Vec<(u64, u64, String)>,
}

impl Symbols {
    /// Those of a file; none if it has none.
    pub fn read(level: u8, path: &Path) -> Self {
        let image = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let data = std::fs::read(path).unwrap_or_default();
        Symbols { level, image, list: object::File::parse(&*data).map(|elf| code(&elf)).unwrap_or_default() }
    }

    /// The function at an address, or the nearest label before it.
    pub fn name(&self, address: u64) -> Option<String> {
        let end = self.list.partition_point(|(at, _, _)| *at <= address);
        let before = &self.list[..end];
        // Functions do not overlap but for those that were folded into one: the last that covers the address.
        let covers = |(at, size, _): &&(u64, u64, String)| address - at < *size;
        let near = |(at, size, _): &&(u64, u64, String)| *size == 0 && address - at < NEAR;
        let found = before.iter().rev().take(16).find(covers).or_else(|| before.iter().rev().take(16).find(near))?;
        let offset = address - found.0;
        Some(if offset == 0 { found.2.clone() } else { format!("{}+{offset:#x}", found.2) })
    }
}

fn code(elf: &object::File<'_>) -> Vec<(u64, u64, String)> {
    let executable = |symbol: &object::Symbol<'_, '_>| {
        let section = symbol.section_index().and_then(|index| elf.section_by_index(index).ok());
        section.is_some_and(|s| s.kind() == SectionKind::Text)
    };
    let named = |symbol: object::Symbol<'_, '_>| {
        let name = symbol.name().ok()?;
        let kind = matches!(symbol.kind(), SymbolKind::Text | SymbolKind::Label | SymbolKind::Unknown);
        // No local label of a compiler.
        let word = !name.is_empty() && !name.starts_with(['.', '$']) && !name.starts_with("L");
        (kind && word && executable(&symbol)).then(|| (symbol.address(), symbol.size(), plain(name)))
    };
    let mut list: Vec<_> = elf.symbols().filter_map(named).collect();
    list.sort();
    list.dedup_by(|a, b| (a.0, a.1) == (b.0, b.1));
    list
}

/// Without the compiler's hash and without paths of types.
fn plain(name: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_named_by_the_function_that_covers_it_or_a_label_before_it() {
        let list = vec![(0x100, 0, "entry".into()), (0x200, 0x10, "main".into()), (0x300, 0, "stub".into())];
        let symbols = Symbols { list, ..Symbols::default() };
        let name = |address| symbols.name(address);
        assert_eq!(name(0x204).as_deref(), Some("main+0x4"));
        assert_eq!(name(0x200).as_deref(), Some("main"));
        assert_eq!(name(0x220).as_deref(), Some("entry+0x120"));
        assert_eq!(name(0x30F).as_deref(), Some("stub+0xf"));
        assert_eq!(name(0xFF), None);
        assert_eq!(name(0x300 + NEAR), None);
    }
}
