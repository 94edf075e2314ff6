//! The boot tests of loaders and firmware on boards that QEMU emulates without VMX: nvmx ends after it has started the processors
//! (`stop=cpus`) and says what it found.

use super::{Case, Judge, Suite, messages, refused};
use crate::backend::laid::Vmm;
use crate::backend::tcg::{Board, Loader, Port, Tcg};
use crate::backend::{Backend, Machine, Payload, Protocol, Spec};
use crate::boot::Outcome;
use crate::session::Session;
use anyhow::{Context, Result};
use l2_protocol::{Kind, Level, OwnedRecord};
use nvmx_setup as setup;
use nvmx_setup::tcg::Tools;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// CPU time: the longest of them takes five seconds.
const SOON: Duration = Duration::from_secs(60);
/// MiB that firmware may keep.
const FIRMWARE: u64 = 64;
/// The exit code of QEMU after nvmx passed.
const PASSED: i32 = 0x10 << 1 | 1;

/// One machine, what loads nvmx there, and what nvmx is told.
struct Row {
    /// The end of the case's name
    name: &'static str,
    board: Board,
    loader: Loader,
    protocol: Protocol,
    port: Port,
    cpus: u32,
    memory: u32,
    options: &'static str,
    /// Modules of L2 beside its image, and the bytes of its own command line
    modules: u32,
    line: usize,
}

const PC: Row = Row {
    name: "by QEMU's multiboot on a pc",
    board: Board::Pc,
    loader: Loader::Qemu,
    protocol: Protocol::Multiboot1,
    port: Port::Com1,
    cpus: 1,
    memory: 1024,
    options: "",
    modules: 0,
    line: 0,
};

/// What starts PVH kernels without firmware and without a loader; QEMU's own tables are not there.
const LAID: Row = Row { board: Board::MicrovmWithoutAcpi, protocol: Protocol::Pvh, memory: 512, ..PC };

#[rustfmt::skip]
const ROWS: [Row; 16] = [
    PC,
    Row { name: "by QEMU's multiboot on a q35 with 64 CPUs and 8 GiB", board: Board::Q35, cpus: 64, memory: 8192, ..PC },
    Row { name: "by QEMU's multiboot on a pc with 16 CPUs and 256 MiB", cpus: 16, memory: 256, ..PC },
    Row { name: "by QEMU's multiboot on a q35 with 160 CPUs and 16 GiB", board: Board::Q35, cpus: 160, memory: 16384, ..PC },
    Row { name: "by QEMU's multiboot on a microvm with 5 CPUs", board: Board::Microvm, cpus: 5, ..PC },
    Row { name: "by PVH on a pc with 4 CPUs and 5 GiB", protocol: Protocol::Pvh, cpus: 4, memory: 5120, ..PC },
    Row { name: "by PVH on a microvm with 2 CPUs", board: Board::Microvm, protocol: Protocol::Pvh, cpus: 2, ..PC },
    Row { name: "by GRUB's multiboot and a BIOS on a q35 with 3 CPUs", board: Board::Q35, loader: Loader::Bios, cpus: 3, ..PC },
    Row { name: "by GRUB's multiboot2 and a BIOS on a pc with 2 CPUs and 3 GiB", loader: Loader::Bios,
        protocol: Protocol::Multiboot2, cpus: 2, memory: 3072, ..PC },
    Row { name: "by GRUB's multiboot2 and UEFI on a q35 with 8 CPUs and 4 GiB", board: Board::Q35, loader: Loader::Uefi,
        protocol: Protocol::Multiboot2, cpus: 8, memory: 4096, ..PC },
    Row { name: "by GRUB's multiboot2 and UEFI on a pc", loader: Loader::Uefi, protocol: Protocol::Multiboot2, ..PC },
    Row { name: "on a pc whose only serial port is COM2", port: Port::Com2, cpus: 2, options: "serial=com2", ..PC },
    Row { name: "on a pc whose serial port is given by its address", port: Port::Com2, options: "serial=0x2f8,57600", ..PC },
    Row { name: "as Firecracker lays out memory, with 2 CPUs", loader: Loader::Laid(Vmm::Firecracker), cpus: 2, ..LAID },
    Row { name: "as Firecracker lays out memory, with 4 GiB", loader: Loader::Laid(Vmm::Firecracker), memory: 4096, ..LAID },
    Row { name: "as cloud-hypervisor lays out memory, with 3 CPUs", loader: Loader::Laid(Vmm::CloudHypervisor), cpus: 3, ..LAID },
];

