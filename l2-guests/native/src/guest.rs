//! The same in a guest, whose hypervisor asks for exceptions or for single steps of its own.

use crate::{
    case::{self, CR2_UNTOUCHED, Case, Mode},
    instructions::{Instruction, OF_A_GUEST},
    log, matrix,
};
use core::arch::global_asm;
use l2_kit::{
    cpu,
    ept::Ept,
    fields as f,
    pages::{self, PAGE},
    report,
    setup::{self, Controls, Kind, Missing, entry_controls, exit_controls, primary, secondary},
    trap,
    vcpu::Vcpu,
    vmx::{self, reason as r},
};

/// RAX of the VMCALL that ends the guest's program
const DONE: u64 = 0xD0E;
const STACK: u64 = 4 * PAGE;
const TRAP_FLAG_EXIT: u32 = 37;
/// Entries of one case; a guest that goes round in circles is stopped.
const MOST_EXITS: u32 = 60;

const SHADOW: u64 = 1 << 31;
const EPTP_SWITCHING: u64 = 1;
const VALID_ERROR_TYPE_VECTOR: u64 = 0x8000_0FFF;
const ERROR_CODE: u64 = 1 << 11;
const RF: u64 = 1 << 16;
const CS_LONG: u64 = 1 << 13;

global_asm!(
    ".pushsection .text.native_guest, \"ax\"",
    "native_guest:",
    "call {run}",
    "mov eax, {done}",
    "vmcall",
    "ud2",
    ".popsection",
    run = sym program,
    done = const DONE,
);

unsafe extern "C" {
    fn native_guest();
}

extern "C" fn program() {
    case::run(true);
}

/// What the hypervisor asks for.
#[derive(Clone, Copy, Default)]
struct Setting {
    name: &'static str,
    exceptions: u32,
    /// Page-fault error-code mask and match
    mask: u32,
    matches: u32,
    steps: bool,
}

const FAULTS: u32 = 1 << trap::UD | 1 << trap::SS | 1 << trap::GP;
const PF: u32 = 1 << trap::PF;
/// In an error code: a write
const WRITE: u32 = 1 << 1;

const SETTINGS: [Setting; 7] = [
    Setting { name: "guest", exceptions: 0, mask: 0, matches: 0, steps: false },
    Setting { name: "guest, #UD #SS #GP #PF exit", exceptions: FAULTS | PF, mask: 0, matches: 0, steps: false },
    Setting { name: "guest, #DB exits", exceptions: 1 << trap::DB, mask: 0, matches: 0, steps: false },
    Setting { name: "guest, writes that fault exit", exceptions: PF, mask: WRITE, matches: WRITE, steps: false },
    Setting { name: "guest, all but writes that fault exit", exceptions: 0, mask: WRITE, matches: WRITE, steps: false },
    Setting { name: "guest, single steps exit", exceptions: 0, mask: 0, matches: 0, steps: true },
    Setting {
        name: "guest, single steps, #DB, #GP and #PF exit",
        exceptions: 1 << trap::DB | 1 << trap::GP | PF,
        mask: 0,
        matches: 0,
        steps: true,
    },
];

struct Guest {
    vcpu: Vcpu,
    stack: u64,
    catch: u64,
    primary: u64,
    shadow: u64,
}

/// All of it.
///
/// # Errors
/// What the CPU lacks.
pub fn all() -> Result<(), Missing> {
    let mut guest = Guest::new()?;
    let can_step = setup::allowed_one(Kind::Primary, primary::TRAP_FLAG);
    for setting in SETTINGS.iter().filter(|s| can_step || !s.steps) {
        // Error codes matter to page faults alone, which operands have in ring 0.
        let chosen: fn(&Instruction, Mode) -> bool = match setting.mask {
            0 => |_, _| true,
            _ => |instruction, mode| instruction.operand.bytes() != 0 && mode == Mode::Kernel64,
        };
        matrix(setting.name, OF_A_GUEST, &Mode::ALL, chosen, &mut |case| guest.run(case, setting));
    }
    let _ = vmx::vmclear(guest.vcpu.vmcs);
    Ok(())
}

