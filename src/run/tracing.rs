//! `trace=N`: each hardware exit of this processor and what nvmx entered after it, in a ring in memory ([`Ring`]), told on the
//! serial line at the end.
//!
//! A processor that traces has another exit path (`hw::vmenter::trace_exits`) and something that always waits before an entry
//! (`Waiting::TRACE`): without `trace=` nothing asks for it. The end is nvmx's own, or L2's word to a port that ends an emulated
//! machine: vmcs01 intercepts those ports until the trace is told, and L2's instruction is then executed as it is.

use crate::addr::{Hpa, PAGE_SIZE};
use crate::cpu::{Cpu, Operation, Trace};
use crate::guest::events;
use crate::hw::phys::DirectMap;
use crate::hw::vmenter;
use crate::hw::vmx::Vmx;
use crate::hw::{cpu as processor, serial};
use crate::mm::{FramePool, PhysMem};
use crate::trace::ring::{Reader, Ring};
use crate::vmx::Field;
use crate::vmx::controls::{PinControls, PrimaryControls};
use crate::vmx::exit::{BasicReason, ExitReason};
use core::sync::atomic::{AtomicBool, Ordering};
use l2_protocol::Kind;
use l2_protocol::abi::Counter;
use l2_protocol::trace::TracedExit;
use spin::Mutex;

/// The ring that was made last: by it all are found.
static LAST: Mutex<Option<Hpa>> = Mutex::new(None);
/// The trace is told once.
static TOLD: AtomicBool = AtomicBool::new(false);

/// What is counted between an exit and the next entry.
const COUNTED: [Counter; 6] =
    [Counter::Vmread, Counter::Vmwrite, Counter::Vmptrld, Counter::Vmclear, Counter::Invept, Counter::Invvpid];

/// Ports to which software writes to end an emulated machine: QEMU's isa-debug-exit, Bochs' shutdown.
const END_PORTS: [u16; 2] = [0xF4, 0x8900];

/// A ring for this processor out of its own frames; its exits are traced from now on. `None` if they do not suffice.
pub fn prepare(frames: &mut FramePool, phys: &DirectMap, holds: u32) -> Option<Trace> {
    let pages = usize::try_from(Ring::bytes(holds).div_ceil(PAGE_SIZE)).ok()?;
    let memory = frames.alloc_run(phys, pages)?;
    let end_ports = [frames.alloc(phys)?, frames.alloc(phys)?];
    for port in END_PORTS {
        // The first page has the ports below 8000H (SDM vol. 3C, "I/O-Bitmap Addresses").
        let page = &end_ports[usize::from(port >> 15)];
        phys.write_u64(page.at(u64::from(port % 0x8000 / 64) * 8), 1 << (port % 64));
    }
    let mut last = LAST.lock();
    let ring = Ring::new(memory, phys, processor::this().index(), holds, *last);
    *last = Some(ring.hpa());
    vmenter::trace_exits();
    Some(Trace { ring, end_ports, open: None, counted: [0; 6] })
}

/// vmcs01, which is current, exits where L2 is about to end an emulated machine.
pub fn watch_the_end(cpu: &mut Cpu) {
    let Some(trace) = &cpu.trace else { return };
    let [low, high] = trace.end_ports.each_ref().map(|page| page.hpa().get());
    cpu.vmx.write(Field::IO_BITMAP_A, low);
    cpu.vmx.write(Field::IO_BITMAP_B, high);
    let possible = PrimaryControls::USE_IO_BITMAPS & cpu.config.hardware.primary.settable();
    events::set_controls(cpu, PinControls::empty(), possible, true);
}

/// What this processor has counted.
fn counted(vmx: &Vmx) -> [u64; 6] {
    COUNTED.map(|counter| vmx.counters.get(counter))
}

/// The linear address of the next instruction of the current VMCS's guest.
fn instruction(vmx: &Vmx) -> u64 {
    vmx.peek(Field::GUEST_CS_BASE).wrapping_add(vmx.peek(Field::GUEST_RIP))
}

/// The level of the guest that the current VMCS runs, and where the VMCS lies.
fn guest(cpu: &Cpu) -> (u8, u64) {
    match cpu.nested.operation {
        Operation::NonRoot { current, .. } => (3, cpu.nested.slots[current].vmcs02.region().at().get()),
        _ => (2, cpu.vmcs01.at().get()),
    }
}

