//! `doctor`: what is there, what is missing, and which L0 would be used and why. Changes nothing, but for what `--report` writes.

use super::doctor_report;
use crate::backend::host::{self, Device, HostFacts};
use crate::cli::DoctorArgs;
use anyhow::Result;
use nvmx_setup::apt::{self, Power};
use nvmx_setup::error::Stop;
use nvmx_setup::output::Output;
use nvmx_setup::paths::Paths;
use nvmx_setup::release::Release;
use nvmx_setup::tcg::QEMU;
use nvmx_setup::toolchain::{self, Compiler};
use nvmx_setup::ui::Ui;
use nvmx_setup::{Need, What, bochs, grub, linux, sources};
use owo_colors::Style;

enum State {
    Ok,
    Will,
    Missing,
    Info,
}

struct Doctor<'a> {
    ui: &'a Ui,
    power: Power,
    packages: Vec<&'static str>,
    to_do: usize,
    blocked: usize,
    said: String,
}

impl Doctor<'_> {
    fn say(&mut self, state: State, what: &str, text: &str) {
        let (mark, style) = match state {
            State::Ok => ("ok     ", Style::new().green()),
            State::Will => ("set up ", Style::new().yellow()),
            State::Missing => ("MISSING", Style::new().red()),
            State::Info => ("       ", Style::new()),
        };
        match state {
            State::Missing => self.blocked += 1,
            State::Will => self.to_do += 1,
            State::Ok | State::Info => {}
        }
        self.said.push_str(&format!("{mark} {what:<10} {text}\n"));
        self.ui.line(&format!("{} {what:<10} {text}", self.ui.paint(mark, style)));
    }

    /// Whether `run` can install packages by itself.
    fn can_install(&self) -> bool {
        matches!(self.power, Power::Root | Power::Sudo)
    }

    fn need(&mut self, topic: &str, need: &Need) {
        let name = match need.what {
            What::Program(name) => name.to_string(),
            What::File(places) => places.first().copied().unwrap_or_default().to_string(),
        };
        match need.find() {
            Some(path) => self.say(State::Ok, topic, &format!("{}", path.display())),
            None => {
                self.packages.push(need.package);
                let state = if self.can_install() { State::Will } else { State::Missing };
                self.say(state, topic, &format!("{name}: package {}", need.package));
            }
        }
    }
}

/// Runs the command.
///
/// # Errors
/// [`Stop::Usage`] if `--report` cannot be written, [`Stop::Environment`] if `run` could neither work now nor set itself up.
pub fn run(ui: &Ui, args: &DoctorArgs) -> Result<()> {
    let report = args.report.as_deref().map(Output::prepare).transpose()?;
    let paths = Paths::found()?;
    let mut doctor =
        Doctor { ui, power: Power::find(), packages: Vec::new(), to_do: 0, blocked: 0, said: String::new() };
    let (id, codename) = sources::distribution().unwrap_or_default();
    doctor.say(State::Info, "system", format!("{id} {codename}").trim());
    let power = doctor.power.text();
    doctor.say(State::Info, "packages", power);
    let release = Release::find();
    match &release {
        Some(release) => released(&mut doctor, release),
        None => compiler(&mut doctor, &paths),
    }
    let facts = HostFacts::find();
    let kvm = l0(&mut doctor, args, &facts);
    if kvm {
        // No package helps a CPU that has no VMX.
        if facts.vmx {
            doctor.need("QEMU", &QEMU);
        }
    } else {
        for need in &grub::NEEDS {
            doctor.need("boot disk", need);
        }
        // A release brings its own.
        if release.is_none() || args.bochs.is_some() {
            emulator(&mut doctor, &paths, args);
        }
        doctor.need("BIOS", &bochs::BIOS);
        doctor.need("VGA BIOS", &bochs::VGA_BIOS);
    }
    if args.l0 == host::L0::KvmInBochs {
        for need in &linux::NEEDS {
            doctor.need("Linux", need);
        }
        match linux::ready(&paths, linux::Kernel::Newest) {
            Some(linux) => doctor.say(State::Ok, "Linux", &format!("{}: {}", linux.release, linux.folder.display())),
            None => doctor.say(State::Will, "Linux", "a kernel package will be fetched and unpacked, not installed"),
        }
    }
    cache(&mut doctor, &paths);
    let (blocked, to_do, packages) = (doctor.blocked, doctor.to_do, doctor.packages);
    if let Some(output) = &report {
        doctor_report::write(ui, args, &doctor.said, blocked == 0, output)?;
    }
    if blocked == 0 {
        let text = if to_do == 0 { "`./nvmx run` can start" } else { "`./nvmx run` sets up what is missing" };
        ui.line(text);
        return Ok(());
    }
    let todo = if packages.is_empty() { Vec::new() } else { vec![apt::command_line(&packages)] };
    let things = if blocked == 1 { "1 thing is".into() } else { format!("{blocked} things are") };
    Err(Stop::Environment { what: format!("`./nvmx run` cannot work here yet: {things} missing"), todo }.into())
}

