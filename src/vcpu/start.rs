//! From a settled machine to the run loop.

use super::tracked::Tracked;
use super::{Config, Cpu, probe, run, vmcs01};
use crate::addr::{Gpa, Hpa};
use crate::boot::Machine;
use crate::boot::options::Vmcs as VmcsOption;
use crate::boot::requirements::KVM;
use crate::emul::cr::Cr4;
use crate::emul::msr::{self, FEATURE_LOCK, FEATURE_VMX};
use crate::ept::{Ept01, Ept02, EptRules};
use crate::error::KillReason;
use crate::hw::epitaph::{self, Status, Who};
use crate::hw::phys::DirectMap;
use crate::hw::vmenter::GuestRegs;
use crate::hw::vmx::Vmx;
use crate::mm::{FramePool, PhysMem};
use crate::nested::msr_lists::{AREA_FRAMES, MsrLists};
use crate::nested::slot::Slot;
use crate::nested::vmcs12::FieldSet;
use crate::nested::{Nested, SLOTS, caps};
use crate::vcpu::host;
use crate::vmx::bitmap::{Access, BitmapPage, MsrBitmap, Words, shadow_bitmap};
use crate::vmx::image::Layout;
use crate::vmx::{Capabilities, Field};
use arrayvec::ArrayVec;
use l2_protocol::abi::Strategy;

/// Tables that ept02 may hold beyond its reserve.
const EPT02_BUDGET: u32 = 2048;

/// Starts L2 on this CPU; returns never. The processor was found to have all that nvmx needs. `announce` is called when
/// all is decided; it hears whether VMCSs are edited in memory.
pub fn start(mut machine: Machine, announce: fn(&Machine, bool)) -> ! {
    let (hardware, strategy) = (machine.processor.vmx, machine.strategy);
    let offered = caps::offered(&hardware);
    let built = build(&mut machine, &hardware, &offered);
    let Some((mut vmx, vmcs01, msr_bitmap01, shadow_bitmaps, slots, ept01, ept02)) = built else {
        log::error!("too little memory: nvmx's frames do not suffice for its VMCSs and EPT tables");
        epitaph::end(Status::Fail)
    };
    let exists = probe::fields(&mut vmx, vmcs01, &hardware);
    let layout = learn_layout(&machine, &exists, &mut vmx, &slots);
    announce(&machine, layout.is_some());
    let mut cpu = Cpu {
        regs: GuestRegs::new(),
        vmx,
        vmcs01,
        launched01: false,
        loads_msrs01: false,
        msr_bitmap01,
        msr_intercepts: Words::that_differ(&msr_bitmap_l3(), 0),
        feature_control: FEATURE_LOCK | FEATURE_VMX,
        tracked: Tracked::default(),
        nested: Nested::new(slots),
        ept01,
        ept02,
        frames: machine.frames,
        phys: machine.phys,
        guest: machine.guest,
        nmi_waits: false,
        config: Config { hardware, offered, strategy, layout, exists, mtrrs: machine.mtrrs },
    };
    set_up(&mut cpu, &machine.start, shadow_bitmaps);
    let reason = run::run(&mut cpu);
    end(&mut cpu, reason)
}

/// Where fields lie in memory, if they are to be reached there: under KVM, or when the command line says so.
fn learn_layout(machine: &Machine, exists: &FieldSet, vmx: &mut Vmx, slots: &[Slot]) -> Option<Layout> {
    let wanted = match machine.options.vmcs {
        VmcsOption::Auto => machine.processor.l0 == KVM,
        VmcsOption::Instructions => false,
        VmcsOption::Memory => true,
    };
    let layout = match slots {
        [a, b, ..] if wanted => probe::layout(vmx, &machine.phys, [a.vmcs02(), b.vmcs02()], exists),
        _ => None,
    };
    if layout.is_none() && machine.options.vmcs == VmcsOption::Memory {
        log::error!("option vmcs=memory: VMCSs that are not current are not found in memory here; use vmcs=auto");
        epitaph::end(Status::Fail)
    }
    layout
}

type Built = (Vmx, Hpa, Hpa, [Hpa; 2], ArrayVec<Slot, SLOTS>, Ept01, Ept02);

