//! A guest hypervisor to begin with.

use crate::cli::Language;
use anyhow::{Context, Result};
use nvmx_setup::error::Stop;
use std::path::Path;

/// A file of a template; one that ends in `.in` has places to fill in.
type File = (&'static str, &'static str);

const C: [File; 4] = [
    ("Makefile", include_str!("../../templates/l2-c/Makefile")),
    ("boot.S", include_str!("../../templates/l2-c/boot.S")),
    ("l2.c", include_str!("../../templates/l2-c/l2.c")),
    ("link.ld", include_str!("../../templates/l2-c/link.ld")),
];
const RUST: [File; 3] = [
    ("Cargo.toml", include_str!("../../templates/l2-rust/Cargo.toml.in")),
    ("build.rs", include_str!("../../templates/l2-rust/build.rs.in")),
    ("src/main.rs", include_str!("../../templates/l2-rust/src/main.rs")),
];

/// Writes the template.
///
/// # Errors
/// [`Stop::Usage`] if the folder has something in it already.
pub fn write(folder: &Path, language: Language, root: &Path) -> Result<()> {
    let filled = std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
    if filled || folder.is_file() {
        return Err(Stop::Usage(format!("{} is there already and not empty", folder.display())).into());
    }
    let kit = root.join("l2-guests/kit");
    // In TOML and Rust alike.
    let kit = kit.to_string_lossy().replace('\\', "\\\\").replace('"', "\\\"");
    let files: &[File] = if language == Language::C { &C } else { &RUST };
    for (name, text) in files {
        let path = folder.join(name);
        let problem = || format!("cannot write {}", path.display());
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(problem)?;
        }
        std::fs::write(&path, text.replace("@KIT@", &kit)).with_context(problem)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_folder_with_something_in_it_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("mine"), "x").unwrap();
        let error = write(folder.path(), Language::C, Path::new("/r")).unwrap_err();
        assert!(error.to_string().contains("not empty"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn no_place_is_left_to_fill_in() {
        for language in [Language::C, Language::Rust] {
            let folder = tempfile::tempdir().unwrap();
            write(&folder.path().join("new"), language, Path::new("/a \"b\"")).unwrap();
            for name in ["Makefile", "l2.c", "Cargo.toml", "build.rs", "src/main.rs"] {
                let text = std::fs::read_to_string(folder.path().join("new").join(name)).unwrap_or_default();
                assert!(!text.contains("@KIT@"), "{name}");
            }
        }
    }

    #[test]
    fn the_template_in_c_builds_and_can_boot() {
        if nvmx_setup::program("make").is_none() || nvmx_setup::program("cc").is_none() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), Language::C, Path::new("/r")).unwrap();
        let out = Command::new("make").current_dir(folder.path()).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let image = folder.path().join(crate::l2::build::IMAGE);
        assert_eq!(crate::l2::protocol(&image).unwrap(), crate::backend::Protocol::Multiboot1);
    }
}
