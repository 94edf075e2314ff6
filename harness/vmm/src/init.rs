//! The part of init: file systems, kernel modules, and whether KVM is what it has to be.

use crate::plan::Item;
use anyhow::{Context, Result, ensure};
use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Mounts `/dev`, `/proc` and `/sys`.
///
/// # Errors
/// If the kernel has no such file system.
pub fn mount() -> Result<()> {
    mount_all(&[("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")])
}

/// Mounts file systems without a device, each by its kind at its place.
///
/// # Errors
/// If the kernel has no such file system.
pub fn mount_all(list: &[(&str, &str)]) -> Result<()> {
    for (kind, place) in list {
        // Where the kernel itself makes the folder, it is there.
        std::fs::create_dir_all(place)?;
        let (kind_c, place_c) = (CString::new(*kind)?, CString::new(*place)?);
        // SAFETY: the strings live until the call returns; the data pointer may be null.
        let failed =
            unsafe { libc::mount(kind_c.as_ptr(), place_c.as_ptr(), kind_c.as_ptr(), 0, std::ptr::null()) } != 0;
        let error = std::io::Error::last_os_error();
        // A kernel that mounts /dev by itself has done it before.
        ensure!(!failed || error.raw_os_error() == Some(libc::EBUSY), "cannot mount {place}: {error}");
    }
    Ok(())
}

/// Mounts the file system in which KVM shows its counters; without it there is nothing to read.
pub fn mount_debugfs() {
    let (kind, place) = (c"debugfs", c"/sys/kernel/debug");
    // SAFETY: the strings are constants; the data pointer may be null. Failing is no harm.
    unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
}

/// Loads a kernel module.
///
/// # Errors
/// What the kernel says; for the module of a CPU without VMX that is "operation not supported".
pub fn load_module(module: &Item) -> Result<()> {
    let file = File::open(&module.path).with_context(|| format!("kernel module {}", module.path))?;
    let args = CString::new(module.args.as_str())?;
    // SAFETY: the descriptor is open, the string lives until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), args.as_ptr(), 0) };
    let error = std::io::Error::last_os_error();
    // What kvm-intel answers on a CPU that does not show VMX.
    let lacking = error.raw_os_error() == Some(libc::EOPNOTSUPP) && module.path.ends_with("kvm-intel.ko");
    let why = if lacking { ": this CPU has no VMX" } else { "" };
    ensure!(
        result == 0 || error.raw_os_error() == Some(libc::EEXIST),
        "kernel module {} does not load: {error}{why}",
        module.path
    );
    Ok(())
}

fn parameter(name: &str) -> Option<String> {
    let text = std::fs::read_to_string(Path::new("/sys/module/kvm_intel/parameters").join(name)).ok()?;
    Some(text.trim().to_string())
}

/// The kernel's release.
///
/// # Errors
/// If there is no `/proc`.
pub fn release() -> Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/osrelease").context("no /proc")?.trim().to_string())
}

/// Unloads a kernel module, by the name of its file.
///
/// # Errors
/// What the kernel says.
pub fn unload_module(module: &Item) -> Result<()> {
    let name = module.path.trim_start_matches('/').trim_end_matches(".ko").replace('-', "_");
    let name_c = CString::new(name.as_str())?;
    // SAFETY: the string lives until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_delete_module, name_c.as_ptr(), libc::O_NONBLOCK) };
    ensure!(result == 0, "kernel module {name} does not unload: {}", std::io::Error::last_os_error());
    Ok(())
}

/// The kernel's release and the parameters of kvm_intel in one line.
///
/// # Errors
/// If there is no `/proc`.
pub fn describe_kvm() -> Result<String> {
    let release = release()?;
    let names = ["nested", "ept", "vpid", "unrestricted_guest", "enable_shadow_vmcs", "enable_apicv", "pml"];
    let parameters: Vec<String> =
        names.iter().filter_map(|name| Some(format!("{name}={}", parameter(name)?))).collect();
    Ok(format!("KVM of Linux {release}, {}", parameters.join(" ")))
}

/// Whether KVM can do what is needed.
///
/// # Errors
/// What it lacks.
pub fn check_kvm(nested: bool) -> Result<()> {
    ensure!(parameter("nested").is_some(), "kvm_intel is not there: this CPU has no VMX, or its module is not loaded");
    let on = |name: &str| matches!(parameter(name).as_deref(), Some("Y" | "1"));
    ensure!(!nested || on("ept"), "KVM works without EPT here: nvmx needs it");
    ensure!(!nested || on("nested"), "kvm_intel has nesting off: load it with nested=1");
    Ok(())
}
