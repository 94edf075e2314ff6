//! Registers: what a guest or its hypervisor leaves there comes through every exit and every instruction, and nothing else does.

use crate::{
    guest::{Exit, Extra, forget},
    lab::{Lab, Seen, Told},
};
use core::{arch::global_asm, ptr};
use l2_kit::{
    cpu,
    ept::{WRITE_BACK, rights::RWX},
    fields as f, setup,
    vmx::{self, reason},
};

/// Values of all registers before and after an instruction: general ones in the order of their numbers (RSP and RDI are not
/// changed), XMM0 to XMM15, CR2, DR0 to DR3.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Block {
    before: Registers,
    after: Registers,
    target: u64,
}

#[repr(C, align(16))]
#[derive(Clone, Copy, PartialEq)]
struct Registers {
    general: [u64; 16],
    vector: [u128; 16],
    special: [u64; 6],
}

const EMPTY: Registers = Registers { general: [0; 16], vector: [0; 16], special: [0; 6] };
const VECTORS: usize = core::mem::offset_of!(Registers, vector);
const SPECIAL: usize = core::mem::offset_of!(Registers, special);
const AFTER: usize = core::mem::offset_of!(Block, after);
const TARGET: usize = core::mem::offset_of!(Block, target);

global_asm!(
    ".pushsection .text.attacks_state, \"ax\"",
    "attacks_state:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "push rdi",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "movups xmm\\n, [rdi + {vectors} + 16 * \\n]",
    ".endr",
    "mov rax, [rdi + {special}]",
    "mov cr2, rax",
    "mov rax, [rdi + {special} + 8]",
    "mov dr0, rax",
    "mov rax, [rdi + {special} + 16]",
    "mov dr1, rax",
    "mov rax, [rdi + {special} + 24]",
    "mov dr2, rax",
    "mov rax, [rdi + {special} + 32]",
    "mov dr3, rax",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rbp, [rdi + 40]",
    "mov rsi, [rdi + 48]",
    ".irp n, 8, 9, 10, 11, 12, 13, 14, 15",
    "mov r\\n, [rdi + 8 * \\n]",
    ".endr",
    "call [rdi + {target}]",
    "mov rdi, [rsp]",
    "lea rdi, [rdi + {after}]",
    "mov [rdi], rax",
    "mov [rdi + 8], rcx",
    "mov [rdi + 16], rdx",
    "mov [rdi + 24], rbx",
    "mov [rdi + 40], rbp",
    "mov [rdi + 48], rsi",
    ".irp n, 8, 9, 10, 11, 12, 13, 14, 15",
    "mov [rdi + 8 * \\n], r\\n",
    ".endr",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "movups [rdi + {vectors} + 16 * \\n], xmm\\n",
    ".endr",
    "mov rax, cr2",
    "mov [rdi + {special}], rax",
    "mov rax, dr0",
    "mov [rdi + {special} + 8], rax",
    "mov rax, dr1",
    "mov [rdi + {special} + 16], rax",
    "mov rax, dr2",
    "mov [rdi + {special} + 24], rax",
    "mov rax, dr3",
    "mov [rdi + {special} + 32], rax",
    "pop rdi",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "xor eax, eax",
    "ret",
    ".popsection",
    vectors = const VECTORS,
    special = const SPECIAL,
    after = const AFTER,
    target = const TARGET,
);

/// Code that changes no register for good; its operands are on the stack.
macro_rules! targets {
    ($($name:ident: $($instruction:literal)+;)*) => {
        global_asm!(
            ".pushsection .text.attacks_targets, \"ax\"",
            $( concat!("attacks_one_", stringify!($name), ":"), $($instruction,)+ "ret", )*
            ".popsection",
        );
        mod one {
            unsafe extern "C" {
                $(
                    #[link_name = concat!("attacks_one_", stringify!($name))]
                    pub fn $name();
                )*
            }
        }
    };
}

