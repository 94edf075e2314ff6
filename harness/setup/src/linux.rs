//! A Linux with KVM for the emulated machine: the distribution's own kernel package, fetched and unpacked into the cache,
//! never installed, and the VMM of this workspace, which is its only program.

use crate::error::Stop;
use crate::paths::Paths;
use crate::proc;
use crate::ui::Ui;
use crate::{Need, apt, program, require, toolchain};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is made from the package; the number changes with what this file does to it.
const FORMAT: &str = "nvmx1";
/// Packages that bring a kernel for virtual machines, best first. The older name's kernel is 6.1 on Debian 12, which stops
/// early on the CPU models with the most VMX features.
const PACKAGES: [&str; 3] = ["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64", "linux-image-virtual"];
/// KVM and what it needs, in the order in which they load.
pub const MODULES: [&str; 3] = ["irqbypass", "kvm", "kvm-intel"];
/// What unpacking takes.
pub const NEEDS: [Need; 3] = [
    Need::program("dpkg-deb", "dpkg"),
    Need::program("xz", "xz-utils"),
    // The VMM is linked statically: it runs alone.
    Need::file(&["/usr/lib/x86_64-linux-gnu/libc.a", "/usr/lib/libc.a", "/usr/lib64/libc.a"], "libc6-dev"),
];

/// The kernel and its modules.
#[derive(Clone, Debug)]
pub struct Linux {
    /// "6.12.117+deb12-cloud-amd64"
    pub release: String,
    /// `vmlinuz` and the modules as `NAME.ko`
    pub folder: PathBuf,
}

impl Linux {
    /// A file of it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// Which of the distribution's kernels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kernel {
    /// The one for CPU models with the most VMX features
    Newest,
    /// Linux 6.1, the older of those that Debian 12 has
    Linux61,
}

impl Kernel {
    fn packages(self) -> &'static [&'static str] {
        match self {
            Kernel::Newest => &PACKAGES,
            Kernel::Linux61 => &["linux-image-cloud-amd64"],
        }
    }

    /// Whether a release is what is asked for. The newest of a distribution may be 6.1 too: then the archive says so.
    fn is(self, release: &str) -> bool {
        release.starts_with("6.1.") == (self == Kernel::Linux61)
    }
}

/// The kernel in the cache, if there is one.
pub fn ready(paths: &Paths, kernel: Kernel) -> Option<Linux> {
    let folders = std::fs::read_dir(&paths.cache).ok()?.flatten();
    let prefix = format!("linux-{FORMAT}-");
    let mut found: Vec<Linux> = folders
        .filter_map(|e| {
            let release = e.file_name().to_str()?.strip_prefix(&prefix)?.to_string();
            kernel.is(&release).then(|| Linux { release, folder: e.path() })
        })
        .collect();
    found.sort_by(|a, b| a.release.cmp(&b.release));
    found.pop()
}

/// The kernel out of the cache, or fetched now.
///
/// # Errors
/// [`Stop::Environment`] if the package cannot be had or is not what it should be.
pub fn set_up(ui: &Ui, paths: &Paths, kernel: Kernel) -> Result<Linux> {
    require(ui, &NEEDS, "Linux with KVM on the emulated machine")?;
    match ready(paths, kernel) {
        Some(linux) => Ok(linux),
        None => fetch(ui, paths, kernel),
    }
}

