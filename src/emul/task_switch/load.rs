//! The second half of a task switch, behind the point of no return: registers and segments of the new task. What goes wrong
//! here is an exception in the new task; what is loaded until then stays.

use super::memory::{Descriptor, Memory};
use super::state::{CS, DS, ES, FS, GS, NT, SS, SegmentState, Source, State, SwitchFailure, TaskException, VM};
use super::tss::{Kind, Loaded};
use crate::mm::linear::{fetch_pdptes, pdptes_are_valid};
use crate::mm::{GuestMemory, PhysMem};
use crate::vmx::event::vector;
use crate::vmx::segment::AccessRights;
use crate::x86::Cr0;
use crate::x86::{Cr4, rflags, selector};

const CR0_PG: u64 = Cr0::PG.bits();
const CR4_PAE: u64 = Cr4::PAE.bits();
/// The flags of EFLAGS that a task has.
const FLAGS: u32 = !(rflags::RESERVED | rflags::FIXED) as u32;
const ALWAYS_ONE: u32 = rflags::FIXED as u32;
const LDT: u8 = 2;

/// Loads what `loaded` has into `state`, whose TR is the new one already.
pub fn load<P: PhysMem>(
    guest: &GuestMemory<P>,
    state: &mut State,
    loaded: &Loaded,
    kind: Kind,
    source: Source,
) -> Result<(), SwitchFailure> {
    state.eip = loaded.eip;
    state.gprs = loaded.gprs;
    state.eflags = loaded.eflags & FLAGS | ALWAYS_ONE | if source.nests() { NT } else { 0 };
    let virtual_8086 = state.eflags & VM != 0;
    let level = if virtual_8086 { 3 } else { selector::rpl(loaded.selectors[CS]) };
    state.ldtr = SegmentState::unusable(loaded.ldt, 0);
    unload(state, loaded, level);
    load_cr3(guest, state, loaded.cr3, source)?;

    let memory = Memory::new(guest, state.paging);
    if !virtual_8086 {
        // Until SS is there an exception finds its stack in the TSS.
        unload(state, loaded, 3);
    }
    load_ldtr(&memory, state, loaded.ldt, source)?;
    if !virtual_8086 {
        load_stack(&memory, state, loaded, level, source)?;
        for register in [DS, ES, FS, GS] {
            load_data(&memory, state, register, loaded.selectors[register], level, source)?;
        }
        load_code(&memory, state, loaded.selectors[CS], level, source)?;
    }
    let esp = state.gprs[4];
    if let Source::Gate { error_code: Some(code), .. } = source {
        push(&memory, state, code, kind, level, source)?;
    }
    if state.eip > state.segments[CS].limit {
        state.gprs[4] = esp;
        return Err(SwitchFailure::Exception(TaskException::of(vector::GP, 0, source)));
    }
    Ok(())
}

/// The segment registers have their selectors and nothing else; in virtual-8086 mode that is all.
fn unload(state: &mut State, loaded: &Loaded, level: u8) {
    let virtual_8086 = state.eflags & VM != 0;
    for (register, selector) in state.segments.iter_mut().zip(loaded.selectors) {
        *register =
            if virtual_8086 { SegmentState::of_8086(selector) } else { SegmentState::unusable(selector, level) };
    }
    if !virtual_8086 {
        state.segments[CS] = SegmentState::unloaded_code(loaded.selectors[CS], level);
    }
}

/// CR3, if it changes; with PAE paging the PDPTEs.
fn load_cr3<P: PhysMem>(
    guest: &GuestMemory<P>,
    state: &mut State,
    cr3: Option<u32>,
    source: Source,
) -> Result<(), SwitchFailure> {
    let Some(cr3) = cr3.filter(|cr3| state.paging.cr0 & CR0_PG != 0 && u64::from(*cr3) != state.paging.cr3) else {
        return Ok(());
    };
    state.paging.cr3 = cr3.into();
    if state.paging.cr4 & CR4_PAE != 0 {
        let pdptes = fetch_pdptes(guest, cr3.into());
        if !pdptes_are_valid(&pdptes, 1 << state.paging.physical_width) {
            state.paging.pdptes = [0; 4];
            return Err(SwitchFailure::Exception(TaskException::of(vector::TS, 0, source)));
        }
        state.paging.pdptes = pdptes;
    }
    Ok(())
}

fn load_ldtr<P: PhysMem>(
    memory: &Memory<'_, P>,
    state: &mut State,
    selector: u16,
    source: Source,
) -> Result<(), SwitchFailure> {
    let invalid = SwitchFailure::Exception(TaskException::of(vector::TS, selector, source));
    if selector::is_local(selector) {
        return Err(invalid);
    }
    if selector::is_null(selector) {
        return Ok(());
    }
    let (_, descriptor) = memory.descriptor(state.gdt_base, state.gdt_limit, selector)?.ok_or(invalid)?;
    if descriptor.is_code_or_data() || descriptor.kind() != LDT || !descriptor.is_present() {
        return Err(invalid);
    }
    state.ldtr = of(selector, descriptor);
    Ok(())
}

