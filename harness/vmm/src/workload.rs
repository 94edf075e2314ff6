//! What the innermost Linux does: a little of everything that makes exits. It prints, reads CPUID, touches memory, sleeps,
//! forks; each step is a record, the same on every machine.

use crate::console::Console;
use crate::facts::{cpus, record, ticks};
use anyhow::{Result, ensure};
use l2_protocol::{Kind, Level};
use raw_cpuid::native_cpuid::cpuid_count;
use std::time::{Duration, Instant};

const MEMORY: usize = 64 << 20;
const PAGE: usize = 4096;
const CPUIDS: u32 = 100;
const SLEEPS: u32 = 5;
const SLEEP: Duration = Duration::from_millis(20);
const CHILDREN: i32 = 5;

/// Does it all. `boot` is what the TSC said at the first instruction of init.
///
/// # Errors
/// What Linux refuses.
pub fn run(console: &mut Console, boot: u64) -> Result<()> {
    let check = |console: &mut Console, fields: &[(&str, &str)]| record(console, Level::L3, Kind::Check, fields);
    record(console, Level::L3, Kind::Event, &[("name", "l3_boot"), ("count", "1"), ("ticks", &boot.to_string())]);
    record(console, Level::L3, Kind::Say, &[("text", "Hello from Linux: booted, now a little work.")]);
    let start = ticks();
    let (vendor, features) = (cpuid_count(0, 0), cpuid_count(1, 0));
    let vendor = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
    let hypervisor = (features.ecx >> 31 & 1).to_string();
    for leaf in 0..CPUIDS {
        std::hint::black_box(cpuid_count(leaf % 8, 0));
    }
    check(console, &[("name", "cpus"), ("count", &cpus().to_string())]);
    check(console, &[("name", "cpuid"), ("vendor", &String::from_utf8_lossy(&vendor)), ("hypervisor", &hypervisor)]);
    check(console, &[("name", "memory"), ("sum", &touch().to_string())]);
    let slept = (0..SLEEPS).all(|_| {
        let before = Instant::now();
        std::thread::sleep(SLEEP);
        // Longer is allowed, by a tick of the kernel for instance; a lost timer would hang.
        before.elapsed() >= SLEEP
    });
    check(console, &[("name", "sleep"), ("long_enough", &slept.to_string())]);
    check(console, &[("name", "fork"), ("sum", &fork()?.to_string())]);
    let work = (ticks() - start).to_string();
    record(console, Level::L3, Kind::Event, &[("name", "l3_work"), ("count", "1"), ("ticks", &work)]);
    Ok(())
}

/// Writes each page of some memory and reads them all back.
fn touch() -> u64 {
    let mut memory = vec![0u8; MEMORY];
    memory.iter_mut().step_by(PAGE).zip((0..=255u8).cycle()).for_each(|(byte, n)| *byte = n);
    std::hint::black_box(&mut memory).iter().step_by(PAGE).map(|byte| u64::from(*byte)).sum()
}

/// The sum of what some children return.
fn fork() -> Result<i32> {
    let mut sum = 0;
    for n in 1..=CHILDREN {
        // SAFETY: init has one thread, so the child is a whole process; it ends at once without unwinding.
        let child = unsafe { libc::fork() };
        ensure!(child >= 0, "cannot fork: {}", std::io::Error::last_os_error());
        if child == 0 {
            // SAFETY: ends the child.
            unsafe { libc::_exit(n) };
        }
        let mut status = 0;
        // SAFETY: the pointer is to a variable that lives until the call returns.
        let waited = unsafe { libc::waitpid(child, &mut status, 0) };
        ensure!(waited == child && libc::WIFEXITED(status), "a child was lost");
        sum += libc::WEXITSTATUS(status);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_counted() {
        let pages = (MEMORY / PAGE) as u64;
        assert_eq!(touch(), pages / 256 * (255 * 256 / 2));
    }
}
