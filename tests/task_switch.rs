//! Task switches against a second statement of the SDM: a task as a table of bytes, the checks as a list that is gone through
//! in order. Memory is flat here; the walk has tests of its own, and the faults of pages stand at the end.
//!
//! SDM vol. 3A, "Task Switching", table "Exception Conditions Checked During a Task Switch".

use nvmx::addr::Gpa;
use nvmx::emul::task_switch::{CS, NT, SegmentState, Source, State, SwitchFailure, TaskSwitched, switch};
use nvmx::mm::linear::{Keys, Paging};
use nvmx::mm::phys::VecMem;
use nvmx::mm::{GuestMemory, Span};
use proptest::prelude::*;

const GDT: u32 = 0x1000;
const LDT: u32 = 0x2000;
const OLD: u32 = 0x3000;
const NEW: u32 = 0x4000;
const ENTRIES: usize = 24;
const OLD_TR: u16 = 0x10;
const NEW_TR: u16 = 0x18;

/// The whole memory, as the model sees it.
type Bytes = Vec<u8>;

fn get(m: &[u8], at: u32, n: usize) -> u64 {
    (0..n).map(|i| u64::from(m[at as usize + i]) << (8 * i)).sum()
}

fn put(m: &mut [u8], at: u32, n: usize, value: u64) {
    (0..n).for_each(|i| m[at as usize + i] = (value >> (8 * i)) as u8);
}

/// What came out: exception of the old task, or TR, exception of the new task, and the registers that count.
#[derive(Clone, PartialEq, Eq, Debug)]
enum End {
    Old(u8, u32),
    New { fault: Option<(u8, u32)>, trap: bool, eip: u32, eflags: u32, gprs: [u32; 8], cs: u16, ldt: u16, tr: u16 },
}

/// The model: rewrites `m` as the processor would.
fn model(m: &mut Bytes, s: &State, to: u16, source: Source) -> End {
    let ext = u32::from(matches!(source, Source::Gate { external: true, .. }));
    let iret = source == Source::Iret;
    let nests = matches!(source, Source::Call | Source::Gate { .. });
    let code = |selector: u16| (u32::from(selector) / 4 * 4) | ext;
    let slot = |selector: u16| GDT + u32::from(selector) / 8 * 8;
    // The new TSS.
    let wrong = if iret { 10 } else { 13 };
    let outside = u32::from(to) / 8 * 8 + 7 > s.gdt_limit;
    if to & 4 != 0 || to < 4 || outside {
        return End::Old(wrong, code(to));
    }
    let access = m[slot(to) as usize + 5];
    let kinds: &[u8] = if iret { &[0x3, 0xB] } else { &[0x1, 0x9] };
    if !kinds.contains(&(access & 0x1F)) {
        return End::Old(wrong, code(to));
    }
    if access < 0x80 {
        return End::Old(11, code(to));
    }
    let long = access & 8 != 0;
    if limit(get(m, slot(to), 8)) < if long { 103 } else { 43 } {
        return End::Old(10, code(to));
    }
    let old_long = s.tr.rights & 8 != 0;
    if s.tr.limit < if old_long { 0x5F } else { 0x29 } {
        return End::Old(10, code(s.tr.selector));
    }
    // Leaving.
    if !nests {
        m[slot(s.tr.selector) as usize + 5] &= !2;
    }
    let flags = if iret { s.eflags & !0x4000 } else { s.eflags };
    let selectors: Vec<u16> = [0, 1, 2, 3, 4, 5].iter().map(|n| s.segments[*n].selector).collect();
    let (first, width, registers) = if old_long { (0x20, 4, 6) } else { (0x0E, 2, 4) };
    let words = [s.eip, flags].into_iter().chain(s.gprs);
    let mut at = s.tr.base + first;
    for word in words {
        put(m, at, width, word.into());
        at += width as u32;
    }
    for selector in &selectors[..registers] {
        put(m, at, 2, u64::from(*selector));
        at += width as u32;
    }
    if nests {
        put(m, NEW, 2, s.tr.selector.into());
    }
    if !iret {
        m[slot(to) as usize + 5] |= 2;
    }
    // Arriving.
    let read =
        |m: &Bytes, n: u32| if long { get(m, NEW + 0x20 + 4 * n, 4) } else { get(m, NEW + 0xE + 2 * n, 2) } as u32;
    let gprs = [2, 3, 4, 5, 6, 7, 8, 9].map(|n| if long { read(m, n) } else { read(m, n) | 0xFFFF_0000 });
    let nt = if nests { 0x4000 } else { 0 };
    let eflags = read(m, 1) & 0b11_1111_0111_1111_1101_0101 | 2 | nt;
    let (eip, ldt) = (read(m, 0), if long { get(m, NEW + 0x60, 2) } else { get(m, NEW + 0x2A, 2) } as u16);
    let selector = |m: &Bytes, n: u32| if !long && n > 3 { 0 } else { read(m, 10 + n) as u16 };
    let cs = selector(m, 1);
    let trap = long && m[NEW as usize + 0x64] & 1 == 1;
    let mut end = End::New { fault: None, trap: false, eip, eflags, gprs, cs, ldt, tr: to };
    let fault = arrive(m, s, &selector, cs, ldt, eflags, eip, ext);
    if let End::New { fault: f, trap: t, .. } = &mut end {
        (*f, *t) = (fault, trap && fault.is_none());
    }
    end
}

