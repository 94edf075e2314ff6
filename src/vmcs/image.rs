//! The image of a VMCS in memory: where each field lies, learned by trying.
//!
//! A processor may keep a VMCS on chip and in a format of its own, so software must not look at it there (SDM vol. 3C,
//! "Software Use of Virtual-Machine Control Structures"). A hypervisor below nvmx that emulates VMX is software: KVM writes
//! a VMCS to nvmx's memory when another becomes current and reads it again when it comes back, in a layout that it cannot
//! change while guests may be migrated; and every VMREAD and VMWRITE that it does not shadow costs an exit. There nvmx
//! reads and writes VMCSs in memory while they are not current.
//!
//! Nothing is assumed about the layout. Each field gets a value of its own by VMWRITE, another VMCS becomes current, and the
//! values are looked for; a field is known if both of two rounds find it exactly once, at the same place. nvmx uses images
//! only if all fields it needs are known, and if what it writes there is what VMREAD gives afterwards.

use crate::addr::PAGE_SIZE;
use crate::hw::host_area::Places;
use crate::hw::phys::DirectMap;
use crate::hw::vmx::Region;
use crate::vmx::FieldAccess;
use crate::vmx::field::{Field, Width};
use crate::vmx::lent::IN_MEMORY;

/// Bytes of the region that are searched.
const BYTES: usize = PAGE_SIZE as usize;

/// Where each field lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageLayout {
    /// Offset in the region; `UNKNOWN` if the field was not found.
    offsets: [u16; Field::COUNT],
}

const UNKNOWN: u16 = u16::MAX;

/// The two rounds of the search.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Round {
    /// Values count up.
    First,
    /// Values count down.
    Second,
}

/// The value that a field gets in a round. It fits the field, also where an implementation drops reserved bits of access
/// rights, and does not occur inside the values of other fields.
pub const fn probe(field: Field, round: Round) -> u64 {
    let id = match round {
        Round::First => field.index() as u64,
        Round::Second => 255 - field.index() as u64,
    };
    match field.width() {
        Width::W16 => 0xB700 | id,
        Width::W32 => 0x0001_F000 | id,
        Width::W64 | Width::Natural => 0x0000_2C9C_9C9C_9C00 | id,
    }
}

const _: () = assert!(Field::COUNT < 256, "a probe has room for 256 fields");

impl ImageLayout {
    /// Looks for the probes of both rounds in the region's content after each of them.
    pub fn learn(first: &[u8; BYTES], second: &[u8; BYTES]) -> Self {
        let mut offsets = [UNKNOWN; Field::COUNT];
        for (offset, field) in offsets.iter_mut().zip(Field::ALL) {
            let one = find(first, *field, Round::First);
            if one.is_some() && one == find(second, *field, Round::Second) {
                *offset = one.unwrap_or(UNKNOWN);
            }
        }
        Self { offsets }
    }

    /// True if the field's place is known.
    pub fn knows(&self, field: Field) -> bool {
        self.offsets[field.index()] != UNKNOWN
    }

    /// Reads a field of a VMCS that is not current.
    #[inline]
    pub fn read(&self, phys: &DirectMap, region: Region, field: Field) -> u64 {
        region.read(phys, self.offset(field), field)
    }

    /// Writes a field of a VMCS that is not current.
    #[inline]
    pub fn write(&self, phys: &DirectMap, region: Region, field: Field, value: u64) {
        region.write(phys, self.offset(field), field.width(), value);
    }

    /// Where in a region the fields lie that are lent.
    pub fn lent(&self) -> Places {
        IN_MEMORY.map(|field| self.offset(field))
    }

    /// A field that is not known lies, harmlessly, in the last bytes of the region.
    #[inline]
    fn offset(&self, field: Field) -> u64 {
        u64::from(self.offsets[field.index()]).min(PAGE_SIZE - 8)
    }
}

