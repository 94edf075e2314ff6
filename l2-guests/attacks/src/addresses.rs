//! Addresses that are none: unaligned, beyond the width of physical addresses, in the last page, around the end.

use crate::{
    guest::{self, Exit, Extra},
    lab::{Lab, Seen, Told},
    place::Place,
};
use l2_kit::{
    cpu, fields as f, setup,
    setup::{Kind, exit_controls, pin, primary, secondary},
    trap,
    vmx::{self, Outcome, reason},
};

/// A field with the controls under which it counts.
struct Field {
    name: &'static str,
    field: u32,
    extra: Extra,
    /// Bits that must be 0
    aligned: u64,
}

const NONE: Extra = Extra { pin: 0, primary: 0, secondary: 0, exit: 0, entry: 0 };

const fn field(name: &'static str, field: u32, extra: Extra) -> Field {
    Field { name, field, extra, aligned: 0xFFF }
}

const APIC: Extra = Extra { primary: primary::TPR_SHADOW, ..NONE };
const POSTED: Extra = Extra {
    pin: pin::EXTERNAL_INTERRUPT | pin::POSTED_INTERRUPTS,
    secondary: secondary::VIRTUAL_INTERRUPTS,
    exit: exit_controls::ACKNOWLEDGE,
    ..APIC
};

const FIELDS: [Field; 17] = [
    field("I/O bitmap A", f::IO_BITMAP_A, Extra { primary: primary::IO_BITMAPS, ..NONE }),
    field("I/O bitmap B", f::IO_BITMAP_B, Extra { primary: primary::IO_BITMAPS, ..NONE }),
    field("MSR bitmap", f::MSR_BITMAP, NONE),
    field("VMREAD bitmap", f::VMREAD_BITMAP, Extra { secondary: secondary::VMCS_SHADOWING, ..NONE }),
    field("VMWRITE bitmap", f::VMWRITE_BITMAP, Extra { secondary: secondary::VMCS_SHADOWING, ..NONE }),
    field("link pointer", f::LINK_POINTER, NONE),
    field("virtual-APIC page", f::VIRTUAL_APIC, APIC),
    field("APIC-access page", f::APIC_ACCESS, Extra { secondary: secondary::APIC_ACCESSES, ..NONE }),
    Field { aligned: 0x3F, ..field("posted-interrupt descriptor", f::POSTED_INT_DESCRIPTOR, POSTED) },
    field("PML page", f::PML_ADDR, Extra { secondary: secondary::PML, ..NONE }),
    field("#VE information", f::VE_INFORMATION, Extra { secondary: secondary::EPT_VIOLATION_VE, ..NONE }),
    field("EPTP list", f::EPTP_LIST, Extra { secondary: secondary::VM_FUNCTIONS, ..NONE }),
    Field { aligned: 0xFFF, ..field("EPTP", f::EPTP, NONE) },
    Field { aligned: 0xF, ..field("VM-entry MSR-load area", f::ENTRY_MSR_LOAD_ADDR, NONE) },
    Field { aligned: 0xF, ..field("VM-exit MSR-store area", f::EXIT_MSR_STORE_ADDR, NONE) },
    Field { aligned: 0xF, ..field("VM-exit MSR-load area", f::EXIT_MSR_LOAD_ADDR, NONE) },
    Field { aligned: 0, ..field("guest CR3", f::GUEST_CR3, NONE) },
];

const AREAS: [(u32, u32); 3] = [
    (f::ENTRY_MSR_LOAD_ADDR, f::ENTRY_MSR_LOAD_COUNT),
    (f::EXIT_MSR_STORE_ADDR, f::EXIT_MSR_STORE_COUNT),
    (f::EXIT_MSR_LOAD_ADDR, f::EXIT_MSR_LOAD_COUNT),
];

