//! Pages and areas that a VMCS names by address.

use super::{enter, everywhere, no_end_inside, with};
use crate::{
    guest::{self, Exit, Extra, forget},
    lab::{LINEAR, Lab, Seen, Told},
    place::{self, Place},
};
use core::arch::asm;
use l2_kit::{
    apic, cpu, ept, fields as f,
    pages::PAGE,
    setup::{self, Kind, exit_controls, pin, primary, secondary},
    vmx::{self, reason},
};

pub fn all(lab: &mut Lab) {
    let offers = |bits: u32| setup::allowed_one(Kind::Secondary, bits);
    for (name, field, port) in [("I/O bitmap A", f::IO_BITMAP_A, 0x80), ("I/O bitmap B", f::IO_BITMAP_B, 0x8080)] {
        everywhere(lab, name, |lab, at| {
            with(lab, Extra { primary: primary::IO_BITMAPS, ..Extra::default() });
            vmx::write(f::IO_BITMAP_A, lab.pages[1]);
            vmx::write(f::IO_BITMAP_B, lab.pages[1]);
            vmx::write(field, at);
            let exit = lab.execute(port_in, port);
            // Memory that is not there is all ones: nothing passes.
            no_end_inside(exit, at)
        });
    }
    everywhere(lab, "MSR bitmap", |lab, at| {
        with(lab, Extra::default());
        vmx::write(f::MSR_BITMAP, at);
        let msr = lab.random.pick(&[cpu::LSTAR, cpu::CSTAR, 0x174, 0x175, cpu::PAT]);
        no_end_inside(lab.execute(msr_read, msr.into()), at)
    });
    if offers(secondary::VMCS_SHADOWING) {
        for (name, field) in [("VMREAD bitmap", f::VMREAD_BITMAP), ("VMWRITE bitmap", f::VMWRITE_BITMAP)] {
            everywhere(lab, name, |lab, at| {
                with(lab, Extra { secondary: secondary::VMCS_SHADOWING, ..Extra::default() });
                vmx::write(f::VMREAD_BITMAP, lab.pages[1]);
                vmx::write(f::VMWRITE_BITMAP, lab.pages[1]);
                vmx::write(field, at);
                let program = if field == f::VMREAD_BITMAP { vmread } else { vmwrite };
                no_end_inside(lab.execute(program, f::GUEST_RSP.into()), at)
            });
        }
    }
    if setup::allowed_one(Kind::Primary, primary::TPR_SHADOW) {
        everywhere(lab, "virtual-APIC page", |lab, at| {
            with(lab, Extra { primary: primary::TPR_SHADOW, ..Extra::default() });
            vmx::write(f::VIRTUAL_APIC, at);
            vmx::write(f::TPR_THRESHOLD, 0);
            let value = lab.random.below(16);
            lab.execute(task_priority, value).into()
        });
        if offers(secondary::APIC_ACCESSES) {
            everywhere(lab, "APIC-access page", |lab, at| {
                with(
                    lab,
                    Extra { primary: primary::TPR_SHADOW, secondary: secondary::APIC_ACCESSES, ..Extra::default() },
                );
                vmx::write(f::VIRTUAL_APIC, lab.pages[1]);
                vmx::write(f::TPR_THRESHOLD, 0);
                vmx::write(f::APIC_ACCESS, at);
                lab.lead_to(at, ept::WRITE_BACK | 7);
                no_end_inside(lab.execute(guest::read, LINEAR + 0x300), at)
            });
        }
        let posted = pin::EXTERNAL_INTERRUPT | pin::POSTED_INTERRUPTS;
        if offers(secondary::VIRTUAL_INTERRUPTS) && setup::allowed_one(Kind::Pin, posted) {
            everywhere(lab, "posted-interrupt descriptor", |lab, at| {
                with(
                    lab,
                    Extra {
                        pin: posted,
                        primary: primary::TPR_SHADOW,
                        secondary: secondary::VIRTUAL_INTERRUPTS,
                        exit: exit_controls::ACKNOWLEDGE,
                        ..Extra::default()
                    },
                );
                vmx::write(f::VIRTUAL_APIC, lab.pages[1]);
                vmx::write(f::TPR_THRESHOLD, 0);
                vmx::write(f::POSTED_INT_VECTOR, VECTOR.into());
                vmx::write(f::POSTED_INT_DESCRIPTOR, at + lab.random.below(64) * 64);
                vmx::write(f::GUEST_INTERRUPT_STATUS, 0);
                [f::EOI_EXIT0, f::EOI_EXIT1, f::EOI_EXIT2, f::EOI_EXIT3]
                    .into_iter()
                    .for_each(|field| vmx::write(field, 0));
                let exit = lab.execute(interrupt_oneself, 7);
                if exit == Exit::Reason(reason::EXTERNAL_INTERRUPT) {
                    apic::eoi();
                }
                exit.into()
            });
        }
    }
    if offers(secondary::PML) {
        for index in [511u64, 0] {
            let name = if index == 0 { "PML page with one entry left" } else { "PML page" };
            everywhere(lab, name, |lab, at| {
                with(lab, Extra { secondary: secondary::PML, ..Extra::default() });
                let pointer = lab.guest.ept.pointer_with_flags();
                vmx::write(f::EPTP, pointer);
                vmx::write(f::PML_ADDR, at);
                vmx::write(f::PML_INDEX, index);
                forget();
                let exit = lab.execute(guest::write, LINEAR);
                forget();
                // At the end of the log the SDM leaves open with which translation the exit comes (Bochs: the next).
                let answered = matches!(exit, Exit::Done(_) | Exit::Reason(reason::PML_FULL));
                if index == 0 { Seen::of(answered) } else { exit.into() }
            });
        }
    }
    if offers(secondary::EPT_VIOLATION_VE) {
        everywhere(lab, "#VE information", |lab, at| {
            with(lab, Extra { secondary: secondary::EPT_VIOLATION_VE, ..Extra::default() });
            vmx::write(f::VE_INFORMATION, at);
            vmx::write(f::EPTP_INDEX, 0);
            lab.lead_to(0, 0);
            lab.execute(guest::read, LINEAR).into()
        });
    }
    let functions = setup::allowed_one(Kind::Secondary, secondary::VM_FUNCTIONS);
    if functions && l2_kit::caps::get(setup::VMX_VMFUNC) & 1 != 0 {
        everywhere(lab, "EPTP list", |lab, at| {
            with(lab, Extra { secondary: secondary::VM_FUNCTIONS, ..Extra::default() });
            vmx::write(f::VM_FUNCTION_CONTROLS, 1);
            vmx::write(f::EPTP_LIST, at);
            let entry = lab.random.below(512);
            no_end_inside(lab.execute(switch_eptp, entry), at)
        });
        everywhere(lab, "EPTP in an EPTP list", |lab, at| {
            with(lab, Extra { secondary: secondary::VM_FUNCTIONS, ..Extra::default() });
            vmx::write(f::VM_FUNCTION_CONTROLS, 1);
            vmx::write(f::EPTP_LIST, lab.pages[1]);
            lab.words(1)[7] = at | 3 << 3 | 6;
            no_end_inside(lab.execute(switch_eptp, 7), at)
        });
    }
    areas(lab);
}

