//! The boot tests by name.

use super::{
    Case, Judge, Suite, all_pass, attacks, bench, compare, drives, firmware,
    fixtures::{Fixtures, inside_nvmx},
    growth, in_place, lab, linux, loaders, messages, models, msrs, native,
    on_kvm::{self, FEW},
    refused, smp, trace, usual, xen,
};
use crate::backend::{Machine, Payload, Protocol, Spec};
use crate::boot::Outcome;
use crate::cli::Fields;
use crate::report::{self, Event, budget::Budget, ledger};
use crate::session::{Session, budget_file};
use crate::transcript::Line;
use anyhow::Result;
use l2_protocol::{Kind, Level};
use std::sync::Arc;
use std::time::Duration;

/// A 64-bit Intel CPU without VMX.
const NO_VMX: &str = "p4_prescott_celeron_336";
/// A CPU with VMX and without EPT.
const NO_EPT: &str = "core2_penryn_t9600";
/// MiB that GRUB can boot from but nvmx cannot use.
const LITTLE_MEMORY: u32 = 16;
/// A refusal comes at once; a machine that takes longer hangs.
const SOON: Duration = Duration::from_secs(60);

/// The refusals that nvmx must have explained to vmxtest, at least.
const EXPLAINED: usize = 90;

/// The guests that print check records.
pub const COMPARED: [&str; 2] = ["cascade", "vmxtest"];

/// Adds the cases of a topic for which more is set up.
type Add = fn(&mut Suite, &Session) -> Result<()>;

struct Builder<'a> {
    session: &'a Session,
    suite: Suite,
}

/// All boot tests.
///
/// # Errors
/// If a fixture cannot be written or the budget cannot be read.
pub fn all(session: &Session) -> Result<Suite> {
    some(session, |_| true)
}

/// All boot tests but those of topics that need more set up and are not wanted.
///
/// # Errors
/// As [`all`].
pub fn some(session: &Session, wants: impl Fn(&str) -> bool) -> Result<Suite> {
    let fixtures = Fixtures::write(&session.paths.target, session.machine.memory)?;
    let budget = Arc::new(Budget::read(&budget_file(&session.paths.root))?);
    let mut b = Builder { session, suite: Suite::default() };
    COMPARED.iter().for_each(|guest| b.guest(guest));
    // What several of the topics below compare with.
    b.boot("cascade-few", session.bare("cascade", FEW));
    let (compiler, limits) = (session.toolchain.version.clone(), Arc::clone(&budget));
    b.case(
        "the costs of cascade are those of benches/budget.json",
        &["cascade-bare", "cascade-zero-copy"],
        Box::new(move |o| {
            kept(&limits, &compiler, "cascade", &report::events(Some(&o[0].transcript), &o[1].transcript))
        }),
    );
    let explain: Judge = Box::new(|o| compare::explain_alike(o[0], o[1], EXPLAINED));
    b.case("nvmx names the rule that a refused entry broke", &["vmxtest-zero-copy", "vmxtest-trapped"], explain);
    b.flipped_bits();
    b.few_tables();
    b.outside();
    b.nvmx_in_nvmx();
    b.protocols();
    b.refusals(&fixtures);
    b.broken_guests();
    loaders::add(&mut b.suite, session, &fixtures);
    drives::add(&mut b.suite, session);
    msrs::add(&mut b.suite, session);
    growth::add(&mut b.suite, session, &budget);
    trace::add(&mut b.suite, session);
    smp::add(&mut b.suite, session);
    attacks::add(&mut b.suite, session);
    native::add(&mut b.suite, session);
    models::add(&mut b.suite, session);
    lab::add(&mut b.suite, session);
    bench::add(&mut b.suite, session);
    const DEAR: [(&str, Add); 8] = [
        ("the lab with KVM", lab::add_with_linux),
        ("KVM", on_kvm::add),
        ("Linux", linux::add),
        ("the usual stack", usual::add),
        ("Xen", xen::add),
        // Short ones last, so that all processors are busy to the end.
        ("templates", bench::add_templates),
        ("QEMU", firmware::add),
        ("KVM in QEMU", in_place::add),
    ];
    for (topic, add) in DEAR.into_iter().filter(|(topic, _)| wants(topic)) {
        let before = b.suite.cases.len();
        add(&mut b.suite, session)?;
        let names: Vec<String> = b.suite.cases[before..].iter().map(|case| case.name.clone()).collect();
        b.suite.topics.extend(names.into_iter().map(|name| (name, topic)));
    }
    Ok(b.suite)
}

