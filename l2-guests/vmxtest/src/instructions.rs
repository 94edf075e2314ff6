//! The VMX instructions in VMX root operation: what they do and how they fail (SDM "VMX Instruction Reference" and
//! "VM-Instruction Error Numbers").

use crate::{
    expect::{INVALID, SUCCEED, expect, fail, got},
    tertiary::{PROCBASED_CTLS3, VIRTUALIZE_SPEC_CTRL},
    vmxon::too_wide,
};
use l2_kit::{
    Check, caps, fields as f,
    protocol::Hex,
    serial::Serial,
    setup::{self, Kind, entry_controls, exit_controls, pin, primary, secondary},
    vmx,
};

/// An encoding that no CPU knows: the highest index of a 16-bit control.
const NO_FIELD: u64 = 0x03FE;

/// All of it, given the address of the VMXON region.
pub fn all(vmxon: u64) {
    without_vmcs(vmxon);
    with_vmcs(vmxon);
}

/// While there is no current VMCS every failure is VMfailInvalid.
fn without_vmcs(vmxon: u64) {
    let (outcome, pointer) = vmx::vmptrst();
    Check::new(&mut Serial, "no VMCS: vmptrst")
        .fact("result", outcome)
        .expect("pointer", Hex(pointer), Hex(u64::MAX))
        .end();
    let region = setup::region();
    let rip = u64::from(f::GUEST_RIP);
    expect("no VMCS: vmread", got(|| vmx::try_read(rip).0), INVALID);
    expect("no VMCS: vmwrite", got(|| vmx::try_write(rip, 0)), INVALID);
    expect("no VMCS: vmlaunch", got(vmx::vmlaunch), INVALID);
    expect("no VMCS: vmresume", got(vmx::vmresume), INVALID);
    expect("no VMCS: vmcall", got(vmx::vmcall), INVALID);
    expect("no VMCS: vmclear misaligned", got(|| vmx::vmclear(region + 1)), INVALID);
    expect("no VMCS: vmclear of the vmxon region", got(|| vmx::vmclear(vmxon)), INVALID);
    expect("no VMCS: vmptrld misaligned", got(|| vmx::vmptrld(region + 1)), INVALID);
    expect("no VMCS: vmptrld of the vmxon region", got(|| vmx::vmptrld(vmxon)), INVALID);
    expect("no VMCS: vmread of no field", got(|| vmx::try_read(NO_FIELD).0), INVALID);
    invalidations("no VMCS: ", INVALID);
}

/// With a current VMCS failures have numbers.
fn with_vmcs(vmxon: u64) {
    let (a, b) = (setup::region(), setup::region());
    expect("vmclear", got(|| vmx::vmclear(a)), SUCCEED);
    expect("vmclear again", got(|| vmx::vmclear(a)), SUCCEED);
    expect("vmptrld", got(|| vmx::vmptrld(a)), SUCCEED);
    pointers(a, vmxon);
    expect("vmptrld again", got(|| vmx::vmptrld(a)), SUCCEED);
    expect("vmxon again", got(|| vmx::vmxon(vmxon)), fail(15));
    expect("vmxon misaligned with a VMCS", got(|| vmx::vmxon(vmxon + 8)), fail(15));
    // Without the dual-monitor treatment of SMIs, whatever the VMCS is.
    expect("vmcall with a clear VMCS", got(vmx::vmcall), fail(1));
    expect("vmresume of a clear VMCS", got(vmx::vmresume), fail(5));
    expect("vmlaunch of an empty VMCS", got(vmx::vmlaunch), fail(7));
    components();
    invalidations("", fail(28));
    switching(a, b);
    fields();
    expect("vmclear of the current VMCS", got(|| vmx::vmclear(a)), SUCCEED);
    let (_, pointer) = vmx::vmptrst();
    Check::new(&mut Serial, "vmptrst after vmclear").expect("pointer", Hex(pointer), Hex(u64::MAX)).end();
}