fn limit(d: u64) -> u32 {
    let raw = (d & 0xFFFF | d >> 32 & 0xF_0000) as u32;
    if d >> 55 & 1 == 1 { raw * 4096 + 4095 } else { raw }
}

#[allow(clippy::too_many_arguments)]
fn arrive(
    m: &mut Bytes,
    s: &State,
    selector: &dyn Fn(&Bytes, u32) -> u16,
    cs: u16,
    ldt: u16,
    eflags: u32,
    eip: u32,
    ext: u32,
) -> Option<(u8, u32)> {
    let bad = |vector: u8, sel: u16| Some((vector, (u32::from(sel) / 4 * 4) | ext));
    let mut local = None;
    if ldt & 4 != 0 {
        return bad(10, ldt);
    }
    if ldt >= 4 {
        if u32::from(ldt) / 8 * 8 + 7 > s.gdt_limit {
            return bad(10, ldt);
        }
        let d = get(m, GDT + u32::from(ldt) / 8 * 8, 8);
        if d >> 40 & 0x9F != 0x82 {
            return bad(10, ldt);
        }
        local = Some(((d >> 16 & 0xFF_FFFF | d >> 32 & 0xFF00_0000) as u32, limit(d)));
    }
    if eflags & 1 << 17 != 0 {
        return (eip > 0xFFFF).then_some((13, ext));
    }
    let place = |sel: u16| -> Option<u32> {
        let (base, limit) = if sel & 4 != 0 { local? } else { (GDT, s.gdt_limit) };
        let offset = u32::from(sel) / 8 * 8;
        (sel >= 4 && offset + 7 <= limit).then_some(base + offset)
    };
    let level = cs & 3;
    // SS, then DS, ES, FS, GS, then CS.
    for (name, sel) in [('s', 2), ('d', 3), ('d', 0), ('d', 4), ('d', 5), ('c', 1)].map(|(n, i)| (n, selector(m, i))) {
        if name == 'd' && sel < 4 {
            continue;
        }
        let Some(at) = place(sel) else { return bad(10, sel) };
        let access = m[at as usize + 5];
        let (kind, dpl) = (access & 0x1F, u16::from(access >> 5 & 3));
        let conforming = kind & 0b11100 == 0b11100;
        let of_its_kind = match name {
            's' => kind & 0b11010 == 0b10010,
            'c' => kind & 0b11000 == 0b11000,
            _ => kind & 0b10000 != 0 && kind & 0b01010 != 0b01000,
        };
        if !of_its_kind {
            return bad(10, sel);
        }
        let absent = access < 0x80;
        match name {
            's' if absent => return bad(12, sel),
            's' if dpl != level || sel & 3 != level => return bad(10, sel),
            'd' if !conforming && (dpl < level || dpl < sel & 3) => return bad(10, sel),
            'c' if conforming && dpl > level || name == 'c' && !conforming && dpl != level => return bad(10, sel),
            _ if absent => return bad(11, sel),
            _ => m[at as usize + 5] |= 1,
        }
        if name == 'c' && eip > limit(get(m, at, 8)) {
            return Some((13, ext));
        }
    }
    None
}

