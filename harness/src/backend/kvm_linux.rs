//! A Linux with KVM whose only program is the VMM of this workspace, which boots an image under its KVM: the same kernel and initial
//! file system wherever its machine is, emulated or in QEMU.

use super::{Machine, Payload, Protocol, Spec};
use anyhow::Result;
use nvmx_setup::initramfs::Archive;
use nvmx_setup::linux::{Linux, MODULES};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Memory of Linux's machine beside that of KVM's guest, in MiB.
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
/// Linux's own console, in the boot's folder.
pub const CONSOLE: &str = "console.log";

/// The kernel, its program, and how both run.
#[derive(Clone, Debug)]
pub struct KvmLinux {
    /// The kernel
    pub linux: Linux,
    /// The program
    pub vmm: PathBuf,
    /// Parameters of the module kvm-intel: [`KVM_INTEL`]
    pub parameters: String,
    /// How many such Linux there are, one in the other
    pub depth: u32,
    /// The kernel copies memory by words, not by bytes
    pub by_words: bool,
}

impl KvmLinux {
    /// One of it, as a processor of today runs it.
    pub fn new(linux: Linux, vmm: PathBuf) -> Self {
        KvmLinux { linux, vmm, parameters: KVM_INTEL.into(), depth: 1, by_words: false }
    }

    /// "KVM in KVM of Linux 6.12"
    pub fn name(&self) -> String {
        let kvm = vec!["KVM"; self.depth.max(1) as usize].join(" in ");
        format!("{kvm} of Linux {}", self.linux.release)
    }

    /// The boot of the machine under whose KVM `spec` boots. Its initial file system is written into the folder.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn below(&self, spec: &Spec, folder: &Path) -> Result<Spec> {
        let mut linux = spec.clone();
        for level in 0..self.depth.max(1) {
            let file = folder.join(format!("linux{level}.initramfs"));
            std::fs::write(&file, self.initramfs(&linux)?)?;
            linux = Spec {
                kernel: Payload::new(self.linux.file("vmlinuz"), self.command_line()),
                modules: vec![Payload::new(file, "")],
                machine: Machine { memory: linux.machine.memory + LINUX_MEMORY, ..linux.machine },
                protocol: Protocol::Linux,
                ..linux
            };
        }
        Ok(linux)
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

/// The last lines of Linux's own console, and behind them why it has stopped, if it says so.
pub fn console(folder: &Path) -> Vec<String> {
    let text = std::fs::read(folder.join(CONSOLE)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let from = lines.len().saturating_sub(8);
    let panic = lines.iter().rfind(|line| line.contains("Kernel panic"));
    lines.get(from..).unwrap_or_default().iter().chain(panic).map(|l| format!("Linux: {l}")).collect()
}

#[cfg(test)]
pub mod tests {
    use super::super::tests::spec;
    use super::*;

    /// Files that stand for those of a Linux.
    pub fn of_nothing(folder: &Path) -> KvmLinux {
        for name in ["vmlinuz", "vmm"].map(String::from).into_iter().chain(MODULES.map(|m| format!("{m}.ko"))) {
            std::fs::write(folder.join(name), "x").unwrap();
        }
        let linux = Linux { release: "6.12-x".into(), folder: folder.into() };
        KvmLinux::new(linux, folder.join("vmm"))
    }

    #[test]
    fn the_plan_names_modules_memory_and_payloads_one_a_line() {
        let spec = Spec {
            kernel: Payload::new("/k", "log=warn\nmodule /evil"),
            modules: vec![Payload::new("/m", "")],
            machine: Machine { memory: 256, cpus: 2, model: String::new() },
            ..spec()
        };
        let text = plan(&spec, KVM_INTEL);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "module /irqbypass.ko");
        assert_eq!(lines[2], format!("module /kvm-intel.ko {KVM_INTEL}"));
        assert_eq!(lines[3..], ["memory 256", "cpus 2", "kernel /kernel log=warn module /evil", "payload /module0"]);
    }

    #[test]
    fn why_the_kernel_has_stopped_is_the_last_line_of_its_console() {
        let folder = tempfile::tempdir().unwrap();
        let lines = ["a", "[1.0] Kernel panic - not syncing: x"].into_iter().chain(["in between"; 9]).chain(["end"]);
        std::fs::write(folder.path().join(CONSOLE), lines.collect::<Vec<_>>().join("\r\n")).unwrap();
        let said = console(folder.path());
        assert_eq!((said.len(), said[7].as_str()), (9, "Linux: end"));
        assert_eq!(said[8], "Linux: [1.0] Kernel panic - not syncing: x");
        std::fs::write(folder.path().join(CONSOLE), "a\nb\n").unwrap();
        assert_eq!(console(folder.path()), ["Linux: a", "Linux: b"]);
    }

    #[test]
    fn each_linux_is_the_guest_of_the_one_below_it_and_has_more_memory() {
        let folder = tempfile::tempdir().unwrap();
        let one = of_nothing(folder.path());
        std::fs::write(folder.path().join("guest"), "the guest").unwrap();
        let machine = Machine { memory: 256, cpus: 2, model: "host".into() };
        let spec = Spec { kernel: Payload::new(folder.path().join("guest"), "x=1"), machine, ..spec() };
        let below = one.below(&spec, folder.path()).unwrap();
        assert_eq!((below.machine.memory, below.machine.cpus, below.protocol), (768, 2, Protocol::Linux));
        assert_eq!(below.kernel.path, folder.path().join("vmlinuz"));
        assert!(below.kernel.args.starts_with("console=ttyS0") && !below.kernel.args.contains("clearcpuid"));
        let [initramfs] = below.modules.as_slice() else { panic!("{:?}", below.modules) };
        let bytes = String::from_utf8_lossy(&std::fs::read(&initramfs.path).unwrap()).into_owned();
        for text in ["kvm-intel.ko nested=1 ept=1", "kernel /kernel x=1", "the guest", "memory 256", "cpus 2"] {
            assert!(bytes.contains(text), "{text}");
        }
        let two = KvmLinux { depth: 2, by_words: true, ..one };
        let below = two.below(&spec, folder.path()).unwrap();
        assert_eq!(below.machine.memory, 1280);
        let bytes = std::fs::read(&below.modules[0].path).unwrap();
        assert!(
            String::from_utf8_lossy(&bytes).contains("clearcpuid=erms,fsrm") && two.name().starts_with("KVM in KVM")
        );
    }
}