fn pointers(current: u64, vmxon: u64) {
    let other = setup::region();
    expect("vmclear misaligned", got(|| vmx::vmclear(other + 8)), fail(2));
    expect("vmclear beyond the address width", got(|| vmx::vmclear(other | too_wide())), fail(2));
    expect("vmclear of the vmxon region", got(|| vmx::vmclear(vmxon)), fail(3));
    expect("vmptrld misaligned", got(|| vmx::vmptrld(other + 0x800)), fail(9));
    expect("vmptrld beyond the address width", got(|| vmx::vmptrld(other | too_wide())), fail(9));
    expect("vmptrld of the vmxon region", got(|| vmx::vmptrld(vmxon)), fail(10));
    // SAFETY: the region is ours and not the current VMCS.
    let words = unsafe { l2_kit::pages::at(other) };
    words[0] = u64::from(setup::revision() ^ 1);
    expect("vmptrld with a wrong revision", got(|| vmx::vmptrld(other)), fail(11));
    let (outcome, pointer) = vmx::vmptrst();
    Check::new(&mut Serial, "vmptrst after failed vmptrld")
        .fact("result", outcome)
        .expect("pointer", pointer == current, true)
        .end();
}

fn components() {
    expect("vmread of no field", got(|| vmx::try_read(NO_FIELD).0), fail(12));
    expect("vmread with high bits", got(|| vmx::try_read(1 << 32 | u64::from(f::GUEST_RIP)).0), fail(12));
    expect("vmread with bit 31", got(|| vmx::try_read(1 << 31 | u64::from(f::GUEST_RIP)).0), fail(12));
    expect(
        "vmread of the high half of a 32-bit field",
        got(|| vmx::try_read(u64::from(f::EXIT_REASON) | 1).0),
        fail(12),
    );
    expect("vmwrite of no field", got(|| vmx::try_write(NO_FIELD, 0)), fail(12));
    expect("vmwrite with high bits", got(|| vmx::try_write(1 << 32 | u64::from(f::GUEST_RIP), 0)), fail(12));
    // IA32_VMX_MISC bit 29: VMWRITE to read-only fields is allowed.
    let wanted = if caps::own_or_0(setup::VMX_MISC) & 1 << 29 != 0 { SUCCEED } else { fail(13) };
    let read_only = got(|| vmx::try_write(f::EXIT_REASON.into(), 0));
    Check::new(&mut Serial, "vmwrite of a read-only field").expect("as_misc_says", read_only == wanted, true).end();
    // Success leaves the error of the last failure.
    let _ = vmx::vmclear(1);
    let _ = vmx::try_read(f::GUEST_RIP.into());
    Check::new(&mut Serial, "the instruction error stays").expect("error", vmx::read(f::INSTRUCTION_ERROR), 2).end();
}

/// INVEPT and INVVPID (SDM "INVEPT—Invalidate Translations Derived from EPT", "INVVPID—...").
fn invalidations(prefix: &str, refused: crate::expect::Got) {
    let capabilities = caps::get(setup::VMX_EPT_VPID_CAP);
    let has = |bit: u32| capabilities >> bit & 1 != 0;
    let pointer = setup::region() & !0xFFF | 3 << 3 | 6;
    if has(20) {
        let cases: [(&str, u64, [u64; 2], bool); 6] = [
            ("of one context", 1, [pointer, 0], has(25)),
            ("of all contexts", 2, [0, 0], has(26)),
            ("of type 0", 0, [pointer, 0], false),
            ("of type 3", 3, [pointer, 0], false),
            ("of a context with memory type 2", 1, [pointer & !7 | 2, 0], false),
            ("of a context beyond the address width", 1, [pointer | too_wide(), 0], false),
        ];
        for (name, kind, descriptor, good) in cases {
            let wanted = if good { SUCCEED } else { refused };
            expect(format_args!("{prefix}invept {name}"), got(|| vmx::invept(kind, descriptor)), wanted);
        }
    }
    if has(32) {
        const NOT_CANONICAL: u64 = 1 << 62;
        let cases: [(&str, u64, [u64; 2], bool); 11] = [
            ("of an address", 0, [1, 0x1000], has(40)),
            ("of a context", 1, [1, 0], has(41)),
            ("of all contexts", 2, [0, 0], has(42)),
            ("of a context but its global pages", 3, [1, 0], has(43)),
            ("of type 4", 4, [1, 0], false),
            ("of an address that is not canonical", 0, [1, NOT_CANONICAL], false),
            ("of an address of VPID 0", 0, [0, 0x1000], false),
            ("of VPID 0", 1, [0, 0], false),
            ("of VPID 0 but its global pages", 3, [0, 0], false),
            ("with reserved bits", 1, [1 << 16 | 1, 0], false),
            ("of all contexts with a VPID", 2, [1, 0], has(42)),
        ];
        for (name, kind, descriptor, good) in cases {
            let wanted = if good { SUCCEED } else { refused };
            expect(format_args!("{prefix}invvpid {name}"), got(|| vmx::invvpid(kind, descriptor)), wanted);
        }
    }
}

