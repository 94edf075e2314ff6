//! Tries where the hypervisor below keeps the fields of a VMCS that is not current (`vmcs::image`).

use crate::addr::PAGE_SIZE;
use crate::hw::host_area;
use crate::hw::phys::DirectMap;
use crate::hw::vmx::{Region, Vmx};
use crate::mm::PhysMem;
use crate::vmcs::image::{ImageLayout, Round, probe};
use crate::vmcs::vmcs12::FieldSet;
use crate::vmx::lent::LENT;
use crate::vmx::{Capabilities, Field};

/// The fields that the processor has: those that its capabilities promise, as far as VMREAD finds them. Hypervisors below leave
/// some out that every real processor has.
pub fn fields(vmx: &mut Vmx, region: Region, hardware: &Capabilities) -> FieldSet {
    let mut exists = FieldSet::EMPTY;
    vmx.clear(region);
    vmx.ptrld(region);
    Field::ALL.iter().filter(|f| hardware.has_field(**f) && vmx.has(**f)).for_each(|f| exists.insert(*f));
    vmx.clear(region);
    exists
}

/// The layout, if every field that the processor has is found, and what is written to memory is what VMREAD gives. Uses two
/// VMCS regions that nothing is in yet; both are clear afterwards, and no VMCS is current.
pub fn layout(vmx: &mut Vmx, phys: &DirectMap, [a, b]: [Region; 2], exists: &FieldSet) -> Option<ImageLayout> {
    // The number of the last error is not L2's: nvmx keeps that itself. The host-state area is nvmx's, and never reached there, but for
    // what may be lent.
    let fields = || exists.iter().filter(|field| *field != Field::VM_INSTRUCTION_ERROR && !field.is_host_state());
    vmx.clear(a);
    vmx.clear(b);
    let mut content = [[0; PAGE_SIZE as usize]; 2];
    for (content, round) in content.iter_mut().zip([Round::First, Round::Second]) {
        vmx.ptrld(a);
        fields().for_each(|field| vmx.write(field, probe(field, round)));
        host_area::try_lent(vmx, |field| probe(field, round));
        vmx.ptrld(b);
        phys.read_bytes(a.at(), content);
    }
    let layout = ImageLayout::learn(&content[0], &content[1]);
    let fields = || fields().chain(LENT);
    fields().for_each(|field| layout.write(phys, a, field, probe(field, Round::First)));
    vmx.ptrld(a);
    let mut good = true;
    for field in fields() {
        if !layout.knows(field) || vmx.read(field) != probe(field, Round::First) {
            log::debug!("{field} of a VMCS that is not current is not found in memory");
            good = false;
        }
    }
    fields().filter(|field| !field.is_host_state()).for_each(|field| vmx.write(field, 0));
    vmx.clear(a);
    vmx.clear(b);
    good.then_some(layout)
}
