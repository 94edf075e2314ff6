//! Building the images: nvmx and the guests of `l2-guests/`, and a look at what came out.

use anyhow::{Context, Result, ensure};
use nvmx_setup::error::Stop;
use nvmx_setup::paths::Paths;
use nvmx_setup::proc;
use nvmx_setup::release::Release;
use nvmx_setup::toolchain::{TARGET, Toolchain, clean, sysroot};
use nvmx_setup::ui::Ui;
use object::{Object, ObjectSegment, ObjectSymbol};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The images of one build.
#[derive(Clone, Debug)]
pub struct Images {
    /// nvmx
    pub nvmx: PathBuf,
    /// The guests by name
    pub guests: BTreeMap<String, PathBuf>,
    /// Where any guest would be, if none was built
    unbuilt: Option<PathBuf>,
}

impl Images {
    /// nvmx, and no guest yet.
    pub fn only(nvmx: PathBuf) -> Self {
        Images { nvmx, guests: BTreeMap::new(), unbuilt: None }
    }

    /// Every image, none of which is there.
    pub fn unbuilt(nowhere: &Path) -> Self {
        Images { nvmx: nowhere.to_path_buf(), guests: BTreeMap::new(), unbuilt: Some(nowhere.to_path_buf()) }
    }

    /// Those of a release.
    ///
    /// # Errors
    /// [`Stop::Usage`] if it has no such guest.
    pub fn released(release: &Release, wanted: &Wanted) -> Result<Self> {
        let folder = release.image_folder();
        let entries = std::fs::read_dir(&folder).with_context(|| format!("{} cannot be read", folder.display()))?;
        let mut images = Images::only(folder.join("nvmx"));
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != "nvmx" {
                images.guests.insert(name, entry.path());
            }
        }
        if let Wanted::Guest(name) = wanted {
            images.guest(name)?;
        }
        Ok(images)
    }

    /// The image of a guest.
    ///
    /// # Errors
    /// [`Stop::Usage`] with the names there are.
    pub fn guest(&self, name: &str) -> Result<&Path> {
        let names = || self.guests.keys().cloned().collect::<Vec<_>>().join(", ");
        let missing = || Stop::Usage(format!("there is no L2 guest `{name}`; there are: {}", names()));
        Ok(self.guests.get(name).or(self.unbuilt.as_ref()).ok_or_else(missing)?)
    }
}

/// A bootable program of the workspace.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Program {
    package: String,
    bin: String,
    features: Vec<String>,
    guest: bool,
}

/// Which images a command needs. One that does not build is no one's trouble but those who need it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// nvmx and every guest
    All,
    /// nvmx and the guest of this name
    Guest(String),
    /// nvmx alone
    Nvmx,
}

impl Wanted {
    fn has(&self, guest: &str) -> bool {
        match self {
            Wanted::All => true,
            Wanted::Guest(name) => name == guest,
            Wanted::Nvmx => false,
        }
    }
}

