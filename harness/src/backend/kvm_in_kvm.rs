//! KVM in nvmx's place where KVM is L0: QEMU boots a Linux with KVM on the machine that nvmx had, pinned to the same CPUs of the host,
//! and the VMM in it boots the image.

use super::kvm::{Kvm, Text};
use super::kvm_linux::{CONSOLE, KvmLinux, console};
use super::{Backend, Machine, SERIAL, Spec, Unit};
use anyhow::Result;
use nvmx_setup::proc::Child;
use std::path::Path;

/// QEMU with KVM, Linux, the VMM.
#[derive(Clone, Debug)]
pub struct KvmInKvm {
    /// The machine
    pub kvm: Kvm,
    /// What runs on it
    pub linux: KvmLinux,
}

impl Backend for KvmInKvm {
    fn name(&self) -> String {
        format!("{} and {}", self.kvm.name(), self.linux.name())
    }

    fn cpu(&self, machine: &Machine) -> String {
        self.kvm.cpu(machine)
    }

    fn has_drives(&self) -> bool {
        false
    }

    fn below(&self) -> u8 {
        self.kvm.below().saturating_add(u8::try_from(self.linux.depth.max(1)).unwrap_or(u8::MAX))
    }

    fn unit(&self) -> Unit {
        self.kvm.unit()
    }

    fn start(&self, spec: &Spec, folder: &Path) -> Result<Child> {
        // The VMM writes to the debug port, which costs less than a serial line.
        let text = Text { serial: CONSOLE, debug_port: Some(SERIAL) };
        self.kvm.launch(&self.linux.below(spec, folder)?, text, folder)
    }

    fn stop(&self, child: &mut Child, folder: &Path) -> Vec<String> {
        child.end();
        console(folder)
    }

    fn last_words(&self, folder: &Path) -> Vec<String> {
        // Where the VMM has said nothing, Linux says why.
        let silent = std::fs::metadata(folder.join(SERIAL)).map_or(0, |file| file.len()) == 0;
        let linux = if silent { console(folder) } else { Vec::new() };
        linux.into_iter().chain(Kvm::errors(folder)).collect()
    }
}
