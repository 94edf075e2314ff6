//! From the loader's machine state to nvmx in its own range at the top of memory.
//!
//! `entry.s` brings the processor into long mode, with the image at the upper half where the loader put it.
//! [`Handover::settle`] chooses nvmx's range, copies the image there and continues in the copy: the linear addresses stay,
//! so the switch is one write of CR3.

pub mod ap;
pub mod int15;

#[cfg(target_os = "none")]
use core::arch::global_asm;
use core::{arch::asm, fmt, slice};

use raw_cpuid::CpuId;

use crate::x86::msr::IA32_EFER;
use crate::x86::{Cr4, efer};
use crate::{
    addr::{Hpa, PAGE_SIZE},
    boot::{
        BootInfo, Options, acpi,
        info::{InfoError, Module, Rsdp},
        layout::{self, Layout, Need, TooLittleMemory},
        options::{BadValue, UnknownWords},
    },
    hw::{
        cpu, cr, early, idt, machine_check,
        phys::{DIRECT_MAP, DirectMap},
    },
    mm::{
        FramePool, PhysMem, Span,
        paging::{OutOfFrames, PageRights, PageSize, PageTables},
    },
};

// On a host the rest is only compiled, for its lints: an executable there must not get the note for loaders.
#[cfg(target_os = "none")]
global_asm!(include_str!("entry.s"), rust_entry = sym rust_entry);

/// What the tables of the entry code map.
const EARLY_END: u64 = 4 << 30;
/// What the direct map has room for in the upper half.
const DIRECT_MAP_MAX: u64 = 1 << 46;
const GIB: u64 = 1 << 30;

const EFER_NXE: u64 = efer::NXE;
const CR4_OSXSAVE: u64 = Cr4::OSXSAVE.bits();

/// Names the function that runs after the entry code: `fn(Handover) -> !`.
#[macro_export]
macro_rules! entry_point {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "Rust" fn nvmx_main(handover: $crate::hw::boot::Handover) -> ! {
            let main: fn($crate::hw::boot::Handover) -> ! = $main;
            main(handover)
        }
    };
}

unsafe extern "Rust" {
    safe fn nvmx_main(handover: Handover) -> !;
}

unsafe extern "C" {
    static boot_load_start: u8;
    static boot_bss_end: u8;
    static image_start: u8;
    static image_text_start: u8;
    static image_text_end: u8;
    static image_rodata_start: u8;
    static image_rodata_end: u8;
    static image_data_start: u8;
    static image_end: u8;
    static boot_stack_end_low: u8;
}

#[cfg_attr(not(target_os = "none"), allow(dead_code))]
extern "C" fn rust_entry(magic: u32, info: u32) -> ! {
    nvmx_main(Handover { magic, info })
}

/// The machine as the loader left it: there is one, and [`Handover::settle`] consumes it.
#[derive(Debug)]
pub struct Handover {
    magic: u32,
    info: u32,
}

/// nvmx in its own range.
#[derive(Debug)]
pub struct Settled {
    /// Where it is, and the frames of the other processors.
    pub layout: Layout,
    /// Free frames of this one.
    pub frames: FramePool,
    /// Its page tables, which are active.
    pub tables: PageTables,
    /// Physical memory.
    pub phys: DirectMap,
}

/// nvmx cannot settle.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SettleError {
    /// There is no room.
    TooLittleMemory(TooLittleMemory),
    /// The stack of the entry code, below which its page tables lie, was used to its last page.
    DeepStack,
    /// What the loader said of the modules is not there any more.
    LostModules(InfoError),
    /// Memory is so large that nvmx's frames do not even suffice for its page tables.
    OutOfFrames,
}

impl fmt::Display for SettleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLittleMemory(error) => error.fmt(f),
            Self::LostModules(error) => error.fmt(f),
            Self::DeepStack => f.write_str("nvmx's stack is too small for its start"),
            Self::OutOfFrames => f.write_str("too little memory: nvmx's frames do not suffice for its page tables"),
        }
    }
}

impl From<TooLittleMemory> for SettleError {
    fn from(error: TooLittleMemory) -> Self {
        Self::TooLittleMemory(error)
    }
}

