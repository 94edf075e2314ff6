//! VMCS states near validity: a valid VMCS with one or two bits of its fields flipped, drawn from a seed. There is no verdict
//! here: what the CPU makes of each must be the same in every slot.
//!
//! A guest that can be entered leaves at once by the preemption timer, which is 0, so that no state that is valid by chance
//! makes it run anywhere. Bits are left alone whose flip could be valid and then harm this image (its own host state), or
//! that ask for memory of which each slot has its own content.
//!
//! `seed=N cases=N` choose the states (none without `cases=`), one record for a hundred of them, because a record takes the
//! serial line longer than a hundred cases the CPU. `first=N cases=N` has a record for each; `case=N` is one alone, with the
//! fields that its exit saved.

use crate::guest::{self, Exit, Guest};
use l2_kit::{
    BootInfo, Check, Global, caps,
    cpu::{self, EFER, PAT},
    fields as f, pages,
    protocol::Hex,
    serial::Serial,
    setup::{
        self, Controls, Kind, Missing, VMX_EPT_VPID_CAP, entry_controls as entry, exit_controls as exit, pin, primary,
        secondary,
    },
    vmx::{self, reason},
};

/// What the command line asks for.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    seed: u64,
    cases: u64,
    first: Option<u64>,
    only: Option<u64>,
}

/// The command line's choice.
pub static CHOICE: Global<Choice> = Global::new(Choice { seed: 1, cases: 0, first: None, only: None });

impl Choice {
    /// Reads the command line.
    ///
    /// # Errors
    /// The option whose value is no number.
    pub fn of(info: &BootInfo) -> Result<Self, &'static str> {
        let number = |key| info.option(key).map(str::parse).transpose().map_err(|_| key);
        let usual = CHOICE.get();
        Ok(Self {
            seed: number("seed")?.unwrap_or(usual.seed),
            cases: number("cases")?.unwrap_or(usual.cases),
            first: number("first")?,
            only: number("case")?,
        })
    }
}

const LOW: u64 = 0xFFFF_FFFF;
/// Bits of an address that make it not canonical.
const NOT_CANONICAL: u64 = !0 << 47;
/// Bits of an address that are beyond the physical width of the CPUs that have VMX.
const BEYOND: u64 = !0 << 52;
const IN_PAGE: u64 = 0xFFF;
/// Few enough entries for the pages that the lists have.
const FEW: u64 = 7;

/// Controls that ask for memory or tables which these guests have not set up, or that not every hypervisor offers: tertiary
/// controls; PERF_GLOBAL_CTRL, UINV, CET, PKRS, secondary exit controls; SMM.
const PRIMARY_NOT_SET_UP: u64 = 1 << 17;
const SECONDARY_NOT_SET_UP: u64 = 0x0082_4000;
const EXIT_NOT_SET_UP: u64 = 1 << 12 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 31;
const ENTRY_NOT_SET_UP: u64 = 1 << 10 | 1 << 11 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 22;
const EPTP_AD: u64 = 1 << 6;
/// Rights of supervisor shadow-stack pages, which not every hypervisor offers.
const EPTP_SHADOW_STACKS: u64 = 1 << 7;
/// What the SDM defines of CR4.
const CR4_DEFINED: u64 = 0x1_1BFF_7FFF;
const SHUTDOWN: u64 = 1 << 1;
/// A base is halted.
const HALTED: u64 = 1 << 0;

