//! Random programs: L2 and L3 take turns with instructions that a source of numbers picks. The same numbers give the same program
//! on every machine, as long as what it sees is the same.

use crate::guest::{Guest, Op, Outcome};
use crate::processor::{Exit, Level};
use crate::second::core_support::valid_vmcs12;
use nvmx::rules::caps::offered;
use nvmx::vmx::field::Area;
use nvmx::vmx::region::REVISION;
use nvmx::vmx::{Field, Field::*, Fields};

/// Where a program's decisions come from.
pub trait Numbers {
    /// The next one.
    fn next(&mut self) -> u64;
    /// None is left.
    fn is_over(&self) -> bool {
        false
    }
    /// A number below `end`.
    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 7) as usize % end
    }
    /// One of these.
    fn pick<T: Copy>(&mut self, from: &[T]) -> T
    where
        Self: Sized,
    {
        from[self.below(from.len())]
    }
}

/// xorshift64*
#[derive(Clone, Debug)]
pub struct Seed(pub u64);

impl Numbers for Seed {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

const VMXON: u64 = 0x1_0000;
/// Regions of VMCSs, more than there are slots at first.
const REGIONS: [u64; 5] = [0x1_1000, 0x1_2000, 0x1_3000, 0x1_4000, 0x1_5000];
const MSR_BITMAP_AT: u64 = 0x2_0000;
const IO_BITMAPS: u64 = 0x2_1000;
const SHADOW_BITMAPS: u64 = 0x2_3000;
const MSR_AREA: u64 = 0x2_5000;
const EPTP_LIST: u64 = 0x2_6000;
const EPTS: [u64; 2] = [0x20_0000, 0x21_0000];
const HANDLER: u64 = 0x11_0000;
/// Pages of L3 that are read and written.
const PAGES: [u64; 4] = [0x3_0000, 0x3_1000, 0x3_2000, 0x40_0000];
const MSRS: [u32; 9] = [0x174, 0x175, 0x176, 0x277, 0xC000_0080, 0xC000_0081, 0xC000_0082, 0xC000_0102, 0x6E0];

/// One program.
pub struct Sequence<N> {
    guest: Guest,
    numbers: N,
    fields: Vec<Field>,
}

fn eptp(tree: usize) -> u64 {
    EPTS[tree] | 3 << 3 | 6
}

fn build_ept(g: &Guest, root: u64) {
    (0..3).for_each(|level| g.poke(root + 0x1000 * level, (root + 0x1000 * (level + 1)) | 7));
    (1..6).for_each(|n| g.poke(root + 0x2000 + 8 * n, n << 21 | 0xB7));
    (0..512).for_each(|n| g.poke(root + 0x3000 + 8 * n, n << 12 | 0x37));
}

/// Values of the fields of a vmcs12 that every check lets through, on every machine.
pub fn valid() -> Vec<(Field, u64)> {
    let caps = offered(&crate::world::without_shadowing());
    let mut v = valid_vmcs12(&caps);
    v.set(EPT_POINTER, eptp(0)).set(HOST_RIP, HANDLER).set(HOST_CR3, 0x1000).set(GUEST_CR3, 0x1000);
    v.set(HOST_CR0, 0x8001_0031).set(GUEST_CR0, 0x8001_0031);
    for field in [VM_ENTRY_MSR_LOAD_ADDR, VM_EXIT_MSR_LOAD_ADDR, VM_EXIT_MSR_STORE_ADDR] {
        v.set(field, MSR_AREA);
    }
    let fields = Field::ALL.iter().filter(|field| caps.has_field(**field) && !field.is_read_only());
    fields.map(|field| (*field, v.get(*field))).collect()
}

impl<N: Numbers> Sequence<N> {
    pub fn new(guest: Guest, numbers: N) -> Self {
        let fields = Field::ALL.iter().copied().filter(|f| f.area() != Area::ExitInfo).collect();
        Sequence { guest, numbers, fields }
    }

    /// Runs it for so many instructions.
    pub async fn run(mut self, steps: usize) {
        self.begin().await;
        for _ in 0..steps {
            if self.numbers.is_over() {
                break;
            }
            let level = self.guest.level();
            match level {
                Level::L2 => self.step_of_l2().await,
                Level::L3 => self.step_of_l3().await,
            }
            if (level, self.guest.level()) == (Level::L3, Level::L2) {
                self.handle().await;
            }
        }
    }

