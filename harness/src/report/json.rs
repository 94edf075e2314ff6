//! `--json FILE`: what commands tell programs. One schema for all of them, `docs/schema.json`, made from these types;
//! `docs/run-schema.md` explains the figures.

use super::Event;
use super::growth::Growth;
use super::ledger::Difference;
use super::provenance::Provenance;
use crate::backend::Unit;
use crate::boot::Outcome;
use crate::clock::Time;
use crate::trace::stat::Row;
use crate::transcript::refusal::Refusal;
use crate::transcript::stack::StackLevel;
use anyhow::Result;
use l2_protocol::Kind;
use nvmx_setup::output::Output;
use schemars::JsonSchema;
use serde::Serialize;

/// The schema's name; its number changes when a reader would break.
pub const SCHEMA: &str = "nvmx/2";

/// A file as a program reads it.
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct Document {
    /// `nvmx/2`
    pub schema: &'static str,
    /// The version of nvmx
    pub version: &'static str,
    /// Where it is from
    pub provenance: Provenance,
    /// What the command has to tell
    #[serde(flatten)]
    pub report: Report,
}

/// What a command has to tell; `command` says which.
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Report {
    /// `run`
    Run(Box<Run>),
    /// `diff`
    Diff(Diff),
    /// `bench`
    Bench(Bench),
    /// `test`
    Test(Tests),
    /// `stat`
    Stat(Stat),
}

impl Document {
    /// In the present schema.
    pub fn new(provenance: Provenance, report: Report) -> Self {
        Document { schema: SCHEMA, version: env!("CARGO_PKG_VERSION"), provenance, report }
    }

    /// Writes it.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, to: &Output) -> Result<()> {
        to.write(&(serde_json::to_string_pretty(self)? + "\n"))
    }
}

/// Boots, and what they cost.
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct Run {
    /// From L0 up
    pub stack: Vec<StackLevel>,
    /// How L2's VMREAD and VMWRITE reach vmcs12
    pub strategy: String,
    /// What ticks are: `instructions` or `cycles`
    pub unit: &'static str,
    /// Averages per event
    pub events: Vec<Event>,
    /// How costs grow with depth, if nvmx was stacked
    #[serde(skip_serializing_if = "Option::is_none")]
    pub growth: Option<Growth>,
    /// The boots, in the order in which they were asked for
    pub boots: Vec<Boot>,
    /// With Linux or Xen as L2: what each stage took in each boot
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<Stage>,
    /// What VMX refused under nvmx
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub refusals: Vec<Refusal>,
    /// Check records that were compared, where the guest prints some
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compared: Option<Compared>,
}

impl Run {
    /// A run with its events.
    pub fn new(stack: Vec<StackLevel>, strategy: String, unit: Unit, events: Vec<Event>, boots: &[&Outcome]) -> Self {
        let boots = boots.iter().map(|outcome| Boot::of(outcome)).collect();
        let (growth, compared) = (None, None);
        Run {
            stack,
            strategy,
            unit: unit.name(),
            events,
            growth,
            boots,
            stages: Vec::new(),
            refusals: Vec::new(),
            compared,
        }
    }
}

/// One boot.
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct Boot {
    /// Its name
    pub name: String,
    /// Whether it ran to its end and passed
    pub passed: bool,
    /// Why not
    pub reason: Option<String>,
    /// How long it took by the clock on the wall
    pub seconds: f64,
    /// Emulated instructions, where the emulator tells them
    pub instructions: Option<u64>,
    /// Its lines on the serial port, where the guest is the user's own
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<Vec<String>>,
}

impl Boot {
    /// What came of it.
    pub fn of(outcome: &Outcome) -> Self {
        let reason = outcome.verdict().err();
        let instructions = match outcome.used {
            Some(Time::Instructions(n)) => Some(n),
            _ => None,
        };
        let seconds = (outcome.took.as_secs_f64() * 10.0).round() / 10.0;
        Boot { name: outcome.name.clone(), passed: reason.is_none(), reason, seconds, instructions, text: None }
    }
}

/// A stage of a boot: the last of its name where there are several guests.
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct Stage {
    /// The boot's name
    pub boot: String,
    /// Its name
    pub stage: String,
    /// How long it took
    pub ticks: Option<u64>,
    /// Exits to the KVM that runs L3, by its own count
    pub kvm_exits: Option<u64>,
    /// Hardware exits, under nvmx
    pub hw_exits: Option<u64>,
    /// Exits that the guest hypervisor got to see, under nvmx
    pub reflected: Option<u64>,
    /// Ticks inside nvmx
    pub l1_instructions: Option<u64>,
}

/// The stages that a boot told of.
pub fn stages(outcome: &Outcome) -> Vec<Stage> {
    let mut list: Vec<Stage> = Vec::new();
    for record in outcome.transcript.of_kind(Kind::Event) {
        let Some(name) = record.get("name") else { continue };
        let of = |key| record.number(key).ok();
        list.retain(|stage| stage.stage != name);
        list.push(Stage {
            boot: outcome.name.clone(),
            stage: name.into(),
            ticks: of("ticks"),
            kvm_exits: of("l0_exits"),
            hw_exits: of("hw_exits"),
            reflected: of("reflected"),
            l1_instructions: of("l1_ticks"),
        });
    }
    list
}

