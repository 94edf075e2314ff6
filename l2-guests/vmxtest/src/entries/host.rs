//! Host state that the CPU refuses with error 8.

use super::{
    Change::{Off, On, Set},
    NOT_CANONICAL, attempt, attempt_if,
};
use crate::{
    guest::{Exit, Guest},
    vmxon::too_wide,
};
use l2_kit::{
    cpu, fields as f,
    setup::{Kind, exit_controls as exit},
    vmx::Outcome,
};

/// All of it.
pub fn all(guest: &mut Guest) {
    let bad = Exit::Refused(Outcome::FailValid(8));
    for (name, field, change) in [
        ("host CR0 without NE", f::HOST_CR0, Off(cpu::CR0_NE)),
        ("host CR0 without PG", f::HOST_CR0, Off(cpu::CR0_PG)),
        ("host CR4 without VMXE", f::HOST_CR4, Off(cpu::CR4_VMXE)),
        ("host CR4 without PAE", f::HOST_CR4, Off(cpu::CR4_PAE)),
        ("host CR4 with bit 63", f::HOST_CR4, On(1 << 63)),
        ("host CR3 beyond the address width", f::HOST_CR3, On(too_wide())),
        ("host CS 0", f::HOST_CS, Set(0)),
        ("host TR 0", f::HOST_TR, Set(0)),
        ("host CS of ring 3", f::HOST_CS, On(3)),
        ("host SS of ring 1", f::HOST_SS, On(1)),
        ("host DS in the LDT", f::HOST_DS, On(4)),
        ("host ES of ring 3", f::HOST_ES, On(3)),
        ("host FS in the LDT", f::HOST_FS, On(4)),
        ("host GS of ring 3", f::HOST_GS, On(3)),
        ("host TR in the LDT", f::HOST_TR, On(4)),
        ("host FS base not canonical", f::HOST_FS_BASE, Set(NOT_CANONICAL)),
        ("host GS base not canonical", f::HOST_GS_BASE, Set(NOT_CANONICAL)),
        ("host TR base not canonical", f::HOST_TR_BASE, Set(NOT_CANONICAL)),
        ("host GDTR base not canonical", f::HOST_GDTR_BASE, Set(NOT_CANONICAL)),
        ("host IDTR base not canonical", f::HOST_IDTR_BASE, Set(NOT_CANONICAL)),
        ("host SYSENTER ESP not canonical", f::HOST_SYSENTER_ESP, Set(NOT_CANONICAL)),
        ("host SYSENTER EIP not canonical", f::HOST_SYSENTER_EIP, Set(NOT_CANONICAL)),
        ("host RIP not canonical", f::HOST_RIP, Set(NOT_CANONICAL)),
        ("host of 32 bits", f::EXIT_CONTROLS, Off(exit::HOST_64.into())),
    ] {
        attempt(guest, name, &[(field, change)], bad);
    }
    let efer = (f::EXIT_CONTROLS, On(exit::LOAD_EFER.into()));
    for (name, value) in [("host EFER 0", 0), ("host EFER without LMA", 0x100), ("host EFER with bit 1", 0x502)] {
        attempt_if(guest, Kind::Exit, exit::LOAD_EFER, name, &[efer, (f::HOST_EFER, Set(value))], bad);
    }
    let pat = (f::EXIT_CONTROLS, On(exit::LOAD_PAT.into()));
    for (name, value) in [("host PAT with type 2", 2), ("host PAT with type 8", 8 << 56)] {
        attempt_if(guest, Kind::Exit, exit::LOAD_PAT, name, &[pat, (f::HOST_PAT, Set(value))], bad);
    }
}
