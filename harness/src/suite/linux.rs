//! The boot tests with an unmodified Linux as the guest hypervisor.

use super::on_kvm::FEW;
use super::{Case, Judge, Suite, compare};
use crate::backend::linux::{Job, LinuxKvm};
use crate::backend::{Machine, Payload, Spec};
use crate::boot::{Ended, Outcome};
use crate::cli::Fields;
use crate::report::linux::{self as report, named};
use crate::session::{LONG, Session};
use crate::transcript::Transcript;
use anyhow::Result;
use l2_protocol::Kind;
use nvmx_setup::linux::Kernel;
use std::collections::BTreeSet;

/// Features of VMX that the Linux must find under nvmx, as `/proc/cpuinfo` calls them.
const FEATURES: [&str; 3] = ["ept", "vpid", "unrestricted_guest"];
/// How many times as long as alone Linux may take under nvmx until its init runs.
const MORE: f64 = 1.05;

/// A CPU model on which Linux uses 5-level paging. The model has AMX without XFD, as no processor has: Linux then enables
/// only one of the two bits of AMX's state in XCR0, XSETBV refuses that, and Linux dies, bare too.
const FIVE_LEVELS: &str = "sapphire_rapids without amx amx_int8 amx_bf16";
/// The CPU model for Linux 6.1, which stops early on the one with the most VMX features.
const MODEL_OF_61: &str = "corei7_skylake_x";

/// Adds the boots and cases.
///
/// # Errors
/// [`nvmx_setup::error::Stop::Environment`] if Linux or the VMM cannot be had.
pub fn add(suite: &mut Suite, session: &Session) -> Result<()> {
    let linux = session.linux(Kernel::Newest, true)?;
    let job = |words: &str| Job::parse(words).map_err(anyhow::Error::msg);
    let cascade = Payload::new(session.images.guest("cascade")?, FEW);
    let nests = |words: &str| anyhow::Ok(Job { hypervisor: Some(cascade.clone()), ..job(words)? });
    for (name, job, cpus) in [
        ("linux", job("")?, 1),
        ("linux-2", job("loads=on")?, 2),
        ("linux-4", job("vcpus=2 hotplug=on")?, 4),
        ("linux-kexec", job("end=kexec hotplug=on")?, 2),
        ("linux-again", job("end=reset times=2 kill=400 reload=on")?, 1),
        ("linux-off", job("end=power-off")?, 1),
        ("linux-ept0", job("vmm=own ept=0")?, 1),
        ("linux-cascade", nests("")?, 1),
        ("linux-cascade-trapped", nests("enable_shadow_vmcs=0")?, 1),
    ] {
        add_boots(suite, session, &linux, name, &job, |machine| machine.cpus = cpus)?;
    }
    let pair = |name: &str| [format!("{name}-bare"), format!("{name}-nvmx")];
    let same = || -> Judge { Box::new(|o| same_but_for_the_machine(o[0], o[1])) };
    let mut case = |name: &str, boots: [String; 2], judge: Judge| {
        suite.cases.push(Case { name: name.into(), boots: boots.to_vec(), judge });
    };
    case("Linux with KVM as L2 boots Linux as L3, and both see what they see with KVM alone", pair("linux"), same());
    let name = "Linux with KVM on 2 CPUs boots Linux with 2 CPUs, which works much, and 12 small guests, and all see what they see with KVM alone";
    let loaded: Judge = Box::new(|o| same_but_for_the_machine(o[0], o[1]).and_then(|()| did_all_loads(o[1])));
    case(name, pair("linux-2"), loaded);
    let name = "Linux with KVM on 4 CPUs, which go offline and come back, boots Linux with 2 CPUs, and both see what they see with KVM alone";
    case(name, pair("linux-4"), same());
    let name =
        "Linux with KVM on 2 CPUs that starts another kernel while its guest works sees what it sees with KVM alone";
    case(name, pair("linux-kexec"), same());
    suite.long.insert(name.into());
    let fast: Judge = Box::new(|o| boots_as_fast(o[0], o[1]));
    case("Linux takes under nvmx to its init what it takes alone", pair("linux"), fast);
    let name =
        "Linux that is reset while its guest works, kills a guest and loads KVM anew sees what it sees with KVM alone";
    case(name, pair("linux-again"), Box::new(|o| same_but_for_the_machine(o[0], o[1]).and_then(|()| frees_all(o[1]))));
    let name = "Linux without EPT for its guest sees what it sees with KVM alone";
    case(name, pair("linux-ept0"), same());
    for (how, boot) in [("", "linux-cascade"), (" and trapped field access", "linux-cascade-trapped")] {
        let name =
            format!("cascade as L3 of Linux with KVM as L2, with a guest of its own{how}, sees what it sees bare");
        let nested: Judge = Box::new(|o| compare::agree(o[0], o[1]));
        case(&name, ["cascade-few".into(), format!("{boot}-nvmx")], nested);
    }
    let off: Judge = Box::new(|o| switched_off(o[0]));
    let name = "Linux with KVM as L2 switches the machine off while its guest works".into();
    suite.cases.push(Case { name, boots: vec!["linux-off-nvmx".into()], judge: off });
    let job = Job::parse("vmm=own").map_err(anyhow::Error::msg)?;
    add_boots(suite, session, &linux, "linux-la57", &job, |machine| machine.model = FIVE_LEVELS.into())?;
    let judge: Judge = Box::new(|o| same_but_for_the_machine(o[0], o[1]).and_then(|()| boots_as_fast(o[0], o[1])));
    let boots = ["linux-la57-bare", "linux-la57-nvmx"].map(str::to_string).to_vec();
    let name =
        "Linux with 5-level paging takes under nvmx to its init what it takes alone, and boots Linux as L3".into();
    suite.cases.push(Case { name, boots, judge });
    add_linux_61(suite, session)
}

