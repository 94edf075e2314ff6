//! The boot tests in which a real KVM runs on the emulated machine: below nvmx, and in its place.

use super::{Case, Judge, Suite, compare, kvm_waivers, messages, refused};
use crate::backend::kvm_in_bochs::KvmInBochs;
use crate::backend::kvm_linux::KvmLinux;
use crate::backend::{Backend, Machine, Payload, Spec};
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::report;
use crate::session::{LONG, Session};
use anyhow::Result;
use l2_protocol::{Kind, OwnedRecord};
use std::sync::Arc;

/// Events in a bracket: deep stacks pay for each, and averages stay the same.
pub const FEW: &str = "events=50";
/// Parts of `smp` under KVM. Left out: `mwait`, which KVM does not offer; `exceptions`, whose timer runs out before KVM is done with an
/// exit, so that its guest gets nowhere; `init`, which ends in firmware, of which the VMM has none.
const PARTS_OF_SMP: &str = "part=messages,guests,migrate,memory,events,broadcast";
/// What a CPUID of L3 that L2 handles may take with nvmx under KVM: exits to KVM by KVM's own count, and instructions: a
/// fifth of the 391,000 that KVM in KVM takes. The exits include the warm-up, so that their average is no whole number.
const MOST_EXITS: f64 = 12.0;
const MOST_INSTRUCTIONS: f64 = 78_200.0;

/// Adds the boots and cases.
///
/// # Errors
/// [`nvmx_setup::error::Stop::Environment`] if Linux or the VMM cannot be had.
pub fn add(suite: &mut Suite, session: &Session) -> Result<()> {
    let kvm = session.kvm_on_bochs()?;
    let without = |parameters: &str| {
        let linux = KvmLinux { parameters: parameters.into(), ..kvm.linux.clone() };
        KvmInBochs { linux, ..kvm.clone() }
    };
    let (no_nesting, no_ept) = (without("nested=0 ept=1"), without("nested=1 ept=0"));
    let mut boot = |name: &str, backend: Option<KvmInBochs>, spec: Result<Spec>| {
        let spec = spec.map(|spec| Spec { name: name.into(), timeout: LONG, ..spec }).map_err(|e| format!("{e:#}"));
        suite.boots.insert(name.into(), spec);
        if let Some(backend) = backend {
            let backend: Arc<dyn Backend + Send> = Arc::new(backend);
            suite.backends.insert(name.into(), backend);
        }
    };
    boot("cascade-kvm", Some(kvm.clone()), session.bare("cascade", FEW));
    boot("cascade-nvmx-kvm", Some(kvm.clone()), session.nested("cascade", FEW, Fields::Auto));
    boot("cascade-nvmx-kvm-trapped", Some(kvm.clone()), session.nested("cascade", FEW, Fields::Trapped));
    boot("outer-nvmx-kvm", Some(kvm.clone()), session.nested("faulty", "outer", Fields::Auto));
    boot("outer-kvm", Some(kvm.clone()), session.bare("faulty", "outer"));
    // Left out, for KVM's own doing:
    // - shadow: goes through all fields, of which KVM lacks some (kvm-fields);
    // - msrs: most MSRs are KVM's, and it does not move the APIC over memory;
    // - machine_checks: it has no source of them;
    // - debugctl: it takes writes of LBR and BTF to IA32_DEBUGCTL and forgets them.
    const ARGS: &str = "skip=shadow,msrs,debugctl,machine_checks";
    let on_2 = |spec: Result<Spec>| spec.map(|spec| Spec { machine: Machine { cpus: 2, ..spec.machine }, ..spec });
    boot("smp-2-parts", None, on_2(session.bare("smp", PARTS_OF_SMP)));
    boot("smp-2-nvmx-kvm", Some(kvm.clone()), on_2(session.nested("smp", PARTS_OF_SMP, Fields::Auto)));
    boot("vmxtest-nvmx-kvm", Some(kvm), session.nested("vmxtest", ARGS, Fields::Auto));
    boot("vmxtest-bare-like-kvm", None, session.bare("vmxtest", ARGS));
    suite.clamps.insert("vmxtest-bare-like-kvm".into(), "vmxtest-nvmx-kvm".into());
    let refused_spec = |name: &str| session.spec(name.into(), Payload::new(&session.images.nvmx, ""), Vec::new());
    boot("kvm-no-nesting", Some(no_nesting), Ok(refused_spec("kvm-no-nesting")));
    boot("kvm-no-ept", Some(no_ept), Ok(refused_spec("kvm-no-ept")));

    let same = || -> Judge { Box::new(|o| compare::agree(o[0], o[1])) };
    let says = |texts: &'static [&'static str]| -> Judge { Box::new(move |o| refused(o[0], texts)) };
    let mut case = |name: &str, boots: &[&str], judge: Judge| {
        suite.cases.push(Case { name: name.into(), boots: boots.iter().map(|b| b.to_string()).collect(), judge });
    };
    case("KVM in nvmx's place: cascade's records are the bare machine's", &["cascade-few", "cascade-kvm"], same());
    case("nvmx under KVM: cascade's records are the bare machine's", &["cascade-few", "cascade-nvmx-kvm"], same());
    let trapped = ["cascade-few", "cascade-nvmx-kvm-trapped"];
    case("nvmx under KVM without VMCS shadowing: cascade's records are the bare machine's", &trapped, same());
    case("nvmx under KVM: a reflected CPUID is cheap", &["cascade-nvmx-kvm"], Box::new(|o| cheap(o[0])));
    let but_for_kvm: Judge = Box::new(|o| kvm_waivers::agree_but_for_kvm(o[0], o[1]));
    let vmxtest = ["vmxtest-bare-like-kvm", "vmxtest-nvmx-kvm"];
    case("nvmx under KVM: vmxtest's records are the bare machine's but for waivers", &vmxtest, but_for_kvm);
    let reach: Judge = Box::new(|o| out_of_reach(o[0], o[1]));
    let outer = ["outer-nvmx-kvm", "outer-kvm"];
    case("nvmx under KVM: L2 does not reach KVM's paravirtual interface, as KVM's own guest does", &outer, reach);
    case("nvmx under KVM on 2 CPUs: smp's records are the bare machine's", &["smp-2-parts", "smp-2-nvmx-kvm"], same());
    case("KVM with nesting off is told apart", &["kvm-no-nesting"], says(messages::NO_NESTING));
    case("KVM without EPT is told apart", &["kvm-no-ept"], says(messages::KVM_NO_EPT));
    Ok(())
}

