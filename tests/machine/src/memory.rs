//! Guest-physical memory: behind the EPT of the current VMCS, if it uses one, walked bit by bit. Nothing is cached, so that
//! what the tables say now is what counts.
//!
//! Source: SDM vol. 3C, "EPT Translation Mechanism", "EPT-Induced VM Exits", table "Exit Qualification for EPT Violations", "Sub-Page Write
//! Permissions".

use crate::processor::{Core, Exit};
use nvmx::addr::Hpa;
use nvmx::mm::{PhysMem, Place};
use nvmx::vmx::{Field::*, Fields};

pub const READ: u64 = 1;
pub const WRITE: u64 = 2;
/// The access is one of the processor's to the guest's page tables.
const OF_TABLES: u64 = 1 << 32;

impl Core {
    /// The address in the memory of the machine, or the exit that the access brings.
    pub fn physical(&mut self, at: u64, access: u64) -> Result<u64, Exit> {
        if !self.in_guest || !self.secondary(1) {
            return Ok(at);
        }
        let (of_tables, access) = (access & OF_TABLES != 0, access & !OF_TABLES);
        let eptp = self.get(EPT_POINTER);
        let flags = eptp >> 6 & 1 == 1;
        // Of the advanced information: the programs' pages are the supervisor's and writable.
        let advanced = if self.caps.ept_vpid.0 >> 22 & 1 == 1 { 1 << 10 } else { 0 };
        let exit = |reason, qualification| Exit { physical: at, linear: at, qualification, ..Exit::new(reason) };
        let (mut table, mut rights, mut path) = (eptp & 0xF_FFFF_FFFF_F000, 7, vec![]);
        if at >> (21 + 9 * (eptp >> 3 & 7)) != 0 {
            return Err(exit(48, access | 3 << 7 | advanced));
        }
        for level in (0..=eptp >> 3 & 7).rev() {
            let place = table + (at >> (12 + 9 * level) & 511) * 8;
            let entry = self.memory.read_u64(Hpa::new(place));
            rights &= entry;
            if entry & 7 == 0 {
                return Err(exit(48, access | 3 << 7 | advanced));
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
            let has_sub_pages = level == 0 && entry >> 61 & 1 == 1 && rights & 3 == 1;
            let by_sub_page = has_sub_pages && access & WRITE != 0 && !of_tables;
            if rights & access != access && !(by_sub_page && self.sub_page_is_writable(at)?) {
                return Err(exit(48, access | rights << 3 | 3 << 7 | advanced));
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

    /// Whether the table of sub-page write permissions allows a write, or the exit of one that is not there or wrong.
    fn sub_page_is_writable(&mut self, at: u64) -> Result<bool, Exit> {
        if !self.secondary(23) {
            return Ok(false);
        }
        let mut table = self.get(SUB_PAGE_PERMISSION_TABLE_POINTER);
        let event = |qualification| Exit { physical: at, linear: at, qualification, ..Exit::new(66) };
        for level in (0..4).rev() {
            let entry = self.memory.read_u64(Hpa::new(table + (at >> (12 + 9 * level) & 511) * 8));
            match (level, entry & 1) {
                (0, _) if (1..64).step_by(2).any(|odd| entry >> odd & 1 == 1) => return Err(event(0)),
                (0, _) => return Ok(entry >> (at % 4096 / 128 * 2) & 1 == 1),
                (_, 0) => return Err(event(1 << 11)),
                _ if entry & !0xF_FFFF_FFFF_F001 != 0 => return Err(event(0)),
                _ => table = entry & 0xF_FFFF_FFFF_F000,
            }
        }
        unreachable!("level 0 is the last")
    }

    /// The guest-physical address of a linear one: four levels, a supervisor's access in 64-bit mode. The tables of the programs
    /// have their accessed flags.
    pub fn translated(&mut self, linear: u64, access: u64) -> Result<u64, Unreached> {
        if !self.is_long() || self.state.get(GUEST_CR0) >> 31 == 0 {
            return Ok(linear);
        }
        let write = access & WRITE != 0;
        // With accessed and dirty flags in EPT, such an access is treated as a write.
        let flags_of_ept = self.in_guest && self.secondary(1) && self.get(EPT_POINTER) >> 6 & 1 == 1;
        let of_tables = OF_TABLES | if flags_of_ept { READ | WRITE } else { READ };
        let mut table = self.state.get(GUEST_CR3) & 0xF_FFFF_FFFF_F000;
        let mut writable = true;
        for level in (0..4).rev() {
            let place = table + (linear >> (12 + 9 * level) & 511) * 8;
            let place = self.physical(place, of_tables).map_err(|exit| match exit.reason {
                48 => Unreached::Exit(Exit { linear, qualification: exit.qualification & !(0xF << 8), ..exit }),
                _ => Unreached::Exit(Exit { linear, ..exit }),
            })?;
            let entry = self.memory.read_u64(Hpa::new(place));
            if entry & 1 == 0 {
                return Err(Unreached::PageFault(u32::from(write) << 1));
            }
            assert_eq!(entry & 0x20, 0x20, "an entry of {linear:#x} is not marked as accessed");
            writable &= entry >> 1 & 1 == 1;
            table = entry & 0xF_FFFF_FFFF_F000;
            if level == 0 || level < 3 && entry >> 7 & 1 == 1 {
                if write && !writable && self.state.get(GUEST_CR0) >> 16 & 1 == 1 {
                    return Err(Unreached::PageFault(3));
                }
                let offset = (1 << (12 + 9 * level)) - 1;
                return Ok(table & !offset | linear & offset);
            }
        }
        unreachable!("level 0 is a leaf")
    }
}

/// Why a linear address leads nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unreached {
    /// The error code.
    PageFault(u32),
    Exit(Exit),
}
