//! A machine that QEMU emulates without VMX: for what comes before VMX is needed. It has what Bochs has not: boards, UEFI, many
//! processors, much memory, no serial port.

use super::laid::{self, Vmm};
use super::{Backend, Machine, SERIAL, Spec, Unit, iso};
use anyhow::Result;
use nvmx_setup::proc::Child;
use nvmx_setup::tcg::Tools;
use std::fs::File;
use std::path::Path;
use std::process::Command;

/// The board.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Board {
    /// A PC of 1996
    Pc,
    /// A PC of 2009
    Q35,
    /// Next to nothing: no PCI, no BIOS services
    Microvm,
    /// ... and no ACPI tables
    MicrovmWithoutAcpi,
}

/// What loads nvmx.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loader {
    /// QEMU itself (`-kernel`): multiboot where the file has its header, else PVH
    Qemu,
    /// GRUB from a CD, by the BIOS
    Bios,
    /// GRUB from a CD, by UEFI
    Uefi,
    /// Nothing: memory is as this VMM leaves it
    Laid(Vmm),
}

/// Where the machine has a serial port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Port {
    /// At 3F8H
    Com1,
    /// At 2F8H, and none at 3F8H
    Com2,
    /// Nowhere
    None,
}

/// One kind of machine.
#[derive(Clone, Debug)]
pub struct Tcg {
    /// QEMU and its firmware
    pub tools: Tools,
    /// The board
    pub board: Board,
    /// The loader
    pub loader: Loader,
    /// The serial port
    pub port: Port,
}

impl Backend for Tcg {
    fn name(&self) -> String {
        format!("QEMU {}", self.tools.version)
    }

    fn cpu(&self, _machine: &Machine) -> String {
        "max".into()
    }

    fn unit(&self) -> Unit {
        Unit::Cycles
    }

    fn start(&self, spec: &Spec, folder: &Path) -> Result<Child> {
        let from_disk = |platform| -> Result<Vec<String>> {
            Ok(vec!["-cdrom".into(), iso::make(spec, folder, platform)?.display().to_string()])
        };
        let load = match self.loader {
            Loader::Qemu => super::kvm::kernel(spec),
            Loader::Bios => from_disk(iso::Platform::Bios)?,
            Loader::Uefi => from_disk(iso::Platform::Uefi)?,
            Loader::Laid(vmm) => laid::lay(vmm, spec)?.arguments(folder)?,
        };
        let serial = File::create(folder.join(SERIAL))?;
        let errors = File::create(folder.join("qemu.err"))?;
        let mut command = Command::new(&self.tools.qemu);
        Child::spawn(command.args(self.arguments(spec, &load)), serial, errors)
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

impl Tcg {
    fn arguments(&self, spec: &Spec, load: &[String]) -> Vec<String> {
        let mut list = Vec::new();
        let mut add = |words: &[&str]| list.extend(words.iter().map(|word| word.to_string()));
        let board = match self.board {
            Board::Pc => "pc",
            Board::Q35 => "q35",
            Board::Microvm => "microvm,rtc=on",
            Board::MicrovmWithoutAcpi => "microvm,rtc=on,acpi=off",
        };
        // One thread for all processors: those that wait give their turn away.
        add(&["-M", board, "-accel", "tcg,thread=single", "-cpu", "max"]);
        add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        add(&["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        add(&["-m", &spec.machine.memory.to_string(), "-smp", &spec.machine.cpus.to_string()]);
        match self.port {
            Port::Com1 => add(&["-serial", "stdio"]),
            Port::Com2 => add(&["-serial", "none", "-serial", "stdio"]),
            Port::None => {}
        }
        if self.loader == Loader::Uefi {
            let file = self.tools.uefi.display();
            add(&["-drive", &format!("if=pflash,format=raw,readonly=on,file={file}")]);
        }
        list.extend_from_slice(load);
        list
    }
}

#[cfg(test)]
mod tests {
    use super::super::Payload;
    use super::super::tests::spec;
    use super::*;

    #[test]
    fn board_firmware_and_port_reach_qemu() {
        let tools = Tools { qemu: "/q".into(), version: "7".into(), uefi: "/uefi".into() };
        let spec = Spec {
            kernel: Payload::new("/k", "stop=cpus"),
            modules: vec![Payload::new("/m", "")],
            machine: Machine { memory: 8192, cpus: 160, model: String::new() },
            ..spec()
        };
        let by_qemu = Tcg { tools, board: Board::Microvm, loader: Loader::Qemu, port: Port::None };
        let line = by_qemu.arguments(&spec, &super::super::kvm::kernel(&spec)).join(" ");
        assert!(line.starts_with("-M microvm") && line.ends_with("-kernel /k -append stop=cpus -initrd /m"), "{line}");
        assert!(line.contains(" -m 8192 -smp 160 ") && !line.contains("-serial"), "{line}");
        let by_uefi = Tcg { board: Board::Q35, loader: Loader::Uefi, port: Port::Com2, ..by_qemu };
        let line = by_uefi.arguments(&spec, &["-cdrom".into(), "/disk".into()]).join(" ");
        assert!(line.contains("-serial none -serial stdio") && line.contains("file=/uefi -cdrom /disk"), "{line}");
        assert!(!line.contains("-kernel"), "{line}");
    }
}
