//! What vmcs02 runs with: everything L2 asked for (I3), nothing of L2's on the host side (I4), only what hardware accepts.

mod core_support;

use core_support::{APIC_PAGES, Vmcs, rich, rich_msr, valid_vmcs12};
use nvmx::addr::Hpa;
use nvmx::hw::phys::DirectMap;
use nvmx::mm::{FramePool, Span};
use nvmx::rules::caps::offered;
use nvmx::rules::checks::{ControlsChecked, check_cached_controls};
use nvmx::rules::merge::{ApicPages, Duties, NvmxNeeds, Translated, Vmcs02Controls, merge};
use nvmx::vmcs::stale::Stale;
use nvmx::vmcs::vmcs02::Vmcs02;
use nvmx::vmx::caps::msr;
use nvmx::vmx::{
    Capabilities, EntryControls, ExitControls, Field, Field::*, FieldAccess, Fields, PinControls, PrimaryControls,
    SecondaryControls,
};
use proptest::prelude::*;
use std::collections::HashMap;

const TO: Translated = Translated {
    io_bitmaps: Some((Hpa::new(0xA000), Hpa::new(0xB000))),
    msr_bitmap: Some(Hpa::new(0xC000)),
    apic: APIC_PAGES,
    shadow_bitmaps: Some((Hpa::new(0xD000), Hpa::new(0xE000))),
};

/// What L2 gets by nvmx's own work.
const EMULATED: SecondaryControls = SecondaryControls::ENABLE_PML.union(SecondaryControls::EPT_VIOLATION_VE);

/// Entry controls that are about L3 alone. Their counterparts at the exit are L2's, which vmcs02 does not load.
const OF_L3: EntryControls = EntryControls::IA32E_MODE_GUEST
    .union(EntryControls::LOAD_CET)
    .union(EntryControls::LOAD_PKRS)
    .union(EntryControls::LOAD_UINV)
    .union(EntryControls::LOAD_PERF_GLOBAL_CTRL);

/// A vmcs12 with these controls, as far as L2 is offered them and the rules between them allow.
fn vmcs12(caps: &Capabilities, controls: [u32; 5]) -> Vmcs {
    let [pin, primary, secondary, exit, entry] = controls;
    let mut v = valid_vmcs12(caps);
    let within = |may: u32, must: u32, value: u32| u64::from(value & may | must);
    v.set(PIN_BASED_VM_EXEC_CONTROL, within(caps.pin.may_be_one(), caps.pin.must_be_one(), pin));
    v.set(CPU_BASED_VM_EXEC_CONTROL, within(caps.primary.may_be_one(), caps.primary.must_be_one(), primary));
    v.set(SECONDARY_VM_EXEC_CONTROL, within(caps.secondary.may_be_one(), caps.secondary.must_be_one(), secondary));
    v.set(VM_EXIT_CONTROLS, within(caps.exit.may_be_one(), caps.exit.must_be_one(), exit));
    v.set(VM_ENTRY_CONTROLS, within(caps.entry.may_be_one(), caps.entry.must_be_one(), entry));
    let off = |v: &mut Vmcs, field: Field, bit: u32, needs: bool| {
        if !needs {
            v.clear(field, 1 << bit);
        }
    };
    let has = |v: &Vmcs, field: Field, bit: u32| v.get(field) >> bit & 1 == 1;
    let nmi = has(&v, PIN_BASED_VM_EXEC_CONTROL, 3);
    off(&mut v, PIN_BASED_VM_EXEC_CONTROL, 5, nmi);
    let virtual_nmis = has(&v, PIN_BASED_VM_EXEC_CONTROL, 5);
    off(&mut v, CPU_BASED_VM_EXEC_CONTROL, 22, virtual_nmis);
    let timer = has(&v, PIN_BASED_VM_EXEC_CONTROL, 6);
    off(&mut v, VM_EXIT_CONTROLS, 22, timer);
    let ept = has(&v, SECONDARY_VM_EXEC_CONTROL, 1);
    off(&mut v, SECONDARY_VM_EXEC_CONTROL, 22, ept);
    off(&mut v, SECONDARY_VM_EXEC_CONTROL, 23, ept);
    off(&mut v, SECONDARY_VM_EXEC_CONTROL, 7, ept);
    off(&mut v, SECONDARY_VM_EXEC_CONTROL, 17, ept);
    let tpr_shadow = has(&v, CPU_BASED_VM_EXEC_CONTROL, 21);
    let interrupts_exit = has(&v, PIN_BASED_VM_EXEC_CONTROL, 0);
    let accesses = has(&v, SECONDARY_VM_EXEC_CONTROL, 0);
    off(&mut v, SECONDARY_VM_EXEC_CONTROL, 4, tpr_shadow && !accesses);
    off(&mut v, SECONDARY_VM_EXEC_CONTROL, 8, tpr_shadow);
    off(&mut v, SECONDARY_VM_EXEC_CONTROL, 9, tpr_shadow && interrupts_exit);
    let delivery = has(&v, CPU_BASED_VM_EXEC_CONTROL, 31) && has(&v, SECONDARY_VM_EXEC_CONTROL, 9);
    let acknowledged = has(&v, VM_EXIT_CONTROLS, 15);
    off(&mut v, PIN_BASED_VM_EXEC_CONTROL, 7, delivery && acknowledged);
    v
}

