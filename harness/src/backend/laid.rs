//! The memory of a guest as Firecracker and cloud-hypervisor lay it out for a PVH kernel: by the library with which both load kernels,
//! at their addresses. QEMU runs it in their place, since no package archive has either.
//!
//! Source: Firecracker, `src/vmm/src/arch/x86_64/`; cloud-hypervisor, `arch/src/x86_64/`: `layout.rs` and `mod.rs` of both.

use super::Spec;
use anyhow::{Context, Result, bail, ensure};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{Cmdline, KernelLoader, load_cmdline};
use std::fs::File;
use std::path::Path;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Whose layout.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vmm {
    /// Firecracker tells no RSDP and has it where a BIOS would
    Firecracker,
    /// cloud-hypervisor tells the RSDP, which lies where nobody would look for it
    CloudHypervisor,
}

const MIB: u64 = 1 << 20;
/// Where both put what the PVH interface tells: the start information, the list of modules, the memory map, the command line.
const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MAP: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// Kernels lie from here on.
const HIGH: u64 = MIB;
/// Memory ends here, and goes on at 4 GiB.
const GAP: u64 = 0xC000_0000;
const BEHIND_GAP: u64 = 1 << 32;
const START_MAGIC: u32 = 0x336E_C578;
/// Kinds of ranges in the memory map.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

impl Vmm {
    /// The longest command line, with its end.
    fn longest(self) -> usize {
        match self {
            Vmm::Firecracker => 2048,
            Vmm::CloudHypervisor => 0x1_0000,
        }
    }

    /// Where low memory ends.
    fn low_end(self) -> u64 {
        match self {
            Vmm::Firecracker => 0x9_FC00,
            Vmm::CloudHypervisor => 0xA_0000,
        }
    }

    /// Where the RSDP is, and the tables behind it.
    fn tables(self) -> (u64, u64) {
        match self {
            Vmm::Firecracker => (0xE_0000, 0xA_0000),
            Vmm::CloudHypervisor => (0xA_0000, 0xA_0040),
        }
    }

    /// The memory map of a machine with so much memory, in their order.
    fn map(self, memory: u64) -> Vec<hvm_memmap_table_entry> {
        let entry = |addr, end: u64, type_| hvm_memmap_table_entry { addr, size: end - addr, type_, reserved: 0 };
        let above = memory.checked_sub(GAP).filter(|rest| *rest > 0);
        let above = above.map(|rest| entry(BEHIND_GAP, BEHIND_GAP + rest, RAM));
        let high = entry(HIGH, memory.min(GAP), RAM);
        let low = entry(0, self.low_end(), RAM);
        match self {
            Vmm::Firecracker => {
                let reserved = [entry(self.low_end(), HIGH, RESERVED), entry(0xEEC0_0000, 0xFEC0_0000, RESERVED)];
                [low].into_iter().chain(reserved).chain(above).chain([high]).collect()
            }
            Vmm::CloudHypervisor => {
                let reserved = entry(0xE800_0000, 0xF800_0000, RESERVED);
                [low, high].into_iter().chain(above).chain([reserved]).collect()
            }
        }
    }
}

/// A range that the VMM has written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Piece {
    what: &'static str,
    at: u64,
    size: u64,
}

/// Memory that is ready for the first instruction.
pub struct Laid {
    memory: GuestMemoryMmap,
    pieces: Vec<Piece>,
    entry: u32,
}

