//! Every VMX instruction in ring 0, ring 3 and compatibility mode, outside and inside VMX operation.
//!
//! SDM "VMX Instruction Reference": outside VMX operation and in compatibility mode they are undefined, which comes before
//! the check of the privilege level.

use crate::expect::{GP, Got, UD};
use core::arch::global_asm;
use l2_kit::{Check, pages, serial::Serial, setup, trap, user};

/// Each instruction has 32 bytes: its 64-bit form, and from byte 16 its 32-bit form.
pub const STRIDE: u64 = 32;
/// Where the 32-bit form begins.
pub const FORM32: u64 = 16;

macro_rules! stubs {
    ($($name:ident $form64:literal $form32:literal;)*) => {
        const NAMES: &[&str] = &[ $( stringify!($name), )* ];
        global_asm!(
            ".pushsection .text.vmxtest_stubs, \"ax\"",
            ".balign 32",
            "vmxtest_stubs:",
            $(
                ".balign 32",
                $form64,
                "int3",
                ".balign 16",
                ".code32",
                $form32,
                "int3",
                ".code64",
            )*
            ".popsection",
        );
    };
}

stubs! {
    vmxon "vmxon [rdi]" "vmxon [edi]";
    vmxoff "vmxoff" "vmxoff";
    vmclear "vmclear [rdi]" "vmclear [edi]";
    vmptrld "vmptrld [rdi]" "vmptrld [edi]";
    vmptrst "vmptrst [rdi]" "vmptrst [edi]";
    vmread "vmread rax, rsi" "vmread eax, esi";
    vmwrite "vmwrite rsi, rax" "vmwrite esi, eax";
    vmlaunch "vmlaunch" "vmlaunch";
    vmresume "vmresume" "vmresume";
    vmcall "vmcall" "vmcall";
    invept "invept rsi, [rdi]" "invept esi, [edi]";
    invvpid "invvpid rsi, [rdi]" "invvpid esi, [edi]";
}

unsafe extern "C" {
    static vmxtest_stubs: u8;
}

/// A page with a pointer to a region: an operand for all of them.
pub fn operand() -> u64 {
    let page = pages::page();
    page[0] = setup::region();
    pages::address(page)
}

/// Name and address of each stub.
pub fn stubs() -> impl Iterator<Item = (&'static str, u64)> {
    let first = &raw const vmxtest_stubs as u64;
    (0u64..).zip(NAMES).map(move |(number, name)| (*name, first + number * STRIDE))
}

fn print(state: &str, wanted: impl Fn(&str, &str) -> Got) {
    let operand = operand();
    for (name, code) in stubs() {
        let mut out = Serial;
        let mut check = Check::new(&mut out, format_args!("{name} {state}"));
        for mode in ["ring0", "ring3", "compatibility"] {
            // VMXON and VMXOFF in ring 0 would change the state; they have checks of their own.
            let skip = mode == "ring0" && (wanted(name, mode) == Got::Fault(trap::BP, 0));
            if !skip {
                let trap = match mode {
                    "ring0" => user::ring0(code, operand, 0),
                    "ring3" => user::ring3(code, operand, 0),
                    _ => user::compatibility(code + FORM32, operand as u32, 0),
                };
                check = check.expect(mode, trap.into(), wanted(name, mode));
            }
        }
        check.end();
    }
}

/// Outside VMX operation, with what is special about the moment.
pub fn outside(when: &str) {
    let vmxe = l2_kit::cpu::cr4() & l2_kit::cpu::CR4_VMXE != 0;
    print(when, |name, mode| match (name, mode) {
        ("vmxon", "ring0") if vmxe => Got::Fault(trap::BP, 0),
        ("vmxon", "ring3") if vmxe => GP,
        _ => UD,
    });
}

/// In VMX root operation.
pub fn inside() {
    print("in VMX operation", |_, mode| match mode {
        "ring0" => Got::Fault(trap::BP, 0),
        "ring3" => GP,
        _ => UD,
    });
}