/// Everything that takes frames; `None` when they run out.
fn build(machine: &mut Machine, hardware: &Capabilities, offered: &Capabilities) -> Option<Built> {
    let (frames, phys) = (&mut machine.frames, &machine.phys);
    let revision = hardware.basic.revision();
    let vmxon = region(frames, phys, revision)?;
    // XSETBV of L2 is executed by nvmx, so nvmx's own CR4 must allow it where the processor has it.
    let xsave = hardware.cr4_fixed1 & Cr4::OSXSAVE.bits();
    let vmx = Vmx::enter(vmxon, hardware.cr0_fixed0, hardware.cr4_fixed0 | xsave)?;
    let vmcs01 = region(frames, phys, revision)?;
    let msr_bitmap01 = page(frames, phys, &msr_bitmap01())?;
    let mut shadow = [Hpa::new(0); 2];
    for (at, access) in shadow.iter_mut().zip([Access::Read, Access::Write]) {
        let mut bitmap = BitmapPage::SET;
        shadow_bitmap(&mut bitmap, access, offered);
        *at = page(frames, phys, &bitmap)?;
    }
    let mut slots = ArrayVec::new();
    for _ in 0..SLOTS {
        let vmcs02 = region(frames, phys, revision)?;
        let bitmap = frames.alloc(phys)?.into_hpa();
        let lists =
            MsrLists::new(frames.alloc_contiguous(phys, AREA_FRAMES)?, frames.alloc_contiguous(phys, AREA_FRAMES)?);
        slots.push(Slot::new(vmcs02, bitmap, lists));
    }
    let mut tables = Cpu::tables(frames, phys);
    let end = machine.memory.end_of_memory().max(4 << 30);
    let mtrrs = &machine.mtrrs;
    let ept01 = Ept01::new(
        EptRules::of(hardware),
        hardware.ept_vpid.accessed_dirty(),
        Gpa::new(end),
        machine.own,
        |start, bytes| mtrrs.type_of(start.get(), bytes),
        &mut tables,
    )
    .ok()?;
    let advanced = offered.ept_vpid.advanced_exit_information();
    let ept02 = Ept02::new(EptRules::of(offered), advanced, EPT02_BUDGET, &mut tables).ok()?;
    Some((vmx, vmcs01, msr_bitmap01, shadow, slots, ept01, ept02))
}

/// A VMCS or VMXON region.
fn region(frames: &mut FramePool, phys: &DirectMap, revision: u32) -> Option<Hpa> {
    let at = frames.alloc(phys)?.into_hpa();
    phys.write_u64(at, revision as u64);
    Some(at)
}

/// A frame with this content.
fn page(frames: &mut FramePool, phys: &DirectMap, content: &BitmapPage) -> Option<Hpa> {
    let at = frames.alloc(phys)?.into_hpa();
    for (i, word) in content.0.iter().enumerate() {
        phys.write_u64(Hpa::new(at.get() + 8 * i as u64), *word);
    }
    Some(at)
}

/// What nvmx must see of L2: also the MSRs that it tracks.
fn msr_bitmap01() -> BitmapPage {
    let mut bitmap = MsrBitmap(msr_bitmap_l3());
    Tracked::indexes().for_each(|index| bitmap.set(index, Access::Write, true));
    bitmap.0
}

/// What nvmx must see of L3.
fn msr_bitmap_l3() -> BitmapPage {
    let mut bitmap = MsrBitmap::PASS_ALL;
    msr::intercept(&mut bitmap);
    bitmap.set(msr::IA32_PAT, Access::Write, true);
    bitmap.0
}

/// Writes the constant parts of every VMCS, and vmcs01 for L2's first instruction.
fn set_up(cpu: &mut Cpu, start: &crate::mm::l2_image::Start, shadow_bitmaps: [Hpa; 2]) {
    for slot in &mut cpu.nested.slots {
        cpu.vmx.clear(slot.vmcs02());
        cpu.vmx.ptrld(slot.vmcs02());
        host::write(&mut cpu.vmx, &cpu.regs);
        for field in [Field::VM_EXIT_MSR_STORE_COUNT, Field::VM_EXIT_MSR_LOAD_COUNT, Field::VM_ENTRY_MSR_LOAD_COUNT] {
            cpu.vmx.write(field, 0);
        }
        cpu.vmx.write(Field::VMCS_LINK_POINTER, u64::MAX);
        // VM functions are nvmx's to emulate (`nested::vmfunc`).
        if cpu.config.exists.contains(Field::VM_FUNCTION_CONTROLS) {
            cpu.vmx.write(Field::VM_FUNCTION_CONTROLS, 0);
        }
        cpu.vmx.clear(slot.vmcs02());
    }
    cpu.vmx.clear(cpu.vmcs01);
    cpu.vmx.ptrld(cpu.vmcs01);
    vmcs01::set_up(cpu, start);
    cpu.tracked.refresh(&mut cpu.vmx);
    if cpu.config.strategy == Strategy::ZeroCopy {
        cpu.vmx.write(Field::VMREAD_BITMAP, shadow_bitmaps[0].get());
        cpu.vmx.write(Field::VMWRITE_BITMAP, shadow_bitmaps[1].get());
    }
}

/// The machine ends: one epitaph, the last exits before it.
fn end(cpu: &mut Cpu, reason: KillReason) -> ! {
    for (reason, l3) in cpu.vmx.counters.recent() {
        log::info!("exit of {}: {reason}", if l3 { "L3" } else { "L2" });
    }
    let rip = cpu.vmx.read(Field::GUEST_RIP);
    epitaph::epitaph(Who::L2, format_args!("rip {rip:#x}"), format_args!("{reason}"))
}