/// The image of one VMCS that is not current.
pub struct VmcsImage<'a> {
    /// Where fields lie.
    pub layout: &'a ImageLayout,
    /// How memory is reached.
    pub phys: &'a DirectMap,
    /// The VMCS region.
    pub region: Region,
}

impl FieldAccess for VmcsImage<'_> {
    fn read(&mut self, field: Field) -> u64 {
        self.layout.read(self.phys, self.region, field)
    }

    fn write(&mut self, field: Field, value: u64) {
        self.layout.write(self.phys, self.region, field, value);
    }
}

/// The only place of a field's probe, aligned to two bytes and with eight bytes behind it inside the region.
fn find(content: &[u8; BYTES], field: Field, round: Round) -> Option<u16> {
    let bytes = probe(field, round).to_le_bytes();
    let len = match field.width() {
        Width::W16 => 2,
        Width::W32 => 4,
        Width::W64 | Width::Natural => 8,
    };
    let mut places = (0..=BYTES - 8).step_by(2).filter(|at| content.get(*at..at + len) == bytes.get(..len));
    let place = places.next()?;
    places.next().is_none().then_some(place as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Hpa;
    use crate::mm::{FramePool, PhysMem, Span};

    /// A region that packs the fields one after the other behind a header, in table order from `rotate` on.
    fn pack(round: Round, rotate: usize, skip: Option<Field>) -> [u8; BYTES] {
        let mut region = [0; BYTES];
        let mut at = 64;
        for i in 0..Field::COUNT {
            let field = Field::ALL[(i + rotate) % Field::COUNT];
            let len = match field.width() {
                Width::W16 => 2,
                Width::W32 => 4,
                _ => 8,
            };
            if Some(field) != skip {
                region[at..at + len].copy_from_slice(&probe(field, round).to_le_bytes()[..len]);
            }
            at += len;
        }
        region
    }

    #[test]
    fn every_field_is_found_in_any_order() {
        for rotate in [0, 1, 57, 150] {
            let layout = ImageLayout::learn(&pack(Round::First, rotate, None), &pack(Round::Second, rotate, None));
            assert!(Field::ALL.iter().all(|f| layout.knows(*f)), "rotated by {rotate}");
        }
    }

    #[test]
    fn a_field_that_is_missing_or_moves_is_not_known() {
        let missing = Some(Field::GUEST_RIP);
        let layout = ImageLayout::learn(&pack(Round::First, 0, missing), &pack(Round::Second, 0, missing));
        assert!(!layout.knows(Field::GUEST_RIP) && layout.knows(Field::GUEST_RSP));
        let layout = ImageLayout::learn(&pack(Round::First, 0, None), &pack(Round::Second, 9, None));
        assert!(!layout.knows(Field::GUEST_RIP));
    }

    #[test]
    fn a_probe_fits_its_field_and_access_rights() {
        for field in Field::ALL {
            for round in [Round::First, Round::Second] {
                assert_eq!(probe(*field, round) & !field.mask(), 0, "{field}");
            }
        }
        assert_eq!(probe(Field::GUEST_CS_AR_BYTES, Round::First) & !0x1_F0FF, 0);
    }

    #[test]
    fn a_write_changes_its_field_alone() {
        let layout = ImageLayout::learn(&pack(Round::First, 0, None), &pack(Round::Second, 0, None));
        let memory = DirectMap::of_host(Hpa::new(0x3000));
        let frame = FramePool::new(Span::new(0x1000, 0x2000)).alloc(&memory).unwrap();
        let content = pack(Round::First, 0, None);
        memory.write_bytes(frame.at(0), &content);
        let region = Region::new(&frame, &memory, 0);
        for field in Field::ALL {
            layout.write(&memory, region, *field, 0x1122_3344_5566_7788);
            assert_eq!(layout.read(&memory, region, *field), 0x1122_3344_5566_7788 & field.mask());
            layout.write(&memory, region, *field, probe(*field, Round::First));
        }
        let mut after = [0; BYTES];
        memory.read_bytes(frame.hpa(), &mut after);
        assert_eq!(after, content);
    }
}
