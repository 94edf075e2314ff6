//! Virtual interrupts: when they are recognized, their order, their end, and self-IPIs (SDM "Evaluation and Delivery of
//! Virtual Interrupts", "EOI Virtualization", "Self-IPI Virtualization").

use super::{Apic, BOTH, DELIVERY, OPERAND, Vectors, and, offset};
use crate::guest::{Exit, Program, nothing};
use crate::injection::copy_of_idt;
use core::arch::asm;
use l2_kit::{
    Check, Global, cpu,
    ept::rights,
    fields as f, pages,
    protocol::Hex,
    serial::Serial,
    setup::{Controls, primary, secondary as s},
    trap::{self, Frame},
    vmx::{self, reason as r},
};

const VALID: u64 = 1 << 31;
pub const IF: u64 = 0x200;
const BLOCKED_BY_STI: u64 = 1;
const X2APIC_EOI: u32 = 0x80B;
const X2APIC_SELF_IPI: u32 = 0x83F;
/// Self-IPI, fixed, edge.
const TO_SELF: u64 = 1 << 18;

/// What a handler does at its end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Nothing: the interrupt stays in service
    None,
    /// EOI by the MSR
    Msr,
    /// EOI by the page at this address
    Page(u64),
}

static END: Global<End> = Global::new(End::None);
/// The vectors taken, the last one lowest.
static TAKEN: Global<u64> = Global::new(0);
static FIRST_RIP: Global<u64> = Global::new(0);

fn take(frame: &mut Frame) -> bool {
    if TAKEN.get() == 0 {
        FIRST_RIP.set(frame.rip);
    }
    TAKEN.set(TAKEN.get() << 8 | frame.vector);
    match END.get() {
        End::None => {}
        End::Msr => cpu::wrmsr(X2APIC_EOI, 0),
        // SAFETY: the APIC-access page.
        End::Page(page) => unsafe { asm!("mov dword ptr [{}], 0", in(reg) page + offset::EOI) },
    }
    true
}

/// Vectors that the cases use; their upper halves are their priorities.
pub const VECTORS: [u8; 6] = [0x41, 0x4F, 0x52, 0x61, 0x63, 0xFE];

/// Runs with handlers that end like this; returns the vectors taken, two digits each.
pub fn taking<T>(end: End, run: impl FnOnce() -> T) -> (T, u64) {
    END.set(end);
    TAKEN.set(0);
    let before = VECTORS.map(|vector| trap::hook(vector, Some(take)));
    let value = run();
    for (vector, hook) in VECTORS.into_iter().zip(before) {
        trap::hook(vector, hook);
    }
    (value, TAKEN.get())
}

/// Runs a guest that is interrupted by what its page holds.
fn run(apic: &mut Apic, program: Program, argument: u64, rflags: u64, end: End) -> (Exit, u64) {
    apic.guest.start(program, argument);
    vmx::write(f::GUEST_RFLAGS, 2 | rflags);
    taking(end, || apic.guest.run())
}

/// Requests vectors.
pub fn request(apic: &Apic, vectors: &[u8]) {
    vectors.iter().for_each(|vector| apic.set_vector(offset::IRR, *vector));
    apic.status(vectors.iter().copied().max().unwrap_or(0).into());
}

pub fn all(apic: &mut Apic) {
    if !apic.choose(&BOTH) {
        Check::new(&mut Serial, "virtual interrupts").fact("offered", false).end();
        return;
    }
    evaluation(apic);
    sequences(apic);
    eoi_exits(apic);
    self_ipis(apic);
    opened(apic);
    others(apic);
    delivery_exits(apic);
}

