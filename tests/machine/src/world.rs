//! One guest program on the bare machine, and under nvmx.

use crate::guest::Guest;
use crate::processor::{Core, Entry, Fail, Root, Storage};
use crate::second::core_support::{rich, rich_msr};
use l2_protocol::abi::Strategy;
use nvmx::addr::{Gpa, Hpa};
use nvmx::boot::guest_image::{Protocol, Start};
use nvmx::boot::layout::Layout;
use nvmx::boot::options::Vmcs;
use nvmx::boot::requirements::FoundProcessor as About;
use nvmx::boot::{CpuList, Options};
use nvmx::cpu::Cpu;
use nvmx::guest::initial;
use nvmx::hw::cpu::{Arrived, PerCpu};
use nvmx::hw::phys::{DirectMap, silence};
use nvmx::hw::processor::{Entered, Invalidate, Processor, Register};
use nvmx::hw::vmenter::GuestRegs;
use nvmx::hw::{cpu, host};
use nvmx::mm::mtrr::Mtrrs;
use nvmx::mm::paging::{PageSize, PageTables};
use nvmx::mm::{FramePool, GuestMemory, MemoryMap, PhysMem, Place, Span};
use nvmx::rules::caps::offered;
use nvmx::run::Machine;
use nvmx::run::steps::{self, Common};
use nvmx::trace::KillReason;
use nvmx::vmx::region::REVISION;
use nvmx::vmx::{Capabilities, Field, Field::*, Fields};
use nvmx::x86::Fault;
use raw_cpuid::CpuIdResult;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Memory of the machine.
pub const END: u64 = 16 << 20;
/// nvmx's own.
pub const OWN: Span = Span::new(12 << 20, END);
/// The number in place of a VM-instruction error that says: the program is over.
const OVER: u32 = 0xDEAD;
/// Where VM exits land.
const EXIT_PATH: u64 = 0xFFFF_FFFF_8000_1000;
const TRACED_EXIT_PATH: u64 = 0xFFFF_FFFF_8000_2000;

/// How nvmx is to run.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub strategy: Strategy,
    pub storage: Storage,
    /// Frames of nvmx at most.
    pub frames: usize,
    pub hardware: Capabilities,
    /// The processor that booted.
    pub booted: bool,
    /// `trace=`
    pub trace: u32,
}

impl Setup {
    pub const fn new(strategy: Strategy, storage: Storage, hardware: Capabilities) -> Self {
        Setup { strategy, storage, frames: 900, hardware, booted: true, trace: 0 }
    }

    /// Every way in which L2's VMREAD and VMWRITE can reach a vmcs12.
    pub fn all() -> [Setup; 4] {
        let hardware = rich();
        [
            Setup::new(Strategy::ZeroCopy, Storage::OnChip, hardware),
            Setup::new(Strategy::Trapped, Storage::OnChip, without_shadowing()),
            Setup::new(Strategy::ZeroCopy, Storage::InMemory, hardware),
            Setup::new(Strategy::Trapped, Storage::InMemory, below()),
        ]
    }
}

/// A machine without VMCS shadowing, and without VMWRITE to exit information.
pub fn without_shadowing() -> Capabilities {
    let msr = |index| match index {
        0x485 => rich_msr(index) & !(1 << 29),
        _ => without_shadowing_msr(index),
    };
    Capabilities::read(msr, 39, 48)
}

/// A machine that a hypervisor below emulates: without VMCS shadowing, every field can be written.
fn below() -> Capabilities {
    Capabilities::read(without_shadowing_msr, 39, 48)
}

fn without_shadowing_msr(index: u32) -> u64 {
    let shadowing = if index == 0x48B { 1 << (32 + 14) } else { 0 };
    rich_msr(index) & !shadowing
}

/// How a run ended.
#[derive(Debug)]
pub enum End {
    /// The program is over.
    Over,
    /// nvmx ended the machine.
    Killed(KillReason),
}

/// The memory of this thread's machine, empty again.
pub fn memory() -> DirectMap {
    thread_local! {
        static MEMORY: DirectMap = DirectMap::of_host(Hpa::new(END));
    }
    let memory = MEMORY.with(|memory| *memory);
    memory.zero(Place::anywhere(Hpa::new(0)), END);
    memory
}