pub fn all(lab: &mut Lab) {
    let width = cpu::cpuid(0x8000_0008, 0)[0] & 0xFF;
    let last = (1u64 << width) - 0x1000;
    for Field { name, field, extra, aligned } in FIELDS {
        if !offered(extra) {
            continue;
        }
        for bad in ["unaligned", "beyond the width", "wrapping", "last page"] {
            // A bad area that is used at an exit ends the machine, as documented; an entry refuses the others.
            let at_exit = AREAS.iter().skip(1).any(|(area, _)| *area == field);
            if bad == "unaligned" && aligned == 0 || bad == "last page" && at_exit {
                continue;
            }
            // Nothing answers at the last page, but what a read there gives depends on the machine.
            let told = if bad == "last page" { Told::Answered } else { Told::Same };
            lab.attack(format_args!("{name}: {bad}"), told, |lab| {
                lab.with(extra);
                defaults(lab, extra);
                vmx::write(f::EXCEPTION_BITMAP, 0xFFFF_FFFF);
                if let Some((_, count)) = AREAS.iter().find(|(area, _)| *area == field) {
                    vmx::write(*count, 1);
                }
                let page = lab.pages[3];
                let low = if field == f::EPTP { 0x1E } else { 0 };
                let value = match bad {
                    "unaligned" if field == f::EPTP => page | low | 1 << (8 + lab.random.below(4)),
                    "unaligned" => page | 1 << lab.random.below(aligned.count_ones().into()),
                    "beyond the width" => {
                        page | low | 1 << (u64::from(width) + lab.random.below(52 - u64::from(width)))
                    }
                    "wrapping" => !aligned & !0xF | low,
                    _ => last | low,
                };
                vmx::write(field, value);
                let exit = lab.execute(guest::nothing, 1);
                let refused =
                    matches!(exit, Exit::Refused(Outcome::FailValid(7)) | Exit::Failed(reason::INVALID_GUEST_STATE));
                Seen::of(exit).escaped_if(!refused && bad != "last page")
            });
        }
    }
    pointers(lab, width);
    msrs(lab);
}

fn offered(extra: Extra) -> bool {
    setup::allowed_one(Kind::Pin, extra.pin)
        && setup::allowed_one(Kind::Primary, extra.primary)
        && setup::allowed_one(Kind::Secondary, extra.secondary)
        && setup::allowed_one(Kind::Exit, extra.exit)
}

/// Good addresses for whatever the controls ask for.
fn defaults(lab: &mut Lab, extra: Extra) {
    let page = lab.pages[1];
    let fields =
        [f::IO_BITMAP_A, f::IO_BITMAP_B, f::EXIT_MSR_LOAD_ADDR, f::EXIT_MSR_STORE_ADDR, f::ENTRY_MSR_LOAD_ADDR];
    fields.into_iter().for_each(|field| vmx::write(field, page));
    for (bits, used, fields) in [
        (extra.primary, primary::TPR_SHADOW, &[f::VIRTUAL_APIC][..]),
        (extra.secondary, secondary::APIC_ACCESSES, &[f::APIC_ACCESS]),
        (extra.secondary, secondary::VMCS_SHADOWING, &[f::VMREAD_BITMAP, f::VMWRITE_BITMAP]),
        (extra.pin, pin::POSTED_INTERRUPTS, &[f::POSTED_INT_DESCRIPTOR]),
        (extra.secondary, secondary::PML, &[f::PML_ADDR]),
        (extra.secondary, secondary::EPT_VIOLATION_VE, &[f::VE_INFORMATION]),
        (extra.secondary, secondary::VM_FUNCTIONS, &[f::EPTP_LIST]),
    ] {
        if bits & used != 0 {
            fields.iter().for_each(|field| vmx::write(*field, page));
        }
    }
    if extra.primary & primary::TPR_SHADOW != 0 {
        vmx::write(f::TPR_THRESHOLD, 0);
    }
    if extra.secondary & secondary::VM_FUNCTIONS != 0 {
        vmx::write(f::VM_FUNCTION_CONTROLS, 1);
    }
    if extra.secondary & secondary::PML != 0 {
        vmx::write(f::EPTP, lab.guest.ept.pointer_with_flags());
        vmx::write(f::PML_INDEX, 511);
    }
    if extra.pin & pin::POSTED_INTERRUPTS != 0 {
        vmx::write(f::POSTED_INT_VECTOR, 0xF2);
        vmx::write(f::GUEST_INTERRUPT_STATUS, 0);
        [f::EOI_EXIT0, f::EOI_EXIT1, f::EOI_EXIT2, f::EOI_EXIT3].into_iter().for_each(|field| vmx::write(field, 0));
    }
}