fn checked(v: &Vmcs, caps: &Capabilities) -> ControlsChecked {
    check_cached_controls(v, caps).unwrap_or_else(|failure| panic!("{}", failure.check))
}

fn merged(v: &Vmcs, hw: &Capabilities, to: &Translated) -> Vmcs02Controls {
    merge(&NvmxNeeds::new(hw), v, checked(v, &offered(hw)), to)
}

fn controls12(v: &Vmcs) -> (PinControls, PrimaryControls, SecondaryControls, ExitControls, EntryControls) {
    let primary = PrimaryControls::from_bits_retain(v.get(CPU_BASED_VM_EXEC_CONTROL) as u32);
    let secondary = if primary.contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS) {
        v.get(SECONDARY_VM_EXEC_CONTROL)
    } else {
        0
    };
    (
        PinControls::from_bits_retain(v.get(PIN_BASED_VM_EXEC_CONTROL) as u32),
        primary,
        SecondaryControls::from_bits_retain(secondary as u32),
        ExitControls::from_bits_retain(v.get(VM_EXIT_CONTROLS) as u32),
        EntryControls::from_bits_retain(v.get(VM_ENTRY_CONTROLS) as u32),
    )
}

/// Primary controls whose 1-setting makes more exit; the two bitmap controls make less exit.
fn intercepts(primary: PrimaryControls) -> PrimaryControls {
    primary - PrimaryControls::USE_IO_BITMAPS - PrimaryControls::USE_MSR_BITMAPS
}

/// A vmcs02 anywhere.
fn vmcs02() -> Vmcs02 {
    thread_local! {
        static MEMORY: DirectMap = DirectMap::of_host(Hpa::new(0x1_0000));
    }
    let phys = MEMORY.with(|memory| *memory);
    let frame = FramePool::new(Span::new(0x1000, 0x2000)).alloc(&phys).expect("a frame");
    Vmcs02::new(frame, &phys, 1)
}

/// A VMCS that counts what is written to it.
#[derive(Clone, Default)]
struct Written {
    values: HashMap<Field, u64>,
    counts: HashMap<Field, u32>,
}

impl Written {
    fn of(&self, field: Field) -> u64 {
        self.values.get(&field).copied().unwrap_or(0)
    }

    fn count(&self, field: Field) -> u32 {
        self.counts.get(&field).copied().unwrap_or(0)
    }
}

impl FieldAccess for Written {
    fn read(&mut self, field: Field) -> u64 {
        self.of(field)
    }

