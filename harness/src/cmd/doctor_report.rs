//! `doctor --report FILE`: one archive with what a maintainer needs to understand a machine, and nothing private.

use crate::backend::Unit;
use crate::cli::{DiffArgs, DoctorArgs, Fields, L0Args};
use crate::cmd::diff;
use crate::cmd::run::{MEDIANS, both};
use crate::image::Wanted;
use crate::report::{self, spread, table};
use crate::session::{LONG, Session};
use crate::suite::compare::Comparison;
use crate::transcript::Line;
use crate::transcript::stack;
use anyhow::{Context, Result};
use nvmx_setup::error::Stop;
use nvmx_setup::output::Output;
use nvmx_setup::proc;
use nvmx_setup::ui::Ui;
use std::fmt::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

/// VMX's capability MSRs, and the one that says whether VMX is on.
const MSRS: [(u32, &str); 22] = [
    (0x3A, "IA32_FEATURE_CONTROL"),
    (0x480, "IA32_VMX_BASIC"),
    (0x481, "IA32_VMX_PINBASED_CTLS"),
    (0x482, "IA32_VMX_PROCBASED_CTLS"),
    (0x483, "IA32_VMX_EXIT_CTLS"),
    (0x484, "IA32_VMX_ENTRY_CTLS"),
    (0x485, "IA32_VMX_MISC"),
    (0x486, "IA32_VMX_CR0_FIXED0"),
    (0x487, "IA32_VMX_CR0_FIXED1"),
    (0x488, "IA32_VMX_CR4_FIXED0"),
    (0x489, "IA32_VMX_CR4_FIXED1"),
    (0x48A, "IA32_VMX_VMCS_ENUM"),
    (0x48B, "IA32_VMX_PROCBASED_CTLS2"),
    (0x48C, "IA32_VMX_EPT_VPID_CAP"),
    (0x48D, "IA32_VMX_TRUE_PINBASED_CTLS"),
    (0x48E, "IA32_VMX_TRUE_PROCBASED_CTLS"),
    (0x48F, "IA32_VMX_TRUE_EXIT_CTLS"),
    (0x490, "IA32_VMX_TRUE_ENTRY_CTLS"),
    (0x491, "IA32_VMX_VMFUNC"),
    (0x492, "IA32_VMX_PROCBASED_CTLS3"),
    (0x493, "IA32_VMX_EXIT_CTLS2"),
    (0x10A, "IA32_ARCH_CAPABILITIES"),
];

/// What of a CPU in /proc/cpuinfo says which CPU it is and what it can do.
const CPUINFO: [&str; 10] = [
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "microcode",
    "flags",
    "vmx flags",
    "bugs",
    "address sizes",
];

/// Makes the archive. `doctor` is what `doctor` printed, `works` whether boots can be made.
///
/// # Errors
/// [`Stop::Usage`] if the file cannot be written; [`Stop::Environment`] if something cannot be set up.
pub fn write(ui: &Ui, args: &DoctorArgs, doctor: &str, works: bool, output: &Output) -> Result<()> {
    let work = tempfile::tempdir()?;
    let folder = work.path().join("nvmx-doctor");
    std::fs::create_dir(&folder)?;
    let put = |name: &str, text: &str| std::fs::write(folder.join(name), without_names(text));
    put("doctor.txt", doctor)?;
    put("cpu.txt", &cpu(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()))?;
    put("msrs.txt", &msrs(Path::new("/dev/cpu/0/msr")))?;
    put("system.txt", &system())?;
    if works {
        boots(ui, args, &put)?;
    } else {
        put("run.txt", "No boots: `./nvmx run` cannot work on this machine yet, see doctor.txt.\n")?;
    }
    let archive = work.path().join("report.tar.gz");
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "-czf"]).arg(&archive);
    let said = proc::run(tar.arg("-C").arg(work.path()).arg("nvmx-doctor"), None, |_| {})?;
    if !said.status.success() {
        return Err(Stop::environment(format!("tar cannot make the archive:\n{}", said.tail(5))).into());
    }
    output.write_bytes(&std::fs::read(&archive).context("tar left no archive")?)?;
    ui.line(&format!(
        "the report is {}: CPU, VMX capabilities, kernel, QEMU, doctor, table, vmxtest alone and under nvmx. Have a look (tar -tzf) \
         before you send it",
        output.name()
    ));
    Ok(())
}