/// No serial port at all: only the exit code tells.
const MUTE: [Row; 2] = [
    Row { name: "on a pc without a serial port", port: Port::None, cpus: 2, ..PC },
    Row { name: "on a pc with a serial port that it is to leave alone", options: "serial=none", ..PC },
];

/// The first version of multiboot hands over no ACPI tables, and UEFI puts them where only the second one says.
const BLIND: Row = Row {
    name: "",
    board: Board::Q35,
    loader: Loader::Uefi,
    protocol: Protocol::Multiboot1,
    port: Port::Com1,
    cpus: 2,
    memory: 1024,
    options: "",
    modules: 0,
    line: 0,
};

/// More modules and longer command lines than anybody uses. QEMU's words must fit into an argument of 128 KiB.
#[rustfmt::skip]
const MANY: [Row; 3] = [
    Row { name: "QEMU's multiboot on a pc", modules: 300, line: 20_000, ..PC },
    Row { name: "GRUB's multiboot and a BIOS on a pc", loader: Loader::Bios, modules: 300, line: 20_000, ..PC },
    Row { name: "GRUB's multiboot2 and UEFI on a q35", board: Board::Q35, loader: Loader::Uefi, protocol: Protocol::Multiboot2,
        modules: 300, line: 20_000, ..PC },
];
/// The command line of each of those modules.
const OF_A_MODULE: &str = "one of many";

