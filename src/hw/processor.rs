//! What nvmx asks of the processor, instruction by instruction.
//!
//! There are two: the one that nvmx runs on (`hw::real`, instructions inlined), and on a host whatever a test
//! has installed (`hw::host`), a model of a processor. Everything above this trait, in `hw` too, is the same code
//! on both; [`this_processor`](super::this_processor) is chosen by the target, so that it costs nothing ([ADR 0018](../../docs/adr/0018-a-machine-on-the-host.md)).
//!
//! Source: Intel SDM vol. 2, "Instruction Set Reference", vol. 3C, "VMX Instruction Reference" (December 2024).

use crate::addr::Hpa;
use crate::hw::phys::DirectMap;
use crate::hw::region::Region;
use crate::hw::regs::GuestRegs;
use crate::vmx::Field;
use crate::x86::Fault;
use raw_cpuid::CpuIdResult;

/// A control or debug register.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(missing_docs)]
pub enum Register {
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Dr0,
    Dr1,
    Dr2,
    Dr3,
    Dr6,
    Dr7,
    /// Read only, and only while CR4.PKE is 1.
    Pkru,
}

/// INVEPT and INVVPID types (SDM vol. 3C, "INVEPT" and "INVVPID").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Invalidate {
    /// INVVPID only: one linear address of one VPID
    Individual = 0,
    /// One EPTP or one VPID
    Single = 1,
    /// All contexts
    All = 2,
    /// INVVPID only: one VPID except global translations
    SingleRetainingGlobals = 3,
}

/// What came of an attempt to enter a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entered {
    /// The guest ran, or the entry failed late: the exit reason of the current VMCS says which.
    Exit,
    /// VMLAUNCH or VMRESUME failed as an instruction.
    VmFail,
    /// An NMI or a machine check arrived before the entry: it is to be looked at first.
    CalledOff,
    /// As `Exit`, on a processor whose exits are traced.
    TracedExit,
}

/// One processor, as nvmx's own code uses it. VMX results are `false` for VMfail of either kind.
pub trait Processor {
    /// VMXON.
    ///
    /// # Safety
    ///
    /// The region is a frame that is used for nothing else from then on; CR4.VMXE is set.
    unsafe fn vmxon(&mut self, region: Hpa) -> bool;
    /// VMREAD of a field that the processor has; a VMCS is current.
    fn vmread(&mut self, field: Field) -> u64;
    /// Does VMREAD find the field? A VMCS is current.
    fn has_field(&mut self, field: Field) -> bool;
    /// VMWRITE of a field that the processor has; a VMCS is current.
    fn vmwrite(&mut self, field: Field, value: u64);
    /// VMPTRLD.
    fn vmptrld(&mut self, region: Hpa) -> bool;
    /// VMCLEAR.
    fn vmclear(&mut self, region: Hpa) -> bool;
    /// VMCLEAR of `from`, the first word of which becomes `word`, and VMPTRLD of `to`, which may be the same: what makes one VMCS
    /// another kind, and the next one current.
    fn exchange(&mut self, phys: &DirectMap, from: &Region, word: u32, to: &Region) -> bool {
        let cleared = self.vmclear(from.at());
        from.mark(phys, word);
        cleared & self.vmptrld(to.at())
    }
    /// INVEPT.
    fn invept(&mut self, kind: Invalidate, eptp: u64) -> bool;
    /// INVVPID.
    fn invvpid(&mut self, kind: Invalidate, vpid: u16, linear: u64) -> bool;
    /// VMLAUNCH or VMRESUME with the guest's registers, until the guest exits. Nothing happens if an event has arrived.
    fn enter(&mut self, regs: &mut GuestRegs, launch: bool) -> Entered;
    /// Entries and exits do not book nvmx's own time from now on: to be said before [`Processor::exit_path`] is asked.
    fn without_clock(&mut self) {}
    /// The linear address at which VM exits land.
    fn exit_path(&self) -> u64;
    /// VM exits are traced from now on: they land elsewhere, and are [`Entered::TracedExit`].
    fn trace_exits(&mut self);

    /// RDMSR; `Err(#GP(0))` when the processor refuses.
    fn rdmsr(&mut self, index: u32) -> Result<u64, Fault>;
    /// WRMSR; `Err(#GP(0))` when the processor refuses.
    ///
    /// # Safety
    ///
    /// The value, if accepted, breaks none of nvmx's own state (page tables, GS base, EFER.LMA).
    unsafe fn wrmsr(&mut self, index: u32, value: u64) -> Result<(), Fault>;
    /// Reads a register.
    fn read(&mut self, register: Register) -> u64;
    /// Writes a register.
    ///
    /// # Safety
    ///
    /// The processor accepts the value, and nvmx's own code, stack and tables stay mapped and usable with it.
    unsafe fn write(&mut self, register: Register, value: u64);
    /// XSETBV; #GP(0) and #UD are both reported as #GP(0).
    fn xsetbv(&mut self, index: u32, value: u64) -> Result<(), Fault>;
    /// CPUID.
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> CpuIdResult;
    /// RDTSC.
    fn tsc(&mut self) -> u64;
    /// WBINVD.
    fn write_back_caches(&mut self);

    /// Reads a 32-bit register of a device at a physical address that is no memory, uncached.
    fn device_read(&mut self, phys: &DirectMap, at: Hpa) -> u32;
    /// Writes such a register.
    ///
    /// # Safety
    ///
    /// What the device does in consequence does not touch memory of nvmx.
    unsafe fn device_write(&mut self, phys: &DirectMap, at: Hpa, value: u32);
    /// IN of a byte.
    ///
    /// # Safety
    ///
    /// Reading the port has no effect on memory.
    unsafe fn inb(&mut self, port: u16) -> u8;
    /// OUT of a byte.
    ///
    /// # Safety
    ///
    /// The device behind the port does not write to memory in consequence.
    unsafe fn outb(&mut self, port: u16, value: u8);
    /// Stops for good.
    fn halt(&mut self) -> !;
}
