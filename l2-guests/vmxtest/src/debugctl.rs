//! Single steps from branch to branch (IA32_DEBUGCTL.BTF), in a guest and in this image itself, over an instruction that a
//! hypervisor below completes (SDM "Single-Stepping on Branches", "Monitoring Branches, Exceptions, and Interrupts": a debug
//! exception that is delivered clears BTF and LBR, one that exits does not).

use crate::{
    guest::{Exit, Guest, Program},
    injection::{noting, seen},
};
use core::arch::global_asm;
use l2_kit::{
    Check, cpu, fields as f,
    protocol::Hex,
    serial::Serial,
    setup::{Controls, Kind, Missing, allowed_one, entry_controls as entry, exit_controls as exit, secondary},
    trap, vmx,
    vmx::reason as r,
};

const LBR: u64 = 1;
const BTF: u64 = 2;
const BS: u64 = 1 << 14;

// TF; instructions that are no branches, of which one may exit to a hypervisor below; a branch; four more; TF off.
global_asm!(
    ".pushsection .text.vmxtest_branches, \"ax\"",
    "vmxtest_branches:",
    "pushfq",
    "or dword ptr [rsp], 0x100",
    "popfq",
    "nop",
    "mov ecx, 0x480",
    "rdmsr",
    "jmp 1f",
    "nop",
    "vmxtest_branched:",
    "1: nop",
    "pushfq",
    "and dword ptr [rsp], 0xFFFFFEFF",
    "popfq",
    "mov eax, 5",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    #[link_name = "vmxtest_branches"]
    safe fn branches(argument: u64) -> u64;
    static vmxtest_branched: u8;
}

/// Steps from the branch on: that of the branch, and four single ones.
const STEPS: u64 = 5;
/// Steps without BTF.
const ALL_STEPS: u64 = STEPS + 3;

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let has = cpu::try_wrmsr(cpu::DEBUGCTL, BTF).is_ok() && cpu::try_rdmsr(cpu::DEBUGCTL).is_ok_and(|v| v == BTF);
    _ = cpu::try_wrmsr(cpu::DEBUGCTL, 0);
    let debug = (Kind::Entry, entry::LOAD_DEBUG, Kind::Exit, exit::SAVE_DEBUG);
    if !has || !allowed_one(debug.0, debug.1) || !allowed_one(debug.2, debug.3) {
        Check::new(&mut Serial, "steps from branch to branch").fact("offered", false).end();
        return Ok(());
    }
    let reserved = [2u64, 3, 16, 63].map(|bit| cpu::try_wrmsr(cpu::DEBUGCTL, 1 << bit).is_err());
    Check::new(&mut Serial, "IA32_DEBUGCTL")
        .fact("bit_2_refused", reserved[0])
        .expect("bit_3_refused", reserved[1], true)
        .expect("bit_16_refused", reserved[2], true)
        .expect("bit_63_refused", reserved[3], true)
        .end();
    for (name, value, steps) in [("0", 0, ALL_STEPS), ("BTF", BTF, STEPS), ("BTF and LBR", BTF | LBR, STEPS)] {
        cpu::wrmsr(cpu::DEBUGCTL, value);
        let (result, note) = noting(trap::DB, || branches(5));
        let left = cpu::rdmsr(cpu::DEBUGCTL);
        cpu::wrmsr(cpu::DEBUGCTL, 0);
        Check::new(&mut Serial, format_args!("steps with IA32_DEBUGCTL {name}"))
            .expect("result", result, 5)
            .expect("steps", note.count, steps)
            .expect("left", Hex(left), Hex(0))
            .end();
    }
    let mut guest = Guest::new(Controls {
        secondary: secondary::EPT,
        entry: entry::LOAD_DEBUG,
        exit: exit::SAVE_DEBUG,
        ..Controls::default()
    })?;
    vmx::write(f::GUEST_DR7, 0x400);
    for (name, value, steps) in [("0", 0, ALL_STEPS), ("BTF", BTF, STEPS), ("BTF and LBR", BTF | LBR, STEPS)] {
        exits(&mut guest, name, value);
        vmx::write(f::GUEST_DEBUGCTL, value);
        vmx::write(f::EXCEPTION_BITMAP, 0);
        let (result, _) = noting(trap::DB, || guest.execute(branches as Program, 5));
        Check::new(&mut Serial, format_args!("steps of a guest with IA32_DEBUGCTL {name}"))
            .expect("result", result, Exit::Done(5))
            .expect("steps", seen().count, steps)
            .expect("left", Hex(vmx::read(f::GUEST_DEBUGCTL)), Hex(0))
            .expect("own", Hex(cpu::rdmsr(cpu::DEBUGCTL)), Hex(0))
            .end();
    }
    pending(&mut guest);
    vmx::write(f::GUEST_DEBUGCTL, 0);
    Ok(())
}

/// The first step exits, and leaves the MSR as it was.
fn exits(guest: &mut Guest, name: &str, value: u64) {
    vmx::write(f::GUEST_DEBUGCTL, value);
    vmx::write(f::EXCEPTION_BITMAP, 1 << trap::DB);
    let result = guest.execute(branches as Program, 5);
    let branch = &raw const vmxtest_branched as u64;
    let at = vmx::read(f::GUEST_RIP);
    Check::new(&mut Serial, format_args!("an exit by a step with IA32_DEBUGCTL {name}"))
        .expect("result", result, Exit::Reason(r::EXCEPTION_OR_NMI, BS))
        .expect("behind_the_branch", at == branch, value & BTF != 0)
        .expect("saved", Hex(vmx::read(f::GUEST_DEBUGCTL)), Hex(value))
        .expect("pending_debug", Hex(vmx::read(f::GUEST_PENDING_DEBUG)), Hex(0))
        .expect("own", Hex(cpu::rdmsr(cpu::DEBUGCTL)), Hex(0))
        .end();
}

/// After STI a step is pending if and only if RFLAGS.TF is set and BTF is not.
fn pending(guest: &mut Guest) {
    for (value, step, enters) in [(0, 0, false), (0, BS, true), (BTF, 0, true), (BTF, BS, false)] {
        vmx::write(f::EXCEPTION_BITMAP, 1 << trap::DB);
        guest.start(branches as Program, 5);
        for (field, value) in [
            (f::GUEST_RFLAGS, 0x302),
            (f::GUEST_INTERRUPTIBILITY, 1),
            (f::GUEST_PENDING_DEBUG, step),
            (f::GUEST_DEBUGCTL, value),
        ] {
            vmx::write(field, value);
        }
        let result = guest.run();
        let wanted = if enters { Exit::Reason(r::EXCEPTION_OR_NMI, BS) } else { Exit::Failed(33, 0) };
        Check::new(&mut Serial, format_args!("behind STI, IA32_DEBUGCTL {value}, pending {step:#x}"))
            .expect("result", result, wanted)
            .end();
    }
}
