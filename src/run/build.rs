//! One [`Cpu`] out of its own share of frames: VMX operation, VMCSs, slots, bitmaps, EPT tables.

use crate::addr::{Gpa, Hpa, PAGE_SIZE};
use crate::boot::FoundProcessor;
use crate::boot::options::{CountersOption, Ept12, StopOption, Vmcs as VmcsOption};
use crate::boot::requirements::KVM;
use crate::cpu::{Cpu, Nested, Startup, Waiting};
use crate::ept::{Ept01, Ept02, EptRules};
use crate::hw::epitaph::{self, Status};
use crate::hw::msr as hw_msr;
use crate::hw::phys::DirectMap;
use crate::hw::vmenter::{self, GuestRegs};
use crate::hw::vmx::{Region, Vmx};
use crate::mm::mtrr::Mtrrs;
use crate::mm::{Frame, FramePool, GuestMemory, PhysMem, Span};
use crate::rules::caps;
use crate::run::{Machine, tracing};
use crate::trace::Ran;
use crate::vmcs::access::{Links, VmcsAccess};
use crate::vmcs::image::ImageLayout;
use crate::vmcs::msrs::{self, OwnMsrs};
use crate::vmcs::once::Once;
use crate::vmcs::slots::Slots;
use crate::vmcs::tracked::Tracked;
use crate::vmcs::vmcs01::{self, Points};
use crate::vmcs::vmcs12::FieldSet;
use crate::vmcs::{Config, probe};
use crate::vmx::bitmap::{self, Access, BitmapPage, Words, shadow_bitmap};
use crate::vmx::field::Home;
use crate::vmx::{Capabilities, Field};
use l2_protocol::abi::Strategy;

/// Tables that ept02 may hold beyond its reserve unless the command line says how many; half of a CPU's frames at most.
const EPT02_BUDGET: u32 = 2048;

/// What every processor builds its [`Cpu`] from: the same for all, and never changed.
pub struct Common {
    processor: FoundProcessor,
    hardware: Capabilities,
    offered: Capabilities,
    strategy: Strategy,
    vmcs: VmcsOption,
    ept02_budget: u32,
    watches_ept12: bool,
    user_counters: bool,
    measures: bool,
    stale: bool,
    trace: u32,
    on_kvm: bool,
    stops: bool,
    mtrrs: Mtrrs,
    has_mtrrs: bool,
    own: Span,
    end_of_memory: Gpa,
    phys: DirectMap,
    guest: GuestMemory<DirectMap>,
}

impl Common {
    /// What `machine` says.
    pub fn new(machine: &Machine) -> Self {
        let hardware = machine.processor.vmx;
        Self {
            processor: machine.processor.clone(),
            hardware,
            offered: caps::offered(&hardware),
            strategy: machine.strategy,
            vmcs: machine.options.vmcs,
            ept02_budget: machine.options.ept02.unwrap_or(EPT02_BUDGET),
            watches_ept12: machine.options.ept12 == Ept12::Watch,
            user_counters: machine.options.counters == CountersOption::All,
            measures: machine.options.measure,
            stale: machine.options.stale,
            trace: machine.options.trace,
            on_kvm: machine.processor.below == KVM,
            stops: machine.options.stop == StopOption::Cpus,
            mtrrs: machine.mtrrs.clone(),
            has_mtrrs: machine.processor.mtrrs,
            own: machine.layout.own,
            end_of_memory: Gpa::new(machine.memory.end_of_memory().max(4 << 30)),
            phys: machine.phys,
            guest: machine.guest,
        }
    }

    /// The processor that booted.
    pub fn processor(&self) -> &FoundProcessor {
        &self.processor
    }

    /// The machine ends once all processors have started.
    pub fn stops(&self) -> bool {
        self.stops
    }

    /// Enters VMX operation on this processor, on a region out of `frames`; it stays there for good.
    pub fn enter_vmx(&self, frames: &mut FramePool) -> Option<Vmx> {
        let vmxon = region(frames, &self.phys, self.hardware.basic.revision())?;
        hw_msr::stop_traces();
        Vmx::enter(vmxon, &self.hardware)
    }

