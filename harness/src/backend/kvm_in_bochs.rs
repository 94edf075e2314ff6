//! A real KVM on the emulated machine: Bochs boots a Linux whose only program is the VMM of this workspace, and the VMM boots
//! the image. So KVM's own nested code is below nvmx, or does nvmx's job for comparison.

use super::bochs::{self, Serial};
use super::{Backend, Machine, Payload, Protocol, SERIAL, Spec, Unit, iso};
use anyhow::Result;
use nvmx_setup::bochs::Bochs;
use nvmx_setup::initramfs::Archive;
use nvmx_setup::linux::{Linux, MODULES};
use nvmx_setup::proc::Child;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Memory of the emulated machine beside that of KVM's guest, in MiB.
const LINUX_MEMORY: u32 = 512;
/// Linux must not wait, ask or talk.
pub const COMMAND_LINE: &str = "console=ttyS0,115200 nokaslr mitigations=off tsc=reliable no_timer_check \
    random.trust_cpu=on cryptomgr.notests audit=0 apparmor=0 panic=-1 quiet";
/// As KVM is loaded on a processor of today, with APICv.
pub const KVM_INTEL: &str = "nested=1 ept=1";
/// Without these features the kernel copies by words. The processor of the tests has both, and with them the kernel copies by REP
/// MOVSB. The emulator counts each of its bytes as an instruction, where a processor copies 32 bytes or more in a cycle: most of the
/// instructions that KVM takes to switch its guest's VMCS would be such bytes.
const BY_WORDS: &str = " clearcpuid=erms,fsrm";
const CONSOLE: &str = "console.log";

/// Bochs, Linux, the VMM.
#[derive(Clone, Debug)]
pub struct KvmInBochs {
    /// The machine
    pub bochs: Bochs,
    /// The kernel
    pub linux: Linux,
    /// The program
    pub vmm: PathBuf,
    /// Parameters of the module kvm-intel: [`KVM_INTEL`]
    pub parameters: String,
    /// How many Linux with KVM there are, one in the other
    pub depth: u32,
    /// The kernel copies memory by words, not by bytes
    pub by_words: bool,
}

impl Backend for KvmInBochs {
    fn name(&self) -> String {
        let kvm = vec!["KVM"; self.depth.max(1) as usize].join(" in ");
        format!("Bochs {} with {kvm} of Linux {}", self.bochs.version, self.linux.release)
    }

    fn cpu(&self, machine: &Machine) -> String {
        self.bochs.cpu(machine)
    }

    fn has_drives(&self) -> bool {
        false
    }

    fn below(&self) -> u8 {
        u8::try_from(self.depth.max(1)).unwrap_or(u8::MAX)
    }

    fn records(&self) -> bool {
        true
    }

    fn unit(&self) -> Unit {
        Unit::Instructions
    }

    fn start(&self, spec: &Spec, folder: &Path) -> Result<Child> {
        let mut initramfs = self.initramfs(spec)?;
        let mut memory = spec.machine.memory + LINUX_MEMORY;
        for _ in 1..self.depth {
            // The whole Linux becomes the guest of another one.
            let inner = folder.join("inner.initramfs");
            std::fs::write(&inner, &initramfs)?;
            initramfs = self.initramfs(&Spec {
                kernel: Payload::new(self.linux.file("vmlinuz"), self.command_line()),
                modules: vec![Payload::new(inner, "")],
                machine: Machine { memory, ..spec.machine.clone() },
                ..spec.clone()
            })?;
            memory += LINUX_MEMORY;
        }
        let outer = folder.join("outer.initramfs");
        std::fs::write(&outer, &initramfs)?;
        let linux = Spec {
            kernel: Payload::new(self.linux.file("vmlinuz"), self.command_line()),
            modules: vec![Payload::new(outer, "")],
            protocol: Protocol::Linux,
            ..spec.clone()
        };
        iso::make(&linux, folder, iso::Platform::Bios)?;
        let machine = Machine { memory, ..spec.machine.clone() };
        // The VMM writes to the debug port, which Bochs shows on its standard output.
        let serial = Serial { file: CONSOLE, debug_port: true };
        bochs::start(&self.bochs, &machine, serial, SERIAL, &bochs::Wiring::of(spec), folder)
    }

    fn stop(&self, child: &mut Child, folder: &Path) -> Vec<String> {
        let mut lines = self.bochs.stop(child, folder);
        lines.extend(console(folder));
        lines
    }

    fn last_words(&self, folder: &Path) -> Vec<String> {
        let mut lines = self.bochs.last_words(folder);
        if !lines.is_empty() {
            lines.extend(console(folder));
        }
        lines
    }
}

impl KvmInBochs {
    /// As people run it: ERMS and FSRM stay, and the kernel copies memory by REP MOVSB.
    #[must_use]
    pub fn usual(self) -> Self {
        KvmInBochs { by_words: true, ..self }
    }

    fn command_line(&self) -> String {
        format!("{COMMAND_LINE}{}", if self.by_words { BY_WORDS } else { "" })
    }

    fn initramfs(&self, spec: &Spec) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        for folder in ["dev", "proc", "sys"] {
            archive.add_folder(folder)?;
        }
        archive.add_file("init", &self.vmm)?;
        for module in MODULES {
            archive.add_file(&format!("{module}.ko"), &self.linux.file(&format!("{module}.ko")))?;
        }
        archive.add_file("kernel", &spec.kernel.path)?;
        for (i, module) in spec.modules.iter().enumerate() {
            archive.add_file(&format!("module{i}"), &module.path)?;
        }
        archive.add("plan", plan(spec, &self.parameters).as_bytes())?;
        archive.finish()
    }
}

/// The VMM's orders.
fn plan(spec: &Spec, parameters: &str) -> String {
    let mut text = String::new();
    let mut order = |what: &str, args: &str| {
        // A line break would be another order.
        let line = format!("{what} {args}").replace(['\n', '\r'], " ");
        let _ = writeln!(text, "{}", line.trim_end());
    };
    for module in MODULES {
        order(&format!("module /{module}.ko"), if module == "kvm-intel" { parameters } else { "" });
    }
    order("memory", &spec.machine.memory.to_string());
    order("cpus", &spec.machine.cpus.to_string());
    order("kernel /kernel", &spec.kernel.args);
    for (i, module) in spec.modules.iter().enumerate() {
        order(&format!("payload /module{i}"), &module.args);
    }
    text
}

/// The last lines of Linux's own console.
fn console(folder: &Path) -> Vec<String> {
    let text = std::fs::read(folder.join(CONSOLE)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let from = lines.len().saturating_sub(8);
    lines.get(from..).unwrap_or_default().iter().map(|l| format!("Linux: {l}")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Line;
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_plan_names_modules_memory_and_payloads_one_a_line() {
        let spec = Spec {
            name: "x".into(),
            kernel: Payload::new("/k", "log=warn\nmodule /evil"),
            modules: vec![Payload::new("/m", "")],
            protocol: Protocol::Multiboot2,
            debug_port: false,
            line: Line::default(),
            machine: Machine { memory: 256, cpus: 2, model: String::new() },
            timeout: Duration::from_secs(1),
            stop: Default::default(),
            record: None,
            drive: None,
            gdb: None,
        };
        let text = plan(&spec, KVM_INTEL);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "module /irqbypass.ko");
        assert_eq!(lines[2], format!("module /kvm-intel.ko {KVM_INTEL}"));
        assert_eq!(lines[3..], ["memory 256", "cpus 2", "kernel /kernel log=warn module /evil", "payload /module0"]);
    }
}
