//! Addresses that VMX instructions take, and VMCSs beside the range.

use super::{enter, everywhere, with};
use crate::{
    guest::{Exit, Extra},
    lab::{Lab, Seen},
    place,
};
use l2_kit::{
    fields as f,
    setup::{self, secondary},
    vmx::{self, Outcome},
};

pub fn all(lab: &mut Lab) {
    everywhere(lab, "VMCLEAR", |_, at| vmx::vmclear(at).into());
    for (name, bits) in [("VMPTRLD", 0), ("VMPTRLD of a shadow", 1 << 31)] {
        everywhere(lab, name, |_, at| {
            let outcome = revision(at, bits, || vmx::vmptrld(at));
            // What stays active may be written to its region at any time.
            let _ = vmx::vmclear(at);
            inside_refused(outcome, at)
        });
    }
    everywhere(lab, "VMXON", |lab, at| {
        let _ = vmx::vmxoff();
        let outcome = revision(at, 0, || vmx::vmxon(at));
        if outcome.succeeded() {
            let _ = vmx::vmxoff();
        }
        let again = vmx::vmxon(lab.vmxon_region());
        let seen = inside_refused(outcome, at);
        if again.succeeded() { seen } else { Seen::of(format_args!("VMXON {again}")).escaped_if(true) }
    });
    everywhere(lab, "VMXON region VMPTRLD", |lab, at| {
        let _ = vmx::vmxoff();
        let entered = revision(at, 0, || vmx::vmxon(at));
        let outcome = if entered.succeeded() { vmx::vmptrld(at) } else { entered };
        if entered.succeeded() {
            let _ = vmx::vmxoff();
        }
        let _ = vmx::vmxon(lab.vmxon_region());
        outcome.into()
    });
    everywhere(lab, "VMCS", |lab, at| {
        let own = lab.guest.vcpu.vmcs;
        let loaded = revision(at, 0, || Some(vmx::vmclear(at)).filter(|o| !o.succeeded()).unwrap_or(vmx::vmptrld(at)));
        if !loaded.succeeded() {
            return loaded.into();
        }
        lab.guest.vcpu.vmcs = at;
        with(lab, Extra::default());
        let first = enter(lab);
        let _ = vmx::vmclear(at);
        lab.guest.vcpu.launched = false;
        let again = revision(at, 0, || vmx::vmptrld(at));
        let second = enter(lab);
        let _ = vmx::vmclear(at);
        lab.guest.vcpu.vmcs = own;
        inside_refused(again, at).escaped_if(first != Exit::Done(1) || second != Exit::Done(1))
    });
    everywhere(lab, "link pointer", |lab, at| {
        with(lab, Extra::default());
        vmx::write(f::LINK_POINTER, at);
        revision(at, 0, || enter(lab)).into()
    });
    if setup::allowed_one(setup::Kind::Secondary, secondary::VMCS_SHADOWING) {
        everywhere(lab, "shadow VMCS", |lab, at| {
            with(lab, Extra { secondary: secondary::VMCS_SHADOWING, ..Extra::default() });
            vmx::write(f::VMREAD_BITMAP, lab.pages[1]);
            vmx::write(f::VMWRITE_BITMAP, lab.pages[1]);
            vmx::write(f::LINK_POINTER, at);
            let exit = revision(at, 1 << 31, || lab.execute(vmread_vmwrite, u64::from(f::GUEST_RIP)));
            let _ = vmx::vmclear(at);
            exit.into()
        });
    }
}

/// Runs with the VMCS revision at the start of a page, if this guest owns it and it is no page of ones.
fn revision<T>(at: u64, bits: u32, f: impl FnOnce() -> T) -> T {
    let (start, end) = place::range();
    if !(start..end).contains(&at) {
        place::put(at, 0, u64::from(setup::revision() | bits));
    }
    f()
}

/// An instruction that works where this machine has no memory has reached something.
fn inside_refused(outcome: Outcome, at: u64) -> Seen {
    let (start, end) = place::range();
    Seen::of(outcome).escaped_if((start..end).contains(&at) && outcome.succeeded())
}

/// Reads a field of the shadow VMCS and writes it back.
extern "C" fn vmread_vmwrite(field: u64) -> u64 {
    let (read, value) = vmx::try_read(field);
    let write = vmx::try_write(field, value);
    u64::from(read.succeeded()) << 1 | u64::from(write.succeeded())
}
