//! Structures that another CPU rewrites while they are used: in ordinary memory, with values that lead to the hypervisor below
//! among others.

use crate::{
    guest::{self, Exit, Extra, Program, forget},
    lab::{LINEAR, Lab, PHYSICAL, Seen, Told},
    place::Place,
    random::Random,
};
use core::sync::atomic::{AtomicU64, Ordering};
use l2_kit::{
    apic, cpu,
    ept::{LARGE_BIT, WRITE_BACK, rights::RWX},
    fields as f, pages,
    setup::{self, Kind, secondary},
    smp, vmx,
};

/// Tries with a structure while the other CPU writes.
const TURNS: u64 = 120;
const VALUES: usize = 6;
const IA32_APIC_BASE: u32 = 0x1B;

/// What the other CPU does: words to write, how many, and the values; it stops when the count is 0.
static WORDS: AtomicU64 = AtomicU64::new(0);
static COUNT: AtomicU64 = AtomicU64::new(0);
static TO_WRITE: [AtomicU64; VALUES] = [const { AtomicU64::new(0) }; VALUES];

/// A structure: how it is set up (its address, words that change, values they get), and the program that uses it.
struct Race {
    name: &'static str,
    secondary: u32,
    set_up: fn(&mut Lab, u64) -> (u64, u64, [u64; VALUES]),
    attempt: fn(&mut Lab) -> Exit,
}

fn read(lab: &mut Lab) -> Exit {
    lab.execute(guest::read as Program, LINEAR)
}

