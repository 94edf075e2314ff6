//! What an entry that fails leaves alone and what it changes: every field of the guest-state area, the fields about the
//! next entry, our own state, MSR areas, the launch state, and whether NMIs are blocked.
//!
//! SDM "VM-Entry Failures During or After Loading Guest State": processor state is loaded as by an exit, blocking by NMI is
//! what it was, MSRs of the VM-exit MSR-load area are loaded; the guest-state area, the valid bit of the interruption
//! information and the VM-exit MSR-store area stay. SDM "Basic VM-Entry Checks", "Checks on VMX Controls and Host-State
//! Area": VMfail, and nothing else.

use crate::{
    entries::Change::{self, Off, On, Set},
    guest::{Exit, Guest, nothing},
    injection::{noting, seen},
    nmis,
};
use l2_kit::{
    Check, apic, cpu, fields as f, pages,
    protocol::Hex,
    serial::Serial,
    setup::{Controls, Kind, Missing, allowed_one, entry_controls as entry, exit_controls as exit, pin, secondary},
    trap,
    vmx::{self, Outcome},
};

const VALID: u64 = 1 << 31;
const DEFAULT_PAT: u64 = 0x0007_0406_0007_0406;
/// IA32_PAT of the guest, of the host area, of the MSR area, and our own.
const PATS: [u64; 4] =
    [DEFAULT_PAT & !0xFF00, DEFAULT_PAT & !0xFF_0000, DEFAULT_PAT & !0xFF00_0000, DEFAULT_PAT & !0xFF];
const EFER_SCE: u64 = 1;
const KERNEL_GS: u32 = 0xC000_0102;
const CAPABILITY: u64 = 0x480;
const MARK: u64 = 0x5151_5151;
const TIMER: u64 = 0x1234_5678;
/// IA32_DEBUGCTL: LBR, BTF.
const LBR: u64 = 1;
const BRANCH_STEPS: u64 = 2;
const MOV_SS: &str = "guest halted and blocked by MOV SS";

/// A way to fail.
struct Failure {
    name: &'static str,
    changes: &'static [(u32, Change)],
    /// Entries of the MSR area.
    area: &'static [(u64, u64)],
    wanted: Exit,
}

const BAD_CONTROL: Exit = Exit::Refused(Outcome::FailValid(7));
const BAD_HOST: Exit = Exit::Refused(Outcome::FailValid(8));
const PLAIN: Failure = Failure { name: "", changes: &[], area: &[], wanted: BAD_CONTROL };
const CSTAR: u64 = cpu::CSTAR as u64;
const PAT: u64 = cpu::PAT as u64;
const EFER: u64 = cpu::EFER as u64;
/// Stands for a page of zeros.
const NO_TABLES: u64 = u64::MAX;
/// Stands for our own IA32_EFER with SCE.
const EFER_WITH_SCE: u64 = u64::MAX;

