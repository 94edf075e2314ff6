//! Linux with KVM as the guest hypervisor: one kernel and one initial file system, which GRUB starts alone on the machine, and
//! nvmx as L2. Its guest is Linux again, in the VMM of this workspace or in QEMU.

use super::initramfs::Archive;
use super::kvm_in_bochs::COMMAND_LINE;
use super::{Payload, Protocol, Spec};
use crate::session::Session;
use crate::setup::linux::{Linux, MODULES};
use crate::setup::qemu::Qemu;
use anyhow::Result;
use std::fmt::Write;
use std::path::PathBuf;

/// Memory of the innermost Linux, and of all, in MiB.
const GUEST_MEMORY: u32 = 256;
const MEMORY: u32 = 1024;
/// Where things are in the initial file system of L2.
const KERNEL: &str = "vmlinuz";
const INNER: &str = "inner.initramfs";
const HYPERVISOR: &str = "hypervisor";

/// What the guest hypervisor is to do.
#[derive(Clone, Debug)]
pub struct Job {
    /// The guest runs in QEMU, not in our own VMM
    pub qemu: bool,
    /// How many guests, one after the other
    pub times: u32,
    /// Every second guest's VMM is killed after so many milliseconds
    pub kill: Option<u32>,
    /// KVM is unloaded and loaded again for each
    pub reload: bool,
    /// Parameters of the module kvm-intel
    pub parameters: String,
    /// The guest is no Linux but this guest hypervisor of `l2-guests/`, in our own VMM
    pub hypervisor: Option<Payload>,
}

impl Job {
    /// Reads the words of a command line: `vmm=qemu|own`, `times=N`, `kill=MILLISECONDS`, `reload=on`; the rest is for
    /// kvm-intel.
    ///
    /// # Errors
    /// The word that makes no sense.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut job =
            Job { qemu: true, times: 1, kill: None, reload: false, parameters: String::new(), hypervisor: None };
        let mut parameters = Vec::new();
        for word in text.split_whitespace() {
            let bad =
                || format!("`{word}` is no order for Linux as L2: vmm=qemu|own, times=N, kill=MILLISECONDS, reload=on");
            match word.split_once('=').ok_or_else(bad)? {
                ("vmm", "own") => job.qemu = false,
                ("vmm", "qemu") => job.qemu = true,
                ("times", n) => job.times = n.parse().ok().filter(|n| *n > 0).ok_or_else(bad)?,
                ("kill", n) => job.kill = Some(n.parse().ok().ok_or_else(bad)?),
                ("reload", "on") => job.reload = true,
                ("vmm" | "reload", _) => return Err(bad()),
                _ => parameters.push(word),
            }
        }
        job.parameters = parameters.join(" ");
        Ok(job)
    }
}

/// The files of which the boots are made.
#[derive(Clone, Debug)]
pub struct LinuxKvm {
    /// The kernel, the same in both levels
    pub linux: Linux,
    /// Init in both levels
    pub vmm: PathBuf,
    /// QEMU with what it needs, if the guest is to run in it
    pub qemu: Option<Qemu>,
}

impl LinuxKvm {
    /// The boot alone on the machine, which has so many CPUs, with Linux as its hypervisor; its guest has as many.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn bare(&self, session: &Session, name: &str, job: &Job, cpus: u32) -> Result<Spec> {
        let folder = session.paths.target.join("nvmx").join("linux");
        std::fs::create_dir_all(&folder)?;
        let initramfs = folder.join(format!("{name}.initramfs"));
        std::fs::write(&initramfs, self.initramfs(job, cpus)?)?;
        let kernel = Payload::new(self.linux.file("vmlinuz"), COMMAND_LINE);
        let mut spec = session.spec(format!("{name}-bare"), kernel, vec![Payload::new(initramfs, "")]);
        spec.machine.cpus = cpus;
        Ok(in_linux(Spec { protocol: Protocol::Linux, ..spec }))
    }

    /// The same under nvmx.
    pub fn nested(&self, session: &Session, name: &str, bare: &Spec, options: &str) -> Spec {
        let modules = std::iter::once(&bare.kernel).chain(&bare.modules).cloned().collect();
        let nvmx = Payload::new(&session.images.nvmx, options);
        let mut spec = session.spec(format!("{name}-nvmx"), nvmx, modules);
        spec.machine.cpus = bare.machine.cpus;
        in_linux(Spec { timeout: bare.timeout, ..spec })
    }

    fn initramfs(&self, job: &Job, cpus: u32) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        ["dev", "proc", "sys", "tmp"].iter().try_for_each(|folder| archive.add_folder(folder))?;
        archive.add_file("init", &self.vmm)?;
        for module in MODULES {
            archive.add_file(&format!("{module}.ko"), &self.linux.file(&format!("{module}.ko")))?;
        }
        if let Some(hypervisor) = &job.hypervisor {
            archive.add_file(HYPERVISOR, &hypervisor.path)?;
        } else {
            archive.add_file(KERNEL, &self.linux.file("vmlinuz"))?;
            archive.add(INNER, &self.inner()?)?;
        }
        if let Some(qemu) = self.qemu.as_ref().filter(|_| job.qemu) {
            qemu.add_to(&mut archive)?;
        }
        archive.add("plan", plan(job, cpus).as_bytes())?;
        archive.finish()
    }

    /// The innermost initial file system: the VMM as a program that makes some work.
    fn inner(&self) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        ["dev", "proc", "sys"].iter().try_for_each(|folder| archive.add_folder(folder))?;
        archive.add_file("init", &self.vmm)?;
        archive.add("plan", b"role workload\n")?;
        archive.finish()
    }
}

