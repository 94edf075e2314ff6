//! Xen as the guest hypervisor: GRUB starts it alone on the machine, and nvmx starts it as L2. Its control domain (dom0) is a
//! Linux without VMX, whose init starts `xl`; the domain that `xl` starts runs in VMX non-root operation: a Linux by PVH.

use super::linux::workload;
use super::{Machine, Payload, Spec, Work};
use anyhow::Result;
use nvmx_setup::initramfs::Archive;
use nvmx_setup::linux::Linux;
use nvmx_setup::xen::{MODULES, SERVICES, XL, Xen};
use std::fmt::Write;
use std::path::PathBuf;

/// Memory of the domain, of dom0, and of all, in MiB.
const GUEST_MEMORY: u32 = 256;
const DOM0_MEMORY: u32 = 384;
const MEMORY: u32 = 1024;
/// What every Linux is told. It says only what goes wrong, and tests only what is needed.
const LINUX: &str = "console=hvc0 nokaslr mitigations=off tsc=reliable no_timer_check random.trust_cpu=on \
    cryptomgr.notests audit=0 apparmor=0 panic=-1 quiet";
/// What a loader other than GRUB puts first is the name of the file, which Xen skips, for its modules too.
const NAME: &str = "placeholder";
/// Where things are in the file system of dom0.
const KERNEL: &str = "vmlinuz";
const INNER: &str = "inner.initramfs";
const DOMAIN: &str = "l3.cfg";
/// Folders that the services write to.
const FOLDERS: [&str; 14] = [
    "dev",
    "proc",
    "sys",
    "tmp",
    "etc",
    "etc/xen",
    "run",
    "var",
    "var/run",
    "var/run/xen",
    "var/run/xenstored",
    "var/lib",
    "var/lib/xen",
    "var/log",
];

/// What Xen is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// How many domains, one after the other
    pub times: u32,
    /// More words for Xen's command line
    pub options: String,
}

impl Job {
    /// Reads the words of a command line: `times=N`; the rest is for Xen.
    ///
    /// # Errors
    /// The word that makes no sense.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut job = Job { times: 1, options: String::new() };
        let mut options = Vec::new();
        for word in text.split_whitespace() {
            match word.strip_prefix("times=") {
                Some(n) => {
                    let bad = || format!("`{word}` is no number of domains: times=N");
                    job.times = n.parse().ok().filter(|n| *n > 0).ok_or_else(bad)?;
                }
                None => options.push(word),
            }
        }
        job.options = options.join(" ");
        Ok(job)
    }
}

/// The files of which the boots are made.
#[derive(Clone, Debug)]
pub struct XenLinux {
    /// Xen and dom0
    pub xen: Xen,
    /// The kernel of the domain
    pub linux: Linux,
    /// Init in both
    pub vmm: PathBuf,
}

impl XenLinux {
    /// The boot alone on a machine; dom0 and the domain have as many CPUs.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn bare(&self, work: &Work, name: &str, job: &Job, machine: &Machine) -> Result<Spec> {
        let initramfs = work.initramfs(name, || self.initramfs(job, machine.cpus))?;
        let kernel = Payload::new(self.xen.file("xen"), command_line(job));
        let dom0 = Payload::new(self.xen.file("vmlinuz"), format!("{NAME} {LINUX}"));
        let mut spec = work.spec(format!("{name}-bare"), kernel, vec![dom0, initramfs]);
        spec.machine = Machine { memory: machine.memory.max(MEMORY), ..machine.clone() };
        spec.debug_port = true;
        Ok(spec)
    }

    fn initramfs(&self, job: &Job, cpus: u32) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        FOLDERS.iter().try_for_each(|folder| archive.add_folder(folder))?;
        archive.add_folders(&self.xen.folder, &["bin", "lib", "lib64"])?;
        archive.add_file("init", &self.vmm)?;
        for module in MODULES {
            archive.add_file(&format!("{module}.ko"), &self.xen.file(&format!("{module}.ko")))?;
        }
        archive.add_file(KERNEL, &self.linux.file("vmlinuz"))?;
        archive.add(INNER, &workload(&self.vmm, "")?)?;
        archive.add(DOMAIN, domain(cpus).as_bytes())?;
        // dom0 has the memory that it has: no domain takes any of it.
        archive.add("etc/xen/xl.conf", b"autoballoon=\"off\"\n")?;
        archive.add("plan", plan(job).as_bytes())?;
        archive.finish()
    }
}

/// Xen's command line.
///
/// - `ept=exec-sp`: on a CPU that it does not know Xen keeps large pages from being executed, but not under a hypervisor,
///   which nvmx is. Both boots shall do the same.
/// - `guest_loglvl=all`: what a domain writes to the debug port, Xen puts on its own console.
fn command_line(job: &Job) -> String {
    let line = format!(
        "{NAME} console=com1 com1=115200,8n1 guest_loglvl=all noreboot ept=exec-sp \
         dom0_mem={DOM0_MEMORY}M,max:{DOM0_MEMORY}M {}",
        job.options
    );
    line.trim_end().to_string()
}

/// The orders of dom0's init.
fn plan(job: &Job) -> String {
    let mut text = String::from("role dom0\n");
    // A string takes everything.
    for module in MODULES {
        let _ = writeln!(text, "module /{module}.ko");
    }
    for service in SERVICES {
        let _ = writeln!(text, "service /bin/{service}");
    }
    let _ = writeln!(text, "times {}\nprogram /bin/{XL} create -F /{DOMAIN}", job.times);
    text
}

/// The domain, as `xl` wants it described.
fn domain(cpus: u32) -> String {
    format!(
        "name=\"l3\"\ntype=\"pvh\"\nkernel=\"/{KERNEL}\"\nramdisk=\"/{INNER}\"\nextra=\"{LINUX}\"\nmemory={GUEST_MEMORY}\n\
         vcpus={cpus}\non_poweroff=\"destroy\"\non_reboot=\"destroy\"\non_crash=\"destroy\"\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_told_from_options_of_xen() {
        let job = Job::parse("hap=0 times=3 loglvl=all").unwrap();
        assert_eq!((job.times, job.options.as_str()), (3, "hap=0 loglvl=all"));
        assert!(command_line(&job).ends_with("M hap=0 loglvl=all"));
        assert!(Job::parse("times=0").is_err() && Job::parse("times=x").is_err());
    }

    #[test]
    fn the_name_comes_first_so_that_no_word_is_lost() {
        let job = Job::parse("").unwrap();
        assert_eq!(job.times, 1);
        assert!(command_line(&job).starts_with("placeholder console=com1 "));
        assert!(command_line(&job).ends_with("max:384M"));
    }

    #[test]
    fn the_plan_starts_the_store_before_the_domain() {
        let text = plan(&Job::parse("times=2").unwrap());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..3], ["role dom0", "module /xen-privcmd.ko", "module /xen-evtchn.ko"]);
        assert_eq!(lines[5], "service /bin/xenstored");
        assert_eq!(lines[8..], ["times 2", "program /bin/xl create -F /l3.cfg"]);
        assert!(domain(2).contains("\nvcpus=2\n"));
    }
}