/// The table of `run`, and vmxtest alone (as L1 where KVM is L0) and under nvmx.
fn boots(ui: &Ui, args: &DoctorArgs, put: &impl Fn(&str, &str) -> std::io::Result<()>) -> Result<()> {
    let l0 = L0Args { l0: args.l0, bochs: args.bochs.clone(), cpu_model: None, memory: 256, cpus: 1, timeout: None };
    let mut session = Session::start_with(ui, &l0, &Wanted::All)?;
    let unit = session.backend.unit();
    let measured = if unit == Unit::Cycles { MEDIANS } else { "" };
    let specs = [session.bare("cascade", measured)?, session.nested("cascade", measured, Fields::Auto)?];
    let noise = session.backend.noise(&session.machine);
    let (bare, nested) = both(&session, [&specs[0], &specs[1]], "cascade alone, and under nvmx")?;
    let events = report::events(Some(&bare.transcript), &nested.transcript);
    let mut text = String::new();
    for level in stack::stack(session.l0(), &nested.transcript) {
        let _ = writeln!(text, "{} | {}", level.level, stack::banner_line(&level, None));
    }
    let _ =
        writeln!(text, "compiler: {}\n\n{}\n{}", session.toolchain.text, table::title(unit), table::render(&events));
    let told_below = table::footer(&events, unit).into_iter().chain(spread::lines(&events));
    told_below.chain(noise).for_each(|line| text += &format!("{line}\n"));
    for outcome in [&bare, &nested] {
        let how = outcome.verdict().err().unwrap_or_else(|| "passed".into());
        let _ = writeln!(text, "{}: {how} ({:.1} s)", outcome.name, outcome.took.as_secs_f64());
        if outcome.verdict().is_err() {
            outcome.post_mortem().iter().for_each(|line| text += &format!("  {line}\n"));
        }
    }
    put("run.txt", &text)?;
    session.timeout = LONG;
    let diff = DiffArgs {
        l2: Some("vmxtest".into()),
        l2_args: String::new(),
        seed: 1,
        cases: 250,
        shard: None,
        fields: Fields::Auto,
        json: None,
        l0,
    };
    let [alone, under] = diff::boots(ui, &session, &diff, "vmxtest", &diff.guest_args("vmxtest"))?;
    let (found, problems) = diff::compared(&alone, &under);
    put("vmxtest.txt", &told(&found, &problems))?;
    for outcome in [&alone, &under] {
        let lines: Vec<String> = outcome.transcript.lines.iter().map(Line::raw).collect();
        put(&format!("{}.log", outcome.name), &(lines.join("\n") + "\n"))?;
    }
    Ok(())
}

fn told(found: &Comparison, problems: &[String]) -> String {
    let mut text = format!(
        "vmxtest alone and under nvmx: {} records compared, {} differ, {} of another kind are known and explained\n",
        found.compared,
        found.differ.len(),
        found.waived
    );
    problems.iter().for_each(|problem| text += &format!("{problem}\n"));
    for difference in &found.differ {
        difference.lines("alone", "under nvmx").iter().for_each(|line| text += &format!("{line}\n"));
    }
    text
}

/// The first CPU of /proc/cpuinfo and how many there are; no serial numbers are in it.
fn cpu(cpuinfo: &str) -> String {
    let first = cpuinfo.split("\n\n").next().unwrap_or("");
    let wanted = |line: &&str| CPUINFO.contains(&line.split(':').next().unwrap_or("").trim());
    let mut text: String = first.lines().filter(wanted).map(|line| format!("{line}\n")).collect();
    let count = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let _ = writeln!(text, "processors\t: {count}");
    text
}