fn fetch(ui: &Ui, paths: &Paths, kernel: Kernel) -> Result<Linux> {
    if apt::Power::find() == apt::Power::None {
        let text = "the kernel for the emulated machine comes from a Debian package, and there is no apt here";
        return Err(Stop::environment(text).into());
    }
    apt::refresh(ui)?;
    let package = find_package(kernel.packages()).ok_or_else(|| {
        let names = kernel.packages().join(", ");
        Stop::environment(format!("the package archive has no kernel with KVM (looked for {names})"))
    })?;
    let release = release_of(&package).to_string();
    let folder = paths.cache.join(format!("linux-{FORMAT}-{release}"));
    if folder.exists() {
        return Ok(Linux { release, folder });
    }
    let mut step = ui.step(&format!("fetching {package}"));
    // Everything happens beside the final place, which appears whole or not at all.
    let work = tempfile::Builder::new().prefix(".linux-").tempdir_in(&paths.cache)?;
    let tree = apt::unpacked(&mut step, &with_modules(&package), work.path())?;
    let output = work.path().join("output");
    let release = collect(&tree, &output).with_context(|| format!("in the package {package}"))?;
    std::fs::rename(&output, &folder)?;
    step.done(&format!("Linux {release} is ready"));
    Ok(Linux { release, folder })
}

/// The package that a name stands for today.
pub(super) fn find_package(names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| {
        apt::candidate(name)?;
        let depends = proc::stdout_of(Command::new("apt-cache").args(["depends", name])).ok()?;
        kernel_of(&depends)
    })
}

/// The release of the kernel that is in a package.
pub(super) fn release_of(package: &str) -> &str {
    package.trim_start_matches("linux-image-").trim_start_matches("unsigned-")
}

/// The kernel that a package without content depends on.
fn kernel_of(depends: &str) -> Option<String> {
    let names = depends.lines().filter_map(|l| l.trim().strip_prefix("Depends: "));
    names.map(str::trim).find(|n| n.starts_with("linux-image-")).map(str::to_string)
}

/// The package of a kernel, and that of its modules where the distribution has one.
pub(super) fn with_modules(kernel: &str) -> Vec<String> {
    let modules = kernel.replace("linux-image-unsigned-", "linux-modules-").replace("linux-image-", "linux-modules-");
    std::iter::once(kernel.to_string()).chain(apt::candidate(&modules).map(|_| modules)).collect()
}

fn files(folder: &Path, end: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|e| e.path()).filter(|p| p.to_string_lossy().ends_with(end)).collect()
}

/// Takes the kernel and the modules out of the unpacked package; the kernel's release.
fn collect(tree: &Path, output: &Path) -> Result<String> {
    std::fs::create_dir(output)?;
    let place = |name: &str| if name == "irqbypass" { "virt/lib" } else { "arch/x86/kvm" };
    take(tree, &MODULES.map(|name| (place(name), name)), output)
}

/// Takes the kernel, as `vmlinuz`, and modules by folder and name, as `NAME.ko`, out of the unpacked package; the kernel's
/// release.
///
/// # Errors
/// What is not there.
pub(super) fn take(tree: &Path, modules: &[(&str, &str)], output: &Path) -> Result<String> {
    let kernel = files(&tree.join("boot"), "").into_iter().find_map(|path| {
        let release = path.file_name()?.to_str()?.strip_prefix("vmlinuz-")?.to_string();
        Some((path, release))
    });
    let (kernel, release) = kernel.context("there is no kernel")?;
    std::fs::copy(&kernel, output.join("vmlinuz"))?;
    let folders = ["lib/modules", "usr/lib/modules"].map(|m| tree.join(m).join(&release).join("kernel"));
    for (place, name) in modules {
        let found = folders
            .iter()
            .flat_map(|m| files(&m.join(place), ""))
            .find(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.split('.').next() == Some(*name)));
        let path = found.with_context(|| format!("there is no module {name}"))?;
        std::fs::write(output.join(format!("{name}.ko")), unsigned(&unpack(&path)?))?;
    }
    Ok(release)
}

/// A module's bytes; packages have them compressed by one of three programs, or not.
fn unpack(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return Ok(std::fs::read(path)?),
    };
    let missing = || Stop::environment(format!("{} is packed by {tool}, which is not here", path.display()));
    let out = Command::new(program(tool).ok_or_else(missing)?).arg("-dc").arg(path).output()?;
    ensure!(out.status.success(), "{} cannot be unpacked", path.display());
    Ok(out.stdout)
}

