//! `new l2 DIR`: a guest hypervisor to begin with, outside of the workspace.

use crate::cli::NewArgs;
use crate::l2::template;
use anyhow::Result;
use nvmx_setup::paths::Paths;
use nvmx_setup::ui::Ui;
use std::path::Path;

/// Runs the command.
///
/// # Errors
/// [`nvmx_setup::error::Stop::Usage`] if the folder has something in it already.
pub fn run(ui: &Ui, args: &NewArgs) -> Result<()> {
    template::write(&args.folder, args.lang, &Paths::find()?.root)?;
    ui.line(&format!("{} is there. Build it, boot it alone and under nvmx:", args.folder.display()));
    ui.line(&format!("  ./nvmx run --l2 {}", path_word(&args.folder)));
    ui.line("What to do next: docs/l2-guide.md");
    Ok(())
}

/// As `--l2` wants it: a path has a `/`.
fn path_word(folder: &Path) -> String {
    let text = folder.display().to_string();
    if text.contains('/') { text } else { format!("./{text}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_a_path_for_l2() {
        assert_eq!(path_word(Path::new("x")), "./x");
        assert_eq!(path_word(Path::new("a/x")), "a/x");
    }
}