impl Builder<'_> {
    fn boot(&mut self, name: &str, spec: Result<Spec>) {
        let spec = spec.map(|spec| Spec { name: name.into(), ..spec }).map_err(|e| format!("{e:#}"));
        self.suite.boots.insert(name.into(), spec);
    }

    /// A boot of a guest alone on the machine that uses only what the guest of another boot sees.
    fn clamped_boot(&mut self, name: &str, spec: Result<Spec>, other: &str) {
        self.boot(name, spec);
        self.suite.clamps.insert(name.into(), other.into());
    }

    fn case(&mut self, name: &str, boots: &[&str], judge: Judge) {
        self.suite.cases.push(Case { name: name.into(), boots: boots.iter().map(|b| b.to_string()).collect(), judge });
    }

    /// A guest passes bare and under nvmx by both strategies, with the same records.
    fn guest(&mut self, guest: &str) {
        let names = ["bare", "zero-copy", "trapped"].map(|slot| format!("{guest}-{slot}"));
        let [bare, shadowed, trapped] = names.each_ref().map(String::as_str);
        self.clamped_boot(bare, self.session.bare(guest, ""), shadowed);
        self.boot(shadowed, self.session.nested(guest, "", Fields::ZeroCopy));
        self.boot(trapped, self.session.nested(guest, "", Fields::Trapped));
        let pass = || -> Judge { Box::new(all_pass) };
        let same = || -> Judge { Box::new(|o| compare::agree(o[0], o[1])) };
        self.case(&format!("{guest} passes on the bare machine"), &[bare], pass());
        self.case(&format!("{guest} passes under nvmx with VMCS shadowing"), &[shadowed], pass());
        self.case(&format!("{guest} passes under nvmx with trapped field access"), &[trapped], pass());
        self.case(&format!("{guest} sees with VMCS shadowing what it sees bare"), &[bare, shadowed], same());
        self.case(&format!("{guest} sees with trapped field access what it sees bare"), &[bare, trapped], same());
    }

    /// What the CPU makes of VMCS states near validity.
    fn flipped_bits(&mut self) {
        let names = ["vmxtest-flips-bare", "vmxtest-flips", "vmxtest-flips-trapped"];
        const ARGS: &str = "part=random seed=1 cases=10000";
        self.clamped_boot(names[0], self.session.bare("vmxtest", ARGS), names[1]);
        self.boot(names[1], self.session.nested("vmxtest", ARGS, Fields::Auto));
        self.boot(names[2], self.session.nested("vmxtest", ARGS, Fields::Trapped));
        const NAME: &str = "ten thousand VMCS states with flipped bits end under nvmx as they end bare";
        for (name, nested) in [(NAME.into(), names[1]), (format!("{NAME}, with trapped field access"), names[2])] {
            self.case(&name, &[names[0], nested], Box::new(|o| compare::agree(o[0], o[1])));
        }
    }

    /// An L3 that needs more tables of ept02 than there are goes on all the same.
    fn few_tables(&mut self) {
        let names = ["vmxtest-ept-bare", "vmxtest-few-tables"];
        const ARGS: &str = "part=ept";
        self.clamped_boot(names[0], self.session.bare("vmxtest", ARGS), names[1]);
        let module = self.session.images.guest("vmxtest").map(|path| vec![Payload::new(path, ARGS)]);
        self.boot(names[1], module.map(|modules| self.nvmx("ept02=0", modules)));
        let judge: Judge = Box::new(|o| compare::agree(o[0], o[1]).and_then(|()| evicted(o[1])));
        self.case("vmxtest sees with few tables for ept02 what it sees bare", &names, judge);
    }

    /// An L3 cannot end its L2, wherever L2 leads it.
    fn outside(&mut self) {
        let args = format!("part=ept outside={:#x}", inside_nvmx(self.session.machine.memory));
        self.boot("vmxtest-outside", self.session.nested("vmxtest", &args, Fields::Auto));
        let name = "an L3 that is led to nvmx's memory exits, and its L2 goes on";
        let judge: Judge = Box::new(|o| all_pass(o).and_then(|()| went_outside(o[0])));
        self.case(name, &["vmxtest-outside"], judge);
        let args = args.replace("part=ept", "part=tasks");
        self.boot("vmxtest-tasks-outside", self.session.nested("vmxtest", &args, Fields::Auto));
        let name = "an L2 that loads PDPTEs from nvmx's memory gets an exception, and goes on";
        self.case(name, &["vmxtest-tasks-outside"], Box::new(all_pass));
    }

    /// A second nvmx is a guest hypervisor like any other.
    fn nvmx_in_nvmx(&mut self) {
        let names = ["cascade-bare", "cascade-depth2"];
        self.boot(names[1], self.session.stacked("cascade", "", Fields::Auto, 2));
        self.case("cascade passes under nvmx in nvmx", &names[1..], Box::new(all_pass));
        let judge: Judge = Box::new(|o| compare::agree(o[0], o[1]));
        self.case("cascade sees under nvmx in nvmx what it sees bare", &names, judge);
    }

    fn protocols(&mut self) {
        let nested = self.session.nested("cascade", "", Fields::Auto);
        let one = nested.map(|spec| Spec { protocol: Protocol::Multiboot1, ..spec });
        self.boot("cascade-multiboot1", one);
        self.case("nvmx boots by multiboot, the first version", &["cascade-multiboot1"], Box::new(all_pass));
        let bare = self.session.bare("cascade", "").map(|spec| Spec { protocol: Protocol::Multiboot1, ..spec });
        self.boot("cascade-bare-multiboot1", bare);
        self.case("cascade boots by multiboot, the first version", &["cascade-bare-multiboot1"], Box::new(all_pass));
    }

    fn refusal(&mut self, name: &str, boot: &str, spec: Result<Spec>, texts: &'static [&'static str]) {
        self.boot(boot, spec.map(|spec| Spec { timeout: SOON, ..spec }));
        self.case(name, &[boot], Box::new(move |o| refused(o[0], texts)));
    }

    fn nvmx(&self, options: &str, modules: Vec<Payload>) -> Spec {
        let options = format!("log=info {options}");
        self.session.spec(String::new(), Payload::new(&self.session.images.nvmx, options.trim()), modules)
    }

    fn refusals(&mut self, fixtures: &Fixtures) {
        let module = |path| vec![Payload::new(path, "")];
        let cascade = self.session.images.guest("cascade").map(|p| module(p.to_path_buf()));
        let spec = self.nvmx("", Vec::new());
        self.refusal("nvmx without a module says so", "no-module", Ok(spec), messages::NO_MODULE);
        let spec = self.nvmx("", module(fixtures.text()));
        self.refusal("a module that is no ELF file is refused", "no-elf", Ok(spec), messages::NO_ELF);
        let spec = self.nvmx("", module(fixtures.headless()));
        self.refusal("an ELF file without multiboot header is refused", "no-header", Ok(spec), messages::NO_HEADER);
        let spec = self.nvmx("", module(fixtures.high()));
        self.refusal("a module that overlaps nvmx is refused", "overlap", Ok(spec), messages::OVERLAP);
        let with = |options: &str, machine: Machine| match &cascade {
            Ok(modules) => Ok(Spec { machine, ..self.nvmx(options, modules.clone()) }),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        };
        let machine = self.session.machine.clone();
        let specs = [
            (
                "a machine with too little memory is refused",
                "little-memory",
                with("", Machine { memory: LITTLE_MEMORY, ..machine.clone() }),
                messages::LITTLE_MEMORY,
            ),
            (
                "a CPU without VMX is refused",
                "no-vmx",
                with("", Machine { model: NO_VMX.into(), ..machine.clone() }),
                messages::NO_VMX,
            ),
            (
                "a CPU without EPT is refused",
                "no-ept",
                with("", Machine { model: NO_EPT.into(), ..machine.clone() }),
                messages::NO_EPT,
            ),
            (
                "a bad value of an option is refused by name",
                "bad-value",
                with("fields=sideways", machine),
                messages::BAD_VALUE,
            ),
        ];
        for (name, boot, spec, texts) in specs {
            self.refusal(name, boot, spec, texts);
        }
    }

    fn broken_guests(&mut self) {
        let touch = format!("touch={:#x}", inside_nvmx(self.session.machine.memory));
        for (name, boot, args, texts) in [
            ("an L2 that triple-faults ends in an epitaph", "triple-fault", "triple-fault", messages::TRIPLE_FAULT),
            ("an L2 that touches nvmx's memory ends in an epitaph", "touch", touch.as_str(), messages::TOUCH),
            (
                "a machine check that nvmx does not survive ends in an epitaph with its status",
                "machine-check",
                "machine-check=fatal",
                messages::MACHINE_CHECK,
            ),
            (
                "a machine check for an L2 that has CR4.MCE clear ends in an epitaph",
                "machine-check-disabled",
                "machine-check=disabled",
                messages::NO_MCE,
            ),
        ] {
            let module = self.session.images.guest("faulty").map(|p| vec![Payload::new(p, args)]);
            let spec = module.map(|modules| self.nvmx("", modules));
            self.refusal(name, boot, spec, texts);
        }
        let soon = |spec: Spec| Spec { timeout: Duration::from_secs(15), ..spec };
        self.boot("spin-bare", self.session.bare("faulty", "spin").map(soon));
        self.boot("spin", self.session.nested("faulty", "spin", Fields::Auto).map(soon));
        let ended = "is ended by the time limit, which tells where it was";
        self.case(&format!("a guest that hangs on the bare machine {ended}"), &["spin-bare"], Box::new(|o| hung(o[0])));
        self.case(&format!("an L2 that hangs under nvmx {ended}"), &["spin"], Box::new(|o| hung(o[0])));
    }
}