/// Under nvmx the guest finds nothing; right on KVM it does, so that there is something to hide.
fn out_of_reach(nvmx: &Outcome, kvm: &Outcome) -> Result<(), String> {
    nvmx.verdict()?;
    let written = |r: &&OwnedRecord| r.get("written") == Some("true");
    match kvm.transcript.of_kind(Kind::Check).filter(written).count() {
        0 => Err("KVM itself takes none of these MSRs: nothing is tested".into()),
        _ => Ok(()),
    }
}

/// A CPUID of L3 that L2 handles stays within the limits.
fn cheap(outcome: &Outcome) -> Result<(), String> {
    let events = report::events(None, &outcome.transcript);
    let cpuid = events.iter().find(|e| e.event == "cpuid").ok_or("cpuid was not measured")?;
    let (Some(exits), Some(ticks)) = (cpuid.l0_exits, cpuid.nested) else {
        return Err("KVM's exits were not counted".into());
    };
    if exits > MOST_EXITS || ticks > MOST_INSTRUCTIONS {
        return Err(format!(
            "{exits} exits to KVM and {ticks} instructions; {MOST_EXITS} and {MOST_INSTRUCTIONS} allowed"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot;
    use crate::report::tests::transcript;

    fn run(exits: u64, ticks: u64) -> Outcome {
        let line = format!("@L2 event name=cpuid handled_by=L2 scope=l3 count=100 ticks={ticks}00 l0_exits={exits}00");
        boot::tests::outcome("x", &[&line])
    }

    #[test]
    fn a_reach_that_finds_nothing_counts_only_beside_one_that_does() {
        let outcome = |lines: &[&str]| Outcome { transcript: transcript(lines), ..run(1, 1) };
        let hidden = outcome(&["@L2 check name=msr written=false", "@L2 end status=pass failed=0"]);
        let open = outcome(&["@L2 check name=msr written=true", "@L2 end status=fail failed=1"]);
        assert_eq!(out_of_reach(&hidden, &open), Ok(()));
        assert!(out_of_reach(&hidden, &hidden).is_err());
        assert!(out_of_reach(&open, &open).is_err());
    }

    #[test]
    fn a_dear_cpuid_fails_by_exits_and_by_instructions() {
        assert_eq!(cheap(&run(10, 70_000)), Ok(()));
        assert!(cheap(&run(46, 70_000)).unwrap_err().contains("46 exits"));
        assert!(cheap(&run(10, 125_000)).is_err());
        let uncounted = transcript(&["@L2 event name=cpuid handled_by=L2 scope=l3 count=100 ticks=100"]);
        assert!(cheap(&Outcome { transcript: uncounted, ..run(1, 1) }).is_err());
    }
}
