//! The nvmx image: from the loader to the first instruction of L2.
//!
//! Boot reads top to bottom here; what can go wrong ends in [`give_up`] with one line that says what to do.
#![no_std]
#![no_main]

use core::{fmt::Display, panic::PanicInfo};

use l2_protocol::{Hex, Kind};
use log::{LevelFilter, error, info, warn};
use nvmx::addr::Hpa;
use nvmx::boot::acpi::{self, AcpiError};
use nvmx::boot::info::{InfoError, LoadedBy};
use nvmx::boot::options::{Exit, Serial, StopOption};
use nvmx::boot::requirements::{self, Missing};
use nvmx::boot::{BootInfo, CpuList, FoundProcessor, Options, guest_image, identity, int15};
use nvmx::hw::boot::{Handover, Settled};
use nvmx::hw::epitaph::{self, Status};
use nvmx::hw::{self, cpu, msr, serial};
use nvmx::mm::GuestMemory;
use nvmx::mm::map::RangeKind;
use nvmx::mm::mtrr::Mtrrs;
use nvmx::run::{self, Decided, Machine};
use raw_cpuid::CpuId;

nvmx::entry_point!(main);

fn main(handover: Handover) -> ! {
    let emulated =
        requirements::is_virtual(&CpuId::new()) || handover.find_rsdp().is_some_and(|rsdp| acpi::is_emulator(&rsdp));
    epitaph::configure(Exit::Auto, emulated);
    let info = handover.info();
    let parsed = info.as_ref().map_or_else(|_| Ok(Default::default()), |info| handover.options(info));
    let (serial, log) = parsed.as_ref().map_or((Serial::COM1, LevelFilter::Info), |(o, _)| (o.serial, o.log));
    serial::init(serial, log);
    let info = info.unwrap_or_else(|e| give_up(e));
    let (options, unknown) = parsed.unwrap_or_else(|e| give_up(e));
    epitaph::configure(options.exit, emulated);
    nvmx::nested::tell::configure(options.explain);
    info!("nvmx {}, loaded by {}", env!("CARGO_PKG_VERSION"), if info.loader.is_empty() { "?" } else { &info.loader });

    if !unknown.words.is_empty() {
        warn!("{unknown}");
    }

    if info.given_up > 0 {
        warn!("the loader's memory map has too many ranges: {} KiB in small pieces stay unused", info.given_up >> 10);
    }

    let home = handover.settle(&info, &options).unwrap_or_else(|e| give_up(e));
    cpu::run_on_main_stack((home, info, options), |(home, info, options)| {
        let processor = examine_processor(options.stop);
        start(assemble(home, &info, options, processor))
    })
}

/// What the processor is; if it lacks something that is needed, all that it lacks, and the end.
fn examine_processor(stop: StopOption) -> FoundProcessor {
    let (processor, missing) = FoundProcessor::examine(&CpuId::new(), rdmsr);
    match stop {
        StopOption::Cpus => missing.iter().for_each(|what| warn!("{what}")),
        StopOption::Never => missing.iter().for_each(|what| error!("{what}")),
    }
    // Page tables need execute-disable in any case.
    let needed = missing.iter().any(|what| stop == StopOption::Never || *what == Missing::NoExecute);
    if needed { epitaph::end(Status::Fail) } else { processor }
}

/// An MSR that is asked for only where it exists; one that the processor denies all the same has no bit set.
fn rdmsr(index: u32) -> u64 {
    msr::rdmsr_safe(index).unwrap_or(0)
}

/// There is no list of processors. L2 could start one that nvmx does not know, so that it would run there without nvmx: only
/// the user can say that there is none.
fn processors_unknown(error: AcpiError, by: LoadedBy, options: &Options, processor: &FoundProcessor) -> CpuList {
    if options.cpus == Some(1) && error != AcpiError::TooManyCpus {
        warn!("{error}: cpus=1 says that there is no processor but the one that booted");
        return CpuList::from_iter([processor.apic_id]);
    }
    match (error, by) {
        (AcpiError::NoRsdp, LoadedBy::Multiboot1) => error!(
            "{error}: the first version of multiboot does not hand them over under UEFI; load nvmx by multiboot2 (GRUB: \
             multiboot2 and module2), or say cpus=1 if the machine has no other processor"
        ),
        (AcpiError::TooManyCpus, _) => error!("{error}"),
        _ => error!("{error}: nvmx cannot know all processors; say cpus=1 if the machine has no other one"),
    }
    epitaph::end(Status::Fail)
}