/// The same with the older kernel, where the distribution has it.
fn add_linux_61(suite: &mut Suite, session: &Session) -> Result<()> {
    let linux = session.linux(Kernel::Linux61, false)?;
    if !linux.linux.release.starts_with("6.1.") {
        session.ui.note(&format!("the archive has Linux {} and no 6.1: not tested", linux.linux.release));
        return Ok(());
    }
    let job = Job::parse("vmm=own").map_err(anyhow::Error::msg)?;
    add_boots(suite, session, &linux, "linux-61", &job, |machine| machine.model = MODEL_OF_61.into())?;
    let judge: Judge = Box::new(|o| same_but_for_the_machine(o[0], o[1]).and_then(|()| boots_as_fast(o[0], o[1])));
    let boots = ["linux-61-bare", "linux-61-nvmx"].map(str::to_string).to_vec();
    let name = "Linux 6.1 takes under nvmx to its init what it takes alone, and boots Linux as L3".into();
    suite.cases.push(Case { name, boots, judge });
    Ok(())
}

/// Adds a boot alone on the machine and one under nvmx.
fn add_boots(
    suite: &mut Suite,
    session: &Session,
    linux: &LinuxKvm,
    name: &str,
    job: &Job,
    change: impl Fn(&mut Machine),
) -> Result<()> {
    let mut machine = session.machine.clone();
    change(&mut machine);
    let bare = Spec { timeout: LONG, ..linux.bare(&session.work("linux"), name, job, &machine)? };
    let nested = session.under_nvmx(&bare, format!("{name}-nvmx"), &session.options_with_counters(Fields::Auto));
    [bare, nested].into_iter().for_each(|spec| drop(suite.boots.insert(spec.name.clone(), Ok(spec))));
    Ok(())
}

/// Whenever L2 had left VMX operation, nvmx had as many free frames as at the start of that L2.
fn frees_all(under: &Outcome) -> Result<(), String> {
    let free: Vec<u64> = named(&under.transcript, "frames").filter_map(|r| r.number("free").ok()).collect();
    match free.iter().find(|n| **n != free[0]) {
        _ if free.len() < 3 => Err(format!("{}: it told the free frames only {} times", under.name, free.len())),
        Some(_) => Err(format!("{}: frames are lost: {free:?} were free", under.name)),
        None => Ok(()),
    }
}

/// Every load was done, and told what came out of it.
fn did_all_loads(under: &Outcome) -> Result<(), String> {
    let loads = report::KVM.iter().map(|(stage, _)| *stage).filter(|stage| stage.starts_with(report::ON_DEMAND));
    let checked = |load: &&str| under.transcript.of_kind(Kind::Check).any(|r| r.get("name") == Some(load));
    match loads.into_iter().find(|load| named(&under.transcript, load).next().is_none() || !checked(load)) {
        Some(missing) => Err(format!("{}: {missing} was not done", under.name)),
        None => Ok(()),
    }
}

/// The guest worked, and then the machine went off by itself.
fn switched_off(under: &Outcome) -> Result<(), String> {
    under.verdict().map_err(|e| format!("{}: {e}", under.name))?;
    if named(&under.transcript, "l3_boot").next().is_none() || named(&under.transcript, "l3_work").next().is_some() {
        return Err(format!("{}: the guest did not work just then", under.name));
    }
    match under.ended {
        Ended::Itself => Ok(()),
        _ => Err(format!("{}: the machine was still on", under.name)),
    }
}

/// The records agree; under nvmx the kernel warns of nothing that it does not warn of alone, and finds the VMX that KVM needs.
///
/// # Errors
/// The first difference.
pub fn same_but_for_the_machine(alone: &Outcome, under: &Outcome) -> Result<(), String> {
    compare::agree(alone, under)?;
    no_new_warnings(alone, under)?;
    shows(under, FEATURES)
}

/// What `/proc/cpuinfo` of L2 says that VMX can do.
///
/// # Errors
/// If the kernel did not tell.
pub fn vmx_flags(o: &Outcome) -> Result<Vec<&str>, String> {
    let cpu = named(&o.transcript, "cpu").next().ok_or("the kernel did not tell of the CPU")?;
    Ok(cpu.get("vmx_flags").unwrap_or_default().split(' ').collect())
}