const FAILURES: [Failure; 14] = [
    Failure { name: "too many CR3 targets", changes: &[(f::CR3_TARGET_COUNT, Set(5))], ..PLAIN },
    Failure { name: "a reserved pin control", changes: &[(f::PIN_CONTROLS, On(1 << 31))], ..PLAIN },
    Failure { name: "an event of type 1", changes: &[(f::ENTRY_INTERRUPTION_INFO, Set(VALID | 1 << 8))], ..PLAIN },
    Failure { name: "host CR4 without PAE", changes: &[(f::HOST_CR4, Off(cpu::CR4_PAE))], wanted: BAD_HOST, ..PLAIN },
    Failure { name: "host RIP", changes: &[(f::HOST_RIP, Set(1 << 62))], wanted: BAD_HOST, ..PLAIN },
    Failure { name: "guest RFLAGS", changes: &[(f::GUEST_RFLAGS, Set(0))], wanted: Exit::Failed(33, 0), ..PLAIN },
    Failure {
        name: MOV_SS,
        changes: &[(f::GUEST_ACTIVITY, Set(1)), (f::GUEST_INTERRUPTIBILITY, Set(2))],
        wanted: Exit::Failed(33, 0),
        ..PLAIN
    },
    Failure { name: "link pointer", changes: &[(f::LINK_POINTER, Set(0x1008))], wanted: Exit::Failed(33, 4), ..PLAIN },
    // Without EPT its PDPTEs come out of memory; the fields stay.
    Failure {
        name: "guest RFLAGS, PAE without EPT",
        changes: &[
            (f::SECONDARY_CONTROLS, Off(secondary::EPT as u64)),
            (f::ENTRY_CONTROLS, Off(entry::IA32E as u64)),
            (f::GUEST_CS_AR, Set(0xC09B)),
            (f::GUEST_EFER, Off(0x500)),
            (f::GUEST_CR3, Set(NO_TABLES)),
            (f::GUEST_PDPTE0, Set(0x7777_7001)),
            (f::GUEST_PDPTE3, Set(0x7777_7000)),
            (f::GUEST_RFLAGS, Set(0)),
        ],
        wanted: Exit::Failed(33, 0),
        ..PLAIN
    },
    Failure { name: "MSR area: FS.base", area: &[(cpu::FS_BASE as u64, 0)], wanted: Exit::Failed(34, 1), ..PLAIN },
    Failure {
        name: "MSR area: PAT and EFER before a capability MSR",
        area: &[(PAT, PATS[2]), (EFER, EFER_WITH_SCE), (CAPABILITY, 0)],
        wanted: Exit::Failed(34, 3),
        ..PLAIN
    },
    Failure {
        name: "MSR area: a bad PAT behind a good one",
        area: &[(PAT, PATS[2]), (PAT, 2)],
        wanted: Exit::Failed(34, 2),
        ..PLAIN
    },
    Failure {
        name: "MSR area: feature control behind switched MSRs",
        area: &[(0x174, 8), (0x175, 0x1000), (0x176, 0x2000), (0x3A, 5)],
        wanted: Exit::Failed(34, 4),
        ..PLAIN
    },
    Failure {
        name: "MSR area: reserved bits behind MSRs that nobody switches",
        area: &[(CSTAR, 0x4444), (KERNEL_GS as u64, 0x6666), (CSTAR | 1 << 32, 0)],
        wanted: Exit::Failed(34, 3),
        ..PLAIN
    },
];

/// What goes with the entry.
#[derive(Clone, Copy)]
struct Around {
    name: &'static str,
    entry: u32,
    exit: u32,
}

const AROUND: [Around; 4] = [
    Around { name: "nothing loaded", entry: 0, exit: 0 },
    Around { name: "loaded by the entry", entry: entry::LOAD_PAT | entry::LOAD_EFER, exit: 0 },
    Around { name: "loaded by the exit", entry: 0, exit: exit::LOAD_PAT | exit::LOAD_EFER },
    Around {
        name: "loaded by both",
        entry: entry::LOAD_PAT | entry::LOAD_EFER | entry::LOAD_DEBUG,
        exit: exit::LOAD_PAT | exit::LOAD_EFER | exit::SAVE_PAT | exit::SAVE_EFER | exit::SAVE_DEBUG,
    },
];

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new(Controls { secondary: secondary::EPT, ..Controls::default() })?;
    let offered = AROUND.iter().all(|a| allowed_one(Kind::Entry, a.entry) && allowed_one(Kind::Exit, a.exit));
    if !offered || !allowed_one(Kind::Pin, pin::PREEMPTION_TIMER) || !allowed_one(Kind::Exit, exit::SAVE_TIMER) {
        Check::new(&mut Serial, "failed entries").fact("offered", false).end();
        return Ok(());
    }
    let areas = Areas::new();
    for failure in &FAILURES {
        launch_state(&mut guest, failure, &areas);
        for around in AROUND {
            for blocked in [false, true] {
                fail(&mut guest, failure, around, blocked, &areas);
            }
        }
    }
    Check::new(&mut Serial, "entry after all failures")
        .expect("result", guest.execute(nothing, 5), Exit::Done(5))
        .end();
    Ok(())
}

