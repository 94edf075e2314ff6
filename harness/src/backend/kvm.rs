//! KVM as L0, by QEMU.

use super::noise::{self, numbers};
use super::{Backend, DEBUG_PORT, Machine, Medium, Protocol, SERIAL, Spec, Unit};
use anyhow::Result;
use nvmx_setup::proc::Child;
use nvmx_setup::{program, tcg};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What QEMU itself says, in the boot's folder.
const ERRORS: &str = "qemu.err";

/// QEMU with KVM.
#[derive(Clone, Debug)]
pub struct Kvm {
    /// qemu-system-x86_64
    pub qemu: PathBuf,
    /// "7.2.1"
    pub version: String,
    /// The host's CPU
    pub cpu: String,
    /// What runs the machine's CPUs
    pub accelerator: Accelerator,
}

/// What runs the CPUs of a machine of QEMU's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accelerator {
    /// KVM of the host, on the host's CPU
    Kvm,
    /// QEMU itself, without VMX: for what comes before VMX is needed
    Tcg,
}

impl Accelerator {
    fn arguments(self) -> [&'static str; 4] {
        match self {
            Accelerator::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Accelerator::Tcg => ["-accel", "tcg", "-cpu", "max"],
        }
    }
}

/// Where a machine's text goes: names of files in the boot's folder.
#[derive(Clone, Copy, Debug)]
pub struct Text {
    /// COM1
    pub serial: &'static str,
    /// The port E9, if the machine has it
    pub debug_port: Option<&'static str>,
}

impl Kvm {
    /// Asks QEMU for its version.
    ///
    /// # Errors
    /// If it does not start.
    pub fn new(qemu: PathBuf, cpu: String) -> Result<Self> {
        Ok(Kvm { version: tcg::version(&qemu)?, qemu, cpu, accelerator: Accelerator::Kvm })
    }

    /// Starts a machine on the CPUs of the host that all of its boots get.
    ///
    /// # Errors
    /// If a file cannot be written or QEMU does not start.
    pub fn launch(&self, spec: &Spec, text: Text, folder: &Path) -> Result<Child> {
        let serial = File::create(folder.join(text.serial))?;
        let errors = File::create(folder.join(ERRORS))?;
        let mut command = pinned(&self.qemu, spec.machine.cpus);
        Child::spawn(command.args(arguments(self.accelerator, spec, text, folder)), serial, errors)
    }

    /// What QEMU says of a boot's end.
    pub fn errors(folder: &Path) -> Vec<String> {
        let text = std::fs::read(folder.join(ERRORS)).unwrap_or_default();
        String::from_utf8_lossy(&text).lines().map(|l| format!("QEMU: {l}")).collect()
    }
}

impl Backend for Kvm {
    fn name(&self) -> String {
        format!("KVM with QEMU {}", self.version)
    }

    fn cpu(&self, _machine: &Machine) -> String {
        self.cpu.clone()
    }

    fn unit(&self) -> Unit {
        Unit::Cycles
    }

    fn below(&self) -> u8 {
        1
    }

    fn noise(&self, machine: &Machine) -> Vec<String> {
        noise::warnings(&chosen(machine.cpus).unwrap_or_default())
    }

    fn start(&self, spec: &Spec, folder: &Path) -> Result<Child> {
        self.launch(spec, Text { serial: SERIAL, debug_port: spec.debug_port.then_some(DEBUG_PORT) }, folder)
    }

    fn stop(&self, child: &mut Child, _folder: &Path) -> Vec<String> {
        child.end();
        Vec::new()
    }

    fn last_words(&self, folder: &Path) -> Vec<String> {
        Self::errors(folder)
    }
}

/// QEMU on CPUs of the host that it stays on: as many as the machine has, and one for QEMU itself, those with the highest numbers
/// that this process may use. Where there are not so many, or no `taskset`, it runs where it likes.
fn pinned(qemu: &Path, cpus: u32) -> Command {
    match program("taskset").zip(chosen(cpus)) {
        Some((taskset, chosen)) => {
            let chosen: Vec<String> = chosen.iter().map(u32::to_string).collect();
            let mut command = Command::new(taskset);
            command.args(["-c", &chosen.join(",")]).arg(qemu);
            command
        }
        _ => Command::new(qemu),
    }
}

/// The CPUs of the host that a machine with so many stays on, if there are enough.
fn chosen(cpus: u32) -> Option<Vec<u32>> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut allowed = numbers(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?);
    Some(allowed.split_off(allowed.len().checked_sub(cpus as usize + 1)?))
}