/// The capability MSRs where the kernel lets them be read.
fn msrs(device: &Path) -> String {
    let file = match std::fs::File::open(device) {
        Ok(file) => file,
        Err(error) => {
            let help = "`sudo modprobe msr`, then `sudo ./nvmx doctor --report FILE`, has them in";
            return format!("not readable ({}: {error}); {help}\n", device.display());
        }
    };
    let mut text = String::new();
    for (number, name) in MSRS {
        let mut bytes = [0; 8];
        let value = match file.read_exact_at(&mut bytes, number.into()) {
            Ok(()) => format!("{:#018x}", u64::from_le_bytes(bytes)),
            Err(_) => "none".into(),
        };
        let _ = writeln!(text, "{number:#05x} {name:32} {value}");
    }
    text
}

/// Kernel, KVM's parameters, QEMU.
fn system() -> String {
    let mut text = format!("nvmx {}\n", env!("CARGO_PKG_VERSION"));
    for (name, program, arguments) in
        [("kernel", "uname", "-srvm"), ("QEMU", "qemu-system-x86_64", "--version"), ("compiler", "rustc", "--version")]
    {
        let said = proc::stdout_of(Command::new(program).arg(arguments)).unwrap_or_else(|_| "none".into());
        let _ = writeln!(text, "{name}: {}", said.lines().next().unwrap_or(""));
    }
    let parameters = std::fs::read_dir("/sys/module/kvm_intel/parameters").into_iter().flatten().flatten();
    let mut list: Vec<String> = parameters
        .map(|entry| {
            let value = std::fs::read_to_string(entry.path()).unwrap_or_default();
            format!("kvm_intel {}={}", entry.file_name().to_string_lossy(), value.trim())
        })
        .collect();
    list.sort();
    if list.is_empty() {
        list.push("kvm_intel: not loaded".into());
    }
    text + &list.join("\n") + "\n"
}

/// Without names of the user, the machine and home folders.
fn without_names(text: &str) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let home = std::env::var("HOME").unwrap_or_default();
    let user = std::env::var("USER").unwrap_or_default();
    hidden(text, &[(home.trim(), "~"), (host.trim(), "(this machine)"), (user.trim(), "(you)")])
}

/// Replaces words; short ones and `root` would take too much with them.
fn hidden(text: &str, names: &[(&str, &str)]) -> String {
    let mut text = text.to_string();
    for (name, instead) in names.iter().filter(|(name, _)| name.len() > 3 && *name != "root" && *name != "localhost") {
        text = text.replace(name, instead);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_told_without_what_changes_or_names_somebody() {
        let cpuinfo = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: X\ncpu MHz\t\t: 800.1\nflags\t\t: vmx\n\nprocessor\t: 1\nvendor_id\t: Y\n";
        assert_eq!(cpu(cpuinfo), "vendor_id\t: GenuineIntel\nmodel name\t: X\nflags\t\t: vmx\nprocessors\t: 2\n");
    }

    #[test]
    fn names_of_people_and_machines_are_left_out() {
        let names =
            [("/home/jane", "~"), ("jane-laptop", "(this machine)"), ("jane", "(you)"), ("root", "x"), ("", "y")];
        let text = hidden("/home/jane/nvmx on jane-laptop, by jane as root", &names);
        assert_eq!(text, "~/nvmx on (this machine), by (you) as root");
    }

    #[test]
    fn msrs_are_read_from_their_numbers_and_what_cannot_be_read_is_told() {
        let folder = tempfile::tempdir().unwrap();
        assert!(msrs(&folder.path().join("none")).contains("modprobe msr"));
        let file = folder.path().join("msr");
        let mut bytes = vec![0u8; 0x481];
        bytes.resize(0x488, 0);
        bytes[0x480..0x488].copy_from_slice(&0x1234_u64.to_le_bytes());
        std::fs::write(&file, bytes).unwrap();
        let text = msrs(&file);
        assert!(text.contains("IA32_VMX_BASIC                   0x0000000000001234"), "{text}");
        assert!(text.lines().any(|l| l.contains("IA32_VMX_VMFUNC") && l.ends_with("none")), "{text}");
    }
}
