//! The boot test with an unmodified Xen as the guest hypervisor.

use super::linux::no_new_warnings;
use super::{Case, Suite, compare};
use crate::backend::Spec;
use crate::backend::xen::Job;
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::session::{LONG, Session};
use crate::transcript::Transcript;
use anyhow::Result;

/// What Xen says where VMX with EPT is there for its guests.
const ENABLED: [&str; 2] = ["HVM: VMX enabled", "HVM: Hardware Assisted Paging (HAP) detected"];

/// Adds the boots and the case.
///
/// # Errors
/// [`crate::error::Stop::Environment`] if Xen or a kernel cannot be had.
pub fn add(suite: &mut Suite, session: &Session) -> Result<()> {
    let job = Job::parse("").map_err(anyhow::Error::msg)?;
    let bare = Spec { timeout: LONG, ..session.xen()?.bare(session, "xen", &job, 1)? };
    let nested = session.under_nvmx(&bare, "xen-nvmx".into(), &session.options(Fields::Auto));
    let boots = [bare, nested].map(|spec| {
        let name = spec.name.clone();
        suite.boots.insert(name.clone(), Ok(spec));
        name
    });
    suite.cases.push(Case {
        name: "Xen as L2 boots Linux in a PVH domain as L3, and all see what they see with Xen alone".into(),
        boots: boots.to_vec(),
        judge: Box::new(|o| same_but_for_the_machine(o[0], o[1])),
    });
    Ok(())
}

/// The records agree, Xen says the same of VMX and of its domains, and dom0 warns of nothing that it does not warn of alone.
///
/// # Errors
/// The first difference.
pub fn same_but_for_the_machine(alone: &Outcome, under: &Outcome) -> Result<(), String> {
    compare::agree(alone, under)?;
    no_new_warnings(alone, under)?;
    let (before, now) = (about_vmx(&alone.transcript), about_vmx(&under.transcript));
    if let Some(missing) = ENABLED.iter().find(|text| !now.contains(text)) {
        return Err(format!("{}: Xen does not say `{missing}`", under.name));
    }
    let longer = before.len().max(now.len());
    let differs = (0..longer).find(|&i| before.get(i) != now.get(i));
    differs.map_or(Ok(()), |i| {
        let text = |list: &[&str]| list.get(i).copied().unwrap_or("nothing more").to_string();
        Err(format!("{}: Xen says `{}`, alone `{}`", under.name, text(&now), text(&before)))
    })
}

/// What Xen says of VMX, its features, and domains with it.
fn about_vmx(said: &Transcript) -> Vec<&str> {
    let lines = said.texts().filter_map(|line| line.strip_prefix("(XEN) "));
    lines
        .map(str::trim)
        .filter(|l| l.starts_with("- ") || ["VMX", "HVM", "d1v"].iter().any(|w| l.contains(w)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::Ended;
    use crate::report::tests::transcript;
    use std::time::Duration;

    fn outcome(feature: &str, more: &[&str]) -> Outcome {
        let feature = format!("(XEN)  - {feature}");
        let mut lines = vec!["(XEN) HVM: VMX enabled", "(XEN) HVM: Hardware Assisted Paging (HAP) detected", &feature];
        lines.extend(["(XEN) System RAM: 1", "(d1) @L3 check name=fork sum=15", "@L2 end status=pass failed=0"]);
        lines.extend(more);
        Outcome {
            name: "x".into(),
            transcript: transcript(&lines),
            ended: Ended::Itself,
            machine: Vec::new(),
            took: Duration::ZERO,
            folder: "/".into(),
        }
    }

    #[test]
    fn a_feature_that_xen_misses_or_a_line_about_a_domain_fails() {
        let alone = outcome("VPID", &["(XEN) System RAM: 2"]);
        let judge = |under: &Outcome| same_but_for_the_machine(&alone, under);
        assert_eq!(judge(&outcome("VPID", &["(XEN) System RAM: 3"])), Ok(()));
        assert_eq!(judge(&outcome("EPT", &[])), Err("x: Xen says `- EPT`, alone `- VPID`".into()));
        let crash = judge(&outcome("VPID", &["(XEN) d1v0 vmentry failure"])).unwrap_err();
        assert_eq!(crash, "x: Xen says `d1v0 vmentry failure`, alone `nothing more`");
    }

    #[test]
    fn xen_without_vmx_fails_although_it_lacks_it_alone_too() {
        let mut none = outcome("VPID", &[]);
        none.transcript.lines.remove(0);
        assert!(same_but_for_the_machine(&none, &none).unwrap_err().contains("VMX enabled"));
    }
}