/// A VMCS keeps its fields while another one is current, and over VMCLEAR.
fn switching(a: u64, b: u64) {
    let rip = f::GUEST_RIP;
    let load = |region| got(|| vmx::vmptrld(region));
    let clear = |region| got(|| vmx::vmclear(region));
    vmx::write(rip, 0xA);
    let (cleared, loaded) = (clear(b), load(b));
    vmx::write(rip, 0xB);
    let reloaded = load(a);
    let first = vmx::read(rip);
    let other_cleared = clear(b);
    let still = vmx::vmptrst().1 == a;
    let (own_cleared, own_loaded) = (clear(a), load(a));
    let after_clear = vmx::read(rip);
    let second_loaded = load(b);
    let second = vmx::read(rip);
    let _ = load(a);
    Check::new(&mut Serial, "fields stay with their VMCS")
        .expect("vmclear_b", cleared, SUCCEED)
        .expect("vmptrld_b", loaded, SUCCEED)
        .expect("vmptrld_a", reloaded, SUCCEED)
        .expect("a", first, 0xA)
        .expect("vmclear_other", other_cleared, SUCCEED)
        .expect("current_is_a", still, true)
        .expect("vmclear_a", own_cleared, SUCCEED)
        .expect("vmptrld_a_again", own_loaded, SUCCEED)
        .expect("a_after_vmclear", after_clear, 0xA)
        .expect("vmptrld_b_again", second_loaded, SUCCEED)
        .expect("b", second, 0xB)
        .end();
}

