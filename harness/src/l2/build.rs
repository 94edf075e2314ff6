//! Building what `--l2` names.

use super::L2;
use crate::image;
use crate::session::Session;
use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::proc;
use nvmx_setup::toolchain::TARGET;
use nvmx_setup::ui::Ui;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What `make` makes in a project's folder.
pub const IMAGE: &str = "l2.elf";

/// The image: built if there is something to build.
///
/// # Errors
/// [`Stop::Guest`] with the compiler's last lines if it does not build.
pub fn build(ui: &Ui, session: &Session, l2: &L2) -> Result<PathBuf> {
    match l2 {
        L2::File(path) => Ok(std::path::absolute(path)?),
        L2::Guest(name) => Ok(session.images.guest(name)?.to_path_buf()),
        L2::Project(folder) => project(ui, session, &folder.canonicalize()?),
        L2::LinuxKvm | L2::Xen => Err(Stop::Usage("this L2 is not built".into()).into()),
    }
}

/// Builds by `make` where there is a Makefile, else by cargo.
fn project(ui: &Ui, session: &Session, folder: &Path) -> Result<PathBuf> {
    let has = |name: &str| folder.join(name).is_file();
    let step = ui.step(&format!("building {}", folder.display()));
    let image = if ["GNUmakefile", "makefile", "Makefile"].into_iter().any(has) {
        let make = nvmx_setup::program("make").ok_or_else(|| Stop::environment("make is missing (package make)"))?;
        built(ui, Command::new(make).arg("--no-print-directory").current_dir(folder))?;
        let image = folder.join(IMAGE);
        if !image.is_file() {
            let text = format!("make in {} succeeded but made no {IMAGE}", folder.display());
            return Err(Stop::Usage(text).into());
        }
        image
    } else if has("Cargo.toml") {
        let mut cargo = image::command(&session.toolchain, folder, &folder.join("target"));
        cargo.current_dir(folder).args(["build", "--release", "--target", TARGET]);
        cargo.arg("--message-format=json-render-diagnostics");
        let text = built(ui, &mut cargo)?;
        text.lines().filter_map(executable).next_back().ok_or_else(|| {
            Stop::Usage(format!("{} has no program for the bare machine: cargo built none", folder.display()))
        })?
    } else {
        let text = format!("{} has neither a Makefile nor a Cargo.toml", folder.display());
        return Err(Stop::Usage(text).into());
    };
    drop(step);
    Ok(image)
}

fn built(ui: &Ui, command: &mut Command) -> Result<String> {
    let said = proc::run(command, None, |_| {})?;
    let for_people = |line: &&str| !line.starts_with('{');
    let lines: Vec<&str> = said.text.lines().filter(for_people).collect();
    if said.status.success() {
        ui.detail(&lines.join("\n"));
        return Ok(said.text);
    }
    let from = lines.len().saturating_sub(40);
    Err(Stop::Guest(format!("L2 did not build:\n{}", lines[from..].join("\n"))).into())
}

/// The program that a line of cargo's tells of.
fn executable(line: &str) -> Option<PathBuf> {
    let value: serde_json::Value = serde_json::from_str(line).ok()?;
    value.get("executable")?.as_str().map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_program_that_cargo_names_is_the_image() {
        let text = concat!(
            "   Compiling x\n{\"reason\":\"compiler-artifact\",\"executable\":null}\n",
            "{\"reason\":\"compiler-artifact\",\"executable\":\"/t/l2\"}\n{\"reason\":\"build-finished\"}\n"
        );
        assert_eq!(text.lines().filter_map(executable).next_back(), Some(PathBuf::from("/t/l2")));
    }
}
