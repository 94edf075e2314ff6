//! `--json FILE`: the schema `nvmx-run/1`, documented in `docs/run-schema.md`.

use super::Event;
use super::growth::Growth;
use super::stack::StackLevel;
use crate::backend::Unit;
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::Path;

/// A run as a program reads it.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Run {
    /// `nvmx-run/1`
    pub schema: &'static str,
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
}

impl Run {
    /// The run in its present schema.
    pub fn new(stack: Vec<StackLevel>, strategy: String, unit: Unit, events: Vec<Event>) -> Self {
        Run { schema: "nvmx-run/1", stack, strategy, unit: unit.name(), events, growth: None }
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        if path == Path::new("-") {
            print!("{text}");
            return Ok(());
        }
        let problem = || format!("cannot write {}", path.display());
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = tempfile::NamedTempFile::new_in(folder).with_context(problem)?;
        std::fs::write(file.path(), text).with_context(problem)?;
        file.persist(path).with_context(problem)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    #[test]
    fn the_file_has_the_documented_shape() {
        let l0 = StackLevel {
            level: "L0".into(),
            name: "Bochs".into(),
            version: "3.0".into(),
            cpu: "x".into(),
            features: vec![],
        };
        let run = Run::new(vec![l0], "zero-copy".into(), Unit::Instructions, sample());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.json");
        run.write(&path).unwrap();
        let value: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(value["schema"], "nvmx-run/1");
        assert_eq!(value["unit"], "instructions");
        assert_eq!(value["stack"][0]["level"], "L0");
        let cpuid = &value["events"][0];
        assert_eq!((&cpuid["event"], &cpuid["handled_by"]), (&"cpuid".into(), &"L2".into()));
        assert_eq!(cpuid["hw_exits"], 2.0);
        assert!(cpuid["l1_vmwrite"].is_null());
        for key in [
            "native",
            "one_level",
            "nested",
            "count",
            "l1_instructions",
            "l1_vmread",
            "l1_vmptrld",
            "l1_vmclear",
            "l1_invept",
            "trapped_vmread",
            "trapped_vmwrite",
        ] {
            assert!(cpuid.get(key).is_some(), "{key}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_schema_page_names_every_figure() {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/run-schema.md")).unwrap();
        for name in super::super::Event::FIGURES {
            assert!(page.contains(&format!("`{name}`")), "docs/run-schema.md does not explain {name}");
        }
    }
}
