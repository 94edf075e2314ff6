//! A trace file: one line of JSON that says what was booted, then the logs of the boots as they were recorded.

use super::symbols::Symbols;
use super::tree::{Builder, Levels};
use super::{log, ring};
use crate::backend::Spec;
use anyhow::{Context, Result, ensure};
use l2_protocol::OwnedRecord;
use nvmx_setup::output::Output;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The name and version of the format.
pub const SCHEMA: &str = "nvmx-trace/1";

/// Who recorded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The emulator: complete, at no cost for guests
    Emulator,
    /// nvmx's own ring in memory: the last exits of each CPU, at a fixed cost
    Ring,
}

/// The first line.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
struct Header {
    schema: String,
    version: String,
    boots: Vec<BootHeader>,
}

/// What was booted.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct BootHeader {
    /// Its name
    pub name: String,
    /// Who recorded
    pub source: Source,
    /// What ticks are: `instructions` or `cycles`
    pub unit: String,
    /// Who runs what
    pub levels: Levels,
    /// Names for addresses
    pub symbols: Vec<Symbols>,
    /// Bytes of its log
    bytes: usize,
    /// How many exits there were, of which a ring keeps the last
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written: Option<u64>,
}

/// A boot that was recorded.
#[derive(Debug)]
pub struct Boot {
    /// What was booted
    pub header: BootHeader,
    log: Vec<u8>,
}

/// All of a file.
pub struct Trace {
    /// The boots, in the order in which they were asked for
    pub boots: Vec<Boot>,
}

impl Boot {
    /// What the emulator recorded of a boot.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn of_emulator(spec: &Spec, nvmx: &Path, below: u8, unit: &str, file: &Path) -> Result<Self> {
        let recorded = std::fs::read(file).with_context(|| format!("{} left no log of VM exits", spec.name));
        let log = log::body(&recorded?)?.to_vec();
        let (levels, symbols) = (levels(spec, nvmx, below), symbols(spec, nvmx));
        let (name, unit) = (spec.name.clone(), unit.to_string());
        Ok(Boot {
            header: BootHeader {
                name,
                source: Source::Emulator,
                unit,
                levels,
                symbols,
                bytes: log.len(),
                written: None,
            },
            log,
        })
    }

    /// What nvmx itself told of a boot at its end, if it did.
    pub fn of_ring<'a>(
        spec: &Spec,
        nvmx: &Path,
        unit: &str,
        said: impl Iterator<Item = &'a OwnedRecord>,
    ) -> Option<Self> {
        let (records, written) = ring::records(said)?;
        let log: Vec<u8> = records.iter().flat_map(log::bytes).collect();
        let levels = Levels { root: 1, name: "nvmx".into(), guests: vec![2, 3] };
        let (name, unit, symbols) = (spec.name.clone(), unit.to_string(), symbols(spec, nvmx));
        let header =
            BootHeader { name, source: Source::Ring, unit, levels, symbols, bytes: log.len(), written: Some(written) };
        Some(Boot { header, log })
    }

    /// Its trees.
    pub fn build(&self) -> Builder {
        let builder = Builder::new(self.header.levels.clone());
        let builder = if self.header.source == Source::Ring { builder.by_ticks() } else { builder };
        builder.with(self.records())
    }

    /// Its records.
    pub fn records(&self) -> impl Iterator<Item = log::Record> {
        log::records(&self.log)
    }

    /// The name of an address where a level runs: of its own image, of the one that it came in, else the number.
    pub fn name(&self, level: u8, address: u64) -> String {
        let of = |wanted: u8| self.header.symbols.iter().filter(move |s| s.level == wanted);
        let all = of(level).chain(of(level.wrapping_sub(1)));
        all.filter_map(|symbols| symbols.name(address)).next().unwrap_or_else(|| format!("{address:#x}"))
    }
}

/// How many nvmx a boot has, each in the one before.
fn depth(spec: &Spec, nvmx: &Path) -> u8 {
    let images = std::iter::once(&spec.kernel).chain(&spec.modules);
    u8::try_from(images.take_while(|image| image.path == nvmx).count()).unwrap_or(u8::MAX)
}

/// Who runs what in a boot. `below`: how many KVM are below the image that is booted.
pub fn levels(spec: &Spec, nvmx: &Path, below: u8) -> Levels {
    let depth = depth(spec, nvmx);
    let (root, name, guests) = match (below, depth) {
        (0, 0) => (2, "L2", vec![3]),
        (0, depth) => (1, "nvmx", (2..=depth.saturating_add(2)).collect()),
        // KVM has one VMCS for all guests of its guest.
        (1, 0) => (1, "KVM", vec![2, 3]),
        _ => (0, "KVM", vec![1, 2]),
    };
    Levels { root, name: name.into(), guests }
}

