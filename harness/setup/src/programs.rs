//! Programs for a Linux that has nothing else: out of unpacked packages, with the libraries that they ask for.

use crate::proc;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the ABI says that a program finds its loader.
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
/// Where packages have libraries.
const LIBRARIES: [&str; 3] =
    ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/pulseaudio"];

/// Takes programs, by their paths in the packages, and what they need out of the unpacked packages: to `bin/`, `lib/` and
/// `lib64/` of the folder `output`. `extra` are libraries that a program asks for only while it runs.
///
/// # Errors
/// What no package brought.
pub fn collect(tree: &Path, programs: &[&str], extra: &[&str], output: &Path) -> Result<()> {
    for folder in ["bin", "lib", "lib64"] {
        std::fs::create_dir_all(output.join(folder))?;
    }
    let copy = |from: &Path, to: &str| -> Result<()> {
        std::fs::copy(from, output.join(to)).with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(())
    };
    let in_tree = |name: &str| -> Option<PathBuf> {
        LIBRARIES.into_iter().map(|l| tree.join(l).join(name)).find(|p| p.is_file())
    };
    // A link in the packages would lead out of the tree.
    let loader = LOADER.rsplit('/').next().and_then(in_tree).context("the packages have no loader for programs")?;
    copy(&loader, LOADER)?;
    for name in extra {
        copy(&in_tree(name).with_context(|| format!("no package brought {name}"))?, &format!("lib/{name}"))?;
    }
    let path = LIBRARIES.map(|l| tree.join(l).display().to_string()).join(":");
    for program in programs {
        let name = program.rsplit('/').next().unwrap_or(program);
        copy(&tree.join(program), &format!("bin/{name}"))?;
        // The loader itself says what the program will ask for.
        let mut list = Command::new(&loader);
        let said = proc::stdout_of(list.args(["--library-path", &path, "--list"]).arg(tree.join(program)))?;
        for (library, place) in libraries(&said) {
            ensure!(place.starts_with('/'), "{name} asks for {library}, which no package brought");
            copy(Path::new(place), &format!("lib/{library}"))?;
        }
    }
    Ok(())
}

/// Names and places of libraries in what the loader says. A name with a folder is the loader's own.
fn libraries(said: &str) -> impl Iterator<Item = (&str, &str)> {
    let pairs = said.lines().filter_map(|line| line.trim().split_once(" => "));
    pairs.filter(|(name, _)| !name.contains('/')).map(|(name, place)| (name, place.split(" (").next().unwrap_or(place)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_list_is_read_without_the_loader_and_the_kernels_own() {
        let said = "\tlinux-vdso.so.1 (0x7ff)\n\tlibz.so.1 => /t/lib/libz.so.1 (0x7f)\n\tlibq.so => not found\n\
                    \t/lib64/ld-linux-x86-64.so.2 => /t/ld.so (0x7f)\n";
        assert_eq!(libraries(said).collect::<Vec<_>>(), [("libz.so.1", "/t/lib/libz.so.1"), ("libq.so", "not found")]);
    }

    #[test]
    fn packages_without_a_loader_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = collect(folder.path(), &["bin/x"], &[], &folder.path().join("out")).unwrap_err();
        assert_eq!(error.to_string(), "the packages have no loader for programs");
    }
}
