//! A real KVM on the emulated machine: Bochs boots a Linux whose only program is the VMM of this workspace, and the VMM boots
//! the image. So KVM's own nested code is below nvmx, or does nvmx's job for comparison.

use super::bochs::{self, Serial};
use super::kvm_linux::{CONSOLE, KvmLinux, console};
use super::{Backend, Machine, SERIAL, Spec, Unit, iso};
use anyhow::Result;
use nvmx_setup::bochs::Bochs;
use nvmx_setup::proc::Child;
use std::path::Path;

/// Bochs, Linux, the VMM.
#[derive(Clone, Debug)]
pub struct KvmInBochs {
    /// The machine
    pub bochs: Bochs,
    /// What runs on it
    pub linux: KvmLinux,
}

impl Backend for KvmInBochs {
    fn name(&self) -> String {
        format!("Bochs {} with {}", self.bochs.version, self.linux.name())
    }

    fn cpu(&self, machine: &Machine) -> String {
        self.bochs.cpu(machine)
    }

    fn has_drives(&self) -> bool {
        false
    }

    fn below(&self) -> u8 {
        u8::try_from(self.linux.depth.max(1)).unwrap_or(u8::MAX)
    }

    fn records(&self) -> bool {
        true
    }

    fn unit(&self) -> Unit {
        Unit::Instructions
    }

    fn start(&self, spec: &Spec, folder: &Path) -> Result<Child> {
        let linux = self.linux.below(spec, folder)?;
        iso::make(&linux, folder, iso::Platform::Bios)?;
        // The VMM writes to the debug port, which Bochs shows on its standard output.
        let serial = Serial { file: CONSOLE, debug_port: true };
        bochs::start(&self.bochs, &linux.machine, serial, SERIAL, &bochs::Wiring::of(spec), folder)
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
    /// With costs like those that people have, whose REP MOVSB copies 32 bytes or more in a cycle: memory is copied by words.
    #[must_use]
    pub fn usual(self) -> Self {
        KvmInBochs { linux: KvmLinux { by_words: true, ..self.linux }, ..self }
    }
}
