//! The routing table, over every basic exit reason and every single control.

mod core_support;

use nvmx::rules::route::{ExitInfo, GuestWants, Route, is_always_reflected, route};
use nvmx::vmx::bitmap::{Access, BitmapPage, MsrBitmap};
use nvmx::vmx::event::{EventInfo, EventKind};
use nvmx::vmx::{BasicReason, ExitReason, PinControls, PrimaryControls, SecondaryControls};

/// L2's side of an exit. `bitmap` is the MSR bitmap it set up.
#[derive(Clone)]
struct L2 {
    pin: PinControls,
    primary: PrimaryControls,
    secondary: SecondaryControls,
    bitmap: MsrBitmap,
    shadow: BitmapPage,
}

impl L2 {
    fn asks_for_nothing() -> Self {
        Self {
            pin: PinControls::empty(),
            primary: PrimaryControls::USE_MSR_BITMAPS,
            secondary: SecondaryControls::empty(),
            bitmap: MsrBitmap::PASS_ALL,
            shadow: BitmapPage::CLEAR,
        }
    }
    fn asks_for_everything() -> Self {
        Self {
            pin: PinControls::all(),
            primary: PrimaryControls::all(),
            secondary: SecondaryControls::all(),
            bitmap: MsrBitmap(BitmapPage::SET),
            shadow: BitmapPage::SET,
        }
    }
}

impl GuestWants for L2 {
    fn pin(&self) -> PinControls {
        self.pin
    }
    fn primary(&self) -> PrimaryControls {
        self.primary
    }
    fn secondary(&self) -> SecondaryControls {
        self.secondary
    }
    fn msr_bitmap(&self, msr: u32, access: Access) -> bool {
        assert!(self.primary.contains(PrimaryControls::USE_MSR_BITMAPS), "asked although L2 uses none");
        self.bitmap.exits(msr, access)
    }
    fn shadow_bitmap(&self, bit: u16, _: Access) -> bool {
        assert!(self.secondary.contains(SecondaryControls::VMCS_SHADOWING), "asked although L2 does not use it");
        self.shadow.get(bit)
    }
}

fn exit(reason: u16) -> ExitInfo {
    ExitInfo {
        reason: ExitReason(u32::from(reason)),
        qualification: 0,
        event: EventInfo::new(EventKind::HardwareException, 6),
        ecx: 0x174,
        encoding: 0x681E,
    }
}

/// One bit of the three control words, by SDM bit number: pin 0.., primary 32.., secondary 64...
fn with_bit(bit: u32) -> L2 {
    let mut l2 = L2::asks_for_nothing();
    match bit / 32 {
        0 => l2.pin |= PinControls::from_bits_retain(1 << bit),
        1 => l2.primary |= PrimaryControls::from_bits_retain(1 << (bit - 32)),
        _ => l2.secondary |= SecondaryControls::from_bits_retain(1 << (bit - 64)),
    }
    l2
}

enum Rule {
    Always,
    Never,
    /// Any one of these bits is enough.
    Any(Vec<u32>),
    /// Both bits together.
    Both(u32, u32),
    /// Decided by operands: tested below.
    Operands,
}

const fn pin(bit: u32) -> u32 {
    bit
}
const fn primary(bit: u32) -> u32 {
    32 + bit
}
const fn secondary(bit: u32) -> u32 {
    64 + bit
}

/// From the SDM's list of exit reasons and its chapter on VMX non-root operation, by number.
fn rule(reason: u16) -> Rule {
    use Rule::*;
    match reason {
        0 | 23 | 25 | 28 | 30 | 31 | 32 => Operands,
        1 => Any(vec![pin(0)]),
        2 | 3 | 9 | 10 | 11 | 13 => Always, // triple fault, INIT, task switch, CPUID, GETSEC, INVD
        7 => Any(vec![primary(2)]),
        8 => Any(vec![primary(22)]),
        12 => Any(vec![primary(7)]),
        14 => Any(vec![primary(9)]),
        15 => Any(vec![primary(11)]),
        16 | 51 => Any(vec![primary(12)]),
        18..=22 | 24 | 26..=27 | 50 | 53 | 55 => Always, // VMX instructions, XSETBV
        29 => Any(vec![primary(23)]),
        36 => Any(vec![primary(10)]),
        37 => Always,
        39 => Any(vec![primary(29)]),
        40 => Any(vec![primary(30), secondary(10)]),
        43 => Any(vec![primary(21)]),
        44 => Any(vec![secondary(0)]),
        45 => Any(vec![secondary(9)]),
        46 | 47 => Any(vec![secondary(2)]),
        52 => Any(vec![pin(6)]),
        54 => Any(vec![secondary(6)]),
        56 => Any(vec![secondary(8), secondary(9)]),
        57 => Any(vec![secondary(11)]),
        58 => Both(secondary(12), primary(9)),
        60 => Any(vec![secondary(15)]),
        61 => Any(vec![secondary(16)]),
        62 => Any(vec![secondary(17)]),
        63 | 64 => Any(vec![secondary(20)]),
        65 => Any(vec![secondary(27)]),
        67 | 68 => Both(secondary(26), primary(12)),
        70 => Any(vec![secondary(28)]),
        72 | 73 => Any(vec![secondary(21)]),
        74 => Any(vec![secondary(30)]),
        75 => Any(vec![secondary(31)]),
        // SMI, RSM, entry failures without bit 31, EPT and sub-pages (nvmx walks L2's tables first), VMFUNC (nvmx looks at its
        // operands first), tertiary controls.
        5..=6 | 17 | 33 | 34 | 41 | 48 | 49 | 59 | 66 | 69 | 78 | 79 => Never,
        // TDX instructions and the unknown: L3 found something that exits on every machine.
        _ => Always,
    }
}

