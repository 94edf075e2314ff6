//! `test`: host tests by cargo, then boots.

use crate::backend::host::L0;
use crate::cli::{L0Args, TestArgs};
use crate::error::Stop;
use crate::paths::Paths;
use crate::proc;
use crate::session::Session;
use crate::setup::toolchain::{Compiler, clean};
use crate::suite::{Verdict, cases, compare, kvm_waivers};
use crate::ui::Ui;
use anyhow::Result;
use owo_colors::Style;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Count {
    passed: usize,
    failed: usize,
}

/// Runs the command.
///
/// # Errors
/// [`Stop::Guest`] if a test fails.
pub fn run(ui: &Ui, args: &TestArgs) -> Result<()> {
    let start = Instant::now();
    let mut total = Count::default();
    if !args.boot_only && !args.list && args.filter.is_none() {
        total = host_tests(ui)?;
    }
    if !args.host_only {
        let boots = boot_tests(ui, args)?;
        if args.list {
            return Ok(());
        }
        total = Count { passed: total.passed + boots.passed, failed: total.failed + boots.failed };
    }
    ui.line(&format!("all tests: {:.0} s", start.elapsed().as_secs_f64()));
    // The form that CI programs look for.
    ui.line(&format!("{} passed, {} failed", total.passed, total.failed));
    match total {
        Count { failed: 0, passed: 1.. } => Ok(()),
        Count { failed: 0, .. } => Err(Stop::Usage("no test has run".into()).into()),
        Count { failed, .. } => Err(Stop::Guest(format!("{failed} tests failed")).into()),
    }
}

/// What a host can run: the default members of the workspace.
fn host_tests(ui: &Ui) -> Result<Count> {
    let paths = Paths::find()?;
    let host = Compiler::of_host().ok_or_else(|| Stop::environment("no cargo and rustc for the host tests"))?;
    let mut step = ui.step("host tests");
    let mut cargo = Command::new(&host.cargo);
    clean(&mut cargo).env("RUSTC", &host.rustc).current_dir(&paths.root);
    // Every feature that a host can build, so that no test is left out.
    cargo.args(["test", "--locked", "--no-fail-fast", "--features", "l2-protocol/std"]);
    let said = proc::run(&mut cargo, None, |line| step.at(line))?;
    let mut count = count_tests(&said.text);
    ui.detail(&said.text);
    let text = format!("host tests: {} passed, {} failed", count.passed, count.failed);
    if said.status.success() {
        step.done(&text);
    } else {
        drop(step);
        if !ui.verbose {
            ui.note(&said.text);
        }
        ui.note(&text);
        // A test that does not compile is a failure too.
        count.failed = count.failed.max(1);
    }
    Ok(count)
}

fn count_tests(text: &str) -> Count {
    let mut count = Count::default();
    for line in text.lines().filter_map(|l| l.trim().strip_prefix("test result: ")) {
        let number = |word: &str| {
            let part = line.split([';', '.']).map(str::trim).find(|p| p.ends_with(word));
            part.and_then(|p| p.split(' ').next()?.parse::<usize>().ok()).unwrap_or(0)
        };
        count.passed += number(" passed");
        count.failed += number(" failed");
    }
    count
}

fn boot_tests(ui: &Ui, args: &TestArgs) -> Result<Count> {
    let l0 = L0Args {
        // The suite names CPU models, which only an emulated machine has.
        l0: L0::Bochs,
        bochs: args.bochs.clone(),
        cpu_model: None,
        memory: 256,
        cpus: 1,
        timeout: Some(Duration::from_secs(180)),
    };
    let session = Session::start(ui, &l0)?;
    let mut suite = cases::all(&session)?;
    if let Some(filter) = &args.filter {
        suite.filter(filter);
    }
    if args.list {
        for case in &suite.cases {
            ui.line(&case.name);
        }
        for waiver in compare::WAIVERS {
            ui.line(&format!("waived: {} {}: {}", waiver.check, waiver.key, waiver.why));
        }
        for waiver in kvm_waivers::WAIVERS {
            ui.line(&format!("waived under KVM: {}: {}", waiver.id, waiver.why));
        }
        return Ok(Count::default());
    }
    let (passed, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let step = ui.step(&format!("{} boots for {} boot tests", suite.boots.len(), suite.cases.len()));
    suite.run(&session, args.jobs as usize, |verdict| {
        tell(ui, verdict);
        if verdict.result.is_ok() { &passed } else { &failed }.fetch_add(1, Ordering::SeqCst);
    })?;
    drop(step);
    let count = Count { passed: passed.into_inner(), failed: failed.into_inner() };
    // No case may get lost on the way.
    anyhow::ensure!(count.passed + count.failed == suite.cases.len(), "some boot tests were not judged");
    Ok(count)
}

fn tell(ui: &Ui, verdict: &Verdict<'_>) {
    let (mark, style) = match verdict.result {
        Ok(()) => ("pass", Style::new().green()),
        Err(_) => ("FAIL", Style::new().red().bold()),
    };
    ui.line(&format!("{} {} ({:.1} s)", ui.paint(mark, style), verdict.case.name, verdict.seconds));
    if let Err(reason) = &verdict.result {
        for line in reason.lines().chain(verdict.folders.iter().map(String::as_str)) {
            ui.line(&format!("     {line}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tests_of_all_crates_are_summed() {
        let text = "running 3 tests\ntest result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n\
                    test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(count_tests(text), Count { passed: 15, failed: 2 });
        assert_eq!(count_tests("error: could not compile"), Count::default());
    }
}
