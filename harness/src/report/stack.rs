//! The levels of a run: who runs, which version, on which CPU, with which features.

use crate::transcript::Transcript;
use l2_protocol::{Kind, Level, OwnedRecord};
use serde::Serialize;

/// One level.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
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

/// The levels of a boot under nvmx, from the `hello` records; L0 is what the back end says.
pub fn stack(l0: StackLevel, nested: &Transcript) -> Vec<StackLevel> {
    let mut levels = vec![l0];
    for level in [Level::L1, Level::L2, Level::L3] {
        if let Some(record) = nested.first(level, Kind::Hello) {
            levels.push(of_hello(record));
        }
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
    use super::super::tests::transcript;
    use super::*;

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
        let line = banner_line(&levels[1], Some("zero-copy"));
        assert_eq!(line, "nvmx 0.1.0, CPU 11th Gen, field access zero-copy, uses ept vpid");
    }
}