/// MSR areas. One that stores or loads at exits ends L2's machine if it is bad (a VMX abort, on the bare machine too): only
/// beside the range. One that loads at entries may be anywhere.
fn areas(lab: &mut Lab) {
    everywhere(lab, "VM-entry MSR-load area", |lab, at| {
        with(lab, Extra::default());
        write_area(at, &[(cpu::LSTAR, 0x1000), (cpu::CSTAR, 0x2000)]);
        vmx::write(f::ENTRY_MSR_LOAD_ADDR, at);
        vmx::write(f::ENTRY_MSR_LOAD_COUNT, 2);
        no_end_inside(enter(lab), at)
    });
    lab.attack(format_args!("VM-entry MSR-load area across the lower edge"), Told::Same, |lab| {
        with(lab, Extra::default());
        lab.beside = true;
        let page = Place::First.page(0);
        place::fill(page);
        let before = 1 + lab.random.below(8);
        let at = page - before * 16;
        (0..before).for_each(|i| write_area(at + i * 16, &[(cpu::LSTAR, 0x1000 + i)]));
        vmx::write(f::ENTRY_MSR_LOAD_ADDR, at);
        vmx::write(f::ENTRY_MSR_LOAD_COUNT, before + lab.random.below(3) + 1);
        let exit = enter(lab);
        let number = vmx::read(f::EXIT_QUALIFICATION);
        Seen::of(format_args!("{exit} at {}", number == before + 1)).escaped_if(matches!(exit, Exit::Done(_)))
    });
    for place in Place::BESIDE {
        lab.attack(format_args!("VM-exit MSR areas {}", place.name()), Told::Same, |lab| {
            with(lab, Extra::default());
            lab.beside = true;
            let page = place.page(0);
            // To the last byte below the range, from the first one above it.
            let at = if place == Place::Below { page + PAGE - 32 } else { page };
            write_area(at, &[(cpu::LSTAR, 0), (cpu::CSTAR, 0)]);
            vmx::write(f::EXIT_MSR_STORE_ADDR, at);
            vmx::write(f::EXIT_MSR_STORE_COUNT, 2);
            let value = lab.random.next() & 0xFFFF_FFFF;
            cpu::wrmsr(cpu::LSTAR, value);
            let exit = enter(lab);
            vmx::write(f::EXIT_MSR_STORE_COUNT, 0);
            vmx::write(f::EXIT_MSR_LOAD_ADDR, at);
            vmx::write(f::EXIT_MSR_LOAD_COUNT, 2);
            cpu::wrmsr(cpu::LSTAR, 0);
            let again = enter(lab);
            let loaded = cpu::rdmsr(cpu::LSTAR) == value;
            Seen::of(format_args!("{exit} {again} {loaded}"))
        });
    }
}