/// That it was tried at all.
fn went_outside(outcome: &Outcome) -> Result<(), String> {
    let tried =
        |line: &Line| matches!(line, Line::Record(record) if record.get("name") == Some("ept: a table outside"));
    if outcome.transcript.lines.iter().any(tried) { Ok(()) } else { Err("it was not tried".into()) }
}

/// What vmxtest says of it: else the boot did not test what it is for.
fn evicted(outcome: &Outcome) -> Result<(), String> {
    const SAYS: &str = "ept02 evictions: ";
    let number = |line: &Line| match line {
        Line::Text(text) => text.split_once(SAYS)?.1.trim().parse::<u64>().ok(),
        _ => None,
    };
    let count = outcome.transcript.lines.iter().find_map(number);
    match count {
        Some(1..) => Ok(()),
        count => Err(format!("no context of ept02 was evicted: {count:?}")),
    }
}

fn hung(outcome: &Outcome) -> Result<(), String> {
    let reason = outcome.verdict().err().ok_or("it passed")?;
    let text = outcome.post_mortem().join("\n");
    if !reason.contains("did not end within") {
        return Err(format!("it ended otherwise: {reason}"));
    }
    let nested = outcome.transcript.first(Level::L1, Kind::Hello).is_some();
    if nested && !text.contains("last exit of L2: CPUID") {
        return Err(format!("the post-mortem does not tell L2's last exit, a CPUID:\n{text}"));
    }
    if outcome.transcript.lines.is_empty() || !text.contains("RIP") {
        return Err(format!("the post-mortem does not say where it was:\n{text}"));
    }
    Ok(())
}