    async fn begin(&mut self) {
        let g = self.guest.clone();
        EPTS.iter().for_each(|root| build_ept(&g, *root));
        (0..2).for_each(|n| g.poke(EPTP_LIST + 8 * n, eptp(n as usize)));
        for n in 0..512 {
            g.poke(MSR_BITMAP_AT + 8 * n, if n % 3 == 0 { u64::MAX } else { 0 });
            g.poke(IO_BITMAPS + 8 * n, 0x5555_0000_FFFF_0000);
            g.poke(SHADOW_BITMAPS + 8 * n, 0xFF00_FF00_FF00_FF00);
            g.poke(SHADOW_BITMAPS + 0x1000 + 8 * n, 0xFFF0_FFFF_FFFF_FFFF);
        }
        for (n, (index, value)) in [(0xC000_0081, 0x1111), (0x277, 0x0606), (0xC000_0102, 0x5000)].iter().enumerate() {
            g.poke(MSR_AREA + 16 * n as u64, *index);
            g.poke(MSR_AREA + 16 * n as u64 + 8, *value);
        }
        g.poke_u32(VMXON, REVISION);
        REGIONS.iter().for_each(|at| g.poke_u32(*at, REVISION));
        self.do_(Op::MovToCr4(0x2020)).await;
        self.do_(Op::MovToCr0(0x8001_0031)).await;
        self.do_(Op::Vmxon(VMXON)).await;
        let first = REGIONS[0];
        self.set_up(first).await;
    }

    /// VMCLEAR, VMPTRLD, all fields.
    async fn set_up(&mut self, at: u64) {
        self.do_(Op::Vmclear(at)).await;
        self.do_(Op::Vmptrld(at)).await;
        for (field, value) in valid() {
            self.guest.run(Op::Vmwrite(field.encoding().into(), value)).await;
        }
        self.guest.see("set up");
    }

    async fn do_(&mut self, op: Op) -> Outcome {
        let outcome = self.guest.run(op).await;
        self.guest.see((op, outcome));
        outcome
    }

    /// What a hypervisor does behind an exit: it looks, changes something, and mostly resumes.
    async fn handle(&mut self) {
        for field in [VM_EXIT_REASON, EXIT_QUALIFICATION, GUEST_RIP, GUEST_INTERRUPTIBILITY_INFO] {
            self.do_(Op::Vmread(field.encoding().into())).await;
        }
        for _ in 0..self.numbers.below(3) {
            let field = self.numbers.pick(&[
                VM_EXIT_INTR_INFO,
                VM_EXIT_INTR_ERROR_CODE,
                VM_EXIT_INSTRUCTION_LEN,
                IDT_VECTORING_INFO_FIELD,
                GUEST_IA32_EFER,
                GUEST_IA32_PAT,
                GUEST_RFLAGS,
                GUEST_DR7,
                GUEST_CR0,
                GUEST_CR4,
                VM_ENTRY_CONTROLS,
                VM_ENTRY_INTR_INFO_FIELD,
                VM_INSTRUCTION_ERROR,
            ]);
            self.do_(Op::Vmread(field.encoding().into())).await;
        }
        if self.numbers.below(4) == 0 {
            self.change().await;
        }
        if self.numbers.below(3) == 0 {
            self.change_thread().await;
        }
        if self.numbers.below(8) != 0 {
            self.do_(Op::Vmresume).await;
        }
    }

    /// What a hypervisor with threads does: another stack, other page tables and bases, seldom one that breaks a rule.
    async fn change_thread(&mut self) {
        for field in [HOST_RSP, HOST_CR3, HOST_FS_BASE, HOST_GS_BASE] {
            let n = &mut self.numbers;
            let (read, write, broken) = (n.below(3), n.below(3), n.below(40));
            if read == 0 {
                self.do_(Op::Vmread(field.encoding().into())).await;
            }
            if write != 0 {
                let value = if broken == 0 { 1 << 63 | 1 << 50 } else { self.value_for(field) };
                self.do_(Op::Vmwrite(field.encoding().into(), value)).await;
            }
        }
    }