/// Puts the machine together: processors, memory types, L2's memory and image.
fn assemble(home: Settled, info: &BootInfo, options: Options, processor: FoundProcessor) -> Machine {
    let Settled { layout, mut frames, tables, phys } = home;
    let own = layout.own;
    info!("nvmx lies at {own}, {} of {} frames free", frames.available(), frames.total());
    let strategy = identity::strategy(options.fields, &processor.vmx).unwrap_or_else(|e| give_up(e));

    let rsdp = info.rsdp.clone().or_else(|| acpi::find_rsdp(&phys));
    let cpus = rsdp.as_ref().ok_or(AcpiError::NoRsdp).and_then(|rsdp| acpi::cpus(rsdp, &phys));
    let cpus = cpus.unwrap_or_else(|e| processors_unknown(e, info.protocol, &options, &processor));
    info!("{} CPUs found", cpus.len());

    let mtrrs = if processor.mtrrs { Mtrrs::read(processor.max_phys_addr, rdmsr) } else { Mtrrs::none() };

    // Reserved, not left out: L2 must not take the hole for room for its devices.
    let mut guest_memory = info.memory.clone();
    guest_memory.set(own, RangeKind::Reserved).unwrap_or_else(|_| give_up(InfoError::TooManyRanges));
    let guest = GuestMemory::new(phys, own, processor.max_phys_addr);
    let start = hw::boot::with_modules(info, &mut frames, phys, |modules| {
        let spans = modules.iter().map(|module| module.span);
        if let Some(page) = int15::answer(&guest, &mut guest_memory, spans, hw::boot::int15::code()) {
            info!("INT 15h tells L2 of its memory from {page}");
        }
        guest_image::load(&guest, &guest_memory, modules, rsdp.as_ref(), &info.extras)
    });
    let start = start.unwrap_or_else(|e| give_up(e)).unwrap_or_else(|e| give_up(e));
    Machine {
        options,
        memory: info.memory.clone(),
        guest_memory,
        layout,
        frames,
        phys,
        guest,
        tables,
        mtrrs,
        processor,
        strategy,
        cpus,
        rsdp,
        start,
    }
}

/// Starts it.
fn start(machine: Machine) -> ! {
    info!("L2 starts at {} by {:?}", machine.start.entry, machine.start.protocol);
    match machine.options.stop {
        StopOption::Never => run::start(machine, announce),
        StopOption::Cpus => stop(machine),
    }
}

/// Starts the processors, says what the machine is, and ends.
fn stop(mut machine: Machine) -> ! {
    let used = run::smp::start_others(&mut machine);
    machine.guest_memory.iter().for_each(|range| info!("memory of L2: {} {:?}", range.span, range.kind));
    let listed =
        machine.rsdp.as_ref().and_then(|rsdp| acpi::cpus(rsdp, &machine.phys).ok()).map_or(0, |cpus| cpus.len());
    let Machine { memory, layout, frames, cpus, start, phys, .. } = &machine;
    let told = BootInfo::read(start.eax, Hpa::new(start.ebx.get()), phys);
    let (line, (modules, text)) = told.map_or((0, (0, 0)), |told| (told.command_line.span().len(), told.to_keep()));
    let own = layout.own;
    serial::record(Kind::Check, |record| {
        record.add("name", &"machine");
        record.add("cpus", &cpus.len());
        record.add("started", &(1 + run::smp::started()));
        record.add("used", &used);
        record.add("madt", &listed);
        record.add("ranges", &memory.iter().count());
        record.add("usable_mib", &(memory.usable_bytes() >> 20));
        record.add("end", &Hex(memory.end_of_memory()));
        record.add("own", &Hex(own.start()));
        record.add("own_mib", &(own.len() >> 20));
        record.add("frames", &frames.total());
        record.add("others_kib", &(layout.others.len() >> 10));
        record.add("free", &frames.available());
        record.add("entry", &Hex(start.entry.get()));
        record.add("modules", &modules);
        record.add("text", &text);
        record.add("line", &line);
        record.add("stack_left", &cpu::this().stack_left());
    });
    serial::record(Kind::End, |record| {
        record.add("status", &"pass");
        record.add("failed", &0u32);
    });
    epitaph::end(Status::Pass)
}

/// Says what runs.
fn announce(processor: &FoundProcessor, decided: &Decided) {
    serial::record(Kind::Hello, |record| {
        record.add("version", &env!("CARGO_PKG_VERSION"));
        record.add("cpu", &processor.brand.as_str());
        record.add("cpus", &decided.cpus);
        record.add("strategy", &decided.access.strategy.name());
        record.add("vmcs", &decided.access.vmcs.name());
        record.add("l0", &processor.below);
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