/// The most fields that a failure changes.
const MOST: usize = 10;

/// Tries to enter with fields changed; looks right before and right after.
fn attempt(guest: &mut Guest, changes: impl Iterator<Item = (u32, Change)>, mut look: impl FnMut()) -> Exit {
    guest.start(nothing, 5);
    let mut saved = [(0, 0); MOST];
    let mut count = 0;
    for (slot, (field, change)) in saved.iter_mut().zip(changes) {
        let old = vmx::read(field);
        *slot = (field, old);
        count += 1;
        vmx::write(
            field,
            match change {
                Set(value) => value,
                On(bits) => old | bits,
                Off(bits) => old & !bits,
            },
        );
    }
    look();
    let got = guest.run();
    look();
    for (field, old) in saved.into_iter().take(count).rev() {
        vmx::write(field, old);
    }
    got
}

/// MSR areas: loaded by the entry, stored by the exit, loaded by the exit.
struct Areas {
    entry: *mut u64,
    store: *mut u64,
    load: *mut u64,
    zeros: u64,
}

impl Areas {
    fn new() -> Self {
        let area = || core::ptr::from_mut(pages::page()).cast::<u64>();
        Areas { entry: area(), store: area(), load: area(), zeros: area() as u64 }
    }

    /// What a failure changes.
    fn changes(&self, failure: &Failure) -> impl Iterator<Item = (u32, Change)> + use<> {
        let (zeros, changes) = (self.zeros, failure.changes);
        changes.iter().map(move |(field, change)| match change {
            Set(NO_TABLES) => (*field, Set(zeros)),
            change => (*field, *change),
        })
    }

    fn fill(area: *mut u64, entries: &[(u64, u64)]) {
        for (i, (msr, value)) in entries.iter().enumerate() {
            let value = if *value == EFER_WITH_SCE { cpu::rdmsr(cpu::EFER) | EFER_SCE } else { *value };
            // SAFETY: a page of ours, and few entries.
            unsafe {
                area.add(2 * i).write_volatile(*msr);
                area.add(2 * i + 1).write_volatile(value);
            }
        }
    }

    /// The stored value.
    fn stored(&self) -> u64 {
        // SAFETY: a page of ours.
        unsafe { self.store.add(1).read_volatile() }
    }
}

/// MSRs of ours before the entry. What exits load has a value in the host area.
const OURS: [(u32, u64); 3] = [(cpu::LSTAR, 0x2222), (cpu::CSTAR, 0x3333), (KERNEL_GS, 0x5555)];

/// All fields; those outside of the guest-state area as 0.
fn guest_area() -> [u64; f::ALL.len()] {
    core::array::from_fn(|number| {
        let field = f::ALL[number].1;
        let in_area = field >> 10 & 3 == 2;
        let (outcome, value) = if in_area { vmx::try_read(u64::from(field)) } else { (Outcome::Succeed, 0) };
        if outcome.succeeded() { value } else { 0 }
    })
}

/// Fields that only an exit or we write, beside the guest-state area.
const KEPT: [u32; 12] = [
    f::EXIT_INSTRUCTION_LENGTH,
    f::EXIT_INTERRUPTION_INFO,
    f::IDT_VECTORING_INFO,
    f::ENTRY_CONTROLS,
    f::ENTRY_INTERRUPTION_INFO,
    f::ENTRY_EXCEPTION_ERROR,
    f::ENTRY_INSTRUCTION_LENGTH,
    f::EXIT_INTERRUPTION_ERROR,
    f::IDT_VECTORING_ERROR,
    f::EXIT_INSTRUCTION_INFO,
    f::GUEST_LINEAR_ADDRESS,
    f::GUEST_PHYSICAL_ADDRESS,
];