    /// VMWRITE of something that leaves the state valid, or nearly so.
    async fn change(&mut self) {
        let n = &mut self.numbers;
        let flip = |field: Field, bits: &[u32], n: &mut N| (field, Some(1u64 << n.pick(bits)));
        let (field, bits) = match n.below(16) {
            0 => flip(PIN_BASED_VM_EXEC_CONTROL, &[0, 3, 5, 6], n),
            1 | 2 => flip(
                CPU_BASED_VM_EXEC_CONTROL,
                &[2, 3, 7, 9, 10, 11, 12, 15, 16, 22, 23, 24, 25, 27, 28, 29, 30, 31],
                n,
            ),
            3 => flip(SECONDARY_VM_EXEC_CONTROL, &[1, 2, 3, 5, 6, 7, 10, 12, 13, 14, 16, 20], n),
            4 => flip(VM_EXIT_CONTROLS, &[2, 15, 18, 19, 20, 21, 22], n),
            5 => flip(VM_ENTRY_CONTROLS, &[2, 14, 15], n),
            6 => flip(EXCEPTION_BITMAP, &[1, 3, 6, 13, 14], n),
            7 => flip(CR0_GUEST_HOST_MASK, &[0, 3, 16, 31], n),
            8 => flip(CR0_READ_SHADOW, &[0, 3, 16], n),
            9 => flip(CR4_GUEST_HOST_MASK, &[2, 7, 13], n),
            10 => flip(GUEST_INTERRUPTIBILITY_INFO, &[0, 1, 3], n),
            11 => flip(GUEST_RFLAGS, &[9, 6, 0], n),
            _ => (RANDOM[n.below(RANDOM.len())], None),
        };
        let value = match bits {
            Some(bits) => {
                self.do_(Op::Vmread(field.encoding().into())).await;
                self.guest.gpr(0) ^ bits
            }
            None => self.value_for(field),
        };
        self.do_(Op::Vmwrite(field.encoding().into(), value)).await;
    }

    fn value_for(&mut self, field: Field) -> u64 {
        let n = &mut self.numbers;
        match field {
            VM_ENTRY_INTR_INFO_FIELD => n.pick(&[
                0,
                0x8000_0202,
                0x8000_0020,
                0x8000_0B0D,
                0x8000_0306,
                0x8000_0480,
                0x8000_0700,
                0x8000_0603,
                0x8000_0B0E,
            ]),
            VM_ENTRY_EXCEPTION_ERROR_CODE | VM_ENTRY_INSTRUCTION_LEN => n.below(4) as u64,
            MSR_BITMAP => MSR_BITMAP_AT,
            IO_BITMAP_A | IO_BITMAP_B => IO_BITMAPS,
            VMREAD_BITMAP => SHADOW_BITMAPS,
            VMWRITE_BITMAP => SHADOW_BITMAPS + 0x1000,
            EPT_POINTER => eptp(n.below(2)),
            EPTP_LIST_ADDRESS => EPTP_LIST,
            VM_FUNCTION_CONTROLS => n.below(2) as u64,
            VIRTUAL_PROCESSOR_ID => n.pick(&[1, 2, 3, 66, 0xFFFF]),
            VMCS_LINK_POINTER => n.pick(&[u64::MAX, u64::MAX, REGIONS[4], 0x1_1001]),
            VM_ENTRY_MSR_LOAD_ADDR | VM_EXIT_MSR_LOAD_ADDR | VM_EXIT_MSR_STORE_ADDR => MSR_AREA,
            VM_ENTRY_MSR_LOAD_COUNT | VM_EXIT_MSR_LOAD_COUNT | VM_EXIT_MSR_STORE_COUNT => n.below(4) as u64,
            VMX_PREEMPTION_TIMER_VALUE => n.pick(&[0, 0x1000]),
            GUEST_IA32_EFER | HOST_IA32_EFER => n.pick(&[0xD01, 0xD00, 0x501, 0x500]),
            GUEST_IA32_PAT | HOST_IA32_PAT => n.pick(&[0x0007_0406_0007_0406, 0x0606, 2]),
            GUEST_DR7 => n.pick(&[0x400, 0x401]),
            GUEST_CR3 => 0x1000,
            HOST_CR3 => n.pick(&[0x1000, 0x1008, 0x1018]),
            HOST_RIP => n.pick(&[HANDLER, HANDLER + 0x100]),
            TSC_OFFSET => n.next(),
            GUEST_ACTIVITY_STATE => n.pick(&[0, 0, 1, 3, 4]),
            CR3_TARGET_COUNT => n.pick(&[0, 1, 4, 5]),
            _ => n.pick(&[0, 1, 0x1000, 0x5000, 0x10, 0x18]),
        }
    }