/// Adds the boots and cases.
///
/// # Errors
/// [`nvmx_setup::error::Stop::Environment`] if QEMU or its firmware cannot be had.
pub fn add(suite: &mut Suite, session: &Session) -> Result<()> {
    let tools = if session.dry {
        Tools { qemu: PathBuf::new(), version: String::new(), uefi: PathBuf::new() }
    } else {
        setup::tcg::set_up(&session.ui)?
    };
    let pvh = session.paths.target.join("nvmx/fixtures/nvmx-by-pvh");
    let small = session.paths.target.join("nvmx/fixtures/small-module");
    if !session.dry {
        std::fs::write(&pvh, without_multiboot(std::fs::read(&session.images.nvmx)?)?)?;
        std::fs::write(&small, "a small module")?;
    }
    let mut add = |row: &Row, name: String, judge: Judge| {
        let boot = format!("firmware-{}", suite.cases.len());
        let by_qemu = row.protocol == Protocol::Pvh && row.loader == Loader::Qemu;
        let kernel = if by_qemu { &pvh } else { &session.images.nvmx };
        let kernel = Payload::new(kernel, format!("log=info stop=cpus {}", row.options).trim_end());
        // QEMU hands one module on by PVH, without a command line, and so do the others.
        let args = if row.protocol == Protocol::Pvh { "" } else { "events=50" };
        // GRUB takes words of less than 8 KiB.
        let args = [args, &"123456789 ".repeat(row.line / 10)].join(" ");
        let more = std::iter::repeat_n(Payload::new(&small, OF_A_MODULE), row.modules as usize);
        let modules =
            session.images.guest("cascade").map(|guest| [Payload::new(guest, args.trim())].into_iter().chain(more));
        let machine = Machine { memory: row.memory, cpus: row.cpus, model: "max".into() };
        let spec = modules.map(|modules| Spec {
            protocol: row.protocol,
            machine,
            timeout: SOON,
            ..session.spec(boot.clone(), kernel, modules.collect())
        });
        suite.boots.insert(boot.clone(), spec.map_err(|e| format!("{e:#}")));
        let backend = Tcg { tools: tools.clone(), board: row.board, loader: row.loader, port: row.port };
        let backend: Arc<dyn Backend + Send> = Arc::new(backend);
        suite.backends.insert(boot.clone(), backend);
        suite.cases.push(Case { name, boots: vec![boot], judge });
    };
    for row in &ROWS {
        let (cpus, memory) = (row.cpus, row.memory);
        add(row, format!("nvmx starts {}", row.name), Box::new(move |o| found(o[0], cpus, memory)));
    }
    for row in &MANY {
        let name = format!("hundreds of modules and a command line of 20,000 bytes reach L2 by {}", row.name);
        add(row, name, Box::new(move |o| handed_on(o[0], row)));
    }
    for row in &MUTE {
        add(row, format!("nvmx starts {}", row.name), Box::new(|o| mute(o[0])));
    }
    let name = "the first version of multiboot under UEFI is refused, and the second one named";
    add(&BLIND, name.into(), Box::new(|o| refused(o[0], messages::NO_ACPI)));
    let poor = Row { board: Board::MicrovmWithoutAcpi, ..PC };
    add(&poor, "a machine without ACPI is refused".into(), Box::new(|o| refused(o[0], messages::NO_ACPI)));
    let consent = Row { options: "cpus=1", ..poor };
    let name = "a machine without ACPI is taken where the user says that it has one CPU";
    add(&consent, name.into(), Box::new(|o| found(o[0], 1, 1024)));
    let fewer = Row { cpus: 4, options: "cpus=2", ..PC };
    add(&fewer, "L2 finds CPUs that it does not get disabled in the MADT".into(), Box::new(|o| listed(o[0], 4, 2)));
    let crowded = Row { cpus: 16, memory: 256, options: "frames=24", ..PC };
    let name = "CPUs that memory does not suffice for are named, and the others run L2";
    add(&crowded, name.into(), Box::new(|o| crowd(o[0], 16)));
    let odd = Row { options: "wibble colour=red", ..PC };
    add(&odd, "words that nvmx does not know are a warning".into(), Box::new(|o| warned(o[0])));
    Ok(())
}

/// The image for a loader that looks for multiboot's header first: it has none.
fn without_multiboot(mut image: Vec<u8>) -> Result<Vec<u8>> {
    const MAGIC: [u8; 4] = 0x1BAD_B002u32.to_le_bytes();
    let at = image.chunks_exact(4).position(|word| word == MAGIC).context("the image has no multiboot header")?;
    image[at * 4..at * 4 + 4].fill(0);
    Ok(image)
}

fn machine(outcome: &Outcome) -> Result<&OwnedRecord, String> {
    outcome.verdict()?;
    let mut checks = outcome.transcript.of_kind(Kind::Check).filter(|r| r.level == Level::L1);
    checks.find(|r| r.get("name") == Some("machine")).ok_or_else(|| "nvmx did not say what the machine is".into())
}

fn number(record: &OwnedRecord, key: &str) -> Result<u64, String> {
    let text = record.get(key).ok_or_else(|| format!("`{key}` is missing"))?;
    let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    parsed.map_err(|_| format!("{key}={text} is no number"))
}

