//! native: whatever a hypervisor below completes or refuses in the place of the processor looks as on the processor.
//!
//! Each instruction that exits is executed by the guest hypervisor itself, outside and inside VMX operation, and by its guest,
//! in each kind of code segment and ring, in every [`situation`]. What follows is written down as the sequence of traps and
//! exits up to the breakpoint after it. A `check` record per instruction, mode and setting has a digest of each; with
//! `detail=TEXT` on the command line the sequences are printed of those whose name has the text in it.
//!
//! An entry of a sequence is `vector@offset` for a trap, `xreason@offset` for an exit: the offset is that of the saved
//! instruction pointer from the instruction. Then, where they apply: `e` error code, `r` RF in the saved flags, `t` TF, `d` DR6,
//! `a` CR2 as an offset from the operand; of an exit `v` interruption information, `q` qualification, `p` pending debug
//! exceptions, `b` interruptibility, `=` CR2 untouched. `#` is a hash of registers, flags and the operand at the end.
#![no_std]
#![no_main]

mod case;
mod guest;
mod instructions;
mod legacy;
mod log;
mod situation;

use arrayvec::ArrayString;
use case::{Case, Mode, Place};
use core::fmt::Write;
use instructions::Instruction;
use l2_kit::{
    BootInfo, Check, Global, arrayvec, caps, cpu, identity, log,
    pages::{self, Access},
    protocol::{Hex, Kind},
    report,
    serial::Serial,
    setup::{self, Missing},
    vmx,
};

l2_kit::entry!(main);

/// `detail=`
static DETAIL: Global<Option<&'static str>> = Global::new(None);

fn main(info: &BootInfo) {
    report::record(
        Kind::Hello,
        &[
            ("name", &"native"),
            ("version", &env!("CARGO_PKG_VERSION")),
            ("slot", &identity::Slot::find().word()),
            ("cpu", &identity::cpu_name().as_str()),
        ],
    );
    if !info.knows(&["detail"]) {
        return;
    }
    if cpu::cpuid(1, 0)[2] & 1 << 5 == 0 {
        report::fail(format_args!("{}", Missing::Vmx));
        return;
    }
    caps::init(info);
    DETAIL.set(info.option("detail"));
    if let Err(missing) = all() {
        report::fail(format_args!("{missing}"));
    }
    let cases = case::count();
    log!("{cases} combinations");
    Check::new(&mut Serial, "combinations").fact("count", cases).end();
}

fn all() -> Result<(), Missing> {
    case::mask_interrupts();
    cpu::set_cr3(pages::identity_tables(Access::User));
    case::init();
    setup::prepare_vmx()?;
    cpu::set_cr0(cpu::cr0() | case::CR0_WP);
    cpu::set_cr4(cpu::cr4() | cpu::CR4_OSXSAVE);
    matrix("L2", instructions::OUTSIDE, &Mode::ALL, |_, _| true, &mut |case| case.run_here(false));
    setup::enter_vmx()?;
    matrix("L2 in VMX operation", instructions::INSIDE, &Mode::ALL, |_, _| true, &mut |case| case.run_here(true));
    guest::all()?;
    legacy::all()?;
    let outcome = vmx::vmxoff();
    Check::new(&mut Serial, "vmxoff").expect("result", outcome, vmx::Outcome::Succeed).end();
    Ok(())
}

/// The given modes of every instruction, a record an instruction: two characters a situation that stand for what was seen, in the
/// order of a list that is printed once, and a digest of all. Of the instructions that `detail=` names all is said, and of
/// combinations that break a law.
fn matrix(
    who: &str,
    instructions: &[Instruction],
    modes: &[Mode],
    chosen: fn(&Instruction, Mode) -> bool,
    run: &mut dyn FnMut(&Case),
) {
    for instruction in instructions.iter().filter(|i| modes.iter().any(|mode| chosen(i, *mode))) {
        let mut name = ArrayString::<96>::new();
        let _ = write!(name, "{who}: {}", instruction.name);
        let detailed = DETAIL.get().is_some_and(|part| name.contains(part));
        situation::print_lists(instruction, modes);
        let (mut out, mut cases, mut all) = (Serial, 0u32, log::Digest::new());
        let mut record = ArrayString::<2048>::new();
        for mode in modes.iter().copied().filter(|mode| chosen(instruction, *mode)) {
            let _ = write!(
                record,
                "{}{}{}:",
                if cases == 0 { "" } else { "," },
                mode.name(),
                situation::list(instruction, mode)
            );
            situation::each(instruction, mode, |situation_name, situation| {
                let case = Case { instruction, mode, situation, place: Place::of(mode, situation) };
                log::clear();
                run(&case);
                cases += 1;
                let digest = log::digest();
                all.add(digest);
                log::short(digest).into_iter().for_each(|letter| record.push(letter));
                let broken = case.broken_law();
                if let Some(law) = broken {
                    report::fail(format_args!("{name} in {}, {situation_name}: {law}", mode.name()));
                }
                if detailed || broken.is_some() {
                    log!("{name} in {}, {situation_name}: {}", mode.name(), log::text());
                }
            });
        }
        case::counted(cases);
        let (name, seen) = (name.as_str(), record.as_str());
        Check::new(&mut out, name).fact("seen", seen).fact("digest", Hex(all.value())).fact("cases", cases).end();
    }
}