/// What a release has ready: nothing of it is built here.
fn released(doctor: &mut Doctor<'_>, release: &Release) {
    match release.toolchain() {
        Ok(made) => doctor.say(State::Ok, "release", &format!("images by {}", made.text)),
        Err(error) => doctor.say(State::Missing, "release", &format!("{error:#}")),
    }
    let images = release.image_folder();
    let count = std::fs::read_dir(&images).map_or(0, |entries| entries.flatten().count());
    match images.join("nvmx").is_file() {
        true => doctor.say(State::Ok, "images", &format!("{count} in {}", images.display())),
        false => doctor.say(State::Missing, "images", &format!("{} has no nvmx", images.display())),
    }
    let path = release.bochs();
    match bochs::look_at(&path) {
        Ok(bochs) => {
            doctor.say(State::Ok, "Bochs", &format!("{} with nvmx's fixes: {}", bochs.version, path.display()))
        }
        Err(error) => doctor.say(State::Missing, "Bochs", &format!("{}: {error:#}", path.display())),
    }
}

fn compiler(doctor: &mut Doctor<'_>, paths: &Paths) {
    if let Some(host) = Compiler::of_host() {
        doctor.say(State::Ok, "cargo", &format!("{} (Rust {})", host.cargo.display(), host.release()));
    }
    if let Some(toolchain) = toolchain::ready(paths) {
        return doctor.say(State::Ok, "compiler", &toolchain.text);
    }
    let distribution = Compiler::of_distribution();
    if let Some(c) = distribution.filter(|c| c.sources().is_some()) {
        let text =
            format!("core for the bare machine will be made from the sources of {} (1 minute)", c.rustc.display());
        return doctor.say(State::Will, "compiler", &text);
    }
    if doctor.can_install() {
        doctor.say(State::Will, "compiler", "the distribution's Rust and its sources will be installed");
    } else {
        let text = format!("no compiler for {}: `rustup target add {0}` gives one", toolchain::TARGET);
        doctor.say(State::Missing, "compiler", &text);
    }
}

/// Tells about KVM; whether it would be used.
fn l0(doctor: &mut Doctor<'_>, args: &DoctorArgs, facts: &HostFacts) -> bool {
    doctor.say(State::Info, "CPU", &facts.cpu);
    doctor.say(State::Info, "VMX", if facts.vmx { "Intel VMX is there" } else { "no Intel VMX" });
    let device = match facts.device {
        Device::Missing => "/dev/kvm is not there",
        Device::Denied => "/dev/kvm may not be opened by you",
        Device::Usable => "/dev/kvm can be used",
    };
    doctor.say(State::Info, "KVM", device);
    if let Some(nested) = &facts.nested {
        doctor.say(State::Info, "nesting", &format!("kvm_intel nested={nested}"));
    }
    if facts.apicv.as_deref() == Some("N") {
        let late = "KVM runs without it: an interrupt may take L3 out late (docs/running.md, KVM on Bochs)";
        doctor.say(State::Info, "APICv", late);
    }
    let own = args.bochs.is_some() && args.l0 != host::L0::KvmInBochs;
    let wish = if own { host::L0::Bochs } else { args.l0 };
    match host::choose(wish, facts) {
        Ok(choice) => {
            let name = if choice.kvm { "KVM" } else { "Bochs" };
            doctor.say(State::Ok, "L0", &format!("{name}, because {}", choice.why));
            if let (false, true, Some((_, Some(help)))) = (choice.kvm, facts.vmx, facts.obstacle()) {
                doctor.say(State::Info, "", &format!("for KVM: {help}"));
            }
            choice.kvm
        }
        Err((what, help)) => {
            let other = if facts.vmx { String::new() } else { "; --l0 bochs emulates a CPU that has it".into() };
            let help = help.map_or(other, |h| format!("; this helps: {h}"));
            doctor.say(State::Missing, "L0", &format!("KVM cannot be used: {what}{help}"));
            true
        }
    }
}

fn emulator(doctor: &mut Doctor<'_>, paths: &Paths, args: &DoctorArgs) {
    if let Some(path) = &args.bochs {
        match bochs::look_at(path) {
            Ok(b) => {
                let lost = b.lost.map_or(String::new(), |l| format!(" ({l})"));
                doctor.say(State::Ok, "Bochs", &format!("{} {}{lost}", path.display(), b.version));
            }
            Err(error) => doctor.say(State::Missing, "Bochs", &format!("{}: {error}", path.display())),
        }
        return;
    }
    match bochs::built(paths) {
        Ok(own) if own.exists() => {
            return doctor.say(State::Ok, "Bochs", &format!("3.0 with nvmx's fixes: {}", own.display()));
        }
        Ok(_) => {}
        Err(error) => return doctor.say(State::Missing, "Bochs", &format!("{error:#}")),
    }
    let installed = nvmx_setup::program("bochs");
    let missing: Vec<&'static str> =
        bochs::BUILD_NEEDS.iter().filter(|n| n.find().is_none()).map(|n| n.package).collect();
    if doctor.power != Power::None && (missing.is_empty() || doctor.can_install()) {
        doctor.say(State::Will, "Bochs", "3.0 will be built from Debian's source package (2 minutes)");
    } else if let Some(path) = installed {
        doctor.say(State::Ok, "Bochs", &format!("{} (installed; slower and without nvmx's fixes)", path.display()));
    } else {
        doctor.say(State::Missing, "Bochs", "3.0 cannot be built yet, and none is installed");
        doctor.packages.extend(missing);
    }
}

fn cache(doctor: &mut Doctor<'_>, paths: &Paths) {
    doctor.say(State::Info, "cache", &paths.cache.display().to_string());
    let mut names: Vec<String> = std::fs::read_dir(&paths.cache)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.path().is_dir())
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let text = if names.is_empty() { "(empty)".into() } else { names.join(", ") };
    doctor.say(State::Info, "", &text);
}