impl Guest {
    fn new() -> Result<Self, Missing> {
        let shadowing = setup::allowed_one(Kind::Secondary, secondary::VMCS_SHADOWING);
        let functions = setup::allowed_one(Kind::Secondary, secondary::VM_FUNCTIONS);
        let vcpu = Vcpu::new(setup::revision()).map_err(|o| Missing::Instruction("VMCLEAR or VMPTRLD", o))?;
        let optional = |on, bit| if on { bit } else { 0 };
        setup::write_controls(&Controls {
            primary: primary::MSR_BITMAPS,
            secondary: secondary::EPT
                | optional(shadowing, secondary::VMCS_SHADOWING)
                | optional(functions, secondary::VM_FUNCTIONS),
            exit: exit_controls::SAVE_DEBUG,
            entry: entry_controls::IA32E | entry_controls::LOAD_DEBUG,
            ..Controls::default()
        })?;
        let ept = Ept::identity();
        vmx::write(f::EPTP, ept.pointer());
        vmx::write(f::MSR_BITMAP, pages::address(pages::page()));
        if shadowing {
            vmx::write(f::VMREAD_BITMAP, pages::address(pages::page()));
            vmx::write(f::VMWRITE_BITMAP, pages::address(pages::page()));
        }
        if functions {
            let list = pages::page();
            list[0] = ept.pointer();
            vmx::write(f::EPTP_LIST, pages::address(list));
            vmx::write(f::VM_FUNCTION_CONTROLS, EPTP_SWITCHING);
        }
        setup::write_host_state();
        setup::write_guest_state(cpu::cr3(), true);
        if !shadowing {
            report::say("no VMCS shadowing");
        }
        let (stack, primary) = (pages::take(STACK, PAGE) + STACK, vmx::read(f::PRIMARY_CONTROLS));
        Ok(Self { vcpu, stack, catch: 0, primary, shadow: if shadowing { shadow_region() } else { 0 } })
    }

    fn run(&mut self, case: &Case, setting: &Setting) {
        case.prepare();
        if self.shadow != 0 {
            fill_shadow(self.vcpu.vmcs, self.shadow);
            self.vcpu.launched = false;
        }
        setup::write_guest_state(cpu::cr3(), true);
        for (field, value) in [
            (f::LINK_POINTER, if self.shadow == 0 { u64::MAX } else { self.shadow }),
            (f::GUEST_RIP, native_guest as *const () as u64),
            (f::GUEST_RSP, self.stack - 64),
            (f::EXCEPTION_BITMAP, setting.exceptions.into()),
            (f::PF_ERROR_MASK, setting.mask.into()),
            (f::PF_ERROR_MATCH, setting.matches.into()),
            (f::PRIMARY_CONTROLS, self.primary),
        ] {
            vmx::write(field, value);
        }
        self.catch = 0;
        for _ in 0..MOST_EXITS {
            let own = trap::swap_catch(self.catch);
            let entered = self.vcpu.run();
            self.catch = trap::swap_catch(own);
            if let Err(outcome) = entered {
                log::add(format_args!(",refused:{outcome}"));
                break;
            }
            if !self.exit(setting) {
                break;
            }
        }
        vmx::write(f::PRIMARY_CONTROLS, self.primary);
    }

    /// Handles an exit; true if the guest goes on.
    fn exit(&mut self, setting: &Setting) -> bool {
        let reason = vmx::read(f::EXIT_REASON) as u32;
        cut_rip();
        match (reason, self.vcpu.registers.rax) {
            (r::VMCALL, DONE) => false,
            (r::VMCALL, rax) if rax as u32 == case::ABOUT_TO => {
                vmx::write(f::GUEST_RIP, vmx::read(f::GUEST_RIP) + vmx::read(f::EXIT_INSTRUCTION_LENGTH));
                self.step(setting.steps);
                true
            }
            (TRAP_FLAG_EXIT, _) => {
                let linear = vmx::read(f::GUEST_CS_BASE).wrapping_add(vmx::read(f::GUEST_RIP));
                if case::is_code(linear) {
                    say(reason);
                } else if !log::is_empty() {
                    // The first instruction of a handler: from here on it is left alone.
                    log::add(format_args!(",x{reason}@handler"));
                    self.step(false);
                }
                true
            }
            (r::EXCEPTION_OR_NMI, _) => {
                say(reason);
                deliver();
                true
            }
            _ => {
                say(reason);
                log::add(format_args!("q{:x}", vmx::read(f::EXIT_QUALIFICATION)));
                false
            }
        }
    }

