//! The compiler for the bare-metal target `x86_64-unknown-none`.
//!
//! In this order: an installed target; a sysroot made of the distribution's compiler and sources; a command to type. Nothing is
//! ever fetched by rustup.

pub mod sysroot;

use crate::error::Stop;
use crate::paths::Paths;
use crate::proc;
use crate::ui::Ui;
use crate::{apt, program};
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The target of nvmx and its guests.
pub const TARGET: &str = "x86_64-unknown-none";
/// The oldest Rust that builds this workspace: 1.85.
pub const OLDEST_MINOR: u32 = 85;

/// A compiler with the bare-metal target.
#[derive(Clone, Debug)]
pub struct Toolchain {
    /// cargo of the same version
    pub cargo: PathBuf,
    /// rustc, or a wrapper that knows the sysroot
    pub rustc: PathBuf,
    /// The linker to name, if the compiler brings none
    pub linker: Option<PathBuf>,
    /// For people: version and where it comes from
    pub text: String,
    /// What counts of instructions depend on: "rustc 1.85.0, LLVM 19.1.7"
    pub version: String,
}

impl Toolchain {
    /// Where rustc looks for libraries.
    ///
    /// # Errors
    /// If rustc fails.
    pub fn sysroot(&self) -> Result<PathBuf> {
        let mut rustc = Command::new(&self.rustc);
        let text = proc::stdout_of(clean(rustc.args(["--print", "sysroot"])))?;
        Ok(PathBuf::from(text.trim()))
    }
}

/// A compiler of the host, as found.
#[derive(Clone, Debug)]
pub struct Compiler {
    /// rustc
    pub rustc: PathBuf,
    /// Its cargo
    pub cargo: PathBuf,
    /// `rustc -vV`
    pub verbose: String,
}

impl Compiler {
    fn at(rustc: PathBuf, cargo: PathBuf) -> Option<Self> {
        let verbose = proc::stdout_of(clean(Command::new(&rustc).arg("-vV"))).ok()?;
        proc::stdout_of(clean(Command::new(&cargo).arg("--version"))).ok()?;
        (minor(&verbose)? >= OLDEST_MINOR).then_some(Compiler { rustc, cargo, verbose })
    }

    /// The one that builds for the host: the cargo that started us, and its rustc.
    pub fn of_host() -> Option<Self> {
        let cargo = std::env::var_os("NVMX_CARGO").map(PathBuf::from).or_else(|| program("cargo"))?;
        let beside = cargo.parent().map(|d| d.join("rustc")).filter(|p| p.exists());
        let rustc = std::env::var_os("RUSTC").map(PathBuf::from).or(beside).or_else(|| program("rustc"))?;
        Self::at(rustc, cargo)
    }

    /// The distribution's: the plain name first, then names with a version, newest first.
    pub fn of_distribution() -> Option<Self> {
        let mut pairs = vec![(PathBuf::from("/usr/bin/rustc"), PathBuf::from("/usr/bin/cargo"))];
        let folder = std::fs::read_dir("/usr/bin").ok()?;
        let names =
            folder.flatten().filter_map(|e| e.file_name().to_str()?.strip_prefix("rustc-1.")?.parse::<u32>().ok());
        let mut versions: Vec<u32> = names.collect();
        versions.sort_unstable_by(|a, b| b.cmp(a));
        for v in versions {
            pairs.push((format!("/usr/bin/rustc-1.{v}").into(), format!("/usr/bin/cargo-1.{v}").into()));
        }
        pairs.into_iter().filter(|(rustc, cargo)| rustc.exists() && cargo.exists()).find_map(|(r, c)| Self::at(r, c))
    }

    /// What rustc prints for `--print KIND`.
    ///
    /// # Errors
    /// If rustc fails.
    pub fn print(&self, kind: &str, target: Option<&str>) -> Result<PathBuf> {
        let mut command = Command::new(&self.rustc);
        command.args(["--print", kind]);
        if let Some(target) = target {
            command.args(["--target", target]);
        }
        Ok(PathBuf::from(proc::stdout_of(clean(&mut command))?.trim()))
    }

    /// Whether the bare-metal target's core is installed.
    pub fn has_target(&self) -> bool {
        self.print("target-libdir", Some(TARGET)).is_ok_and(|folder| has_core(&folder))
    }

    /// The host triple.
    pub fn host(&self) -> &str {
        field(&self.verbose, "host: ").unwrap_or("x86_64-unknown-linux-gnu")
    }