impl From<OutOfFrames> for SettleError {
    fn from(_: OutOfFrames) -> Self {
        Self::OutOfFrames
    }
}

impl Handover {
    /// What the loader says.
    pub fn info(&self) -> Result<BootInfo, InfoError> {
        BootInfo::read(self.magic, Hpa::new(self.info.into()), &early_map())
    }

    /// What nvmx's command line asks for.
    ///
    /// # Errors
    /// The first word whose value its option does not have.
    pub fn options(&self, info: &BootInfo) -> Result<(Options, UnknownWords), BadValue> {
        Options::parse(info.command_line.words(&early_map()))
    }

    /// The ACPI root pointer where a BIOS puts it.
    pub fn find_rsdp(&self) -> Option<Rsdp> {
        acpi::find_rsdp(&early_map())
    }

    /// Moves nvmx to its own range, gives it its page tables, and this processor its stacks and descriptor tables. What
    /// was below is free afterwards, but for the modules and what lists them: the old image is wiped.
    ///
    /// MSRs that may not exist can be read from then on.
    pub fn settle(self, info: &BootInfo, options: &Options) -> Result<Settled, SettleError> {
        let cpuid = CpuId::new();
        let extended = cpuid.get_extended_processor_and_feature_identifiers();
        let no_execute = extended.as_ref().is_some_and(|e| e.has_execute_disable());
        let gib_pages = extended.as_ref().is_some_and(|e| e.has_1gib_pages());
        let loaded = Span::new(address(&raw const boot_load_start), address(&raw const boot_bss_end));
        let image = Span::new(address(&raw const image_start), address(&raw const image_end));
        let early = early_map();
        let occupied = info.modules(&early).map(|module| module.span).chain(info.in_use(&early)).chain([loaded]);
        let end_of_stack = Hpa::new(address(&raw const boot_stack_end_low));
        if early.zeros(end_of_stack, PAGE_SIZE as usize / 8) < PAGE_SIZE as usize / 8 {
            return Err(SettleError::DeepStack);
        }
        let rsdp = info.rsdp.clone().or_else(|| self.find_rsdp());
        // Without a list nvmx ends, or there is one.
        let cpus = rsdp.and_then(|rsdp| acpi::cpus(&rsdp, &early).ok()).map_or(1, |cpus| cpus.len());
        let need = Need {
            image: image.len(),
            cpus,
            wanted: options.cpus.map_or(cpus, |wanted| wanted as usize),
            gib_pages,
            frames: options.frames,
            start: ModuleRoom::of(info).bytes,
        };
        let layout = layout::choose(&info.memory, occupied, &need)?;
        let own = layout.own;
        let mut frames = FramePool::new(layout.first);
        let largest = if gib_pages { PageSize::Huge } else { PageSize::Large };
        let mut tables = PageTables::new(&mut frames, &early, largest)?;
        let end = info.memory.end_of_memory().clamp(EARLY_END, DIRECT_MAP_MAX).next_multiple_of(GIB);
        // A processor without execute-disable is refused, but only once nvmx can tell.
        let rights = |rights: PageRights| if no_execute { rights } else { rights - PageRights::NO_EXECUTE };
        let data = rights(PageRights::WRITE | PageRights::NO_EXECUTE);
        tables.map(&mut frames, &early, DIRECT_MAP, Hpa::new(0), end, data)?;
        for (start, end, rights) in [
            (&raw const image_text_start, &raw const image_text_end, PageRights::empty()),
            (&raw const image_rodata_start, &raw const image_rodata_end, rights(PageRights::NO_EXECUTE)),
            (&raw const image_data_start, &raw const image_end, data),
        ] {
            let to = Hpa::new(own.start() + (address(start) - image.start()));
            tables.map(&mut frames, &early, address(start), to, address(end) - address(start), rights)?;
        }

        // XSETBV of L2 is executed for it by nvmx, which needs it enabled.
        if cpuid.get_feature_info().is_some_and(|f| f.has_xsave()) {
            // SAFETY: the processor has the bit; it enables instructions and changes nothing else.
            unsafe { cr::set_cr4(cr::cr4() | CR4_OSXSAVE) };
        }

        // SAFETY: 1. `own` is usable memory that neither the image nor a module occupies. 2. `tables` map the image to
        // its copy and all of memory at `DIRECT_MAP`. 3. `self` is gone: this happens once.
        let phys = unsafe {
            move_image(image, own.start(), &tables, no_execute);
            DirectMap::new(Hpa::new(end))
        };
        let idt = idt::build(&mut frames, phys)?;
        cpu::install(cpu::prepare(0, idt, data, &mut frames, &mut tables, phys)?);
        machine_check::take();
        // Nothing of nvmx may be left where L2 can read it (invariant I9).
        phys.wipe(Hpa::new(loaded.start()), loaded.len());
        Ok(Settled { layout, frames, tables, phys })
    }
}

