//! `stale=warn`: before each entry, the first translation of L3 that ept12 no longer grants, if L2 executed no INVEPT that
//! concerns it. For debugging: a walk of ept12 for each leaf of ept02.

use crate::cpu::Cpu;
use crate::ept::{Eptp, StaleLeaf};
use crate::vmx::Field;

/// Lines that a processor prints at most.
const LINES: u32 = 32;

/// Looks, and tells of one that was not told last.
pub fn look(cpu: &mut Cpu) {
    let eptp02 = Eptp::new(cpu.vmx.read(Field::EPT_POINTER));
    let found = cpu.ept02.stale_leaf(eptp02, &cpu.guest, &Cpu::tables(&mut cpu.frames, &cpu.phys));
    let Some(leaf) = found.filter(|leaf| cpu.stale.last != Some(*leaf) && cpu.stale.told < LINES) else { return };
    cpu.stale.last = Some(leaf);
    cpu.stale.told += 1;
    let StaleLeaf { ngpa, used, rights, now, sub_pages } = leaf;
    let rights = rights.bits();
    match now {
        Some((to, _)) if sub_pages => log::warn!(
            "L3 uses a stale table of sub-page permissions, INVEPT is missing: {ngpa:#x} has {used:#x}, in L2's tables {to:#x}"
        ),
        None if sub_pages => log::warn!(
            "L3 uses a stale table of sub-page permissions, INVEPT is missing: {ngpa:#x} has {used:#x}, in L2's tables nothing"
        ),
        Some((to, granted)) => log::warn!(
            "L3 uses a stale translation, INVEPT is missing: {ngpa:#x} leads to {used:#x} with rights {rights:#x}, in L2's EPT to {to:#x} with {:#x}",
            granted.bits()
        ),
        None => log::warn!(
            "L3 uses a stale translation, INVEPT is missing: {ngpa:#x} leads to {used:#x} with rights {rights:#x}, in L2's EPT to nothing"
        ),
    }
}