/// A comparison of check records.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, JsonSchema)]
pub struct Compared {
    /// How many were compared
    pub compared: usize,
    /// How many differ in a way that is known and explained
    pub waived: usize,
    /// The names of those that differ
    pub differ: Vec<String>,
}

/// `diff`
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct Diff {
    /// One for each guest
    pub guests: Vec<GuestDiff>,
}

/// What a guest saw, alone and under nvmx.
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct GuestDiff {
    /// Its name
    pub guest: String,
    /// Its command line
    pub args: String,
    /// Its check records
    #[serde(flatten)]
    pub compared: Compared,
}

/// `bench`
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct Bench {
    /// The CPU model that it ran on
    pub cpu_model: String,
    /// The averages of `cascade`
    pub events: Vec<Event>,
    /// The averages of `growth`, with `--growth`
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub growth: Vec<Event>,
    /// A reflected exit by the processors that L2 has started, with `--growth`
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<Event>,
    /// A reflected CPUID by the nvmx in the stack, with `--growth`
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub depth: Vec<Event>,
    /// The limits, as the table says them
    pub limits: Vec<Limit>,
    /// What differs from the ledger
    pub differences: Vec<Difference>,
}

/// A limit and whether it was kept.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, JsonSchema)]
pub struct Limit {
    /// What it says, and the figure
    pub text: String,
    /// Whether it was kept
    pub kept: bool,
}

/// `stat`
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct Stat {
    /// The boot whose exits were recorded
    pub boot: String,
    /// What ticks are: `instructions` or `cycles`
    pub unit: String,
    /// One for each level and exit reason
    pub rows: Vec<Row>,
}

/// `test`
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct Tests {
    /// Host tests that passed
    pub host_passed: usize,
    /// Host tests that failed
    pub host_failed: usize,
    /// The boot tests, in the order in which they were judged
    pub cases: Vec<TestCase>,
}

/// A boot test.
#[derive(Clone, PartialEq, Debug, Serialize, JsonSchema)]
pub struct TestCase {
    /// Its name
    pub name: String,
    /// Whether it passed
    pub passed: bool,
    /// Why not
    pub reason: Option<String>,
    /// How long its boots took by the clock on the wall
    pub seconds: f64,
    /// How often its boots were made; more than once only with `--retry`
    pub attempts: u32,
    /// Why it failed each time before the last
    pub failed_before: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    const SCHEMA_FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/schema.json");

    fn run() -> Run {
        let l0 = StackLevel {
            level: "L0".into(),
            name: "Bochs".into(),
            version: "3.0".into(),
            cpu: "x".into(),
            features: vec![],
        };
        Run::new(vec![l0], "zero-copy".into(), Unit::Instructions, sample(), &[])
    }

    #[test]
    fn the_file_has_the_documented_shape() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.json");
        let provenance = Provenance::of(folder.path(), Some(super::super::provenance::tests::place()));
        Document::new(provenance, Report::Run(Box::new(run()))).write(&Output::prepare(&path).unwrap()).unwrap();
        let value: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!((&value["schema"], &value["command"]), (&SCHEMA.into(), &"run".into()));
        assert_eq!(value["unit"], "instructions");
        assert_eq!(value["provenance"]["machine"]["memory"], 256);
        assert_eq!(value["stack"][0]["level"], "L0");
        let cpuid = &value["events"][0];
        assert_eq!((&cpuid["event"], &cpuid["handled_by"]), (&"cpuid".into(), &"L2".into()));
        assert_eq!(cpuid["hw_exits"], 2.0);
        assert!(cpuid["l1_vmwrite"].is_null());
        for key in ["native", "one_level", "nested", "count", "l1_instructions", "l1_vmread", "trapped_vmread"] {
            assert!(cpuid.get(key).is_some(), "{key}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_published_schema_is_that_of_the_types() {
        let schema = serde_json::to_string_pretty(&schemars::schema_for!(Document)).unwrap() + "\n";
        if std::env::var_os("NVMX_UPDATE").is_some() {
            std::fs::write(SCHEMA_FILE, &schema).unwrap();
        }
        let published = std::fs::read_to_string(SCHEMA_FILE).unwrap_or_default();
        assert!(
            published == schema,
            "docs/schema.json is not that of the types: NVMX_UPDATE=1 cargo test -p nvmx-harness schema writes it; \
             if a reader would break, give SCHEMA a new number"
        );
    }

    #[test]
    fn the_schema_page_names_the_schema_and_every_figure() {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/run-schema.md")).unwrap();
        assert!(page.contains(&format!("`{SCHEMA}`")));
        for name in super::super::Event::FIGURES {
            assert!(page.contains(&format!("`{name}`")), "docs/run-schema.md does not explain {name}");
        }
    }
}