fn load_stack<P: PhysMem>(
    memory: &Memory<'_, P>,
    state: &mut State,
    loaded: &Loaded,
    level: u8,
    source: Source,
) -> Result<(), SwitchFailure> {
    let selector = loaded.selectors[SS];
    let fault = |vector| SwitchFailure::Exception(TaskException::of(vector, selector, source));
    let (at, descriptor) = find(memory, state, selector)?.ok_or(fault(vector::TS))?;
    let rights = AccessRights(descriptor.rights());
    if !rights.is_code_or_data() || !rights.is_writable_data() {
        return Err(fault(vector::TS));
    }
    if !rights.is_present() {
        return Err(fault(vector::SS));
    }
    if rights.dpl() != level || selector::rpl(selector) != level {
        return Err(fault(vector::TS));
    }
    memory.touch(at, descriptor)?;
    // With a stack the task runs at its own level.
    unload(state, loaded, level);
    state.segments[SS] = of(selector, descriptor);
    Ok(())
}

fn load_data<P: PhysMem>(
    memory: &Memory<'_, P>,
    state: &mut State,
    register: usize,
    selector: u16,
    level: u8,
    source: Source,
) -> Result<(), SwitchFailure> {
    if selector::is_null(selector) {
        return Ok(());
    }
    let fault = |vector| SwitchFailure::Exception(TaskException::of(vector, selector, source));
    let (at, descriptor) = find(memory, state, selector)?.ok_or(fault(vector::TS))?;
    let rights = AccessRights(descriptor.rights());
    if !rights.is_code_or_data() || rights.is_code() && !rights.is_readable_code() {
        return Err(fault(vector::TS));
    }
    if !is_conforming(rights) && (selector::rpl(selector)).max(level) > rights.dpl() {
        return Err(fault(vector::TS));
    }
    if !rights.is_present() {
        return Err(fault(vector::NP));
    }
    memory.touch(at, descriptor)?;
    state.segments[register] = of(selector, descriptor);
    Ok(())
}

fn load_code<P: PhysMem>(
    memory: &Memory<'_, P>,
    state: &mut State,
    selector: u16,
    level: u8,
    source: Source,
) -> Result<(), SwitchFailure> {
    let fault = |vector| SwitchFailure::Exception(TaskException::of(vector, selector, source));
    let (at, descriptor) = find(memory, state, selector)?.ok_or(fault(vector::TS))?;
    let rights = AccessRights(descriptor.rights());
    if !rights.is_code_or_data() || !rights.is_code() {
        return Err(fault(vector::TS));
    }
    let allowed = if is_conforming(rights) { rights.dpl() <= level } else { rights.dpl() == level };
    if !allowed {
        return Err(fault(vector::TS));
    }
    if !rights.is_present() {
        return Err(fault(vector::NP));
    }
    memory.touch(at, descriptor)?;
    state.segments[CS] = of(selector, descriptor);
    Ok(())
}

/// Type bit 2 of code.
fn is_conforming(rights: AccessRights) -> bool {
    rights.is_code() && rights.kind() & 1 << 2 != 0
}

/// The descriptor of a segment, in the GDT or the LDT; `None` for a null selector or one beyond its table.
fn find<P: PhysMem>(
    memory: &Memory<'_, P>,
    state: &State,
    selector: u16,
) -> Result<Option<(u32, Descriptor)>, SwitchFailure> {
    if selector::is_null(selector) {
        return Ok(None);
    }
    if !selector::is_local(selector) {
        return memory.descriptor(state.gdt_base, state.gdt_limit, selector);
    }
    match AccessRights(state.ldtr.rights).is_unusable() {
        true => Ok(None),
        false => memory.descriptor(state.ldtr.base, state.ldtr.limit, selector),
    }
}

/// A register with this descriptor in it; segments are marked accessed by being loaded.
fn of(selector: u16, descriptor: Descriptor) -> SegmentState {
    let accessed = descriptor.is_code_or_data() as u32;
    SegmentState {
        selector,
        base: descriptor.base(),
        limit: descriptor.limit(),
        rights: descriptor.rights() | accessed,
    }
}

/// Pushes the error code of the event, as wide as the TSS.
fn push<P: PhysMem>(
    memory: &Memory<'_, P>,
    state: &mut State,
    code: u32,
    kind: Kind,
    level: u8,
    source: Source,
) -> Result<(), SwitchFailure> {
    let stack = state.segments[SS];
    let rights = AccessRights(stack.rights);
    let bytes = code.to_le_bytes();
    let bytes = if kind == Kind::Wide32 { &bytes[..] } else { &bytes[..2] };
    let mask = if rights.is_32_bit() { u32::MAX } else { 0xFFFF };
    let esp = state.gprs[4];
    let offset = esp.wrapping_sub(bytes.len() as u32) & mask;
    let last = offset.checked_add(bytes.len() as u32 - 1);
    let fits = last.is_some_and(|last| match rights.is_expand_down() {
        true => offset > stack.limit && last <= mask,
        false => last <= stack.limit,
    });
    if !fits {
        return Err(SwitchFailure::Exception(TaskException::of(vector::SS, 0, source)));
    }
    memory.push(stack.base.wrapping_add(offset), bytes, level, state.eflags)?;
    state.gprs[4] = esp & !mask | offset;
    Ok(())
}