    fn write(&mut self, field: Field, value: u64) {
        self.values.insert(field, value);
        *self.counts.entry(field).or_default() += 1;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn nothing_that_l2_asked_for_is_dropped(controls in any::<[u32; 5]>()) {
        let hw = rich();
        let v = vmcs12(&offered(&hw), controls);
        let (pin, primary, secondary, exit, entry) = controls12(&v);
        let m = merged(&v, &hw, &TO);
        prop_assert!(m.pin.contains(pin));
        prop_assert!(m.primary.contains(primary));
        // The log is kept by nvmx.
        prop_assert!(m.secondary.contains(secondary - EMULATED));
        prop_assert!(!m.secondary.intersects(EMULATED));
        prop_assert_eq!(m.exit & ExitControls::ACK_INTERRUPT_ON_EXIT, exit & ExitControls::ACK_INTERRUPT_ON_EXIT);
        prop_assert_eq!(m.entry & OF_L3, entry & OF_L3);
    }

    /// vmcs02 has the merged controls whenever L3 runs for L2, whatever was in it and whatever nvmx changed for events of its own; and
    /// what stays is not written again.
    #[test]
    fn vmcs02_gets_what_was_merged(steps in prop::collection::vec((any::<[u32; 5]>(), 0u8..4), 1..12)) {
        let hw = rich();
        let (mut vmcs02, mut written) = (vmcs02(), Written::default());
        let mut now: Option<Vmcs02Controls> = None;
        for (controls, step) in steps {
            let mut stale = Stale::WINDOWS;
            match (step, &mut now) {
                (0, Some(now)) => {
                    // A window of L2.
                    now.primary ^= PrimaryControls::INTERRUPT_WINDOW_EXITING;
                }
                (1, Some(_)) => {
                    let (pin, primary) = (PinControls::NMI_EXITING, PrimaryControls::MONITOR_TRAP_FLAG);
                    vmcs02.alter_controls(&mut written, pin, primary, true);
                    prop_assert_eq!(written.of(PIN_BASED_VM_EXEC_CONTROL) >> 3 & 1, 1);
                    prop_assert_eq!(written.of(CPU_BASED_VM_EXEC_CONTROL) >> 27 & 1, 1);
                }
                (2, Some(_)) => {
                    // An unrestricted guest left IA-32e mode.
                    let entry = written.of(VM_ENTRY_CONTROLS);
                    written.write(VM_ENTRY_CONTROLS, entry ^ 1 << 9);
                    stale |= Stale::UNWRITTEN;
                }
                _ => {
                    now = Some(merged(&vmcs12(&offered(&hw), controls), &hw, &TO));
                    stale |= Stale::UNWRITTEN;
                }
            }
            let Some(now) = &now else { unreachable!("the first step merges") };
            let before = written.clone();
            vmcs02.write_controls(&mut written, now, stale);
            let own = [
                (PIN_BASED_VM_EXEC_CONTROL, Some(now.pin.bits().into())),
                (CPU_BASED_VM_EXEC_CONTROL, Some(now.primary.bits().into())),
                (VM_ENTRY_CONTROLS, Some(now.entry.bits().into())),
            ];
            for (field, value) in Vmcs02Controls::OTHERS.into_iter().zip(now.others()).chain(own) {
                if let Some(value) = value {
                    prop_assert_eq!(written.of(field), value, "{}", field);
                }
                let again = before.values.get(&field) == written.values.get(&field) && field != VM_ENTRY_CONTROLS;
                prop_assert!(!again || before.count(field) == written.count(field), "{} is written again", field);
            }
        }
    }

    #[test]
    fn nothing_is_added_that_l3_could_notice(controls in any::<[u32; 5]>()) {
        let hw = rich();
        let v = vmcs12(&offered(&hw), controls);
        let (pin, primary, secondary, ..) = controls12(&v);
        let m = merged(&v, &hw, &TO);
        prop_assert_eq!(m.pin, pin);
        prop_assert_eq!(m.primary - primary, PrimaryControls::ACTIVATE_SECONDARY_CONTROLS - primary);
        let own = SecondaryControls::ENABLE_EPT | SecondaryControls::ENABLE_VPID;
        prop_assert_eq!(m.secondary - own, secondary - own - EMULATED);
    }

    #[test]
    fn a_lost_bitmap_makes_more_exit_and_never_less(controls in any::<[u32; 5]>(), io: bool, msr: bool) {
        let hw = rich();
        let v = vmcs12(&offered(&hw), controls);
        let (_, primary, ..) = controls12(&v);
        let to = Translated { io_bitmaps: TO.io_bitmaps.filter(|_| io), msr_bitmap: TO.msr_bitmap.filter(|_| msr), ..TO };
        let m = merged(&v, &hw, &to);
        prop_assert!(m.primary.contains(intercepts(primary)));
        // A bitmap is used only if L2 uses one and it is there.
        let uses = |control| m.primary.contains(control);
        prop_assert_eq!(uses(PrimaryControls::USE_MSR_BITMAPS), primary.contains(PrimaryControls::USE_MSR_BITMAPS) && msr);
        let l2_bitmaps = primary.contains(PrimaryControls::USE_IO_BITMAPS);
        prop_assert_eq!(uses(PrimaryControls::USE_IO_BITMAPS), l2_bitmaps && io);
        if l2_bitmaps && !io {
            prop_assert!(uses(PrimaryControls::UNCONDITIONAL_IO_EXITING));
        }
    }

    #[test]
    fn the_host_side_is_a_function_of_nvmx_alone(a in any::<[u32; 5]>(), b in any::<[u32; 5]>()) {
        let hw = rich();
        let (a, b) = (vmcs12(&offered(&hw), a), vmcs12(&offered(&hw), b));
        // These two describe L3 and not the host, so they follow L2.
        let of_l3 = ExitControls::ACK_INTERRUPT_ON_EXIT
            | ExitControls::SAVE_PREEMPTION_TIMER
            | ExitControls::SAVE_PERF_GLOBAL_CTRL;
        let (a, b) = (merged(&a, &hw, &TO), merged(&b, &hw, &TO));
        prop_assert_eq!(a.exit - of_l3, b.exit - of_l3);
        prop_assert!(!a.exit.intersects(ExitControls::LOAD_CET | ExitControls::LOAD_PKRS | ExitControls::CLEAR_UINV));
        prop_assert_eq!(a.entry - OF_L3, b.entry - OF_L3);
        prop_assert_eq!((a.io_bitmaps, a.msr_bitmap), (TO.io_bitmaps, TO.msr_bitmap));
    }

    #[test]
    fn hardware_accepts_what_comes_out(controls in any::<[u32; 5]>(), fixed: u32, io: bool) {
        // Some of what nvmx implements is missing, and more of the default1 class than usual is fixed.
        let hw = Capabilities::read(
            |index| match index {
                msr::IA32_VMX_TRUE_PINBASED_CTLS => rich_msr(index) & !(u64::from(fixed & 0xA0) << 32),
                msr::IA32_VMX_TRUE_PROCBASED_CTLS => rich_msr(index) | u64::from(fixed & (1 << 15 | 1 << 16)),
                msr::IA32_VMX_TRUE_EXIT_CTLS => rich_msr(index) | u64::from(fixed & 1 << 2),
                msr::IA32_VMX_TRUE_ENTRY_CTLS => rich_msr(index) | u64::from(fixed & 1 << 2),
                msr::IA32_VMX_PROCBASED_CTLS2 => rich_msr(index) & !(u64::from(fixed & 0x11F51) << 32),
                other => rich_msr(other),
            },
            39,
            48,
        );
        let v = vmcs12(&offered(&hw), controls);
        let to = Translated { io_bitmaps: TO.io_bitmaps.filter(|_| io), ..TO };
        let m = merged(&v, &hw, &to);
        prop_assert!(hw.pin.accepts(m.pin.bits()));
        prop_assert!(hw.primary.accepts(m.primary.bits()));
        prop_assert!(hw.secondary.accepts(m.secondary.bits()));
        prop_assert!(hw.exit.accepts(m.exit.bits()));
        prop_assert!(hw.entry.accepts(m.entry.bits()));
        // Rules between controls, as the processor checks them.
        let timer = m.pin.contains(PinControls::PREEMPTION_TIMER);
        prop_assert_eq!(timer, m.exit.contains(ExitControls::SAVE_PREEMPTION_TIMER));
        prop_assert!(m.pin.contains(PinControls::NMI_EXITING) || !m.pin.contains(PinControls::VIRTUAL_NMIS));
    }
}

#[test]
fn nvmx_s_own_controls_are_always_there() {
    let hw = rich();
    let m = merged(&vmcs12(&offered(&hw), [0; 5]), &hw, &TO);
    assert!(m.primary.contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS));
    assert!(m.secondary.contains(SecondaryControls::ENABLE_EPT | SecondaryControls::ENABLE_VPID));
    assert!(!m.secondary.contains(SecondaryControls::UNRESTRICTED_GUEST), "L2 has no EPT for this guest");
    for control in [
        ExitControls::HOST_ADDRESS_SPACE_SIZE,
        ExitControls::SAVE_DEBUG_CONTROLS,
        ExitControls::SAVE_PAT,
        ExitControls::LOAD_PAT,
        ExitControls::SAVE_EFER,
        ExitControls::LOAD_EFER,
    ] {
        assert!(m.exit.contains(control), "{control:?}");
    }
    assert!(m.entry.contains(EntryControls::LOAD_EFER | EntryControls::LOAD_PAT | EntryControls::LOAD_DEBUG_CONTROLS));
    assert!(!m.exit.contains(ExitControls::SAVE_PREEMPTION_TIMER), "it needs the timer");
}

