//! The usual load of L2's, in few instructions: by the supervisor in 64-bit mode with four levels, where every entry is present,
//! accessed and without a bit that is reserved, and the page is the supervisor's. Whatever else it is, the whole walk
//! ([`Paging`](super::linear::Paging)) says what.

use crate::addr::Gpa;
use crate::mm::PhysMem;
use crate::mm::guest::GuestMemory;
use crate::mm::linear::PageKind;
use crate::x86::paging::{ACCESSED, ADDRESS, LARGE, NO_EXECUTE, PRESENT, USER, WRITABLE, address};
use crate::x86::{Cr4, efer};

/// The registers that such a load depends on: 64-bit mode is paged, and a page of the supervisor is nobody else's.
#[derive(Clone, Copy, Debug)]
pub struct PlainRead {
    /// CR3
    pub cr3: u64,
    /// CR4
    pub cr4: u64,
    /// EFER
    pub efer: u64,
    /// Physical-address width.
    pub physical_width: u32,
}

impl PlainRead {
    /// The address behind `linear` and the kind of its page. `None` if the load is not a usual one.
    #[inline(always)]
    pub fn page(&self, memory: &GuestMemory<impl PhysMem>, linear: u64) -> Option<(Gpa, PageKind)> {
        if self.efer & efer::LMA == 0 || self.cr4 & (Cr4::LA57.bits() | Cr4::PKS.bits()) != 0 {
            return None;
        }
        let mask = address(self.physical_width);
        let usual = PRESENT | ACCESSED;
        let no_nx = if self.efer & efer::NXE == 0 { NO_EXECUTE } else { 0 };
        let judged = usual | no_nx | !mask & ADDRESS;
        let (mut table, mut all, mut any) = (self.cr3 & mask, WRITABLE | USER, 0);
        for shift in [39, 30, 21, 12] {
            let at = memory.translate(Gpa::new(table | (linear >> shift & 0x1FF) << 3)).ok()?;
            let entry = memory.phys().read_u64(at);
            if entry & judged != usual {
                return None;
            }
            all &= entry;
            any |= entry;
            if shift == 12 || entry & LARGE != 0 {
                let page = (1u64 << shift) - 1;
                if shift == 39 || all & USER != 0 || entry & page & mask & !0x1000 != 0 {
                    return None;
                }
                let kind =
                    PageKind { user: false, writable: all & WRITABLE != 0, execute_disable: any & NO_EXECUTE != 0 };
                return Some((Gpa::new(entry & mask & !page | linear & page), kind));
            }
            table = entry & mask;
        }
        None
    }
}
