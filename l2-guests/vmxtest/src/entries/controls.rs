//! Controls that the CPU refuses with error 7.

use super::{
    Change::{Off, On, Set},
    attempt, attempt_if,
};
use crate::{
    guest::{Exit, Guest},
    vmxon::too_wide,
};
use l2_kit::{
    caps, fields as f,
    setup::{Kind, exit_controls as exit, pin, primary, secondary},
    vmx::{self, Outcome},
};

/// All of it.
pub fn all(guest: &mut Guest) {
    let bad = Exit::Refused(Outcome::FailValid(7));
    let must = |kind: Kind| Off(u64::from(kind.allowed() as u32));
    attempt(guest, "pin controls without what must be 1", &[(f::PIN_CONTROLS, must(Kind::Pin))], bad);
    attempt(guest, "primary controls without what must be 1", &[(f::PRIMARY_CONTROLS, must(Kind::Primary))], bad);
    attempt(guest, "exit controls without what must be 1", &[(f::EXIT_CONTROLS, must(Kind::Exit))], bad);
    attempt(guest, "entry controls without what must be 1", &[(f::ENTRY_CONTROLS, must(Kind::Entry))], bad);
    // The highest bit that the processor itself does not know.
    let must_not =
        |kind: Kind| On(1 << (!((kind.allowed_by(caps::own_or_0) >> 32) as u32)).checked_ilog2().unwrap_or(31));
    attempt(guest, "pin controls with what must be 0", &[(f::PIN_CONTROLS, must_not(Kind::Pin))], bad);
    attempt(guest, "primary controls with bit 0", &[(f::PRIMARY_CONTROLS, On(1))], bad);
    attempt(
        guest,
        "secondary controls with what must be 0",
        &[(f::SECONDARY_CONTROLS, must_not(Kind::Secondary))],
        bad,
    );
    attempt(guest, "exit controls with what must be 0", &[(f::EXIT_CONTROLS, must_not(Kind::Exit))], bad);
    attempt(guest, "entry controls with what must be 0", &[(f::ENTRY_CONTROLS, must_not(Kind::Entry))], bad);
    attempt(guest, "5 CR3 targets", &[(f::CR3_TARGET_COUNT, Set(5))], bad);
    let io = (f::PRIMARY_CONTROLS, On(primary::IO_BITMAPS.into()));
    let page = (f::IO_BITMAP_B, Set(0x1000));
    attempt(guest, "I/O bitmap A misaligned", &[io, page, (f::IO_BITMAP_A, Set(0x800))], bad);
    attempt(guest, "I/O bitmap A beyond the address width", &[io, page, (f::IO_BITMAP_A, Set(too_wide()))], bad);
    attempt(guest, "I/O bitmap B misaligned", &[io, (f::IO_BITMAP_A, Set(0x1000)), (f::IO_BITMAP_B, Set(1))], bad);
    let bits = primary::MSR_BITMAPS;
    attempt_if(guest, Kind::Primary, bits, "MSR bitmap misaligned", &[(f::MSR_BITMAP, On(8))], bad);
    attempt_if(
        guest,
        Kind::Primary,
        bits,
        "MSR bitmap beyond the address width",
        &[(f::MSR_BITMAP, On(too_wide()))],
        bad,
    );
    let virtual_nmi = u64::from(pin::VIRTUAL_NMI);
    let kind = Kind::Pin;
    attempt_if(
        guest,
        kind,
        pin::VIRTUAL_NMI,
        "virtual NMIs without NMI exiting",
        &[(f::PIN_CONTROLS, On(virtual_nmi))],
        bad,
    );
    let window = [(f::PRIMARY_CONTROLS, On(primary::NMI_WINDOW.into()))];
    attempt_if(guest, Kind::Primary, primary::NMI_WINDOW, "NMI window without virtual NMIs", &window, bad);
    let vpid = [(f::SECONDARY_CONTROLS, On(secondary::VPID.into()))];
    attempt_if(guest, Kind::Secondary, secondary::VPID, "VPID 0", &vpid, bad);
    for (name, change) in [
        ("EPTP with memory type 2", Set(vmx::read(f::EPTP) & !7 | 2)),
        ("EPTP with memory type 7", On(7)),
        ("EPTP with a walk of 2 levels", Set(vmx::read(f::EPTP) & !(7 << 3) | 1 << 3)),
        ("EPTP with bit 11", On(1 << 11)),
        ("EPTP beyond the address width", On(too_wide())),
    ] {
        attempt(guest, name, &[(f::EPTP, change)], bad);
    }
    let unrestricted = [(f::SECONDARY_CONTROLS, Set(secondary::UNRESTRICTED.into()))];
    attempt_if(guest, Kind::Secondary, secondary::UNRESTRICTED, "unrestricted guest without EPT", &unrestricted, bad);
    let save = [(f::EXIT_CONTROLS, On(exit::SAVE_TIMER.into()))];
    attempt_if(guest, Kind::Exit, exit::SAVE_TIMER, "saved timer without timer", &save, bad);
    for (name, address, count) in [
        ("exit MSR-store list", f::EXIT_MSR_STORE_ADDR, f::EXIT_MSR_STORE_COUNT),
        ("exit MSR-load list", f::EXIT_MSR_LOAD_ADDR, f::EXIT_MSR_LOAD_COUNT),
        ("entry MSR-load list", f::ENTRY_MSR_LOAD_ADDR, f::ENTRY_MSR_LOAD_COUNT),
    ] {
        for (how, value, wanted) in [
            ("misaligned", 0x1008, bad),
            ("beyond the address width", too_wide(), bad),
            ("that ends beyond the address width", too_wide() - 16, bad),
        ] {
            let mut text = l2_kit::arrayvec::ArrayString::<64>::new();
            let _ = core::fmt::Write::write_fmt(&mut text, format_args!("{name} {how}"));
            attempt(guest, &text, &[(count, Set(2)), (address, Set(value))], wanted);
        }
        attempt(guest, name, &[(count, Set(0)), (address, Set(0x1008))], Exit::Done(5));
    }
}
