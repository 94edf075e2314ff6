//! Bochs as L0: a configuration file, a boot disk, and what its log tells afterwards.

use super::{Backend, DEBUG_PORT, Line, Machine, Medium, Protocol, SERIAL, Spec, Unit, drive, iso};
use crate::clock::{self, PER_SECOND};
use anyhow::{Context, Result};
use nvmx_setup::bochs::{BIOS, Bochs, Flavour, VGA_BIOS};
use nvmx_setup::proc::Child;
use rustix::process::Signal;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The most host memory that released builds of Bochs take, in MiB; more of the guest's is swapped to a file.
const HOST_MEMORY: u32 = 2048;
/// What the machine's clock shows at power-on, in seconds since 1970: 1 January 2026. Always the same, so that a boot of an
/// operating system, which reads it, is the same each time.
const POWER_ON: u64 = 1_767_225_600;
/// Between the name of a CPU model and the features that it is to lack.
pub const WITHOUT: &str = " without ";
const LOG: &str = "bochs.log";
const OUT: &str = "bochs.out";

/// Where the machine's text goes.
#[derive(Clone, Copy, Debug)]
pub struct Serial {
    /// COM1, a file in the boot's folder
    pub file: &'static str,
    /// Whether what is written to the port E9 goes to standard output
    pub debug_port: bool,
}

impl Backend for Bochs {
    fn name(&self) -> String {
        format!("Bochs {}", self.version)
    }

    fn cpu(&self, machine: &Machine) -> String {
        format!("model {}", machine.model)
    }

    fn records(&self) -> bool {
        true
    }

    fn cds(&self) -> u8 {
        1
    }

    fn unit(&self) -> Unit {
        Unit::Instructions
    }

    fn start(&self, spec: &Spec, folder: &Path) -> Result<Child> {
        if spec.protocol != Protocol::Firmware {
            iso::make(spec, folder, iso::Platform::Bios)?;
        }
        if let Some(drive) = &spec.drive {
            drive::put(drive, folder)?;
        }
        let serial = Serial { file: SERIAL, debug_port: spec.debug_port };
        let out = if spec.debug_port { DEBUG_PORT } else { OUT };
        start(self, &spec.machine, serial, out, &Wiring::of(spec), folder)
    }

    fn stop(&self, child: &mut Child, folder: &Path) -> Vec<String> {
        // On SIGINT Bochs writes the CPU's state to its log before it ends.
        child.signal(Signal::INT);
        if !matches!(child.wait_for(Duration::from_secs(3)), Ok(Some(_))) {
            child.end();
        }
        where_it_was(&std::fs::read_to_string(folder.join(LOG)).unwrap_or_default())
    }

    fn last_words(&self, folder: &Path) -> Vec<String> {
        let text = std::fs::read(folder.join(LOG)).unwrap_or_default();
        let mut words = panics(&String::from_utf8_lossy(&text));
        if text.is_empty() {
            let out = std::fs::read(folder.join(OUT)).unwrap_or_default();
            words.extend(String::from_utf8_lossy(&out).lines().rev().take(5).map(str::to_string));
        }
        words
    }

    fn refused(&self, folder: &Path) -> Vec<String> {
        refused(&String::from_utf8_lossy(&std::fs::read(folder.join(LOG)).unwrap_or_default()))
    }
}

/// The VMX errors in a log, each once, in the order of their first occurrence. A VM exit is no error, though Bochs logs some as errors.
fn refused(log: &str) -> Vec<String> {
    let is_error = |line: &&str| line.get(11..13) == Some("e[");
    let is_refusal = |words: &String| words.starts_with("VM") && !words.to_ascii_uppercase().starts_with("VMEXIT");
    let mut found: Vec<(String, u64)> = Vec::new();
    for words in log.lines().filter(is_error).map(message).filter(is_refusal) {
        match found.iter_mut().find(|(known, _)| *known == words) {
            Some((_, count)) => *count += 1,
            None => found.push((words, 1)),
        }
    }
    let times = |count| if count > 1 { format!(" ({count} times)") } else { String::new() };
    found.into_iter().map(|(words, count)| words + &times(count)).collect()
}

/// What else a machine is connected with.
#[derive(Clone, Debug, Default)]
pub struct Wiring {
    /// Where every exit is recorded
    record: Option<PathBuf>,
    /// A drive of L2's, which is in the folder, and whether firmware boots from it
    drive: Option<(Medium, bool)>,
    /// The port of a debugger
    gdb: Option<u16>,
    line: Line,
}

impl Wiring {
    /// Of a boot.
    pub fn of(spec: &Spec) -> Self {
        let first = spec.protocol == Protocol::Firmware;
        let drive = spec.drive.as_ref().map(|drive| (drive.medium, first));
        Wiring { record: spec.exit_log(), drive, gdb: spec.gdb, line: spec.line }
    }