const RACES: &[Race] = &[
    Race {
        name: "a leaf of EPT",
        secondary: 0,
        set_up: |lab, inside| {
            let at = entry_address(lab, 0);
            let page = lab.pages[1] | WRITE_BACK | RWX;
            (at, 1, [page, inside | WRITE_BACK | RWX, 0, page & !2, page | 1 << 51, lab.pages[2] | WRITE_BACK | RWX])
        },
        attempt: read,
    },
    Race {
        name: "a directory entry of EPT",
        secondary: 0,
        set_up: |lab, inside| {
            let at = entry_address(lab, 1);
            let table = lab.guest.ept.entry(PHYSICAL, 1);
            let large = pages::LARGE - 1;
            (
                at,
                1,
                [
                    table,
                    inside | RWX,
                    0,
                    inside & !large | LARGE_BIT | WRITE_BACK | RWX,
                    lab.pages[3] | RWX,
                    table | 0x78,
                ],
            )
        },
        attempt: read,
    },
    Race {
        name: "a pointer entry of EPT",
        secondary: 0,
        set_up: |lab, inside| {
            let at = entry_address(lab, 2);
            let table = lab.guest.ept.entry(PHYSICAL, 2);
            (at, 1, [table, inside | RWX, 0, LARGE_BIT | WRITE_BACK | RWX, lab.pages[3] | RWX, table | 1 << 51])
        },
        attempt: read,
    },
    Race {
        name: "the MSR bitmap",
        secondary: 0,
        set_up: |lab, inside| (lab.guest.msr_bitmap, 512, [0, !0, inside, 1, 2, 3]),
        attempt: |lab| lab.execute(msr_read, cpu::LSTAR.into()),
    },
    Race {
        name: "the region of the current VMCS",
        secondary: 0,
        set_up: |lab, inside| (lab.guest.vcpu.vmcs + 8, 500, [0, !0, inside, 1, 2, 3]),
        attempt: |lab| lab.execute(guest::nothing, 0xA1),
    },
    Race {
        name: "the region of a VMCS that is loaded",
        secondary: 0,
        set_up: |lab, inside| {
            crate::place::put(lab.pages[5], 0, setup::revision().into());
            let _ = vmx::vmclear(lab.pages[5]);
            crate::place::put(lab.pages[5], 0, setup::revision().into());
            (lab.pages[5], 510, [setup::revision().into(), !0, inside, 0, 0x55, u64::from(setup::revision()) | 1 << 31])
        },
        attempt: |lab| {
            let own = lab.guest.vcpu.vmcs;
            if vmx::vmptrld(lab.pages[5]).succeeded() {
                let _ = vmx::try_read(f::GUEST_RIP.into());
                let _ = vmx::try_write(f::GUEST_RSP.into(), 5);
            }
            let _ = vmx::vmclear(lab.pages[5]);
            let _ = vmx::vmptrld(own);
            lab.execute(guest::nothing, 0xA1)
        },
    },
    Race {
        name: "a VM-entry MSR-load area",
        secondary: 0,
        set_up: |lab, inside| {
            vmx::write(f::ENTRY_MSR_LOAD_ADDR, lab.pages[6]);
            vmx::write(f::ENTRY_MSR_LOAD_COUNT, 16);
            (lab.pages[6], 32, [cpu::LSTAR.into(), cpu::CSTAR.into(), inside, 0x1B, 0x480, 0x277])
        },
        attempt: |lab| lab.execute(guest::nothing, 0xA1),
    },
    Race {
        name: "the guest's own page table",
        secondary: 0,
        set_up: |lab, inside| {
            let at = pages::table_of(lab.guest.cr3, LINEAR) + (LINEAR >> 12 & 511) * 8;
            (at, 1, [PHYSICAL | 0x67, inside | 0x67, 0, PHYSICAL | 5, lab.pages[2] | 0x63, 1 << 50 | 0x67])
        },
        attempt: read,
    },
    Race {
        name: "a PML page",
        secondary: secondary::PML,
        set_up: |lab, inside| {
            let pointer = lab.guest.ept.pointer_with_flags();
            vmx::write(f::EPTP, pointer);
            vmx::write(f::PML_ADDR, lab.pages[7]);
            vmx::write(f::PML_INDEX, 511);
            (lab.pages[7], 512, [0, !0, inside, 1, 2, 3])
        },
        attempt: |lab| {
            vmx::write(f::PML_INDEX, 511);
            forget();
            lab.execute(guest::write, LINEAR + 8)
        },
    },
    Race {
        name: "#VE information",
        secondary: secondary::EPT_VIOLATION_VE,
        set_up: |lab, inside| {
            vmx::write(f::VE_INFORMATION, lab.pages[7]);
            vmx::write(f::EPTP_INDEX, 0);
            lab.lead_to(0, 0);
            (lab.pages[7], 8, [0, !0, inside, 1, 2, 0xFFFF_FFFF_0000_0000])
        },
        attempt: read,
    },
    Race {
        name: "an EPTP list",
        secondary: secondary::VM_FUNCTIONS,
        set_up: |lab, inside| {
            vmx::write(f::VM_FUNCTION_CONTROLS, 1);
            vmx::write(f::EPTP_LIST, lab.pages[7]);
            let good = lab.guest.ept.pointer();
            (lab.pages[7], 8, [good, inside | 0x1E, 0, !0, good | 1 << 51, good])
        },
        attempt: |lab| lab.execute(switch_eptp, 3),
    },
    Race {
        name: "VMREAD and VMWRITE bitmaps",
        secondary: secondary::VMCS_SHADOWING,
        set_up: |lab, inside| {
            vmx::write(f::VMREAD_BITMAP, lab.pages[7]);
            vmx::write(f::VMWRITE_BITMAP, lab.pages[7]);
            (lab.pages[7], 512, [0, !0, inside, 1, 2, 3])
        },
        attempt: |lab| lab.execute(vmread, f::GUEST_RSP.into()),
    },
];