/// Fields of events and controls, which can be flipped with every base: the bits that may be.
const EVENTS: &[(u32, u64)] = &[
    (f::PIN_CONTROLS, LOW),
    (f::PRIMARY_CONTROLS, LOW & !PRIMARY_NOT_SET_UP),
    (f::SECONDARY_CONTROLS, LOW & !SECONDARY_NOT_SET_UP),
    (f::EXIT_CONTROLS, LOW & !EXIT_NOT_SET_UP),
    (f::ENTRY_CONTROLS, LOW & !ENTRY_NOT_SET_UP),
    (f::EXCEPTION_BITMAP, LOW),
    (f::ENTRY_INTERRUPTION_INFO, LOW),
    (f::ENTRY_EXCEPTION_ERROR, LOW),
    (f::ENTRY_INSTRUCTION_LENGTH, LOW),
    (f::GUEST_INTERRUPTIBILITY, LOW),
    (f::GUEST_ACTIVITY, LOW & !(SHUTDOWN | HALTED)),
    (f::GUEST_PENDING_DEBUG, !0),
    (f::GUEST_RFLAGS, !0),
    (f::GUEST_DEBUGCTL, !0),
    (f::GUEST_DR7, !0),
];

/// Fields that can be flipped if no event is delivered.
const STATE: &[(u32, u64)] = &[
    (f::VPID, 0xFFFF),
    (f::CR3_TARGET_COUNT, LOW),
    (f::IO_BITMAP_A, IN_PAGE | BEYOND),
    (f::IO_BITMAP_B, IN_PAGE | BEYOND),
    (f::MSR_BITMAP, IN_PAGE | BEYOND),
    (f::EPTP, IN_PAGE & !EPTP_SHADOW_STACKS | BEYOND),
    (f::VIRTUAL_APIC, IN_PAGE | BEYOND),
    (f::APIC_ACCESS, IN_PAGE | BEYOND),
    (f::POSTED_INT_DESCRIPTOR, IN_PAGE | BEYOND),
    (f::POSTED_INT_VECTOR, 0xFFFF),
    (f::TPR_THRESHOLD, LOW),
    (f::GUEST_INTERRUPT_STATUS, 0xFFFF),
    (f::ENTRY_MSR_LOAD_ADDR, 15 | BEYOND),
    (f::EXIT_MSR_LOAD_ADDR, 15 | BEYOND),
    (f::EXIT_MSR_STORE_ADDR, 15 | BEYOND),
    (f::ENTRY_MSR_LOAD_COUNT, FEW),
    (f::EXIT_MSR_LOAD_COUNT, FEW),
    (f::EXIT_MSR_STORE_COUNT, FEW),
    (f::LINK_POINTER, !0),
    (f::GUEST_CR0, !0),
    (f::GUEST_CR3, BEYOND),
    (f::GUEST_CR4, !0),
    (f::GUEST_PAT, !0),
    (f::GUEST_EFER, !0),
    (f::GUEST_RIP, !0),
    (f::GUEST_RSP, !0),
    (f::GUEST_SYSENTER_ESP, !0),
    (f::GUEST_SYSENTER_EIP, !0),
    (f::GUEST_GDTR_BASE, !0),
    (f::GUEST_GDTR_LIMIT, LOW),
    (f::GUEST_IDTR_BASE, !0),
    (f::GUEST_IDTR_LIMIT, LOW),
    (f::HOST_CR0, !0),
    (f::HOST_CR3, BEYOND),
    // Supervisor-mode execution and access prevention would keep this image from its own pages.
    (f::HOST_CR4, !(3 << 20)),
    (f::HOST_PAT, !0),
    // No-execute is in our page tables.
    (f::HOST_EFER, !(1 << 11)),
    (f::HOST_ES, 7),
    (f::HOST_CS, 7),
    (f::HOST_SS, 7),
    (f::HOST_DS, 7),
    (f::HOST_FS, 7),
    (f::HOST_GS, 7),
    (f::HOST_TR, 7),
    (f::HOST_FS_BASE, NOT_CANONICAL),
    (f::HOST_GS_BASE, NOT_CANONICAL),
    (f::HOST_TR_BASE, NOT_CANONICAL),
    (f::HOST_GDTR_BASE, NOT_CANONICAL),
    (f::HOST_IDTR_BASE, NOT_CANONICAL),
    (f::HOST_SYSENTER_ESP, !0),
    (f::HOST_SYSENTER_EIP, !0),
    (f::HOST_RIP, NOT_CANONICAL),
];