/// Without the signature at its end: checking it takes the emulated machine a while, and nothing there asks for it.
///
/// Source: Linux documentation, "Kernel module signing facility": the signature, a block of twelve bytes whose last four
/// are the signature's length (big-endian), a line of text.
fn unsigned(module: &[u8]) -> &[u8] {
    const END: &[u8] = b"~Module signature appended~\n";
    let Some(rest) = module.strip_suffix(END) else { return module };
    let Some((content, length)) = rest.split_last_chunk::<4>() else { return module };
    let length = u32::from_be_bytes(*length) as usize + 8;
    content.len().checked_sub(length).and_then(|end| content.get(..end)).unwrap_or(module)
}

/// Builds the VMM for a Linux that has no libraries; where it is.
///
/// # Errors
/// [`Stop::Environment`] with the compiler's last lines.
pub fn build_vmm(ui: &Ui, paths: &Paths) -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let missing = || Stop::environment("no cargo and rustc for the VMM");
    let host = toolchain::Compiler::of_host().ok_or_else(missing)?;
    let mut step = ui.step("building the VMM");
    let target = paths.target.join("vmm");
    let mut cargo = Command::new(&host.cargo);
    toolchain::clean(&mut cargo)
        .env("RUSTC", &host.rustc)
        .env("CARGO_TARGET_DIR", &target)
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-Ctarget-feature=+crt-static -Cstrip=symbols")
        .current_dir(&paths.root)
        .args(["build", "--release", "--locked", "--target", TARGET, "-p", "nvmx-vmm"]);
    let said = proc::run(&mut cargo, None, |line| step.at(line))?;
    ui.detail(said.text.trim_end());
    if !said.status.success() {
        return Err(Stop::environment(format!("the VMM did not build:\n{}", said.tail(30))).into());
    }
    if step.elapsed().as_secs() >= 2 {
        step.done("the VMM is built");
    }
    Ok(target.join(TARGET).join("release").join("nvmx-vmm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_read_from_what_the_name_depends_on() {
        let text = "linux-image-6.12-cloud-amd64\n  Depends: linux-image-6.12.117+deb12-cloud-amd64\n";
        assert_eq!(kernel_of(text).as_deref(), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(kernel_of("linux-image-cloud-amd64\n  Suggests: linux-image-x\n"), None);
    }

    #[test]
    fn the_signature_is_cut_off_and_an_unsigned_module_stays_as_it_is() {
        let signed =
            [b"code".as_slice(), &[9; 5], &[0; 8], &5u32.to_be_bytes(), b"~Module signature appended~\n"].concat();
        assert_eq!(unsigned(&signed), b"code");
        assert_eq!(unsigned(b"code"), b"code");
        let lying = [&[0; 8][..], &500u32.to_be_bytes(), b"~Module signature appended~\n"].concat();
        assert_eq!(unsigned(&lying), lying);
    }

    #[test]
    fn a_package_without_a_module_is_refused_and_a_whole_one_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        let write = |path: &str| {
            let path = tree.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        };
        write("boot/vmlinuz-6.12-x");
        write("boot/config-6.12-x");
        write("lib/modules/6.12-x/kernel/virt/lib/irqbypass.ko");
        write("lib/modules/6.12-x/kernel/arch/x86/kvm/kvm.ko");
        let text = format!("{:#}", collect(&tree, &folder.path().join("a")).unwrap_err());
        assert_eq!(text, "there is no module kvm-intel");
        write("lib/modules/6.12-x/kernel/arch/x86/kvm/kvm-intel.ko");
        let output = folder.path().join("b");
        assert_eq!(collect(&tree, &output).unwrap(), "6.12-x");
        assert!(MODULES.iter().all(|m| output.join(format!("{m}.ko")).exists()));
    }
}
