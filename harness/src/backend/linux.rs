//! Linux with KVM as the guest hypervisor: one kernel and one initial file system, which GRUB starts alone on the machine, and
//! nvmx as L2. Its guest is Linux again, in the VMM of this workspace or in QEMU.

use super::kvm_linux::COMMAND_LINE;
use super::{Machine, Payload, Protocol, Spec, Work};
use anyhow::Result;
use nvmx_setup::initramfs::Archive;
use nvmx_setup::linux::{Linux, MODULES};
use nvmx_setup::qemu::Qemu;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Memory of the innermost Linux, and of all, in MiB.
const GUEST_MEMORY: u32 = 256;
const MEMORY: u32 = 1024;
/// Where things are in the initial file system of L2.
const KERNEL: &str = "vmlinuz";
const INNER: &str = "inner.initramfs";
const HYPERVISOR: &str = "hypervisor";
const AFTER: &str = "after.initramfs";

/// How the machine ends while its guest works.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// It is reset, and does everything once more
    Reset,
    /// It is switched off
    PowerOff,
    /// Its kernel starts another one
    Kexec,
}

/// All of them.
const ENDS: [End; 3] = [End::Reset, End::PowerOff, End::Kexec];

impl End {
    /// Its name in orders.
    fn word(self) -> &'static str {
        match self {
            End::Reset => "reset",
            End::PowerOff => "power-off",
            End::Kexec => "kexec",
        }
    }
}

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
    /// The machine is reset, or switched off, while the first guest works
    pub end: Option<End>,
    /// CPUs of the guest, if not those of the machine
    pub vcpus: Option<u32>,
    /// The guest works much: programs, memory, system calls, a pipe, a timer, interrupts between CPUs; and then many guests run in turn
    pub loads: bool,
    /// CPUs of L2 go offline and come back before its guest starts
    pub hotplug: bool,
    /// Parameters of the module kvm-intel
    pub parameters: String,
    /// The guest is no Linux but this guest hypervisor of `l2-guests/`, in our own VMM
    pub hypervisor: Option<Payload>,
}

/// The words of [`Job::parse`].
const ORDERS: &str =
    "vmm=qemu|own, times=N, kill=MILLISECONDS, reload=on, vcpus=N, loads=on, hotplug=on, end=reset|power-off|kexec";

impl Job {
    /// Reads the words of a command line: `vmm=qemu|own`, `times=N`, `kill=MILLISECONDS`, `reload=on`, `vcpus=N`,
    /// `loads=on`, `hotplug=on`, `end=reset|power-off|kexec`; the rest is for kvm-intel.
    ///
    /// # Errors
    /// The word that makes no sense.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut job = Job {
            qemu: true,
            times: 1,
            kill: None,
            reload: false,
            end: None,
            vcpus: None,
            loads: false,
            hotplug: false,
            parameters: String::new(),
            hypervisor: None,
        };
        let mut parameters = Vec::new();
        for word in text.split_whitespace() {
            let bad = || format!("`{word}` is no order for Linux as L2: {ORDERS}");
            let number = |text: &str| text.parse().ok().filter(|n| *n > 0).ok_or_else(bad);
            match word.split_once('=').ok_or_else(bad)? {
                ("vmm", "own") => job.qemu = false,
                ("vmm", "qemu") => job.qemu = true,
                ("times", n) => job.times = number(n)?,
                ("vcpus", n) => job.vcpus = Some(number(n)?),
                ("kill", n) => job.kill = Some(n.parse().ok().ok_or_else(bad)?),
                ("reload", "on") => job.reload = true,
                ("loads", "on") => job.loads = true,
                ("hotplug", "on") => job.hotplug = true,
                ("end", end) => job.end = Some(ENDS.into_iter().find(|e| e.word() == end).ok_or_else(bad)?),
                ("vmm" | "reload" | "loads" | "hotplug", _) => return Err(bad()),
                _ => parameters.push(word),
            }
        }
        job.parameters = parameters.join(" ");
        // Our own VMM is no program that could be ended.
        match !job.qemu && (job.end.is_some() || job.kill.is_some()) {
            true => Err("`vmm=own` goes without `end=` and `kill=`: these are for QEMU".into()),
            false => Ok(job),
        }
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
    /// The boot alone on the machine with Linux as its hypervisor; its guest has as many CPUs unless the job says otherwise.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn bare(&self, work: &Work, name: &str, job: &Job, machine: &Machine) -> Result<Spec> {
        let initramfs = work.initramfs(name, || self.initramfs(job, machine.cpus))?;
        // Without it Linux asks the keyboard controller first, whose reset the firmware of Bochs does not survive.
        let reset = if job.end == Some(End::Reset) { " reboot=pci" } else { "" };
        let kernel = Payload::new(self.linux.file("vmlinuz"), format!("{COMMAND_LINE}{reset}"));
        let mut spec = work.spec(format!("{name}-bare"), kernel, vec![initramfs]);
        spec.machine = machine.clone();
        Ok(in_linux(Spec { protocol: Protocol::Linux, ..spec }))
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
            archive.add(INNER, &workload(&self.vmm, if job.loads { "loads on\n" } else { "" })?)?;
        }
        if let Some(qemu) = self.qemu.as_ref().filter(|_| job.qemu) {
            qemu.add_to(&mut archive)?;
        }
        if job.end == Some(End::Kexec) {
            // What it is, and that it came so far, is all that the second kernel tells.
            archive.add(AFTER, &only_init(&self.vmm, "role hypervisor\ntimes 0\nprogram none\n")?)?;
        }
        archive.add("plan", plan(job, cpus).as_bytes())?;
        archive.finish()
    }
}

