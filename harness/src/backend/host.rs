//! Which L0 this machine offers, and why.

use std::fs::OpenOptions;
use std::path::Path;

/// What the user asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum L0 {
    /// KVM if it can nest, else Bochs
    Auto,
    /// The emulated machine
    Bochs,
    /// QEMU with KVM
    Kvm,
    /// A Linux with KVM on the emulated machine
    KvmInBochs,
}

/// What there is for KVM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostFacts {
    /// The CPU's name
    pub cpu: String,
    /// Intel with VMX
    pub vmx: bool,
    /// /dev/kvm
    pub device: Device,
    /// The `nested` parameter of kvm_intel, if the module is there
    pub nested: Option<String>,
    /// Parameter `enable_apicv` of kvm_intel, which is what came of it: N where the CPU has no APICv
    pub apicv: Option<String>,
}

/// The state of /dev/kvm.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Device {
    /// It is not there
    Missing,
    /// It may not be opened
    Denied,
    /// It can be used
    Usable,
}

impl HostFacts {
    /// Looks at this machine.
    pub fn find() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let value = |key: &str| {
            let line = cpuinfo.lines().find(|l| l.split(':').next().is_some_and(|k| k.trim() == key));
            line.and_then(|l| l.split_once(':')).map_or("", |(_, v)| v.trim())
        };
        let path = Path::new("/dev/kvm");
        let device = if !path.exists() {
            Device::Missing
        } else if OpenOptions::new().read(true).write(true).open(path).is_ok() {
            Device::Usable
        } else {
            Device::Denied
        };
        let parameter = |name: &str| {
            let text = std::fs::read_to_string(format!("/sys/module/kvm_intel/parameters/{name}"));
            text.ok().map(|text| text.trim().to_string())
        };
        HostFacts {
            cpu: value("model name").to_string(),
            vmx: value("vendor_id") == "GenuineIntel" && value("flags").split(' ').any(|f| f == "vmx"),
            device,
            nested: parameter("nested"),
            apicv: parameter("enable_apicv"),
        }
    }

    /// What keeps nvmx from running on KVM here, and what helps; `None` if nothing does.
    pub fn obstacle(&self) -> Option<(String, Option<String>)> {
        let no = |what: &str, help: Option<&str>| Some((what.to_string(), help.map(str::to_string)));
        if !self.vmx {
            return no("the CPU has no Intel VMX", None);
        }
        match self.device {
            Device::Missing => return no("there is no /dev/kvm", Some("sudo modprobe kvm_intel nested=1")),
            Device::Denied => {
                return no("/dev/kvm may not be opened", Some("sudo usermod -aG kvm $USER   # then log in again"));
            }
            Device::Usable => {}
        }
        match self.nested.as_deref() {
            Some("Y" | "1") => None,
            _ => no(
                "kvm_intel has nesting off",
                Some("sudo sh -c 'modprobe -r kvm_intel && modprobe kvm_intel nested=1'"),
            ),
        }
    }
}

/// The decision.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// KVM rather than Bochs
    pub kvm: bool,
    /// Why, in words that end the sentence "L0 is ... because ..."
    pub why: String,
}

/// Decides; an error is an impossible wish, with what helps.
///
/// # Errors
/// If KVM is asked for and cannot be used.
pub fn choose(wish: L0, facts: &HostFacts) -> Result<Choice, (String, Option<String>)> {
    match (wish, facts.obstacle()) {
        (L0::Bochs | L0::KvmInBochs, _) => Ok(Choice { kvm: false, why: "you asked for it".into() }),
        (L0::Kvm, None) => Ok(Choice { kvm: true, why: "you asked for it".into() }),
        (L0::Kvm, Some(obstacle)) => Err(obstacle),
        (L0::Auto, None) => Ok(Choice { kvm: true, why: "this CPU has VMX and KVM nests".into() }),
        (L0::Auto, Some((what, _))) => Ok(Choice { kvm: false, why: what }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(vmx: bool, device: Device, nested: Option<&str>) -> HostFacts {
        HostFacts { cpu: "x".into(), vmx, device, nested: nested.map(str::to_string), apicv: None }
    }

    #[test]
    fn auto_takes_kvm_only_where_it_nests() {
        let auto = |f: &HostFacts| choose(L0::Auto, f).unwrap();
        assert!(auto(&facts(true, Device::Usable, Some("Y"))).kvm);
        assert!(auto(&facts(true, Device::Usable, Some("1"))).kvm);
        assert_eq!(auto(&facts(false, Device::Usable, None)).why, "the CPU has no Intel VMX");
        assert_eq!(auto(&facts(true, Device::Missing, None)).why, "there is no /dev/kvm");
        assert_eq!(auto(&facts(true, Device::Denied, Some("Y"))).why, "/dev/kvm may not be opened");
        assert_eq!(auto(&facts(true, Device::Usable, Some("N"))).why, "kvm_intel has nesting off");
    }

    #[test]
    fn a_wish_for_kvm_that_cannot_be_met_says_what_helps() {
        let (what, help) = choose(L0::Kvm, &facts(true, Device::Usable, Some("N"))).unwrap_err();
        assert_eq!(what, "kvm_intel has nesting off");
        assert!(help.unwrap().contains("nested=1"));
        assert!(choose(L0::Kvm, &facts(true, Device::Usable, Some("Y"))).unwrap().kvm);
    }

    #[test]
    fn bochs_is_taken_when_asked_for_even_where_kvm_nests() {
        assert!(!choose(L0::Bochs, &facts(true, Device::Usable, Some("Y"))).unwrap().kvm);
    }
}