targets! {
    nothing: "nop";
    cpuid: "push rax" "push rbx" "push rcx" "push rdx" "xor eax, eax" "cpuid" "pop rdx" "pop rcx" "pop rbx" "pop rax";
    vmcall: "vmcall";
    vmptrst: "vmptrst [rsp - 64]";
    vmread: "push rax" "push rcx" "mov ecx, 0x681C" "vmread rax, rcx" "pop rcx" "pop rax";
    vmread_far: "push rax" "push rcx" "mov ecx, 0x2012" "vmread rax, rcx" "pop rcx" "pop rax";
    vmwrite: "push rcx" "mov ecx, 0x6C14" "vmwrite rcx, [rsp - 64]" "pop rcx";
    vmwrite_bad: "push rcx" "mov ecx, 0x4402" "vmwrite rcx, [rsp - 64]" "pop rcx";
    vmlaunch: "vmlaunch";
    invept: "push rcx" "push 0" "push 0" "mov ecx, 2" "invept rcx, [rsp]" "add rsp, 16" "pop rcx";
    invvpid: "push rcx" "push 0" "push 0" "mov ecx, 2" "invvpid rcx, [rsp]" "add rsp, 16" "pop rcx";
    vmptrld: "push -1" "vmptrld [rsp]" "add rsp, 8";
    vmclear: "push -1" "vmclear [rsp]" "add rsp, 8";
    vmxon: "push -1" "vmxon [rsp]" "add rsp, 8";
    rdmsr: "push rax" "push rcx" "push rdx" "mov ecx, 0x480" "rdmsr" "pop rdx" "pop rcx" "pop rax";
    cr4: "push rax" "mov rax, cr4" "mov cr4, rax" "pop rax";
    cr0: "push rax" "mov rax, cr0" "mov cr0, rax" "pop rax";
    xsetbv: "push rax" "push rcx" "push rdx" "xor ecx, ecx" "xgetbv" "xsetbv" "pop rdx" "pop rcx" "pop rax";
    invd: "wbinvd";
    memory: "push rax" "push rcx" "mov rcx, 0x180000000" "mov rax, [rcx]" "pop rcx" "pop rax";
}

unsafe extern "C" {
    #[link_name = "attacks_state"]
    safe fn around(block: u64) -> u64;
}