fn arguments(accelerator: Accelerator, spec: &Spec, text: Text, folder: &Path) -> Vec<String> {
    let mut list: Vec<String> = ["-M", "pc"].into_iter().chain(accelerator.arguments()).map(String::from).collect();
    list.extend(
        [
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-vga",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=4",
        ]
        .map(String::from),
    );
    let mut add = |key: &str, value: String| list.extend([key.to_string(), value]);
    add("-m", spec.machine.memory.to_string());
    add("-smp", spec.machine.cpus.to_string());
    if let Some(file) = text.debug_port {
        let path = folder.join(file).display().to_string().replace(',', ",,");
        add("-chardev", format!("file,id=debug,path={path}"));
        add("-device", "isa-debugcon,iobase=0xe9,chardev=debug".into());
    }
    if let Some(drive) = &spec.drive {
        let media = if drive.medium == Medium::Cd { "cdrom" } else { "disk" };
        let path = drive.path.display().to_string().replace(',', ",,");
        add("-drive", format!("file={path},format=raw,if=ide,media={media},snapshot=on"));
    }
    if let Some(port) = spec.gdb {
        add("-gdb", format!("tcp:127.0.0.1:{port}"));
        list.push("-S".into());
    }
    if spec.protocol != Protocol::Firmware {
        list.extend(kernel(spec));
    }
    list
}

/// The arguments by which QEMU itself loads the image and its modules.
pub(super) fn kernel(spec: &Spec) -> Vec<String> {
    let mut list = Vec::new();
    let mut add = |key: &str, value: String| list.extend([key.to_string(), value]);
    add("-kernel", spec.kernel.path.display().to_string());
    if !spec.kernel.args.is_empty() {
        add("-append", spec.kernel.args.clone());
    }
    if !spec.modules.is_empty() {
        // QEMU splits modules at a comma, a doubled one stands for itself. To a Linux it gives one file, whose name it takes as it is.
        let whole = |m: &super::Payload| format!("{} {}", m.path.display(), m.args).trim_end().to_string();
        let one = |m| if spec.protocol == Protocol::Linux { whole(m) } else { whole(m).replace(',', ",,") };
        add("-initrd", spec.modules.iter().map(one).collect::<Vec<_>>().join(","));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;
    use super::super::{Drive, Payload};
    use super::*;

    const TEXT: Text = Text { serial: SERIAL, debug_port: None };

    fn line(spec: &Spec, text: Text, folder: &str) -> String {
        arguments(Accelerator::Kvm, spec, text, Path::new(folder)).join(" ")
    }

    #[test]
    fn modules_and_command_lines_reach_qemu() {
        let spec = Spec {
            kernel: Payload::new("/k", "log=warn"),
            modules: vec![Payload::new("/m", "a=1,b=2"), Payload::new("/n", "")],
            machine: Machine { memory: 256, cpus: 4, model: String::new() },
            ..spec()
        };
        let of_kvm = line(&spec, TEXT, "/f");
        assert!(of_kvm.contains("-m 256 -smp 4 -kernel /k -append log=warn -initrd /m a=1,,b=2,/n"), "{of_kvm}");
        assert!(of_kvm.contains("-accel kvm -cpu host") && !of_kvm.contains("debugcon"), "{of_kvm}");
        let drive = Some(Drive { path: "/d,e".into(), medium: Medium::Disk });
        let debugged = line(&Spec { drive: drive.clone(), gdb: Some(1234), ..spec.clone() }, TEXT, "/f");
        let disk = "-drive file=/d,,e,format=raw,if=ide,media=disk,snapshot=on";
        assert!(debugged.contains(&format!("{disk} -gdb tcp:127.0.0.1:1234 -S -kernel /k")), "{debugged}");
        let alone = Spec { drive, protocol: Protocol::Firmware, ..spec.clone() };
        assert!(line(&alone, TEXT, "/f").ends_with(disk));
        // A Linux speaks there.
        let spoken = line(&spec, Text { debug_port: Some(DEBUG_PORT), ..TEXT }, "/a,b");
        let port = "-chardev file,id=debug,path=/a,,b/debug.log -device isa-debugcon,iobase=0xe9,chardev=debug";
        assert!(spoken.contains(port), "{spoken}");
    }

    #[test]
    fn the_initial_file_system_of_a_linux_is_one_file_and_no_list() {
        let spec = Spec { modules: vec![Payload::new("/a,b", "")], protocol: Protocol::Linux, ..spec() };
        assert!(line(&spec, TEXT, "/f").ends_with("-initrd /a,b"));
    }
}
