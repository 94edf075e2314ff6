//! Everything set up: L0, images, and the boots that all commands make.

use crate::backend::Recording;
use crate::backend::host::{self, HostFacts};
use crate::backend::kvm::{Accelerator, Kvm};
use crate::backend::kvm_in_bochs::KvmInBochs;
use crate::backend::kvm_in_kvm::KvmInKvm;
use crate::backend::kvm_linux::KvmLinux;
use crate::backend::linux::LinuxKvm;
use crate::backend::xen::XenLinux;
use crate::backend::{Backend, Line, Machine, Payload, Protocol, Spec, StopAt, Work};
use crate::boot;
use crate::cli::{Explain, Fields, L0Args, RecordedBy, Recorder, RunArgs};
use crate::image::{self, Images, Wanted};
use crate::trace::record;
use crate::transcript::stack::StackLevel;
use anyhow::Result;
use nvmx_setup as setup;
use nvmx_setup::error::Stop;
use nvmx_setup::linux::Kernel;
use nvmx_setup::paths::Paths;
use nvmx_setup::release::Release;
use nvmx_setup::tcg::QEMU;
use nvmx_setup::toolchain::{self, Toolchain};
use nvmx_setup::ui::Ui;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// The CPU models to try, best first, where the user names none.
const MODELS: [&str; 4] = ["tigerlake", "corei7_icelake_u", "corei7_skylake_x", "corei7_haswell_4770"];

/// How long a boot may take.
const SHORT: Duration = Duration::from_secs(120);
/// How long a boot may take with a Linux below, or with nvmx in nvmx.
pub const LONG: Duration = Duration::from_secs(600);
/// The "model" of a machine that has the host's CPU.
pub const HOST_MODEL: &str = "host";

/// Who records the exits of a session's boots.
pub enum Recordings {
    /// The emulator, in logs in this folder
    Logs(TempDir),
    /// nvmx, which keeps so many of each CPU
    Told(u32),
}

/// How a Linux that stands in nvmx's place on an emulated machine copies memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Copies {
    /// As it does on this processor
    ByBytes,
    /// As [`KvmInBochs::usual`] says
    ByWords,
}

/// A machine on which boots can be made.
pub struct Session {
    /// The terminal
    pub ui: Ui,
    /// The folders
    pub paths: Paths,
    /// L0
    pub backend: Box<dyn Backend>,
    /// nvmx and its guests
    pub images: Images,
    /// What builds them
    pub toolchain: Toolchain,
    /// The machine that boots where a test does not say otherwise
    pub machine: Machine,
    /// The longest that a boot may take
    pub timeout: Duration,
    /// The Bochs that the user wants, if not ours
    pub bochs: Option<PathBuf>,
    /// nvmx tells what it refuses
    pub explain: bool,
    /// Exits are recorded
    pub recording: Option<Recordings>,
    /// Nothing is set up and nothing can boot: boots are only named
    pub dry: bool,
}

impl Session {
    /// Sets up all that is missing and builds the images.
    ///
    /// # Errors
    /// [`Stop::Environment`] with what to type.
    pub fn start(ui: &Ui, args: &L0Args) -> Result<Self> {
        Self::start_with(ui, args, &Wanted::All)
    }

    /// [`Self::start`] with no more images than these.
    ///
    /// # Errors
    /// As there.
    pub fn start_with(ui: &Ui, args: &L0Args, wanted: &Wanted) -> Result<Self> {
        let paths = Paths::find()?;
        boot::clear_old(&paths);
        let lock = paths.lock(ui)?;
        paths.clear_stale(&lock);
        let release = Release::find();
        // Emulator and images are made at the same time: neither alone keeps two processors busy.
        let (l0, built) = std::thread::scope(|scope| {
            let built = scope.spawn(|| set_up_images(ui, &paths, release.as_ref(), wanted));
            let l0 = set_up_l0(ui, &paths, args);
            (l0, built.join().unwrap_or_else(|_| Err(anyhow::anyhow!("building the images panicked"))))
        });
        let ((backend, model), (toolchain, images)) = (l0?, built?);
        drop(lock);
        let machine = Machine { memory: args.memory, cpus: args.cpus, model };
        let default = if args.l0 == host::L0::KvmInBochs { LONG } else { SHORT };
        let timeout = args.timeout.unwrap_or(default);
        Ok(Session {
            ui: ui.clone(),
            paths,
            backend,
            images,
            toolchain,
            machine,
            timeout,
            bochs: args.bochs.clone(),
            explain: false,
            recording: None,
            dry: false,
        })
    }

