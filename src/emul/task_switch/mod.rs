//! Task switches of L2, which always exit: outside IA-32e mode nvmx makes them in its place.
//!
//! [`switch`] is a function of registers and memory; `exit` moves them from and to vmcs01. The processor has made the checks
//! that come before the exit; those on the new TSS descriptor are made once more on what is read here, since another CPU may
//! have changed it.
//!
//! Source: SDM vol. 3A, "Task Switching", table "Exception Conditions Checked During a Task Switch"; "Invalid TSS Exception
//! (#TS)"; vol. 3C, "Treatment of Task Switches". Where the SDM leaves the order of checks open it is that of Bochs: the new
//! TSS, the old one; LDT, SS, DS, ES, FS, GS, CS; and a PDPTE with reserved bits is #TS(0) in the new task.

mod exit;
mod load;
mod memory;
mod state;
mod tss;

pub use exit::handle;
pub use state::{
    CS, DS, ES, FS, GS, NT, RF, SS, SegmentState, Source, State, SwitchFailure, TaskException, TaskSwitched, VM,
};

use crate::mm::linear::DataAccess;
use crate::mm::{GuestMemory, PhysMem};
use crate::vmx::event::vector;
use crate::x86::descriptor::type_byte::BUSY;
use crate::x86::{Cr0, selector};
use memory::{Descriptor, Memory};
use tss::Kind;

const TASK_SWITCHED: u64 = Cr0::TS.bits();
/// DR7: L0 to L3 and LE
const LOCAL_ENABLES: u32 = 0x155;

/// Switches to the task of the TSS that `selector` names.
pub fn switch<P: PhysMem>(
    guest: &GuestMemory<P>,
    old: &State,
    selector: u16,
    source: Source,
) -> Result<TaskSwitched, SwitchFailure> {
    let memory = Memory::new(guest, old.paging);
    let (descriptor_at, descriptor) = new_tss(&memory, old, selector, source)?;
    let (old_kind, new_kind) = (Kind::of(old.tr.rights as u8 & 0xF), Kind::of(descriptor.kind()));
    let (old_base, new_base) = (old.tr.base, descriptor.base());
    let (first, last) = old_kind.saved();
    if old.tr.limit < old_kind.least_old_limit() {
        return Err(SwitchFailure::Exception(TaskException::of(vector::TS, old.tr.selector, source)));
    }

    // Nothing is written before everything is known to be there.
    let old_descriptor_at = old.gdt_base.wrapping_add(u32::from(old.tr.selector & 0xFFF8));
    memory.probe(new_base, DataAccess::Read)?;
    memory.probe(new_base.wrapping_add(new_kind.least_limit()), DataAccess::Read)?;
    if source.nests() {
        memory.probe(new_base.wrapping_add(tss::LINK), DataAccess::Write)?;
        memory.probe(new_base.wrapping_add(tss::LINK + 1), DataAccess::Write)?;
    } else {
        memory.probe_busy(old_descriptor_at)?;
    }
    memory.probe(old_base.wrapping_add(first), DataAccess::Write)?;
    memory.probe(old_base.wrapping_add(last), DataAccess::Write)?;
    if source != Source::Iret {
        memory.probe_busy(descriptor_at)?;
    }

    if !source.nests() {
        memory.set_busy(old_descriptor_at, false)?;
    }
    let left_nt = if source == Source::Iret { NT } else { 0 };
    let saved = State { eflags: old.eflags & !left_nt, ..*old };
    old_kind.save(&saved, |offset, bytes| memory.write(old_base.wrapping_add(offset), bytes))?;
    if source.nests() {
        memory.write(new_base.wrapping_add(tss::LINK), &old.tr.selector.to_le_bytes())?;
    }
    // Read once, behind the writes: both may be the same TSS.
    let mut bytes = [0; tss::SIZE];
    memory.read(new_base, &mut bytes[..new_kind.len()])?;
    if source != Source::Iret {
        memory.set_busy(descriptor_at, true)?;
    }

    let mut state = *old;
    state.tr = SegmentState {
        selector,
        base: new_base,
        limit: descriptor.limit(),
        rights: descriptor.rights() | u32::from(BUSY),
    };
    state.paging.cr0 |= TASK_SWITCHED;
    state.dr7 &= !LOCAL_ENABLES;
    let loaded = new_kind.load(&bytes);
    match load::load(guest, &mut state, &loaded, new_kind, source) {
        Ok(()) => Ok(TaskSwitched { state, exception: None, trap: loaded.trap }),
        Err(SwitchFailure::Exception(exception)) => Ok(TaskSwitched { state, exception: Some(exception), trap: false }),
        // The switch cannot be made anew. An entry that another CPU changes without end was not there at some moment.
        Err(SwitchFailure::Again) => {
            let exception = TaskException { vector: vector::PF, error: 0, linear: Some(state.gdt_base.into()) };
            Ok(TaskSwitched { state, exception: Some(exception), trap: false })
        }
        Err(error @ SwitchFailure::NotOwned(_)) => Err(error),
    }
}

/// The descriptor of the new TSS, checked, and where it lies.
fn new_tss<P: PhysMem>(
    memory: &Memory<'_, P>,
    old: &State,
    selector: u16,
    source: Source,
) -> Result<(u32, Descriptor), SwitchFailure> {
    let is_return = source == Source::Iret;
    let fault = |vector| SwitchFailure::Exception(TaskException::of(vector, selector, source));
    let wrong = fault(if is_return { vector::TS } else { vector::GP });
    if selector::is_local(selector) || selector::is_null(selector) {
        return Err(wrong);
    }
    let (at, descriptor) = memory.descriptor(old.gdt_base, old.gdt_limit, selector)?.ok_or(wrong)?;
    // 16-bit and 32-bit TSS, available or busy: 1, 9, 3, 11.
    let is_tss = !descriptor.is_code_or_data() && descriptor.kind() & 0b101 == 1;
    if !is_tss || (descriptor.kind() & BUSY != 0) != is_return {
        return Err(wrong);
    }
    if !descriptor.is_present() {
        return Err(fault(vector::NP));
    }
    if descriptor.limit() < Kind::of(descriptor.kind()).least_limit() {
        return Err(fault(vector::TS));
    }
    Ok((at, descriptor))
}