fn fail(guest: &mut Guest, failure: &Failure, around: Around, blocked: bool, areas: &Areas) {
    let controls = [f::PIN_CONTROLS, f::ENTRY_CONTROLS, f::EXIT_CONTROLS].map(|field| (field, vmx::read(field)));
    let own = [cpu::PAT, cpu::EFER].map(|msr| (msr, cpu::rdmsr(msr)));
    let late = matches!(failure.wanted, Exit::Failed(..));
    let ready = !blocked || nmis::block(guest);

    Areas::fill(areas.entry, failure.area);
    Areas::fill(areas.store, &[(u64::from(cpu::LSTAR), MARK)]);
    Areas::fill(areas.load, &[(u64::from(cpu::LSTAR), 0x7777)]);
    let fields = [
        (f::PIN_CONTROLS, controls[0].1 | u64::from(pin::PREEMPTION_TIMER)),
        (f::ENTRY_CONTROLS, controls[1].1 | u64::from(around.entry)),
        (f::EXIT_CONTROLS, controls[2].1 | u64::from(around.exit | exit::SAVE_TIMER)),
        (f::PREEMPTION_TIMER, TIMER),
        (f::GUEST_PAT, PATS[0]),
        (f::GUEST_EFER, own[1].1),
        (f::GUEST_DR7, 0x700),
        (f::GUEST_DEBUGCTL, BRANCH_STEPS),
        (f::HOST_PAT, PATS[1]),
        (f::HOST_EFER, own[1].1),
        (f::ENTRY_MSR_LOAD_ADDR, areas.entry as u64),
        (f::ENTRY_MSR_LOAD_COUNT, failure.area.len() as u64),
        (f::EXIT_MSR_STORE_ADDR, areas.store as u64),
        (f::EXIT_MSR_STORE_COUNT, 1),
        (f::EXIT_MSR_LOAD_ADDR, areas.load as u64),
        (f::EXIT_MSR_LOAD_COUNT, 1),
        (f::ENTRY_INTERRUPTION_INFO, VALID | 3 << 8 | u64::from(trap::UD)),
        (f::ENTRY_EXCEPTION_ERROR, 0x17),
        (f::ENTRY_INSTRUCTION_LENGTH, 3),
    ];
    for (field, value) in fields {
        vmx::write(field, value);
    }
    for (msr, value) in OURS {
        cpu::wrmsr(msr, value);
    }
    cpu::wrmsr(cpu::PAT, PATS[3]);
    cpu::set_dr7(0x400 | u64::from(late) << 8);
    // Not every hypervisor keeps it.
    let has_debugctl =
        cpu::try_wrmsr(cpu::DEBUGCTL, LBR).is_ok() && cpu::try_rdmsr(cpu::DEBUGCTL).is_ok_and(|value| value == LBR);
    // The entry would have changed blocking.
    let blocking =
        (failure.name != MOV_SS && late).then_some((f::GUEST_INTERRUPTIBILITY, Set(if blocked { 0 } else { 8 })));

    let mut error = 0;
    let mut looks = [([0; KEPT.len()], [0; f::ALL.len()]); 2];
    let mut look = looks.iter_mut();
    let got = attempt(guest, areas.changes(failure).chain(blocking), || {
        // First, since a VMREAD of a field that is not there leaves an error too.
        error = vmx::read(f::INSTRUCTION_ERROR);
        if let Some(look) = look.next() {
            *look = (KEPT.map(vmx::read), guest_area());
        }
    });
    let [before, after] = looks;
    let dr7 = cpu::dr7();
    let debugctl = if has_debugctl { cpu::rdmsr(cpu::DEBUGCTL) } else { 0 };
    let control = [cpu::cr0(), cpu::cr3(), cpu::cr4()] == [f::HOST_CR0, f::HOST_CR3, f::HOST_CR4].map(vmx::read);
    let mut counts = [0; 2];
    noting(trap::NMI, || {
        apic::send_self_nmi();
        nmis::wait();
        counts[0] = seen().count;
        nmis::unblock();
        counts[1] = seen().count;
    });
    let [pat, efer] = [cpu::PAT, cpu::EFER].map(cpu::rdmsr);
    let msrs = OURS.map(|(msr, _)| cpu::rdmsr(msr));
    let switched = [0x174, 0x175, 0x176].map(cpu::rdmsr);
    for (msr, value) in own {
        cpu::wrmsr(msr, value);
    }
    cpu::set_dr7(0x400);

    let lstar = if late { 0x7777 } else { 0x2222 };
    let mut out = Serial;
    let when = if blocked { "NMIs blocked" } else { "NMIs not blocked" };
    let mut check = Check::new(&mut out, format_args!("failed entry: {}, {}, {when}", failure.name, around.name))
        .expect("result", got, failure.wanted)
        .expect("ready", ready, true)
        .expect("nmi_at_once", counts[0], u64::from(!blocked))
        .expect("nmi_in_all", counts[1], 1)
        .expect("guest_area_kept", before.1 == after.1, true)
        .expect("fields_kept", before.0 == after.0, true)
        .expect("stored", Hex(areas.stored()), Hex(MARK))
        .expect("lstar", Hex(msrs[0]), Hex(lstar))
        .fact("cstar", Hex(msrs[1]))
        .fact("kernel_gs", Hex(msrs[2]))
        .fact("pat", Hex(pat))
        .fact("sce", efer & EFER_SCE)
        .expect("long_mode", Hex(efer & 0x500), Hex(0x500))
        .expect("sysenter", switched == [0; 3], true)
        .expect("debugctl_right", debugctl == if has_debugctl && !late { LBR } else { 0 }, true)
        .expect("dr7", Hex(dr7), Hex(0x400))
        .expect("control_registers", control, true);
    if let Exit::Refused(Outcome::FailValid(number)) = failure.wanted {
        check = check.expect("error", error, u64::from(number));
    }
    if let Some(changed) = before.1.iter().zip(after.1).position(|(before, after)| *before != after) {
        check = check.fact("changed", f::ALL[changed].0);
    }
    check.end();

    for (field, _) in fields.into_iter().skip(3) {
        vmx::write(field, 0);
    }
    for (field, value) in controls {
        vmx::write(field, value);
    }
    for (msr, _) in OURS {
        cpu::wrmsr(msr, 0);
    }
    if has_debugctl {
        cpu::wrmsr(cpu::DEBUGCTL, 0);
    }
    vmx::write(f::GUEST_DR7, 0x400);
}

