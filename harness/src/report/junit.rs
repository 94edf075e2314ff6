//! `test --junit FILE`: what CI programs read. A case that passed only when tried again is told as such.

use super::json::Tests;
use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use std::time::Duration;

/// The file's text.
///
/// # Errors
/// If it cannot be made.
pub fn render(tests: &Tests) -> Result<String> {
    let mut suite = TestSuite::new("boot tests");
    for case in &tests.cases {
        let mut status = match &case.reason {
            None => TestCaseStatus::success(),
            Some(reason) => {
                let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                status.set_message(reason.lines().next().unwrap_or_default()).set_description(reason.as_str());
                status
            }
        };
        for reason in &case.failed_before {
            let mut rerun = quick_junit::TestRerun::new(NonSuccessKind::Failure);
            rerun.set_message(reason.lines().next().unwrap_or_default()).set_description(reason.as_str());
            status.add_rerun(rerun);
        }
        let mut test = TestCase::new(case.name.as_str(), status);
        test.set_classname("nvmx").set_time(Duration::from_secs_f64(case.seconds.max(0.0)));
        suite.add_test_case(test);
    }
    if tests.host_passed + tests.host_failed > 0 {
        let mut status = match tests.host_failed {
            0 => TestCaseStatus::success(),
            _ => TestCaseStatus::non_success(NonSuccessKind::Failure),
        };
        status.set_message(format!("{} passed, {} failed", tests.host_passed, tests.host_failed));
        let mut test = TestCase::new("host tests", status);
        test.set_classname("nvmx");
        suite.add_test_case(test);
    }
    let mut report = Report::new("nvmx");
    report.add_test_suite(suite);
    report.to_string().context("the JUnit report cannot be made")
}

#[cfg(test)]
mod tests {
    use super::super::json::TestCase as Case;
    use super::*;

    #[test]
    fn failures_and_retries_are_in_the_file() {
        let case = |name: &str, reason: Option<&str>, before: &[&str]| Case {
            name: name.into(),
            passed: reason.is_none(),
            reason: reason.map(str::to_string),
            seconds: 1.5,
            attempts: before.len() as u32 + 1,
            failed_before: before.iter().map(|b| b.to_string()).collect(),
        };
        let cases = vec![
            case("a <b> passes", None, &[]),
            case("c fails", Some("it hung\nfor long"), &["first"]),
            case("d passes at last", None, &["it hung"]),
        ];
        let text = render(&Tests { host_passed: 7, host_failed: 0, cases }).unwrap();
        assert!(text.contains(r#"<testsuites name="nvmx" tests="4" skipped="0" failures="1""#), "{text}");
        assert!(text.contains(r#"name="a &lt;b&gt; passes""#) && text.contains(r#"message="it hung""#), "{text}");
        assert!(text.contains("<flakyFailure") && text.contains("<rerunFailure"), "{text}");
    }
}
