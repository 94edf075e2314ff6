//! Exceptions that exit, single steps by the monitor trap flag, and the preemption timer (SDM "Exceptions" of "Other Causes
//! of VM Exits", "Monitor Trap Flag", "VMX-Preemption Timer").

use crate::guest::{Exit, Guest, Program};
use core::arch::global_asm;
use l2_kit::{
    Check, caps, cpu, fields as f, log,
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Kind, Missing, exit_controls, pin, primary, secondary},
    trap, vmx,
    vmx::reason as r,
};

const VALID: u64 = 1 << 31;
const ERROR: u64 = 1 << 11;
const HARDWARE: u64 = 3 << 8;
const PRIVILEGED: u64 = 5 << 8;
const SOFTWARE: u64 = 6 << 8;

/// Exit reason "monitor trap flag"
const TRAP_FLAG_EXIT: u32 = 37;

/// Each program has 32 bytes.
const STRIDE: u64 = 32;

macro_rules! cases {
    ($($name:literal $text:literal $info:expr, $error:literal $qualification:expr, $at:literal;)*) => {
        /// Name, interruption information, error code, qualification, offset of the instruction that faults, or -1 for the
        /// one after it
        const CASES: &[(&str, u64, u64, u64, u64)] = &[ $( ($name, $info, $error, $qualification, $at), )* ];
        global_asm!(
            ".pushsection .text.vmxtest_traps, \"ax\"",
            ".balign 32",
            "vmxtest_traps:",
            $( ".balign 32", $text, "mov eax, 5", "ret", )*
            ".popsection",
        );
    };
}

cases! {
    "#DE" "xor ecx, ecx\ndiv ecx" HARDWARE, 0 0, 2;
    "#DB by a single step" "pushfq\nor dword ptr [rsp], 0x100\npopfq\nnop" HARDWARE | 1, 0 1 << 14, 10;
    "#DB by INT1" ".byte 0xF1" PRIVILEGED | 1, 0 0, 0;
    "#BP" "int3" SOFTWARE | 3, 0 0, 0;
    "#UD" "ud2" HARDWARE | 6, 0 0, 0;
    "#SS" "mov rcx, rbp\nmov rbp, 1\nror rbp, 2\nmov rax, [rbp]\nmov rbp, rcx" HARDWARE | ERROR | 12, 0 0, 14;
    "#GP" "mov eax, 0x7ff8\nmov fs, eax" HARDWARE | ERROR | 13, 0x7FF8 0, 5;
    "#PF" "mov rax, 0x140000000\nmov byte ptr [rax + 5], 0" HARDWARE | ERROR | 14, 2 0x1_4000_0005, 10;
}

unsafe extern "C" {
    static vmxtest_traps: u8;
}

fn program(number: u64) -> (Program, u64) {
    let code = &raw const vmxtest_traps as u64 + number * STRIDE;
    // SAFETY: a program is code that returns.
    (unsafe { core::mem::transmute::<u64, Program>(code) }, code)
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    exceptions(&mut guest);
    trap_flag(&mut guest);
    pending_trap_flag(&mut guest);
    timer(&mut guest);
    timer_over_exits(&mut guest);
    Ok(())
}

/// Intercepted, each exits with its information; then the guest gets it injected, or goes on as a debugger would have it.
fn exceptions(guest: &mut Guest) {
    vmx::write(f::EXCEPTION_BITMAP, 0xFFFF_FFFF);
    for (number, (name, info, error, qualification, at)) in (0u64..).zip(CASES) {
        let (program, code) = program(number);
        let exit = guest.execute(program, 5);
        let got = vmx::read(f::EXIT_INTERRUPTION_INFO);
        let mut out = Serial;
        let mut check = Check::new(&mut out, format_args!("exception {name}"))
            .expect("result", exit, Exit::Reason(r::EXCEPTION_OR_NMI, *qualification))
            // Bit 12 is undefined unless an IRET faulted.
            .expect("info", Hex(got & !(1 << 12)), Hex(VALID | info))
            .expect("rip", Hex(vmx::read(f::GUEST_RIP)), Hex(code + at));
        if info & ERROR != 0 {
            check = check.expect("error", Hex(vmx::read(f::EXIT_INTERRUPTION_ERROR)), Hex(*error));
        }
        if info >> 8 & 7 >= PRIVILEGED >> 8 {
            check = check.expect("length", vmx::read(f::EXIT_INSTRUCTION_LENGTH), 1);
        }
        check.fact("pending_debug", Hex(vmx::read(f::GUEST_PENDING_DEBUG))).end();
    }
    // Two breakpoints, each skipped as its length says
    let (breakpoint, code) = program(3);
    let first = guest.execute(breakpoint, 5);
    vmx::write(f::GUEST_RIP, vmx::read(f::GUEST_RIP) + vmx::read(f::EXIT_INSTRUCTION_LENGTH));
    let rest = guest.run();
    Check::new(&mut Serial, "a breakpoint is skipped")
        .expect("first", first, Exit::Reason(r::EXCEPTION_OR_NMI, 0))
        .expect("rest", rest, Exit::Done(5))
        .expect("behind", vmx::read(f::GUEST_RIP) != code, true)
        .end();
    vmx::write(f::EXCEPTION_BITMAP, 0);
    vmx::write(f::EXCEPTION_BITMAP, 1 << trap::UD);
    let still_caught = guest.execute(program(4).0, 5);
    vmx::write(f::EXCEPTION_BITMAP, 0);
    let own = guest.execute(catch_undefined, 0);
    Check::new(&mut Serial, "the exception bitmap is looked at each time")
        .expect("set", still_caught, Exit::Reason(r::EXCEPTION_OR_NMI, 0))
        .expect("clear", own, Exit::Done(u64::from(trap::UD)))
        .end();
}