/// ES, CS, SS, DS, FS, GS, LDTR, TR: their fields follow one another in steps of 2.
const SEGMENTS: u64 = 8;
/// The first field of each kind and its bits.
const OF_SEGMENT: [(u32, u64); 4] =
    [(f::GUEST_ES, 0xFFFF), (f::GUEST_ES_LIMIT, LOW), (f::GUEST_ES_AR, LOW), (f::GUEST_ES_BASE, !0)];

/// Interruption information, activity state, MSRs in lists, controls of the virtual APIC.
type Base = (u64, u64, u64, &'static [(Kind, u32)]);
/// What the valid VMCS is like before bits are flipped.
const BASES: [Base; 7] = [
    (0, 0, 0, &[]),
    // Each MSR list has an entry
    (0, 0, 1, &[]),
    // Halted
    (0, 1, 0, &[]),
    // #GP with an error code
    (1 << 31 | 1 << 11 | 3 << 8 | 13, 0, 0, &[]),
    // An external interrupt
    (1 << 31 | 0x60, 0, 0, &[]),
    // A task priority in memory
    (0, 0, 0, &[(Kind::Primary, primary::TPR_SHADOW)]),
    // Posted interrupts and what they need
    (
        0,
        0,
        0,
        &[
            (Kind::Pin, pin::EXTERNAL_INTERRUPT | pin::POSTED_INTERRUPTS),
            (Kind::Primary, primary::TPR_SHADOW),
            (Kind::Secondary, secondary::APIC_REGISTERS | secondary::VIRTUAL_INTERRUPTS),
            (Kind::Exit, exit::ACKNOWLEDGE),
        ],
    ),
];

/// A sequence of numbers from a seed: xorshift64*.
struct Numbers(u64);

impl Numbers {
    /// The numbers of one case, whatever precedes it.
    fn of_case(seed: u64, case: u64) -> Self {
        let mut numbers = Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ case.wrapping_add(1) << 20 | 1);
        for _ in 0..4 {
            numbers.next();
        }
        numbers
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 32) % end
    }

    /// One of the bits of a mask that is not empty.
    fn bit_of(&mut self, mask: u64) -> u32 {
        let mut skip = self.below(u64::from(mask.count_ones()));
        (0..64)
            .filter(|bit| mask >> bit & 1 != 0)
            .find(|_| skip.checked_sub(1).map(|s| skip = s).is_none())
            .unwrap_or(0)
    }

    /// A field and one of its bits.
    fn flip(&mut self, events_only: bool, halted: bool) -> (u32, u32) {
        let segments = SEGMENTS * OF_SEGMENT.len() as u64;
        let (events, state) = (EVENTS.len() as u64, STATE.len() as u64);
        let pick = self.below(if events_only { events } else { events + state + segments });
        let (field, mask) = match pick {
            // Without the timer a handler would run, or a halted guest sleep for ever.
            0 if events_only || halted => (f::PIN_CONTROLS, EVENTS[0].1 & !u64::from(pin::PREEMPTION_TIMER)),
            n if n < events => EVENTS[n as usize],
            n if n < events + state => STATE[(n - events) as usize],
            n => {
                let (segment, kind) = ((n - events - state) % SEGMENTS, (n - events - state) / SEGMENTS);
                let (first, mask) = OF_SEGMENT[kind as usize];
                (first + 2 * segment as u32, mask)
            }
        };
        (field, self.bit_of(mask & comparable(field)))
    }
}