    /// "1.96.0"
    pub fn release(&self) -> &str {
        field(&self.verbose, "release: ").unwrap_or("?")
    }

    /// "rustc 1.96.0, LLVM 21.1.8"
    pub fn version(&self) -> String {
        format!("rustc {}, LLVM {}", self.release(), field(&self.verbose, "LLVM version: ").unwrap_or("?"))
    }

    /// The sources of core, if they are installed.
    pub fn sources(&self) -> Option<PathBuf> {
        let folder = self.print("sysroot", None).ok()?.join("lib/rustlib/src/rust/library");
        folder.join("core/Cargo.toml").exists().then_some(folder)
    }
}

/// Removes what an outer cargo or rustup left in the environment, which would choose another compiler.
pub fn clean(command: &mut Command) -> &mut Command {
    for (key, _) in std::env::vars_os() {
        let name = key.to_string_lossy();
        let cargo = name.starts_with("CARGO_") && !matches!(&*name, "CARGO_HOME") && !name.starts_with("CARGO_NET");
        let rust = matches!(&*name, "CARGO" | "RUSTUP_TOOLCHAIN" | "RUST_RECURSION_COUNT" | "RUSTC" | "RUSTFLAGS");
        if cargo || rust {
            command.env_remove(&key);
        }
    }
    command.env("RUSTUP_AUTO_INSTALL", "0")
}

/// Finds or makes a toolchain; installs packages if it may.
///
/// # Errors
/// [`Stop::Environment`] with what to type.
pub fn set_up(ui: &Ui, paths: &Paths) -> Result<Toolchain> {
    if let Some(ready) = ready(paths) {
        return with_linker(ui, ready);
    }
    let rustup = || Stop::Environment {
        what: format!("no compiler here knows the target {TARGET}"),
        todo: vec![format!("rustup target add {TARGET}")],
    };
    if Compiler::of_distribution().is_none_or(|c| c.sources().is_none()) {
        let Some(packages) = offered_packages(ui)? else { return Err(rustup().into()) };
        let missing: Vec<&str> = packages.iter().map(String::as_str).filter(|p| !apt::installed(p)).collect();
        apt::install(ui, &missing, "building for the bare machine")?;
    }
    let compiler = Compiler::of_distribution().filter(|c| c.sources().is_some()).ok_or_else(rustup)?;
    let folder = sysroot::build(ui, paths, &compiler)?;
    with_linker(ui, sysroot::toolchain(&compiler, &folder))
}

/// A toolchain that needs no more work.
pub fn ready(paths: &Paths) -> Option<Toolchain> {
    let installed = Compiler::of_host().filter(Compiler::has_target).map(|c| Toolchain {
        text: format!("rustc {} with the installed target {TARGET}", c.release()),
        version: c.version(),
        cargo: c.cargo,
        rustc: c.rustc,
        linker: None,
    });
    installed.or_else(|| {
        let compiler = Compiler::of_distribution()?;
        let folder = sysroot::folder(paths, &compiler);
        has_core(&sysroot::libraries(&folder)).then(|| sysroot::toolchain(&compiler, &folder))
    })
}

/// The distribution's packages with a new enough Rust and its sources: plain names, Debian's "web" set, or names with a
/// version.
///
/// # Errors
/// After Ctrl-C.
fn offered_packages(ui: &Ui) -> Result<Option<Vec<String>>> {
    if apt::Power::find() == apt::Power::None {
        return Ok(None);
    }
    let look = || {
        let names = proc::stdout_of(Command::new("apt-cache").args(["pkgnames", "rustc-1."])).unwrap_or_default();
        choose_packages(apt::candidate, &names, apt::installed)
    };
    let found = look();
    if found.is_some() {
        return Ok(found);
    }
    apt::update(ui)?;
    Ok(look())
}

fn choose_packages(
    candidate: impl Fn(&str) -> Option<String>,
    versioned: &str,
    installed: impl Fn(&str) -> bool,
) -> Option<Vec<String>> {
    let mut sets: Vec<[String; 3]> = vec![
        ["rustc", "cargo", "rust-src"].map(String::from),
        ["rustc-web", "cargo-web", "rust-web-src"].map(String::from),
    ];
    let mut versions: Vec<u32> = versioned.lines().filter_map(|l| l.strip_prefix("rustc-1.")?.parse().ok()).collect();
    versions.sort_unstable_by(|a, b| b.cmp(a));
    sets.extend(versions.iter().map(|v| [format!("rustc-1.{v}"), format!("cargo-1.{v}"), format!("rust-1.{v}-src")]));
    let new_enough = |set: &&[String; 3]| candidate(&set[0]).and_then(|v| package_minor(&v)) >= Some(OLDEST_MINOR);
    let good: Vec<&[String; 3]> = sets.iter().filter(new_enough).collect();
    // What is half there goes first: two sets may exclude each other.
    let chosen = good.iter().find(|set| installed(&set[0])).or_else(|| good.first())?;
    Some(chosen.to_vec())
}