extern "C" fn catch_undefined(_: u64) -> u64 {
    // SAFETY: traps, and `catch` takes the trap.
    trap::catch(|| unsafe { core::arch::asm!("ud2") }).map_or_else(|trap| trap.vector.into(), |()| 0)
}

/// One exit after each instruction.
fn trap_flag(guest: &mut Guest) {
    let mut out = Serial;
    let check = Check::new(&mut out, "monitor trap flag");
    if !setup::allowed_one(Kind::Primary, primary::TRAP_FLAG) {
        check.fact("offered", false).end();
        return;
    }
    let old = vmx::read(f::PRIMARY_CONTROLS);
    vmx::write(f::PRIMARY_CONTROLS, old | u64::from(primary::TRAP_FLAG));
    // The first instruction has 3 bytes.
    let (program, code) = program(5);
    let first = guest.execute(program, 5);
    let at = vmx::read(f::GUEST_RIP);
    vmx::write(f::PRIMARY_CONTROLS, old);
    check
        .expect("first", first, Exit::Reason(TRAP_FLAG_EXIT, 0))
        .expect("rip", Hex(at), Hex(code + 3))
        .fact("interruptibility", vmx::read(f::GUEST_INTERRUPTIBILITY))
        .end();
}

/// One exit before the first instruction; what is pending, blocks or sleeps goes on.
fn pending_trap_flag(guest: &mut Guest) {
    if !setup::allowed_one(Kind::Primary, primary::TRAP_FLAG) {
        return;
    }
    const OTHER: u64 = 7 << 8;
    const STEP: u64 = 1 << 14;
    const BREAKPOINT: u64 = 1 << 12 | 1;
    let old = vmx::read(f::PRIMARY_CONTROLS);
    // RFLAGS, interruptibility, activity, pending debug exceptions
    for (name, state) in [
        ("alone", [2, 0, 0, 0]),
        ("with a breakpoint", [2, 0, 0, BREAKPOINT]),
        ("with a step", [0x102, 0, 0, STEP]),
        ("behind STI", [0x202, 1, 0, 0]),
        ("behind MOV SS", [2, 2, 0, 0]),
        ("behind MOV SS with a breakpoint", [2, 2, 0, BREAKPOINT]),
        ("behind MOV SS with a step", [0x102, 2, 0, STEP]),
        ("in the HLT state", [2, 0, 1, 0]),
    ] {
        for control in [0, primary::TRAP_FLAG] {
            vmx::write(f::PRIMARY_CONTROLS, old | u64::from(control));
            guest.start(count, 5);
            let start = vmx::read(f::GUEST_RIP);
            let fields = [f::GUEST_RFLAGS, f::GUEST_INTERRUPTIBILITY, f::GUEST_ACTIVITY, f::GUEST_PENDING_DEBUG];
            for (field, value) in fields.into_iter().zip(state) {
                vmx::write(field, value);
            }
            vmx::write(f::ENTRY_INTERRUPTION_INFO, VALID | OTHER);
            let result = guest.run();
            let saved = fields.map(vmx::read);
            let moved = vmx::read(f::GUEST_RIP).wrapping_sub(start);
            vmx::write(f::PRIMARY_CONTROLS, old);
            let when = if control == 0 { "" } else { " and the control" };
            Check::new(&mut Serial, format_args!("a pending trap flag {name}{when}"))
                .expect("result", result, Exit::Reason(TRAP_FLAG_EXIT, 0))
                .expect("moved", moved, 0)
                .expect("rflags", Hex(saved[0]), Hex(state[0]))
                .expect("interruptibility", saved[1], state[1])
                .expect("activity", saved[2], state[2])
                .expect("pending_debug", Hex(saved[3]), Hex(state[3]))
                .end();
        }
    }
}

