//! The part of init that makes this Linux the control domain of Xen: what its tools talk to, and what Xen is.

use crate::console::Console;
use crate::facts;
use crate::init;
use crate::plan::Item;
use crate::program;
use anyhow::{Context, Result, ensure};
use l2_protocol::{Kind, Level};
use std::process::Command;

const SYS: &str = "/sys/hypervisor";

/// Mounts what the tools need, and runs the services in their order.
///
/// # Errors
/// If there is no Xen below, or a service fails.
pub fn start(services: &[Item]) -> Result<()> {
    init::mount_all(&[("xenfs", "/proc/xen"), ("devpts", "/dev/pts")])?;
    for service in services {
        let status = Command::new(&service.path)
            .args(program::arguments(&service.args))
            .status()
            .with_context(|| format!("cannot start {}", service.path))?;
        ensure!(status.success(), "{}: {status}", service.path);
    }
    Ok(())
}

/// Xen's version and the kinds of guests that it can have.
///
/// # Errors
/// If there is no Xen below.
pub fn tell(console: &mut Console) -> Result<()> {
    let read = |name: &str| -> Result<String> {
        let text =
            std::fs::read_to_string(format!("{SYS}/{name}")).with_context(|| format!("no {SYS}/{name}: no Xen"))?;
        Ok(text.trim().to_string())
    };
    let version = format!("{}.{}{}", read("version/major")?, read("version/minor")?, read("version/extra")?);
    let guests = read("properties/capabilities")?;
    let hello = [("name", "xen"), ("version", &version), ("cpu", &facts::cpu("model name")?), ("features", "")];
    facts::record(console, Level::L2, Kind::Hello, &hello);
    let check = [("name", "xen"), ("version", &version), ("guests", &guests)];
    facts::record(console, Level::L2, Kind::Check, &check);
    Ok(())
}