/// Lays out a boot's memory.
///
/// # Errors
/// If a file cannot be read, has no PVH entry, or does not fit beside the others.
pub fn lay(vmm: Vmm, spec: &Spec) -> Result<Laid> {
    let size = u64::from(spec.machine.memory) * MIB;
    let low = size.min(GAP);
    let mut regions = vec![(GuestAddress(0), usize::try_from(low)?)];
    regions.extend((size > GAP).then(|| (GuestAddress(BEHIND_GAP), (size - GAP) as usize)));
    let memory = GuestMemoryMmap::from_ranges(&regions).map_err(|e| anyhow::anyhow!("{e}"))?;
    let mut laid = Laid { memory, pieces: Vec::new(), entry: 0 };

    let mut file = File::open(&spec.kernel.path).with_context(|| spec.kernel.path.display().to_string())?;
    let kernel =
        Elf::load(&laid.memory, None, &mut file, Some(GuestAddress(HIGH))).context("the image does not load")?;
    let PvhBootCapability::PvhEntryPresent(entry) = kernel.pvh_boot_cap else { bail!("the image has no PVH entry") };
    laid.entry = u32::try_from(entry.0)?;
    laid.note("the image", HIGH, kernel.kernel_end.saturating_sub(HIGH));

    let mut line = Cmdline::new(vmm.longest())?;
    line.insert_str(&spec.kernel.args)?;
    load_cmdline(&laid.memory, GuestAddress(COMMAND_LINE), &line)?;
    laid.note("the command line", COMMAND_LINE, spec.kernel.args.len() as u64 + 1);

    let mut info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: MAP,
        ..hvm_start_info::default()
    };
    if let [module] = spec.modules.as_slice() {
        // Both call it initrd, and give it no command line.
        ensure!(module.args.is_empty(), "a module has no command line here");
        let bytes = std::fs::read(&module.path).with_context(|| module.path.display().to_string())?;
        let at = low.checked_sub(bytes.len() as u64).context("the module is larger than memory")? & !0xFFF;
        laid.put("the module", at, &bytes)?;
        let entry = hvm_modlist_entry { paddr: at, size: bytes.len() as u64, ..hvm_modlist_entry::default() };
        laid.memory.write_obj(entry, GuestAddress(MODULES))?;
        laid.note("the list of modules", MODULES, size_of::<hvm_modlist_entry>() as u64);
        (info.nr_modules, info.modlist_paddr) = (1, MODULES);
    }
    let map = vmm.map(size);
    for (entry, at) in map.iter().zip((MAP..).step_by(size_of::<hvm_memmap_table_entry>())) {
        laid.memory.write_obj(*entry, GuestAddress(at))?;
    }
    laid.note("the memory map", MAP, size_of_val(map.as_slice()) as u64);
    info.memmap_entries = u32::try_from(map.len())?;

    let (rsdp, tables) = vmm.tables();
    let acpi = acpi(vmm, tables, spec.machine.cpus);
    laid.put("the ACPI tables", tables, &acpi.concat())?;
    laid.put("the RSDP", rsdp, &root_pointer(tables + acpi[0].len() as u64))?;
    if vmm == Vmm::CloudHypervisor {
        info.rsdp_paddr = rsdp;
    }
    laid.memory.write_obj(info, GuestAddress(START_INFO))?;
    laid.note("the start information", START_INFO, size_of::<hvm_start_info>() as u64);
    laid.check(&map)?;
    Ok(laid)
}

impl Laid {
    fn note(&mut self, what: &'static str, at: u64, size: u64) {
        self.pieces.push(Piece { what, at, size });
    }

    fn put(&mut self, what: &'static str, at: u64, bytes: &[u8]) -> Result<()> {
        self.memory.write_slice(bytes, GuestAddress(at)).with_context(|| format!("{what} at {at:#x}"))?;
        self.note(what, at, bytes.len() as u64);
        Ok(())
    }

    /// No two pieces overlap, and what is not firmware's lies in memory that the map calls usable.
    fn check(&self, map: &[hvm_memmap_table_entry]) -> Result<()> {
        let mut pieces = self.pieces.clone();
        pieces.sort_by_key(|piece| piece.at);
        for pair in pieces.windows(2) {
            ensure!(pair[0].at + pair[0].size <= pair[1].at, "{} and {} overlap", pair[0].what, pair[1].what);
        }
        for Piece { what, at, size } in pieces.into_iter().filter(|piece| piece.at >= HIGH) {
            let inside = |e: &&hvm_memmap_table_entry| e.type_ == RAM && e.addr <= at && at + size <= e.addr + e.size;
            ensure!(map.iter().any(|entry| inside(&entry)), "{what} is not in usable memory");
        }
        Ok(())
    }

    /// Writes all of it into the folder; QEMU's arguments with which a machine starts there.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn arguments(&self, folder: &Path) -> Result<Vec<String>> {
        let mut list = Vec::new();
        let file = |name: String, bytes: &[u8]| -> Result<String> {
            let path = folder.join(name);
            std::fs::write(&path, bytes)?;
            Ok(path.display().to_string())
        };
        for (i, piece) in self.pieces.iter().enumerate() {
            let mut bytes = vec![0; usize::try_from(piece.size)?];
            self.memory.read_slice(&mut bytes, GuestAddress(piece.at))?;
            let path = file(format!("piece{i}"), &bytes)?.replace(',', ",,");
            list.extend(["-device".into(), format!("loader,file={path},addr={:#x},force-raw=on", piece.at)]);
        }
        list.extend(["-bios".into(), file("reset".into(), &firmware(self.entry))?]);
        Ok(list)
    }
}