    async fn step_of_l2(&mut self) {
        let n = &mut self.numbers;
        let op = match n.below(30) {
            0..=5 => return self.change().await,
            6..=9 => Op::Vmresume,
            10..=12 => Op::Vmlaunch,
            13 => Op::Vmptrld(n.pick(&REGIONS)),
            14 => Op::Vmclear(n.pick(&REGIONS)),
            15 => {
                let at = n.pick(&REGIONS);
                return self.set_up(at).await;
            }
            16 => Op::Vmptrst,
            17 => match n.below(3) {
                0 => Op::Vmptrld(n.pick(&[VMXON, 0x1_1008, 1 << 40, 0x7_0000])),
                1 => Op::Vmclear(n.pick(&[VMXON, 0x1_1008, 1 << 40])),
                _ => Op::Vmxon(VMXON),
            },
            18 => Op::Vmread(n.pick(&[0x4402, 0x6C14, 0x6C16, 0x2401, 0x7FFE, 1 << 40, 0x681E, 0x2805, 0x4400])),
            19 => {
                let field = n.pick(&self.fields);
                Op::Vmread(field.encoding().into())
            }
            20 => Op::Vmwrite(n.pick(&[0x2805, 0x2011, 0x7FFE, 0x4402]), n.next() & 0xFFFF),
            21 => Op::Invept(n.pick(&[1, 2, 2, 0, 3]), n.pick(&[eptp(0), eptp(1), 1])),
            22 => Op::Invvpid(n.pick(&[0, 1, 2, 3, 4]), n.pick(&[0, 1, 2, 66, 1 << 16]), n.pick(&[0, 0x1000, 1 << 50])),
            23 => Op::Wrmsr(n.pick(&MSRS), n.pick(&[0, 0x1000, 0x0606, 0xD01, 0xD00, 2])),
            24 => Op::Rdmsr(n.pick(&MSRS)),
            25 => self.a_register_of_l2(),
            26 => Op::VmreadTo(n.pick(&OF_MEMORY), n.pick(&OPERANDS)),
            27 => Op::VmwriteFrom(n.pick(&OF_MEMORY), n.pick(&OPERANDS)),
            28 => {
                // Another page behind an address of L3, and INVEPT.
                let (tree, page) = (n.below(2), n.pick(&PAGES[..3]));
                let entry = EPTS[tree] + 0x3000 + (page >> 12) * 8;
                let rights = n.pick(&[7, 7, 1, 3, 5, 0]);
                let to = n.pick(&PAGES[..3]);
                self.do_(Op::Write(entry, to | rights | if rights == 0 { 0 } else { 0x30 })).await;
                Op::Invept(2, 0)
            }
            _ => match n.below(4) {
                0 => Op::Vmcall,
                1 => {
                    self.do_(Op::Vmxoff).await;
                    Op::Vmxon(VMXON)
                }
                2 => Op::Vmfunc(0, 0),
                _ => Op::Getsec,
            },
        };
        self.do_(op).await;
    }

    fn a_register_of_l2(&mut self) -> Op {
        let n = &mut self.numbers;
        match n.below(5) {
            0 => Op::Xsetbv(0, n.pick(&[1, 3, 7, 0, 5])),
            1 => Op::MovToCr4(n.pick(&[0x2020, 0x20A0, 0x2024])),
            2 => Op::MovToCr0(n.pick(&[0x8001_0031, 0x8001_0039, 0x8000_0031])),
            3 => Op::Clts,
            _ => Op::Lmsw(n.pick(&[0x1, 0x9, 0xB])),
        }
    }

