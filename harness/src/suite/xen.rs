//! The boot tests with an unmodified Xen as the guest hypervisor.

use super::linux::no_new_warnings;
use super::{Case, Suite, compare};
use crate::backend::Spec;
use crate::backend::xen::Job;
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::report::linux::named;
use crate::session::{LONG, Session};
use crate::transcript::Transcript;
use anyhow::Result;

/// What Xen says where VMX with EPT is there for its guests.
const ENABLED: [&str; 2] = ["HVM: VMX enabled", "HVM: Hardware Assisted Paging (HAP) detected"];

/// The heading that Xen gives a memory map from the BIOS; one from the boot loader gets another heading.
const FROM_FIRMWARE: &str = "(XEN) Xen-e820 RAM map:";
/// What nvmx keeps for itself, in bytes: at least, and at most.
const LEAST: u64 = 4 << 20;
const MOST: u64 = 64 << 20;

/// Adds the boots and the cases.
///
/// # Errors
/// [`nvmx_setup::error::Stop::Environment`] if Xen or a kernel cannot be had.
pub fn add(suite: &mut Suite, session: &Session) -> Result<()> {
    let job = Job::parse("").map_err(anyhow::Error::msg)?;
    let bare = Spec { timeout: LONG, ..session.xen()?.bare(&session.work("xen"), "xen", &job, &session.machine)? };
    let nested = session.under_nvmx(&bare, "xen-nvmx".into(), &session.options_with_counters(Fields::Auto));
    let boots = [bare, nested].map(|spec| {
        let name = spec.name.clone();
        suite.boots.insert(name.clone(), Ok(spec));
        name
    });
    suite.cases.push(Case {
        name: "Xen as L2 asks the firmware for its memory and is told of all but nvmx's".into(),
        boots: boots.to_vec(),
        judge: Box::new(|o| less_memory(o[0], o[1])),
    });
    suite.cases.push(Case {
        name: "Xen as L2 boots Linux in a PVH domain as L3, and all see what they see with Xen alone".into(),
        boots: boots.to_vec(),
        judge: Box::new(|o| same_but_for_the_machine(o[0], o[1])),
    });
    Ok(())
}

/// The records agree, L3 worked to its end, Xen says the same of VMX and of its domains, and dom0 warns of nothing that it does not warn of alone.
///
/// # Errors
/// The first difference.
pub fn same_but_for_the_machine(alone: &Outcome, under: &Outcome) -> Result<(), String> {
    compare::agree(alone, under)?;
    // `xl` does not tell a domain that has crashed from one that has ended.
    if let Some(short) = [alone, under].iter().find(|o| named(&o.transcript, "l3_work").next().is_none()) {
        return Err(format!("{}: L3 did not come to its end", short.name));
    }
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

/// Xen goes by the map that the firmware gives, and under nvmx there is less in it.
fn less_memory(alone: &Outcome, under: &Outcome) -> Result<(), String> {
    if let Some(other) = [alone, under].iter().find(|o| !o.transcript.texts().any(|l| l == FROM_FIRMWARE)) {
        return Err(format!("{}: Xen did not ask the firmware for a memory map", other.name));
    }
    let (all, left) = (usable(&alone.transcript), usable(&under.transcript));
    match all.checked_sub(left) {
        Some(LEAST..=MOST) => Ok(()),
        _ => Err(format!("{left} bytes of memory are usable, alone {all}")),
    }
}

/// Bytes in the usable ranges of Xen's memory map, which names the first and the last address of each.
fn usable(said: &Transcript) -> u64 {
    let ranges = said.texts().filter_map(|l| l.strip_prefix("(XEN)  [")?.strip_suffix("] (usable)")?.split_once(", "));
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    ranges.filter_map(|(first, last)| Some(number(last)?.checked_sub(number(first)?)? + 1)).sum()
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
    use crate::boot;
    use crate::transcript::Line;

    fn outcome(feature: &str, more: &[&str]) -> Outcome {
        let feature = format!("(XEN)  - {feature}");
        let mut lines = vec!["(XEN) HVM: VMX enabled", "(XEN) HVM: Hardware Assisted Paging (HAP) detected", &feature];
        lines.extend(["(XEN) System RAM: 1", "(d1) @L3 check name=fork sum=15"]);
        lines.extend(["(d1) @L3 event name=l3_work count=1 ticks=1", "@L2 end status=pass failed=0"]);
        lines.extend(more);
        boot::tests::outcome("x", &lines)
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
    fn a_memory_map_with_nvmx_in_it_or_from_the_loader_fails() {
        let map = |last: &str| format!("(XEN)  [0000000000100000, {last}] (usable)");
        let of = |title: &str, last: &str| outcome("VPID", &[title, &map(last), "(XEN)  [0, 1] (reserved)"]);
        let alone = of(FROM_FIRMWARE, "000000003ffeffff");
        assert_eq!(usable(&alone.transcript), 0x3FEF_0000);
        assert_eq!(less_memory(&alone, &of(FROM_FIRMWARE, "000000003dbfffff")), Ok(()));
        assert!(less_memory(&alone, &of(FROM_FIRMWARE, "000000003ffeffff")).is_err());
        assert!(less_memory(&alone, &of("(XEN) Multiboot-e820 RAM map:", "000000003dbfffff")).is_err());
    }

    #[test]
    fn xen_without_vmx_fails_although_it_lacks_it_alone_too() {
        let mut none = outcome("VPID", &[]);
        none.transcript.lines.remove(0);
        assert!(same_but_for_the_machine(&none, &none).unwrap_err().contains("VMX enabled"));
    }

    #[test]
    fn a_domain_that_crashes_in_both_boots_fails() {
        let mut short = outcome("VPID", &[]);
        short.transcript.lines.retain(|line| !matches!(line, Line::Record(r) if r.get("name") == Some("l3_work")));
        assert_eq!(same_but_for_the_machine(&short, &short), Err("x: L3 did not come to its end".into()));
    }
}