#[test]
fn secondary_controls_that_l2_did_not_activate_do_not_run() {
    let hw = rich();
    let mut v = valid_vmcs12(&offered(&hw));
    v.clear(CPU_BASED_VM_EXEC_CONTROL, 1 << 31).set(SECONDARY_VM_EXEC_CONTROL, 0xFFFF_FFFF);
    let m = merged(&v, &hw, &TO);
    assert_eq!(m.secondary, SecondaryControls::ENABLE_EPT | SecondaryControls::ENABLE_VPID);
    assert!(m.duties.contains(Duties::LOAD_PDPTES | Duties::FLUSH_VPID));
}

#[test]
fn values_that_belong_to_a_control_come_along() {
    let hw = rich();
    let mut v = valid_vmcs12(&offered(&hw));
    v.set(XSS_EXITING_BITMAP, 0x1234_5678_9ABC).set(PLE_GAP, 0x80).set(PLE_WINDOW, 0x1000);
    let m = merged(&v, &hw, &TO);
    assert_eq!((m.xss_exiting_bitmap, m.ple_gap, m.ple_window), (0x1234_5678_9ABC, 0x80, 0x1000));
}

#[test]
fn each_duty_follows_one_control_of_l2() {
    let hw = rich();
    let caps = offered(&hw);
    let cases =
        [(SECONDARY_VM_EXEC_CONTROL, 1, Duties::LOAD_PDPTES), (SECONDARY_VM_EXEC_CONTROL, 5, Duties::FLUSH_VPID)];
    let mut all_on = valid_vmcs12(&caps);
    for (field, bit, _) in cases {
        all_on.or(field, 1 << bit);
    }
    assert_eq!(merged(&all_on, &hw, &TO).duties, Duties::empty());
    for (field, bit, duty) in cases {
        let mut v = all_on.clone();
        v.clear(field, 1 << bit);
        assert_eq!(merged(&v, &hw, &TO).duties, duty);
    }
    let mut both = Duties::FLUSH_EPT01 | cases[0].2 | cases[1].2;
    for (bit, duty) in [(14, Duties::LINK_SHADOW_VMCS), (23, Duties::POINT_TO_SUB_PAGES)] {
        let mut with = all_on.clone();
        with.or(SECONDARY_VM_EXEC_CONTROL, 1 << bit);
        assert_eq!(merged(&with, &hw, &TO).duties, duty);
        both |= duty;
    }
    assert_eq!(both, Duties::all());
}