/// Descriptors that are likely to be right, and likely to be interesting where they are not.
fn descriptor() -> impl Strategy<Value = u64> {
    let access = prop::sample::select(vec![
        0x9Bu64, 0x93, 0x9F, 0x91, 0x99, 0xFB, 0xF3, 0x13, 0x1B, 0x82, 0x02, 0x89, 0x92, 0x9A, 0xFF, 0xB3, 0x85, 0x97,
    ]);
    (access, any::<bool>()).prop_map(|(access, wide)| {
        let base = if access & 0x1F == 2 { u64::from(LDT) } else { 0 };
        let rest = if wide { 0x00CF_0000_0000_FFFF } else { 0x0040_0000_0000_00FF };
        rest | base << 16 | access << 40
    })
}

fn selector() -> impl Strategy<Value = u16> {
    (0u16..28, prop::sample::select(vec![0u16, 0, 0, 0, 3, 1, 4, 7])).prop_map(|(n, low)| n * 8 + low)
}

fn state(old_long: bool, eflags: u32, old_limit: u32) -> State {
    let paging =
        Paging { cr0: 0x11, cr3: 0, cr4: 0, efer: 0, rflags: 0, pdptes: [0; 4], keys: Keys::OPEN, physical_width: 36 };
    let segment = |selector| SegmentState { selector, base: 0, limit: u32::MAX, rights: 0xC093 };
    State {
        paging,
        gprs: [0xA0A0, 0xC1C1_0001, 2, 3, 0x5000, 5, 6, 0xFFFF_0007],
        eip: 0x1234_5678,
        eflags: eflags & 0x7FD5 | 2,
        segments: [0x20, 0x28, 0x30, 0x38, 0x40, 0x48].map(segment),
        ldtr: SegmentState::unusable(0, 0),
        tr: SegmentState { selector: OLD_TR, base: OLD, limit: old_limit, rights: if old_long { 0x8B } else { 0x83 } },
        gdt_base: GDT,
        gdt_limit: 8 * ENTRIES as u32 - 1,
        dr7: 0x7FF,
    }
}

fn end(result: &Result<TaskSwitched, SwitchFailure>) -> End {
    match result {
        Err(SwitchFailure::Exception(e)) => End::Old(e.vector, e.error),
        Ok(switched) => {
            let s = &switched.state;
            End::New {
                fault: switched.exception.map(|e| (e.vector, e.error)),
                trap: switched.trap,
                eip: s.eip,
                eflags: s.eflags,
                gprs: s.gprs,
                cs: s.segments[CS].selector,
                ldt: s.ldtr.selector,
                tr: s.tr.selector,
            }
        }
        other => panic!("{other:?}"),
    }
}