/// Operands of VMX instructions.
fn pointers(lab: &mut Lab, width: u32) {
    type Instruction = (&'static str, fn(u64) -> Outcome);
    const INSTRUCTIONS: [Instruction; 5] = [
        ("VMCLEAR", vmx::vmclear),
        ("VMPTRLD", vmx::vmptrld),
        ("VMXON again", vmx::vmxon),
        ("INVEPT", |at| vmx::invept(1, [at, 0])),
        ("INVVPID", |at| vmx::invvpid(0, [at | 1, at])),
    ];
    for (name, instruction) in INSTRUCTIONS {
        lab.attack(format_args!("{name} of addresses that are none"), Told::Same, |lab| {
            let page = lab.pages[3];
            let mut seen = 0u64;
            for value in
                [page | 1 << lab.random.below(12), page | 1 << width, 1 << 63, !0xFFF, !0, 1 << (width - 1) | 1]
            {
                lab.bracket();
                let outcome = match trap::catch(|| instruction(value)) {
                    Ok(Outcome::Succeed) => 0,
                    Ok(Outcome::FailValid(error)) => u64::from(error),
                    Ok(_) => 62,
                    Err(trap) => 64 + u64::from(trap.vector),
                };
                seen = seen << 8 | outcome;
            }
            Seen::of(format_args!("{seen:#x}"))
        });
    }
}

/// MSRs that take linear addresses, from L2 and from L3.
fn msrs(lab: &mut Lab) {
    const MSRS: [(u32, &str); 7] = [
        (cpu::LSTAR, "LSTAR"),
        (cpu::CSTAR, "CSTAR"),
        (cpu::FS_BASE, "FS_BASE"),
        (cpu::GS_BASE, "GS_BASE"),
        (0xC000_0102, "KERNEL_GS_BASE"),
        (0x175, "SYSENTER_ESP"),
        (0x176, "SYSENTER_EIP"),
    ];
    for (msr, name) in MSRS {
        lab.attack(format_args!("{name} with addresses that are none"), Told::Same, |lab| {
            let before = cpu::rdmsr(msr);
            let within = Place::Within.page(lab.random.next());
            let values = [1 << 47, !0 << 46 ^ 1 << 62, !0, within, 0x7FFF_FFFF_F000, 1 << 63];
            let mut seen = 0u32;
            vmx::write(f::EXCEPTION_BITMAP, 0xFFFF_FFFF);
            for value in values {
                let own = cpu::try_wrmsr(msr, value).is_ok() && cpu::rdmsr(msr) == value;
                cpu::wrmsr(msr, before);
                lab.guest.vcpu.registers.rsi = value;
                lab.guest.start(write_msr, msr.into());
                let guest = lab.run() == Exit::Done(1);
                cpu::wrmsr(msr, before);
                seen = seen << 2 | u32::from(own) << 1 | u32::from(guest);
            }
            Seen::of(format_args!("{seen:#x}"))
        });
    }
}

core::arch::global_asm!(
    ".pushsection .text.attacks_wrmsr, \"ax\"",
    "attacks_wrmsr:",
    "mov ecx, edi",
    "mov eax, esi",
    "mov rdx, rsi",
    "shr rdx, 32",
    "wrmsr",
    "mov eax, 1",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    /// Writes RSI to the MSR: a program.
    #[link_name = "attacks_wrmsr"]
    safe fn write_msr(msr: u64) -> u64;
}
