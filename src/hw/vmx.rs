//! VMX instructions as nvmx executes them, each counted.
//!
//! Source: Intel SDM vol. 3C, "VMX Instruction Reference" (December 2024).

pub use super::processor::Invalidate;
pub use super::region::Region;

use super::processor::Processor;
use super::this_processor;
use super::{cr, msr};
use crate::hw::phys::DirectMap;
use crate::trace::counters::Counters;
use crate::vmx::{Capabilities, Field, FieldAccess, lent};
use crate::x86::msr::{FEATURE_LOCK, FEATURE_VMX, IA32_FEATURE_CONTROL};
use crate::x86::{Cr0, Cr4};
use l2_protocol::abi::Counter;

// No value of a guest reaches an assertion here unchecked (invariant I6): VMCS regions are frames of nvmx's pool with
// their revision written, EPTPs are made by `ept`, VPIDs by `vmcs::vpid`, INVEPT and INVVPID types are those that the
// requirements or the capabilities offered to L2 include. The one operand of L2's, the linear address of an INVVPID, is
// checked to be canonical (`nested::instr::invalidate`).

/// The right to execute VMX instructions on this CPU: it exists once VMXON succeeded. Counts what it executes.
pub struct Vmx {
    /// All counters of this CPU.
    pub counters: Counters,
    /// nvmx's own values of the fields that are lent, the same in each VMCS of this CPU, as `host_area` has written them.
    pub(super) own: [u64; lent::COUNT],
}

/// Allows VMX in IA32_FEATURE_CONTROL where firmware has left that open, as a machine without firmware does.
/// `None` if the processor refuses.
///
/// Source: SDM vol. 3C, "Enabling and Entering VMX Operation".
fn unlock() -> Option<()> {
    let control = msr::rdmsr_safe(IA32_FEATURE_CONTROL).ok()?;
    if control & FEATURE_LOCK != 0 {
        return (control & FEATURE_VMX != 0).then_some(());
    }
    // SAFETY: the register decides only whether VMXON faults.
    unsafe { msr::wrmsr_safe(IA32_FEATURE_CONTROL, control | FEATURE_LOCK | FEATURE_VMX) }.ok()
}

/// nvmx's CR0: protection, numeric error, write protection, paging; caching as it is.
pub fn host_cr0(now: u64, caps: &Capabilities) -> u64 {
    now & (Cr0::CD | Cr0::NW).bits() | (Cr0::PE | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::PG).bits() | caps.cr0_fixed0
}

/// nvmx's CR4: machine checks reach their handler, and XSETBV of L2 is executed by nvmx. Nothing else: what is 0 here is
/// without effect while nvmx runs, whatever the MSRs of L2 say of it (CET, protection keys, user interrupts, FRED).
pub fn host_cr4(caps: &Capabilities) -> u64 {
    (Cr4::PAE | Cr4::MCE | Cr4::OSXSAVE).bits() & caps.cr4_fixed1 | caps.cr4_fixed0
}

impl Vmx {
    /// Enters VMX operation with a VMXON region. `None` if the processor refuses it.
    ///
    /// CR0 and CR4 get nvmx's values, whatever the loader left there. Translations of whoever used VMX before are dropped.
    pub fn enter(region: Region, caps: &Capabilities) -> Option<Vmx> {
        unlock()?;
        // SAFETY: 1. Paging, long mode and everything that nvmx's own code relies on stay on (`host_cr0`, `host_cr4`); the
        // processor has each bit. 2. IA32_FEATURE_CONTROL allows VMX, so VMXON does not fault.
        // 3. The region is a frame of nvmx's pool (`Region::new`).
        let done = unsafe {
            cr::set_cr0(host_cr0(cr::cr0(), caps));
            cr::set_cr4(host_cr4(caps));
            this_processor().vmxon(region.at())
        };
        let mut vmx = done.then(|| Vmx { counters: Counters::new(), own: [0; lent::COUNT] })?;
        vmx.invept(Invalidate::All, 0);
        vmx.invvpid(Invalidate::All, 0, 0);
        Some(vmx)
    }

    /// Reads a field of the current VMCS; the caller asks only for fields that the processor has.
    #[inline(always)]
    pub fn read(&mut self, field: Field) -> u64 {
        self.counters.bump(Counter::Vmread);
        this_processor().vmread(field)
    }

    /// Reads a field of the current VMCS for a trace: not counted, so that what is counted is nvmx's work.
    pub fn peek(&self, field: Field) -> u64 {
        this_processor().vmread(field)
    }

    /// Does the processor have this field? A VMCS is current. Not counted: it is asked at start only.
    pub fn has(&self, field: Field) -> bool {
        this_processor().has_field(field)
    }

    /// Writes a field of the current VMCS, which is none of the host-state area; the caller asks only for fields that the processor
    /// has.
    #[inline(always)]
    pub fn write(&mut self, field: Field, value: u64) {
        assert!(!field.is_host_state(), "the host-state area is written by hw::host_area");
        self.counters.bump(Counter::Vmwrite);
        this_processor().vmwrite(field, value);
    }