/// The bits of a field of which every machine with the capabilities that this image goes by must think the same: those that
/// they leave free, and those that the SDM reserves. A machine may have more, and take what another one refuses.
fn comparable(field: u32) -> u64 {
    let free = |kind: Kind, defined: u32| {
        let allowed = kind.allowed();
        let both = (allowed >> 32) as u32 & !(allowed as u32);
        u64::from(both | !defined)
    };
    match field {
        f::PIN_CONTROLS => free(Kind::Pin, 0xE9),
        f::PRIMARY_CONTROLS => free(Kind::Primary, 0xFBFB_9E8C),
        f::SECONDARY_CONTROLS => free(Kind::Secondary, 0xDFFF_FFFF),
        f::EXIT_CONTROLS => free(Kind::Exit, 0xFFFC_9204),
        f::ENTRY_CONTROLS => free(Kind::Entry, 0x00FF_EE04),
        f::GUEST_CR4 | f::HOST_CR4 => caps::get(0x489) | !CR4_DEFINED,
        // With linear addresses of 57 bits an exit loads some that this image, which has 48, cannot use.
        f::HOST_FS_BASE | f::HOST_GS_BASE | f::HOST_TR_BASE | f::HOST_GDTR_BASE | f::HOST_IDTR_BASE | f::HOST_RIP
            if cpu::cpuid(7, 0)[2] & 1 << 16 != 0 =>
        {
            !0 << 56
        }
        f::EPTP if caps::get(VMX_EPT_VPID_CAP) & 1 << 21 == 0 => !EPTP_AD,
        _ => !0,
    }
}

const FIELDS: usize = f::ALL.len();

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls {
        pin: pin::PREEMPTION_TIMER,
        secondary: secondary::EPT | secondary::VPID,
        exit: exit::LOAD_EFER | exit::LOAD_PAT,
        entry: entry::LOAD_EFER | entry::LOAD_PAT | entry::LOAD_DEBUG,
        ..Controls::default()
    })?;
    valid(&mut guest);
    // Launched, so that all cases begin alike; the program runs, as the timer is far.
    vmx::write(f::PREEMPTION_TIMER, LOW);
    Check::new(&mut Serial, "random base").expect("result", guest.execute(guest::nothing, 5), Exit::Done(5)).end();
    // bochs-timer-zero: of a timer that was 0 at the entry, Bochs saves what is left of the one before. So that is a short one:
    // a nesting hypervisor has exits of its own before the timer's.
    vmx::write(f::PREEMPTION_TIMER, 1);
    let exit = guest.execute(guest::nothing, 5);
    Check::new(&mut Serial, "random base with a timer")
        .expect("result", exit, Exit::Reason(reason::PREEMPTION_TIMER, 0))
        .end();
    vmx::write(f::PREEMPTION_TIMER, 0);
    guest.start(guest::nothing, 5);
    let template = snapshot();
    let choice = CHOICE.get();
    if let Some(case) = choice.only {
        let tried = Tried::new(&mut guest, &template, choice.seed, case);
        tried.report();
        fields(&template, &tried.after);
    } else if let Some(first) = choice.first {
        (first..first.saturating_add(choice.cases))
            .for_each(|case| Tried::new(&mut guest, &template, choice.seed, case).report());
    } else {
        for first in (0..choice.cases).step_by(GROUP as usize) {
            group(&mut guest, &template, choice.seed, first..choice.cases.min(first + GROUP));
        }
    }
    Ok(())
}

/// Cases that share a record.
const GROUP: u64 = 100;

/// Tries the cases of a group and prints what they have in common.
fn group(guest: &mut Guest, template: &Snapshot, seed: u64, cases: core::ops::Range<u64>) {
    let (mut refused, mut failed, mut exits) = (0u32, 0u32, 0u32);
    let mut hash = Hash::new();
    for case in cases.clone() {
        let tried = Tried::new(guest, template, seed, case);
        match tried.result {
            Exit::Refused(_) => refused += 1,
            Exit::Failed(..) => failed += 1,
            Exit::Done(_) | Exit::Reason(..) => exits += 1,
        }
        let _ = core::fmt::Write::write_fmt(&mut hash, format_args!("{}", tried.result));
        hash.add(&tried.after.digest().to_le_bytes());
    }
    Check::new(&mut Serial, "random group")
        .fact("first", cases.start)
        .fact("cases", cases.end - cases.start)
        .fact("refused", refused)
        .fact("failed", failed)
        .fact("exits", exits)
        .fact("digest", Hex(hash.0))
        .end();
}

