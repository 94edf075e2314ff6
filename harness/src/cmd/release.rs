//! `release`: an archive with which nothing has to be built: the checkout, the host program, all images, Bochs with its source and
//! the patch, and checksums.

use crate::backend::host::L0;
use crate::cli::{L0Args, ReleaseArgs};
use crate::session::Session;
use anyhow::{Context, Result, ensure};
use nvmx_setup::bochs::{self, series::Series};
use nvmx_setup::error::Stop;
use nvmx_setup::output::Output;
use nvmx_setup::paths::Paths;
use nvmx_setup::proc;
use nvmx_setup::release::Release;
use nvmx_setup::ui::Ui;
use std::path::Path;
use std::process::Command;

/// Runs the command.
///
/// # Errors
/// [`Stop::Usage`] if the file cannot be written or the checkout has changes, [`Stop::Environment`] if something cannot be made.
pub fn run(ui: &Ui, args: &ReleaseArgs) -> Result<()> {
    let output = Output::prepare(&args.file)?;
    let sums =
        args.file.with_file_name(format!("{}.sha256", args.file.file_name().unwrap_or_default().to_string_lossy()));
    let sums = Output::prepare(&sums)?;
    let root = &Paths::find()?.root;
    let git = |words: &[&str]| proc::stdout_of(Command::new("git").arg("-C").arg(root).args(words));
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).context("a release is made of a git checkout")?;
    if !changed.trim().is_empty() {
        return Err(
            Stop::Usage(format!("a release is made of a revision, and these files have changes:\n{changed}")).into()
        );
    }
    let l0 = L0Args { l0: L0::Bochs, bochs: None, cpu_model: None, memory: 256, cpus: 1, timeout: None };
    let session = Session::start(ui, &l0)?;
    let step = ui.step("putting the release together");
    let work = tempfile::tempdir()?;
    let name = format!("nvmx-{}", env!("CARGO_PKG_VERSION"));
    let tree = work.path().join(&name);
    std::fs::create_dir(&tree)?;
    let sources = work.path().join("sources.tar");
    git(&["archive", "--format=tar", &format!("--output={}", sources.display()), "HEAD"])?;
    run_well(Command::new("tar").arg("-xf").arg(&sources).arg("-C").arg(&tree))?;
    let folder = tree.join("release");
    let release = Release::in_folder(&folder);
    std::fs::create_dir_all(release.image_folder())?;
    std::fs::create_dir_all(folder.join("bochs"))?;
    let program = folder.join("nvmx-harness");
    std::fs::copy(std::env::current_exe()?, &program)?;
    // Without symbols for debuggers it is a tenth of the size; where there is no strip, it is large.
    let _ = proc::run(Command::new("strip").arg(&program), None, |_| {});
    for (name, image) in
        session.images.guests.iter().map(|(n, p)| (n.as_str(), p)).chain([("nvmx", &session.images.nvmx)])
    {
        std::fs::copy(image, release.image_folder().join(name))?;
    }
    let compiler = &session.toolchain;
    std::fs::write(release.compiler_file(), format!("{}\n{}\n", compiler.text, compiler.version))?;
    std::fs::write(folder.join("revision"), git(&["rev-parse", "HEAD"])?)?;
    std::fs::copy(bochs::built(&session.paths)?, release.bochs())?;
    let tarball = bochs::download(ui, work.path())?;
    std::fs::copy(&tarball, folder.join("bochs").join(tarball.file_name().unwrap_or_default()))?;
    let patch = bochs::patch_of(work.path(), &tarball, &Series::read(root)?)?;
    std::fs::write(folder.join("bochs/nvmx.patch"), patch)?;
    checksums(&folder)?;
    let archive = work.path().join("release.tar.gz");
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0", "-czf"]).arg(&archive);
    run_well(tar.arg("-C").arg(work.path()).arg(&name))?;
    drop(step);
    output.write_bytes(&std::fs::read(&archive)?)?;
    let sum = proc::stdout_of(Command::new("sha256sum").arg(&archive))?;
    let sum = sum.split_whitespace().next().unwrap_or_default().to_string();
    let shown = args.file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    sums.write(&format!("{sum}  {shown}\n"))?;
    ui.line(&format!(
        "{}: unpack it anywhere, `./nvmx run` there builds nothing; its checksum is in {}",
        output.name(),
        sums.name()
    ));
    Ok(())
}

/// `SHA256SUMS` of all files below a folder.
fn checksums(folder: &Path) -> Result<()> {
    let mut find = Command::new("sh");
    find.args(["-c", "find . -type f ! -name SHA256SUMS | LC_ALL=C sort | xargs -d '\\n' sha256sum > SHA256SUMS"]);
    run_well(find.current_dir(folder))
}

fn run_well(command: &mut Command) -> Result<()> {
    let said = proc::run(command, None, |_| {})?;
    ensure!(said.status.success(), "{} failed:\n{}", command.get_program().to_string_lossy(), said.tail(6));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_has_its_checksum_and_a_changed_one_is_found() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("a b")).unwrap();
        std::fs::write(folder.path().join("a b/c"), "1").unwrap();
        std::fs::write(folder.path().join("d"), "2").unwrap();
        checksums(folder.path()).unwrap();
        let check =
            || Command::new("sha256sum").args(["-c", "--quiet", "SHA256SUMS"]).current_dir(folder.path()).output();
        assert!(check().unwrap().status.success());
        let text = std::fs::read_to_string(folder.path().join("SHA256SUMS")).unwrap();
        assert_eq!(text.lines().count(), 2);
        std::fs::write(folder.path().join("d"), "3").unwrap();
        assert!(!check().unwrap().status.success());
    }
}
