//! What to do: a text file, one order per line.
//!
//! ```text
//! module /kvm.ko              load a kernel module, in this order, with its parameters
//! module /kvm-intel.ko nested=1
//! nested on                   KVM must offer VMX to its guest (the default; `off` for a guest without)
//! memory 256                  MiB
//! cpus 2                      CPUs of the guest (one where nothing is said)
//! kernel /nvmx log=warn       a multiboot image and its command line
//! payload /cascade            its modules, in order
//! service /xenstored          a program that runs to its end before the first machine; what is to stay detaches itself
//! program /qemu -accel kvm    instead of memory, kernel, payload: a program and its arguments, whose output is shown
//! kill 400                    end the program of every second turn by a signal after so many milliseconds
//! times 20                    so many such machines, one after the other
//! reload on                   with KVM unloaded and loaded again in between
//! hotplug on                  take CPUs offline and back before the first machine
//! end reset                   reset the machine while the first program's guest works, once (or `power-off`)
//! end kexec                   start another kernel then, /vmlinuz with the initial file system /after.initramfs
//! role hypervisor             say in records what this Linux is, and end the log (the default is `host`: neither)
//! role dom0                   the same as the control domain of Xen, whose tools start the machine: no KVM
//! role workload               no machine at all: do a little of everything, as the innermost Linux
//! loads on                    and then what people run in a guest, much of each; of a hypervisor: switching among many guests
//! ```

use anyhow::{Context, Result, bail, ensure};

/// What the guest's ACPI tables have room for, and no machine of the tests needs.
const MOST_CPUS: u32 = 32;

/// A file with its command line or parameters.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Item {
    /// Where the file is
    pub path: String,
    /// What it is given
    pub args: String,
}

/// What this Linux is in the stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Below the levels that speak
    Host,
    /// The guest hypervisor
    Hypervisor,
    /// The control domain of a guest hypervisor that is no Linux: of Xen
    Dom0,
    /// The innermost guest
    Workload,
}

/// How the machine ends while its guest works.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// It is reset, and does everything once more, to a usual end
    Reset,
    /// It is switched off
    PowerOff,
    /// The kernel starts another one
    Kexec,
}

/// The orders.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Kernel modules of the host
    pub modules: Vec<Item>,
    /// KVM must offer VMX
    pub nested: bool,
    /// Memory of the guest in MiB
    pub memory: u32,
    /// CPUs of the guest
    pub cpus: u32,
    /// The image
    pub kernel: Item,
    /// Its modules
    pub payloads: Vec<Item>,
    /// What must run before the first machine
    pub services: Vec<Item>,
    /// What runs instead of a machine of ours
    pub program: Option<Item>,
    /// The program of every second turn is killed after so many milliseconds
    pub kill: Option<u64>,
    /// How many machines
    pub times: u32,
    /// KVM is loaded again for each
    pub reload: bool,
    /// The machine ends in the midst of the first one
    pub end: Option<Ending>,
    /// CPUs go offline and come back before the first machine
    pub hotplug: bool,
    /// What this Linux is
    pub role: Role,
    /// The workload is followed by loads, the last machine of a hypervisor by many guests in turn
    pub loads: bool,
}