/// The innermost initial file system: the VMM as a program that makes some work, with further orders.
///
/// # Errors
/// If the VMM cannot be read.
pub fn workload(vmm: &Path, orders: &str) -> Result<Vec<u8>> {
    only_init(vmm, &format!("role workload\n{orders}"))
}

/// An initial file system that has nothing but the VMM, with these orders.
fn only_init(vmm: &Path, orders: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    ["dev", "proc", "sys"].iter().try_for_each(|folder| archive.add_folder(folder))?;
    archive.add_file("init", vmm)?;
    archive.add("plan", orders.as_bytes())?;
    archive.finish()
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
    if job.loads {
        text.push_str("loads on\n");
    }
    if job.hotplug {
        text.push_str("hotplug on\n");
    }
    if let Some(end) = job.end {
        let _ = writeln!(text, "end {}", end.word());
    }
    if let Some(hypervisor) = &job.hypervisor {
        let _ = writeln!(text, "memory {GUEST_MEMORY}\nkernel /{HYPERVISOR} {}", hypervisor.args);
    } else if job.qemu {
        let line = Qemu::command_line(job.vcpus.unwrap_or(cpus), GUEST_MEMORY, KERNEL, INNER, COMMAND_LINE);
        let _ = writeln!(text, "program {line}");
    } else {
        let cpus = job.vcpus.unwrap_or(cpus);
        let _ = writeln!(text, "memory {GUEST_MEMORY}\ncpus {cpus}\nkernel /{KERNEL} {COMMAND_LINE}\npayload /{INNER}");
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
        assert_eq!(Job::parse("end=power-off vcpus=2").map(|j| (j.end, j.vcpus)), Ok((Some(End::PowerOff), Some(2))));
        assert!(Job::parse("end=never").is_err() && Job::parse("vmm=own end=reset").is_err());
        assert!(Job::parse("times=0").is_err() && Job::parse("vmm=xen").is_err() && Job::parse("fast").is_err());
    }

    #[test]
    fn the_plan_has_a_line_for_each_order() {
        assert!(plan(&Job::parse("kill=400 times=2").unwrap(), 1).contains("\nkill 400\n"));
        assert!(plan(&Job::parse("end=reset").unwrap(), 1).contains("\nend reset\n"));
        assert!(plan(&Job::parse("vcpus=2").unwrap(), 4).contains(" -smp 2 "));
        let own = plan(&Job::parse("vmm=own reload=on times=2 ept=0").unwrap(), 1);
        let lines: Vec<&str> = own.lines().collect();
        assert_eq!(lines[..2], ["role hypervisor", "nested off"]);
        assert_eq!(
            lines[2..7],
            ["module /irqbypass.ko", "module /kvm.ko", "module /kvm-intel.ko ept=0", "times 2", "reload on"]
        );
        assert_eq!(lines[8], "cpus 1");
        assert!(lines[9].starts_with("kernel /vmlinuz console=") && lines[10] == "payload /inner.initramfs");
        let own = plan(&Job::parse("vmm=own vcpus=2 hotplug=on").unwrap(), 4);
        assert!(own.contains("\ncpus 2\n") && own.contains("\nhotplug on\n") && !own.contains("loads"));
        assert!(plan(&Job::parse("loads=on").unwrap(), 1).contains("\nloads on\n"));
        let qemu = plan(&Job::parse("vmm=qemu").unwrap(), 2);
        assert!(qemu.contains(" -smp 2 "));
        let nested = Job { hypervisor: Some(Payload::new("/c", "events=9")), ..Job::parse("").unwrap() };
        let nested = plan(&nested, 1);
        assert!(nested.starts_with("role host\nnested on\n") && nested.ends_with("kernel /hypervisor events=9\n"));
        assert!(qemu.lines().any(|l| l.starts_with("program /")) && !qemu.contains("\nkernel "));
    }
}