/// A program and the processor that it runs on, without nvmx.
pub fn bare<F: Future<Output = ()>>(caps: Capabilities, program: impl FnOnce(Guest) -> F) -> Vec<String> {
    let guest = Guest::new(Core::new(caps, REVISION, Root::Bare, Storage::OnChip, memory()));
    let mut context = Context::from_waker(Waker::noop());
    // CR0.NE is what a program makes of it.
    guest.set(GUEST_CR0, 0x8001_0011);
    boot(&guest);
    let done = pin!(program(guest.clone())).poll(&mut context);
    assert!(done.is_ready(), "on the bare machine nothing waits");
    guest.log()
}

/// L2's page tables, at 0x1000: all memory one to one, by pages of 1 GiB.
fn boot(guest: &Guest) {
    guest.poke(0x1000, 0x2000 | 0x63);
    (0..4).for_each(|n| guest.poke(0x2000 + 8 * n, n << 30 | 0xE3));
    long_mode(&mut guest.core());
}

/// L2's processor as [`World::boot`] begins with it, wherever L2 was: a kernel that starts another one.
pub fn restart(guest: &Guest) {
    boot(guest);
}

/// L2's state when a program begins: 64-bit mode, flat segments.
fn long_mode(core: &mut Core) {
    let segment = |core: &mut Core, [selector, base, limit, rights]: [Field; 4], values: [u64; 4]| {
        core.state.set(selector, values[0]).set(base, values[1]).set(limit, values[2]).set(rights, values[3]);
    };
    let flat = 0xFFFF_FFFF;
    segment(core, [GUEST_CS_SELECTOR, GUEST_CS_BASE, GUEST_CS_LIMIT, GUEST_CS_AR_BYTES], [8, 0, flat, 0xA09B]);
    for fields in [
        [GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_AR_BYTES],
        [GUEST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_AR_BYTES],
        [GUEST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_AR_BYTES],
        [GUEST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_AR_BYTES],
        [GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_AR_BYTES],
    ] {
        segment(core, fields, [16, 0, flat, 0xC093]);
    }
    segment(core, [GUEST_TR_SELECTOR, GUEST_TR_BASE, GUEST_TR_LIMIT, GUEST_TR_AR_BYTES], [24, 0x5000, 0x67, 0x8B]);
    segment(core, [GUEST_LDTR_SELECTOR, GUEST_LDTR_BASE, GUEST_LDTR_LIMIT, GUEST_LDTR_AR_BYTES], [0, 0, 0, 1 << 16]);
    for (field, value) in [
        (GUEST_CR3, 0x1000),
        (GUEST_RIP, 0x10_0000),
        (GUEST_RSP, 0x9000),
        (GUEST_RFLAGS, 2),
        (GUEST_DR7, 0x400),
        (GUEST_GDTR_LIMIT, 0x27),
        (GUEST_IDTR_LIMIT, 0xFFF),
        (GUEST_IA32_EFER, 0xD00),
        (GUEST_IA32_PAT, 0x0007_0406_0007_0406),
        (GUEST_CR0, core.state.get(GUEST_CR0) & 1 << 5 | 0x8001_0011),
        (GUEST_CR4, core.state.get(GUEST_CR4) & 1 << 13 | 0x20),
        (GUEST_GDTR_BASE, 0),
        (GUEST_IDTR_BASE, 0),
    ] {
        core.state.set(field, value);
    }
    core.gprs = [0; 16];
}

/// nvmx on a processor, with L2 at its first instruction.
pub struct World {
    pub guest: Guest,
    /// Pinned: HOST_RSP points into it.
    pub cpu: Box<Cpu>,
    program: Rc<RefCell<Option<Program>>>,
    block: &'static PerCpu,
    model: host::Model,
}

/// The block of a processor of this thread: it lasts, and serves the next machine too.
fn block(index: u32) -> &'static PerCpu {
    thread_local! {
        static BLOCKS: RefCell<BTreeMap<u32, &'static PerCpu>> = const { RefCell::new(BTreeMap::new()) };
    }
    let block = BLOCKS.with_borrow_mut(|blocks| *blocks.entry(index).or_insert_with(|| PerCpu::of_host(index)));
    block.take_arrived();
    block
}

