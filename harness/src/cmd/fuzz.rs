//! `fuzz`: the libFuzzer targets of tests/fuzz, built with the host's stable compiler and run side by side.
//!
//! Coverage comes from LLVM's SanitizerCoverage pass, which `-C passes` adds without a nightly compiler. Each target starts
//! from the corpus in the repository; what it finds beside that lies in `target/fuzz/corpus`.

use crate::cli::FuzzArgs;
use anyhow::{Context, Result};
use nvmx_setup::error::Stop;
use nvmx_setup::paths::Paths;
use nvmx_setup::proc::{self, Said};
use nvmx_setup::toolchain::{Compiler, clean};
use nvmx_setup::ui::Ui;
use nvmx_setup::{Need, require};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// The targets: a file each in tests/fuzz/targets.
const TARGETS: [&str; 5] = ["operands", "checks", "ept", "sequences", "images"];
/// What makes a program one that libFuzzer can guide, and wrong arithmetic a panic.
const FLAGS: [&str; 9] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "-Cdebug-assertions",
    "-Coverflow-checks",
    "-Cdebuginfo=1",
];
/// Longest input. The corpus in the repository has shorter ones only, so that it stays small.
const MAX_LEN: &str = "-max_len=4096";
const MAX_LEN_KEPT: &str = "-max_len=512";

/// Runs the command.
///
/// # Errors
/// [`Stop::Guest`] if an input breaks something, [`Stop::Usage`] if there is no such target.
pub fn run(ui: &Ui, args: &FuzzArgs) -> Result<()> {
    let mut targets = choose(&args.targets)?;
    if let Some(shard) = args.shard {
        targets = shard.of(targets);
    }
    if args.input.is_some() && targets.len() != 1 {
        return Err(Stop::Usage("--input needs the one target that it is for".into()).into());
    }
    let paths = Paths::find()?;
    require(ui, &[Need::program("g++", "g++")], "libFuzzer")?;
    let programs = build(ui, &paths)?;
    if let (Some(input), [target]) = (&args.input, targets.as_slice()) {
        let said = proc::run(Command::new(programs.join(target)).arg(input), None, |line| ui.line(line))?;
        return if said.status.success() { Ok(()) } else { Err(Stop::Guest(format!("{target} fails")).into()) };
    }
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let step = ui.step(&format!("fuzzing {} for {} s each", targets.join(", "), args.seconds));
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let worker = || {
            while let Some(target) = targets.get(next.fetch_add(1, Ordering::SeqCst)) {
                if let Some(problem) = one(ui, &paths, &programs, target, args)? {
                    failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(problem);
                }
            }
            Ok(())
        };
        let workers: Vec<_> = (0..args.jobs).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|w| w.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a worker panicked")))).collect()
    });
    drop(step);
    results.into_iter().collect::<Result<()>>()?;
    let failed = failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    if failed.is_empty() { Ok(()) } else { Err(Stop::Guest(failed.join("\n")).into()) }
}

fn choose(wanted: &[String]) -> Result<Vec<&'static str>, Stop> {
    if wanted.is_empty() {
        return Ok(TARGETS.to_vec());
    }
    let find = |name: &String| TARGETS.iter().copied().find(|target| target == name);
    let unknown = |name| Stop::Usage(format!("there is no target `{name}`; there are: {}", TARGETS.join(", ")));
    wanted.iter().map(|name| find(name).ok_or_else(|| unknown(name))).collect()
}

/// Builds all targets; returns the folder with the programs.
fn build(ui: &Ui, paths: &Paths) -> Result<PathBuf> {
    let host = Compiler::of_host().ok_or_else(|| Stop::environment("no cargo and rustc for the fuzz targets"))?;
    let folder = paths.target.join("fuzz");
    let mut step = ui.step("building the fuzz targets");
    let mut cargo = Command::new(&host.cargo);
    // With a target named, the flags are for it alone and not for build scripts.
    clean(&mut cargo).env("RUSTC", &host.rustc).env("RUSTFLAGS", FLAGS.join(" ")).current_dir(&paths.root);
    cargo.args(["build", "--locked", "--release", "-p", "nvmx-fuzz", "--target", host.host(), "--target-dir"]);
    let said = proc::run(cargo.arg(&folder), None, |line| step.at(line))?;
    if !said.status.success() {
        drop(step);
        return Err(Stop::Guest(format!("the fuzz targets did not build:\n{}", said.tail(40))).into());
    }
    step.done("the fuzz targets are built");
    Ok(folder.join(host.host()).join("release"))
}