/// A valid VMCS whose every address is of a page of its own.
fn valid(guest: &mut Guest) {
    for field in [f::IO_BITMAP_A, f::IO_BITMAP_B, f::VIRTUAL_APIC, f::APIC_ACCESS, f::POSTED_INT_DESCRIPTOR] {
        vmx::write(field, pages::address(pages::page()));
    }
    for field in [f::ENTRY_MSR_LOAD_ADDR, f::EXIT_MSR_LOAD_ADDR, f::EXIT_MSR_STORE_ADDR] {
        let page = pages::page();
        for entry in page.chunks_exact_mut(2).take(2 * FEW as usize) {
            entry[0] = u64::from(cpu::CSTAR);
        }
        vmx::write(field, pages::address(page));
    }
    for (field, value) in [
        (f::VPID, 7),
        (f::TPR_THRESHOLD, 0),
        (f::GUEST_INTERRUPT_STATUS, 0),
        (f::POSTED_INT_VECTOR, 0xF2),
        (f::GUEST_PAT, cpu::rdmsr(PAT)),
        (f::HOST_PAT, cpu::rdmsr(PAT)),
        (f::GUEST_EFER, cpu::rdmsr(EFER)),
        (f::HOST_EFER, cpu::rdmsr(EFER)),
        (f::GUEST_DEBUGCTL, 0),
        (f::ENTRY_EXCEPTION_ERROR, 0),
        (f::ENTRY_INSTRUCTION_LENGTH, 0),
        (f::LINK_POINTER, !0),
        (f::VM_FUNCTION_CONTROLS, 0),
        (f::VE_INFORMATION, pages::address(pages::page())),
        (f::TSC_MULTIPLIER, 1 << 48),
    ] {
        // Some CPUs do not have all of them.
        let _ = vmx::try_write(field.into(), value);
    }
    guest.vcpu.write_host_stack();
}

/// The fields that an entry or an exit may change; those that do not exist are none.
struct Snapshot([Option<u64>; FIELDS]);

fn snapshot() -> Snapshot {
    let mut values = [None; FIELDS];
    for (value, (_, field)) in values.iter_mut().zip(f::ALL).filter(|(_, (_, field))| changes(*field)) {
        let (outcome, read) = vmx::try_read(u64::from(*field));
        *value = outcome.succeeded().then_some(read);
    }
    Snapshot(values)
}

impl Snapshot {
    fn iter(&self) -> impl Iterator<Item = (&'static str, u32, Option<u64>)> {
        f::ALL.iter().zip(&self.0).map(|((name, field), value)| (*name, *field, *value))
    }

    /// Of the fields that mean something.
    fn digest(&self) -> u64 {
        let mut hash = Hash::new();
        let known = self.iter().filter(|(_, field, _)| meaningful(*field));
        known.filter_map(|(_, _, value)| value).for_each(|value| hash.add(&value.to_le_bytes()));
        hash.0
    }
}

/// FNV-1a
struct Hash(u64);

impl Hash {
    const fn new() -> Self {
        Self(0xCBF2_9CE4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3));
    }
}

impl core::fmt::Write for Hash {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        self.add(text.as_bytes());
        Ok(())
    }
}

/// A case that was tried.
struct Tried {
    case: u64,
    base: u64,
    first: (u32, u32),
    second: Option<(u32, u32)>,
    result: Exit,
    after: Snapshot,
}