    /// Writes a field of the host-state area: for `host_area` alone.
    #[inline(always)]
    pub(super) fn write_host_state(&mut self, field: Field, value: u64) {
        self.counters.bump(Counter::Vmwrite);
        this_processor().vmwrite(field, value);
    }

    /// Makes `vmcs` current and active.
    #[inline(always)]
    pub fn ptrld(&mut self, vmcs: Region) {
        self.counters.bump(Counter::Vmptrld);
        let done = this_processor().vmptrld(vmcs.at());
        assert!(done, "VMPTRLD of nvmx's own failed");
    }

    /// Makes `vmcs` inactive and clear, with all its data in memory.
    #[inline(always)]
    pub fn clear(&mut self, vmcs: Region) {
        self.counters.bump(Counter::Vmclear);
        let done = this_processor().vmclear(vmcs.at());
        assert!(done, "VMCLEAR of nvmx's own failed");
    }

    /// Makes `from` inactive and clear, writes its first word ([`Region::mark`]), and makes `to`, which may be the same, current and
    /// active.
    #[inline(always)]
    pub fn exchange(&mut self, phys: &DirectMap, from: &Region, word: u32, to: &Region) {
        self.counters.exchange();
        let done = this_processor().exchange(phys, from, word, to);
        assert!(done, "VMCLEAR or VMPTRLD of nvmx's own failed");
    }

    /// INVEPT; `eptp` is ignored for all contexts.
    pub fn invept(&mut self, kind: Invalidate, eptp: u64) {
        self.counters.bump(Counter::Invept);
        let done = this_processor().invept(kind, eptp);
        assert!(done, "INVEPT of nvmx's own failed");
    }

    /// INVVPID; `linear` only counts for an individual address.
    pub fn invvpid(&mut self, kind: Invalidate, vpid: u16, linear: u64) {
        self.counters.bump(Counter::Invvpid);
        let done = this_processor().invvpid(kind, vpid, linear);
        assert!(done, "INVVPID of nvmx's own failed");
    }
}

/// Accesses to fields of the current VMCS that are counted together, once they are over: the compiler adds them up.
pub struct Batch<'a> {
    vmx: &'a mut Vmx,
    reads: u64,
    writes: u64,
    counted: [u64; 2],
}

impl Vmx {
    /// For many accesses in a row.
    #[inline(always)]
    pub fn batch(&mut self) -> Batch<'_> {
        self.batch_beyond(0, 0)
    }

    /// The same, where so many reads and writes were counted already.
    #[inline(always)]
    pub fn batch_beyond(&mut self, reads: u64, writes: u64) -> Batch<'_> {
        Batch { vmx: self, reads: 0, writes: 0, counted: [reads, writes] }
    }
}

impl FieldAccess for Batch<'_> {
    #[inline(always)]
    fn read(&mut self, field: Field) -> u64 {
        self.reads += 1;
        this_processor().vmread(field)
    }

    #[inline(always)]
    fn write(&mut self, field: Field, value: u64) {
        assert!(!field.is_host_state(), "the host-state area is written by hw::host_area");
        self.writes += 1;
        this_processor().vmwrite(field, value);
    }

    #[inline(always)]
    fn one_less(&mut self) {
        // As many in this batch whichever way was taken: a constant, which the compiler knows.
        self.writes += 1;
        self.vmx.counters.take_back(Counter::Vmwrite);
    }
}

impl Drop for Batch<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        // All known to the compiler, which leaves out what is 0.
        let [reads, writes] = self.counted;
        self.vmx.counters.add(Counter::Vmread, self.reads.wrapping_sub(reads));
        self.vmx.counters.add(Counter::Vmwrite, self.writes.wrapping_sub(writes));
    }
}

impl FieldAccess for Vmx {
    #[inline(always)]
    fn read(&mut self, field: Field) -> u64 {
        Vmx::read(self, field)
    }

    #[inline(always)]
    fn write(&mut self, field: Field, value: u64) {
        Vmx::write(self, field, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor(cr4_fixed1: u64) -> Capabilities {
        let value = |index| match index {
            0x486 => 0x8000_0021,
            0x487 => 0xFFFF_FFFF,
            0x488 => 0x2000,
            0x489 => cr4_fixed1,
            _ => 0,
        };
        Capabilities::read(value, 39, 48)
    }

    #[test]
    fn control_registers_are_known_values_whatever_the_loader_left() {
        assert_eq!(host_cr0(u64::MAX, &processor(0)), 0xE001_0031);
        assert_eq!(host_cr0(0x11, &processor(0)), 0x8001_0031);
        assert_eq!(host_cr4(&processor(u64::MAX)), 0x4_2060);
        assert_eq!(host_cr4(&processor(0x2FF)), 0x2060, "no XSAVE");
    }
}