/// A VMCS that was never entered stays clear, one that was entered stays launched.
fn launch_state(guest: &mut Guest, failure: &Failure, areas: &Areas) {
    let revert = (vmx::vmclear(guest.vcpu.vmcs), vmx::vmptrld(guest.vcpu.vmcs));
    Areas::fill(areas.entry, failure.area);
    vmx::write(f::ENTRY_MSR_LOAD_ADDR, areas.entry as u64);
    let enter = |guest: &mut Guest, launched: bool, fails: bool| {
        guest.vcpu.launched = launched;
        vmx::write(f::ENTRY_MSR_LOAD_COUNT, if fails { failure.area.len() as u64 } else { 0 });
        match fails {
            true => attempt(guest, areas.changes(failure), || ()),
            false => guest.execute(nothing, 5),
        }
    };
    Check::new(&mut Serial, format_args!("launch state: {}", failure.name))
        .expect("clear", revert.0.succeeded() && revert.1.succeeded(), true)
        .expect("vmlaunch_fails", enter(guest, false, true), failure.wanted)
        .expect("vmresume", enter(guest, true, false), Exit::Refused(Outcome::FailValid(5)))
        .expect("vmlaunch_fails_again", enter(guest, false, true), failure.wanted)
        .expect("vmlaunch", enter(guest, false, false), Exit::Done(5))
        .expect("vmresume_fails", enter(guest, true, true), failure.wanted)
        .expect("vmlaunch_again", enter(guest, false, false), Exit::Refused(Outcome::FailValid(4)))
        .expect("vmresume_again", enter(guest, true, false), Exit::Done(5))
        .end();
}
