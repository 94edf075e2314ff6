//! What this Linux says about the machine that it runs on, as records: so that two boots can be compared.

use crate::console::Console;
use crate::init;
use anyhow::{Context, Result};
use l2_protocol::{Kind, Level, Record};
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

/// Messages up to this priority are warnings or worse.
const WARNING: u32 = 4;

/// Writes one record.
pub fn record(console: &mut Console, level: Level, kind: Kind, fields: &[(&str, &str)]) {
    let mut line = String::new();
    let mut record = Record::new(&mut line, level, kind);
    fields.iter().for_each(|(key, value)| record.add(key, value));
    // A string takes everything, and the keys are ours.
    if record.end().is_ok() {
        console.write(line.as_bytes());
    }
}

/// A measurement of this Linux, with what else was counted.
pub fn measured(console: &mut Console, name: &str, ticks: u64, counts: impl IntoIterator<Item = (&'static str, u64)>) {
    counted(console, name, 1, ticks, counts);
}

/// A measurement of so many of the same.
pub fn counted(
    console: &mut Console,
    name: &str,
    count: u32,
    ticks: u64,
    counts: impl IntoIterator<Item = (&'static str, u64)>,
) {
    let counts: Vec<(&str, String)> = [("count", count.into()), ("ticks", ticks)]
        .into_iter()
        .chain(counts)
        .map(|(k, n): (_, u64)| (k, n.to_string()))
        .collect();
    let mut fields = vec![("name", name)];
    fields.extend(counts.iter().map(|(key, count)| (*key, count.as_str())));
    record(console, Level::L2, Kind::Event, &fields);
}

/// How many CPUs Linux runs.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Ticks of the TSC.
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux lets programs use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// What `/proc/cpuinfo` says of the first CPU under a key.
///
/// # Errors
/// If there is no `/proc`.
pub fn cpu(key: &str) -> Result<String> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").context("no /proc")?;
    let line = cpuinfo.lines().find_map(|l| l.strip_prefix(key)?.trim_start().strip_prefix(':'));
    Ok(line.unwrap_or_default().trim().to_string())
}

/// This Linux as the guest hypervisor.
///
/// # Errors
/// If the kernel does not tell.
pub fn tell_linux(console: &mut Console) -> Result<()> {
    let (release, cpu, vmx) = (init::release()?, cpu("model name")?, cpu("vmx flags")?);
    let hello = [("name", "linux"), ("version", &release), ("cpu", &cpu), ("features", &vmx)];
    record(console, Level::L2, Kind::Hello, &hello);
    Ok(())
}

/// How long the boot took, which Linux on which CPU, and each warning of the kernel.
///
/// # Errors
/// If the kernel does not tell.
pub fn tell(console: &mut Console, ticks: u64) -> Result<()> {
    let (release, flags, vmx) = (init::release()?, cpu("flags")?, cpu("vmx flags")?);
    let has_vmx = flags.split(' ').any(|f| f == "vmx").to_string();
    let facts = [("name", "linux"), ("release", &release), ("vmx", &has_vmx), ("cpus", &cpus().to_string())];
    record(console, Level::L2, Kind::Check, &facts);
    record(console, Level::L2, Kind::Event, &[("name", "cpu"), ("flags", &flags), ("vmx_flags", &vmx)]);
    measured(console, "linux_boot", ticks, []);
    for warning in warnings()? {
        record(console, Level::L2, Kind::Event, &[("name", "warning"), ("text", &warning)]);
    }
    Ok(())
}

/// The kernel's messages that are warnings or worse.
fn warnings() -> Result<Vec<String>> {
    let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
    let mut buffer = vec![0; 8192];
    let mut found = Vec::new();
    // A read gives one message; at the end it would block.
    while let Ok(length @ 1..) = log.read(&mut buffer) {
        found.extend(warning(&String::from_utf8_lossy(&buffer[..length])));
    }
    Ok(found)
}

/// The text of a message `priority,number,time,flags;text`, if it is a warning of the kernel.
///
/// Source: Linux documentation, "dev-kmsg".
fn warning(message: &str) -> Option<String> {
    let (head, text) = message.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    // The facility is above: the kernel's is 0.
    (priority <= WARNING).then(|| text.lines().next().unwrap_or_default().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_told_from_the_rest_and_lose_their_time() {
        assert_eq!(warning("4,7,12345,-;clock is odd\n SUBSYSTEM=x\n").as_deref(), Some("clock is odd"));
        assert_eq!(warning("6,7,12345,-;all is well\n"), None);
        assert_eq!(warning("12,7,12345,-;a program says\n"), None);
        assert_eq!(warning("nonsense"), None);
    }
}
