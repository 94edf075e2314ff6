//! What can be L0: an emulated machine (Bochs) or KVM. Both boot the same images and write the same serial log.

pub mod bochs;
pub mod drive;
pub mod host;
pub mod iso;
pub mod kvm;
pub mod kvm_in_bochs;
pub mod kvm_in_kvm;
pub mod kvm_linux;
pub mod laid;
pub mod linux;
pub mod memory;
mod noise;
mod recording;
pub mod tcg;
mod work;
pub mod xen;

pub use recording::Recording;
pub use work::Work;

use anyhow::Result;
use nvmx_setup::proc::Child;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A file to boot or to hand on, with its command line.
#[derive(Clone, Debug)]
pub struct Payload {
    /// The file
    pub path: PathBuf,
    /// Its command line
    pub args: String,
}

impl Payload {
    /// A file and its command line.
    pub fn new(path: impl Into<PathBuf>, args: impl Into<String>) -> Self {
        Payload { path: path.into(), args: args.into() }
    }
}

/// How the boot loader enters the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// Multiboot, the first version
    Multiboot1,
    /// Multiboot2
    Multiboot2,
    /// The Linux boot protocol; the module is the initial file system
    Linux,
    /// Firmware's: the drive's boot sector
    Firmware,
    /// PVH, which GRUB does not have: QEMU loads the image itself
    Pvh,
}

/// The machine that boots.
#[derive(Clone, Debug)]
pub struct Machine {
    /// MiB
    pub memory: u32,
    /// Processors
    pub cpus: u32,
    /// A CPU model of Bochs; KVM shows the CPU it runs on
    pub model: String,
}

/// One boot.
#[derive(Clone, Debug)]
pub struct Spec {
    /// For messages and folder names
    pub name: String,
    /// What is booted
    pub kernel: Payload,
    /// What it is given
    pub modules: Vec<Payload>,
    /// By which protocol (KVM decides itself)
    pub protocol: Protocol,
    /// On which machine
    pub machine: Machine,
    /// Programs of a Linux in it speak at the debug port (0xE9), which costs the machine no time
    pub debug_port: bool,
    /// How fast its serial line is
    pub line: Line,
    /// For how long at most
    pub timeout: Duration,
    /// What else ends it
    pub stop: StopAt,
    /// Where every exit is recorded, if it is
    pub record: Option<Recording>,
    /// A drive that is L2's
    pub drive: Option<Drive>,
    /// The port at which a debugger is served, before the machine runs
    pub gdb: Option<u16>,
}

/// How long the emulated machine's serial line takes for a byte. A guest waits for it, and at 115200 baud that is most of what
/// it does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Line {
    /// A microsecond
    #[default]
    Fast,
    /// What the guest has set
    AsProgrammed,
}

/// A drive of the machine, with an image whose file stays as it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Drive {
    /// The image
    pub path: PathBuf,
    /// What it is an image of
    pub medium: Medium,
}

/// What a drive reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Medium {
    /// A disk
    Disk,
    /// A CD
    Cd,
}

impl Spec {
    /// Where the emulator records exits, if it does.
    pub fn exit_log(&self) -> Option<PathBuf> {
        self.record.as_ref().and_then(|record| record.log(&self.name))
    }

    /// The image that is L2: the first module that is another file than nvmx, else the kernel.
    pub fn l2(&self) -> Option<PathBuf> {
        let all = std::iter::once(&self.kernel).chain(&self.modules);
        all.map(|payload| &payload.path).find(|path| **path != self.kernel.path).or(Some(&self.kernel.path)).cloned()
    }
}

/// What ends a boot before its limit, besides the machine itself and the guest's last word.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct StopAt {
    /// A line with this in it
    pub text: Option<String>,
    /// The machine's only processor waits for what cannot come: halted with interrupts off
    pub halt: bool,
}

/// The serial line of a boot, in the boot's folder.
pub const SERIAL: &str = "serial.log";

/// What a machine with a debug port shows there, in the boot's folder.
pub const DEBUG_PORT: &str = "debug.log";

/// One kind of L0.
pub trait Backend: Sync {
    /// "Bochs 3.0"
    fn name(&self) -> String;

    /// The CPU that the machine shows.
    fn cpu(&self, machine: &Machine) -> String;

    /// How many KVM are below the image that is booted.
    fn below(&self) -> u8 {
        0
    }

    /// How many CD drives come before L2's where nvmx is booted.
    fn cds(&self) -> u8 {
        0
    }

    /// Whether L2 can have a drive.
    fn has_drives(&self) -> bool {
        true
    }

    /// Whether L0 itself can record every exit.
    fn records(&self) -> bool {
        false
    }

    /// What one tick of the TSC is.
    fn unit(&self) -> Unit;

    /// What about the host makes time an uncertain measure of work, a line each.
    fn noise(&self, _machine: &Machine) -> Vec<String> {
        Vec::new()
    }

    /// Starts the machine; its serial line goes to [`SERIAL`] in `folder`.
    ///
    /// # Errors
    /// If a file cannot be written or a program does not start.
    fn start(&self, spec: &Spec, folder: &Path) -> Result<Child>;

    /// Ends a machine that goes on for too long and tells where it was.
    fn stop(&self, child: &mut Child, folder: &Path) -> Vec<String>;

    /// What the machine itself says about its end.
    fn last_words(&self, folder: &Path) -> Vec<String>;

    /// What it says of VM entries and VMX instructions that it refused: its own words, each once.
    fn refused(&self, _: &Path) -> Vec<String> {
        Vec::new()
    }
}

/// What the TSC counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// Exact and repeatable
    Instructions,
    /// Time, more or less
    Cycles,
}

impl Unit {
    /// For headings.
    pub fn name(self) -> &'static str {
        match self {
            Unit::Instructions => "instructions",
            Unit::Cycles => "cycles",
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A boot of nothing on nothing.
    pub fn spec() -> Spec {
        Spec {
            name: "x".into(),
            kernel: Payload::new("/k", ""),
            modules: Vec::new(),
            protocol: Protocol::Multiboot2,
            machine: Machine { memory: 256, cpus: 1, model: String::new() },
            debug_port: false,
            line: Line::default(),
            timeout: Duration::from_secs(1),
            stop: StopAt::default(),
            record: None,
            drive: None,
            gdb: None,
        }
    }
}
