//! The boot tests of the stack that people rent: KVM, nvmx, and above it guest hypervisors of ours or Linux with KVM and Linux. In
//! the suite that KVM runs on the emulated machine; with `--l0 kvm` it is the host's, and the same cases are all there are.

use super::linux::{same_but_for_the_machine, shows, takes_at_most, vmx_flags};
use super::{Case, Judge, Suite, compare, in_place};
use crate::backend::linux::{Job, LinuxKvm};
use crate::backend::{Backend, Machine, Spec, Unit};
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::report::spread;
use crate::report::stack::{Book, Figures};
use crate::session::{LONG, Session, stack_file};
use anyhow::Result;
use l2_protocol::Kind;
use nvmx_setup::linux::Kernel;
use std::sync::Arc;

/// What APICv is made of, as `/proc/cpuinfo` calls it: KVM below offers it, and nvmx hands it on.
const APICV: [&str; 4] = ["vapic_reg", "vid", "posted_intr", "apicv"];
/// What nvmx may add to the boot of L3, as a share of what the boot takes without nvmx.
const MOST_ADDED: f64 = 0.25;
/// Few events in each bracket, and as many brackets as a median needs.
pub(super) const MEDIANS: &str = "events=4 brackets=31";
/// The boot of cascade with one KVM less.
const ALONE: &str = "usual-cascade-bare";
const STACK: &str = "KVM, nvmx, Linux with KVM, Linux";

/// A stack of the kind that people rent, with a row in `benches/stack.json`.
pub struct Stack {
    /// Its row
    pub name: &'static str,
    /// The names of its boots begin so
    boots: &'static str,
    /// What L2 is told
    pub job: &'static str,
    cpus: u32,
    /// With KVM in nvmx's place too
    pub beside_kvm: bool,
    /// It takes many minutes
    pub long: bool,
}

/// Those that have a row. The suite boots those without KVM in nvmx's place.
pub const STACKS: [Stack; 3] = [
    Stack { name: "vmm=own, 1 CPU", boots: "usual", job: "vmm=own", cpus: 1, beside_kvm: false, long: false },
    Stack { name: "vmm=own, 2 CPUs", boots: "usual-2", job: "vmm=own", cpus: 2, beside_kvm: false, long: true },
    Stack { name: "vmm=qemu, 1 CPU", boots: "usual-qemu", job: "", cpus: 1, beside_kvm: true, long: true },
];

impl Stack {
    /// The boots: with one KVM less, and under nvmx.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn boots(&self, session: &Session, linux: &LinuxKvm, job: &Job) -> Result<[Spec; 2]> {
        let machine = Machine { cpus: self.cpus, ..session.machine.clone() };
        let bare = linux.bare(&session.work("linux"), self.boots, job, &machine)?;
        let name = format!("{}-nvmx", self.boots);
        let nested = session.under_nvmx(&bare, name, &session.options_with_counters(Fields::Auto));
        Ok([bare, nested])
    }
}

/// Adds the boots and cases on the emulated machine.
///
/// # Errors
/// [`nvmx_setup::error::Stop::Environment`] if Linux or the VMM cannot be had.
pub fn add(suite: &mut Suite, session: &Session) -> Result<()> {
    let below: Arc<dyn Backend + Send> = Arc::new(session.kvm_on_bochs()?.usual());
    add_on(suite, session, Some(&below))
}

/// All cases of a machine whose L0 is a KVM.
///
/// # Errors
/// As [`add`].
pub fn alone(session: &Session) -> Result<Suite> {
    let mut suite = Suite::default();
    add_on(&mut suite, session, None)?;
    in_place::beside(&mut suite, session, ALONE)?;
    Ok(suite)
}