type Program = Pin<Box<dyn Future<Output = ()>>>;

/// The processor that nvmx gets.
struct Under {
    guest: Guest,
    program: Rc<RefCell<Option<Program>>>,
    host_rsp: u64,
    /// nvmx's host-state area but for where exits land: the same in each VMCS, and at each entry.
    host_area: Option<Vec<(Field, u64)>>,
    exit_path: u64,
}

impl World {
    pub fn new(setup: Setup) -> Self {
        Self::on(setup, memory(), OWN, 0)
    }

    /// One of several processors that share memory.
    pub fn on(setup: Setup, phys: DirectMap, own: Span, index: u32) -> Self {
        let root = Root::Nvmx { vmcs01: None };
        let revision = setup.hardware.basic.revision();
        let mut core = Core::new(setup.hardware, revision, root, setup.storage, phys);
        if !setup.booted {
            core.msrs.insert(0x1B, 0xFEE0_0800);
        }
        let guest = Guest::new(core);
        let program: Rc<RefCell<Option<Program>>> = Rc::default();
        let under = Under {
            guest: guest.clone(),
            program: program.clone(),
            host_rsp: 0,
            host_area: None,
            exit_path: EXIT_PATH,
        };
        let model: host::Model = Rc::new(RefCell::new(under));
        let block = block(index);
        host::install(model.clone(), block);

        let frames = (setup.frames as u64) << 12;
        let mut frames = FramePool::new(Span::sized(own.start(), frames.min(own.len())));
        let tables = PageTables::new(&mut frames, &phys, PageSize::Huge).expect("a frame");
        let mut map = MemoryMap::new();
        map.add(Span::new(0, END), nvmx::mm::map::RangeKind::Usable).expect("room");
        let in_memory = setup.storage == Storage::InMemory;
        let machine = Machine {
            options: Options {
                vmcs: if in_memory { Vmcs::Memory } else { Vmcs::Instructions },
                trace: setup.trace,
                ..Options::default()
            },
            memory: map.clone(),
            guest_memory: map,
            layout: Layout { own: OWN, first: OWN, others: Span::new(OWN.end(), OWN.end()), used: 1 },
            // All of them are the CPU's.
            frames: FramePool::new(Span::new(0, 0)),
            phys,
            guest: GuestMemory::new(phys, OWN, 39),
            tables,
            mtrrs: Mtrrs::none(),
            processor: About {
                brand: Default::default(),
                below: "bare",
                apic_id: index,
                max_phys_addr: 39,
                gib_pages: true,
                mtrrs: false,
                vmx: setup.hardware,
            },
            strategy: setup.strategy,
            cpus: CpuList::new(),
            rsdp: None,
            start: START,
        };
        let cpu = Common::new(&machine).build(frames).expect("frames enough");
        let mut cpu = Box::new(cpu);
        steps::set_up(&mut cpu, |cpu| initial::write_boot_state(cpu, &START));
        guest.core().root = Root::Nvmx { vmcs01: Some(cpu.vmcs01.at().get()) };
        World { guest, cpu, program, block, model }
    }

    /// Runs a program of the guests until it is over, or nvmx ends the machine.
    pub fn run<F: Future<Output = ()> + 'static>(&mut self, program: impl FnOnce(Guest) -> F) -> End {
        host::install(self.model.clone(), self.block);
        let guest = self.guest.clone();
        let future = program(guest.clone());
        *self.program.borrow_mut() = Some(Box::pin(async move {
            future.await;
        }));
        let end = match steps::run(&mut self.cpu) {
            KillReason::EntryFailed { reason: OVER, .. } => End::Over,
            reason => End::Killed(reason),
        };
        *self.program.borrow_mut() = None;
        end
    }

    /// Brings L2 into 64-bit mode as a loader does, with the instructions that it takes, and runs the program.
    pub fn boot<F: Future<Output = ()> + 'static>(&mut self, program: impl FnOnce(Guest) -> F + 'static) -> End {
        self.run(|guest| async move {
            boot(&guest);
            program(guest).await;
        })
    }
}