#[test]
fn each_page_of_the_virtual_apic_comes_with_its_control() {
    let hw = rich();
    let pages = |change: fn(&mut Vmcs)| {
        let mut v = valid_vmcs12(&offered(&hw));
        change(&mut v);
        let m = merged(&v, &hw, &TO);
        [m.virtual_apic, m.apic_access, m.posted_descriptor]
    };
    let ApicPages { virtual_apic, apic_access, posted_descriptor } = TO.apic;
    assert_eq!(pages(|_| ()), [None; 3]);
    assert_eq!(pages(|v| _ = v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 21)), [Some(virtual_apic), None, None]);
    assert_eq!(pages(|v| _ = v.or(SECONDARY_VM_EXEC_CONTROL, 1)), [None, Some(apic_access), None]);
    let posted = pages(|v| {
        v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 21).or(SECONDARY_VM_EXEC_CONTROL, 1 << 9);
        v.or(PIN_BASED_VM_EXEC_CONTROL, 1 << 7 | 1).or(VM_EXIT_CONTROLS, 1 << 15);
    });
    assert_eq!(posted, [Some(virtual_apic), None, Some(posted_descriptor)]);
}

#[test]
fn virtualized_apic_accesses_on_ept01_flush_it() {
    let hw = rich();
    let duty = |accesses: u64, ept: u64| {
        let mut v = valid_vmcs12(&offered(&hw));
        v.clear(SECONDARY_VM_EXEC_CONTROL, 0b11).or(SECONDARY_VM_EXEC_CONTROL, accesses | ept << 1);
        merged(&v, &hw, &TO).duties.contains(Duties::FLUSH_EPT01)
    };
    assert_eq!([duty(0, 0), duty(0, 1), duty(1, 1), duty(1, 0)], [false, false, false, true]);
}

#[test]
fn shadowing_runs_only_where_the_hardware_gets_bitmaps_for_it() {
    let hw = rich();
    let mut v = valid_vmcs12(&offered(&hw));
    v.or(CPU_BASED_VM_EXEC_CONTROL, 1 << 31).or(SECONDARY_VM_EXEC_CONTROL, 1 << 14);
    let by_hardware = merged(&v, &hw, &TO);
    assert!(by_hardware.secondary.contains(SecondaryControls::VMCS_SHADOWING));
    assert_eq!(by_hardware.shadow_bitmaps, TO.shadow_bitmaps);
    let by_nvmx = merged(&v, &hw, &Translated { shadow_bitmaps: None, ..TO });
    assert!(!by_nvmx.secondary.contains(SecondaryControls::VMCS_SHADOWING), "every access exits");
    assert!(by_nvmx.duties.contains(Duties::LINK_SHADOW_VMCS));
}