    /// Builds the [`Cpu`] of this processor; `None` if its frames do not suffice, or the processor refuses VMX operation.
    /// [`set_up`] is to follow where it will stay.
    pub fn build(&self, mut frames: FramePool) -> Option<Cpu> {
        let (hardware, offered, phys) = (self.hardware, self.offered, &self.phys);
        let mut vmx = self.enter_vmx(&mut frames)?;
        if !self.measures {
            vmx.counters.leave_out();
            vmenter::without_clock();
        }
        let revision = hardware.basic.revision();
        let budget = self.ept02_budget.min(frames.available() as u32 / 2);
        let vmcs01 = region(&mut frames, phys, revision)?;
        let refuses = hw_msr::refuses_trace_states();
        let msr_bitmap01 = words(&mut frames, phys, |word| msrs::bitmap01_word(word, refuses))?;
        let void = page(&mut frames, phys, &BitmapPage::SET)?;
        let slots = Slots::new(&mut frames, phys, revision)?;
        let mut tables = Cpu::tables(&mut frames, phys);
        let ept01 = Ept01::new(
            EptRules::of(&hardware),
            hardware.ept_vpid.accessed_dirty(),
            self.end_of_memory,
            self.own,
            |start, bytes| self.mtrrs.type_of(start.get(), bytes),
            &mut tables,
        )
        .ok()?;
        let advanced = offered.ept_vpid.advanced_exit_information();
        let mut ept02 = Ept02::new(EptRules::of(&offered), advanced, budget, &mut tables).ok()?;
        let mut guest = self.guest;
        if hardware.ept_vpid.accessed_dirty() {
            guest = guest.marking(Hpa::new(ept01.eptp().ep4ta()));
            if self.watches_ept12 {
                // As many again as ept02 may have itself.
                ept02.watch_tables(budget.max(1));
            }
        }
        let trace = if self.trace > 0 { Some(tracing::prepare(&mut frames, phys, self.trace)?) } else { None };
        let exists = probe::fields(&mut vmx, vmcs01, &hardware);
        let layout = self.learn_layout(&exists, &mut vmx, &slots);
        let mut bitmaps = [BitmapPage::SET, BitmapPage::SET];
        shadow_bitmap(&mut bitmaps[0], Access::Read, &offered);
        shadow_bitmap(&mut bitmaps[1], Access::Write, &offered);
        let links = Links::new(layout.as_ref(), |loan| {
            let mut with_loan = |bitmap: &BitmapPage| {
                let mut bitmap = bitmap.clone();
                bitmap::open_lent(&mut bitmap, loan);
                Some(page(&mut frames, phys, &bitmap)?.hpa())
            };
            Some([with_loan(&bitmaps[0])?, with_loan(&bitmaps[1])?])
        })?;
        Some(Cpu {
            regs: GuestRegs::new(),
            vmx,
            vmcs01,
            exited: Ran::Guest,
            launched01: false,
            once01: Once::empty(),
            msr_bitmap01,
            void,
            shadow_words: bitmaps.each_ref().map(|bitmap| Words::that_differ(bitmap, u64::MAX)),
            msrs: OwnMsrs::of_this_processor(self.has_mtrrs, offered.physical_width),
            tracked: Tracked::default(),
            nested: Nested::new(slots),
            ept01,
            ept02,
            frames,
            phys: self.phys,
            guest,
            waiting: waiting(self.stale, trace.is_some()),
            stale: Default::default(),
            events: Default::default(),
            start: Startup::Done,
            trace,
            config: Config {
                hardware,
                offered,
                fields: FieldSet::of(|field| offered.has_field(field) && may_be_kept(field, &exists)),
                access: VmcsAccess::new(self.strategy, layout, links, exists, offered, revision),
                user_counters: self.user_counters,
                mtrrs: self.mtrrs.clone(),
            },
        })
    }

    /// Where fields lie in memory, if they are to be reached there: under KVM, or when the command line says so.
    fn learn_layout(&self, exists: &FieldSet, vmx: &mut Vmx, slots: &Slots) -> Option<ImageLayout> {
        let wanted = match self.vmcs {
            VmcsOption::Auto => self.on_kvm,
            VmcsOption::Instructions => false,
            VmcsOption::Memory => true,
        };
        let mut first = slots.iter();
        let layout = match (first.next(), first.next()) {
            (Some(a), Some(b)) if wanted => {
                probe::layout(vmx, &self.phys, [a.vmcs02.region(), b.vmcs02.region()], exists)
            }
            _ => None,
        };
        if layout.is_none() && self.vmcs == VmcsOption::Memory {
            log::error!("option vmcs=memory: VMCSs that are not current are not found in memory here; use vmcs=auto");
            epitaph::end(Status::Fail)
        }
        layout
    }
}

/// What is to be done before each entry.
fn waiting(stale: bool, trace: bool) -> Waiting {
    let mut always = Waiting::empty();
    always.set(Waiting::LOOK, stale);
    always.set(Waiting::TRACE, trace);
    always
}

/// A hypervisor below may lack fields that nvmx would have to keep in vmcs02.
fn may_be_kept(field: Field, exists: &FieldSet) -> bool {
    field.home() == Home::Cache || exists.contains(field)
}

/// A VMCS or VMXON region, for good: the frame never goes back.
fn region(frames: &mut FramePool, phys: &DirectMap, revision: u32) -> Option<Region> {
    Some(Region::new(&frames.alloc(phys)?, phys, revision))
}

/// A frame with this content.
fn page(frames: &mut FramePool, phys: &DirectMap, content: &BitmapPage) -> Option<Frame> {
    words(frames, phys, |i| content.0[i])
}

/// A frame with these words.
fn words(frames: &mut FramePool, phys: &DirectMap, word: impl Fn(usize) -> u64) -> Option<Frame> {
    let frame = frames.alloc(phys)?;
    for i in 0..(PAGE_SIZE / 8) as usize {
        phys.write_u64(frame.at(8 * i as u64), word(i));
    }
    Some(frame)
}

/// Writes the constant parts of every VMCS, and vmcs01, whose guest state is the caller's. `cpu` does not move from here on.
pub fn set_up(cpu: &mut Cpu, write_guest_state: impl FnOnce(&mut Cpu)) {
    for slot in cpu.nested.slots.iter_mut() {
        slot.vmcs02.set_up(&mut cpu.vmx, &mut cpu.regs, |field| cpu.config.access.has(field));
    }
    cpu.vmx.clear(cpu.vmcs01);
    cpu.vmx.ptrld(cpu.vmcs01);
    let to = Points { msr_bitmap: cpu.msr_bitmap01.hpa(), eptp: cpu.ept01.eptp().get() };
    vmcs01::set_up(&mut cpu.vmx, &cpu.config.hardware, &mut cpu.regs, &to);
    write_guest_state(cpu);
    cpu.tracked.refresh(&mut cpu.vmx);
    cpu.config.access.link(&mut cpu.vmx, None);
    if cpu.trace.is_some() {
        tracing::watch_the_end(cpu);
    }
}
