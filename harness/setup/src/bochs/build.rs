//! Making our build: the source with the fixes, its options, and what makes it sooner.

use super::series::Series;
use super::source::download;
use super::{BUILD_NEEDS, UPSTREAM, look_at};
use crate::error::Stop;
use crate::paths::Paths;
use crate::ui::Ui;
use crate::{proc, require};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// All that the CPU models of Bochs have; `--enable-all-optimizations` alone leaves alignment checks out. Without CFLAGS and CXXFLAGS
/// it would be built with symbols.
const CONFIGURE: [&str; 19] = [
    "CFLAGS=-O2",
    "CXXFLAGS=-O2",
    "--with-nogui",
    "--enable-all-optimizations",
    "--enable-cpu-level=6",
    "--enable-x86-64",
    "--enable-vmx=2",
    "--enable-avx",
    "--enable-evex",
    "--enable-cet",
    "--enable-uintr",
    "--enable-protection-keys",
    "--enable-amx",
    "--enable-memtype",
    "--enable-perfmon",
    "--enable-alignment-check",
    "--enable-pci",
    "--enable-smp",
    "--disable-docbook",
];

/// The stub looks at each instruction, so that no chain of them runs at once.
const WITH_GDB: [&str; 2] = ["--enable-gdb-stub", "--disable-handlers-chaining"];

/// One build of ours.
pub struct Build {
    series: Series,
    options: Vec<&'static str>,
    name: &'static str,
}

impl Build {
    /// The one that boots.
    pub fn plain(root: &Path) -> Result<Self> {
        Ok(Build { series: Series::read(root)?, options: CONFIGURE.to_vec(), name: "Bochs 3.0" })
    }

    /// The one that serves gdb.
    pub fn with_gdb(root: &Path) -> Result<Self> {
        let options = CONFIGURE.into_iter().chain(WITH_GDB).collect();
        Ok(Build { series: Series::read_with_gdb(root)?, options, name: "Bochs 3.0 with a gdb stub" })
    }

    pub fn digest(&self) -> String {
        format!("{:016x}", self.series.digest(&self.options))
    }

    pub fn folder(&self, paths: &Paths) -> PathBuf {
        paths.cache.join(format!("bochs-{UPSTREAM}-{}", self.digest()))
    }
}

/// All fixes as one patch against the unpacked source.
///
/// # Errors
/// If the source cannot be fetched, or a fix does not go in.
pub fn patch(ui: &Ui, paths: &Paths, series: &Series) -> Result<String> {
    require(ui, &BUILD_NEEDS, "unpacking the source of Bochs 3.0")?;
    let work = tempfile::Builder::new().prefix("bochs-").tempdir_in(&paths.cache)?;
    patch_of(work.path(), &download(ui, work.path())?, series)
}

/// All fixes as one patch against the source in this archive, which is unpacked in `work`.
///
/// # Errors
/// If a fix does not go in.
pub fn patch_of(work: &Path, tarball: &Path, series: &Series) -> Result<String> {
    series.patch(&unpacked(work, tarball)?)
}

/// Fetches and unpacks the source, as it is, into a folder of `work`.
fn unpack(ui: &Ui, work: &Path) -> Result<PathBuf> {
    unpacked(work, &download(ui, work)?)
}

fn unpacked(work: &Path, tarball: &Path) -> Result<PathBuf> {
    let source = work.join("source");
    std::fs::create_dir(&source)?;
    let mut tar = Command::new("tar");
    tar.args(["--strip-components=1", "-xf"]).arg(tarball).arg("-C").arg(&source);
    must(&proc::run(&mut tar, None, |_| {})?, "unpacking Bochs")?;
    Ok(source)
}

pub fn build(ui: &Ui, paths: &Paths, wanted: &Build) -> Result<()> {
    let what = format!("building {}", wanted.name);
    require(ui, &BUILD_NEEDS, &what)?;
    let work = tempfile::Builder::new().prefix("bochs-").tempdir_in(&paths.cache)?;
    let source = unpack(ui, work.path())?;
    let mut step = ui.step(&what);
    // The build with a gdb stub is made seldom: whether its changes go in is seen here.
    Series::read_with_gdb(&paths.root)?.check(&source)?;
    wanted.series.apply(&source)?;
    // The folder is a temporary one: make sure that no file of it looks newer than what was made from it.
    let mut configure = Command::new("./configure");
    configure.args(&wanted.options).current_dir(&source);
    must(&proc::run(&mut configure, None, |line| step.at(line))?, "configuring Bochs")?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    precompile(&source)?;
    let mut make = Command::new("make");
    make.arg(format!("-j{jobs}")).arg("bochs").current_dir(&source);
    must(&proc::run(&mut make, None, |line| step.at(&short(line)))?, "building Bochs")?;
    let output = work.path().join("output");
    std::fs::create_dir(&output)?;
    std::fs::copy(source.join("bochs"), output.join("bochs")).context("the build left no bochs")?;
    let found = look_at(&output.join("bochs"))?;
    ensure!(found.version == UPSTREAM, "the built Bochs says it is {}", found.version);
    let folder = wanted.folder(paths);
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::rename(&output, &folder)?;
    step.done(&format!("{} is built", wanted.name));
    Ok(())
}

/// The headers that each file of the processor begins with are compiled once: reading them takes longer than most of the files.
/// The decoder is left out: it includes them with other macros.
fn precompile(source: &Path) -> Result<()> {
    let cpu = source.join("cpu");
    std::fs::write(cpu.join("first.h"), "#include \"bochs.h\"\n#include \"cpu.h\"\n")?;
    let rules = "decoder/%.o: FIRST =\nfirst.h.gch: first.h\n\
                 \t$(CXX) -x c++-header $(BX_INCDIRS) $(CPPFLAGS) $(CXXFLAGS) $< -o $@\n";
    for (folder, header, rules) in
        [("", "first.h", rules), ("avx", "../first.h", ""), ("cpudb", "../first.h", ""), ("fpu", "../first.h", "")]
    {
        let makefile = cpu.join(folder).join("Makefile");
        let text = std::fs::read_to_string(&makefile).with_context(|| makefile.display().to_string())?;
        let first = format!("FIRST = -DNEED_CPU_REG_SHORTCUTS=1 -include {header}\nCXXFLAGS += $(FIRST)\n");
        std::fs::write(&makefile, format!("{text}\n{first}{rules}"))?;
    }
    let mut make = Command::new("make");
    must(&proc::run(make.args(["-C", "cpu", "first.h.gch"]).current_dir(source), None, |_| {})?, "building Bochs")
}

fn must(said: &proc::Said, what: &str) -> Result<()> {
    if said.status.success() {
        Ok(())
    } else {
        Err(Stop::environment(format!("{what} failed:\n{}", said.tail(15))).into())
    }
}

/// The file that a long compiler line is about.
fn short(line: &str) -> String {
    let source = |w: &&str| w.ends_with(".cc") || w.ends_with(".a") || w.ends_with(".o");
    line.split_whitespace().rev().find(source).unwrap_or("").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_live_line_shows_the_file_that_is_compiled() {
        assert_eq!(short("g++ -c -I.. -O3 cpu/vmx.cc -o cpu/vmx.o"), "cpu/vmx.o");
        assert_eq!(short("make[1]: Entering directory"), "");
    }
}