fn add_on(suite: &mut Suite, session: &Session, below: Option<&Arc<dyn Backend + Send>>) -> Result<()> {
    let mut boot = |name: String, spec: Result<Spec>| {
        let named = |spec| Spec { name: name.clone(), timeout: LONG, ..spec };
        suite.boots.insert(name.clone(), spec.map(named).map_err(|e| format!("{e:#}")));
        if let Some(below) = below {
            suite.backends.insert(name.clone(), Arc::clone(below));
        }
        name
    };
    let mut cases: Vec<(String, Vec<String>, Judge)> = Vec::new();
    let medians = boot("usual-cascade".into(), session.nested("cascade", MEDIANS, Fields::Auto));
    let alone = boot(ALONE.into(), session.bare("cascade", MEDIANS));
    let judge: Judge = Box::new(|o| compare::agree(o[0], o[1]).and_then(|()| has_medians(o[1])));
    cases.push((
        "KVM, nvmx, cascade: records are those with one KVM less, and costs are medians of brackets".into(),
        vec![alone, medians],
        judge,
    ));
    let linux = session.linux(Kernel::Newest, false)?;
    let book = Arc::new(Book::read(&stack_file(&session.paths.root))?);
    let here = session.backend.cpu(&session.machine);
    for stack in STACKS.iter().filter(|stack| !stack.beside_kvm) {
        let job = Job::parse(stack.job).map_err(anyhow::Error::msg)?;
        let boots: Vec<String> =
            stack.boots(session, &linux, &job)?.map(|spec| boot(spec.name.clone(), Ok(spec))).into();
        let mut add = |text: &str, judge: Judge| {
            let name = format!("{STACK}{}: {text}", if stack.cpus == 1 { "" } else { ", each on 2 CPUs" });
            if stack.long {
                suite.long.insert(name.clone());
            }
            cases.push((name, boots.clone(), judge));
        };
        let same: Judge = Box::new(|o| same_but_for_the_machine(o[0], o[1]).and_then(|()| has_apicv(o[0], o[1])));
        add("all see what they see with one KVM less", same);
        if session.backend.unit() == Unit::Instructions {
            add("nvmx adds no more than a quarter to the boot", Box::new(|o| adds_little(o[0], o[1])));
        }
        // Figures are of one machine.
        let booked = book.row(stack.name).and_then(|row| row.provenance.machine.as_ref());
        if booked.is_some_and(|machine| machine.cpu == here) {
            let book = Arc::clone(&book);
            add(
                "the boot costs what benches/stack.json says",
                Box::new(move |o| as_booked(&book, stack.name, o[0], o[1])),
            );
        }
    }
    suite.cases.extend(cases.into_iter().map(|(name, boots, judge)| Case { name, boots, judge }));
    Ok(())
}

/// Each event was measured by so many brackets, and its figures are in order.
fn has_medians(under: &Outcome) -> Result<(), String> {
    let mut events = 0;
    for record in under.transcript.of_kind(Kind::Event).filter(|r| r.get("scope") == Some("l3")) {
        let name = record.get("name").unwrap_or("?");
        let key = |key: &str| record.number(key).map_err(|_| format!("{name}: no {key}"));
        let (least, low, middle, high) = (key("ticks_least")?, key("ticks_p10")?, key("ticks")?, key("ticks_p90")?);
        if key("brackets")? < spread::FEWEST || !(least <= low && low <= middle && middle <= high) {
            return Err(format!("{name}: {least}, {low}, {middle}, {high} of too few brackets, or out of order"));
        }
        events += 1;
    }
    if events > 10 { Ok(()) } else { Err(format!("{}: only {events} events were measured", under.name)) }
}

/// Where the KVM below offers APICv, L2 finds it under nvmx too.
fn has_apicv(alone: &Outcome, under: &Outcome) -> Result<(), String> {
    let below = vmx_flags(alone)?;
    shows(under, APICV.into_iter().filter(|flag| below.contains(flag)))
}

fn as_booked(book: &Book, name: &str, alone: &Outcome, under: &Outcome) -> Result<(), String> {
    let figures = Figures::of(&alone.transcript, &under.transcript, None);
    book.judge(name, &figures.ok_or_else(|| format!("{}: no figures of L3's boot", under.name))?)
}

fn adds_little(alone: &Outcome, under: &Outcome) -> Result<(), String> {
    takes_at_most(1.0 + MOST_ADDED, "l3_boot", alone, under)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot;

    fn outcome(lines: &[&str]) -> Outcome {
        boot::tests::outcome("x", lines)
    }

    #[test]
    fn a_stack_that_loses_apicv_fails() {
        let flags = |flags: &str| outcome(&[&*format!("@L2 event name=cpu vmx_flags=\"{flags}\"")]);
        let all = flags("ept vapic_reg vid posted_intr apicv");
        assert_eq!(has_apicv(&all, &all), Ok(()));
        assert!(has_apicv(&all, &flags("ept vapic_reg vid")).unwrap_err().contains("posted_intr"));
        assert_eq!(has_apicv(&flags("ept"), &flags("ept")), Ok(()));
        assert!(has_apicv(&all, &outcome(&[])).is_err());
    }

    #[test]
    fn a_quarter_more_is_the_limit() {
        let boot = |ticks: u64| outcome(&[&*format!("@L3 event name=l3_boot ticks={ticks}")]);
        assert_eq!(adds_little(&boot(100), &boot(125)), Ok(()));
        assert!(adds_little(&boot(100), &boot(126)).is_err());
        assert!(adds_little(&boot(100), &outcome(&[])).is_err());
    }

    #[test]
    fn figures_of_one_bracket_or_out_of_order_are_found() {
        let line = |ticks: u64, brackets: u64| {
            format!(
                "@L2 event name=x scope=l3 count=10 ticks={ticks} brackets={brackets} ticks_least=1 ticks_p10=2 ticks_p90=9"
            )
        };
        let all = |line: &str| outcome(&[line; 11]);
        assert_eq!(has_medians(&all(&line(5, 31))), Ok(()));
        assert!(has_medians(&all(&line(5, 29))).is_err());
        assert!(has_medians(&all(&line(10, 31))).is_err());
        assert!(has_medians(&all("@L2 event name=x scope=l3 count=10 ticks=5")).is_err());
        assert!(has_medians(&outcome(&[&*line(5, 31)])).is_err());
    }
}
