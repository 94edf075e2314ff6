//! The source of Bochs, from the distribution's archive.

use crate::error::Stop;
use crate::ui::Ui;
use crate::{apt, proc, sources};
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Fetches the source into a folder of `work` by apt, from the archive that the machine uses anyway: apt checks signature, size and digest.
///
/// # Errors
/// [`Stop::Environment`] if it cannot be had.
pub fn download(ui: &Ui, work: &Path) -> Result<PathBuf> {
    if apt::Power::find() == apt::Power::None {
        return Err(
            Stop::environment("Bochs 3.0 is built from Debian's source package, and there is no apt here").into()
        );
    }
    let (id, codename) = sources::distribution()?;
    let entries = sources::of_machine(Path::new("/etc/apt"));
    let archive = sources::main_archive(&entries, &codename)
        .ok_or_else(|| Stop::environment("apt has no archive with the component main"))?;
    let mut step = ui.step("fetching the source of Bochs 3.0");
    let mut last = String::new();
    for (suite, component) in suites(&id) {
        let tree = work.join(format!("apt-{suite}"));
        for folder in ["lists/partial", "cache/archives/partial", "sources.list.d", "download"] {
            std::fs::create_dir_all(tree.join(folder))?;
        }
        let paragraph = sources::source_paragraph(archive, suite, component);
        std::fs::write(tree.join("sources.list.d/nvmx.sources"), paragraph)?;
        let apt = |args: &[&str]| {
            let mut command = Command::new("apt-get");
            for (key, value) in
                [("Dir::State::lists", "lists"), ("Dir::Cache", "cache"), ("Dir::Etc::sourceparts", "sources.list.d")]
            {
                command.arg("-o").arg(format!("{key}={}", tree.join(value).display()));
            }
            // Without this apt, when root, drops to a user who may not enter the cache folder.
            command.args(["-o", "APT::Sandbox::User=root", "-o", "Dir::Etc::sourcelist=/dev/null"]);
            command.args(args).current_dir(tree.join("download")).env("LC_ALL", "C.UTF-8");
            command
        };
        let updated = proc::run(&mut apt(&["update"]), None, |line| step.at(line))?;
        let mut fetch = apt(&["source", "--download-only", "--tar-only", "bochs"]);
        let fetched = proc::run(&mut fetch, None, |line| step.at(line))?;
        if let Some(tarball) = tarball_in(&tree.join("download")) {
            if fetched.status.success() {
                drop(step);
                return Ok(tarball);
            }
        }
        last = format!("{}\n{}", updated.text, fetched.text);
    }
    Err(apt::not_fetched("the source of Bochs 3.0", last.trim(), &[]).into())
}

/// Releases whose archive has Bochs 3.0.
fn suites(id: &str) -> &'static [(&'static str, &'static str)] {
    if id == "ubuntu" { &[("questing", "universe"), ("resolute", "universe")] } else { &[("trixie", "main")] }
}

fn tarball_in(folder: &Path) -> Option<PathBuf> {
    let is_it = |name: &str| name.starts_with("bochs_3.0") && name.contains(".orig.tar.") && !name.ends_with(".asc");
    let files = std::fs::read_dir(folder).ok()?.flatten();
    files.map(|e| e.path()).find(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(is_it))
}
