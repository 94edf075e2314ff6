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
}

impl Default for VpidMap {
    fn default() -> Self {
        Self::new()
    }
}

impl VpidMap {
    /// Empty.
    pub const fn new() -> Self {
        VpidMap { places: [0; PLACES] }
    }

    const fn place(vpid12: u16) -> usize {
        vpid12 as usize % PLACES
    }

    /// The vpid02 that holds the translations of `vpid12` (not 0), making room for it.
    pub fn assign(&mut self, vmx: &mut Vmx, vpid12: u16) -> u16 {
        let place = Self::place(vpid12);
        let vpid02 = FIRST + place as u16;
        if self.places[place] != vpid12 {
            if self.places[place] != 0 {
                vmx.invvpid(Invalidate::Single, vpid02, 0);
            }
            self.places[place] = vpid12;
        }
        vpid02
    }

    /// The vpid02 of `vpid12` if there can be translations under it.
    pub fn lookup(&self, vpid12: u16) -> Option<u16> {
        let place = Self::place(vpid12);
        (vpid12 != 0 && self.places[place] == vpid12).then_some(FIRST + place as u16)
    }
}