const START: Start = Start {
    protocol: Protocol::Multiboot1,
    entry: Gpa::new(0x10_0000),
    eax: 0x2BAD_B002,
    ebx: Gpa::new(0),
    edx: 0,
    esi: Gpa::new(0),
    esp: Gpa::new(0x9000),
    gdt: None,
};

/// Accesses to memory in `f` are the processor's and the guests', not nvmx's.
fn not_nvmx<T>(f: impl FnOnce() -> T) -> T {
    let before = silence::pause(true);
    let result = f();
    silence::pause(before);
    result
}

impl Under {
    fn with<T>(&self, f: impl FnOnce(&mut Core) -> T) -> T {
        not_nvmx(|| f(&mut self.guest.core()))
    }

    /// Before each instruction that nvmx executes.
    fn root_instruction(&mut self) {
        if self.guest.machine_check_comes() {
            self.with(Core::machine_check);
            cpu::this().note_arrived(Arrived::MACHINE_CHECK);
        }
    }

    /// Runs the program in the guest that was entered.
    fn guest_runs(&mut self) -> Option<crate::processor::Exit> {
        let mut context = Context::from_waker(Waker::noop());
        let mut program = self.program.borrow_mut();
        match program.as_mut().map(|program| program.as_mut().poll(&mut context)) {
            Some(Poll::Pending) => Some(self.guest.take_exit().expect("a program waits in an exit")),
            _ => None,
        }
    }
}

impl Processor for Under {
    unsafe fn vmxon(&mut self, region: Hpa) -> bool {
        self.with(|core| core.vmxon(region.get()).is_ok())
    }

    fn vmread(&mut self, field: Field) -> u64 {
        self.root_instruction();
        self.with(|core| {
            core.counts.vmread += 1;
            core.reached.insert(field);
            core.vmread(field.encoding().into()).unwrap_or_else(|fail| panic!("VMREAD of {field}: {fail:?}"))
        })
    }

    fn has_field(&mut self, field: Field) -> bool {
        self.with(|core| core.vmread(field.encoding().into()).is_ok())
    }

    fn vmwrite(&mut self, field: Field, value: u64) {
        self.root_instruction();
        self.with(|core| {
            core.counts.vmwrite += 1;
            core.reached.insert(field);
            assert_eq!(value & !field.mask(), 0, "VMWRITE of {value:#x} to {field}, which is narrower");
            core.vmwrite(field.encoding().into(), value).unwrap_or_else(|fail| panic!("VMWRITE of {field}: {fail:?}"));
        });
    }

    fn vmptrld(&mut self, region: Hpa) -> bool {
        self.root_instruction();
        assert!(OWN.contains(Span::sized(region.get(), 4096)), "VMPTRLD outside of nvmx's frames");
        self.with(|core| {
            core.counts.vmptrld += 1;
            core.vmptrld(region.get()).is_ok()
        })
    }

    fn vmclear(&mut self, region: Hpa) -> bool {
        self.root_instruction();
        assert!(OWN.contains(Span::sized(region.get(), 4096)), "VMCLEAR outside of nvmx's frames");
        self.with(|core| {
            core.counts.vmclear += 1;
            core.vmclear(region.get()).is_ok()
        })
    }

    fn invept(&mut self, kind: Invalidate, eptp: u64) -> bool {
        self.root_instruction();
        self.with(|core| {
            core.counts.invept += 1;
            core.invept(kind as u64, eptp).is_ok()
        })
    }

    fn invvpid(&mut self, kind: Invalidate, vpid: u16, linear: u64) -> bool {
        self.root_instruction();
        self.with(|core| {
            core.counts.invvpid += 1;
            core.invvpid(kind as u64, vpid.into(), linear).is_ok()
        })
    }