/// Whether the SDM says that a field exists with these capability MSRs; `None` if this test leaves it out.
fn exists(field: u32, rdmsr: fn(u32) -> u64) -> Option<bool> {
    let one = |kind: Kind, bits: u32| (kind.allowed_by(rdmsr) >> 32) as u32 & bits == bits;
    Some(match field {
        f::VPID => one(Kind::Secondary, secondary::VPID),
        f::EPTP_INDEX | f::VE_INFORMATION => one(Kind::Secondary, secondary::EPT_VIOLATION_VE),
        f::VM_FUNCTION_CONTROLS => one(Kind::Secondary, secondary::VM_FUNCTIONS),
        f::EPTP_LIST => one(Kind::Secondary, secondary::VM_FUNCTIONS) && rdmsr(setup::VMX_VMFUNC) & 1 != 0,
        f::SPPTP => one(Kind::Secondary, secondary::SUB_PAGES),
        f::TSC_MULTIPLIER => one(Kind::Secondary, secondary::TSC_SCALING),
        f::EPTP | f::GUEST_PHYSICAL_ADDRESS => one(Kind::Secondary, secondary::EPT),
        f::GUEST_PDPTE0..=f::GUEST_PDPTE3 => one(Kind::Secondary, secondary::EPT),
        f::GUEST_PAT => one(Kind::Entry, entry_controls::LOAD_PAT),
        f::HOST_PAT => one(Kind::Exit, exit_controls::LOAD_PAT),
        f::GUEST_EFER => one(Kind::Entry, entry_controls::LOAD_EFER),
        f::HOST_EFER => one(Kind::Exit, exit_controls::LOAD_EFER),
        f::MSR_BITMAP => one(Kind::Primary, primary::MSR_BITMAPS),
        f::SECONDARY_CONTROLS => one(Kind::Primary, primary::SECONDARY),
        f::PREEMPTION_TIMER => one(Kind::Pin, pin::PREEMPTION_TIMER),
        f::POSTED_INT_VECTOR | f::POSTED_INT_DESCRIPTOR => one(Kind::Pin, pin::POSTED_INTERRUPTS),
        f::GUEST_INTERRUPT_STATUS | f::EOI_EXIT0 | f::EOI_EXIT1 | f::EOI_EXIT2 | f::EOI_EXIT3 => {
            one(Kind::Secondary, secondary::VIRTUAL_INTERRUPTS)
        }
        f::VIRTUAL_APIC | f::TPR_THRESHOLD => one(Kind::Primary, primary::TPR_SHADOW),
        f::APIC_ACCESS => one(Kind::Secondary, secondary::APIC_ACCESSES),
        f::TERTIARY_CONTROLS => one(Kind::Primary, primary::TERTIARY),
        f::SPEC_CTRL_MASK | f::SPEC_CTRL_SHADOW => {
            one(Kind::Primary, primary::TERTIARY) && rdmsr(PROCBASED_CTLS3) & VIRTUALIZE_SPEC_CTRL != 0
        }
        f::GUEST_S_CET | f::GUEST_SSP | f::GUEST_SSP_TABLE => one(Kind::Entry, entry_controls::LOAD_CET),
        f::HOST_S_CET | f::HOST_SSP | f::HOST_SSP_TABLE => one(Kind::Exit, exit_controls::LOAD_CET),
        f::GUEST_PKRS => one(Kind::Entry, entry_controls::LOAD_PKRS),
        f::HOST_PKRS => one(Kind::Exit, exit_controls::LOAD_PKRS),
        f::GUEST_UINV => one(Kind::Entry, entry_controls::LOAD_UINV) || one(Kind::Exit, exit_controls::CLEAR_UINV),
        // Features that not every machine of this test offers
        f::PML_INDEX
        | f::EXECUTIVE_VMCS
        | f::PML_ADDR
        | f::VMREAD_BITMAP
        | f::VMWRITE_BITMAP
        | f::XSS_EXITING
        | f::GUEST_PERF_GLOBAL_CTRL
        | f::HOST_PERF_GLOBAL_CTRL
        | f::PLE_GAP
        | f::PLE_WINDOW => return None,
        _ => true,
    })
}

/// Every field takes all ones in its width and gives them back. Width and area are in the encoding (SDM "Structure of VMCS
/// Component Encoding").
fn fields() {
    for &(name, field) in f::ALL {
        let (Some(offered), Some(own)) = (exists(field, caps::get), exists(field, caps::own_or_0)) else { continue };
        let (width, read_only, rights) =
            (field >> 13 & 3, field >> 10 & 3 == 1, (f::GUEST_ES_AR..=f::GUEST_TR_AR).contains(&field));
        let mut out = Serial;
        let check = Check::new(&mut out, format_args!("field {name}")).fact("offered", offered);
        if !offered {
            // The CPU may have more than this image goes by.
            let wanted = if own { SUCCEED } else { fail(12) };
            check.expect("as_the_cpu_says", got(|| vmx::try_read(field.into()).0) == wanted, true).end();
            continue;
        }
        let check = check.expect("vmread", got(|| vmx::try_read(field.into()).0), SUCCEED);
        // Read-only fields may be writable; reserved bits of access rights may be dropped.
        if read_only || rights {
            check.end();
            continue;
        }
        let mask = match width {
            0 => 0xFFFF,
            2 => 0xFFFF_FFFF,
            _ => u64::MAX,
        };
        let before = vmx::read(field);
        let written = got(|| vmx::try_write(field.into(), u64::MAX));
        let value = vmx::read(field);
        let mut check = check.expect("vmwrite", written, SUCCEED).expect("value", Hex(value), Hex(mask));
        if width == 1 {
            let high = field | 1;
            check = check.expect("high", Hex(vmx::read(high)), Hex(0xFFFF_FFFF));
            vmx::write(high, 0);
            check = check.expect("low", Hex(vmx::read(field)), Hex(0xFFFF_FFFF));
        }
        vmx::write(field, before);
        check.end();
    }
}
