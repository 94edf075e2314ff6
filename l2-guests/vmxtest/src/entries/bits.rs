//! Every bit of the fields of control registers, EFER, access rights and event injection, changed alone: one character a bit for
//! how the entry ended, bit 0 first.

use super::{Change::Set, try_with};
use crate::guest::{Exit, Guest};
use l2_kit::{
    Check,
    arrayvec::ArrayString,
    cpu, fields as f,
    serial::Serial,
    setup::{Kind, allowed_one, entry_controls as entry, exit_controls as exit},
    vmx::{self, Outcome},
};

/// Name, field, its bits, the entry and the exit control that makes it count.
type Field = (&'static str, u32, u32, u32, u32);

const FIELDS: &[Field] = &[
    ("host CR0", f::HOST_CR0, 64, 0, 0),
    ("host CR4", f::HOST_CR4, 64, 0, 0),
    ("host EFER", f::HOST_EFER, 64, 0, exit::LOAD_EFER),
    ("host PAT", f::HOST_PAT, 64, 0, exit::LOAD_PAT),
    ("guest CR0", f::GUEST_CR0, 64, 0, 0),
    ("guest CR4", f::GUEST_CR4, 64, 0, 0),
    ("guest EFER", f::GUEST_EFER, 64, entry::LOAD_EFER, 0),
    ("guest PAT", f::GUEST_PAT, 64, entry::LOAD_PAT, 0),
    ("guest DR7", f::GUEST_DR7, 64, entry::LOAD_DEBUG, 0),
    ("guest RFLAGS", f::GUEST_RFLAGS, 64, 0, 0),
    ("guest activity", f::GUEST_ACTIVITY, 32, 0, 0),
    ("guest pending debug exceptions", f::GUEST_PENDING_DEBUG, 64, 0, 0),
    ("guest CS rights", f::GUEST_CS_AR, 32, 0, 0),
    ("guest SS rights", f::GUEST_SS_AR, 32, 0, 0),
    ("guest DS rights", f::GUEST_DS_AR, 32, 0, 0),
    ("guest TR rights", f::GUEST_TR_AR, 32, 0, 0),
    ("guest LDTR rights", f::GUEST_LDTR_AR, 32, 0, 0),
];

/// Bits that are left out: they end the hypervisor's own mode, make the guest wait for an event that does not come, or step it.
fn is_left_out(field: u32, bit: u32) -> bool {
    match field {
        // LA57, which MOV to CR4 cannot change back in 64-bit mode; SMEP, SMAP and LASS, under which this program faults
        f::HOST_CR4 => matches!(bit, 12 | 20 | 21 | 27),
        // LASS: each fetch at a low address faults, that of the fault's handler too, without end
        f::GUEST_CR4 => bit == 27,
        f::GUEST_ACTIVITY => bit < 2,
        // TF, and its pending exception
        f::GUEST_RFLAGS => bit == 8,
        f::GUEST_PENDING_DEBUG => bit < 15,
        // L: the program is 64-bit code
        f::GUEST_CS_AR => bit == 13,
        _ => false,
    }
}

/// All of it.
pub fn all(guest: &mut Guest) {
    for (name, field, bits, of_entry, of_exit) in FIELDS.iter().copied() {
        if !allowed_one(Kind::Entry, of_entry) || !allowed_one(Kind::Exit, of_exit) {
            continue;
        }
        let own = match field {
            f::HOST_EFER | f::GUEST_EFER => cpu::rdmsr(cpu::EFER),
            f::HOST_PAT | f::GUEST_PAT => cpu::rdmsr(cpu::PAT),
            _ => vmx::read(field),
        };
        let controls = [(f::ENTRY_CONTROLS, of_entry), (f::EXIT_CONTROLS, of_exit)]
            .map(|(field, bits)| (field, Set(vmx::read(field) | u64::from(bits))));
        let (cr0, cr4, efer, pat) = (cpu::cr0(), cpu::cr4(), cpu::rdmsr(cpu::EFER), cpu::rdmsr(cpu::PAT));
        let mut seen = ArrayString::<64>::new();
        for bit in 0..bits {
            if is_left_out(field, bit) {
                seen.push('-');
                continue;
            }
            let (exit, kept) = try_with(guest, &[controls[0], controls[1], (field, Set(own ^ 1 << bit))]);
            // What the exit loaded.
            cpu::set_cr0(cr0);
            cpu::set_cr4(cr4);
            if cpu::rdmsr(cpu::EFER) != efer {
                cpu::wrmsr(cpu::EFER, efer);
            }
            if cpu::rdmsr(cpu::PAT) != pat {
                cpu::wrmsr(cpu::PAT, pat);
            }
            seen.push(match exit {
                Exit::Done(5) => '.',
                Exit::Refused(Outcome::FailValid(7)) if kept => 'c',
                Exit::Refused(Outcome::FailValid(8)) if kept => 'h',
                Exit::Failed(33, 0) if kept => 'g',
                Exit::Reason(2, _) => 't',
                _ => '?',
            });
        }
        Check::new(&mut Serial, format_args!("each bit of {name}")).fact("entries", seen.as_str()).end();
    }
}
