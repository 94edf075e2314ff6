//! The nvmx image: from the loader to the first instruction of L2.
//!
//! Boot reads top to bottom here; what can go wrong ends in [`give_up`] with one line that says what to do.
#![no_std]
#![no_main]

use core::{fmt::Display, panic::PanicInfo};

use l2_protocol::Kind;
use log::{LevelFilter, error, info, warn};
use nvmx::boot::acpi::{self, AcpiError};
use nvmx::boot::info::InfoError;
use nvmx::boot::{BootInfo, Cpu, CpuList, Options, Processor, identity, int15, l2_image};
use nvmx::hw::boot::{Handover, Home};
use nvmx::hw::epitaph::{self, Status};
use nvmx::hw::{self, cpu, msr, serial};
use nvmx::mm::GuestMemory;
use nvmx::mm::map::RangeKind;
use nvmx::mm::mtrr::Mtrrs;
use nvmx::run::{self, Decided, Machine};
use raw_cpuid::CpuId;

nvmx::entry_point!(main);

fn main(handover: Handover) -> ! {
    serial::init(LevelFilter::Info);
    let info = handover.info().unwrap_or_else(|e| give_up(e));
    let options = Options::parse(&info.command_line).unwrap_or_else(|e| give_up(e));
    log::set_max_level(options.log);
    epitaph::configure(options.exit);
    nvmx::nested::tell::configure(options.explain);
    info!("nvmx {}, loaded by {}", env!("CARGO_PKG_VERSION"), if info.loader.is_empty() { "?" } else { &info.loader });

    let home = handover.settle(&info).unwrap_or_else(|e| give_up(e));
    cpu::run_on_main_stack((home, info, options), |(home, info, options)| {
        let processor = examine_processor();
        start(assemble(home, &info, options, processor))
    })
}

/// What the processor is, or all that it lacks.
fn examine_processor() -> Processor {
    Processor::examine(&CpuId::new(), rdmsr).unwrap_or_else(|missing| {
        missing.iter().for_each(|what| error!("{what}"));
        epitaph::end(Status::Fail)
    })
}

/// An MSR that is asked for only where it exists; one that the processor denies all the same has no bit set.
fn rdmsr(index: u32) -> u64 {
    msr::rdmsr_safe(index).unwrap_or(0)
}

/// Puts the machine together: processors, memory types, L2's memory and image.
fn assemble(home: Home, info: &BootInfo, options: Options, processor: Processor) -> Machine {
    let Home { own, frames, tables, phys } = home;
    info!("nvmx lies at {own}, {} of {} frames free", frames.available(), frames.total());
    let strategy = identity::strategy(options.fields, &processor.vmx).unwrap_or_else(|e| give_up(e));

    let rsdp = info.rsdp.clone().or_else(|| acpi::find_rsdp(&phys));
    let cpus = rsdp.as_ref().ok_or(AcpiError::NoRsdp).and_then(|rsdp| acpi::cpus(rsdp, &phys));
    let cpus = cpus.unwrap_or_else(|e| {
        warn!("{e}: only the processor that booted is known");
        CpuList::from_iter([Cpu { apic_id: processor.apic_id, enabled: true }])
    });
    info!("{} CPUs found", cpus.iter().filter(|cpu| cpu.enabled).count());

    let mtrrs = if processor.mtrrs { Mtrrs::read(processor.max_phys_addr, rdmsr) } else { Mtrrs::none() };

    // Reserved, not left out: L2 must not take the hole for room for its devices.
    let mut l2_memory = info.memory.clone();
    l2_memory.set(own, RangeKind::Reserved).unwrap_or_else(|_| give_up(InfoError::TooManyRanges));
    let guest = GuestMemory::new(phys, own, processor.max_phys_addr);
    let modules = info.modules.iter().map(|module| module.span);
    if let Some(page) = int15::answer(&guest, &mut l2_memory, modules, hw::boot::int15::code()) {
        info!("INT 15h tells L2 of its memory from {page}");
    }
    let start =
        l2_image::load(&guest, &l2_memory, &info.modules, rsdp.as_ref(), &info.extras).unwrap_or_else(|e| give_up(e));
    Machine {
        options,
        memory: info.memory.clone(),
        l2_memory,
        own,
        frames,
        phys,
        guest,
        tables,
        mtrrs,
        processor,
        strategy,
        cpus,
        start,
    }
}

/// Starts it.
fn start(machine: Machine) -> ! {
    info!("L2 starts at {} by {:?}", machine.start.entry, machine.start.protocol);
    run::start(machine, announce)
}

/// Says what runs.
fn announce(processor: &Processor, decided: &Decided) {
    serial::record(Kind::Hello, |record| {
        record.add("version", &env!("CARGO_PKG_VERSION"));
        record.add("cpu", &processor.brand.as_str());
        record.add("cpus", &decided.cpus);
        record.add("strategy", &decided.strategy.name());
        record.add("vmcs", &if decided.vmcs_in_memory { "memory" } else { "instructions" });
        record.add("l0", &processor.l0);
        record.add("features", &identity::features(&processor.vmx).as_str());
    });
}

/// Ends the run: nothing has been started yet.
fn give_up(why: impl Display) -> ! {
    error!("{why}");
    epitaph::end(Status::Fail)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    epitaph::panic(info)
}