impl Plan {
    /// Reads the file's text.
    ///
    /// # Errors
    /// The first line that makes no sense, or what is missing.
    pub fn parse(text: &str) -> Result<Self> {
        let mut kernel = None;
        let mut plan = Plan {
            modules: Vec::new(),
            nested: true,
            memory: 0,
            cpus: 1,
            kernel: Item { path: String::new(), args: String::new() },
            payloads: Vec::new(),
            services: Vec::new(),
            program: None,
            kill: None,
            times: 1,
            reload: false,
            end: None,
            hotplug: false,
            role: Role::Host,
            loads: false,
        };
        for line in text.lines().filter(|l| !l.trim().is_empty()) {
            let (order, rest) = line.split_once(' ').with_context(|| format!("plan: `{line}` lacks a value"))?;
            let item = || {
                let (path, args) = rest.split_once(' ').unwrap_or((rest, ""));
                Item { path: path.into(), args: args.into() }
            };
            match order {
                "module" => plan.modules.push(item()),
                "nested" => plan.nested = rest == "on",
                "memory" => plan.memory = rest.parse().with_context(|| format!("plan: memory {rest}"))?,
                "cpus" => plan.cpus = rest.parse().with_context(|| format!("plan: cpus {rest}"))?,
                "kernel" => kernel = Some(item()),
                "payload" => plan.payloads.push(item()),
                "service" => plan.services.push(item()),
                "program" => plan.program = Some(item()),
                "kill" => plan.kill = Some(rest.parse().with_context(|| format!("plan: kill {rest}"))?),
                "times" => plan.times = rest.parse().with_context(|| format!("plan: times {rest}"))?,
                "reload" => plan.reload = rest == "on",
                "hotplug" => plan.hotplug = rest == "on",
                "loads" => plan.loads = rest == "on",
                "end" => {
                    plan.end = match rest {
                        "reset" => Some(Ending::Reset),
                        "power-off" => Some(Ending::PowerOff),
                        "kexec" => Some(Ending::Kexec),
                        _ => bail!("plan: unknown end `{rest}`"),
                    }
                }
                "role" => {
                    plan.role = match rest {
                        "host" => Role::Host,
                        "hypervisor" => Role::Hypervisor,
                        "dom0" => Role::Dom0,
                        "workload" => Role::Workload,
                        _ => bail!("plan: unknown role `{rest}`"),
                    }
                }
                _ => bail!("plan: unknown order `{order}`"),
            }
        }
        if plan.role == Role::Workload || plan.program.is_some() {
            return Ok(plan);
        }
        plan.kernel = kernel.context("plan: no kernel")?;
        // Above, the devices of a PC begin.
        ensure!((4..=3072).contains(&plan.memory), "plan: memory must be 4 to 3072 MiB, not {}", plan.memory);
        ensure!((1..=MOST_CPUS).contains(&plan.cpus), "plan: cpus must be 1 to {MOST_CPUS}, not {}", plan.cpus);
        Ok(plan)
    }

    /// Whether this machine is the last one, and many guests in turn follow.
    pub fn switches_after(&self, turn: u32) -> bool {
        self.loads && self.role == Role::Hypervisor && turn + 1 == self.times
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_and_mistakes_are_named() {
        let plan = Plan::parse("module /a.ko x=1 y=2\nmemory 64\nkernel /k a b\npayload /m\npayload /n c\n").unwrap();
        assert_eq!(plan.modules, [Item { path: "/a.ko".into(), args: "x=1 y=2".into() }]);
        assert_eq!((plan.memory, plan.nested, plan.kernel.args.as_str()), (64, true, "a b"));
        assert_eq!(plan.payloads.len(), 2);
        let error = |text: &str| Plan::parse(text).unwrap_err().to_string();
        assert_eq!(error("memory 64"), "plan: no kernel");
        assert_eq!(error("kernel /k\nmemory 5000"), "plan: memory must be 4 to 3072 MiB, not 5000");
        assert_eq!(error("kernel /k\nmemory 64\ncpus 0"), "plan: cpus must be 1 to 32, not 0");
        assert_eq!(Plan::parse("kernel /k\nmemory 64\ncpus 4").unwrap().cpus, 4);
        assert_eq!(error("frobnicate /k"), "plan: unknown order `frobnicate`");
        let dom0 = Plan::parse("role dom0\nservice /s -x\nservice /t\nprogram /xl create").unwrap();
        assert_eq!((dom0.role, dom0.services.len(), dom0.services[0].args.as_str()), (Role::Dom0, 2, "-x"));
        assert_eq!(Plan::parse("role workload").unwrap().role, Role::Workload);
        assert!(Plan::parse("role workload\nloads on").unwrap().loads);
        let switches = |text: &str| [0, 1].map(|turn| Plan::parse(text).unwrap().switches_after(turn));
        assert_eq!(switches("role hypervisor\nprogram /q\ntimes 2\nloads on"), [false, true]);
        assert_eq!(switches("role hypervisor\nprogram /q\ntimes 2"), [false, false]);
        assert_eq!(switches("role host\nprogram /q\nloads on"), [false, false]);
        let program = Plan::parse("program /q -a b\ntimes 3\nreload on\nkill 2").unwrap();
        assert_eq!(program.kill, Some(2));
        assert_eq!((program.program.unwrap().args.as_str(), program.times, program.reload), ("-a b", 3, true));
        assert_eq!(Plan::parse("program /q\nend power-off").unwrap().end, Some(Ending::PowerOff));
        assert_eq!(Plan::parse("program /q\nend kexec\nhotplug on").unwrap().end, Some(Ending::Kexec));
        assert_eq!(error("end x"), "plan: unknown end `x`");
        assert_eq!(error("role x"), "plan: unknown role `x`");
        assert!(!Plan::parse("kernel /k\nmemory 64\nnested off").unwrap().nested);
    }
}