/// Builds images.
///
/// # Errors
/// [`Stop::Environment`] with the compiler's last lines if one does not build, [`Stop::Usage`] if there is no such guest.
pub fn build(ui: &Ui, paths: &Paths, toolchain: &Toolchain, wanted: &Wanted) -> Result<Images> {
    let mut step = ui.step("building the images");
    let target = paths.target.join("image");
    let (mut guests, nvmx): (Vec<Program>, Vec<Program>) =
        programs(paths, toolchain)?.into_iter().partition(|p| p.guest);
    if let Wanted::Guest(name) = wanted {
        if !guests.iter().any(|p| p.bin == *name) {
            let names = guests.iter().map(|p| p.bin.as_str()).collect::<Vec<_>>().join(", ");
            let text =
                format!("there is no L2 guest `{name}` and no file of that name; there are: {names}, linux-kvm, xen");
            return Err(Stop::Usage(text).into());
        }
    }
    guests.retain(|p| wanted.has(&p.bin));
    ensure!(!nvmx.is_empty(), "the workspace has no bootable nvmx");
    let core = sysroot::libraries(&toolchain.sysroot()?);
    made_with(&core, &target).with_context(|| format!("cannot prepare {}", target.display()))?;
    for group in [&nvmx, &guests] {
        if group.is_empty() {
            continue;
        }
        let mut cargo = command(toolchain, &paths.root, &target);
        cargo
            .current_dir(&paths.root)
            .args(["build", "--release", "--locked", "--target", TARGET])
            .args(arguments(group));
        let said = proc::run(&mut cargo, None, |line| step.at(line))?;
        ui.detail(said.text.trim_end());
        if !said.status.success() {
            return Err(Stop::environment(format!("the images did not build:\n{}", said.tail(40))).into());
        }
    }
    let place = |p: &Program| target.join(TARGET).join("release").join(&p.bin);
    let mut images = Images { nvmx: place(&nvmx[0]), guests: BTreeMap::new(), unbuilt: None };
    for program in &guests {
        images.guests.insert(program.bin.clone(), place(program));
    }
    for path in images.guests.values().chain([&images.nvmx]) {
        let data = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let shape = check(&data).with_context(|| format!("{} cannot boot", path.display()))?;
        for folder in [&paths.root, &cargo_home()] {
            ensure!(!names(&data, folder), "{} names the folder {}", path.display(), folder.display());
        }
        ui.detail(&format!("{}: {shape}", path.display()));
    }
    if step.elapsed().as_secs() >= 2 {
        step.done("the images are built");
    }
    Ok(images)
}

/// What was made in `target` with another build of core than this is removed: for cargo two builds by one compiler are the same,
/// but rustc refuses to mix them.
fn made_with(core: &Path, target: &Path) -> std::io::Result<()> {
    let mut libraries = Vec::new();
    for entry in std::fs::read_dir(core)? {
        let entry = entry?;
        let about = entry.metadata()?;
        libraries.push(format!("{:?} {} {:?}\n", entry.file_name(), about.len(), about.modified()?));
    }
    libraries.sort();
    let (note, now) = (target.join("core"), libraries.concat());
    if std::fs::read_to_string(&note).is_ok_and(|before| before == now) {
        return Ok(());
    }
    let made = target.join(TARGET);
    if made.exists() {
        std::fs::remove_dir_all(made)?;
    }
    std::fs::create_dir_all(target)?;
    std::fs::write(note, now)
}

/// A cargo that builds for the bare machine.
pub fn command(toolchain: &Toolchain, root: &Path, target: &Path) -> Command {
    let mut cargo = Command::new(&toolchain.cargo);
    clean(&mut cargo).env("RUSTC", &toolchain.rustc).env("CARGO_TARGET_DIR", target);
    if let Some(linker) = &toolchain.linker {
        cargo.env("CARGO_TARGET_X86_64_UNKNOWN_NONE_LINKER", linker);
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags(root, &cargo_home()));
    cargo
}

/// The compiler's flags, in cargo's encoding: the images are linked for fixed addresses, and name no folder of this machine,
/// so that two checkouts make the same bytes.
fn flags(root: &Path, cargo_home: &Path) -> OsString {
    let mut flags = OsString::from("-Crelocation-model=static");
    for (folder, name) in [(root, "nvmx"), (cargo_home, "cargo")] {
        flags.push("\x1f--remap-path-prefix=");
        flags.push(folder);
        flags.push(format!("=/{name}"));
    }
    flags
}

/// Where cargo keeps the sources of packages.
fn cargo_home() -> PathBuf {
    let given = std::env::var_os("CARGO_HOME").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    given.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"))
}

fn programs(paths: &Paths, toolchain: &Toolchain) -> Result<Vec<Program>> {
    let mut cargo = command(toolchain, &paths.root, &paths.target);
    cargo.current_dir(&paths.root).args(["metadata", "--no-deps", "--locked", "--format-version=1"]);
    let metadata = serde_json::from_str(&proc::stdout_of(&mut cargo)?).context("cargo metadata is no JSON")?;
    Ok(bootable(&metadata, &paths.root.to_string_lossy()))
}

