//! VMX instructions that a guest executes: each is its hypervisor's to handle, so that the guest can have guests of its own
//! (SDM "Instructions That Cause VM Exits Unconditionally"). The privilege level is not looked at before the exit; the mode is,
//! except by VMCALL.

use crate::{
    guest::{Exit, Guest, Program},
    modes::{self, FORM32, STRIDE},
};
use l2_kit::{
    Check, fields as f,
    protocol::Hex,
    serial::Serial,
    setup::{self, Controls, Missing, secondary},
    trap::{self, Trap},
    user, vmx,
    vmx::reason as r,
};

/// What ends each instruction's exit: the basic reason.
const REASONS: [(&str, u32); 12] = [
    ("vmxon", 27),
    ("vmxoff", 26),
    ("vmclear", 19),
    ("vmptrld", 21),
    ("vmptrst", 22),
    ("vmread", 23),
    ("vmwrite", 25),
    ("vmlaunch", 20),
    ("vmresume", 24),
    ("vmcall", r::VMCALL),
    ("invept", 50),
    ("invvpid", 53),
];

/// The code and its operand, in memory that the guest shares.
#[repr(C)]
struct Call {
    code: u64,
    operand: u64,
}

fn vector(run: fn(u64, u64) -> Trap, at: u64) -> u64 {
    // SAFETY: `one` puts it there.
    let Call { code, operand } = unsafe { (at as *const Call).read_volatile() };
    u64::from(run(code, operand).vector)
}

extern "C" fn ring0(at: u64) -> u64 {
    vector(|code, operand| user::ring0(code, operand, 0), at)
}

extern "C" fn ring3(at: u64) -> u64 {
    vector(|code, operand| user::ring3(code, operand, 0), at)
}

extern "C" fn compatibility(at: u64) -> u64 {
    vector(|code, operand| user::compatibility(code, operand as u32, 0), at)
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    for (how, controls) in [
        ("with EPT", Controls { secondary: secondary::EPT, ..Controls::default() }),
        ("without EPT", Controls::default()),
    ] {
        let mut guest = Guest::new(controls)?;
        for (name, code) in modes::stubs() {
            let Some((_, reason)) = REASONS.iter().find(|(known, _)| *known == name) else { continue };
            for (mode, program, offset) in
                [("ring 0", ring0 as Program, 0), ("ring 3", ring3, 0), ("compatibility mode", compatibility, FORM32)]
            {
                let undefined = offset != 0 && name != "vmcall";
                let call = Call { code: code + offset, operand: modes::operand() };
                let exit = match guest.execute(program, &raw const call as u64) {
                    // Their operands are registers: there is no displacement, and the qualification is undefined.
                    Exit::Reason(reason, _) if ["vmread", "vmwrite"].contains(&name) => Exit::Reason(reason, 0),
                    other => other,
                };
                let wanted = if undefined { Exit::Done(trap::UD.into()) } else { Exit::Reason(*reason, 0) };
                one(format_args!("{name} of a guest in {mode} {how}"), call.code, exit, wanted);
                setup::write_guest_state(guest.cr3, true);
            }
        }
    }
    Ok(())
}

fn one(name: core::fmt::Arguments<'_>, code: u64, exit: Exit, wanted: Exit) {
    let mut out = Serial;
    let check = Check::new(&mut out, name).expect("result", exit, wanted);
    match exit {
        Exit::Reason(..) => check
            .expect("at", vmx::read(f::GUEST_RIP).wrapping_sub(code) < STRIDE, true)
            .fact("length", vmx::read(f::EXIT_INSTRUCTION_LENGTH))
            .expect("ring", vmx::read(f::GUEST_SS_AR) >> 5 & 3, vmx::read(f::GUEST_CS) & 3)
            .fact("cs", Hex(vmx::read(f::GUEST_CS)))
            .fact("rflags", Hex(vmx::read(f::GUEST_RFLAGS)))
            .end(),
        _ => check.end(),
    }
}