/// Requested, in service and task priority, with interrupts on and off, against the SDM's rules.
fn evaluation(apic: &mut Apic) {
    for requested in [0x00, 0x41, 0x4F, 0x61, 0xFE] {
        for priority in [0x00u8, 0x3F, 0x40, 0x4F, 0x60, 0xFF] {
            let (mut wrong, mut taken_in, mut digest) = (0u64, 0u64, 0u64);
            for (number, (serviced, on)) in
                (0..).zip([0u8, 0x41, 0x61, 0xFE].into_iter().flat_map(|v| [(v, 0), (v, IF)]))
            {
                let _ = apic.choose(&DELIVERY);
                // Another one waits after it.
                let (mut irr, mut isr) = (Vectors::default(), Vectors::default());
                for vector in [requested, if requested > 0x41 { 0x41 } else { 0 }].into_iter().filter(|v| *v != 0) {
                    irr.put(vector, true);
                    apic.set_vector(offset::IRR, vector);
                }
                if serviced != 0 {
                    isr.put(serviced, true);
                    apic.set_vector(offset::ISR, serviced);
                }
                apic.set(offset::TPR, priority.into());
                apic.status(u64::from(serviced) << 8 | u64::from(requested));
                let (exit, taken) = run(apic, nothing, 5, on, End::None);
                // The SDM's side.
                let (mut rvi, mut svi) = (requested, serviced);
                let mut ppr = if priority >> 4 >= svi >> 4 { priority } else { svi & 0xF0 };
                let mut should = 0;
                while on != 0 && rvi >> 4 > ppr >> 4 {
                    isr.put(rvi, true);
                    irr.put(rvi, false);
                    (svi, ppr) = (rvi, rvi & 0xF0);
                    should = should << 8 | u64::from(rvi);
                    rvi = irr.highest();
                }
                let status = vmx::read(f::GUEST_INTERRUPT_STATUS);
                let right = exit == Exit::Done(5)
                    && taken == should
                    && status == u64::from(svi) << 8 | u64::from(rvi)
                    && apic.get(offset::PPR) == ppr.into()
                    && (apic.vectors(offset::IRR), apic.vectors(offset::ISR)) == (irr, isr);
                wrong += u64::from(!right);
                taken_in |= u64::from(taken != 0) << number;
                digest = digest.rotate_left(7) ^ status ^ u64::from(apic.get(offset::PPR)) << 32;
            }
            Check::new(&mut Serial, format_args!("virtual interrupt {requested:#x}, task priority {priority:#x}"))
                .expect("wrong", wrong, 0)
                .fact("taken_in", Hex(taken_in))
                .fact("states", Hex(digest))
                .end();
        }
    }
}

/// Several are requested, and each handler ends its own.
fn sequences(apic: &mut Apic) {
    let page = apic.access;
    for (name, mode, end) in [
        ("MSR", and(DELIVERY, s::X2APIC_MODE), End::Msr),
        ("page", and(DELIVERY, s::APIC_ACCESSES), End::Page(page)),
        ("nothing", DELIVERY, End::None),
    ] {
        for (vectors, ended) in [
            (&[0x41][..], 0x41u64),
            (&[0x41, 0x61], 0x6141),
            (&[0x41, 0x4F], 0x4F41),
            (&[0x41, 0x52, 0x63, 0xFE], 0xFE63_5241),
        ] {
            let mut out = Serial;
            let check = Check::new(&mut out, format_args!("virtual interrupts {ended:#x} ended by {name}"));
            if !apic.choose(&mode) {
                check.fact("offered", false).end();
                continue;
            }
            request(apic, vectors);
            let (exit, taken) = run(apic, nothing, 5, IF, end);
            let highest = vectors.iter().copied().max().unwrap_or(0);
            let wanted = if end == End::None { highest.into() } else { ended };
            let below = vectors.iter().copied().filter(|v| *v != highest).max().unwrap_or(0);
            let status = if end == End::None { u64::from(highest) << 8 | u64::from(below) } else { 0 };
            check
                .expect("result", exit, Exit::Done(5))
                .expect("taken", Hex(taken), Hex(wanted))
                .expect("status", Hex(vmx::read(f::GUEST_INTERRUPT_STATUS)), Hex(status))
                .fact("priority", Hex(apic.get(offset::PPR).into()))
                .end();
        }
    }
}