type Target = (&'static str, unsafe extern "C" fn());

/// Instructions of L2, most of which exit to what is below.
const OF_L2: [Target; 17] = [
    ("nothing", one::nothing),
    ("CPUID", one::cpuid),
    ("VMPTRST", one::vmptrst),
    ("VMREAD", one::vmread),
    ("VMREAD of a rare field", one::vmread_far),
    ("VMWRITE", one::vmwrite),
    ("VMWRITE that fails", one::vmwrite_bad),
    ("VMLAUNCH that fails", one::vmlaunch),
    ("INVEPT", one::invept),
    ("INVVPID", one::invvpid),
    ("VMPTRLD that fails", one::vmptrld),
    ("VMCLEAR that fails", one::vmclear),
    ("VMXON that fails", one::vmxon),
    ("RDMSR", one::rdmsr),
    ("MOV to CR4", one::cr4),
    ("MOV to CR0", one::cr0),
    ("XSETBV", one::xsetbv),
];

/// Instructions of L3, which exit to L2, or to nvmx alone.
const OF_L3: [Target; 8] = [
    ("nothing", one::nothing),
    ("CPUID", one::cpuid),
    ("VMCALL", one::vmcall),
    ("VMREAD", one::vmread),
    ("INVEPT", one::invept),
    ("VMXON", one::vmxon),
    ("WBINVD", one::invd),
    ("an access that EPT allows", one::memory),
];

pub fn all(lab: &mut Lab) {
    for (name, target) in OF_L2 {
        lab.attack(format_args!("registers of L2 around {name}"), Told::Same, |lab| {
            lab.with(Extra::default());
            if name == "VMLAUNCH that fails" {
                vmx::write(f::HOST_CS, 0);
            }
            // VMWRITE takes its value from below the stack: HOST_RSP is written anew with the next entry.
            let block = block(lab, target);
            around(block as u64);
            lab.guest.vcpu.write_host_stack();
            judge(block)
        });
    }
    for (name, target) in OF_L3 {
        lab.attack(format_args!("registers of L3 around {name}"), Told::Same, |lab| {
            lab.with(Extra::default());
            lab.lead_to(lab.pages[4], WRITE_BACK | RWX);
            let block = block(lab, target);
            forget();
            lab.guest.start(around, block as u64);
            let mut exits = 0;
            let own = lab.random.next();
            loop {
                match lab.run() {
                    Exit::Done(_) => break judge(block),
                    Exit::Reason(reason::CPUID) => {
                        // L2 works with the registers that are shared meanwhile, and puts them back.
                        let cr2 = cpu::cr2();
                        cpu::set_cr2(own);
                        cpu::set_cr2(cr2);
                    }
                    Exit::Reason(_) => {}
                    _ => break Seen::of("no exit").escaped_if(true),
                }
                exits += 1;
                if exits > 8 {
                    break Seen::of("too many exits").escaped_if(true);
                }
                lab.guest.skip();
            }
        });
    }
    lab.attack(format_args!("what L3 leaves in shared registers"), Told::Same, |lab| {
        lab.with(Extra::default());
        let block = block(lab, one::nothing);
        lab.guest.execute(around, block as u64);
        let mut own = EMPTY;
        own.special[0] = cpu::cr2();
        // SAFETY: the lab's page; only CR2 is looked at.
        let left = unsafe { (*block).before.special[0] };
        Seen::of(own.special[0] == left)
    });
    for msr in
        [cpu::LSTAR, cpu::CSTAR, 0xC000_0081, 0xC000_0084, 0xC000_0102, 0xC000_0103, 0x174, 0x175, 0x176, cpu::PAT]
    {
        lab.attack(format_args!("MSR {msr:#x} from L2 to L3 and back"), Told::Same, |lab| {
            lab.with(Extra::default());
            let before = cpu::rdmsr(msr);
            let value = if msr == cpu::PAT { 0x0007_0406_0007_0406 } else { lab.random.next() & 0x7FFF_FFFF };
            if cpu::try_wrmsr(msr, value).is_err() {
                return Seen::of("none");
            }
            let seen = lab.execute(read_msr, msr.into());
            let after = cpu::rdmsr(msr);
            cpu::wrmsr(msr, before);
            let revision = setup::revision();
            Seen::of(format_args!("{} {}", seen == Exit::Done(value), after == value)).escaped_if(revision == 0)
        });
    }
}

extern "C" fn read_msr(msr: u64) -> u64 {
    cpu::rdmsr(msr as u32)
}

/// A block in the lab's pages, with random values.
fn block(lab: &mut Lab, target: unsafe extern "C" fn()) -> *mut Block {
    let mut block = Block { before: EMPTY, after: EMPTY, target: target as usize as u64 };
    block.before.general.iter_mut().for_each(|word| *word = lab.random.next());
    block
        .before
        .vector
        .iter_mut()
        .for_each(|word| *word = u128::from(lab.random.next()) << 64 | u128::from(lab.random.next()));
    block.before.special.iter_mut().for_each(|word| *word = lab.random.next() & 0x7FFF_FFFF_FFFF);
    let place = lab.pages[8] as *mut Block;
    // SAFETY: the lab's page, large enough.
    unsafe { ptr::write_volatile(place, block) };
    place
}

/// What came through is what was there.
fn judge(block: *mut Block) -> Seen {
    // SAFETY: as above.
    let Block { before, after, .. } = unsafe { ptr::read_volatile(block) };
    // RSP and RDI
    let general = (0..16).filter(|n| !matches!(n, 4 | 7)).all(|n| before.general[n] == after.general[n]);
    let vector = before.vector == after.vector;
    let special = before.special[..5] == after.special[..5];
    Seen::of(format_args!("general {general} vector {vector} special {special}"))
        .escaped_if(!(general && vector && special))
}