    fn step(&self, on: bool) {
        vmx::write(f::PRIMARY_CONTROLS, self.primary | if on { u64::from(primary::TRAP_FLAG) } else { 0 });
    }
}

/// A cleared shadow VMCS.
pub fn shadow_region() -> u64 {
    let page = pages::page();
    page[0] = u64::from(setup::revision()) | SHADOW;
    pages::address(page)
}

/// Writes what VMREAD of a guest finds into the shadow VMCS, as the current VMCS. Afterwards `vmcs` is clear and current.
pub fn fill_shadow(vmcs: u64, shadow: u64) {
    let _ = (vmx::vmclear(vmcs), vmx::vmptrld(shadow));
    vmx::write(f::GUEST_RIP, 0x1111_2222_3333_4444);
    vmx::write(f::HOST_RIP, 0x5555_6666_7777_8888);
    let _ = (vmx::vmclear(shadow), vmx::vmptrld(vmcs));
}

/// Outside of 64-bit mode RIP has 32 bits: see `case::offset`; with more the next entry would fail.
pub fn cut_rip() {
    let rip = vmx::read(f::GUEST_RIP);
    if rip >> 32 != 0 && vmx::read(f::GUEST_CS_AR) & CS_LONG == 0 {
        vmx::write(f::GUEST_RIP, rip & 0xFFFF_FFFF);
    }
}

/// Where the guest was, and what is left pending for it.
pub fn say(reason: u32) {
    log::add(format_args!("{}x{reason}@{}", case::comma(), case::offset(vmx::read(f::GUEST_RIP))));
    if vmx::read(f::GUEST_RFLAGS) & RF != 0 {
        log::add(format_args!("r"));
    }
    let (pending, blocking) = (vmx::read(f::GUEST_PENDING_DEBUG), vmx::read(f::GUEST_INTERRUPTIBILITY));
    if pending != 0 {
        log::add(format_args!("p{pending:x}"));
    }
    if blocking != 0 {
        log::add(format_args!("b{blocking:x}"));
    }
    if cpu::cr2() == CR2_UNTOUCHED {
        log::add(format_args!("~"));
    }
    let vectoring = vmx::read(f::IDT_VECTORING_INFO);
    if vectoring >> 31 != 0 {
        log::add(format_args!("!{vectoring:x}"));
    }
}

/// Says which exception it was; returns its information and qualification, and its error code.
pub fn exception() -> (u64, u64, Option<u64>) {
    let info = vmx::read(f::EXIT_INTERRUPTION_INFO) & VALID_ERROR_TYPE_VECTOR;
    let qualification = vmx::read(f::EXIT_QUALIFICATION);
    log::add(format_args!("v{info:x}"));
    match info as u8 {
        trap::PF => log::add(format_args!("q{}", case::operand_offset(qualification))),
        _ => log::add(format_args!("q{qualification:x}")),
    }
    let error = (info & ERROR_CODE != 0).then(|| vmx::read(f::EXIT_INTERRUPTION_ERROR));
    if let Some(error) = error {
        log::add(format_args!("e{error:x}"));
    }
    (info, qualification, error)
}

/// Gives the guest the exception that it exited for.
fn deliver() {
    let (info, qualification, error) = exception();
    match info as u8 {
        trap::PF => cpu::set_cr2(qualification),
        trap::DB => case::set_dr6(qualification),
        _ => {}
    }
    if let Some(error) = error {
        vmx::write(f::ENTRY_EXCEPTION_ERROR, error);
    }
    vmx::write(f::ENTRY_INTERRUPTION_INFO, info);
    vmx::write(f::ENTRY_INSTRUCTION_LENGTH, vmx::read(f::EXIT_INSTRUCTION_LENGTH));
    // What an event delivery ends.
    vmx::write(f::GUEST_INTERRUPTIBILITY, 0);
    vmx::write(f::GUEST_PENDING_DEBUG, 0);
}
