//! Guest-physical memory: behind the EPT of the current VMCS, if it uses one, walked bit by bit. Nothing is cached, so that
//! what the tables say now is what counts.
//!
//! Source: SDM vol. 3C, "EPT Translation Mechanism", "EPT-Induced VM Exits", table "Exit Qualification for EPT Violations".

use crate::processor::{Core, Exit};
use nvmx::addr::Hpa;
use nvmx::mm::{PhysMem, Place};
use nvmx::vmx::Field::EPT_POINTER;

pub const READ: u64 = 1;
pub const WRITE: u64 = 2;

impl Core {
    /// The address in the memory of the machine, or the exit that the access brings.
    pub fn physical(&mut self, at: u64, access: u64) -> Result<u64, Exit> {
        if !self.in_guest || !self.secondary(1) {
            return Ok(at);
        }
        let eptp = self.get(EPT_POINTER);
        let flags = eptp >> 6 & 1 == 1;
        let exit = |reason, qualification| Exit { physical: at, linear: at, qualification, ..Exit::new(reason) };
        let (mut table, mut rights, mut path) = (eptp & 0xF_FFFF_FFFF_F000, 7, vec![]);
        if at >> (21 + 9 * (eptp >> 3 & 7)) != 0 {
            return Err(exit(48, access | 3 << 7));
        }
        for level in (0..=eptp >> 3 & 7).rev() {
            let place = table + (at >> (12 + 9 * level) & 511) * 8;
            let entry = self.memory.read_u64(Hpa::new(place));
            rights &= entry;
            if entry & 7 == 0 {
                return Err(exit(48, access | 3 << 7));
            }
            let leaf = level == 0 || level < 3 && entry >> 7 & 1 == 1;
            let kind = entry >> 3 & 7;
            if entry & 3 == 2 || leaf && ![0, 1, 4, 5, 6].contains(&kind) || !leaf && entry & 0xF8 != 0 {
                return Err(exit(49, 0));
            }
            path.push((place, entry));
            if !leaf {
                table = entry & 0xF_FFFF_FFFF_F000;
                continue;
            }
            if rights & access != access {
                return Err(exit(48, access | rights << 3 | 3 << 7));
            }
            if flags {
                for (i, (place, entry)) in path.iter().enumerate() {
                    let dirty = if i + 1 == path.len() && access & WRITE != 0 { 1 << 9 } else { 0 };
                    self.memory.write_u64(Place::anywhere(Hpa::new(*place)), entry | 1 << 8 | dirty);
                }
            }
            let offset = (1 << (12 + 9 * level)) - 1;
            return Ok(entry & 0xF_FFFF_FFFF_F000 & !offset | at & offset);
        }
        unreachable!("level 0 is a leaf")
    }
}