    /// A session in which boots can be described and not made: nothing is looked for, fetched or built.
    ///
    /// # Errors
    /// If there is no checkout.
    pub fn dry(ui: &Ui) -> Result<Self> {
        let nowhere = PathBuf::from("/nonexistent");
        let toolchain = Toolchain {
            cargo: nowhere.clone(),
            rustc: nowhere.clone(),
            linker: None,
            text: String::new(),
            version: String::new(),
        };
        Ok(Session {
            ui: ui.clone(),
            paths: Paths::find()?,
            backend: Box::new(dry_bochs()),
            images: Images::unbuilt(&nowhere),
            toolchain,
            machine: Machine { memory: 256, cpus: 1, model: MODELS[0].into() },
            timeout: SHORT,
            bochs: None,
            explain: false,
            recording: None,
            dry: true,
        })
    }

    /// ... in which nvmx tells what it refuses, or not.
    pub fn explaining(self, how: Explain) -> Self {
        Session { explain: how != Explain::Off, ..self }
    }

    /// ... with what `run` asks for: explanations, records of exits.
    ///
    /// # Errors
    /// [`Stop::Usage`] if nobody can record exits.
    pub fn of_run(self, args: &RunArgs) -> Result<Self> {
        // A report shows exits where they cost nothing.
        let wanted = args.trace.is_some() || args.report.is_some() && self.emulator_records();
        let session = self.explaining(args.explain).recording(wanted, Some(&args.recorder))?;
        if matches!(session.recording, Some(Recordings::Told(_))) {
            args.of_one_nvmx()?;
        }
        Ok(session)
    }

    /// Whether L0 itself records exits.
    fn emulator_records(&self) -> bool {
        self.backend.records() && self.bochs.is_none()
    }

    /// ... in which the exits of each boot are recorded, or not; by the emulator where it can, unless the user says otherwise.
    ///
    /// # Errors
    /// [`Stop::Usage`] if the emulator is to and cannot.
    pub fn recording(self, wanted: bool, recorder: Option<&Recorder>) -> Result<Self> {
        let keep = recorder.map_or(0, |recorder| recorder.trace_keep);
        let recording = match recorder.and_then(|recorder| recorder.trace_by) {
            _ if !wanted => None,
            Some(RecordedBy::Nvmx) => Some(Recordings::Told(keep)),
            None if keep > 0 && !self.emulator_records() => Some(Recordings::Told(keep)),
            _ if self.emulator_records() => Some(Recordings::Logs(record::folder(&self.paths)?)),
            _ => {
                let name = self.backend.name();
                let text = format!("{name} does not record exits: nvmx's own Bochs does (--l0 bochs, kvm-in-bochs)");
                return Err(Stop::Usage(text).into());
            }
        };
        Ok(Session { recording, ..self })
    }

    /// The session's machine with a Linux and its KVM on it: for KVM in nvmx's place.
    ///
    /// # Errors
    /// [`Stop::Environment`] with what to type.
    pub fn kvm_in_place(&self, copies: Copies) -> Result<Box<dyn Backend + Send>> {
        if self.machine.model == HOST_MODEL {
            return Ok(Box::new(self.kvm_in_qemu(Accelerator::Kvm)?));
        }
        let kvm = self.kvm_on_bochs()?;
        let depth = u32::from(self.backend.below()) + 1;
        let kvm = KvmInBochs { linux: KvmLinux { depth, ..kvm.linux }, ..kvm };
        Ok(Box::new(if copies == Copies::ByWords { kvm.usual() } else { kvm }))
    }