fn with_linker(ui: &Ui, mut toolchain: Toolchain) -> Result<Toolchain> {
    toolchain.linker = find_linker(&toolchain);
    if toolchain.linker.is_none() {
        apt::install(ui, &["lld"], "linking the image")?;
        toolchain.linker = find_linker(&toolchain);
    }
    if toolchain.linker.is_none() {
        return Err(Stop::environment("no linker found: rust-lld, ld.lld or ld").into());
    }
    Ok(toolchain)
}

/// rust-lld of the compiler, else `ld.lld` (also with a version), else GNU ld.
fn find_linker(toolchain: &Toolchain) -> Option<PathBuf> {
    let compiler = Compiler::at(toolchain.rustc.clone(), toolchain.cargo.clone())?;
    let bundled = compiler.print("sysroot", None).ok()?.join("lib/rustlib").join(compiler.host()).join("bin/rust-lld");
    [Some(bundled).filter(|p| p.exists()), program("ld.lld"), program("ld")].into_iter().flatten().next()
}

/// Whether a folder of libraries holds core.
pub fn has_core(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    let is_core = |name: &str| name.starts_with("libcore-") && name.ends_with(".rlib");
    entries.flatten().any(|e| e.file_name().to_str().is_some_and(is_core))
}

fn field<'a>(verbose: &'a str, key: &str) -> Option<&'a str> {
    verbose.lines().find_map(|l| l.strip_prefix(key))
}

/// NN of "release: 1.NN.x"
fn minor(verbose: &str) -> Option<u32> {
    package_minor(field(verbose, "release: ")?)
}

/// NN of a version "1.NN.x", with or without an epoch.
fn package_minor(version: &str) -> Option<u32> {
    let version = version.split_once(':').map_or(version, |(_, v)| v);
    version.strip_prefix("1.")?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(offer: &[(&str, &str)], versioned: &str, installed: &[&str]) -> Option<String> {
        let candidate = |p: &str| offer.iter().find(|(n, _)| *n == p).map(|(_, v)| v.to_string());
        choose_packages(candidate, versioned, |p| installed.contains(&p)).map(|set| set.join(" "))
    }

    #[test]
    fn each_distribution_gets_its_own_package_names() {
        let bookworm = [("rustc", "1.63.0+dfsg1-2"), ("rustc-web", "1.96.0+dfsg1-1~deb12u2")];
        assert_eq!(chosen(&bookworm, "", &[]).as_deref(), Some("rustc-web cargo-web rust-web-src"));
        let trixie = [("rustc", "1.85.0+dfsg3-1"), ("rustc-web", "1.96.0+dfsg1-1~deb13u1")];
        assert_eq!(chosen(&trixie, "", &[]).as_deref(), Some("rustc cargo rust-src"));
        assert_eq!(chosen(&trixie, "", &["rustc-web"]).as_deref(), Some("rustc-web cargo-web rust-web-src"));
        let noble = [("rustc", "1.75.0+dfsg0ubuntu1"), ("rustc-1.85", "1.85.1"), ("rustc-1.80", "1.80.1")];
        let names = "rustc-1.80\nrustc-1.85\nrustc-1.80-doc\n";
        assert_eq!(chosen(&noble, names, &[]).as_deref(), Some("rustc-1.85 cargo-1.85 rust-1.85-src"));
        assert_eq!(chosen(&[("rustc", "1.63.0")], "", &[]), None);
    }

    #[test]
    fn versions_are_read_with_epoch_and_suffix() {
        assert_eq!(package_minor("1.85.0+dfsg3-1"), Some(85));
        assert_eq!(package_minor("1:1.96~rc1"), Some(96));
        assert_eq!(package_minor("2.0"), None);
        assert_eq!(minor("rustc 1.95.0 (x)\nrelease: 1.95.0\n"), Some(95));
    }
}