/// Runs one target; returns what it broke.
fn one(ui: &Ui, paths: &Paths, programs: &Path, target: &str, args: &FuzzArgs) -> Result<Option<String>> {
    let start = Instant::now();
    let (found, broken) = (paths.target.join("fuzz/corpus").join(target), paths.target.join("fuzz/broken"));
    let kept = paths.root.join("tests/fuzz/corpus").join(target);
    for folder in [&found, &broken, &kept] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let mut program = Command::new(programs.join(target));
    program.arg(format!("-artifact_prefix={}/{target}-", broken.display()));
    program.args([MAX_LEN, "-timeout=20", "-print_final_stats=1"]).arg(format!("-max_total_time={}", args.seconds));
    program.args(args.seed.map(|seed| format!("-seed={seed}")));
    let log = paths.target.join("fuzz").join(format!("{target}.log"));
    let said = proc::run(program.arg(&found).arg(&kept), Some(&log), |_| {})?;
    let (runs, coverage) = figures(&said.text);
    let seconds = start.elapsed().as_secs();
    if !said.status.success() {
        ui.line(&format!("FAIL {target}: broken after {seconds} s, {runs} runs"));
        return Ok(Some(problem(target, &said, &log)));
    }
    ui.line(&format!("pass {target}: {runs} runs, {coverage} edges covered, {seconds} s"));
    if args.keep {
        keep(ui, programs, target, &kept, &found)?;
    }
    Ok(None)
}

/// Runs and covered edges, as libFuzzer tells them.
fn figures(text: &str) -> (&str, &str) {
    let runs = text.lines().rev().find_map(|l| l.strip_prefix("stat::number_of_executed_units:"));
    let coverage = text.lines().rev().find_map(|l| l.split_once("cov: ")?.1.split(' ').next());
    (runs.map_or("?", str::trim), coverage.unwrap_or("?"))
}

/// What broke, and how to see it again.
fn problem(target: &str, said: &Said, log: &Path) -> String {
    let reason = said.text.lines().find(|l| l.contains("panicked at")).or_else(|| said.text.lines().last());
    let input = said.text.lines().find_map(|l| l.split_once("Test unit written to ").map(|(_, file)| file.trim()));
    let again = input.map_or(String::new(), |file| format!("\n  again: ./nvmx fuzz {target} --input {file}"));
    format!("{target}: {}{again}\n  its output: {}", reason.unwrap_or("it failed"), log.display())
}

/// Makes the corpus in the repository anew: the fewest inputs that cover what it and the new ones cover.
fn keep(ui: &Ui, programs: &Path, target: &str, kept: &Path, found: &Path) -> Result<()> {
    let count = || fs::read_dir(kept).map(Iterator::count).unwrap_or(0);
    let before = count();
    let parent = kept.parent().context("the corpus has no folder")?;
    let fewest = tempfile::Builder::new().prefix(".fewest-").tempdir_in(parent)?;
    let mut program = Command::new(programs.join(target));
    program.args(["-merge=1", "-set_cover_merge=1", "-use_counters=0", MAX_LEN_KEPT]);
    let said = proc::run(program.arg(fewest.path()).arg(kept).arg(found), None, |_| {})?;
    anyhow::ensure!(said.status.success(), "the corpus of {target} could not be merged:\n{}", said.tail(10));
    fs::remove_dir_all(kept)?;
    fs::rename(fewest.keep(), kept)?;
    ui.line(&format!("{target}: {} inputs kept, {before} before", count()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_target_has_its_file_and_each_file_its_target() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/targets");
        let mut files: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        files.sort();
        let mut targets = TARGETS.to_vec();
        targets.sort_unstable();
        assert_eq!(files, targets);
    }

    #[test]
    fn a_target_is_known_by_its_name() {
        assert_eq!(choose(&[]).unwrap(), TARGETS);
        assert_eq!(choose(&["ept".into()]).unwrap(), ["ept"]);
        assert_eq!(choose(&["wibble".into()]).unwrap_err().code(), 2);
    }

    #[test]
    fn figures_are_the_last_that_libfuzzer_tells() {
        let text =
            "#2 INITED cov: 10 ft: 3\n#9 DONE   cov: 139 ft: 371 corp: 133\nstat::number_of_executed_units: 786052\n";
        assert_eq!(figures(text), ("786052", "139"));
        assert_eq!(figures("nothing"), ("?", "?"));
    }
}