    /// A Linux with KVM on Bochs: ours, or the one that is given.
    ///
    /// # Errors
    /// [`Stop::Environment`] with what to type.
    pub fn kvm_on_bochs(&self) -> Result<KvmInBochs> {
        let linux = self.kvm_linux()?;
        if self.dry {
            return Ok(KvmInBochs { bochs: dry_bochs(), linux });
        }
        let _lock = self.paths.lock(&self.ui)?;
        Ok(KvmInBochs { bochs: setup::bochs::set_up(&self.ui, &self.paths, self.bochs.as_deref())?, linux })
    }

    /// A Linux with KVM in QEMU.
    ///
    /// # Errors
    /// [`Stop::Environment`] with what to type.
    pub fn kvm_in_qemu(&self, accelerator: Accelerator) -> Result<KvmInKvm> {
        let linux = self.kvm_linux()?;
        let kvm = if self.dry { dry_kvm() } else { kvm_of_host(&self.ui, HostFacts::find().cpu)? };
        Ok(KvmInKvm { kvm: Kvm { accelerator, ..kvm }, linux })
    }

    /// A Linux with KVM for some machine.
    ///
    /// # Errors
    /// [`Stop::Environment`] with what to type.
    pub fn kvm_linux(&self) -> Result<KvmLinux> {
        if self.dry {
            return Ok(KvmLinux::new(dry_linux(Kernel::Newest), PathBuf::new()));
        }
        let _lock = self.paths.lock(&self.ui)?;
        kvm_linux(&self.ui, &self.paths)
    }

    /// L0 for the banner.
    pub fn l0(&self) -> StackLevel {
        let name = self.backend.name();
        let (name, version) = name.rsplit_once(' ').unwrap_or((&name, ""));
        StackLevel {
            level: "L0".into(),
            name: name.into(),
            version: version.into(),
            cpu: self.backend.cpu(&self.machine),
            features: Vec::new(),
        }
    }

    /// A guest alone on the machine.
    ///
    /// # Errors
    /// [`Stop::Usage`] if there is no such guest.
    pub fn bare(&self, guest: &str, args: &str) -> Result<Spec> {
        let kernel = Payload::new(self.images.guest(guest)?, args);
        Ok(self.spec(format!("{guest}-bare"), kernel, Vec::new()))
    }

    /// nvmx's command line.
    pub fn options(&self, fields: Fields) -> String {
        let (log, explain) = (if self.ui.verbose { "debug" } else { "warn" }, if self.explain { "on" } else { "off" });
        let trace = match self.recording {
            Some(Recordings::Told(keep)) => format!(" trace={keep}"),
            _ => String::new(),
        };
        format!("log={log} fields={} explain={explain}{trace}", fields.option())
    }

    /// nvmx's command line for a Linux whose programs read its counters.
    pub fn options_with_counters(&self, fields: Fields) -> String {
        format!("{} counters=all", self.options(fields))
    }

    /// Linux with KVM as the guest hypervisor, with QEMU in it or without.
    ///
    /// # Errors
    /// [`Stop::Environment`] with what to type.
    pub fn linux(&self, kernel: Kernel, qemu: bool) -> Result<LinuxKvm> {
        if self.dry {
            return Ok(LinuxKvm { linux: dry_linux(kernel), vmm: PathBuf::new(), qemu: None });
        }
        let _lock = self.paths.lock(&self.ui)?;
        let linux = setup::linux::set_up(&self.ui, &self.paths, kernel)?;
        let vmm = setup::linux::build_vmm(&self.ui, &self.paths)?;
        let qemu = if qemu { Some(setup::qemu::set_up(&self.ui, &self.paths)?) } else { None };
        Ok(LinuxKvm { linux, vmm, qemu })
    }

