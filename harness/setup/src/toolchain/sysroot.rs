//! A sysroot for the bare-metal target, made of the distribution's compiler and the sources of core beside it.
//!
//! The libraries are tied to the exact compiler, so the folder's name carries a digest of `rustc -vV`.

use super::{Compiler, TARGET, Toolchain, clean};
use crate::error::Stop;
use crate::paths::Paths;
use crate::proc;
use crate::ui::Ui;
use anyhow::{Context, Result};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Changes when what is inside changes.
const LAYOUT: u32 = 1;

/// Where the sysroot of a compiler is or will be.
pub fn folder(paths: &Paths, compiler: &Compiler) -> PathBuf {
    let mut digest = DefaultHasher::new();
    (LAYOUT, &compiler.rustc, &compiler.verbose).hash(&mut digest);
    paths.cache.join(format!("sysroot-{}-{:016x}", compiler.release(), digest.finish()))
}

/// Its libraries for the target.
pub fn libraries(folder: &Path) -> PathBuf {
    folder.join("lib/rustlib").join(TARGET).join("lib")
}

/// The toolchain that uses it.
pub fn toolchain(compiler: &Compiler, folder: &Path) -> Toolchain {
    Toolchain {
        cargo: compiler.cargo.clone(),
        rustc: folder.join("bin/rustc"),
        linker: None,
        text: format!("{} {} with a sysroot made from its sources", compiler.rustc.display(), compiler.release()),
        version: compiler.version(),
    }
}

/// Builds core and alloc and lays them out as a toolchain folder.
///
/// # Errors
/// If the build fails (its last lines are in the error), or after Ctrl-C.
pub fn build(ui: &Ui, paths: &Paths, compiler: &Compiler) -> Result<PathBuf> {
    let folder = folder(paths, compiler);
    let mut step = ui.step("building core for the bare machine");
    let work = tempfile::Builder::new().prefix("sysroot-").tempdir_in(&paths.cache)?;
    let (package, output) = (work.path().join("package"), work.path().join("output"));
    std::fs::create_dir_all(package.join("src"))?;
    let manifest = "[package]\nname = \"seed\"\nversion = \"0.0.0\"\nedition = \"2021\"\n[workspace]\n\
                    [profile.release]\npanic = \"abort\"\n";
    std::fs::write(package.join("Cargo.toml"), manifest)?;
    std::fs::write(package.join("src/lib.rs"), "#![no_std]\n")?;
    let mut cargo = Command::new(&compiler.cargo);
    clean(&mut cargo)
        .current_dir(&package)
        .env("RUSTC", &compiler.rustc)
        // A released compiler builds core only when told that it may.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_DIR", work.path().join("target"))
        .args(["build", "--release", "--target", TARGET, "-Zbuild-std=core,alloc,compiler_builtins"])
        .arg("-Zbuild-std-features=compiler-builtins-mem");
    let said = proc::run(&mut cargo, None, |line| step.at(line))?;
    if !said.status.success() {
        let text = format!("core for {TARGET} did not build:\n{}", said.tail(15));
        return Err(Stop::environment(text).into());
    }
    let libraries = libraries(&output);
    std::fs::create_dir_all(&libraries)?;
    let built = work.path().join("target").join(TARGET).join("release/deps");
    for entry in std::fs::read_dir(&built).context("the build left nothing behind")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let library = name.ends_with(".rlib") || name.ends_with(".rmeta");
        if library && !name.starts_with("libseed-") {
            std::fs::copy(entry.path(), libraries.join(name))?;
        }
    }
    lay_out(&output, compiler)?;
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::rename(&output, &folder).context("cannot move the sysroot to its place")?;
    step.done(&format!("core for {TARGET} is built"));
    Ok(folder)
}

/// The rest of a toolchain folder: the host's libraries, for build scripts, and a rustc that knows where it is.
fn lay_out(output: &Path, compiler: &Compiler) -> Result<()> {
    let host = compiler.print("sysroot", None)?.join("lib/rustlib").join(compiler.host());
    symlink(&host, output.join("lib/rustlib").join(compiler.host()))?;
    let bin = output.join("bin");
    std::fs::create_dir_all(&bin)?;
    let wrapper = format!(
        "#!/bin/sh\nhere=$(dirname -- \"$(readlink -f -- \"$0\")\")\nexec '{}' --sysroot \"$here/..\" \"$@\"\n",
        compiler.rustc.display()
    );
    std::fs::write(bin.join("rustc"), wrapper)?;
    std::fs::set_permissions(bin.join("rustc"), std::fs::Permissions::from_mode(0o755))?;
    symlink(&compiler.cargo, bin.join("cargo"))?;
    Ok(())
}