extern "C" fn count(steps: u64) -> u64 {
    for _ in 0..steps {
        core::hint::spin_loop();
    }
    5
}

extern "C" fn read_capability(_: u64) -> u64 {
    loop {
        cpu::rdmsr(0x480);
    }
}

/// What the hypervisor below does meanwhile is time of the guest: it cannot stretch its slice by exits that we do not see.
fn timer_over_exits(guest: &mut Guest) {
    if !setup::allowed_one(Kind::Pin, pin::PREEMPTION_TIMER) {
        return;
    }
    /// Of the entry, of one exit and of what follows the last one.
    const SLACK: u64 = 20_000;
    let shift = caps::get(setup::VMX_MISC) & 0x1F;
    let old = vmx::read(f::PIN_CONTROLS);
    vmx::write(f::PIN_CONTROLS, old | u64::from(pin::PREEMPTION_TIMER));
    for ticks in [30_000, 100_000, 1_000_000u64] {
        let value = ticks >> shift;
        vmx::write(f::PREEMPTION_TIMER, value);
        let before = cpu::rdtsc();
        let result = guest.execute(read_capability, 0);
        let passed = cpu::rdtsc() - before;
        log!("preemption timer of {ticks}: {passed} passed");
        Check::new(&mut Serial, format_args!("preemption timer of {ticks} over exits of the hypervisor below"))
            .expect("result", result, Exit::Reason(r::PREEMPTION_TIMER, 0))
            .expect("early", passed < value.saturating_sub(1) << shift, false)
            .expect("late", passed > ticks + SLACK, false)
            .end();
    }
    vmx::write(f::PREEMPTION_TIMER, 0);
    vmx::write(f::PIN_CONTROLS, old);
}

/// With 0 the guest does not move; with much time it comes to its end, and the time left is saved.
fn timer(guest: &mut Guest) {
    let mut out = Serial;
    let check = Check::new(&mut out, "preemption timer");
    if !setup::allowed_one(Kind::Pin, pin::PREEMPTION_TIMER) {
        check.fact("offered", false).end();
        return;
    }
    let old = [f::PIN_CONTROLS, f::EXIT_CONTROLS].map(|field| (field, vmx::read(field)));
    vmx::write(f::PIN_CONTROLS, old[0].1 | u64::from(pin::PREEMPTION_TIMER));
    vmx::write(f::PREEMPTION_TIMER, 0);
    guest.start(count, 5);
    let start = vmx::read(f::GUEST_RIP);
    let at_once = guest.run();
    let moved = vmx::read(f::GUEST_RIP) != start;
    vmx::write(f::PREEMPTION_TIMER, u32::MAX.into());
    let rest = guest.run();
    let kept = vmx::read(f::PREEMPTION_TIMER) == u64::from(u32::MAX);
    let can_save = setup::allowed_one(Kind::Exit, exit_controls::SAVE_TIMER);
    let mut saved = true;
    if can_save {
        vmx::write(f::EXIT_CONTROLS, old[1].1 | u64::from(exit_controls::SAVE_TIMER));
        saved = guest.execute(count, 100_000) == Exit::Done(5) && vmx::read(f::PREEMPTION_TIMER) < u64::from(u32::MAX);
        vmx::write(f::EXIT_CONTROLS, old[1].1);
    }
    // Enough time for a few instructions: it fires in the middle.
    vmx::write(f::PREEMPTION_TIMER, 10);
    let late = guest.execute(count, u64::MAX >> 1);
    let halted = {
        vmx::write(f::PREEMPTION_TIMER, 10);
        guest.start(count, 5);
        vmx::write(f::GUEST_ACTIVITY, 1);
        guest.run()
    };
    let activity = vmx::read(f::GUEST_ACTIVITY);
    for (field, value) in old {
        vmx::write(field, value);
    }
    let fired = Exit::Reason(r::PREEMPTION_TIMER, 0);
    check
        .expect("at_once", at_once, fired)
        .expect("moved", moved, false)
        .expect("rest", rest, Exit::Done(5))
        .expect("kept", kept, true)
        .expect("can_save", can_save, true)
        .expect("saved", saved, true)
        .expect("late", late, fired)
        .expect("halted", halted, fired)
        .expect("activity", activity, 1)
        .end();
}
