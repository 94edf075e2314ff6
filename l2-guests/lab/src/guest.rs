//! The guest's side: how it asks its hypervisor, and how a measured program runs in it.

use core::arch::asm;
use l2_kit::Global;

/// RAX of a VMCALL that begins the bracket.
pub const BEGIN: u64 = 0x1AB0;
/// ... that ends it.
pub const END: u64 = 0x1AB1;
/// ... after which the guest does not run any more.
pub const DONE: u64 = 0x1AB2;

/// VMCALL: RAX = number, RBX and RCX = arguments, all registers as before.
#[inline(always)]
pub fn call(number: u64, b: u64, c: u64) {
    // SAFETY: the hypervisor returns after the instruction with all registers as they were.
    unsafe {
        asm!("xchg rbx, {b}", "vmcall", "xchg rbx, {b}", b = inout(reg) b => _, in("rax") number, in("rcx") c, options(nostack));
    }
}

/// What a guest runs next.
pub static PROGRAM: Global<fn(u64)> = Global::new(|_| {});

/// Where a guest starts: RDI = how many events, RSI = how many before the bracket.
pub extern "C" fn start(count: u64, warm_up: u64) -> ! {
    let program = PROGRAM.get();
    if warm_up > 0 {
        program(warm_up);
    }
    call(BEGIN, 0, 0);
    program(count);
    call(END, 0, 0);
    call(DONE, 0, 0);
    unreachable!("the hypervisor does not come back to a guest that is done")
}

/// Repeats one instruction.
macro_rules! repeat {
    ($count:ident, $($asm:tt)*) => {
        for _ in 0..$count {
            // SAFETY: the instruction and its exit leave everything that is not named as output as it was.
            unsafe { core::arch::asm!($($asm)*, options(nostack)) };
        }
    };
}
pub(crate) use repeat;
