//! Every rule that an entry breaks, where the entry itself needs only the first: for whoever has to mend the VMCS.

use crate::rules::checks::{
    CheckId, GuestContext, ReadsGuest, check_controls, check_guest, check_host, check_virtual_tpr,
};
use crate::vmx::{Capabilities, Field, Fields};
use arrayvec::ArrayVec;
use core::cell::RefCell;

/// Most rules that are told of one entry.
const MOST: usize = 24;

/// Fields that note broken rules and let the checks go on.
struct Noting<'a, F> {
    fields: &'a F,
    broken: RefCell<ArrayVec<CheckId, MOST>>,
}

impl<F> Noting<'_, F> {
    fn add(&self, check: CheckId) {
        let mut broken = self.broken.borrow_mut();
        if !broken.contains(&check) {
            // More than that are not told.
            let _ = broken.try_push(check);
        }
    }
}

impl<F: Fields> Fields for Noting<'_, F> {
    fn get(&self, field: Field) -> u64 {
        self.fields.get(field)
    }

    fn ends_at(&self, rule: u16) -> bool {
        if let Some(&check) = CheckId::ALL.get(usize::from(rule)) {
            self.add(check);
        }
        false
    }
}

/// All rules that these fields break, controls first, then host state, then guest state. `long_mode` is L2's IA32_EFER.LMA at
/// the time of the entry.
pub fn all_broken(
    fields: &impl Fields,
    caps: &Capabilities,
    long_mode: bool,
    context: &GuestContext,
    memory: &impl ReadsGuest,
) -> ArrayVec<CheckId, MOST> {
    let noting = Noting { fields, broken: RefCell::default() };
    // Rules outside of the lists end the checks; they are the last of their group.
    for failure in [
        check_controls(&noting, caps).err(),
        check_virtual_tpr(&noting, caps, memory).err(),
        check_host(&noting, caps, long_mode).err(),
    ] {
        failure.into_iter().for_each(|failure| noting.add(failure.check));
    }
    if let Err(failure) = check_guest(&noting, caps, context, memory) {
        noting.add(failure.check);
    }
    noting.broken.into_inner()
}
