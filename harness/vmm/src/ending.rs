//! The end of the machine while a guest works in it, as its user might order it: by the kernel, which tells KVM first.

use crate::console::{Console, inb, outb};
use crate::facts;
use crate::plan::Ending;
use anyhow::{Context, Result, bail, ensure};
use l2_protocol::{Kind, Level};
use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;

/// CMOS memory: index and data. It outlasts a reset, and nothing on a PC uses its last bytes.
const CMOS: u16 = 0x70;
const PLACE: u8 = 0x7D;
/// Written there before the reset.
const MARK: u8 = 0x5A;

/// Ends the machine, for a reset only once: after it everything takes its usual course.
///
/// # Errors
/// What the kernel says if it goes on.
pub fn end(ending: Ending, console: &mut Console) -> Result<()> {
    let how = match ending {
        Ending::Reset => {
            if take_mark() {
                return Ok(());
            }
            leave_mark(MARK);
            console.log("INFO", "resetting the machine while its guest works");
            libc::RB_AUTOBOOT
        }
        Ending::PowerOff => {
            console.log("INFO", "switching the machine off while its guest works");
            facts::record(console, Level::L2, Kind::End, &[("status", "pass"), ("failed", "0")]);
            libc::RB_POWER_OFF
        }
        Ending::Kexec => {
            console.log("INFO", "starting another kernel while the guest of this one works");
            load_kernel()?;
            libc::LINUX_REBOOT_CMD_KEXEC
        }
    };
    // SAFETY: reboot has no memory arguments here.
    unsafe { libc::reboot(how) };
    bail!("the machine does not end: {}", std::io::Error::last_os_error())
}

/// Loads the kernel that is started next, with this one's command line.
///
/// Source: Linux manual pages, kexec_file_load(2).
fn load_kernel() -> Result<()> {
    let (kernel, initramfs) = (File::open("/vmlinuz")?, File::open("/after.initramfs")?);
    let line = std::fs::read_to_string("/proc/cmdline").context("no command line")?;
    let line = CString::new(line.trim())?;
    let (length, flags) = (line.as_bytes_with_nul().len(), 0);
    // SAFETY: the descriptors are open, and the text of this length lives until the call returns.
    let failed = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            length,
            line.as_ptr(),
            flags as libc::c_ulong,
        )
    };
    ensure!(failed == 0, "the kernel loads no other one: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Whether the mark is there; it is not afterwards.
fn take_mark() -> bool {
    outb(CMOS, PLACE);
    let marked = inb(CMOS + 1) == MARK;
    leave_mark(0);
    marked
}

fn leave_mark(mark: u8) {
    outb(CMOS, PLACE);
    outb(CMOS + 1, mark);
}
