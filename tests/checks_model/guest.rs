//! Guest state, a second time.

use super::core_support::{CONTEXT, Memory};
use super::{Violations, bit, canonical, fixed, get, none_of, pat};
use nvmx::addr::Gpa;
use nvmx::rules::checks::ReadsGuest;
use nvmx::vmx::region::REVISION;
use nvmx::vmx::{Capabilities, Field, Field::*, Fields};

/// A segment register taken apart.
struct Seg {
    selector: u64,
    base: u64,
    limit: u64,
    rights: u64,
    usable: bool,
}

impl Seg {
    fn of(v: &impl Fields, [selector, base, limit, rights]: [Field; 4]) -> Self {
        let rights = get(v, rights);
        Seg { selector: get(v, selector), base: get(v, base), limit: get(v, limit), rights, usable: !bit(rights, 16) }
    }

    fn kind(&self) -> u64 {
        self.rights % 16
    }

    fn rpl(&self) -> u64 {
        self.selector % 4
    }

    fn dpl(&self) -> u64 {
        self.rights >> 5 & 3
    }

    fn reserved_are_0(&self) -> bool {
        none_of(self.rights, (8..12).chain(17..32))
    }

    /// G must be 0 unless the limit ends with twelve ones, and 1 if the limit is above a megabyte.
    fn granularity(&self) -> bool {
        let g = bit(self.rights, 15);
        let ends_with_ones = self.limit % 4096 == 4095;
        (ends_with_ones || !g) && (self.limit < 1 << 20 || g)
    }

    /// S, P, reserved bits and G of TR or LDTR.
    fn system(&self) -> bool {
        !bit(self.rights, 4) && bit(self.rights, 7) && self.reserved_are_0() && self.granularity()
    }
}

/// What the rules on the link pointer depend on: the current VMCS and the revision identifier.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub current: Gpa,
    pub revision: u32,
}

/// Names of all rules on the guest-state area that `v` violates, with the revision that nvmx shows.
pub fn violations(v: &impl Fields, caps: &Capabilities, memory: &Memory) -> Violations {
    violations_at(v, caps, memory, Place { current: CONTEXT.current_vmptr, revision: REVISION })
}

/// The same for any VMCS.
pub fn violations_at(v: &impl Fields, caps: &Capabilities, memory: &impl ReadsGuest, place: Place) -> Violations {
    let mut broken = Violations::new();
    registers(v, caps, &mut |name, holds| put(&mut broken, name, holds));
    segments(v, caps, &mut |name, holds| put(&mut broken, name, holds));
    other(v, caps, &mut |name, holds| put(&mut broken, name, holds));
    in_memory(v, caps, memory, place, &mut |name, holds| put(&mut broken, name, holds));
    broken
}

fn put(broken: &mut Violations, name: &'static str, holds: bool) {
    if !holds {
        broken.insert(name);
    }
}

