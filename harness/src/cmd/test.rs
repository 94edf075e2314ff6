//! `test`: host tests by cargo, then boots.

use crate::backend::Unit;
use crate::backend::host::L0;
use crate::cli::{L0Args, TestArgs};
use crate::report::json::{Document, Report, TestCase, Tests};
use crate::report::junit;
use crate::report::provenance::{Place, Provenance};
use crate::session::Session;
use crate::suite::select::{Selection, topics};
use crate::suite::{Suite, Verdict, cases, compare, kvm_waivers, usual};
use anyhow::Result;
use nvmx_setup::error::Stop;
use nvmx_setup::output::Output;
use nvmx_setup::paths::Paths;
use nvmx_setup::proc;
use nvmx_setup::toolchain::{Compiler, clean};
use nvmx_setup::ui::Ui;
use owo_colors::Style;
use std::collections::BTreeSet;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
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
    let selection = Selection {
        contains: args.filter.clone(),
        exact: args.exact.clone(),
        exclude: args.exclude.clone(),
        long: args.long,
        shard: args.shard,
    };
    let json = args.json.as_deref().map(Output::prepare).transpose()?;
    let junit = args.junit.as_deref().map(Output::prepare).transpose()?;
    if let Some(folder) = &args.trace {
        let made = std::fs::create_dir_all(folder);
        made.map_err(|error| Stop::Usage(format!("--trace {}: {error}", folder.display())))?;
    }
    ui.reserve_stdout(json.as_ref().or(junit.as_ref()));
    let plan = plan(ui, &selection, args.l0)?;
    if args.list {
        list(ui, &plan);
        return Ok(());
    }
    // A selection is of boot tests, and host tests are the first share's.
    let selected = !(args.filter.is_empty() && args.exact.is_empty() && args.exclude.is_empty());
    let first = args.shard.is_none_or(|shard| shard.number == 1);
    let host = if args.boot_only || selected || !first { Count::default() } else { host_tests(ui)? };
    let mut place = None;
    let cases = if args.host_only { Vec::new() } else { boot_tests(ui, args, &selection, &plan, &mut place)? };
    let tests = Tests { host_passed: host.passed, host_failed: host.failed, cases };
    if let Some(output) = &junit {
        output.write(&junit::render(&tests)?)?;
    }
    let total = Count {
        passed: host.passed + tests.cases.iter().filter(|case| case.passed).count(),
        failed: host.failed + tests.cases.iter().filter(|case| !case.passed).count(),
    };
    let again: Vec<&TestCase> = tests.cases.iter().filter(|case| case.passed && case.attempts > 1).collect();
    for case in &again {
        ui.line(&format!("passed only when tried again: {} ({} times)", case.name, case.attempts));
    }
    if let Some(output) = &json {
        let from = Provenance::of(&Paths::find()?.root, place);
        Document::new(from, Report::Test(tests.clone())).write(output)?;
    }
    ui.line(&format!("all tests: {:.0} s", start.elapsed().as_secs_f64()));
    // The form that CI programs look for.
    ui.line(&format!("{} passed, {} failed", total.passed, total.failed));
    match total {
        Count { failed: 0, passed: 1.. } => Ok(()),
        // With more machines than tests one has nothing to do.
        Count { failed: 0, .. } if args.shard.is_some() && !selected => Ok(()),
        Count { failed: 0, .. } => Err(Stop::Usage("no test has run".into()).into()),
        Count { failed, .. } => Err(Stop::Guest(format!("{failed} tests failed")).into()),
    }
}

/// The cases that are selected, described without setting anything up.
fn plan(ui: &Ui, selection: &Selection, l0: L0) -> Result<Suite> {
    let session = Session::dry(ui)?;
    let mut suite = if l0 == L0::Bochs { cases::all(&session)? } else { usual::alone(&session)? };
    if let [name, ..] = selection.unknown(&suite).as_slice() {
        return Err(Stop::Usage(format!("no boot test is named `{name}`: ./nvmx test --list names them")).into());
    }
    suite.select(selection);
    Ok(suite)
}