    async fn step_of_l3(&mut self) {
        let n = &mut self.numbers;
        let op = match n.below(28) {
            0 => Op::Cpuid,
            1 => Op::Hlt,
            2 => Op::Rdtsc,
            3 => Op::Rdmsr(n.pick(&MSRS)),
            4 => Op::Wrmsr(n.pick(&MSRS), n.pick(&[0, 0x1000, 0x0606, 0xD01, 0xD00, 2])),
            5 => Op::In(n.pick(&[0x60, 0x8010, 0x3F8])),
            6 => Op::Out(n.pick(&[0x60, 0x8010, 0x3F8]), 7),
            7 => Op::MovToCr0(n.pick(&[0x8001_0031, 0x8001_0039, 0x8000_0031])),
            8 => Op::MovToCr3(n.pick(&[0x1000, 0x5000])),
            9 => Op::MovFromCr3,
            10 => Op::MovToCr4(n.pick(&[0x2020, 0x20A0, 0x2024])),
            11 => Op::Clts,
            12 => Op::Invlpg(0x5000),
            13 => Op::Pause,
            14 => Op::Read(n.pick(&PAGES)),
            15 | 16 => Op::Write(n.pick(&PAGES), n.next()),
            17 => Op::Raise(n.pick(&[6, 3]), None),
            18 => Op::Raise(n.pick(&[13, 14]), Some(n.pick(&[0, 2]))),
            19 => Op::Vmread(n.pick(&[0x6802, 0x681E, 0x4402, 0x6C14, 0x6C16, 0x7FFE, 1 << 20])),
            20 => Op::Vmwrite(n.pick(&[0x6802, 0x681E, 0x4402, 0x6C14, 0x6C16, 0x7FFE, 1 << 20]), 0x1234),
            21 => Op::Vmfunc(n.pick(&[0, 0, 1, 64]), n.pick(&[0, 1, 2, 512])),
            22 => Op::Xsetbv(0, n.pick(&[1, 3, 7])),
            23 => Op::Vmresume,
            24 => Op::VmreadTo(n.pick(&OF_MEMORY), n.pick(&OPERANDS)),
            25 => Op::VmwriteFrom(n.pick(&OF_MEMORY), n.pick(&OPERANDS)),
            26 => {
                // An event from outside.
                let (pin, exit) = match n.below(3) {
                    0 => (0, Exit { intr: 0x8000_0055, ..Exit::new(1) }),
                    1 => (3, Exit { intr: 0x8000_0202, ..Exit::new(0) }),
                    _ => (32, Exit::new(2)),
                };
                if pin == 32 || self.guest.core().pin(pin) {
                    self.guest.core().delivered.clear();
                    self.guest.exit(exit).await;
                    self.guest.see(("event", exit.reason));
                }
                return;
            }
            _ => Op::Vmcall,
        };
        self.do_(op).await;
    }
}

/// Fields whose values come from memory or go there, a 64-bit one by halves, and none.
const OF_MEMORY: [u64; 8] = [0x2010, 0x2011, 0x681C, 0x6004, 0x6C14, 0x4402, 0x7FFE, 1 << 20];
/// Where the operands are: in pages that ept12 maps in changing ways, across two of them, unmapped, not canonical.
const OPERANDS: [u64; 8] =
    [PAGES[0], PAGES[0] + 8, PAGES[1] - 3, PAGES[2] - 7, PAGES[2] + 0xFF8, PAGES[3], 1 << 33, 1 << 60];

const RANDOM: [Field; 37] = [
    VM_ENTRY_INTR_INFO_FIELD,
    VM_ENTRY_INTR_INFO_FIELD,
    VM_ENTRY_EXCEPTION_ERROR_CODE,
    VM_ENTRY_INSTRUCTION_LEN,
    MSR_BITMAP,
    IO_BITMAP_A,
    IO_BITMAP_B,
    VMREAD_BITMAP,
    VMWRITE_BITMAP,
    EPT_POINTER,
    EPTP_LIST_ADDRESS,
    VM_FUNCTION_CONTROLS,
    VIRTUAL_PROCESSOR_ID,
    VMCS_LINK_POINTER,
    VM_ENTRY_MSR_LOAD_ADDR,
    VM_ENTRY_MSR_LOAD_COUNT,
    VM_EXIT_MSR_LOAD_ADDR,
    VM_EXIT_MSR_LOAD_COUNT,
    VM_EXIT_MSR_STORE_ADDR,
    VM_EXIT_MSR_STORE_COUNT,
    GUEST_IA32_EFER,
    HOST_IA32_EFER,
    GUEST_IA32_PAT,
    HOST_IA32_PAT,
    GUEST_DR7,
    HOST_RIP,
    HOST_RSP,
    HOST_RSP,
    HOST_RSP,
    TSC_OFFSET,
    GUEST_ACTIVITY_STATE,
    CR3_TARGET_COUNT,
    HOST_FS_SELECTOR,
    HOST_GS_BASE,
    HOST_IA32_SYSENTER_EIP,
    GUEST_SYSENTER_EIP,
    GUEST_FS_BASE,
];