fn symbols(spec: &Spec, nvmx: &Path) -> Vec<Symbols> {
    let depth = depth(spec, nvmx);
    let first = if depth == 0 { 2 } else { 1 };
    // The hypervisors one by one, then what the last of them got.
    let innermost = if depth == 0 { 2 } else { depth.saturating_add(1) };
    let images = std::iter::once(&spec.kernel).chain(&spec.modules);
    let level = (first..=innermost).chain(std::iter::repeat(innermost.saturating_add(1)));
    level.zip(images).map(|(level, image)| Symbols::read(level, &image.path)).collect()
}

/// Writes boots into one file.
///
/// # Errors
/// If it cannot be written.
pub fn write(boots: &[&Boot], output: &Output) -> Result<()> {
    let headers = boots.iter().map(|boot| boot.header.clone()).collect();
    let header = Header { schema: SCHEMA.into(), version: env!("CARGO_PKG_VERSION").into(), boots: headers };
    let mut file = serde_json::to_vec(&header)?;
    file.push(b'\n');
    boots.iter().for_each(|boot| file.extend_from_slice(&boot.log));
    output.write_bytes(&file)
}

/// Reads a file.
///
/// # Errors
/// If it cannot be read or is no trace.
pub fn read(path: &Path) -> Result<Trace> {
    parse(&std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?)
        .with_context(|| format!("{} is no trace of `./nvmx run --trace`", path.display()))
}

fn parse(file: &[u8]) -> Result<Trace> {
    let end = memchr::memchr(b'\n', file).context("it has no header")?;
    let (header, mut rest) = file.split_at(end);
    let header: Header = serde_json::from_slice(header).context("its header cannot be read")?;
    ensure!(header.schema == SCHEMA, "its format is {}, not {SCHEMA}", header.schema);
    rest = &rest[1..];
    let mut boots = Vec::new();
    for boot in header.boots {
        let (log, more) = rest.split_at_checked(boot.bytes).context("it is cut")?;
        boots.push(Boot { header: boot, log: log.to_vec() });
        rest = more;
    }
    ensure!(!boots.is_empty(), "it has no boots");
    Ok(Trace { boots })
}

impl Trace {
    /// The boot of this name, or the one under nvmx.
    ///
    /// # Errors
    /// The names there are.
    pub fn boot(&self, name: Option<&str>) -> Result<&Boot, String> {
        let names = || self.boots.iter().map(|b| b.header.name.as_str()).collect::<Vec<_>>().join(", ");
        let nested = || self.boots.iter().max_by_key(|b| (b.header.levels.root == 1, b.header.levels.guests.len()));
        let found = match name {
            Some(name) => self.boots.iter().find(|boot| boot.header.name == name),
            None => nested(),
        };
        found.ok_or_else(|| format!("there is no boot `{}` in it; there are: {}", name.unwrap_or(""), names()))
    }
}

#[cfg(test)]
pub mod tests {
    use super::super::tree::tests::{cascade, nested};
    use super::*;

    /// A boot with the records of a CPUID of L3.
    pub fn boot() -> Boot {
        boot_of(nested(), &cascade())
    }

    /// A boot with these records.
    pub fn boot_of(levels: Levels, records: &[log::Record]) -> Boot {
        let all = log::tests::log(records);
        let log = log::body(&all).unwrap().to_vec();
        let (name, unit) = ("sample".to_string(), "instructions".to_string());
        let header = BootHeader {
            name,
            source: Source::Emulator,
            unit,
            levels,
            symbols: vec![],
            bytes: log.len(),
            written: None,
        };
        Boot { header, log }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace");
        write(&[&boot(), &boot()], &Output::prepare(&path).unwrap()).unwrap();
        let trace = read(&path).unwrap();
        assert_eq!(trace.boots.len(), 2);
        assert_eq!(trace.boots[1].build().exits, boot().build().exits);
        assert_eq!(trace.boot(None).unwrap().header.name, "sample");
        assert!(trace.boot(Some("x")).err().unwrap().contains("there are: sample, sample"));
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(format!("{:#}", read(&path).err().unwrap()).contains("it is cut"));
        std::fs::write(&path, "hello\n").unwrap();
        assert!(format!("{:#}", read(&path).err().unwrap()).contains("is no trace"));
    }
}