impl Tried {
    /// Flips the bits, enters, looks, and makes the VMCS valid again: only what is different is written, as hypervisors do.
    fn new(guest: &mut Guest, template: &Snapshot, seed: u64, case: u64) -> Self {
        let mut numbers = Numbers::of_case(seed, case);
        let base = numbers.below(BASES.len() as u64);
        let (event, activity, listed, apic) = BASES[base as usize];
        if apic.iter().all(|(kind, bits)| setup::allowed_one(*kind, *bits)) {
            for (kind, bits) in apic {
                vmx::write(kind.field(), vmx::read(kind.field()) | u64::from(*bits));
            }
        }
        for (field, value) in [
            (f::ENTRY_INTERRUPTION_INFO, event),
            (f::GUEST_ACTIVITY, activity),
            (f::ENTRY_MSR_LOAD_COUNT, listed),
            (f::EXIT_MSR_LOAD_COUNT, listed),
            (f::EXIT_MSR_STORE_COUNT, listed),
        ] {
            if vmx::read(field) != value {
                vmx::write(field, value);
            }
        }
        let two = numbers.below(4) == 0;
        // Delivery reads the guest's tables: these stay as they are.
        let events_only = event != 0 || two;
        let first = numbers.flip(events_only, activity == HALTED);
        let second = two.then(|| numbers.flip(events_only, activity == HALTED)).filter(|second| *second != first);
        let mut before = [(first.0, 0); 2];
        for (saved, (field, bit)) in before.iter_mut().zip([Some(first), second].into_iter().flatten()) {
            *saved = (field, vmx::read(field));
            vmx::write(field, saved.1 ^ 1 << bit);
        }
        if second.is_none() {
            before[1] = before[0];
        }
        let own = [cpu::cr0(), cpu::cr4(), cpu::rdmsr(EFER), cpu::rdmsr(PAT)];
        let result = guest.run();
        recover(own);
        let after = snapshot();
        before.into_iter().rev().for_each(|(field, value)| vmx::write(field, value));
        for ((_, field, is), (_, _, was)) in after.iter().zip(template.iter()) {
            if let Some(was) = was.filter(|was| is != Some(*was) && field != f::IDT_VECTORING_INFO) {
                vmx::write(field, was);
            }
        }
        Self { case, base, first, second, result, after }
    }

    fn report(&self) {
        let mut out = Serial;
        let mut check = Check::new(&mut out, "random")
            .fact("case", self.case)
            .fact("base", self.base)
            .fact("field", Hex(self.first.0.into()))
            .fact("bit", self.first.1);
        if let Some((field, bit)) = self.second {
            check = check.fact("field2", Hex(field.into())).fact("bit2", bit);
        }
        check.fact("result", self.result).fact("fields", Hex(self.after.digest())).end();
    }
}

/// Undoes what a flipped bit of the host area did to this image.
fn recover([cr0, cr4, efer, pat]: [u64; 4]) {
    if cpu::cr4() != cr4 {
        cpu::set_cr4(cr4);
    }
    if cpu::cr0() != cr0 {
        cpu::set_cr0(cr0);
    }
    for (msr, value) in [(EFER, efer), (PAT, pat)] {
        if cpu::rdmsr(msr) != value {
            cpu::wrmsr(msr, value);
        }
    }
}

/// Fields that an entry or an exit may change.
fn changes(field: u32) -> bool {
    field >> 10 & 3 == 2
        || [f::ENTRY_INTERRUPTION_INFO, f::ENTRY_EXCEPTION_ERROR, f::ENTRY_INSTRUCTION_LENGTH, f::ENTRY_CONTROLS]
            .contains(&field)
        || field == f::IDT_VECTORING_INFO
}

/// Of these, what must be the same everywhere: not what nvmx does not offer on a machine that has it, nor what counts time.
fn meaningful(field: u32) -> bool {
    const UNSURE: [u32; 5] =
        [f::GUEST_INTERRUPT_STATUS, f::PML_INDEX, f::GUEST_PERF_GLOBAL_CTRL, f::GUEST_SMBASE, f::PREEMPTION_TIMER];
    changes(field) && !UNSURE.contains(&field)
}

/// The fields that the case changed, one record each.
fn fields(before: &Snapshot, after: &Snapshot) {
    for ((name, field, is), (_, _, was)) in after.iter().zip(before.iter()) {
        if was != is && meaningful(field) {
            Check::new(&mut Serial, "random field").fact("field", name).fact("value", Hex(is.unwrap_or(0))).end();
        }
    }
}
