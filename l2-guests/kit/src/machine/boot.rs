//! From the boot code to the guest's `guest_main`.

use super::{cpu, descriptors, pages, report, serial, trap};
use crate::boot_info::{BootInfo, Memory};

core::arch::global_asm!(include_str!("boot.s"));

/// Names the function that the kit calls when the machine is ready: `kit::entry!(main)` with `fn main(info: &BootInfo)`.
/// The image ends when it returns; its status tells whether a check failed.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        /// What the kit calls.
        #[unsafe(no_mangle)]
        extern "Rust" fn guest_main(info: &$crate::BootInfo) {
            let main: fn(&$crate::BootInfo) = $main;
            main(info)
        }
    };
}

unsafe extern "Rust" {
    fn guest_main(info: &BootInfo);
}

/// The first 4 GiB, mapped one to one.
struct Mapped;

impl Memory for Mapped {
    fn bytes(&self, address: u64, len: usize) -> &'static [u8] {
        if address == 0 || address.checked_add(len as u64).is_none_or(|end| end > 1 << 32) {
            return &[];
        }
        // SAFETY: the range is mapped (checked above), and nobody writes to the loader's information.
        unsafe { core::slice::from_raw_parts(address as *const u8, len) }
    }
}

#[unsafe(no_mangle)]
extern "C" fn kit_main(magic: u32, info: u64) -> ! {
    serial::init();
    descriptors::load(0);
    trap::load();
    // Every line of the two interrupt controllers off: a guest takes only interrupts it makes itself.
    cpu::out8(0x21, 0xFF);
    cpu::out8(0xA1, 0xFF);
    let info = BootInfo::read(&Mapped, magic, info);
    if info.command_line.split(' ').any(|word| word == "high") {
        let usable = |start, end| info.memory.iter().any(|r| r.usable && r.start <= start && end <= r.end);
        // SAFETY: nothing has run yet, and loaders put everything below 4 GiB.
        unsafe { pages::move_up(usable) };
    }
    // SAFETY: `entry!` defines it with this signature.
    unsafe { guest_main(&info) };
    report::end()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    report::die(format_args!("{info}"))
}
