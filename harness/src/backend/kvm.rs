//! KVM as L0, by QEMU.

use super::noise::{self, numbers};
use super::{Backend, DEBUG_PORT, Machine, Medium, Protocol, SERIAL, Spec, Unit};
use anyhow::Result;
use nvmx_setup::proc::Child;
use nvmx_setup::{program, tcg};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// QEMU with KVM.
pub struct Kvm {
    /// qemu-system-x86_64
    pub qemu: PathBuf,
    /// "7.2.1"
    pub version: String,
    /// The host's CPU
    pub cpu: String,
}

impl Kvm {
    /// Asks QEMU for its version.
    ///
    /// # Errors
    /// If it does not start.
    pub fn new(qemu: PathBuf, cpu: String) -> Result<Self> {
        Ok(Kvm { version: tcg::version(&qemu)?, qemu, cpu })
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
        let serial = File::create(folder.join(SERIAL))?;
        let errors = File::create(folder.join("qemu.err"))?;
        let mut command = pinned(&self.qemu, spec.machine.cpus);
        Child::spawn(command.args(arguments(spec, folder)), serial, errors)
    }

    fn stop(&self, child: &mut Child, _folder: &Path) -> Vec<String> {
        child.end();
        Vec::new()
    }

    fn last_words(&self, folder: &Path) -> Vec<String> {
        let text = std::fs::read(folder.join("qemu.err")).unwrap_or_default();
        String::from_utf8_lossy(&text).lines().map(|l| format!("QEMU: {l}")).collect()
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

fn arguments(spec: &Spec, folder: &Path) -> Vec<String> {
    let mut list: Vec<String> = [
        "-M",
        "pc",
        "-accel",
        "kvm",
        "-cpu",
        "host",
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
    .map(String::from)
    .to_vec();
    let mut add = |key: &str, value: String| list.extend([key.to_string(), value]);
    add("-m", spec.machine.memory.to_string());
    add("-smp", spec.machine.cpus.to_string());
    if spec.debug_port {
        add(
            "-chardev",
            format!("file,id=debug,path={}", folder.join(DEBUG_PORT).display().to_string().replace(',', ",,")),
        );
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
        // QEMU splits modules at a comma, a doubled one stands for itself.
        let one = |m: &super::Payload| format!("{} {}", m.path.display(), m.args).trim_end().replace(',', ",,");
        add("-initrd", spec.modules.iter().map(one).collect::<Vec<_>>().join(","));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::super::{Drive, Line, Payload};
    use super::*;
    use std::time::Duration;

    #[test]
    fn modules_and_command_lines_reach_qemu() {
        let spec = Spec {
            name: "x".into(),
            kernel: Payload::new("/k", "log=warn"),
            modules: vec![Payload::new("/m", "a=1,b=2"), Payload::new("/n", "")],
            protocol: Protocol::Multiboot2,
            debug_port: false,
            line: Line::default(),
            machine: Machine { memory: 256, cpus: 4, model: String::new() },
            timeout: Duration::from_secs(1),
            stop: Default::default(),
            record: None,
            drive: None,
            gdb: None,
        };
        let line = arguments(&spec, Path::new("/f")).join(" ");
        assert!(line.contains("-m 256 -smp 4 -kernel /k -append log=warn -initrd /m a=1,,b=2,/n"), "{line}");
        assert!(line.contains("-accel kvm") && !line.contains("debugcon"), "{line}");
        let drive = Some(Drive { path: "/d,e".into(), medium: Medium::Disk });
        let line =
            arguments(&Spec { drive: drive.clone(), gdb: Some(1234), ..spec.clone() }, Path::new("/f")).join(" ");
        let disk = "-drive file=/d,,e,format=raw,if=ide,media=disk,snapshot=on";
        assert!(line.contains(&format!("{disk} -gdb tcp:127.0.0.1:1234 -S -kernel /k")), "{line}");
        let alone = Spec { drive, protocol: Protocol::Firmware, ..spec.clone() };
        assert!(arguments(&alone, Path::new("/f")).join(" ").ends_with(disk));
        // A Linux speaks there.
        let line = arguments(&Spec { debug_port: true, ..spec }, Path::new("/a,b")).join(" ");
        assert!(
            line.contains("-chardev file,id=debug,path=/a,,b/debug.log -device isa-debugcon,iobase=0xe9,chardev=debug"),
            "{line}"
        );
    }
}
