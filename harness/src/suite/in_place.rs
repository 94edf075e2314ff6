//! The boot tests of KVM in nvmx's place where QEMU makes the machine, as `run --l0 kvm --l1 kvm` boots it: all of it on a host with
//! VMX, and elsewhere as far as a machine without VMX comes.

use super::usual::MEDIANS;
use super::{Case, Judge, Suite, compare, refused};
use crate::backend::kvm::Accelerator;
use crate::backend::kvm_in_kvm::KvmInKvm;
use crate::backend::kvm_linux::KvmLinux;
use crate::backend::{Backend, Machine, Spec};
use crate::boot::Outcome;
use crate::session::{Copies, LONG, Session};
use anyhow::Result;
use nvmx_setup::linux::MODULES;
use std::sync::Arc;
use std::time::Duration;

/// CPU time: they take three seconds.
const SOON: Duration = Duration::from_secs(60);
/// What the VMM says where the machine's CPUs show no VMX.
const NO_VMX: &[&str] = &["[vmm ERROR]", "kvm-intel.ko does not load", "this CPU has no VMX"];
/// What the kernel says on its console where its only program is none.
const NO_INIT: &str = "Kernel panic - not syncing: No working init found";

/// Adds the boots and cases on machines that QEMU emulates without VMX.
///
/// # Errors
/// [`nvmx_setup::error::Stop::Environment`] if QEMU, Linux or the VMM cannot be had.
pub fn add(suite: &mut Suite, session: &Session) -> Result<()> {
    let kvm = session.kvm_in_qemu(Accelerator::Tcg)?;
    // A module of the kernel is no program.
    let no_program = kvm.linux.linux.file(&format!("{}.ko", MODULES[0]));
    let mute = KvmInKvm { linux: KvmLinux { vmm: no_program, ..kvm.linux.clone() }, ..kvm.clone() };
    let mut add = |name: &str, backend: KvmInKvm, case: &str, judge: Judge| {
        let machine = Machine { cpus: 2, ..session.machine.clone() };
        let spec = session.bare("cascade", "").map(|spec| Spec { name: name.into(), machine, timeout: SOON, ..spec });
        suite.boots.insert(name.into(), spec.map_err(|e| format!("{e:#}")));
        let backend: Arc<dyn Backend + Send> = Arc::new(backend);
        suite.backends.insert(name.into(), backend);
        suite.cases.push(Case { name: case.into(), boots: vec![name.into()], judge });
    };
    let case = "the Linux that takes nvmx's place starts in QEMU, and says that the CPUs have no VMX";
    add("in-place-no-vmx", kvm, case, Box::new(|o| refused(o[0], NO_VMX)));
    let case = "where the program of the Linux that takes nvmx's place does not start, its console says why";
    add("in-place-no-init", mute, case, Box::new(|o| tells(o[0], NO_INIT)));
    Ok(())
}

/// Adds the case of a host with VMX: cascade with KVM in nvmx's place, beside the boot `alone`, which has one KVM less.
///
/// # Errors
/// As [`add`].
pub fn beside(suite: &mut Suite, session: &Session, alone: &str) -> Result<()> {
    const NAME: &str = "in-place-cascade";
    let spec = session.bare("cascade", MEDIANS).map(|spec| Spec { name: NAME.into(), timeout: LONG, ..spec });
    suite.boots.insert(NAME.into(), spec.map_err(|e| format!("{e:#}")));
    suite.backends.insert(NAME.into(), Arc::from(session.kvm_in_place(Copies::ByBytes)?));
    let judge: Judge = Box::new(|o| compare::agree(o[0], o[1]));
    let name = "KVM in nvmx's place: cascade's records are the bare machine's".into();
    suite.cases.push(Case { name, boots: vec![alone.into(), NAME.into()], judge });
    Ok(())
}

/// The boot has ended without a word of its guest, and the machine says this.
fn tells(outcome: &Outcome, text: &str) -> Result<(), String> {
    let said = outcome.machine.join(" / ");
    if outcome.verdict().is_ok() || !outcome.transcript.lines.is_empty() {
        return Err("its program has started".into());
    }
    if said.contains(text) { Ok(()) } else { Err(format!("the machine does not say `{text}`, but: {said}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot;

    #[test]
    fn a_console_that_is_not_shown_fails() {
        let outcome = |machine: &[&str], lines: &[&str]| Outcome {
            machine: machine.iter().map(|line| line.to_string()).collect(),
            ..boot::tests::outcome("x", lines)
        };
        let panicked = format!("Linux: [ 1.0] {NO_INIT}.");
        assert_eq!(tells(&outcome(&[&panicked], &[]), NO_INIT), Ok(()));
        assert!(tells(&outcome(&[], &[]), NO_INIT).is_err());
        assert!(tells(&outcome(&[&panicked], &["[vmm ERROR] x"]), NO_INIT).is_err());
    }
}
