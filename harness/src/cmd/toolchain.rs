//! `toolchain`: how to call the compilers by hand, for editors and CI.

use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::paths::Paths;
use nvmx_setup::toolchain::{self, Compiler};
use nvmx_setup::ui::Ui;
use std::path::Path;

/// Runs the command.
///
/// # Errors
/// [`Stop::Environment`] if there is no compiler.
pub fn run(ui: &Ui) -> Result<()> {
    let paths = Paths::find()?;
    let host = Compiler::of_host().ok_or_else(|| Stop::environment("no cargo and rustc for the host"))?;
    let lock = paths.lock(ui)?;
    let image = toolchain::set_up(ui, &paths)?;
    drop(lock);
    let say = |name: &str, value: &Path| ui.line(&format!("{name}={}", quoted(&value.to_string_lossy())));
    say("HOST_CARGO", &host.cargo);
    say("HOST_RUSTC", &host.rustc);
    say("IMAGE_CARGO", &image.cargo);
    say("IMAGE_RUSTC", &image.rustc);
    say("IMAGE_SYSROOT", &image.sysroot()?);
    say("IMAGE_LINKER", image.linker.as_deref().unwrap_or(Path::new("")));
    say("IMAGE_TARGET", Path::new(toolchain::TARGET));
    Ok(())
}

/// A word for sh.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_blanks_and_quotes_stays_one_word() {
        assert_eq!(quoted("/a b"), "'/a b'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }
}
