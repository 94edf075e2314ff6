//! Building and booting what `--l2` names whenever a file changes.

use crate::cli::RunArgs;
use crate::image::{self, Wanted};
use crate::l2::L2;
use crate::l2::build::build;
use crate::session::Session;
use anyhow::{Context, Result};
use notify::{EventKind, RecursiveMode, Watcher};
use nvmx_setup::proc;
use nvmx_setup::ui::Ui;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// Editors write a file in several steps.
const SETTLED: Duration = Duration::from_millis(80);

/// The folders of which a change may make another image.
fn folders(session: &Session, l2: &L2) -> Vec<PathBuf> {
    let guests = session.paths.root.join("l2-guests");
    match l2 {
        L2::Guest(name) => vec![guests.join(name), guests.join("kit"), guests.join("protocol")],
        L2::Project(folder) => vec![folder.clone()],
        L2::File(path) => vec![path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).into()],
        L2::LinuxKvm | L2::Xen => Vec::new(),
    }
}

/// Boots, then again after each change that makes another image or module, until Ctrl-C. What fails is told, and a change may
/// mend it.
///
/// # Errors
/// [`nvmx_setup::error::Stop::Interrupted`], or if files cannot be watched.
pub fn run(
    ui: &Ui,
    args: &RunArgs,
    session: &Session,
    l2: &L2,
    mut boot: impl FnMut(PathBuf) -> Result<()>,
) -> Result<()> {
    let (send, changes) = mpsc::channel();
    let mut watcher = notify::recommended_watcher(send).context("cannot watch files")?;
    for folder in folders(session, l2) {
        let mode = if matches!(l2, L2::File(_)) { RecursiveMode::NonRecursive } else { RecursiveMode::Recursive };
        watcher.watch(&folder, mode).with_context(|| format!("cannot watch {}", folder.display()))?;
    }
    let others: Vec<PathBuf> = args
        .module
        .iter()
        .filter_map(|text| crate::l2::module(text).ok())
        .map(|module| module.path)
        .chain(args.initrd.iter().cloned())
        .collect();
    for file in &others {
        watcher.watch(file, RecursiveMode::NonRecursive).with_context(|| format!("cannot watch {}", file.display()))?;
    }
    let mut last = None;
    loop {
        let result = rebuilt(ui, session, l2).and_then(|image| {
            let state = contents(std::iter::once(&image).chain(&others));
            if last.replace(state) != Some(state) {
                boot(image)?;
            }
            ui.note("watching ...");
            Ok(())
        });
        if let Err(error) = result {
            proc::check_interrupt()?;
            ui.note(&format!("nvmx: {error:#}\nwatching ..."));
        }
        wait(&changes)?;
    }
}

fn rebuilt(ui: &Ui, session: &Session, l2: &L2) -> Result<PathBuf> {
    if let L2::Guest(name) = l2 {
        let lock = session.paths.lock(ui)?;
        image::build(ui, &session.paths, &session.toolchain, &Wanted::Guest(name.clone()))?;
        drop(lock);
    }
    build(ui, session, l2)
}

/// What tells one state of the files from another; a file that is not there is a state too.
fn contents<'a>(files: impl Iterator<Item = &'a PathBuf>) -> u64 {
    let mut hasher = DefaultHasher::new();
    for file in files {
        hasher.write(&std::fs::read(file).unwrap_or_default());
        hasher.write_u8(0xFF);
    }
    hasher.finish()
}

/// Waits for a change of a file that is no product of a build.
fn wait(changes: &mpsc::Receiver<notify::Result<notify::Event>>) -> Result<()> {
    loop {
        match changes.recv_timeout(Duration::from_millis(200)) {
            Ok(Ok(event)) if counts(&event) => break,
            Ok(_) | Err(RecvTimeoutError::Timeout) => proc::check_interrupt()?,
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("files are not watched any more"),
        }
    }
    while changes.recv_timeout(SETTLED).is_ok() {
        proc::check_interrupt()?;
    }
    Ok(())
}

fn counts(event: &notify::Event) -> bool {
    let made = |path: &PathBuf| {
        path.components().any(|part| part.as_os_str() == "target") || path.extension().is_some_and(|e| e == "o")
    };
    !matches!(event.kind, EventKind::Access(_)) && !event.paths.iter().all(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use notify::event::{AccessKind, ModifyKind};

    #[test]
    fn reading_a_file_and_writing_a_product_are_no_changes() {
        let event = |kind, path: &str| notify::Event::new(kind).add_path(path.into());
        let modify = EventKind::Modify(ModifyKind::Any);
        assert!(counts(&event(modify, "/p/main.c")));
        assert!(!counts(&event(modify, "/p/target/x")));
        assert!(!counts(&event(modify, "/p/main.o")));
        assert!(!counts(&event(EventKind::Access(AccessKind::Any), "/p/main.c")));
    }

    #[test]
    fn the_same_bytes_are_the_same_state() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x");
        let none = contents([&file].into_iter());
        std::fs::write(&file, "1").unwrap();
        let one = contents([&file].into_iter());
        std::fs::write(&file, "1").unwrap();
        assert_eq!(contents([&file].into_iter()), one);
        assert_ne!(one, none);
    }
}
