//! Every architectural MSR in every MSR area: the entry loads what WRMSR in ring 0 would take, the exit stores what RDMSR
//! would read and loads what WRMSR would take; no x2APIC register, and no base of FS or GS is loaded (SDM "Loading MSRs",
//! "Saving MSRs"). What an exit cannot store or load is a VMX abort, the end of the machine: not tried.

use crate::guest::{Exit, Guest, nothing};
use crate::msrs::policy::{self, Verdict};
use l2_kit::{
    Check, cpu, fields as f, pages,
    serial::Serial,
    setup::{Controls, Missing, exit_controls as exit, secondary},
    vmx,
};

const TSC: u32 = 0x10;
const SMBASE: u32 = 0x9E;
const X2APIC: core::ops::RangeInclusive<u32> = 0x800..=0x8FF;

/// Indexes. Those of a hypervisor's clock, which only some machines have, are left out, and those beyond the MSR bitmaps, for
/// which Bochs answers.
const MSRS: [core::ops::RangeInclusive<u32>; 38] = [
    0x0..=0x1,
    TSC..=TSC,
    0x17..=0x17,
    0x1B..=0x1B,
    0x3A..=0x3B,
    0x48..=0x48,
    0x8B..=0x8B,
    SMBASE..=SMBASE,
    0xC1..=0xC2,
    0xCE..=0xCF,
    0xE1..=0xE1,
    0xE7..=0xE8,
    0xFE..=0xFE,
    0x10A..=0x10A,
    0x122..=0x122,
    0x174..=0x176,
    0x179..=0x17B,
    0x186..=0x187,
    0x198..=0x19C,
    0x1A0..=0x1A2,
    0x1B0..=0x1B2,
    0x1D9..=0x1D9,
    0x1F2..=0x1F3,
    0x200..=0x20F,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26F,
    0x277..=0x277,
    0x2FF..=0x2FF,
    0x309..=0x30A,
    0x345..=0x345,
    0x38D..=0x390,
    0x3F1..=0x3F1,
    // Not 492H and 493H: they are there with tertiary and secondary VM-exit controls, which not every hypervisor offers.
    0x480..=0x491,
    0x6E0..=0x6E0,
    0x802..=0x808,
    0xDA0..=0xDA0,
    0xC000_0080..=0xC000_0084,
];
const BASES: core::ops::RangeInclusive<u32> = 0xC000_0100..=0xC000_0103;

/// MSRs that entry and exit switch by fields.
const SWITCHED: [(u32, u32); 4] = [
    (0x174, f::GUEST_SYSENTER_CS),
    (0x175, f::GUEST_SYSENTER_ESP),
    (0x176, f::GUEST_SYSENTER_EIP),
    (cpu::FS_BASE, f::GUEST_FS_BASE),
];

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, exit: exit::SAVE_DEBUG, ..Controls::default() })?;
    let area = core::ptr::from_mut(pages::page()).cast::<u64>();
    for (field, value) in [
        (f::EXIT_MSR_STORE_ADDR, area as u64),
        (f::EXIT_MSR_LOAD_ADDR, area as u64),
        (f::ENTRY_MSR_LOAD_ADDR, area as u64),
        (f::GUEST_SYSENTER_CS, 0x10),
        (f::GUEST_SYSENTER_ESP, 0x1000),
        (f::GUEST_SYSENTER_EIP, 0x2000),
        (f::GUEST_FS_BASE, 0x3000),
    ] {
        vmx::write(field, value);
    }
    for msr in MSRS.into_iter().chain([BASES]).flatten() {
        one(&mut guest, msr, area);
    }
    Ok(())
}

/// Runs the guest with one entry in the MSR area whose count is in the field `count`: the exit, and the entry's value after it.
fn run(guest: &mut Guest, count: u32, msr: u32, value: u64, area: *mut u64) -> (Exit, u64) {
    // SAFETY: a page of ours.
    unsafe {
        area.write_volatile(msr.into());
        area.add(1).write_volatile(value);
    }
    vmx::write(count, 1);
    let exit = guest.execute(nothing, 5);
    vmx::write(count, 0);
    // SAFETY: as above.
    (exit, unsafe { area.add(1).read_volatile() })
}

fn one(guest: &mut Guest, msr: u32, area: *mut u64) {
    let read = cpu::try_rdmsr(msr).ok();
    let value = read.unwrap_or(0);
    // The same value: but for time nothing changes.
    let taken = msr != TSC && cpu::try_wrmsr(msr, value).is_ok();
    let loads = taken && !X2APIC.contains(&msr) && msr != cpu::FS_BASE && msr != cpu::GS_BASE;
    let row = policy::row(msr);
    let is_mtrr = (0x200..=0x26F).contains(&msr) || msr == 0x2FF;
    // What nvmx refuses and the machine may have is left to part `msrs`. MTRRs are not loaded: those of L2 are not the CPU's.
    let (stored_alike, loaded_alike) = (row.read != Verdict::Refused, row.write != Verdict::Refused && !is_mtrr);
    let mut out = Serial;
    let mut check = Check::new(&mut out, format_args!("MSR {msr:#x} in each area"));
    if read.is_some() && stored_alike && !X2APIC.contains(&msr) && msr != SMBASE {
        let (result, stored) = run(guest, f::EXIT_MSR_STORE_COUNT, msr, 0x5A5A, area);
        let field = SWITCHED.iter().find(|(switched, _)| *switched == msr).map(|(_, field)| vmx::read(*field));
        let right = match field {
            _ if msr == TSC => (value..cpu::rdtsc()).contains(&stored),
            Some(of_guest) => stored == of_guest,
            None => stored == cpu::try_rdmsr(msr).unwrap_or(0),
        };
        check = check.expect("stored", result, Exit::Done(5)).expect("as_read", right, true);
    }
    let mut entered = false;
    if msr != TSC && loaded_alike {
        let wanted = if loads { Exit::Done(5) } else { Exit::Failed(34, 1) };
        let result = run(guest, f::ENTRY_MSR_LOAD_COUNT, msr, value, area).0;
        entered = result == Exit::Done(5);
        check = check.expect("entry_loads", result, wanted);
    }
    // What no entry loads would end the machine.
    if loads && loaded_alike && entered {
        let (result, _) = run(guest, f::EXIT_MSR_LOAD_COUNT, msr, value, area);
        let right = cpu::try_rdmsr(msr).ok() == read;
        check = check.expect("exit_loads", result, Exit::Done(5)).expect("as_loaded", right, true);
    }
    check.end();
}
