//! `run --gdb`: one boot that a debugger steers. The emulator's stub knows the processor, `harness/gdb/nvmx.py` the levels.

use crate::backend::Spec;
use crate::backend::host::L0;
use crate::boot;
use crate::cli::RunArgs;
use crate::cmd::own;
use crate::image::Wanted;
use crate::l2::{self, L2};
use crate::session::{HOST_MODEL, Session};
use crate::transcript::view::{Show, View};
use anyhow::{Context, Result};
use nvmx_setup as setup;
use nvmx_setup::error::Stop;
use nvmx_setup::ui::Ui;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A person thinks as long as it takes.
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Runs the command.
///
/// # Errors
/// [`Stop::Usage`] if there is no stub for this machine.
pub fn run(ui: &Ui, args: &RunArgs, l2: &L2, level: u8) -> Result<()> {
    if matches!(l2, L2::LinuxKvm | L2::Xen) || args.l0.l0 == L0::KvmInBochs || args.l0.cpus > 1 {
        let text = "--gdb works on one CPU, with --l0 bochs or kvm, for guests of ours and images of your own";
        return Err(Stop::Usage(text.into()).into());
    }
    let first = if args.bare { 2 } else { 1 };
    if !(first..=3).contains(&level) {
        return Err(Stop::Usage(format!("--gdb L{level}: on this machine there are L{first} to L3")).into());
    }
    let wanted = if let L2::Guest(name) = l2 { Wanted::Guest(name.clone()) } else { Wanted::Nvmx };
    let session = Session::start_with(ui, &args.l0, &wanted)?.explaining(args.explain);
    let spec = spec(ui, args, &session, l2)?;
    // Free now; whoever takes it before the emulator does makes the emulator end with a word.
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let spec = Spec { gdb: Some(port), timeout: args.l0.timeout.unwrap_or(DAY), ..spec };
    let emulated = session.machine.model != HOST_MODEL;
    let file = session.paths.target.join("nvmx/debug.gdb");
    let symbols: Vec<PathBuf> = std::iter::once(&spec.kernel).chain(&spec.modules).map(|p| p.path.clone()).collect();
    let script = session.paths.root.join("harness/gdb/nvmx.py");
    std::fs::write(&file, commands(&symbols, port, emulated.then_some((&*script, level, args.bare))))
        .with_context(|| format!("cannot write {}", file.display()))?;
    let show = |backend: &dyn crate::backend::Backend| {
        ui.line(&format!("{} waits at port {port}. In another terminal: gdb -q -x {}", spec.name, file.display()));
        boot::boot(&session.paths, backend, &spec, &View::new(ui, Show::Guest))
    };
    let outcome = if emulated {
        let lock = session.paths.lock(ui)?;
        let bochs = setup::bochs::set_up_gdb(ui, &session.paths)?;
        drop(lock);
        show(&bochs)?
    } else {
        show(session.backend.as_ref())?
    };
    ui.line(&format!("{}: the machine has ended ({:.1} s)", outcome.name, outcome.took.as_secs_f64()));
    Ok(())
}

/// The one boot.
fn spec(ui: &Ui, args: &RunArgs, session: &Session, l2: &L2) -> Result<Spec> {
    let image = l2::build::build(ui, session, l2)?;
    let image = own::looked_at(image, l2, &own::modules(args)?, args)?;
    let bare = own::alone(session, args, &image)?;
    if args.bare { Ok(bare) } else { own::under(session, &bare, args, &image) }
}

/// What gdb is to do first: symbols of all images, the stub, and in an emulator the levels.
fn commands(images: &[PathBuf], port: u16, levels: Option<(&Path, u8, bool)>) -> String {
    let mut lines = vec![
        "set pagination off".to_string(),
        "set confirm off".into(),
        // An emulated machine answers when its instruction is over.
        "set tcp connect-timeout 60".into(),
        "set remotetimeout 120".into(),
        "set architecture i386:x86-64".into(),
    ];
    let elf = |path: &&PathBuf| std::fs::read(path).is_ok_and(|image| image.starts_with(b"\x7FELF"));
    for (n, image) in images.iter().filter(elf).enumerate() {
        let command = if n == 0 { "file" } else { "add-symbol-file" };
        lines.push(format!("{command} \"{}\"", image.display()));
    }
    if let Some((script, _, _)) = levels {
        lines.push(format!("source {}", script.display()));
    }
    lines.push(format!("target remote 127.0.0.1:{port}"));
    if let Some((_, level, bare)) = levels {
        lines.push(format!("nvmx levels {}", if bare { "bare" } else { "nvmx" }));
        lines.push(format!("nvmx stop L{level}"));
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walks_and_levels_are_right_on_a_machine_in_a_dictionary() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/gdb/test_nvmx.py");
        let Some(python) = nvmx_setup::program("python3") else { return eprintln!("skipped: there is no python3") };
        let said = std::process::Command::new(python).args(["-B", file]).output().unwrap();
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    }

    #[test]
    fn gdb_is_told_images_port_and_level() {
        let folder = tempfile::tempdir().unwrap();
        let images: Vec<PathBuf> = ["nvmx", "l2", "disk"].map(|name| folder.path().join(name)).to_vec();
        std::fs::write(&images[0], b"\x7FELF").unwrap();
        std::fs::write(&images[1], b"\x7FELF").unwrap();
        std::fs::write(&images[2], b"other").unwrap();
        let text = commands(&images, 1234, Some((Path::new("/s.py"), 3, false)));
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.iter().any(|line| line.starts_with("file \"") && line.ends_with("nvmx\"")), "{text}");
        assert!(lines.iter().any(|line| line.starts_with("add-symbol-file \"") && line.ends_with("l2\"")), "{text}");
        assert!(!text.contains("disk"));
        let end = ["source /s.py", "target remote 127.0.0.1:1234", "nvmx levels nvmx", "nvmx stop L3"];
        assert_eq!(lines[lines.len() - 4..], end);
        assert!(commands(&images, 1, None).ends_with("target remote 127.0.0.1:1\n"));
    }
}