/// `/proc/cpuinfo` of L2 shows these features.
///
/// # Errors
/// The first that it does not show.
pub fn shows<'a>(under: &Outcome, features: impl IntoIterator<Item = &'a str>) -> Result<(), String> {
    let flags = vmx_flags(under)?;
    match features.into_iter().find(|f| !flags.contains(f)) {
        Some(missing) => Err(format!("{}: /proc/cpuinfo does not show {missing}", under.name)),
        None => Ok(()),
    }
}

/// The kernel of L2 warns of nothing that it does not warn of alone.
///
/// # Errors
/// The first new warning.
pub fn no_new_warnings(alone: &Outcome, under: &Outcome) -> Result<(), String> {
    let (before, now) = (warnings(&alone.transcript), warnings(&under.transcript));
    match now.difference(&before).next() {
        Some(new) => Err(format!("{}: the kernel warns, as it does not alone: {new}", under.name)),
        None => Ok(()),
    }
}

/// The kernel's warnings, without their numbers, which tell of times and places.
fn warnings(said: &Transcript) -> BTreeSet<String> {
    let plain = |text: &str| text.split(|c: char| c.is_ascii_digit()).collect::<Vec<_>>().join("");
    named(said, "warning").filter_map(|r| r.get("text")).map(plain).collect()
}

fn boots_as_fast(alone: &Outcome, under: &Outcome) -> Result<(), String> {
    takes_at_most(MORE, "linux_boot", alone, under)
}

/// A stage takes under nvmx at most so many times the instructions that it takes alone.
///
/// # Errors
/// If it takes more, or a boot did not come so far.
pub fn takes_at_most(times: f64, stage: &str, alone: &Outcome, under: &Outcome) -> Result<(), String> {
    let ticks = |o: &Outcome| {
        let record = named(&o.transcript, stage).next();
        record.and_then(|r| r.number("ticks").ok()).map(|n| n as f64).ok_or(format!("{}: no {stage}", o.name))
    };
    let (alone, under) = (ticks(alone)?, ticks(under)?);
    match under <= alone * times {
        true => Ok(()),
        false => Err(format!("{stage}: {under} instructions, alone {alone}: more than {times} times as many")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot;
    use crate::report::tests::transcript;

    fn outcome(ticks: u64, flags: &str, warning: &str) -> Outcome {
        let lines = [
            format!("@L2 event name=cpu vmx_flags=\"{flags}\""),
            format!("@L2 event name=linux_boot ticks={ticks}"),
            format!("@L2 event name=warning text=\"{warning}\""),
            "@L3 check name=fork sum=15".into(),
            "@L2 end status=pass failed=0".into(),
        ];
        boot::tests::outcome("x", &lines.each_ref().map(String::as_str))
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
    fn a_warning_is_known_again_by_its_words_alone() {
        let alone = outcome(100, "", "TSC 123 is odd");
        let under = outcome(100, "ept vpid unrestricted_guest", "TSC 4567 is odd");
        assert_eq!(same_but_for_the_machine(&alone, &under), Ok(()));
    }

    #[test]
    fn lost_frames_and_a_machine_that_stays_on_are_found() {
        let says = |lines: &[&str]| Outcome { transcript: transcript(lines), ..outcome(1, "", "") };
        let frames = |n: [u64; 3]| says(&n.map(|n| format!("@L2 event name=frames free={n}")).each_ref().map(|l| &**l));
        assert_eq!(frees_all(&frames([5, 5, 5])), Ok(()));
        assert!(frees_all(&frames([5, 5, 4])).unwrap_err().contains("[5, 5, 4]"));
        assert!(frees_all(&says(&["@L2 event name=frames free=5"])).is_err());
        let end = "@L2 end status=pass failed=0";
        let off = says(&["@L3 event name=l3_boot", end]);
        assert_eq!(switched_off(&off), Ok(()));
        assert!(switched_off(&Outcome { ended: Ended::Lingered, ..off }).is_err());
        assert!(switched_off(&says(&["@L3 event name=l3_boot", "@L3 event name=l3_work", end])).is_err());
        assert!(switched_off(&says(&[end])).is_err());
    }

    #[test]
    fn a_load_that_was_left_out_is_found() {
        let loads = report::KVM.iter().filter(|(stage, _)| stage.starts_with("load_"));
        let mut lines: Vec<String> = loads
            .flat_map(|(load, _)| [format!("@L3 event name={load} ticks=1"), format!("@L3 check name={load} result=1")])
            .collect();
        let judge = |lines: &[String]| {
            let lines: Vec<&str> = lines.iter().map(|l| &**l).collect();
            did_all_loads(&Outcome { transcript: transcript(&lines), ..outcome(1, "", "") })
        };
        assert_eq!(judge(&lines), Ok(()));
        lines.pop();
        assert!(judge(&lines).unwrap_err().contains("load_guests"));
    }

    #[test]
    fn five_in_a_hundred_more_instructions_are_the_limit() {
        let of = |ticks| outcome(ticks, "", "");
        assert_eq!(boots_as_fast(&of(100), &of(105)), Ok(()));
        assert!(boots_as_fast(&of(100), &of(106)).is_err());
    }
}
