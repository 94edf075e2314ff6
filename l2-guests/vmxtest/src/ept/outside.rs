//! Memory that the machine of this hypervisor does not have, because nvmx is there: `outside=ADDRESS` on the command line.

use super::{Access, Lab, Read, SIZES, VALUE};
use crate::guest::Exit;
use l2_kit::{
    Check, Global,
    ept::{self, rights},
    fields as f,
    protocol::Hex,
    serial::Serial,
    vmx::{self, reason as r},
};

/// The address; 0 if there is none to try.
pub static ADDRESS: Global<u64> = Global::new(0);

/// A guest that is led there ends in an exit, and its hypervisor goes on.
pub(super) fn all(lab: &mut Lab) {
    let outside = ADDRESS.get();
    if outside == 0 {
        return;
    }
    let [size, ..] = &SIZES;
    let wanted = Exit::Reason(r::EPT_MISCONFIGURATION, 0);
    for kind in Access::ALL {
        lab.map(size, kind, outside | ept::WRITE_BACK | rights::RWX);
        let exit = lab.access(kind);
        Check::new(&mut Serial, format_args!("ept: a page outside: {}", kind.name()))
            .expect("result", exit, wanted)
            .expect("physical", Hex(vmx::read(f::GUEST_PHYSICAL_ADDRESS)), Hex(lab.page(size, kind) + kind.offset()))
            .end();
    }
    lab.map(size, Read, lab.leaf(size, Read, rights::RWX));
    let page = lab.page(size, Read);
    let table = lab.ept.entry(page, 1);
    lab.ept.set_entry(page, 1, outside | rights::RWX);
    let exit = lab.access(Read);
    lab.ept.set_entry(page, 1, table);
    let after = lab.access(Read);
    Check::new(&mut Serial, "ept: a table outside")
        .expect("result", exit, wanted)
        .expect("after", after, Exit::Done(VALUE))
        .end();
}