    /// Xen as the guest hypervisor.
    ///
    /// # Errors
    /// [`Stop::Environment`] with what to type.
    pub fn xen(&self) -> Result<XenLinux> {
        if self.dry {
            let xen = setup::xen::Xen { folder: PathBuf::new(), version: String::new() };
            return Ok(XenLinux { xen, linux: dry_linux(Kernel::Newest), vmm: PathBuf::new() });
        }
        let _lock = self.paths.lock(&self.ui)?;
        let linux = setup::linux::set_up(&self.ui, &self.paths, Kernel::Newest)?;
        let vmm = setup::linux::build_vmm(&self.ui, &self.paths)?;
        Ok(XenLinux { xen: setup::xen::set_up(&self.ui, &self.paths)?, linux, vmm })
    }

    /// A guest under nvmx.
    ///
    /// # Errors
    /// [`Stop::Usage`] if there is no such guest.
    pub fn nested(&self, guest: &str, args: &str, fields: Fields) -> Result<Spec> {
        let options = self.options(fields);
        let module = Payload::new(self.images.guest(guest)?, args);
        let name = format!("{guest}-{}", fields.option());
        Ok(self.spec(name, Payload::new(&self.images.nvmx, options), vec![module]))
    }

    /// A boot of a guest hypervisor that is alone on the machine, under nvmx instead.
    pub fn under_nvmx(&self, bare: &Spec, name: String, options: &str) -> Spec {
        let modules = std::iter::once(&bare.kernel).chain(&bare.modules).cloned().collect();
        let kernel = Payload::new(&self.images.nvmx, options);
        Spec { name, kernel, modules, protocol: Protocol::Multiboot2, ..bare.clone() }
    }

    /// A guest under so many nvmx, each in the one before it.
    ///
    /// # Errors
    /// [`Stop::Usage`] if there is no such guest.
    pub fn stacked(&self, guest: &str, args: &str, fields: Fields, depth: u32) -> Result<Spec> {
        let mut spec = self.nested(guest, args, fields)?;
        // What the outermost can do, those in it may lack.
        let inner = if fields == Fields::ZeroCopy { Fields::Auto } else { fields };
        for _ in 1..depth {
            spec.modules.insert(0, self.nested(guest, args, inner)?.kernel);
        }
        spec.machine.memory = self.machine.memory.saturating_mul(depth);
        Ok(Spec { name: format!("{guest}-depth{depth}"), ..spec })
    }

    /// Where boots with files of their own are prepared.
    pub fn work(&self, folder: &str) -> Work {
        let like = self.spec(String::new(), Payload::new("", ""), Vec::new());
        Work { folder: self.paths.target.join("nvmx").join(folder), dry: self.dry, like }
    }

    /// A boot on the session's machine.
    pub fn spec(&self, name: String, kernel: Payload, modules: Vec<Payload>) -> Spec {
        let (machine, timeout) = (self.machine.clone(), self.timeout);
        Spec {
            name,
            kernel,
            modules,
            protocol: Protocol::Multiboot2,
            machine,
            debug_port: false,
            line: Line::default(),
            timeout,
            stop: StopAt::default(),
            record: self.recording.as_ref().map(|recording| match recording {
                Recordings::Logs(folder) => Recording::new(folder, &self.images.nvmx),
                Recordings::Told(_) => Recording::told(&self.images.nvmx),
            }),
            drive: None,
            gdb: None,
        }
    }
}

fn dry_bochs() -> setup::bochs::Bochs {
    let (path, version, flavour) = (PathBuf::new(), String::new(), setup::bochs::Flavour::Plain);
    setup::bochs::Bochs { path, version, flavour, lost: None }
}

fn dry_kvm() -> Kvm {
    let (qemu, version, cpu) = (PathBuf::new(), String::new(), String::new());
    Kvm { qemu, version, cpu, accelerator: Accelerator::Kvm }
}

fn dry_linux(kernel: Kernel) -> setup::linux::Linux {
    let release = if kernel == Kernel::Linux61 { "6.1.0" } else { "" };
    setup::linux::Linux { folder: PathBuf::new(), release: release.into() }
}

