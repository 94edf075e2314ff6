//! The processor on a host: the model that a test has installed in its thread. A thread stands for a processor, as GS base
//! and everything else that belongs to a processor do.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use raw_cpuid::CpuIdResult;

use crate::addr::Hpa;
use crate::hw::cpu::PerCpu;
use crate::hw::phys::DirectMap;
use crate::hw::processor::{Entered, Invalidate, Processor, Register};
use crate::hw::region::Region;
use crate::hw::regs::GuestRegs;
use crate::vmx::Field;
use crate::x86::Fault;

/// A model of a processor that a test shares with nvmx.
pub type Model = Rc<RefCell<dyn Processor>>;

thread_local! {
    static MODEL: RefCell<Option<Model>> = const { RefCell::new(None) };
    static BLOCK: Cell<Option<&'static PerCpu>> = const { Cell::new(None) };
}

/// From now on nvmx's code runs on this processor in this thread, with the block of this processor.
pub fn install(model: Model, block: &'static PerCpu) {
    MODEL.set(Some(model));
    BLOCK.set(Some(block));
}

/// The block of the processor that is installed in this thread.
pub(super) fn block() -> Option<&'static PerCpu> {
    BLOCK.get()
}

/// The processor that is installed in this thread.
#[derive(Clone, Copy, Debug)]
pub struct Installed(());

/// The processor that is installed in this thread.
pub const fn this_processor() -> Installed {
    Installed(())
}

impl Installed {
    #[track_caller]
    fn model(self) -> Model {
        match MODEL.with_borrow(Option::clone) {
            Some(model) => model,
            None => unreachable!("code of nvmx that needs a processor runs in a thread without one"),
        }
    }
}

impl Processor for Installed {
    unsafe fn vmxon(&mut self, region: Hpa) -> bool {
        // SAFETY: as promised by the caller.
        unsafe { self.model().borrow_mut().vmxon(region) }
    }

    fn vmread(&mut self, field: Field) -> u64 {
        self.model().borrow_mut().vmread(field)
    }

    fn has_field(&mut self, field: Field) -> bool {
        self.model().borrow_mut().has_field(field)
    }

    fn vmwrite(&mut self, field: Field, value: u64) {
        self.model().borrow_mut().vmwrite(field, value);
    }

    fn vmptrld(&mut self, region: Hpa) -> bool {
        self.model().borrow_mut().vmptrld(region)
    }

    fn vmclear(&mut self, region: Hpa) -> bool {
        self.model().borrow_mut().vmclear(region)
    }

    fn exchange(&mut self, phys: &DirectMap, from: &Region, word: u32, to: &Region) -> bool {
        self.model().borrow_mut().exchange(phys, from, word, to)
    }

    fn invept(&mut self, kind: Invalidate, eptp: u64) -> bool {
        self.model().borrow_mut().invept(kind, eptp)
    }

    fn invvpid(&mut self, kind: Invalidate, vpid: u16, linear: u64) -> bool {
        self.model().borrow_mut().invvpid(kind, vpid, linear)
    }

    fn enter(&mut self, regs: &mut GuestRegs, launch: bool) -> Entered {
        let model = self.model();
        let entered = model.borrow_mut().enter(regs, launch);
        regs.exited_at(model.borrow_mut().tsc());
        entered
    }

    fn exit_path(&self) -> u64 {
        self.model().borrow().exit_path()
    }

    fn trace_exits(&mut self) {
        self.model().borrow_mut().trace_exits();
    }

    fn rdmsr(&mut self, index: u32) -> Result<u64, Fault> {
        self.model().borrow_mut().rdmsr(index)
    }

    unsafe fn wrmsr(&mut self, index: u32, value: u64) -> Result<(), Fault> {
        // SAFETY: as promised by the caller.
        unsafe { self.model().borrow_mut().wrmsr(index, value) }
    }

    fn read(&mut self, register: Register) -> u64 {
        self.model().borrow_mut().read(register)
    }

    unsafe fn write(&mut self, register: Register, value: u64) {
        // SAFETY: as promised by the caller.
        unsafe { self.model().borrow_mut().write(register, value) }
    }

    fn xsetbv(&mut self, index: u32, value: u64) -> Result<(), Fault> {
        self.model().borrow_mut().xsetbv(index, value)
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> CpuIdResult {
        // The one instruction that a host executes as well.
        match MODEL.with_borrow(Option::clone) {
            Some(model) => model.borrow_mut().cpuid(leaf, subleaf),
            None => raw_cpuid::native_cpuid::cpuid_count(leaf, subleaf),
        }
    }

    fn tsc(&mut self) -> u64 {
        self.model().borrow_mut().tsc()
    }

    fn write_back_caches(&mut self) {
        self.model().borrow_mut().write_back_caches();
    }

    fn device_read(&mut self, phys: &DirectMap, at: Hpa) -> u32 {
        self.model().borrow_mut().device_read(phys, at)
    }

    unsafe fn device_write(&mut self, phys: &DirectMap, at: Hpa, value: u32) {
        // SAFETY: as promised by the caller.
        unsafe { self.model().borrow_mut().device_write(phys, at, value) }
    }

    unsafe fn inb(&mut self, port: u16) -> u8 {
        // SAFETY: as promised by the caller.
        unsafe { self.model().borrow_mut().inb(port) }
    }

    unsafe fn outb(&mut self, port: u16, value: u8) {
        // SAFETY: as promised by the caller.
        unsafe { self.model().borrow_mut().outb(port, value) }
    }

    fn halt(&mut self) -> ! {
        self.model().borrow_mut().halt()
    }
}