/// The limits hold, and every figure is the one in the ledger.
pub(super) fn kept(budget: &Budget, compiler: &str, guest: &str, events: &[Event]) -> Result<(), String> {
    let broken: Vec<String> = budget.apply(guest, events).iter().filter(|r| !r.kept).map(|r| r.text()).collect();
    if !broken.is_empty() {
        return Err(format!("limits are broken:\n  {}", broken.join("\n  ")));
    }
    let audit = budget.audit(guest, compiler, events);
    if audit.differences.is_empty() {
        return Ok(());
    }
    let (told, table) = (audit.told(guest, compiler), ledger::render(&audit.differences));
    Err(format!("{told}; if they are meant, ./nvmx bench --bless books them:\n{table}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvmx_setup::ui::Ui;

    /// `./nvmx test --filter` sets up the topics of the cases that it finds, and no others.
    #[test]
    fn each_topic_has_all_boots_of_its_cases() {
        let session = Session::dry(&Ui::new(false)).unwrap();
        let topics = all(&session).unwrap().topics;
        for topic in topics.values() {
            let suite = some(&session, |wanted| wanted == *topic).unwrap();
            let missing = suite.cases.iter().flat_map(|case| &case.boots).find(|boot| !suite.boots.contains_key(*boot));
            assert_eq!(missing, None, "of the topic {topic}");
        }
    }
}
