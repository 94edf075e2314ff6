//! The boot tests with an unmodified Linux as the guest hypervisor.

use super::on_kvm::FEW;
use super::{Case, Judge, Suite, compare};
use crate::backend::linux::Job;
use crate::backend::{Payload, Spec};
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::report::linux::named;
use crate::session::{LONG, Session};
use crate::setup::linux::Kernel;
use crate::transcript::Transcript;
use anyhow::Result;
use std::collections::BTreeSet;

/// Features of VMX that the Linux must find under nvmx, as `/proc/cpuinfo` calls them.
const FEATURES: [&str; 3] = ["ept", "vpid", "unrestricted_guest"];
/// How much longer Linux may take under nvmx to its init, of what it takes alone.
const MORE: f64 = 1.05;

/// Adds the boots and cases.
///
/// # Errors
/// [`crate::error::Stop::Environment`] if Linux or the VMM cannot be had.
pub fn add(suite: &mut Suite, session: &Session) -> Result<()> {
    let linux = session.linux(Kernel::Newest, true)?;
    let job = Job::parse("").map_err(anyhow::Error::msg)?;
    let nests = Job { hypervisor: Some(Payload::new(session.images.guest("cascade")?, FEW)), ..job.clone() };
    for (name, job, cpus) in [("linux", &job, 1), ("linux-2", &job, 2), ("linux-cascade", &nests, 1)] {
        let bare = Spec { timeout: LONG, ..linux.bare(session, name, job, cpus)? };
        let nested = linux.nested(session, name, &bare, &session.options(Fields::Auto));
        [bare, nested].into_iter().for_each(|spec| drop(suite.boots.insert(spec.name.clone(), Ok(spec))));
    }
    let mut case = |name: &str, boots: [&str; 2], judge: Judge| {
        suite.cases.push(Case { name: name.into(), boots: boots.map(str::to_string).to_vec(), judge });
    };
    let both = ["linux-bare", "linux-nvmx"];
    let same: Judge = Box::new(|o| same_but_for_the_machine(o[0], o[1]));
    case("Linux with KVM as L2 boots Linux as L3, and both see what they see with KVM alone", both, same);
    let same: Judge = Box::new(|o| same_but_for_the_machine(o[0], o[1]));
    let name = "Linux with KVM on 2 CPUs boots Linux with 2 CPUs, and both see what they see with KVM alone";
    case(name, ["linux-2-bare", "linux-2-nvmx"], same);
    case("Linux takes under nvmx to its init what it takes alone", both, Box::new(|o| boots_as_fast(o[0], o[1])));
    let nested: Judge = Box::new(|o| compare::agree(o[0], o[1]));
    let boots = ["cascade-few", "linux-cascade-nvmx"];
    case("cascade as L3 of Linux with KVM as L2, with a guest of its own, sees what it sees bare", boots, nested);
    Ok(())
}

/// The records agree; under nvmx the kernel warns of nothing that it does not warn of alone, and finds the VMX that KVM needs.
///
/// # Errors
/// The first difference.
pub fn same_but_for_the_machine(alone: &Outcome, under: &Outcome) -> Result<(), String> {
    compare::agree(alone, under)?;
    let (before, now) = (warnings(&alone.transcript), warnings(&under.transcript));
    if let Some(new) = now.difference(&before).next() {
        return Err(format!("{}: the kernel warns, as it does not alone: {new}", under.name));
    }
    let cpu = named(&under.transcript, "cpu").next().ok_or("the kernel did not tell of the CPU")?;
    let flags: Vec<&str> = cpu.get("vmx_flags").unwrap_or_default().split(' ').collect();
    match FEATURES.iter().find(|f| !flags.contains(f)) {
        Some(missing) => Err(format!("{}: /proc/cpuinfo does not show {missing}", under.name)),
        None => Ok(()),
    }
}

fn warnings(said: &Transcript) -> BTreeSet<&str> {
    named(said, "warning").filter_map(|r| r.get("text")).collect()
}

fn boots_as_fast(alone: &Outcome, under: &Outcome) -> Result<(), String> {
    let ticks = |o: &Outcome| {
        let record = named(&o.transcript, "linux_boot").next();
        record.and_then(|r| r.number("ticks").ok()).map(|n| n as f64).ok_or(format!("{} did not reach init", o.name))
    };
    let (alone, under) = (ticks(alone)?, ticks(under)?);
    match under <= alone * MORE {
        true => Ok(()),
        false => Err(format!("{under} instructions to init, alone {alone}: more than {MORE} times as many")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::Ended;
    use crate::report::tests::transcript;
    use std::time::Duration;

    fn outcome(ticks: u64, flags: &str, warning: &str) -> Outcome {
        let lines = [
            format!("@L2 event name=cpu vmx_flags=\"{flags}\""),
            format!("@L2 event name=linux_boot ticks={ticks}"),
            format!("@L2 event name=warning text=\"{warning}\""),
            "@L3 check name=fork sum=15".into(),
            "@L2 end status=pass failed=0".into(),
        ];
        Outcome {
            name: "x".into(),
            transcript: transcript(&lines.each_ref().map(String::as_str)),
            ended: Ended::Itself,
            machine: Vec::new(),
            took: Duration::ZERO,
            folder: "/".into(),
        }
    }

    #[test]
    fn a_new_warning_or_a_missing_feature_fails() {
        let alone = outcome(100, "ept vpid unrestricted_guest pml", "odd clock");
        let judge = |under: &Outcome| same_but_for_the_machine(&alone, under);
        assert_eq!(judge(&outcome(100, "ept vpid unrestricted_guest", "odd clock")), Ok(()));
        assert!(judge(&outcome(100, "ept vpid unrestricted_guest", "bug")).unwrap_err().contains("bug"));
        assert!(judge(&outcome(100, "ept vpid", "odd clock")).unwrap_err().contains("unrestricted_guest"));
    }

    #[test]
    fn five_in_a_hundred_more_instructions_are_the_limit() {
        let of = |ticks| outcome(ticks, "", "");
        assert_eq!(boots_as_fast(&of(100), &of(105)), Ok(()));
        assert!(boots_as_fast(&of(100), &of(106)).is_err());
    }
}