/// Two Linux need more memory than a small guest, and say what they say at the debug port.
fn in_linux(mut spec: Spec) -> Spec {
    spec.machine.memory = spec.machine.memory.max(MEMORY);
    spec.debug_port = true;
    spec
}

/// The orders of L2's init. A guest that speaks in records of its own ends the log itself.
fn plan(job: &Job, cpus: u32) -> String {
    let head = if job.hypervisor.is_some() { "role host\nnested on\n" } else { "role hypervisor\nnested off\n" };
    let mut text = String::from(head);
    for module in MODULES {
        let parameters = if module == "kvm-intel" { job.parameters.as_str() } else { "" };
        let _ = writeln!(text, "{}", format!("module /{module}.ko {parameters}").trim_end());
    }
    let _ = writeln!(text, "times {}", job.times);
    if let Some(after) = job.kill {
        let _ = writeln!(text, "kill {after}");
    }
    if job.reload {
        text.push_str("reload on\n");
    }
    if let Some(hypervisor) = &job.hypervisor {
        let _ = writeln!(text, "memory {GUEST_MEMORY}\nkernel /{HYPERVISOR} {}", hypervisor.args);
    } else if job.qemu {
        let line = Qemu::command_line(cpus, GUEST_MEMORY, KERNEL, INNER, COMMAND_LINE);
        let _ = writeln!(text, "program {line}");
    } else {
        let _ = writeln!(text, "memory {GUEST_MEMORY}\nkernel /{KERNEL} {COMMAND_LINE}\npayload /{INNER}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_told_from_parameters_of_the_module() {
        let job = Job::parse("vmm=qemu ept=0 times=3").unwrap();
        assert_eq!((job.qemu, job.times, job.reload), (true, 3, false));
        assert_eq!(job.parameters, "ept=0");
        let default = Job::parse("").unwrap();
        assert_eq!((default.qemu, default.times, default.parameters.as_str()), (true, 1, ""));
        assert!(Job::parse("times=0").is_err() && Job::parse("vmm=xen").is_err() && Job::parse("fast").is_err());
    }

    #[test]
    fn the_plan_has_a_line_for_each_order() {
        assert!(plan(&Job::parse("kill=400 times=2").unwrap(), 1).contains("\nkill 400\n"));
        let own = plan(&Job::parse("vmm=own reload=on times=2 ept=0").unwrap(), 1);
        let lines: Vec<&str> = own.lines().collect();
        assert_eq!(lines[..2], ["role hypervisor", "nested off"]);
        assert_eq!(
            lines[2..7],
            ["module /irqbypass.ko", "module /kvm.ko", "module /kvm-intel.ko ept=0", "times 2", "reload on"]
        );
        assert!(lines[8].starts_with("kernel /vmlinuz console=") && lines[9] == "payload /inner.initramfs");
        let qemu = plan(&Job::parse("vmm=qemu").unwrap(), 2);
        assert!(qemu.contains(" -smp 2 "));
        let nested = Job { hypervisor: Some(Payload::new("/c", "events=9")), ..Job::parse("").unwrap() };
        let nested = plan(&nested, 1);
        assert!(nested.starts_with("role host\nnested on\n") && nested.ends_with("kernel /hypervisor events=9\n"));
        assert!(qemu.lines().any(|l| l.starts_with("program /")) && !qemu.contains("\nkernel "));
    }
}
