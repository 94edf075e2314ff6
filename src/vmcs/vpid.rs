//! vpid12 to vpid02: several of L2's VPIDs keep their translations at once.
//!
//! VPID 1 is vpid01. A vpid12 has a fixed place in a small table; when another one takes the place, its translations are
//! dropped first. Source: SDM vol. 3C, "Virtual-Processor Identifiers (VPIDs)".

use crate::hw::vmx::{Invalidate, Vmx};

/// The VPID that L2 itself runs with, and L3 if vmcs12 does not enable VPIDs.
pub const VPID01: u16 = 1;

const PLACES: usize = 64;
const FIRST: u16 = 2;

/// The map.
pub struct VpidMap {
    /// vpid12 in each place; 0 is free.
    places: [u16; PLACES],
    changes: u64,
}

impl Default for VpidMap {
    fn default() -> Self {
        Self::new()
    }
}

impl VpidMap {
    /// Empty.
    pub const fn new() -> Self {
        VpidMap { places: [0; PLACES], changes: 0 }
    }

    const fn place(vpid12: u16) -> usize {
        vpid12 as usize % PLACES
    }

    /// The vpid02 that holds the translations of `vpid12` (not 0), making room for it.
    pub fn assign(&mut self, vmx: &mut Vmx, vpid12: u16) -> u16 {
        let (vpid02, evicted) = self.take(vpid12);
        if evicted.is_some() {
            vmx.invvpid(Invalidate::Single, vpid02, 0);
        }
        vpid02
    }

    /// Gives `vpid12` its vpid02, and tells whose translations are still under it.
    fn take(&mut self, vpid12: u16) -> (u16, Option<u16>) {
        let place = Self::place(vpid12);
        let before = core::mem::replace(&mut self.places[place], vpid12);
        self.changes += u64::from(before != vpid12);
        let evicted = (before != 0 && before != vpid12).then_some(before);
        (FIRST + place as u16, evicted)
    }

    /// How often a place changed its vpid12.
    #[inline(always)]
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// The vpid02 of `vpid12` if there can be translations under it.
    pub fn lookup(&self, vpid12: u16) -> Option<u16> {
        let place = Self::place(vpid12);
        (vpid12 != 0 && self.places[place] == vpid12).then_some(FIRST + place as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        /// A processor that caches everything: a vpid02 holds the translations of each vpid12 that ran under it since it
        /// was flushed.
        #[test]
        fn no_vpid12_ever_runs_on_translations_of_another(
            runs in prop::collection::vec(prop_oneof![1u16..200, 1u16..=u16::MAX], 1..400),
        ) {
            let mut map = VpidMap::new();
            let mut cached: HashMap<u16, Vec<u16>> = HashMap::new();
            for vpid12 in runs {
                let (before, changes) = (map.places, map.changes());
                let (vpid02, evicted) = map.take(vpid12);
                prop_assert_eq!(map.changes() != changes, map.places != before);
                prop_assert!(vpid02 != 0 && vpid02 != VPID01);
                let held = cached.entry(vpid02).or_default();
                if evicted.is_some() {
                    held.clear();
                }
                held.push(vpid12);
                prop_assert!(held.iter().all(|h| *h == vpid12), "{held:?}");
                prop_assert_eq!(map.lookup(vpid12), Some(vpid02));
            }
            // INVVPID must find all that is cached.
            for (vpid02, held) in cached {
                prop_assert!(held.iter().all(|vpid12| map.lookup(*vpid12) == Some(vpid02)));
            }
        }
    }

    #[test]
    fn a_vpid_that_stays_keeps_its_translations() {
        let mut map = VpidMap::new();
        let (first, evicted) = map.take(7);
        assert_eq!(evicted, None);
        assert_eq!(map.take(8), (first + 1, None));
        assert_eq!(map.take(7), (first, None));
        assert_eq!(map.take(7 + PLACES as u16), (first, Some(7)));
        assert_eq!(map.lookup(7), None);
    }

    #[test]
    fn nothing_is_cached_under_vpid_0_or_one_never_used() {
        assert_eq!(VpidMap::new().lookup(0), None);
        assert_eq!(VpidMap::new().lookup(9), None);
    }
}