    fn enter(&mut self, regs: &mut GuestRegs, launch: bool) -> Entered {
        // Before the look at what arrived, or behind it: its handler goes back then.
        self.root_instruction();
        if !cpu::this().arrived().is_empty() {
            return Entered::CalledOff;
        }
        if self.host_rsp != 0 {
            assert_eq!(self.host_rsp, regs.host_rsp(), "the CPU has moved");
        }
        self.host_rsp = regs.host_rsp();
        let host_rsp = self.host_rsp;
        let host_area = Field::ALL.iter().filter(|field| field.is_host_state() && **field != HOST_RIP);
        let host_area: Vec<_> = self.with(|core| host_area.map(|field| (*field, core.get(*field))).collect());
        assert_eq!(self.host_area.get_or_insert_with(|| host_area.clone()), &host_area, "nvmx's host area");
        let entered = self.with(|core| {
            let exits = match core.get(HOST_RIP) {
                EXIT_PATH => Entered::Exit,
                TRACED_EXIT_PATH => Entered::TracedExit,
                other => panic!("nvmx's host area: exits land at {other:#x}"),
            };
            assert_eq!(core.get(HOST_RSP), host_rsp, "nvmx's host area");
            core.gprs = regs.gpr;
            (core.vmentry(launch), exits)
        });
        let (entered, exits) = entered;
        let exit = match entered {
            Err(Fail::Valid(7)) => return Entered::VmFail,
            Err(fail) => panic!("nvmx enters a guest and gets {fail:?}"),
            Ok(Entry::Late) => return exits,
            Ok(Entry::Guest(Some(exit))) => Some(exit),
            Ok(Entry::Guest(None)) => not_nvmx(|| self.guest_runs()),
        };
        let Some(exit) = exit else {
            // The guest stands where it is; the next program goes on from there.
            self.with(|core| {
                core.stand_still(launch);
                core.put(VM_INSTRUCTION_ERROR, OVER.into());
                regs.gpr = core.gprs;
            });
            return Entered::VmFail;
        };
        self.with(|core| {
            core.vmexit(exit);
            regs.gpr = core.gprs;
        });
        if self.guest.take_nmi() {
            cpu::this().note_arrived(Arrived::NMI);
        }
        exits
    }

    fn exit_path(&self) -> u64 {
        self.exit_path
    }

    fn trace_exits(&mut self) {
        self.exit_path = TRACED_EXIT_PATH;
    }

    fn rdmsr(&mut self, index: u32) -> Result<u64, Fault> {
        self.root_instruction();
        self.with(|core| core.msr(index).ok_or(Fault::GeneralProtection(0)))
    }

    unsafe fn wrmsr(&mut self, index: u32, value: u64) -> Result<(), Fault> {
        self.root_instruction();
        self.with(|core| if core.set_msr(index, value) { Ok(()) } else { Err(Fault::GeneralProtection(0)) })
    }

    fn read(&mut self, register: Register) -> u64 {
        self.root_instruction();
        self.with(|core| match register {
            Register::Cr0 => core.state.get(GUEST_CR0),
            Register::Cr2 => core.cr2,
            Register::Cr3 => core.state.get(GUEST_CR3),
            Register::Cr4 => core.state.get(GUEST_CR4),
            Register::Dr0 => core.dr[0],
            Register::Dr1 => core.dr[1],
            Register::Dr2 => core.dr[2],
            Register::Dr3 => core.dr[3],
            Register::Dr6 => core.dr6,
            Register::Dr7 => core.state.get(GUEST_DR7),
            Register::Pkru => core.pkru,
        })
    }

    unsafe fn write(&mut self, register: Register, value: u64) {
        self.root_instruction();
        self.with(|core| match register {
            Register::Cr0 => _ = core.state.set(GUEST_CR0, value),
            Register::Cr2 => core.cr2 = value,
            Register::Cr3 => _ = core.state.set(GUEST_CR3, value),
            Register::Cr4 => _ = core.state.set(GUEST_CR4, value),
            Register::Dr0 => core.dr[0] = value,
            Register::Dr1 => core.dr[1] = value,
            Register::Dr2 => core.dr[2] = value,
            Register::Dr3 => core.dr[3] = value,
            Register::Dr6 => core.dr6 = value,
            Register::Dr7 => _ = core.state.set(GUEST_DR7, value),
            Register::Pkru => core.pkru = value,
        });
    }