pub fn all(lab: &mut Lab) {
    if crate::cpus() < 2 {
        return;
    }
    let apic_base = cpu::rdmsr(IA32_APIC_BASE);
    for race in RACES {
        if !setup::allowed_one(Kind::Secondary, race.secondary) {
            continue;
        }
        lab.attack(format_args!("another CPU rewrites {}", race.name), Told::Answered, |lab| {
            lab.with(Extra { secondary: race.secondary, ..Extra::default() });
            vmx::write(f::EXCEPTION_BITMAP, 0xFFFF_FFFF);
            let inside = Place::Within.page(lab.random.next());
            for (page, tag) in [(1usize, TAGS[0]), (2, TAGS[1])] {
                crate::place::put(lab.pages[page], 0, tag);
            }
            lab.lead_to(lab.pages[1], WRITE_BACK | RWX);
            // What a large page shows at its start is this guest's.
            let (at, words, values) = (race.set_up)(lab, inside);
            // SAFETY: an entry or a page of this guest.
            let before = unsafe { (at as *const u64).read_volatile() };
            TO_WRITE.iter().zip(values).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
            WORDS.store(at, Ordering::Release);
            COUNT.store(words, Ordering::Release);
            smp::give(1, rewrite);
            let mut read = [0u64; 2];
            let mut escaped = false;
            for _ in 0..TURNS {
                match (race.attempt)(lab) {
                    Exit::Done(value) if race.name.contains("EPT") && !race.name.contains("list") => {
                        // A 1 GiB page shows the first page of memory.
                        let known = TAGS.contains(&value) || value == first_word();
                        escaped |= !known && !crate::place::is_bare();
                        read[0] += 1;
                    }
                    Exit::Done(_) => read[0] += 1,
                    _ => read[1] += 1,
                }
                forget();
            }
            COUNT.store(0, Ordering::Release);
            smp::wait(1);
            // On the bare machine an MSR area has moved the APIC, or switched it off.
            if cpu::rdmsr(IA32_APIC_BASE) != apic_base {
                cpu::wrmsr(IA32_APIC_BASE, apic_base);
                apic::init();
            }
            if words == 1 {
                // SAFETY: as above.
                unsafe { (at as *mut u64).write_volatile(before) };
            }
            forget();
            Seen::of(format_args!("{} of {TURNS} came to their end", read[0])).escaped_if(escaped)
        });
    }
}

const TAGS: [u64; 2] = [0x7A9_0001, 0x7A9_0002];

fn first_word() -> u64 {
    let mut word: u64;
    // SAFETY: the first page of memory, which is there; not a null pointer for the machine.
    unsafe { core::arch::asm!("mov {w}, [{a}]", w = out(reg) word, a = in(reg) 0u64, options(readonly, nostack)) };
    word = core::hint::black_box(word);
    word
}

/// The other CPU's work.
fn rewrite(_: usize) {
    let mut random = Random::new(WORDS.load(Ordering::Acquire), "rewrite", 0);
    loop {
        let (at, words) = (WORDS.load(Ordering::Acquire), COUNT.load(Ordering::Acquire));
        if words == 0 {
            return;
        }
        let place = (at + random.below(words) * 8) as *mut u64;
        let value = TO_WRITE[random.below(VALUES as u64) as usize].load(Ordering::Relaxed);
        // SAFETY: a structure of this guest that the attack gave away.
        unsafe { place.write_volatile(value) };
    }
}

/// Address of the entry for the page under attack in the table of a level.
fn entry_address(lab: &Lab, level: u32) -> u64 {
    let upper = if level == 3 { lab.guest.ept.pointer() } else { lab.guest.ept.entry(PHYSICAL, level + 1) };
    (upper & 0x000F_FFFF_FFFF_F000) + (PHYSICAL >> (12 + 9 * level) & 511) * 8
}

extern "C" fn msr_read(msr: u64) -> u64 {
    cpu::rdmsr(msr as u32);
    msr
}

extern "C" fn vmread(field: u64) -> u64 {
    vmx::try_read(field).0.succeeded().into()
}

extern "C" fn switch_eptp(entry: u64) -> u64 {
    // SAFETY: all trees that are valid map this image.
    unsafe { core::arch::asm!("vmfunc", in("eax") 0, in("ecx") entry as u32, options(nostack)) };
    entry
}