/// nvmx itself and every program under `l2-guests/`.
fn bootable(metadata: &serde_json::Value, root: &str) -> Vec<Program> {
    let text = |v: &serde_json::Value| v.as_str().unwrap_or_default().to_string();
    let list = |v: &serde_json::Value| v.as_array().cloned().unwrap_or_default();
    let mut found = Vec::new();
    for package in list(&metadata["packages"]) {
        let (name, manifest) = (text(&package["name"]), text(&package["manifest_path"]));
        let guest = manifest.starts_with(&format!("{root}/l2-guests/"));
        if !guest && name != "nvmx" {
            continue;
        }
        for target in list(&package["targets"]) {
            if list(&target["kind"]).iter().any(|k| k == "bin") {
                let features = list(&target["required-features"]).iter().map(text).collect();
                found.push(Program { package: name.clone(), bin: text(&target["name"]), features, guest });
            }
        }
    }
    found.sort();
    found
}

fn arguments(programs: &[Program]) -> Vec<String> {
    let mut list = Vec::new();
    for program in programs {
        list.extend(["-p".into(), program.package.clone(), "--bin".into(), program.bin.clone()]);
        for feature in &program.features {
            list.extend(["--features".into(), format!("{}/{feature}", program.package)]);
        }
    }
    list
}

/// Whether the path of a folder stands in an image.
fn names(data: &[u8], folder: &Path) -> bool {
    let path = [folder.as_os_str().as_encoded_bytes(), b"/"].concat();
    // "/" alone names nothing.
    path.len() > 2 && memchr::memmem::find(data, &path).is_some()
}

/// What a boot loader will find: an error names what it would stumble over.
fn check(data: &[u8]) -> Result<String> {
    let elf = object::File::parse(data).context("it is no ELF file")?;
    ensure!(elf.is_64() && elf.architecture() == object::Architecture::X86_64, "it is no 64-bit x86 ELF file");
    let one = multiboot_header(data, 8192, 4, 0x1BAD_B002).context("it has no multiboot header in its first 8 KiB")?;
    let flags = one.get(4..8).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes).unwrap_or_default();
    ensure!(flags & 1 << 16 != 0, "its multiboot header has no address fields, which QEMU needs for a 64-bit image");
    multiboot_header(data, 32768, 8, 0xE852_50D6).context("it has no multiboot2 header in its first 32 KiB")?;
    let loaded = elf.segments().filter(|s| s.size() > 0).count();
    ensure!(loaded > 0, "it has nothing to load");
    Ok(format!("{} KiB, {loaded} segments, entry {:#x}", data.len() / 1024, elf.entry()))
}

fn multiboot_header(data: &[u8], within: usize, align: usize, magic: u32) -> Option<&[u8]> {
    let head = data.get(..within.min(data.len()))?;
    (0..head.len()).step_by(align).map(|at| &data[at..]).find(|d| d.starts_with(&magic.to_le_bytes()))
}

/// The function at an address, for messages about where a machine stopped.
pub fn symbol(image: &Path, address: u64) -> Option<String> {
    let data = std::fs::read(image).ok()?;
    let elf = object::File::parse(&*data).ok()?;
    // Only what covers the address: two images may be linked for the same place, and labels have no size.
    let found = elf.symbols().find(|s| address.checked_sub(s.address()).is_some_and(|offset| offset < s.size()))?;
    let name = rustc_demangle::demangle(found.name().ok()?).to_string();
    let short = name.rsplit_once("::h").map_or(name.as_str(), |(path, _)| path);
    Some(format!("{short}+{:#x}", address - found.address()))
}

/// [`symbol`], or the nearest label before the address: for code that surely is this image's.
pub fn symbol_or_label(image: &Path, address: u64) -> Option<String> {
    const NEAR: u64 = 1 << 16;
    symbol(image, address).or_else(|| {
        let data = std::fs::read(image).ok()?;
        let elf = object::File::parse(&*data).ok()?;
        let before = |s: &object::Symbol<'_, '_>| address.checked_sub(s.address()).is_some_and(|offset| offset < NEAR);
        let label = |s: &object::Symbol<'_, '_>| s.is_definition() && s.size() == 0 && s.name().is_ok_and(is_word);
        let found = elf.symbols().filter(|s| before(s) && label(s)).max_by_key(|s| (s.address(), s.is_global()))?;
        Some(format!("{}+{:#x}", found.name().ok()?, address - found.address()))
    })
}