/// Firmware that does no more than bring a processor from its reset to where the PVH interface starts: protected mode without
/// paging, flat segments, EBX the address of the start information.
fn firmware(entry: u32) -> Vec<u8> {
    /// What is seen below 1 MiB and below 4 GiB
    const SIZE: usize = 0x1_0000;
    let mut bytes = vec![0xF4; SIZE];
    let mut put = |at: usize, code: &[u8]| bytes[at..at + code.len()].copy_from_slice(code);
    // jmp f000:0000
    put(SIZE - 16, &[0xEA, 0, 0, 0, 0xF0]);
    // cli; lgdt cs:[0x40]; CR0.PE; jmp 8:000f0020
    put(0, &[0xFA, 0x2E, 0x66, 0x0F, 0x01, 0x16, 0x40, 0, 0x0F, 0x20, 0xC0, 0x0C, 1, 0x0F, 0x22, 0xC0]);
    put(16, &[0x66, 0xEA, 0x20, 0, 0x0F, 0, 8, 0]);
    // ds, es, ss = 0x10; ebx; eax; jmp eax
    put(0x20, &[0x66, 0xB8, 0x10, 0, 0x8E, 0xD8, 0x8E, 0xC0, 0x8E, 0xD0, 0xBB]);
    put(0x2B, &(START_INFO as u32).to_le_bytes());
    put(0x2F, &[0xB8]);
    put(0x30, &entry.to_le_bytes());
    put(0x34, &[0xFF, 0xE0]);
    put(0x40, &[0x17, 0, 0x50, 0, 0x0F, 0]);
    put(0x50, &[0u64, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF].map(u64::to_le_bytes).concat());
    bytes
}

/// The MADT and behind it the XSDT, both from `at` on.
///
/// Source: ACPI specification, "Multiple APIC Description Table", "Extended System Description Table".
fn acpi(vmm: Vmm, at: u64, cpus: u32) -> [Vec<u8>; 2] {
    let mut madt = [0xFEE0_0000u32, 1].map(u32::to_le_bytes).concat();
    for id in 0..cpus {
        match vmm {
            Vmm::Firecracker => madt.extend([0, 8, id as u8, id as u8, 1, 0, 0, 0]),
            Vmm::CloudHypervisor => {
                madt.extend([9, 16, 0, 0]);
                [id, 1, id].into_iter().for_each(|word| madt.extend(word.to_le_bytes()));
            }
        }
    }
    madt.extend([1, 12, 0, 0, 0, 0, 0xC0, 0xFE, 0, 0, 0, 0]);
    [table(b"APIC", 5, &madt), table(b"XSDT", 1, &at.to_le_bytes())]
}

fn table(name: &[u8; 4], revision: u8, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(36 + content.len()).unwrap_or(u32::MAX).to_le_bytes();
    let maker = b"VMM   PVHLAYOU\x01\0\0\0VMM \x01\0\0\0";
    let bytes = [name.as_slice(), &length, &[revision, 0], maker, content].concat();
    summed(bytes, 9)
}

/// Source: ACPI specification, "Root System Description Pointer".
fn root_pointer(xsdt: u64) -> Vec<u8> {
    let old = summed([b"RSD PTR \0VMM   \x02".as_slice(), &[0; 4]].concat(), 8);
    summed([old.as_slice(), &36u32.to_le_bytes(), &xsdt.to_le_bytes(), &[0; 4]].concat(), 32)
}