/// The modules and their command lines, in one piece of memory.
#[derive(Clone, Copy)]
struct ModuleRoom {
    modules: usize,
    bytes: u64,
}

impl ModuleRoom {
    const fn of(info: &BootInfo) -> Self {
        let (modules, text) = info.to_keep();
        Self { modules, bytes: (modules * size_of::<Module<'_>>() + text) as u64 }
    }
}

/// Calls `with` with the modules and their command lines, in frames that are free again afterwards. The loader's list is not needed
/// from then on.
///
/// # Errors
/// [`SettleError::OutOfFrames`] and [`SettleError::LostModules`]
pub fn with_modules<R>(
    info: &BootInfo,
    frames: &mut FramePool,
    phys: DirectMap,
    with: impl FnOnce(&mut [Module<'_>]) -> R,
) -> Result<R, SettleError> {
    let ModuleRoom { modules, bytes } = ModuleRoom::of(info);
    if modules == 0 {
        return Ok(with(&mut []));
    }
    let run = frames.alloc_run(&phys, bytes.div_ceil(PAGE_SIZE) as usize).ok_or(SettleError::OutOfFrames)?;
    let place = phys.linear(run.hpa(), bytes).ok_or(SettleError::OutOfFrames)?;
    let list = place.cast::<Module<'_>>();
    // SAFETY: 1. the frames are nvmx's own, mapped and nobody else's until they are given back below, when both slices are gone.
    // 2. A page is aligned for a module, and each is written before the slice is made. 3. The text lies behind the modules, and
    // frames are zeroed.
    let (list, text) = unsafe {
        (0..modules).for_each(|n| list.add(n).write(Module::default()));
        let text = list.add(modules).cast::<u8>();
        let length = bytes as usize - modules * size_of::<Module<'_>>();
        (slice::from_raw_parts_mut(list, modules), slice::from_raw_parts_mut(text, length))
    };
    info.keep(&phys, list, text).map_err(SettleError::LostModules)?;
    let result = with(list);
    run.into_frames().for_each(|frame| frames.free(frame));
    Ok(result)
}

/// Copies the image and continues in the copy.
///
/// # Safety
///
/// 1. Memory at `to` is usable and nobody's, for the length of the image.
/// 2. `tables` map each address of `image` to its copy, and the direct map.
unsafe fn move_image(image: Span, to: u64, tables: &PageTables, no_execute: bool) {
    // SAFETY: 1. EFER exists, with NXE where CPUID says execute-disable; no entry in use has bit 63 set yet.
    // 2. The stack lies in the image: it is copied as it is, and nothing is pushed until CR3 points to the copy. 3. Code
    // goes on at the same linear address, in the copy.
    unsafe {
        if no_execute {
            early::wrmsr(IA32_EFER, early::rdmsr(IA32_EFER) | EFER_NXE);
        }
        asm!(
            "rep movsq",
            "mov cr3, {tables}",
            tables = in(reg) tables.root().get(),
            inout("rcx") image.len() / 8 => _,
            inout("rsi") image.start() => _,
            inout("rdi") DIRECT_MAP + to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// The direct map of the entry code.
fn early_map() -> DirectMap {
    // SAFETY: 1. the entry code maps the first 4 GiB, and nvmx's own tables map at least as much. 2. `info` only reads;
    // `settle` only writes to nvmx's future range.
    unsafe { DirectMap::new(Hpa::new(EARLY_END)) }
}

/// The address of a symbol of the linker script.
fn address(symbol: *const u8) -> u64 {
    symbol as u64
}