/// Entries of an MSR area where this guest has memory of its own.
fn write_area(at: u64, entries: &[(u32, u64)]) {
    let (start, end) = place::range();
    for (i, (msr, value)) in (0..).zip(entries) {
        let to = (at + i * 16) as *mut u64;
        if !(start..end).contains(&(at + i * 16)) {
            // SAFETY: a page beside the range, which this guest uses for nothing else.
            unsafe { (to.write_volatile((*msr).into()), to.add(1).write_volatile(*value)) };
        }
    }
}

const VECTOR: u8 = 0xF2;

extern "C" fn port_in(port: u64) -> u64 {
    cpu::in8(port as u16);
    port
}

extern "C" fn msr_read(msr: u64) -> u64 {
    cpu::rdmsr(msr as u32);
    msr
}

extern "C" fn vmread(field: u64) -> u64 {
    vmx::try_read(field).0.succeeded().into()
}

extern "C" fn vmwrite(field: u64) -> u64 {
    vmx::try_write(field, 0).succeeded().into()
}

extern "C" fn task_priority(value: u64) -> u64 {
    let read: u64;
    // SAFETY: a guest's task priority, which is virtual.
    unsafe { asm!("mov cr8, {}", "mov {}, cr8", in(reg) value, lateout(reg) read, options(nostack)) };
    read & 0xF
}

extern "C" fn interrupt_oneself(value: u64) -> u64 {
    apic::send_self(VECTOR);
    (0..100).for_each(|_| core::hint::spin_loop());
    value
}

extern "C" fn switch_eptp(entry: u64) -> u64 {
    // SAFETY: all trees that are valid map this image.
    unsafe { asm!("vmfunc", in("eax") 0, in("ecx") entry as u32, options(nostack)) };
    entry
}