    fn xsetbv(&mut self, index: u32, value: u64) -> Result<(), Fault> {
        self.root_instruction();
        self.with(|core| {
            if index != 0 || value & 1 == 0 || value & !7 != 0 || value & 6 == 4 {
                return Err(Fault::GeneralProtection(0));
            }
            core.xcr0 = value;
            Ok(())
        })
    }

    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> CpuIdResult {
        match leaf {
            // XSAVES has the states of Intel PT and of architectural LBRs.
            0xD if subleaf == 1 => CpuIdResult { eax: 1, ebx: 2, ecx: 1 << 8 | 1 << 15, edx: 4 },
            // The answer that the model of a guest on the bare machine gets.
            0x8000_0000 => CpuIdResult { eax: 0x8000_0008, ebx: 0, ecx: 0, edx: 0 },
            1 => CpuIdResult { eax: 0x806C1, ebx: 0, ecx: 1 << 5, edx: 0 },
            // Key Locker: it is activated, and EBX mirrors CR4.KL.
            0x19 => CpuIdResult { eax: 1, ebx: self.read(Register::Cr4) as u32 >> 19 & 1, ecx: 0, edx: 0 },
            _ => CpuIdResult { eax: 1, ebx: 2, ecx: 3, edx: 4 },
        }
    }

    fn tsc(&mut self) -> u64 {
        self.root_instruction();
        self.with(|core| {
            core.tsc += 3;
            core.tsc
        })
    }

    fn write_back_caches(&mut self) {}

    fn device_read(&mut self, _phys: &DirectMap, at: Hpa) -> u32 {
        self.with(|core| core.apic.get(&(at.page_offset() as u32)).copied().unwrap_or(0))
    }

    unsafe fn device_write(&mut self, _phys: &DirectMap, at: Hpa, value: u32) {
        self.with(|core| _ = core.apic.insert(at.page_offset() as u32, value));
    }

    unsafe fn inb(&mut self, port: u16) -> u8 {
        // The serial line is ready and drained.
        if port == 0x3FD { 0x60 } else { 0 }
    }

    unsafe fn outb(&mut self, port: u16, value: u8) {
        self.with(|core| core.ports.push((port, value)));
    }

    fn halt(&mut self) -> ! {
        panic!("the processor halts for good");
    }
}

/// Capabilities of the machine that L2 sees.
pub fn as_l2_sees(setup: &Setup) -> Capabilities {
    offered(&setup.hardware)
}

/// L2 has VMCS shadowing.
pub fn shadows(setup: &Setup) -> bool {
    as_l2_sees(setup).msr(0x48B).is_some_and(|msr| msr >> (32 + 14) & 1 == 1)
}

/// Runs a program bare and under nvmx by every strategy: it must see the same.
pub fn agree<F: Future<Output = ()> + 'static>(program: impl Fn(Guest) -> F) {
    Setup::all().into_iter().for_each(|setup| agree_on(setup, &program));
}

/// Runs a program bare and under nvmx: it must see the same.
pub fn agree_on<F: Future<Output = ()> + 'static>(setup: Setup, program: impl Fn(Guest) -> F) {
    let expected = bare(as_l2_sees(&setup), &program);
    let mut world = World::new(setup);
    let future = program(world.guest.clone());
    let guest = world.guest.clone();
    let end = world.run(|_| async move {
        boot(&guest);
        future.await;
    });
    let seen = world.guest.log();
    let name = format!("{:?} {:?}", setup.strategy, setup.storage);
    for (i, (bare, nested)) in expected.iter().zip(&seen).enumerate() {
        assert!(
            bare == nested,
            "{name}, entry {i}:\n  bare:   {bare}\n  nested: {nested}\n{}",
            differences(bare, nested)
        );
    }
    assert!(matches!(end, End::Over), "{name}: {end:?} after {:?}", seen.last());
    assert_eq!(expected.len(), seen.len(), "{name}");
    if std::env::var_os("NVMX_SHOW").is_some() {
        seen.iter().for_each(|line| println!("{line}"));
    }
}

fn differences(bare: &str, nested: &str) -> String {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let (a, b) = (words(bare), words(nested));
    let only = |a: &[String], b: &[String]| a.iter().filter(|word| !b.contains(word)).cloned().collect::<Vec<_>>();
    format!("  only bare: {:?}\n  only nested: {:?}", only(&a, &b), only(&b, &a))
}
