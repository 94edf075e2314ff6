//! How nvmx ends: one record that says who, where and why, then the ports that stop an emulated machine.

use core::{
    fmt::{self, Arguments},
    panic::PanicInfo,
    sync::atomic::{AtomicBool, Ordering},
};

use l2_protocol::Kind;

use crate::{
    boot::options::Exit,
    hw::{cpu, halt::halt, port::outb, serial},
};

/// How the run ended, for the exit port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// As it should.
    Pass,
    /// Anything else.
    Fail,
}

/// Who died.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    /// The guest hypervisor: its machine ended for a reason that it can be told.
    Guest,
    /// nvmx itself: a bug, or an error of the machine.
    Nvmx,
}

/// The machine halts instead of being stopped: on one that is not emulated other devices could have the ports.
static HALT_ONLY: AtomicBool = AtomicBool::new(true);
/// An end within an end: write nothing more.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Takes over `exit=` of the command line; `emulated` is what `auto` goes by.
pub fn configure(exit: Exit, emulated: bool) {
    let ports = exit == Exit::Ports || exit == Exit::Auto && emulated;
    HALT_ONLY.store(!ports, Ordering::Relaxed);
}

/// Writes the epitaph and ends the run as failed.
///
/// `at` says where (an address, a file and line), `why` is for people. The last exits of L2 and L3 on this processor are
/// added from what the run loop noted.
pub fn epitaph(who: Who, at: Arguments<'_>, why: Arguments<'_>) -> ! {
    serial::dying();
    if ENDING.swap(true, Ordering::Relaxed) {
        end(Status::Fail);
    }
    serial::fresh_line();
    serial::record(Kind::Epitaph, |record| {
        let who = match who {
            Who::Guest => "L2",
            Who::Nvmx => "nvmx",
        };
        record.add("who", &who);
        record.add("where", &at);
        record.add("why", &why);
        let last = cpu::try_this().map(cpu::PerCpu::last_exits);
        let none = "none";
        for (key, exit) in [("last_l2", last.map(|l| l.guest)), ("last_l3", last.map(|l| l.nested))] {
            match exit.flatten() {
                Some(exit) => record.add(key, &format_args!("{exit}")),
                None => record.add(key, &none),
            }
        }
    });
    end(Status::Fail)
}

/// The panic handler: a panic is a bug in nvmx (invariant I6).
pub fn panic(info: &PanicInfo<'_>) -> ! {
    struct At<'a>(&'a PanicInfo<'a>);
    impl fmt::Display for At<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self.0.location() {
                Some(at) => write!(f, "{at}"),
                None => f.write_str("unknown"),
            }
        }
    }
    epitaph(Who::Nvmx, format_args!("{}", At(info)), format_args!("panic: {}", info.message()))
}

/// Ends the run: waits for the serial port, writes Bochs' and QEMU's exit ports, halts for good.
pub fn end(status: Status) -> ! {
    serial::drain();
    if !HALT_ONLY.load(Ordering::Relaxed) {
        let code = match status {
            Status::Pass => 0x10,
            Status::Fail => 0x11,
        };
        // SAFETY: 1. Bochs' shutdown port and QEMU's isa-debug-exit stop the machine. 2. On an emulated machine without them
        // the ports are unassigned, and on another one only the user's word leads here.
        unsafe {
            for byte in *b"Shutdown" {
                outb(0x8900, byte);
            }
            outb(0xF4, code);
        }
    }
    halt()
}