/// An exit, as the processor left it: its VMCS is current, and nothing was done about it yet.
#[cold]
pub fn left(cpu: &mut Cpu) {
    let (level, vmcs) = guest(cpu);
    let (vmx, gpr) = (&cpu.vmx, &cpu.regs.gpr);
    let word = |field| vmx.peek(field) as u32;
    let (reason, info) = (word(Field::VM_EXIT_REASON), word(Field::VMX_INSTRUCTION_INFO));
    let address = match ExitReason(reason).basic() {
        BasicReason::EPT_VIOLATION | BasicReason::EPT_MISCONFIGURATION => vmx.peek(Field::GUEST_PHYSICAL_ADDRESS),
        // The second register operand: the encoding (SDM vol. 3C, "Format of the VM-Exit Instruction-Information Field").
        BasicReason::VMREAD | BasicReason::VMWRITE => gpr.get((info >> 28) as usize).copied().unwrap_or(0),
        _ => 0,
    };
    let exit = TracedExit {
        exited: cpu.regs.exit_tsc(),
        level,
        vmcs,
        rip: instruction(vmx),
        qualification: vmx.peek(Field::EXIT_QUALIFICATION),
        address,
        registers: [gpr[0], gpr[1], gpr[2]],
        reason,
        event: word(Field::VM_EXIT_INTR_INFO),
        info,
        vectoring: word(Field::IDT_VECTORING_INFO_FIELD),
        primary: word(Field::CPU_BASED_VM_EXEC_CONTROL),
        secondary: word(Field::SECONDARY_VM_EXEC_CONTROL),
        ..TracedExit::default()
    };
    let counted = counted(vmx);
    if let Some(trace) = &mut cpu.trace {
        (trace.open, trace.counted) = (Some(exit), counted);
    }
}

/// A guest is about to be entered; its VMCS is current.
#[cold]
pub fn goes_on(cpu: &mut Cpu) {
    let (next_level, next_vmcs) = guest(cpu);
    let (next_rip, now, injected) =
        (instruction(&cpu.vmx), vmenter::now(), cpu.vmx.peek(Field::VM_ENTRY_INTR_INFO_FIELD) as u32);
    let counted = counted(&cpu.vmx);
    let Some(trace) = &mut cpu.trace else { return };
    let Some(exit) = trace.open.take() else { return };
    let mut counts = [0; 6];
    for (count, (now, before)) in counts.iter_mut().zip(counted.iter().zip(&trace.counted)) {
        *count = u16::try_from(now.saturating_sub(*before)).unwrap_or(u16::MAX);
    }
    let exit = TracedExit { entered: now, next_level, next_vmcs, next_rip, counts, injected, ..exit };
    trace.ring.push(&cpu.phys, exit.words());
}

/// Tells what all processors have in their rings, once.
pub fn tell(cpu: &mut Cpu) {
    let Some(trace) = &mut cpu.trace else { return };
    if let Some(exit) = trace.open.take() {
        trace.ring.push(&cpu.phys, exit.words());
    }
    let last = *LAST.lock();
    let Some(last) = last.filter(|_| !TOLD.swap(true, Ordering::Relaxed)) else { return };
    let phys = &cpu.phys;
    for ring in core::iter::successors(Some(Reader::new(phys, last)), |ring| ring.before(phys)) {
        let kept = ring.kept(phys);
        serial::record(Kind::Trace, |record| {
            record.add("cpu", &ring.processor);
            record.add("written", &kept.end);
            record.add("kept", &(kept.end - kept.start));
        });
        for number in kept {
            let Some(words) = ring.get(phys, number) else { continue };
            serial::record(Kind::Trace, |record| {
                record.add("cpu", &ring.processor);
                record.add("n", &number);
                record.add("words", &words);
            });
        }
    }
}

/// L2 is about to end the machine: the trace is told, and L2's instruction executed again, without an exit.
#[cold]
pub fn tell_and_go_on(cpu: &mut Cpu) {
    tell(cpu);
    events::set_controls(cpu, PinControls::empty(), PrimaryControls::USE_IO_BITMAPS, false);
}