/// With the byte there such that all add up to 0.
fn summed(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    bytes[at] = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;
    use super::super::{Machine, Payload};
    use super::*;
    use nvmx::addr::Hpa;
    use nvmx::boot::{acpi, info::BootInfo, pvh};
    use nvmx::mm::{PhysMem, Place, Span};

    /// The memory as nvmx reads it.
    struct Read<'a>(&'a GuestMemoryMmap);

    impl PhysMem for Read<'_> {
        fn read_u64(&self, at: Hpa) -> u64 {
            self.0.read_obj(GuestAddress(at.get())).unwrap()
        }

        fn read_bytes(&self, at: Hpa, into: &mut [u8]) {
            self.0.read_slice(into, GuestAddress(at.get())).unwrap();
        }

        fn write_u64(&self, _: Place<'_>, _: u64) {
            panic!("only read");
        }

        fn write_bytes(&self, _: Place<'_>, _: &[u8]) {
            panic!("only read");
        }

        fn take_bits(&self, _: Place<'_>, _: u64) -> u64 {
            panic!("only read");
        }

        fn compare_exchange(&self, _: Place<'_>, _: u64, _: u64) -> bool {
            panic!("only read");
        }

        fn compare_exchange_u32(&self, _: Place<'_>, _: u32, _: u32) -> bool {
            panic!("only read");
        }
    }

    const ENTRY: u32 = 0x10_0123;

    /// An ELF file with one segment at 1 MiB, of so many bytes in memory, and a note with the PVH entry.
    fn elf(memory: u64) -> Vec<u8> {
        let head = |kind: u32, at: u64, file: u64, memory: u64| {
            let words = [at, 0x10_0000, 0x10_0000, file, memory, 4];
            [[kind, 5].map(u32::to_le_bytes).concat(), words.map(u64::to_le_bytes).concat()].concat()
        };
        let (loaded, noted) = (64 + 2 * 56, 64 + 2 * 56 + 16);
        let note =
            [[4u32, 8, 18].map(u32::to_le_bytes).concat(), b"Xen\0".to_vec(), u64::from(ENTRY).to_le_bytes().to_vec()];
        let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
        bytes.extend([0x10_0000u64, 64, 0].map(u64::to_le_bytes).concat());
        bytes.extend([0u16, 0, 64, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
        bytes.extend(head(1, loaded, 16, memory));
        bytes.extend(head(4, noted, 24, 24));
        bytes.extend([7; 16]);
        bytes.extend(note.concat());
        bytes
    }

    fn laid(vmm: Vmm, mib: u32, image: u64, module: usize) -> Result<Laid> {
        let folder = tempfile::tempdir()?;
        let place = |name: &str, bytes: &[u8]| {
            std::fs::write(folder.path().join(name), bytes).unwrap();
            folder.path().join(name)
        };
        let modules = vec![Payload::new(place("m", &vec![9; module]), "")];
        let machine = Machine { memory: mib, cpus: 3, model: String::new() };
        lay(
            vmm,
            &Spec { kernel: Payload::new(place("k", &elf(image)), "log=info stop=cpus"), modules, machine, ..spec() },
        )
    }

    #[test]
    fn nvmx_reads_what_firecracker_and_cloud_hypervisor_tell() {
        for (vmm, mib) in [
            (Vmm::Firecracker, 512),
            (Vmm::CloudHypervisor, 512),
            (Vmm::Firecracker, 4096),
            (Vmm::CloudHypervisor, 4096),
        ] {
            let laid = laid(vmm, mib, 0x20_0000, 5000).unwrap();
            assert_eq!(laid.entry, ENTRY);
            let memory = Read(&laid.memory);
            let info = BootInfo::read(pvh::START_MAGIC, Hpa::new(START_INFO), &memory).unwrap();
            let words: Vec<_> = info.command_line.words(&memory).collect();
            assert_eq!(words.iter().map(|word| word.as_str()).collect::<Vec<_>>(), ["log=info", "stop=cpus"]);
            let end = u64::from(mib.min(3072)) * MIB;
            let modules: Vec<_> = info.modules(&memory).map(|module| (module.span, module.line.span().len())).collect();
            assert_eq!(modules, [(Span::sized(end - 0x2000, 5000), 0)]);
            let mut bytes = [0; 8];
            memory.read_bytes(Hpa::new(end - 0x2000), &mut bytes);
            assert_eq!((bytes, info.given_up), ([9; 8], 0));
            // All memory but what is between the low end and 1 MiB.
            assert_eq!(info.memory.usable_bytes(), u64::from(mib) * MIB - (MIB - vmm.low_end()), "{vmm:?}, {mib} MiB");
            // One tells where the tables are, with the other nvmx looks where a BIOS has them.
            assert_eq!(info.rsdp.is_some(), vmm == Vmm::CloudHypervisor);
            let rsdp = info.rsdp.or_else(|| acpi::find_rsdp(&memory)).unwrap();
            assert_eq!(acpi::cpus(&rsdp, &memory).unwrap().as_slice(), [0, 1, 2]);
        }
    }

    #[test]
    fn what_does_not_fit_or_overlaps_is_an_error() {
        let error = |vmm, mib, image, module| laid(vmm, mib, image, module).err().map(|e| format!("{e:#}")).unwrap();
        let overlap = error(Vmm::Firecracker, 16, 14 << 20, 2 << 20);
        assert!(overlap.contains("the image and the module overlap"), "{overlap}");
        assert!(error(Vmm::CloudHypervisor, 16, 4096, 17 << 20).contains("larger than memory"));
        let too_large = error(Vmm::CloudHypervisor, 16, 32 << 20, 4096);
        assert!(too_large.contains("overlap"), "{too_large}");
        // Without a note the file is no PVH kernel.
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = elf(4096);
        let at = bytes.windows(4).rposition(|word| word == b"Xen\0").unwrap();
        bytes[at] = b'Y';
        std::fs::write(folder.path().join("k"), bytes).unwrap();
        let nothing = lay(Vmm::Firecracker, &Spec { kernel: Payload::new(folder.path().join("k"), ""), ..spec() });
        assert_eq!(nothing.err().unwrap().to_string(), "the image has no PVH entry");
    }
}
