//! CPUs that go offline and come back, as a kernel does it: an INIT and two start-up messages for each.

use crate::console::Console;
use crate::facts;
use anyhow::{Context, Result};
use l2_protocol::{Kind, Level};
use std::path::Path;

const CPUS: &str = "/sys/devices/system/cpu";
/// How often each goes and comes.
const TURNS: usize = 3;

/// Takes all CPUs but the first one offline, each alone and then all together, and brings them back; a record tells which were there.
///
/// # Errors
/// What the kernel refuses.
pub fn run(console: &mut Console) -> Result<()> {
    let cpus = facts::cpus();
    if cpus < 2 {
        return Ok(());
    }
    for _ in 0..TURNS {
        for cpu in 1..cpus {
            set(cpu, false)?;
            set(cpu, true)?;
        }
    }
    (1..cpus).try_for_each(|cpu| set(cpu, false))?;
    let without = online()?;
    (1..cpus).try_for_each(|cpu| set(cpu, true))?;
    let fields = [("name", "offline and online"), ("without", without.as_str()), ("with", &online()?)];
    facts::record(console, Level::L2, Kind::Check, &fields);
    Ok(())
}

fn set(cpu: usize, on: bool) -> Result<()> {
    let path = Path::new(CPUS).join(format!("cpu{cpu}/online"));
    let how = if on { "online" } else { "offline" };
    std::fs::write(path, if on { "1" } else { "0" }).with_context(|| format!("CPU {cpu} does not go {how}"))
}

fn online() -> Result<String> {
    let text = std::fs::read_to_string(Path::new(CPUS).join("online")).context("no list of CPUs")?;
    Ok(text.trim().to_string())
}
