//! Xen with what it takes to start a domain: the hypervisor, the Linux of its control domain (dom0), and `xl` with its services,
//! out of the distribution's packages, unpacked into the cache and never installed.

use crate::error::Stop;
use crate::linux::{self, NEEDS};
use crate::paths::Paths;
use crate::proc;
use crate::ui::Ui;
use crate::{Need, apt, program, programs, require};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is made from the packages; the number changes with what this file does to them.
const FORMAT: &str = "nvmx1";
/// The package without content that depends on the hypervisor and its tools.
const PACKAGE: &str = "xen-system-amd64";
/// Kernels that can be dom0, best first: those for clouds cannot. Linux 6.1 dies there on the CPU models with the most VMX
/// features, as it does without Xen.
const KERNELS: [&str; 3] = ["linux-image-6.12-amd64", "linux-image-amd64", "linux-image-generic"];
/// What `xl` and the services ask of the kernel, in the order in which they load.
pub const MODULES: [&str; 4] = ["xen-privcmd", "xen-evtchn", "xen-gntdev", "xenfs"];
/// The program that starts a domain.
pub const XL: &str = "xl";
/// What runs before it, in this order: the store, dom0's entry in it, and the consoles of domains.
pub const SERVICES: [&str; 3] = ["xenstored", "xen-init-dom0", "xenconsoled"];
/// A library that the C library asks for when a thread is cancelled.
const EXTRA: [&str; 1] = ["libgcc_s.so.1"];
const UNZIP: Need = Need::program("gzip", "gzip");

/// Xen and dom0.
#[derive(Clone, Debug)]
pub struct Xen {
    /// The package's version
    pub version: String,
    /// `xen`, `vmlinuz`, the modules as `NAME.ko`, `bin/`, `lib/` and `lib64/`
    pub folder: PathBuf,
}

impl Xen {
    /// A file of it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// The packages, as the archive has them today.
struct Packages {
    hypervisor: String,
    tools: String,
    kernel: String,
    /// Of the hypervisor
    version: String,
}

impl Packages {
    fn find() -> Option<Self> {
        let depends = proc::stdout_of(Command::new("apt-cache").args(["depends", PACKAGE])).ok()?;
        let (hypervisor, tools) = parts_of(&depends)?;
        let version = apt::candidate(&hypervisor)?;
        Some(Packages { kernel: linux::find_package(&KERNELS)?, hypervisor, tools, version })
    }