#[test]
fn what_is_l2_s_at_the_first_look_is_always_l2_s() {
    for reason in (0..=u16::MAX).map(u32::from).chain([1 << 31 | 10, 1 << 31 | 33, 1 << 16 | 10, u32::MAX]) {
        let expected = matches!(reason, 9..=11 | 13 | 18..=22 | 24 | 26 | 27 | 50 | 53 | 55);
        assert_eq!(is_always_reflected(ExitReason(reason)), expected, "{reason:#x}");
        assert!(!expected || matches!(rule(reason as u16), Rule::Always), "{reason}");
    }
}

#[test]
fn each_reason_goes_to_l2_exactly_if_its_own_control_is_set() {
    for reason in 0..=u16::MAX {
        let always_for_all = |expected: Route| {
            assert_eq!(route(&exit(reason), &L2::asks_for_nothing()), expected, "{reason} asked for nothing");
            assert_eq!(route(&exit(reason), &L2::asks_for_everything()), expected, "{reason} asked for everything");
        };
        match rule(reason) {
            Rule::Operands => {}
            Rule::Always => always_for_all(Route::Reflect),
            Rule::Never => always_for_all(Route::Nvmx),
            Rule::Any(bits) => {
                for bit in 0..96 {
                    let expected = if bits.contains(&bit) { Route::Reflect } else { Route::Nvmx };
                    assert_eq!(route(&exit(reason), &with_bit(bit)), expected, "{reason}, bit {bit}");
                }
                assert_eq!(route(&exit(reason), &L2::asks_for_everything()), Route::Reflect);
            }
            Rule::Both(a, b) => {
                for bit in 0..96 {
                    assert_eq!(route(&exit(reason), &with_bit(bit)), Route::Nvmx, "{reason}, bit {bit}");
                }
                let (mut both, other) = (with_bit(a), with_bit(b));
                both.primary |= other.primary;
                both.secondary |= other.secondary;
                assert_eq!(route(&exit(reason), &both), Route::Reflect, "{reason}");
            }
        }
    }
}

#[test]
fn vmread_and_vmwrite_are_nvmx_s_where_l2_s_bitmap_opens_the_field() {
    let mut l2 = L2::asks_for_nothing();
    for reason in [23, 25] {
        for shadowing in [false, true] {
            l2.secondary.set(SecondaryControls::VMCS_SHADOWING, shadowing);
            for closed in [false, true] {
                l2.shadow.put(0x681E, closed);
                for encoding in [0x681E, 0x681E | 1 << 15, 0x681E | 1 << 32, u64::MAX] {
                    let info = ExitInfo { encoding, ..exit(reason) };
                    let nvmx_s = shadowing && !closed && encoding == 0x681E;
                    let expected = if nvmx_s { Route::Nvmx } else { Route::Reflect };
                    assert_eq!(route(&info, &l2), expected, "{reason} {shadowing} {closed} {encoding:#x}");
                }
            }
        }
    }
}

#[test]
fn an_exception_is_l2_s_because_nvmx_intercepts_none() {
    for vector in 0..32 {
        let info = ExitInfo { event: EventInfo::new(EventKind::HardwareException, vector), ..exit(0) };
        assert_eq!(route(&info, &L2::asks_for_nothing()), Route::Reflect);
    }
    for kind in [EventKind::SoftwareException, EventKind::PrivilegedSoftwareException] {
        let info = ExitInfo { event: EventInfo::new(kind, 3), ..exit(0) };
        assert_eq!(route(&info, &L2::asks_for_nothing()), Route::Reflect);
    }
}