/// Each vector has its bit in the EOI-exit bitmaps; the exit comes after the EOI.
fn eoi_exits(apic: &mut Apic) {
    let page = apic.access;
    for (name, mode, end) in
        [("MSR", and(DELIVERY, s::X2APIC_MODE), End::Msr), ("page", and(DELIVERY, s::APIC_ACCESSES), End::Page(page))]
    {
        for vector in VECTORS {
            let mut out = Serial;
            let check = Check::new(&mut out, format_args!("EOI of {vector:#x} exits by {name}"));
            if !apic.choose(&mode) {
                check.fact("offered", false).end();
                continue;
            }
            vmx::write(f::EOI_EXIT0 + 2 * u32::from(vector / 64), 1 << (vector % 64));
            request(apic, &[0x41, vector]);
            apic.guest.start(nothing, 5);
            vmx::write(f::GUEST_RFLAGS, 2 | IF);
            let ((exit, status, rest), taken) = taking(end, || {
                let exit = apic.guest.run();
                let status = vmx::read(f::GUEST_INTERRUPT_STATUS);
                (exit, status, apic.guest.run())
            });
            let waiting = if vector > 0x41 { 0x41 } else { 0 };
            let all = if vector > 0x41 { u64::from(vector) << 8 | 0x41 } else { 0x41 };
            check
                .expect("result", exit, Exit::Reason(r::VIRTUALIZED_EOI, vector.into()))
                .expect("status", Hex(status), Hex(waiting))
                .expect("rest", rest, Exit::Done(5))
                .expect("taken", Hex(taken), Hex(all))
                .end();
        }
    }
}

extern "C" fn ipi_by_page(_: u64) -> u64 {
    // SAFETY: the APIC-access page.
    unsafe { asm!("mov [{}], {:e}", in(reg) PAGE.get() + offset::ICR, in(reg) OPERAND.get() as u32) };
    5
}

extern "C" fn ipi_by_msr(_: u64) -> u64 {
    cpu::wrmsr(X2APIC_SELF_IPI, OPERAND.get());
    5
}

static PAGE: Global<u64> = Global::new(0);

fn self_ipis(apic: &mut Apic) {
    PAGE.set(apic.access);
    let exit = Exit::Reason(r::APIC_WRITE, offset::ICR);
    let done = Exit::Done(5);
    let by_page = and(DELIVERY, s::APIC_ACCESSES);
    let by_msr = and(DELIVERY, s::X2APIC_MODE);
    let cases: [(&str, Controls, Program, u64, Exit); 16] = [
        ("by MSR", by_msr, ipi_by_msr, 0x61, done),
        ("by page", by_page, ipi_by_page, TO_SELF | 0x61, done),
        ("by page, asserted", by_page, ipi_by_page, TO_SELF | 1 << 14 | 0x61, done),
        ("by page, logical", by_page, ipi_by_page, TO_SELF | 1 << 11 | 0x61, done),
        ("by page, level", by_page, ipi_by_page, TO_SELF | 1 << 15 | 0x61, exit),
        ("by page, pending", by_page, ipi_by_page, TO_SELF | 1 << 12 | 0x61, exit),
        ("by page, bit 13", by_page, ipi_by_page, TO_SELF | 1 << 13 | 0x61, exit),
        ("by page, bit 16", by_page, ipi_by_page, TO_SELF | 1 << 16 | 0x61, exit),
        ("by page, bit 20", by_page, ipi_by_page, TO_SELF | 1 << 20 | 0x61, exit),
        ("by page, bit 31", by_page, ipi_by_page, TO_SELF | 1 << 31 | 0x61, exit),
        ("by page, lowest priority", by_page, ipi_by_page, TO_SELF | 1 << 8 | 0x61, exit),
        ("by page, NMI", by_page, ipi_by_page, TO_SELF | 4 << 8 | 0x61, exit),
        ("by page, vector 15", by_page, ipi_by_page, TO_SELF | 0x0F, exit),
        ("by page, to the destination", by_page, ipi_by_page, 0x61, exit),
        ("by page, to all", by_page, ipi_by_page, 2 << 18 | 0x61, exit),
        ("by page, to all others", by_page, ipi_by_page, 3 << 18 | 0x61, exit),
    ];
    for (name, mode, program, value, wanted) in cases {
        for (how, rflags, priority) in [("taken", IF, 0), ("waits", 0, 0), ("masked", IF, 0x60)] {
            let mut out = Serial;
            let check = Check::new(&mut out, format_args!("self-IPI {name}, {how}"));
            if !apic.choose(&mode) {
                check.fact("offered", false).end();
                continue;
            }
            OPERAND.set(value);
            apic.set(offset::TPR, priority);
            let (exit, taken) = run(apic, program, 0, rflags, End::None);
            let sent = wanted == done;
            let (vector, status) = match (sent, how) {
                (false, _) => (0, 0),
                (true, "taken") => (0x61, 0x6100),
                (true, _) => (0, 0x61),
            };
            check
                .expect("result", exit, wanted)
                .expect("taken", Hex(taken), Hex(vector))
                .expect("status", Hex(vmx::read(f::GUEST_INTERRUPT_STATUS)), Hex(status))
                .end();
        }
    }
}