fn list(ui: &Ui, plan: &Suite) {
    for case in &plan.cases {
        ui.line(&case.name);
    }
    for waiver in compare::WAIVERS {
        ui.note(&format!("waived: {} {}: {}", waiver.check, waiver.key, waiver.why));
    }
    for waiver in kvm_waivers::WAIVERS {
        ui.note(&format!("waived under KVM: {}: {}", waiver.id, waiver.why));
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

/// The cases, judged, and in `place` the machine that they booted on where they did not say otherwise.
fn boot_tests(
    ui: &Ui,
    args: &TestArgs,
    selection: &Selection,
    plan: &Suite,
    place: &mut Option<Place>,
) -> Result<Vec<TestCase>> {
    if plan.cases.is_empty() {
        return Ok(Vec::new());
    }
    let l0 = L0Args {
        // The whole suite names CPU models, which only an emulated machine has.
        l0: args.l0,
        bochs: args.bochs.clone(),
        cpu_model: None,
        memory: 256,
        cpus: 1,
        timeout: Some(Duration::from_secs(180)),
    };
    let session = Session::start(ui, &l0)?;
    *place = Some(Place::of(&session));
    let topics = topics(plan, &plan.topics);
    let mut suite = match args.l0 {
        L0::Bochs => cases::some(&session, |topic| topics.contains(topic))?,
        _ => usual::alone(&session)?,
    };
    // Beside each other boots would disturb what is measured.
    let jobs = if session.backend.unit() == Unit::Cycles { 1 } else { args.jobs as usize };
    let planned: BTreeSet<String> = plan.cases.iter().map(|case| case.name.clone()).collect();
    match selection.shard {
        // What cannot be had on one machine must not change the others' shares.
        Some(_) => suite.keep(&planned),
        None => suite.select(selection),
    }
    suite.traces = args.trace.clone();
    let count = suite.cases.len();
    let done: Mutex<Vec<TestCase>> = Mutex::default();
    for attempt in 1..=args.retry + 1 {
        let step = ui.step(&format!("{} boots for {} boot tests", suite.boots.len(), suite.cases.len()));
        suite.run(&session, jobs, |verdict| {
            tell(ui, verdict, attempt);
            note(&mut done.lock().unwrap_or_else(PoisonError::into_inner), verdict, attempt);
        })?;
        drop(step);
        let cases = done.lock().unwrap_or_else(PoisonError::into_inner);
        let failed: BTreeSet<String> = cases.iter().filter(|c| !c.passed).map(|c| c.name.clone()).collect();
        if failed.is_empty() {
            break;
        }
        suite.keep(&failed);
    }
    let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    // No case may get lost on the way.
    anyhow::ensure!(done.len() == count, "some boot tests were not judged");
    Ok(done)
}

/// Adds a verdict, or puts it in the place of the one before.
fn note(done: &mut Vec<TestCase>, verdict: &Verdict<'_>, attempt: u32) {
    let old = done.iter().position(|case| case.name == verdict.case.name).map(|at| done.remove(at));
    let mut failed_before = Vec::new();
    if let Some(old) = old {
        failed_before = old.failed_before;
        failed_before.extend(old.reason);
    }
    done.push(TestCase {
        name: verdict.case.name.clone(),
        passed: verdict.result.is_ok(),
        reason: verdict.result.clone().err(),
        seconds: (verdict.seconds * 10.0).round() / 10.0,
        attempts: attempt,
        failed_before,
    });
}

fn tell(ui: &Ui, verdict: &Verdict<'_>, attempt: u32) {
    let (mark, style) = match verdict.result {
        Ok(()) => ("pass", Style::new().green()),
        Err(_) => ("FAIL", Style::new().red().bold()),
    };
    let again = if attempt > 1 { format!(", attempt {attempt}") } else { String::new() };
    ui.line(&format!("{} {} ({:.1} s{again})", ui.paint(mark, style), verdict.case.name, verdict.seconds));
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
    fn every_boot_test_is_described_without_a_machine_and_named_once() {
        let start = Instant::now();
        let plan = plan(&Ui::new(false), &Selection::default(), L0::Bochs).unwrap();
        assert!(start.elapsed() < Duration::from_secs(1), "the list takes {:?}", start.elapsed());
        let names: BTreeSet<&str> = plan.cases.iter().map(|case| case.name.as_str()).collect();
        assert!(names.len() > 40 && names.len() == plan.cases.len());
        for case in &plan.cases {
            for boot in &case.boots {
                assert!(plan.boots.contains_key(boot), "{}: no boot is named {boot}", case.name);
            }
        }
        let of = |topic| plan.topics.values().filter(|t| **t == topic).count();
        assert!(of("KVM") > 3 && of("Linux") > 3 && of("Xen") > 0);
        let on_kvm = super::plan(&Ui::new(false), &Selection::default(), L0::Kvm).unwrap();
        assert!(
            !on_kvm.cases.is_empty()
                && on_kvm.cases.iter().all(|case| names.contains(case.name.as_str()) || case.name.starts_with("KVM"))
        );
        let exact = Selection { exact: vec!["no such test".into()], ..Selection::default() };
        assert!(super::plan(&Ui::new(false), &exact, L0::Bochs).is_err());
    }

    #[test]
    fn a_retry_keeps_the_failure_before_it() {
        let case = crate::suite::Case { name: "x".into(), boots: Vec::new(), judge: Box::new(|_| Ok(())) };
        let verdict = |result| Verdict { case: &case, result, folders: Vec::new(), seconds: 1.0 };
        let mut done = Vec::new();
        note(&mut done, &verdict(Err("it hung".into())), 1);
        note(&mut done, &verdict(Ok(())), 2);
        let [one] = done.as_slice() else { panic!("{done:?}") };
        assert!(one.passed && one.attempts == 2 && one.failed_before == ["it hung"]);
    }

    #[test]
    fn the_tests_of_all_crates_are_summed() {
        let text = "running 3 tests\ntest result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n\
                    test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(count_tests(text), Count { passed: 15, failed: 2 });
        assert_eq!(count_tests("error: could not compile"), Count::default());
    }
}