    fn folder(&self, paths: &Paths) -> PathBuf {
        let (version, kernel) = (self.version.replace([':', '/'], "-"), linux::release_of(&self.kernel));
        paths.cache.join(format!("xen-{FORMAT}-{version}-{kernel}"))
    }
}

/// The packages of the hypervisor and of its tools, which have Xen's version in their names.
fn parts_of(depends: &str) -> Option<(String, String)> {
    let with = |start: &str| {
        let mut names = depends.lines().filter_map(|l| l.trim().strip_prefix("Depends: "));
        let versioned =
            |n: &&str| n.strip_prefix(start).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        names.find(versioned).map(str::to_string)
    };
    Some((with("xen-hypervisor-")?, with("xen-utils-")?))
}

/// Xen out of the cache, or fetched now.
///
/// # Errors
/// [`Stop::Environment`] if the packages cannot be had or are not what they should be.
pub fn set_up(ui: &Ui, paths: &Paths) -> Result<Xen> {
    require(ui, &NEEDS, "Xen on the emulated machine")?;
    require(ui, &[UNZIP], "Xen on the emulated machine")?;
    if apt::Power::find() == apt::Power::None {
        let text = "Xen for the emulated machine comes from Debian packages, and there is no apt here";
        return Err(Stop::environment(text).into());
    }
    let ready = |packages: &Packages| {
        let folder = packages.folder(paths);
        folder.exists().then(|| Xen { version: packages.version.clone(), folder })
    };
    if let Some(xen) = Packages::find().as_ref().and_then(ready) {
        return Ok(xen);
    }
    apt::refresh(ui)?;
    let missing = || {
        let kernels = KERNELS.join(", ");
        Stop::environment(format!("the package archive lacks {PACKAGE} or a kernel for dom0 (looked for {kernels})"))
    };
    let packages = Packages::find().ok_or_else(missing)?;
    match ready(&packages) {
        Some(xen) => Ok(xen),
        None => fetch(ui, paths, &packages),
    }
}

fn fetch(ui: &Ui, paths: &Paths, packages: &Packages) -> Result<Xen> {
    let mut step = ui.step("fetching Xen, its tools and a kernel for dom0");
    // Everything happens beside the final place, which appears whole or not at all.
    let work = tempfile::Builder::new().prefix(".xen-").tempdir_in(&paths.cache)?;
    let mut list = apt::with_dependencies(&[&packages.tools])?;
    list.push(packages.hypervisor.clone());
    list.extend(linux::with_modules(&packages.kernel));
    list.sort();
    list.dedup();
    let tree = apt::unpacked(&mut step, &list, work.path())?;
    let output = work.path().join("output");
    collect(&tree, &output)?;
    let xen = Xen { version: packages.version.clone(), folder: packages.folder(paths) };
    std::fs::rename(&output, &xen.folder)?;
    step.done(&format!("Xen {} is ready", xen.version));
    Ok(xen)
}

/// Takes what [`Xen`] has out of the unpacked packages.
fn collect(tree: &Path, output: &Path) -> Result<()> {
    std::fs::create_dir(output)?;
    let xen = find(&tree.join("boot"), "xen-", ".gz").context("the packages have no hypervisor")?;
    // A boot loader unpacks what it boots, but not what it hands on: both boots get the same file.
    let gzip = program("gzip").context("gzip is missing")?;
    let unpacked = Command::new(gzip).arg("-dc").arg(&xen).output()?;
    ensure!(unpacked.status.success(), "{} cannot be unpacked", xen.display());
    std::fs::write(output.join("xen"), unpacked.stdout)?;
    let drivers = "drivers/xen";
    let modules = MODULES.map(|name| if name == "xenfs" { ("drivers/xen/xenfs", name) } else { (drivers, name) });
    linux::take(tree, &modules, output)?;
    let tools = find(&tree.join("usr/lib"), "xen-", "").context("the packages have no tools of Xen")?;
    let name = tools.file_name().and_then(|n| n.to_str()).context("a folder has a strange name")?;
    let paths: Vec<String> = SERVICES.iter().chain([&XL]).map(|p| format!("usr/lib/{name}/bin/{p}")).collect();
    programs::collect(tree, &paths.iter().map(String::as_str).collect::<Vec<_>>(), &EXTRA, output)
}

/// The last of a folder's entries with such a name whose next character is a digit.
fn find(folder: &Path, start: &str, end: &str) -> Option<PathBuf> {
    let fits = |path: &PathBuf| {
        let rest = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix(start)?.strip_suffix(end));
        rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    std::fs::read_dir(folder).ok()?.flatten().map(|e| e.path()).filter(fits).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hypervisor_and_tools_are_told_from_what_they_have_in_common() {
        let text = "xen-system-amd64\n  Depends: xen-hypervisor-4.17-amd64\n  Depends: xen-hypervisor-common\n  \
                    Depends: xen-utils-4.17\n";
        let (hypervisor, tools) = parts_of(text).unwrap();
        assert_eq!((hypervisor.as_str(), tools.as_str()), ("xen-hypervisor-4.17-amd64", "xen-utils-4.17"));
        assert_eq!(parts_of("xen-system-amd64\n  Depends: xen-hypervisor-common\n"), None);
    }

    #[test]
    fn the_hypervisor_is_found_beside_its_configuration_and_the_kernel() {
        let folder = tempfile::tempdir().unwrap();
        let names = ["xen-4.17-amd64.config", "xen-4.17-amd64.efi", "xen-4.17-amd64.gz", "xen.gz", "vmlinuz-6.12"];
        names.iter().for_each(|name| std::fs::write(folder.path().join(name), "x").unwrap());
        assert_eq!(find(folder.path(), "xen-", ".gz"), Some(folder.path().join("xen-4.17-amd64.gz")));
        assert_eq!(find(folder.path(), "xen-", ".xz"), None);
    }

    #[test]
    fn packages_without_a_hypervisor_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = collect(folder.path(), &folder.path().join("out")).unwrap_err();
        assert_eq!(error.to_string(), "the packages have no hypervisor");
    }
}