type Demand<'a> = &'a mut dyn FnMut(&'static str, bool);

fn secondary(v: &impl Fields) -> u64 {
    if bit(get(v, CPU_BASED_VM_EXEC_CONTROL), 31) { get(v, SECONDARY_VM_EXEC_CONTROL) } else { 0 }
}

fn unrestricted(v: &impl Fields) -> bool {
    bit(secondary(v), 7)
}

fn ia32e(v: &impl Fields) -> bool {
    bit(get(v, VM_ENTRY_CONTROLS), 9)
}

fn registers(v: &impl Fields, caps: &Capabilities, demand: Demand<'_>) {
    let msr = |index| caps.msr(index).unwrap();
    let entry = get(v, VM_ENTRY_CONTROLS);
    let (cr0, cr4) = (get(v, GUEST_CR0), get(v, GUEST_CR4));
    let (paging, pae) = (bit(cr0, 31), bit(cr4, 5));
    let free: &[u32] = if unrestricted(v) { &[0, 31] } else { &[] };
    demand("GuestCr0", fixed(cr0, msr(0x486), msr(0x487), free));
    if paging {
        demand("GuestPgNeedsPe", bit(cr0, 0));
    }
    demand("GuestCr4", fixed(cr4, msr(0x488), msr(0x489), &[]));
    if bit(cr4, 23) {
        demand("GuestCetNeedsWp", bit(cr0, 16));
    }
    if ia32e(v) {
        demand("GuestIa32eNeedsPaging", paging && pae);
    } else {
        demand("GuestPcideNeedsIa32e", !bit(cr4, 17));
    }
    demand("GuestCr3", none_of(get(v, GUEST_CR3), (caps.physical_width..64).filter(|i| !bit(caps.cr3_flags, *i))));
    if bit(entry, 2) {
        demand("GuestDebugctl", none_of(get(v, GUEST_IA32_DEBUGCTL), (3..6).chain(16..64)));
        demand("GuestDr7", get(v, GUEST_DR7) < 1 << 32);
    }
    let canonical = |field| canonical(get(v, field), caps.linear_width);
    demand("GuestSysenter", canonical(GUEST_SYSENTER_ESP) && canonical(GUEST_SYSENTER_EIP));
    if bit(entry, 14) {
        demand("GuestPat", pat(get(v, GUEST_IA32_PAT)));
    }
    if bit(entry, 15) {
        let efer = get(v, GUEST_IA32_EFER);
        demand("GuestEferReserved", none_of(efer, (1..8).chain([9]).chain(12..64)));
        demand("GuestEferLma", bit(efer, 10) == ia32e(v));
        demand("GuestEferLme", !paging || bit(efer, 8) == bit(efer, 10));
    }
    // An address that the guest's mode can use.
    let linear = |field| if ia32e(v) { canonical(field) } else { get(v, field) < 1 << 32 };
    if bit(entry, 20) {
        demand("GuestSCet", super::s_cet(get(v, GUEST_S_CET)) && linear(GUEST_S_CET));
        demand("GuestSsp", get(v, GUEST_SSP) % 4 == 0 && linear(GUEST_SSP));
        demand("GuestSspTable", canonical(GUEST_INTR_SSP_TABLE));
    }
    if bit(entry, 22) {
        demand("GuestPkrs", none_of(get(v, GUEST_IA32_PKRS), 32..64));
    }
    if bit(entry, 13) {
        let free = (0..64).filter(|i| !bit(caps.counters, *i));
        demand("GuestPerfGlobalCtrl", none_of(get(v, GUEST_IA32_PERF_GLOBAL_CTRL), free));
    }
    if bit(entry, 19) {
        demand("GuestUinv", get(v, GUEST_UINV) < 256);
    }
}

const ES: [Field; 4] = [GUEST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_AR_BYTES];
const CS: [Field; 4] = [GUEST_CS_SELECTOR, GUEST_CS_BASE, GUEST_CS_LIMIT, GUEST_CS_AR_BYTES];
const SS: [Field; 4] = [GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_AR_BYTES];
const DS: [Field; 4] = [GUEST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_AR_BYTES];
const FS: [Field; 4] = [GUEST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_AR_BYTES];
const GS: [Field; 4] = [GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_AR_BYTES];
const LDTR: [Field; 4] = [GUEST_LDTR_SELECTOR, GUEST_LDTR_BASE, GUEST_LDTR_LIMIT, GUEST_LDTR_AR_BYTES];
const TR: [Field; 4] = [GUEST_TR_SELECTOR, GUEST_TR_BASE, GUEST_TR_LIMIT, GUEST_TR_AR_BYTES];

fn segments(v: &impl Fields, caps: &Capabilities, demand: Demand<'_>) {
    let [es, cs, ss, ds, fs, gs, ldtr, tr] = [ES, CS, SS, DS, FS, GS, LDTR, TR].map(|fields| Seg::of(v, fields));
    let v86 = bit(get(v, GUEST_RFLAGS), 17);
    let real = !bit(get(v, GUEST_CR0), 0);
    let canonical = |base| canonical(base, caps.linear_width);

    // Selectors, then bases
    demand("GuestTrSelector", !bit(tr.selector, 2));
    demand("GuestLdtrSelector", !ldtr.usable || !bit(ldtr.selector, 2));
    if !v86 && !unrestricted(v) {
        demand("GuestSsRpl", ss.rpl() == cs.rpl());
    }
    let ldtr_base = !ldtr.usable || canonical(ldtr.base);
    demand("GuestBaseCanonical", canonical(tr.base) && canonical(fs.base) && canonical(gs.base) && ldtr_base);
    let low = |seg: &Seg| seg.base < 1 << 32;
    demand("GuestBase32Bit", low(&cs) && [&ss, &ds, &es].iter().all(|seg| !seg.usable || low(seg)));

    if v86 {
        let all = [&cs, &ss, &ds, &es, &fs, &gs];
        demand("GuestV86Base", all.iter().all(|seg| seg.base == 16 * seg.selector));
        demand("GuestV86Limit", all.iter().all(|seg| seg.limit == 65_535));
        demand("GuestV86Rights", all.iter().all(|seg| seg.rights == 0b1111_0011));
    } else {
        demand("GuestCsType", [9, 11, 13, 15].contains(&cs.kind()) || unrestricted(v) && cs.kind() == 3);
        demand("GuestSsType", !ss.usable || ss.kind() == 3 || ss.kind() == 7);
        let data_type = |seg: &Seg| bit(seg.rights, 0) && (!bit(seg.rights, 3) || bit(seg.rights, 1));
        demand("GuestDataType", [&ds, &es, &fs, &gs].iter().all(|seg| !seg.usable || data_type(seg)));
        let counted: Vec<&Seg> = [&ss, &ds, &es, &fs, &gs].into_iter().filter(|seg| seg.usable).chain([&cs]).collect();
        demand("GuestSegmentS", counted.iter().all(|seg| bit(seg.rights, 4)));
        let cs_dpl = match cs.kind() {
            3 => cs.dpl() == 0,
            9 | 11 => cs.dpl() == ss.dpl(),
            13 | 15 => cs.dpl() <= ss.dpl(),
            // No code at all: the rule on the type is broken.
            _ => true,
        };
        demand("GuestCsDpl", cs_dpl);
        let matches_rpl = unrestricted(v) || ss.dpl() == ss.rpl();
        demand("GuestSsDpl", matches_rpl && (!(cs.kind() == 3 || real) || ss.dpl() == 0));
        let data_dpl = |seg: &Seg| !seg.usable || seg.kind() >= 12 || seg.dpl() >= seg.rpl();
        demand("GuestDataDpl", unrestricted(v) || [&ds, &es, &fs, &gs].into_iter().all(data_dpl));
        demand("GuestSegmentPresent", counted.iter().all(|seg| bit(seg.rights, 7)));
        demand("GuestSegmentReserved", counted.iter().all(|seg| seg.reserved_are_0()));
        demand("GuestCsDb", !(ia32e(v) && bit(cs.rights, 13) && bit(cs.rights, 14)));
        demand("GuestSegmentGranularity", counted.iter().all(|seg| seg.granularity()));
    }

    let tss: &[u64] = if ia32e(v) { &[11] } else { &[3, 11] };
    demand("GuestTrType", tss.contains(&tr.kind()));
    demand("GuestTrRights", tr.usable && tr.system());
    demand("GuestLdtrRights", !ldtr.usable || ldtr.kind() == 2 && ldtr.system());
    demand("GuestTableBase", canonical(get(v, GUEST_GDTR_BASE)) && canonical(get(v, GUEST_IDTR_BASE)));
    demand("GuestTableLimit", get(v, GUEST_GDTR_LIMIT) < 1 << 16 && get(v, GUEST_IDTR_LIMIT) < 1 << 16);
}

/// RIP, RFLAGS, activity, interruptibility, pending debug exceptions.
fn other(v: &impl Fields, caps: &Capabilities, demand: Demand<'_>) {
    let (rip, flags, info) = (get(v, GUEST_RIP), get(v, GUEST_RFLAGS), get(v, VM_ENTRY_INTR_INFO_FIELD));
    if ia32e(v) && bit(get(v, GUEST_CS_AR_BYTES), 13) {
        let first = bit(rip, caps.linear_width);
        demand("GuestRip", (caps.linear_width..64).all(|i| bit(rip, i) == first));
    } else {
        demand("GuestRip", rip < 1 << 32);
    }
    demand("GuestRflagsReserved", none_of(flags, [3, 5, 15].into_iter().chain(22..64)) && bit(flags, 1));
    demand("GuestRflagsVm", !bit(flags, 17) || !ia32e(v) && bit(get(v, GUEST_CR0), 0));
    let injected = bit(info, 31).then_some((info >> 8 & 7, info & 0xFF));
    let external = matches!(injected, Some((0, _)));
    let nmi = matches!(injected, Some((2, _)));
    let interrupts = bit(flags, 9);
    demand("GuestRflagsIf", !external || interrupts);

    let activity = get(v, GUEST_ACTIVITY_STATE);
    // Activity states 1 to 3 are bits 6 to 8 of IA32_VMX_MISC.
    let misc = caps.msr(0x485).unwrap();
    demand("GuestActivity", activity == 0 || activity < 4 && bit(misc, 5 + activity as u32));
    demand("GuestActivityHltDpl", activity != 1 || get(v, GUEST_SS_AR_BYTES) >> 5 & 3 == 0);
    let blocking = get(v, GUEST_INTERRUPTIBILITY_INFO);
    let (sti, mov_ss) = (bit(blocking, 0), bit(blocking, 1));
    demand("GuestActivityBlocking", activity == 0 || !sti && !mov_ss);
    if let Some(event) = injected {
        let taken =
            matches!((activity, event), (0, _) | (1, (0 | 2, _) | (3, 1 | 18) | (7, 0)) | (2, (2, _) | (3, 18)));
        demand("GuestActivityEvent", taken);
    }
    demand("GuestInterruptibilityReserved", none_of(blocking, 5..32));
    demand("GuestBlockingStiAndMovSs", !(sti && mov_ss));
    demand("GuestBlockingStiNeedsIf", !sti || interrupts);
    demand("GuestBlockingExternalInterrupt", !external || !sti && !mov_ss);
    demand("GuestBlockingNmiMovSs", !nmi || !mov_ss);
    demand("GuestBlockingNmiSti", !nmi || !sti);
    demand("GuestBlockingSmi", !bit(blocking, 2));
    let virtual_nmis = bit(get(v, PIN_BASED_VM_EXEC_CONTROL), 5);
    demand("GuestBlockingNmi", !(nmi && virtual_nmis && bit(blocking, 3)));
    demand("GuestBlockingEnclave", !bit(blocking, 4));

    let pending = get(v, GUEST_PENDING_DBG_EXCEPTIONS);
    demand("GuestPendingDebugReserved", none_of(pending, (4..11).chain([13, 15]).chain(17..64)));
    if sti || mov_ss || activity == 1 {
        let stepping = bit(flags, 8) && !bit(get(v, GUEST_IA32_DEBUGCTL), 1);
        demand("GuestPendingDebugStep", bit(pending, 14) == stepping);
    }
    if bit(pending, 16) {
        demand("GuestPendingDebugRtm", pending == 0x1_1000 && !mov_ss);
    }
}

/// The link pointer and the PDPTEs.
fn in_memory(v: &impl Fields, caps: &Capabilities, memory: &impl ReadsGuest, place: Place, demand: Demand<'_>) {
    let link = get(v, VMCS_LINK_POINTER);
    if link != !0 {
        let address = link % 4096 == 0 && none_of(link, caps.physical_width..64);
        demand("GuestLinkPointerAddress", address);
        demand("GuestLinkPointerCurrent", link != place.current.get());
        if address {
            let wanted = u64::from(place.revision) | if bit(secondary(v), 14) { 1 << 31 } else { 0 };
            let word = memory.read_u32(Gpa::new(link)).map(u64::from);
            demand("GuestLinkPointerRegion", word == Some(wanted));
        }
    }
    let pae_paging = bit(get(v, GUEST_CR0), 31) && bit(get(v, GUEST_CR4), 5) && !ia32e(v);
    if pae_paging {
        let entries: [Option<u64>; 4] = if bit(secondary(v), 1) {
            [GUEST_PDPTE0, GUEST_PDPTE1, GUEST_PDPTE2, GUEST_PDPTE3].map(|field| Some(get(v, field)))
        } else {
            let table = get(v, GUEST_CR3) >> 5 << 5 & 0xFFFF_FFFF;
            [0, 8, 16, 24].map(|offset| memory.read_u64(Gpa::new(table + offset)))
        };
        let good = |entry: u64| !bit(entry, 0) || none_of(entry, (1..3).chain(5..9).chain(caps.physical_width..64));
        demand("GuestPdptes", entries.into_iter().all(|entry| entry.is_some_and(good)));
    }
}