    /// Lines of the configuration.
    fn lines(&self) -> Vec<String> {
        let own = "ata0-master: type=cdrom, path=boot.iso, status=inserted".to_string();
        let of_l2 = |place: &str, medium: Medium| match medium {
            Medium::Disk => format!("ata0-{place}: type=disk, path={}, mode=volatile", drive::NAME),
            Medium::Cd => format!("ata0-{place}: type=cdrom, path={}, status=inserted", drive::NAME),
        };
        let mut lines = match self.drive {
            None => vec![own, "boot: cdrom".into()],
            Some((medium, false)) => vec![own, of_l2("slave", medium), "boot: cdrom".into()],
            Some((medium, true)) => {
                let boot = if medium == Medium::Disk { "boot: disk" } else { "boot: cdrom" };
                vec![of_l2("master", medium), boot.into()]
            }
        };
        lines.extend(self.gdb.map(|port| format!("gdbstub: enabled=1, port={port}")));
        lines
    }
}

/// Starts the machine on the boot disk that is in the folder; `out` there gets what Bochs itself prints.
///
/// # Errors
/// If a file cannot be written or Bochs does not start.
pub fn start(
    bochs: &Bochs,
    machine: &Machine,
    serial: Serial,
    out: &str,
    wiring: &Wiring,
    folder: &Path,
) -> Result<Child> {
    let bios = BIOS.find().context("the BIOS of Bochs is missing (package bochsbios)")?;
    let vga = VGA_BIOS.find().context("the VGA BIOS is missing (package vgabios)")?;
    std::fs::write(folder.join("bochsrc"), rc(machine, bochs, serial, wiring, &bios, &vga))?;
    let stdout = File::create(folder.join(out))?;
    // What Bochs says itself is no text of a guest, whose debug port is Bochs' standard output.
    let stderr = if out == OUT { stdout.try_clone()? } else { File::create(folder.join(OUT))? };
    let mut command = Command::new(&bochs.path);
    // Relative names throughout: a comma or a space in the checkout's path would end an option.
    command.current_dir(folder).args(["-q", "-f", "bochsrc"]);
    // Our build counts its ticks there.
    command.env("NVMX_TICKS", clock::TICKS);
    // Bochs shows local time.
    command.env("TZ", "UTC");
    if wiring.line == Line::Fast {
        command.env("NVMX_SERIAL_USEC", "1");
    }
    if let Some(log) = &wiring.record {
        command.env("NVMX_EXIT_LOG", log);
    }
    if bochs.flavour == Flavour::Debugger {
        std::fs::write(folder.join("go"), "c\n")?;
        command.args(["-rc", "go"]);
    }
    Child::spawn(&mut command, stdout, stderr)
}

fn rc(machine: &Machine, bochs: &Bochs, serial: Serial, wiring: &Wiring, bios: &Path, vga: &Path) -> String {
    let display = match bochs.flavour {
        Flavour::Plain => "nogui",
        Flavour::Debugger => "rfb, options=\"timeout=0\"",
    };
    let lines = [
        memory_line(machine.memory, bochs),
        format!("romimage: file={}, options=fastboot", bios.display()),
        format!("vgaromimage: file={}", vga.display()),
        cpu_line(machine),
        format!("clock: sync=none, time0={POWER_ON}"),
        wiring.lines().join("\n"),
        format!("com1: enabled=1, mode=file, dev={}", serial.file),
        format!("port_e9_hack: enabled={}", u8::from(serial.debug_port)),
        format!("log: {LOG}"),
        "panic: action=fatal".into(),
        "error: action=report".into(),
        "info: action=ignore, cpu0=report".into(),
        format!("display_library: {display}"),
    ];
    lines.join("\n") + "\n"
}

/// The model's name may be followed by ` without ` and features that it is not to have.
fn cpu_line(machine: &Machine) -> String {
    let (model, without) = machine.model.split_once(WITHOUT).unwrap_or((&machine.model, ""));
    let without = if without.is_empty() { String::new() } else { format!(", exclude_features=\"{without}\"") };
    format!("cpu: model={model}, count={}, ips={PER_SECOND}, reset_on_triple_fault=0{without}", machine.cpus)
}

/// What does not fit into the host's part is swapped in blocks; with the usual small ones of 128 KiB, time to start grows with
/// the square of the memory. The size of blocks can be set from version 3.0 on.
fn memory_line(memory: u32, bochs: &Bochs) -> String {
    let blocks = if memory > HOST_MEMORY && !bochs.version.starts_with("2.") { ", block_size=8192" } else { "" };
    format!("memory: guest={memory}, host={}{blocks}", memory.min(HOST_MEMORY))
}

/// Panics in the log, but not the one that is the normal end: the guest's "Shutdown".
fn panics(log: &str) -> Vec<String> {
    let is_panic = |l: &&str| l.contains(">>PANIC<<") || l.get(11..13) == Some("p[");
    // The guest's own end, and ours.
    let normal = |l: &&str| l.contains("Shutdown port") || l.contains("SIGNAL 2 caught");
    log.lines().filter(is_panic).filter(|l| !normal(l)).map(message).collect()
}