#[test]
fn an_nmi_is_l2_s_exactly_with_nmi_exiting() {
    let info = ExitInfo { event: EventInfo::new(EventKind::Nmi, 2), ..exit(0) };
    for bit in 0..96 {
        let expected = if bit == pin(3) { Route::Reflect } else { Route::Nvmx };
        assert_eq!(route(&info, &with_bit(bit)), expected, "bit {bit}");
    }
}

#[test]
fn control_register_accesses_follow_the_register_and_the_direction() {
    // (register, kind of access, control that asks for it); kinds: 0 to CR, 1 from CR, 2 CLTS, 3 LMSW
    let controlled = [(3, 0, primary(15)), (3, 1, primary(16)), (8, 0, primary(19)), (8, 1, primary(20))];
    for cr in 0..16u64 {
        for kind in 0..4u64 {
            for gpr in 0..16u64 {
                let info = ExitInfo { qualification: cr | kind << 4 | gpr << 8, ..exit(28) };
                let control = controlled.iter().find(|c| (c.0, c.1) == (cr, kind)).map(|c| c.2);
                let by_mask = kind >= 2 || kind == 0 && matches!(cr, 0 | 4);
                for bit in 0..96 {
                    let expected = if by_mask || control == Some(bit) { Route::Reflect } else { Route::Nvmx };
                    assert_eq!(route(&info, &with_bit(bit)), expected, "CR{cr} kind {kind} bit {bit}");
                }
            }
        }
    }
}

#[test]
fn io_goes_to_l2_with_either_io_control() {
    for bit in 0..96 {
        let expected = if [primary(24), primary(25)].contains(&bit) { Route::Reflect } else { Route::Nvmx };
        assert_eq!(route(&exit(30), &with_bit(bit)), expected, "bit {bit}");
    }
}

#[test]
fn msr_accesses_follow_l2_s_bitmap() {
    for (reason, access, other) in [(31, Access::Read, Access::Write), (32, Access::Write, Access::Read)] {
        for msr in [0, 0x174, 0x1FFF, 0xC000_0000, 0xC000_0080, 0xC000_1FFF] {
            let info = ExitInfo { ecx: msr, ..exit(reason) };
            let mut l2 = L2::asks_for_nothing();
            assert_eq!(route(&info, &l2), Route::Nvmx, "{msr:#x}: only nvmx wanted it");
            l2.bitmap.set(msr, other, true);
            assert_eq!(route(&info, &l2), Route::Nvmx, "{msr:#x}: L2 wants the other direction");
            l2.bitmap.set(msr, access, true);
            assert_eq!(route(&info, &l2), Route::Reflect, "{msr:#x}");
        }
        for msr in [0x2000, 0xBFFF_FFFF, 0xC000_2000, u32::MAX] {
            let info = ExitInfo { ecx: msr, ..exit(reason) };
            assert_eq!(route(&info, &L2::asks_for_nothing()), Route::Reflect, "{msr:#x} is outside of the bitmap");
        }
        let mut l2 = L2::asks_for_nothing();
        l2.primary = PrimaryControls::empty();
        assert_eq!(route(&exit(reason), &l2), Route::Reflect, "no bitmap: all exit");
    }
}

#[test]
fn entry_failures_are_l2_s() {
    for reason in 0..=u16::MAX {
        let info = ExitInfo { reason: ExitReason(u32::from(reason) | 1 << 31), ..exit(0) };
        assert_eq!(route(&info, &L2::asks_for_nothing()), Route::Reflect, "{reason}");
    }
}

#[test]
fn modifier_bits_do_not_change_the_route() {
    for bit in [ExitReason::ENCLAVE_MODE, ExitReason::PENDING_MTF] {
        let info = ExitInfo { reason: ExitReason(10 | bit), ..exit(0) };
        assert_eq!(route(&info, &L2::asks_for_nothing()), Route::Reflect);
    }
}

#[test]
fn every_known_reason_has_a_name_and_the_unknown_are_data() {
    for reason in BasicReason::KNOWN {
        assert!(reason.name().is_some() && !reason.to_string().starts_with("REASON_"));
    }
    // The SDM leaves these out; 71 has no meaning of its own to us.
    let gaps: Vec<u16> = (0..80).filter(|r| BasicReason(*r).name().is_none()).collect();
    assert_eq!(gaps, [35, 38, 42, 71]);
    assert_eq!(ExitReason(0x8000_0000 | 999).to_string(), "REASON_999 (entry failure)");
}