/// No local label of a compiler.
fn is_word(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.starts_with('$') && !name.starts_with("L")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_has_its_images_and_names_the_guests_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let release = Release::in_folder(folder.path());
        std::fs::create_dir(release.image_folder()).unwrap();
        for name in ["nvmx", "cascade", "smp"] {
            std::fs::write(release.image_folder().join(name), "").unwrap();
        }
        let images = Images::released(&release, &Wanted::All).unwrap();
        assert_eq!(images.guests.keys().collect::<Vec<_>>(), ["cascade", "smp"]);
        assert!(images.nvmx.ends_with("images/nvmx"));
        let error = Images::released(&release, &Wanted::Guest("x".into())).unwrap_err().to_string();
        assert!(error.contains("there are: cascade, smp"), "{error}");
    }

    #[test]
    fn what_another_build_of_core_made_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (core, target) = (folder.path().join("core"), folder.path().join("image"));
        let made = target.join(TARGET).join("nvmx");
        std::fs::create_dir(&core).unwrap();
        std::fs::write(core.join("libcore.rlib"), "1").unwrap();
        std::fs::create_dir_all(made.parent().unwrap()).unwrap();
        std::fs::write(&made, "").unwrap();
        made_with(&core, &target).unwrap();
        assert!(!made.exists(), "of unknown origin");
        std::fs::create_dir_all(made.parent().unwrap()).unwrap();
        std::fs::write(&made, "").unwrap();
        made_with(&core, &target).unwrap();
        assert!(made.exists(), "nothing has changed");
        std::fs::write(core.join("libcore.rlib"), "22").unwrap();
        made_with(&core, &target).unwrap();
        assert!(!made.exists(), "another core");
    }

    #[test]
    fn every_program_of_the_guests_folder_is_built_with_the_features_it_requires() {
        let metadata = serde_json::json!({"packages": [
            {"name": "nvmx", "manifest_path": "/r/Cargo.toml", "targets": [
                {"kind": ["lib"], "name": "nvmx"}, {"kind": ["bin"], "name": "nvmx", "required-features": ["image"]}]},
            {"name": "nvmx-harness", "manifest_path": "/r/harness/Cargo.toml", "targets": [{"kind": ["bin"], "name": "nvmx-harness"}]},
            {"name": "l2-cascade", "manifest_path": "/r/l2-guests/cascade/Cargo.toml", "targets": [{"kind": ["bin"], "name": "cascade"}]},
            {"name": "l2-kit", "manifest_path": "/r/l2-guests/kit/Cargo.toml", "targets": [{"kind": ["lib"], "name": "l2_kit"}]},
        ]});
        let found = bootable(&metadata, "/r");
        assert_eq!(found.len(), 2);
        assert_eq!(arguments(&found[..1]), ["-p", "l2-cascade", "--bin", "cascade"]);
        assert_eq!(arguments(&found[1..]), ["-p", "nvmx", "--bin", "nvmx", "--features", "nvmx/image"]);
    }

    #[test]
    fn the_compiler_is_told_to_leave_out_the_folders_of_this_machine() {
        let flags = flags(Path::new("/a b"), Path::new("/c"));
        let expected = "-Crelocation-model=static\x1f--remap-path-prefix=/a b=/nvmx\x1f--remap-path-prefix=/c=/cargo";
        assert_eq!(flags, *expected);
        let names = |data: &[u8]| names(data, Path::new("/a b"));
        assert!(names(b"x/a b/src") && !names(b"x/a bc/src") && !names(b"/nvmx/src"));
    }

    #[test]
    fn what_is_no_elf_cannot_boot() {
        assert_eq!(check(b"hello").unwrap_err().to_string(), "it is no ELF file");
    }
}
