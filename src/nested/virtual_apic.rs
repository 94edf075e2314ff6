//! APIC virtualization for L3: the pages of L2 that the processor works with.
//!
//! Since L2 owns the machine, APIC virtualization runs in vmcs02 as it would in vmcs12: nvmx's part is to vouch for three
//! addresses. Vectors, thresholds, bitmaps and the guest interrupt status live in vmcs02, where L2 reaches them by itself.
//!
//! Source: Intel SDM vol. 3C (December 2024), chapter "APIC Virtualization and Virtual Interrupts".

use super::reflect;
use crate::addr::{Gpa, Hpa, PAGE_SIZE};
use crate::cpu::Cpu;
use crate::mm::PhysMem;
use crate::rules::merge::{ApicPages, Duties};
use crate::trace::KillReason;
use crate::vmcs::slots::SlotId;
use crate::vmx::exit::{BasicReason, ExitReason};
use crate::vmx::{Field, Fields, VmxError};

const ENTRY_EVENT_VALID: u64 = 1 << 31;

/// The pages that a checked vmcs12 names, for vmcs02.
pub(super) fn pages(cpu: &Cpu, vmcs12: &impl Fields) -> ApicPages {
    let page = |field| page(cpu, Gpa::new(vmcs12.get(field)));
    ApicPages {
        virtual_apic: page(Field::VIRTUAL_APIC_ADDRESS),
        apic_access: page(Field::APIC_ACCESS_ADDRESS),
        posted_descriptor: page(Field::POSTED_INTR_DESC_ADDR),
    }
}

/// L2's page. If L2 has no memory there, a page of all ones: what the processor finds, and loses, where nothing answers.
/// It has no other use, and an APIC-access page that is not L2's is in no ept02, so that nothing ever compares equal.
fn page(cpu: &Cpu, at: Gpa) -> Hpa {
    cpu.guest.translate(at).unwrap_or_else(|_| {
        for offset in (0..PAGE_SIZE).step_by(8) {
            cpu.phys.write_u64(cpu.void.at(offset), u64::MAX);
        }
        cpu.void.hpa()
    })
}

/// Accesses are sure to be virtualized only where all tables map the page by a 4 KiB page (SDM, "Issues Pertaining to
/// Page Size and TLB Management"). ept02 does so where ept12 does; an L3 without EPT of L2 runs on ept01, which L2 does
/// not know of. Fails for want of frames.
pub(super) fn map_access_page(cpu: &mut Cpu, id: SlotId) -> Result<(), VmxError> {
    let merged = &cpu.nested.slots[id].merged;
    let Some(page) = merged.filter(|m| m.duties.contains(Duties::FLUSH_EPT01)).and_then(|m| m.apic_access) else {
        return Ok(());
    };
    let mtrrs = &cpu.config.mtrrs;
    let memory_type = |start: Gpa, bytes| mtrrs.type_of(start.get(), bytes);
    let tables = &mut Cpu::tables(&mut cpu.frames, &cpu.phys);
    cpu.ept01.make_small(Gpa::new(page.get()), memory_type, tables).map_err(|_| {
        log::error!("VM entry refused: no frame left to map the APIC-access page {page} by itself");
        VmxError::EntryInvalidControlField
    })
}

/// The processor does not let L3 go on after an exit that nvmx handled, because the task priority fell below the threshold
/// without a write to the TPR: by a write to the virtual-APIC page as memory. L3 was running, so for L2 this is no failed
/// instruction. It gets the exit that the next virtualized write to the TPR would have brought.
#[cold]
pub(super) fn below_threshold(cpu: &mut Cpu, id: SlotId) -> Result<(), KillReason> {
    // An event that was to be delivered again stands in the IDT-vectoring information still.
    let event = cpu.vmx.read(Field::VM_ENTRY_INTR_INFO_FIELD);
    cpu.vmx.write(Field::VM_ENTRY_INTR_INFO_FIELD, event & !ENTRY_EVENT_VALID);
    reflect::reflect(cpu, id, Some((ExitReason::exit(BasicReason::TPR_BELOW_THRESHOLD), 0)))
}