/// The CPU's state that Bochs logged when it was interrupted.
fn where_it_was(log: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let ticks = log.lines().rev().find_map(|l| l.get(..11)?.parse::<u64>().ok());
    if let Some(ticks) = ticks {
        let seconds = ticks as f64 / PER_SECOND as f64;
        lines.push(format!("the machine had run {ticks} instructions ({seconds:.1} s of its own time)"));
    }
    let state = |text: &str| text.contains("CPU is in") || text.contains("RIP=") || text.contains("CR3=");
    lines.extend(log.lines().map(message).filter(|m| state(m)));
    lines
}

/// The text of a log line without time and source.
fn message(line: &str) -> String {
    line.split_once(']').map_or(line, |(_, text)| text).trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rc_of(memory: u32, flavour: Flavour) -> String {
        let machine = Machine { memory, cpus: 2, model: "tigerlake".into() };
        rc(
            &machine,
            &built(flavour, "3.0"),
            Serial { file: SERIAL, debug_port: false },
            &Wiring::default(),
            &PathBuf::from("/b"),
            &PathBuf::from("/v"),
        )
    }

    fn built(flavour: Flavour, version: &str) -> Bochs {
        Bochs { path: "/bochs".into(), version: version.into(), flavour, lost: None }
    }

    #[test]
    fn the_configuration_names_model_memory_disk_and_serial_line() {
        let text = rc_of(256, Flavour::Plain);
        assert!(
            text.starts_with(
                "memory: guest=256, host=256\nromimage: file=/b, options=fastboot\nvgaromimage: file=/v\n"
            )
        );
        assert!(text.contains("cpu: model=tigerlake, count=2, ips=100000000, reset_on_triple_fault=0\n"));
        assert!(text.contains("com1: enabled=1, mode=file, dev=serial.log\n"));
        assert!(text.ends_with("display_library: nogui\n"));
    }

    #[test]
    fn a_drive_of_l2s_comes_behind_the_boot_disk_or_is_booted_itself() {
        let lines = |medium, first| Wiring { drive: Some((medium, first)), ..Wiring::default() }.lines();
        let behind = lines(Medium::Disk, false);
        assert!(behind[0].contains("master: type=cdrom, path=boot.iso") && behind[2] == "boot: cdrom", "{behind:?}");
        assert_eq!(behind[1], "ata0-slave: type=disk, path=drive, mode=volatile");
        assert_eq!(lines(Medium::Disk, true), ["ata0-master: type=disk, path=drive, mode=volatile", "boot: disk"]);
        let cd = lines(Medium::Cd, true);
        assert_eq!(cd, ["ata0-master: type=cdrom, path=drive, status=inserted", "boot: cdrom"]);
        let served = Wiring { gdb: Some(1234), ..Wiring::default() }.lines();
        assert_eq!(served[2], "gdbstub: enabled=1, port=1234");
    }

    #[test]
    fn a_model_may_lack_features() {
        let machine = Machine { memory: 256, cpus: 1, model: "sapphire_rapids without amx amx_int8".into() };
        assert!(cpu_line(&machine).starts_with("cpu: model=sapphire_rapids, count=1, "));
        assert!(cpu_line(&machine).ends_with(", exclude_features=\"amx amx_int8\""));
    }

    #[test]
    fn more_memory_than_bochs_takes_is_not_asked_of_the_host() {
        assert!(rc_of(3072, Flavour::Plain).contains("memory: guest=3072, host=2048, block_size=8192\n"));
        assert!(rc_of(2048, Flavour::Plain).contains("memory: guest=2048, host=2048\n"));
        assert_eq!(memory_line(3072, &built(Flavour::Debugger, "2.7")), "memory: guest=3072, host=2048");
    }

    #[test]
    fn a_build_with_debugger_gets_a_display_that_needs_no_terminal() {
        assert!(rc_of(256, Flavour::Debugger).ends_with("display_library: rfb, options=\"timeout=0\"\n"));
    }

    #[test]
    fn the_normal_end_is_no_panic_but_a_triple_fault_is() {
        let log = "00000000000i[CPU0  ] x\n00123456789p[UNMAP ] >>PANIC<< Shutdown port: shutdown requested\n\
                   00123456790p[CPU0  ] >>PANIC<< exception(): 3rd (13) exception with no resolution\n";
        assert_eq!(panics(log), [">>PANIC<< exception(): 3rd (13) exception with no resolution"]);
    }

    #[test]
    fn each_refusal_is_told_once_in_bochs_own_words() {
        let log = "00067235244e[CPU0  ] VMENTER FAIL: RFLAGS reserved bits are set\n\
                   00067235245i[CPU0  ] VMX is a word\n00067235246e[APIC0 ] no VM\n\
                   00067235247e[CPU0  ] VMENTER FAIL: RFLAGS reserved bits are set\n\
                   00067235248e[CPU0  ] VMEXIT: EPT violation for guest paddr 0x1000 laddr 0x1000\n\
                   00067234752e[CPU0  ] VMWRITE: not supported field 0x00007ffe\n";
        let rflags = "VMENTER FAIL: RFLAGS reserved bits are set (2 times)";
        assert_eq!(refused(log), [rflags, "VMWRITE: not supported field 0x00007ffe"]);
    }
}
