//! Virtualization exceptions (#VE) of L3: what L2 gets in place of an EPT violation under "EPT-violation #VE".
//!
//! The control does not run in vmcs02. An entry that ept02 lacks is no entry that ept12 lacks, so each violation exits, and
//! nvmx does what a processor with ept12 alone would have done.
//!
//! Source: SDM vol. 3C, "Virtualization Exceptions": "Convertible EPT Violations", "Virtualization-Exception Information",
//! "Delivery of Virtualization Exceptions".

use super::reflect;
use crate::addr::Gpa;
use crate::cpu::Cpu;
use crate::ept::Qualification;
use crate::guest::events;
use crate::mm::{GuestMemory, PhysMem};
use crate::trace::KillReason;
use crate::vmcs::slots::SlotId;
use crate::vmx::Field;
use crate::vmx::event::{EventInfo, EventKind, vector};
use crate::vmx::exit::BasicReason;
use crate::x86::Cr0;

/// Offset of the word that is 0 while the area is free.
const BUSY: u64 = 4;
const BYTES: usize = 34;

/// The virtualization-exception information area (SDM table "Format of the Virtualization-Exception Information Area").
struct Information {
    qualification: u64,
    linear: u64,
    physical: u64,
    eptp_index: u16,
}

impl Information {
    /// Writes it to `area`, unless that is in use or not L2's memory, which reads as all ones.
    fn write(&self, area: Gpa, guest: &GuestMemory<impl PhysMem>) -> bool {
        let free = area.checked_add(BUSY).is_some_and(|word| guest.read_u32(word) == Ok(0));
        free && guest.write_bytes(area, &self.bytes()).is_ok()
    }

    fn bytes(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        let words = [
            u64::from(BasicReason::EPT_VIOLATION.0) | 0xFFFF_FFFF << 32,
            self.qualification,
            self.linear,
            self.physical,
            self.eptp_index.into(),
        ];
        for (byte, value) in bytes.iter_mut().zip(words.into_iter().flat_map(u64::to_le_bytes)) {
            *byte = value;
        }
        bytes
    }
}

/// Makes a convertible violation a #VE; false if it stays an exit. vmcs02 is current and has the violation's information.
#[cold]
pub fn convert(cpu: &mut Cpu, id: SlotId, qualification: Qualification) -> Result<bool, KillReason> {
    let vmx = &mut cpu.vmx;
    let delivering = EventInfo(vmx.read(Field::IDT_VECTORING_INFO_FIELD) as u32).is_valid();
    let protected = vmx.read(Field::GUEST_CR0) & Cr0::PE.bits() != 0;
    if delivering || !protected || qualification.contains(Qualification::ASYNCHRONOUS) {
        return Ok(false);
    }
    let vmcs12 = &cpu.nested.slots[id].vmcs12;
    let information = Information {
        qualification: qualification.bits(),
        linear: vmx.read(Field::GUEST_LINEAR_ADDRESS),
        physical: vmx.read(Field::GUEST_PHYSICAL_ADDRESS),
        eptp_index: vmcs12.get(Field::EPTP_INDEX) as u16,
    };
    let area = Gpa::new(vmcs12.get(Field::VIRTUALIZATION_EXCEPTION_INFO));
    if !information.write(area, &cpu.guest) {
        return Ok(false);
    }
    let event = EventInfo::new(EventKind::HardwareException, vector::VE);
    if vmx.read(Field::EXCEPTION_BITMAP) >> vector::VE & 1 == 0 {
        events::inject(cpu, event, None, None);
        return Ok(true);
    }
    let unblocked = qualification.contains(Qualification::NMI_UNBLOCKING);
    let info = event.0 | if unblocked { EventInfo::IRET_UNBLOCKED_NMIS } else { 0 };
    reflect::exception(cpu, id, info, None, 0)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mm::Span;
    use crate::mm::phys::VecMem;

    const INFORMATION: Information = Information {
        qualification: 0x1122_3344_5566_7788,
        linear: 0x0102_0304_0506_0708,
        physical: 0x1112_1314_1516_1718,
        eptp_index: 0x0123,
    };

    fn memory() -> GuestMemory<VecMem> {
        GuestMemory::new(VecMem::new(0x4000), Span::new(0x2000, 0x3000), 36)
    }

    #[test]
    fn the_area_is_that_of_the_sdm() {
        let memory = memory();
        // What is behind the area stays.
        memory.write_u64(Gpa::new(0x1020), u64::MAX).unwrap();
        assert!(INFORMATION.write(Gpa::new(0x1000), &memory));
        let read = |offset: u64| memory.read_u64(Gpa::new(0x1000 + offset)).unwrap();
        assert_eq!(read(0), 0xFFFF_FFFF_0000_0030);
        assert_eq!(
            [read(8), read(16), read(24)],
            [INFORMATION.qualification, INFORMATION.linear, INFORMATION.physical]
        );
        assert_eq!(read(32), 0xFFFF_FFFF_FFFF_0123);
    }

    #[test]
    fn an_area_in_use_is_left_alone() {
        for bit in 0..32 {
            let memory = memory();
            memory.write_u64(Gpa::new(0x1000), 1 << (32 + bit)).unwrap();
            assert!(!INFORMATION.write(Gpa::new(0x1000), &memory), "bit {bit}");
            assert_eq!(memory.read_u64(Gpa::new(0x1000)), Ok(1 << (32 + bit)));
            assert_eq!(memory.read_u64(Gpa::new(0x1008)), Ok(0));
        }
        let memory = memory();
        memory.write_u64(Gpa::new(0x1000), 0xFFFF_FFFF).unwrap();
        assert!(INFORMATION.write(Gpa::new(0x1000), &memory), "only the word at offset 4 counts");
    }

    #[test]
    fn an_area_outside_of_the_guest_s_memory_is_in_use() {
        for area in [0x2000, 1 << 36, !0xFFF] {
            let memory = memory();
            assert!(!INFORMATION.write(Gpa::new(area), &memory), "{area:#x}");
            assert_eq!(memory.phys().bytes(0x2000, 0x1000), [0; 0x1000]);
        }
    }
}