extern "C" fn sti(_: u64) -> u64 {
    // SAFETY: the handler returns.
    unsafe { asm!("sti", "nop", "nop", "cli") };
    5
}

extern "C" fn lower_cr8(_: u64) -> u64 {
    // SAFETY: the guest's task priority is virtual.
    unsafe { asm!("mov cr8, {}", in(reg) 2u64) };
    5
}

extern "C" fn lower_by_page(_: u64) -> u64 {
    // SAFETY: the APIC-access page.
    unsafe { asm!("mov dword ptr [{}], 0x20", in(reg) PAGE.get() + offset::TPR) };
    5
}

extern "C" fn lower_by_msr(_: u64) -> u64 {
    cpu::wrmsr(0x808, 0x20);
    5
}

/// One waits, and the guest opens the way.
fn opened(apic: &mut Apic) {
    let accesses = and(DELIVERY, s::APIC_ACCESSES);
    let x2apic = and(DELIVERY, s::X2APIC_MODE);
    for (name, mode, program, rflags, priority) in [
        ("STI", DELIVERY, sti as Program, 0, 0),
        ("CR8", DELIVERY, lower_cr8, IF, 0xF0),
        ("the page", accesses, lower_by_page, IF, 0xF0),
        ("the MSR", x2apic, lower_by_msr, IF, 0xF0),
        ("CR8 with interrupts off", DELIVERY, lower_cr8, 0, 0xF0),
    ] {
        let mut out = Serial;
        let check = Check::new(&mut out, format_args!("virtual interrupt let in by {name}"));
        if !apic.choose(&mode) {
            check.fact("offered", false).end();
            continue;
        }
        request(apic, &[0x41]);
        apic.set(offset::TPR, priority);
        let (exit, taken) = run(apic, program, 0, rflags, End::None);
        let off = rflags == 0 && priority != 0;
        check
            .expect("result", exit, Exit::Done(5))
            .expect("taken", Hex(taken), Hex(if off { 0 } else { 0x41 }))
            .expect("status", Hex(vmx::read(f::GUEST_INTERRUPT_STATUS)), Hex(if off { 0x41 } else { 0x4100 }))
            .end();
    }
}

