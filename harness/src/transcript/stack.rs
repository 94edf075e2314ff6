//! The levels of a run: who runs, which version, on which CPU, with which features.

use super::{Transcript, real_level};
use l2_protocol::{Kind, Level, OwnedRecord};
use schemars::JsonSchema;
use serde::Serialize;

/// One level.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, JsonSchema)]
pub struct StackLevel {
    /// `L0` ... `L3`
    pub level: String,
    /// Its program
    pub name: String,
    /// The program's version, empty if it has none
    pub version: String,
    /// The CPU that the level sees
    pub cpu: String,
    /// What it uses
    pub features: Vec<String>,
}

/// The levels of a boot under nvmx, from the `hello` records; L0 is what the back end says. Where nvmx is stacked, each has its
/// level, and so have the guests.
pub fn stack(l0: StackLevel, nested: &Transcript) -> Vec<StackLevel> {
    let mut levels = vec![l0];
    let hellos = |level| nested.of_kind(Kind::Hello).filter(move |r| r.level == level);
    let guests = [Level::L2, Level::L3].into_iter().filter_map(|level| hellos(level).next());
    let depth = hellos(Level::L1).count() as u32;
    for (met, record) in (1..).zip(hellos(Level::L1).chain(guests)) {
        levels.push(StackLevel { level: real_level(record.level, depth, met), ..of_hello(record) });
    }
    levels
}

/// A level as it introduces itself.
pub fn of_hello(record: &OwnedRecord) -> StackLevel {
    let get = |key: &str| record.get(key).unwrap_or_default().to_string();
    let name = if record.level == Level::L1 { "nvmx".into() } else { get("name") };
    StackLevel {
        level: record.level.word().into(),
        name,
        version: get("version"),
        cpu: get("cpu").split_whitespace().collect::<Vec<_>>().join(" "),
        features: get("features").split_whitespace().map(str::to_string).collect(),
    }
}

/// The field-access strategy that nvmx chose.
pub fn strategy(nested: &Transcript) -> String {
    let hello = nested.first(Level::L1, Kind::Hello);
    hello.and_then(|r| r.get("strategy")).unwrap_or("unknown").to_string()
}

/// The field-access strategies of all nvmx in the stack, the outermost first.
pub fn strategies(nested: &Transcript) -> Vec<String> {
    let hellos = nested.of_kind(Kind::Hello).filter(|r| r.level == Level::L1);
    hellos.map(|r| r.get("strategy").unwrap_or("unknown").to_string()).collect()
}

/// How an nvmx reaches fields, from its hello record: L2's in vmcs12, and its own in a VMCS that is not current.
pub fn access(hello: &OwnedRecord) -> Option<String> {
    let strategy = hello.get("strategy")?;
    Some(match hello.get("vmcs") {
        Some("memory") => format!("{strategy}, VMCSs in memory"),
        _ => strategy.to_string(),
    })
}

/// A level's line in the banner.
pub fn banner_line(level: &StackLevel, strategy: Option<&str>) -> String {
    let mut text = format!("{} {}", level.name, level.version).trim_end().to_string();
    if !level.cpu.is_empty() {
        text.push_str(&format!(", CPU {}", level.cpu));
    }
    if let Some(strategy) = strategy {
        text.push_str(&format!(", field access {strategy}"));
    }
    if !level.features.is_empty() {
        text.push_str(&format!(", uses {}", level.features.join(" ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::transcript;

    #[test]
    fn the_levels_of_a_stack_of_nvmx_are_counted() {
        let l0 = StackLevel { name: "Bochs".into(), ..of_hello(&OwnedRecord::parse("@L2 hello").unwrap()) };
        let nested =
            transcript(&["@L1 hello strategy=zero-copy", "@L1 hello strategy=trapped", "@L2 hello name=cascade"]);
        let names: Vec<_> = stack(l0, &nested)[1..].iter().map(|l| format!("{} {}", l.level, l.name)).collect();
        assert_eq!(names, ["L1 nvmx", "L2 nvmx", "L3 cascade"]);
        assert_eq!(strategies(&nested), ["zero-copy", "trapped"]);
    }

    #[test]
    fn the_stack_is_read_from_the_introductions() {
        let l0 = StackLevel {
            level: "L0".into(),
            name: "Bochs".into(),
            version: "3.0".into(),
            cpu: "tigerlake".into(),
            features: vec![],
        };
        let nested = transcript(&[
            "@L1 hello version=0.1.0 cpu=\"11th  Gen\" strategy=zero-copy l0=bare features=\"ept vpid\"",
            "@L2 hello name=cascade version=0.1.0 slot=nvmx cpu=x features=ept",
        ]);
        let levels = stack(l0, &nested);
        let names: Vec<_> = levels.iter().map(|l| format!("{} {}", l.level, l.name)).collect();
        assert_eq!(names, ["L0 Bochs", "L1 nvmx", "L2 cascade"]);
        assert_eq!(strategy(&nested), "zero-copy");
        let under_kvm = OwnedRecord::parse("@L1 hello strategy=zero-copy vmcs=memory").unwrap();
        assert_eq!(access(&under_kvm).as_deref(), Some("zero-copy, VMCSs in memory"));
        let line = banner_line(&levels[1], Some("zero-copy"));
        assert_eq!(line, "nvmx 0.1.0, CPU 11th Gen, field access zero-copy, uses ept vpid");
    }
}