/// The compiler and what it makes, or what a release has of both.
fn set_up_images(ui: &Ui, paths: &Paths, release: Option<&Release>, wanted: &Wanted) -> Result<(Toolchain, Images)> {
    if let Some(release) = release {
        return Ok((release.toolchain()?, Images::released(release, wanted)?));
    }
    let toolchain = toolchain::set_up(ui, paths)?;
    ui.detail(&format!("compiler: {}", toolchain.text));
    let images = image::build(ui, paths, &toolchain, wanted)?;
    Ok((toolchain, images))
}

fn set_up_l0(ui: &Ui, paths: &Paths, args: &L0Args) -> Result<(Box<dyn Backend>, String)> {
    let facts = HostFacts::find();
    let own = args.bochs.is_some() && args.l0 != host::L0::KvmInBochs;
    let wish = if own { host::L0::Bochs } else { args.l0 };
    let choice = host::choose(wish, &facts).map_err(|(what, help)| Stop::Environment {
        what: format!("KVM cannot be L0: {what}"),
        todo: help.into_iter().collect(),
    })?;
    if choice.kvm {
        let kvm = kvm_of_host(ui, facts.cpu)?;
        ui.detail(&format!("L0 is KVM: {}", choice.why));
        return Ok((Box::new(kvm), HOST_MODEL.into()));
    }
    setup::grub::set_up(ui)?;
    let bochs = setup::bochs::set_up(ui, paths, args.bochs.as_deref())?;
    ui.detail(&format!("L0 is {}: {}", bochs.name(), choice.why));
    if let Some(lost) = &bochs.lost {
        ui.note(&format!("{} is not nvmx's own build of Bochs: {lost}", bochs.path.display()));
    }
    let model = choose_model(args.cpu_model.as_deref(), &setup::bochs::models(&bochs.path))?;
    if wish == host::L0::KvmInBochs {
        return Ok((Box::new(KvmInBochs { bochs, linux: kvm_linux(ui, paths)? }), model));
    }
    Ok((Box::new(bochs), model))
}

/// QEMU with the host's KVM.
fn kvm_of_host(ui: &Ui, cpu: String) -> Result<Kvm> {
    setup::require(ui, &[QEMU], "KVM as L0")?;
    let qemu = QEMU.find().ok_or_else(|| Stop::environment("QEMU is not there although it was installed"))?;
    Kvm::new(qemu, cpu)
}

fn kvm_linux(ui: &Ui, paths: &Paths) -> Result<KvmLinux> {
    let linux = setup::linux::set_up(ui, paths, Kernel::Newest)?;
    Ok(KvmLinux::new(linux, setup::linux::build_vmm(ui, paths)?))
}

fn choose_model(wish: Option<&str>, offered: &[String]) -> Result<String, Stop> {
    let has = |model: &str| offered.iter().any(|m| m == model);
    match wish {
        Some(model) if has(model) => Ok(model.into()),
        Some(model) => Err(Stop::Usage(format!("Bochs has no CPU model `{model}`; it has: {}", offered.join(", ")))),
        None => MODELS
            .iter()
            .find(|m| has(m))
            .map(|m| m.to_string())
            .ok_or_else(|| Stop::environment("this Bochs has no CPU model with the VMX features that nvmx needs")),
    }
}

/// The file with limits on what events may cost.
pub fn budget_file(root: &Path) -> std::path::PathBuf {
    root.join("benches/budget.json")
}

/// The rows of the usual stack, which take minutes.
pub fn stack_file(root: &Path) -> std::path::PathBuf {
    root.join("benches/stack.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_model_that_bochs_has_is_taken() {
        let offered = ["pentium", "corei7_skylake_x", "corei7_haswell_4770"].map(String::from);
        assert_eq!(choose_model(None, &offered).unwrap(), "corei7_skylake_x");
        assert_eq!(choose_model(Some("pentium"), &offered).unwrap(), "pentium");
        assert_eq!(choose_model(Some("z80"), &offered).unwrap_err().code(), 2);
        assert_eq!(choose_model(None, &offered[..1]).unwrap_err().code(), 3);
    }
}