/// Together with other controls and events.
fn others(apic: &mut Apic) {
    let start = nothing as *const () as u64;
    let _ = apic.choose(&Controls { primary: DELIVERY.primary | primary::INTERRUPT_WINDOW, ..DELIVERY });
    request(apic, &[0x41]);
    let (exit, taken) = run(apic, nothing, 5, IF, End::None);
    Check::new(&mut Serial, "virtual interrupt under interrupt-window exiting")
        .expect("result", exit, Exit::Reason(r::INTERRUPT_WINDOW, 0))
        .expect("taken", taken, 0)
        .expect("status", Hex(vmx::read(f::GUEST_INTERRUPT_STATUS)), Hex(0x41))
        .end();

    let _ = apic.choose(&DELIVERY);
    request(apic, &[0x41]);
    apic.guest.start(nothing, 5);
    vmx::write(f::GUEST_RFLAGS, 2 | IF);
    vmx::write(f::GUEST_INTERRUPTIBILITY, BLOCKED_BY_STI);
    let (exit, taken) = taking(End::None, || apic.guest.run());
    Check::new(&mut Serial, "virtual interrupt blocked by STI")
        .expect("result", exit, Exit::Done(5))
        .expect("taken", Hex(taken), Hex(0x41))
        .expect("behind", FIRST_RIP.get() > start, true)
        .end();

    // What is injected comes first, and its handler is not interrupted.
    let _ = apic.choose(&DELIVERY);
    request(apic, &[0x41]);
    apic.guest.start(nothing, 5);
    vmx::write(f::GUEST_RFLAGS, 2 | IF);
    vmx::write(f::ENTRY_INTERRUPTION_INFO, VALID | 0x52);
    let (exit, taken) = taking(End::None, || apic.guest.run());
    Check::new(&mut Serial, "virtual interrupt behind an injected one")
        .expect("result", exit, Exit::Done(5))
        .expect("taken", Hex(taken), Hex(0x5241))
        .expect("status", Hex(vmx::read(f::GUEST_INTERRUPT_STATUS)), Hex(0x4100))
        .end();
}

/// The guest's IDT is missing when a virtual interrupt is delivered, in ept12 or only where a hypervisor below composes it.
fn delivery_exits(apic: &mut Apic) {
    let Some(ept) = apic.guest.ept else { return };
    let _ = apic.choose(&DELIVERY);
    let (own, idt) = (vmx::read(f::GUEST_IDTR_BASE), copy_of_idt());
    vmx::write(f::GUEST_IDTR_BASE, idt);
    let unmap = || {
        ept.unmap(idt, pages::PAGE);
        let _ = vmx::invept(1, [ept.pointer(), 0]);
    };
    unmap();
    request(apic, &[0x41]);
    let (exit, _) = run(apic, nothing, 5, IF, End::None);
    let reason = if let Exit::Reason(reason, _) = exit { reason } else { 0 };
    // Bit 12 is undefined.
    let vectoring = vmx::read(f::IDT_VECTORING_INFO) & !(1 << 12);
    Check::new(&mut Serial, "delivery of a virtual interrupt exits")
        .expect("reason", reason, r::EPT_VIOLATION)
        .expect("vectoring", Hex(vectoring), Hex(VALID | 0x41))
        .expect("status", Hex(vmx::read(f::GUEST_INTERRUPT_STATUS)), Hex(0x4100))
        .end();
    for (how, injected) in [("again", vectoring), ("through a page that is new", 0)] {
        if injected == 0 {
            unmap();
            let _ = apic.choose(&DELIVERY);
            request(apic, &[0x41]);
            apic.guest.start(nothing, 5);
            vmx::write(f::GUEST_RFLAGS, 2 | IF);
        }
        ept.map(idt, pages::PAGE, rights::RWX);
        vmx::write(f::ENTRY_INTERRUPTION_INFO, injected);
        let (exit, taken) = taking(End::None, || apic.guest.run());
        Check::new(&mut Serial, format_args!("delivery of a virtual interrupt {how}"))
            .expect("result", exit, Exit::Done(5))
            .expect("taken", Hex(taken), Hex(0x41))
            .expect("status", Hex(vmx::read(f::GUEST_INTERRUPT_STATUS)), Hex(0x4100))
            .end();
    }
    vmx::write(f::GUEST_IDTR_BASE, own);
}