/// All CPUs were found and started, L2 gets all, and all memory but what firmware keeps; nvmx lies below 4 GiB in it.
fn found(outcome: &Outcome, cpus: u32, memory: u32) -> Result<(), String> {
    let said = machine(outcome)?;
    let (cpus, memory) = (u64::from(cpus), u64::from(memory));
    let (saw, started) = (number(said, "cpus")?, number(said, "started")?);
    if (saw, started) != (cpus, cpus) {
        return Err(format!("{saw} CPUs were found and {started} started of {cpus}"));
    }
    let usable = number(said, "usable_mib")?;
    if !(memory.saturating_sub(FIRMWARE)..=memory).contains(&usable) {
        return Err(format!("{usable} MiB are usable of {memory}"));
    }
    let (start, size) = (number(said, "own")?, number(said, "own_mib")? << 20);
    if start + size > 1 << 32 || start + size > number(said, "end")? {
        return Err(format!("nvmx lies at {start:#x}, {size:#x} bytes"));
    }
    let (frames, used) = (number(said, "frames")?, number(said, "used")?);
    if frames == 0 || used != cpus || number(said, "entry")? == 0 {
        return Err(format!("{frames} frames, {used} CPUs for L2, entry {:?}", said.get("entry")));
    }
    Ok(())
}

/// L2's boot information has all modules, and each command line as long as it was.
fn handed_on(outcome: &Outcome, row: &Row) -> Result<(), String> {
    let said = machine(outcome)?;
    let (modules, text) = (number(said, "modules")?, number(said, "text")?);
    let (row_modules, lines) = (u64::from(row.modules), OF_A_MODULE.len() as u64);
    if (modules, text) != (row_modules, row_modules * lines) {
        return Err(format!(
            "L2 finds {modules} modules with {text} bytes of command lines, of {row_modules} with {lines} each"
        ));
    }
    match number(said, "line")? {
        length if length == ("events=50 ".len() + row.line - 1) as u64 => Ok(()),
        length => Err(format!("L2's command line has {length} bytes")),
    }
}

fn mute(outcome: &Outcome) -> Result<(), String> {
    match outcome.status {
        _ if !outcome.transcript.lines.is_empty() => Err("it wrote something, although it has no serial port".into()),
        Some(PASSED) => Ok(()),
        other => Err(format!("QEMU ended with {other:?}, not {PASSED}")),
    }
}

/// So many CPUs were started, and so many are left in the MADT.
fn listed(outcome: &Outcome, cpus: u64, left: u64) -> Result<(), String> {
    let said = machine(outcome)?;
    let saw = ["started", "used", "madt"].map(|key| number(said, key));
    match saw {
        [Ok(started), Ok(used), Ok(madt)] if (started, used, madt) == (cpus, left, left) => Ok(()),
        _ => Err(format!("{said}")),
    }
}

/// L2 gets some of the CPUs, and one line names the others.
fn crowd(outcome: &Outcome, cpus: u64) -> Result<(), String> {
    let said = machine(outcome)?;
    let (started, used) = (number(said, "started")?, number(said, "used")?);
    if started != cpus || !(2..cpus).contains(&used) {
        return Err(format!("{started} of {cpus} CPUs started, {used} run L2"));
    }
    let ids: Vec<u64> = (used..cpus).collect();
    let line = format!("too little memory for {cpus} CPUs: L2 has {used}, and not those with APIC ids {ids:?}");
    outcome.transcript.a_line_has(&["WARN", &line]).then_some(()).ok_or(format!("no line has \"{line}\""))
}

fn warned(outcome: &Outcome) -> Result<(), String> {
    machine(outcome)?;
    let missing = ["wibble", "colour=red"]
        .into_iter()
        .find(|word| !outcome.transcript.a_line_has(&["WARN", "unknown options", word]));
    missing.map_or(Ok(()), |word| Err(format!("no warning names {word}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_magic_number_of_the_first_header_goes() {
        let mut image = vec![7; 16];
        image[4..8].copy_from_slice(&0x1BAD_B002u32.to_le_bytes());
        let changed = without_multiboot(image.clone()).unwrap();
        assert_eq!((&changed[..4], &changed[4..8], &changed[8..]), (&image[..4], &[0; 4][..], &image[8..]));
        assert!(without_multiboot(changed).is_err());
    }
}