fn source() -> impl Strategy<Value = Source> {
    prop_oneof![
        Just(Source::Jump),
        Just(Source::Call),
        Just(Source::Iret),
        any::<bool>().prop_map(|external| Source::Gate { external, error_code: None }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn a_switch_ends_as_the_sdm_says(
        descriptors in prop::collection::vec(descriptor(), ENTRIES), locals in prop::collection::vec(descriptor(), ENTRIES),
        selectors in prop::collection::vec(selector(), 6), good in any::<[bool; 8]>(), ldt in selector(),
        words in any::<[u32; 10]>(), source in source(), new_long: bool, old_long: bool, busy in 0u8..8,
        short in 0u8..12, to in prop::sample::select(vec![NEW_TR, NEW_TR, NEW_TR, NEW_TR, NEW_TR, 0x1C, 0, 0x50, 0x800]),
        virtual_8086 in 0u8..8, trap: bool,
    ) {
        let mut m: Bytes = vec![0; 0x10000];
        for (n, (d, l)) in (0u32..).zip(descriptors.iter().zip(&locals)) {
            put(&mut m, GDT + 8 * n, 8, *d);
            put(&mut m, LDT + 8 * n, 8, *l);
        }
        put(&mut m, GDT + 0x50, 8, 0x00CF_9300_0000_FFFF);
        put(&mut m, GDT + 0x80, 8, 0x00CF_9B00_0000_FFFF);
        put(&mut m, GDT + 0x88, 8, 0x00CF_9300_0000_FFFF);
        put(&mut m, GDT + 0x90, 8, 0x0000_8200_20FF_FFFF & !0xFFFF | 0xBF);
        put(&mut m, GDT + 0x92, 3, LDT.into());
        let wants_busy = source == Source::Iret;
        let kind = if new_long { 0x89 } else { 0x81 } | if wants_busy != (busy == 0) { 2 } else { 0 };
        let new_limit = if new_long { 103 } else { 43 } - u64::from(short == 0);
        let present = if short == 1 { kind & 0x7F } else { kind };
        put(&mut m, GDT + u32::from(NEW_TR), 8, new_limit | u64::from(NEW) << 16 | present << 40);
        put(&mut m, GDT + u32::from(OLD_TR), 8, 0x67 | u64::from(OLD) << 16 | 0x8B << 40);
        let words = words.map(|word| word & 0x1FFF_FFFF);
        let vm = if virtual_8086 == 0 { 1 << 17 } else { 0 };
        let width = if new_long { 4 } else { 2 };
        let first = if new_long { 0x20 } else { 0x0E };
        for (n, word) in (0u32..).zip(words) {
            let word = match n { 0 => word & 0x1FF, 1 => word & !(1 << 17) | vm, _ => word };
            put(&mut m, NEW + first + n * width, width as usize, word.into());
        }
        for (n, (sel, good)) in (0u32..).zip(selectors.iter().zip(good)) {
            let right = if n == 1 { 0x80 } else { 0x88 };
            let sel = if good { right } else { *sel };
            put(&mut m, NEW + first + (10 + n) * width, 2, sel.into());
        }
        let ldt = if good[6] { 0 } else if good[7] { 0x90 } else { ldt };
        if new_long { put(&mut m, NEW + 0x60, 2, ldt.into()); put(&mut m, NEW + 0x64, 1, trap.into()); }
        else { put(&mut m, NEW + 0x2A, 2, ldt.into()); }

        let old_limit = if old_long { 0x5F } else { 0x29 } - u32::from(short == 2);
        let state = state(old_long, words[2], old_limit);
        let guest = GuestMemory::new(VecMem::from_bytes(m.clone()), Span::new(0, 0), 36);
        let result = switch(&guest, &state, to, source);
        let wanted = model(&mut m, &state, to, source);
        prop_assert_eq!(end(&result), wanted);
        prop_assert!(guest.phys().bytes(0, m.len()) == m, "memory differs");
        if let Ok(TaskSwitched { state: new, .. }) = result {
            prop_assert_eq!((new.dr7, new.paging.cr0), (0x7FF & !0x155, 0x19));
            prop_assert_eq!((new.tr.base, new.tr.rights & 0xF), (NEW, if new_long { 11 } else { 3 }));
            enters(&new);
        }
    }
}

/// What a VM entry asks of segment registers (SDM vol. 3C, "Checks on Guest Segment Registers"), unrestricted guest.
fn enters(s: &State) {
    let [es, cs, ss, ds, fs, gs] = s.segments;
    let usable = |s: &SegmentState| s.rights & 1 << 16 == 0;
    if s.eflags & 1 << 17 != 0 {
        for s in [es, cs, ss, ds, fs, gs] {
            assert_eq!((s.base, s.limit, s.rights), (u32::from(s.selector) * 16, 0xFFFF, 0xF3));
        }
    } else {
        let level = ss.rights >> 5 & 3;
        assert!(usable(&cs) && cs.rights & 0x19 == 0x19, "CS is accessed code: {cs:x?}");
        let dpl = cs.rights >> 5 & 3;
        assert!(if cs.rights & 4 != 0 { dpl <= level } else { dpl == level }, "{cs:x?} {ss:x?}");
        assert!(!usable(&ss) || matches!(ss.rights & 0x1F, 0x13 | 0x17));
        for s in [es, ds, fs, gs].iter().filter(|s| usable(s)) {
            assert!(s.rights & 0x11 == 0x11 && (s.rights & 8 == 0 || s.rights & 2 != 0), "{s:x?}");
        }
    }
    for s in [es, cs, ss, ds, fs, gs, s.ldtr, s.tr].iter().filter(|s| usable(s)) {
        assert!(s.rights & 0x80 != 0 && s.rights & 0xFFFE_0F00 == 0, "{s:x?}");
        assert!(s.limit & 0xFFF == 0xFFF || s.rights & 1 << 15 == 0);
        assert!(s.limit >> 20 == 0 || s.rights & 1 << 15 != 0);
    }
    assert!(!usable(&s.ldtr) || s.ldtr.rights & 0x1F == 2 && s.ldtr.selector & 4 == 0);
}

/// A page fault on any page that is needed before the point of no return leaves memory as it was.
#[test]
fn a_page_fault_in_the_old_task_changes_nothing() {
    const TABLE: u32 = 0x8000;
    const DIRECTORY: u32 = 0x9000;
    for source in [Source::Jump, Source::Call, Source::Gate { external: true, error_code: Some(0) }] {
        for (page, write_only) in [(GDT, false), (OLD, false), (NEW, false), (GDT, true), (OLD, true), (NEW, true)] {
            let mut m: Bytes = vec![0; 0x10000];
            put(&mut m, DIRECTORY, 4, u64::from(TABLE | 0x63));
            for n in 0..16u32 {
                let flags = match n * 0x1000 == page {
                    true if write_only => 0x61,
                    true => 0x62,
                    false => 0x63,
                };
                put(&mut m, TABLE + 4 * n, 4, u64::from(n << 12 | flags));
            }
            put(&mut m, GDT + u32::from(NEW_TR), 8, 103 | u64::from(NEW) << 16 | 0x89 << 40);
            put(&mut m, GDT + u32::from(OLD_TR), 8, 0x67 | u64::from(OLD) << 16 | 0x8B << 40);
            let mut state = state(true, NT, 0x67);
            state.paging = Paging { cr0: 1 << 31 | 1 << 16 | 1, cr3: DIRECTORY.into(), ..state.paging };
            let guest = GuestMemory::new(VecMem::from_bytes(m.clone()), Span::new(0, 0), 36);
            let result = switch(&guest, &state, NEW_TR, source);
            let reads_only = write_only && page == NEW && source == Source::Jump;
            match result {
                Err(SwitchFailure::Exception(e)) => {
                    assert_eq!((e.vector, e.error & 1), (14, u32::from(write_only)), "{page:#x}");
                    assert_eq!(e.linear.map(|at| at as u32 & !0xFFF), Some(page));
                    assert!(guest.phys().bytes(0, m.len()) == m, "{page:#x}: memory changed");
                }
                Ok(_) => assert!(reads_only, "{page:#x} {source:?}"),
                other => panic!("{other:?}"),
            }
            let _ = guest.translate(Gpa::new(0));
        }
    }
}
