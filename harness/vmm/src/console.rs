//! Where lines go: the debug port of an emulated machine, which costs the machine no time, or standard output.

use anyhow::{Result, ensure};
use std::io::Write;

/// Bochs shows what is written here, byte by byte.
const DEBUG_PORT: u16 = 0xE9;
/// Bochs ends when "Shutdown" is written here.
const SHUTDOWN_PORT: u16 = 0x8900;

/// The way out.
pub enum Console {
    /// The debug port
    DebugPort,
    /// Standard output
    Standard,
}

impl Console {
    /// The debug port; the process gets the right to use ports.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn debug_port() -> Result<Self> {
        // SAFETY: iopl has no memory arguments.
        let refused = unsafe { libc::iopl(3) };
        ensure!(refused == 0, "no right to use I/O ports: {}", std::io::Error::last_os_error());
        Ok(Console::DebugPort)
    }

    /// Standard output.
    ///
    /// # Errors
    /// Never; as [`Self::debug_port`].
    pub fn standard() -> Result<Self> {
        Ok(Console::Standard)
    }

    /// Writes bytes as they are.
    pub fn write(&mut self, bytes: &[u8]) {
        match self {
            Console::DebugPort => bytes.iter().for_each(|b| outb(DEBUG_PORT, *b)),
            // Who reads has gone: there is nobody left to tell.
            Console::Standard => drop(std::io::stdout().write_all(bytes).and_then(|()| std::io::stdout().flush())),
        }
    }

    /// A line for people, in the form of nvmx's own log.
    pub fn log(&mut self, level: &str, text: &str) {
        self.write(format!("[vmm {level:5}] {text}\n").as_bytes());
    }

    /// Ends the emulated machine.
    pub fn power_off(&mut self) -> ! {
        for byte in *b"Shutdown" {
            outb(SHUTDOWN_PORT, byte);
        }
        // On a machine without that port.
        // SAFETY: reboot has no memory arguments here.
        unsafe {
            libc::sync();
            libc::reboot(libc::RB_POWER_OFF);
        }
        loop {
            std::thread::park();
        }
    }
}

/// Writes a byte to a port; init alone has the right to.
pub fn outb(port: u16, byte: u8) {
    // SAFETY: 1. `debug_port` gave the process the right to use ports, else it gets a signal. 2. No port that is used here
    // has an effect on memory.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") port, in("al") byte, options(nomem, nostack, preserves_flags));
    }
}

/// Reads a byte from a port, as [`outb`].
pub fn inb(port: u16) -> u8 {
    let byte;
    // SAFETY: as there.
    unsafe {
        std::arch::asm!("in al, dx", in("dx") port, out("al") byte, options(nomem, nostack, preserves_flags));
    }
    byte
}
