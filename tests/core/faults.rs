//! Faults inside: for every handler the k-th access of nvmx to L2's memory finds nothing there, or finds that the page is not
//! L2's, and the k-th frame is not there, for every k. nvmx goes on, or ends the machine for a reason that it names; no frame is
//! lost, and what follows works as if nothing had been.
//!
//! `NVMX_EVERY=1` takes every k and every page; without it they are spread.

use crate::kit::*;
use nvmx::addr::Gpa;
use nvmx::hw::phys::silence;
use nvmx::mm::{GuestMemory, Span};
use nvmx::trace::KillReason;
use nvmx::vmx::region::REVISION;
use nvmx_machine::guest::{Guest, Op};
use nvmx_machine::processor::{Exit, Level};
use nvmx_machine::sequences::{Seed, Sequence};
use nvmx_machine::world::{End, OWN};
use nvmx_machine::{Setup, World};
use std::future::Future;
use std::pin::Pin;

type Script = fn(Guest) -> Pin<Box<dyn Future<Output = ()>>>;

/// What a handler does, without an opinion on what comes of it.
const SCRIPTS: &[(&str, Script)] = &[
    ("VMX instructions", |g| Box::pin(instructions(g))),
    ("an entry and exits with bitmaps, areas and a log", |g| Box::pin(loaded(g))),
    ("a guest without EPT", |g| Box::pin(without_ept(g))),
    ("a shadow VMCS", |g| Box::pin(shadow(g))),
    ("L2's own exits", |g| Box::pin(own_exits(g))),
    ("a random program", |g| Box::pin(Sequence::new(g, Seed(0x5EED)).run(60))),
];

async fn instructions(g: Guest) {
    begin(&g).await;
    for at in [VMCS, OTHER, OTHER + 0x1000, OTHER + 0x2000] {
        g.poke_u32(at, REVISION);
        g.run(Op::Vmclear(at)).await;
        g.run(Op::Vmptrld(at)).await;
        g.run(Op::Vmwrite(0x681E, 1)).await;
        g.run(Op::VmreadTo(0x681E, 0x3_0FFC)).await;
        g.run(Op::VmwriteFrom(0x681E, 0x3_0FFC)).await;
        g.run(Op::Vmptrst).await;
    }
    g.run(Op::Invept(2, 0)).await;
    g.run(Op::Invvpid(2, 0, 0)).await;
    g.run(Op::Vmclear(VMCS)).await;
    g.run(Op::Vmptrld(VMCS)).await;
    g.run(Op::Vmxoff).await;
}

async fn begin(g: &Guest) {
    build_ept(g);
    g.poke_u32(VMXON, REVISION);
    g.run(Op::MovToCr4(0x2020)).await;
    g.run(Op::MovToCr0(0x8001_0031)).await;
    g.run(Op::Vmxon(VMXON)).await;
}

async fn set_up(g: &Guest, changes: &[(Field, u64)]) {
    begin(g).await;
    g.poke_u32(VMCS, REVISION);
    g.run(Op::Vmclear(VMCS)).await;
    g.run(Op::Vmptrld(VMCS)).await;
    for (field, value) in valid().iter().chain(changes) {
        g.run(Op::Vmwrite(field.encoding().into(), *value)).await;
    }
}

const AREA: u64 = 0x2_5000;

async fn loaded(g: Guest) {
    for (i, index) in (0..).zip([0xC000_0081u64, 0x277, 0xC000_0102, 0x480, 0x174]) {
        g.poke(AREA + 16 * i, index);
        g.poke(AREA + 16 * i + 8, 0x0606);
    }
    g.poke(0x2_6000, EPT | 3 << 3 | 6);
    set_up(
        &g,
        &[
            control(CPU_BASED_VM_EXEC_CONTROL, 1 << 28 | 1 << 25, 0),
            control(SECONDARY_VM_EXEC_CONTROL, 1 << 13 | 1 << 17 | 1 << 18, 0),
            (MSR_BITMAP, 0x2_0000),
            (IO_BITMAP_A, 0x2_1000),
            (IO_BITMAP_B, 0x2_2000),
            (EPT_POINTER, EPT | 3 << 3 | 6 | 1 << 6),
            (PML_ADDRESS, 0x2_3000),
            (PML_INDEX, 511),
            (VIRTUALIZATION_EXCEPTION_INFO, 0x2_4000),
            (VM_FUNCTION_CONTROLS, 1),
            (EPTP_LIST_ADDRESS, 0x2_6000),
            (VM_ENTRY_MSR_LOAD_ADDR, AREA),
            (VM_ENTRY_MSR_LOAD_COUNT, 3),
            (VM_EXIT_MSR_STORE_ADDR, AREA),
            (VM_EXIT_MSR_STORE_COUNT, 5),
            (VM_EXIT_MSR_LOAD_ADDR, AREA),
            (VM_EXIT_MSR_LOAD_COUNT, 3),
        ],
    )
    .await;
    for n in 0..3 {
        g.run(if n == 0 { Op::Vmlaunch } else { Op::Vmresume }).await;
        if g.level() == Level::L3 {
            for op in [
                Op::Read(0x3_0000 + n),
                Op::Write(0x3_1000, n),
                Op::Write(0x40_0000, n),
                Op::Rdmsr(0x480),
                Op::Vmfunc(0, 0),
                Op::Read(0x3_2000),
            ] {
                if g.level() == Level::L3 {
                    g.run(op).await;
                }
            }
        }
        if g.level() == Level::L3 {
            g.run(Op::Vmcall).await;
        }
        // Nothing at a page, which makes a #VE of an access.
        g.poke(EPT + 0x3000 + 8 * 0x30, 0);
        g.run(Op::Invept(2, 0)).await;
    }
    g.run(Op::Vmxoff).await;
}

async fn without_ept(g: Guest) {
    g.poke(0x6000, 0x7001);
    set_up(
        &g,
        &[
            control(SECONDARY_VM_EXEC_CONTROL, 0, 1 << 1),
            control(CPU_BASED_VM_EXEC_CONTROL, 1 << 21, 0),
            (VIRTUAL_APIC_ADDRESS, 0x2_8000),
            control(VM_ENTRY_CONTROLS, 0, 1 << 9),
            (GUEST_IA32_EFER, 0),
            (GUEST_CS_AR_BYTES, 0xC09B),
            (GUEST_CR3, 0x6000),
        ],
    )
    .await;
    g.run(Op::Vmlaunch).await;
    if g.level() == Level::L3 {
        g.run(Op::Write(0x3_0000, 7)).await;
        g.run(Op::Vmcall).await;
    }
    g.run(Op::Vmresume).await;
    if g.level() == Level::L3 {
        g.run(Op::Vmcall).await;
    }
    g.run(Op::Vmxoff).await;
}

async fn shadow(g: Guest) {
    g.poke_u32(OTHER, REVISION | 1 << 31);
    set_up(
        &g,
        &[
            control(SECONDARY_VM_EXEC_CONTROL, 1 << 14, 0),
            (VMREAD_BITMAP, 0x2_0000),
            (VMWRITE_BITMAP, 0x2_0000),
            (VMCS_LINK_POINTER, OTHER),
        ],
    )
    .await;
    g.run(Op::Vmlaunch).await;
    for op in [
        Op::Vmwrite(0x6C16, 7),
        Op::Vmread(0x6C16),
        Op::Vmwrite(0x681E, 7),
        Op::Vmread(0x681E),
        Op::VmwriteFrom(0x6C16, 0x3_0000),
        Op::VmreadTo(0x6C16, 0x3_0FFC),
        Op::Vmcall,
    ] {
        if g.level() == Level::L3 {
            g.run(op).await;
        }
    }
    g.run(Op::Vmclear(OTHER)).await;
    g.run(Op::Vmxoff).await;
}

async fn own_exits(g: Guest) {
    for op in [
        Op::Cpuid,
        Op::Rdmsr(0x480),
        Op::Wrmsr(0x277, 0x0606),
        Op::Wrmsr(0x1B, 0xFEE0_0900),
        Op::Xsetbv(0, 3),
        Op::Invd,
        Op::MovToCr4(0x20A0),
        Op::Getsec,
        Op::Write(0x70_0000, 7),
    ] {
        g.run(op).await;
    }
    // PAE paging, whose PDPTEs a MOV to CR0 loads.
    g.poke(0x6000, 0x7001);
    g.run(Op::Wrmsr(0xC000_0080, 0)).await;
    // A task switch by JMP: 32-bit code, a GDT with two TSSs.
    two_tasks(&g);
    for (at, value) in [(0x20, 0x5000u64), (0x38, 0x7000), (0x48, 16), (0x4C, 8), (0x50, 16), (0x54, 16)] {
        g.poke(0x4000 + at, value);
    }
    g.exit(Exit { length: 2, ..Exit::new(9) }.because(2 << 30 | 0x28)).await;
    g.exit(Exit::new(3)).await;
}

/// What must work after each failure.
async fn goes_on(g: Guest) {
    // L2 begins anew, wherever it was.
    if g.level() == Level::L3 {
        g.run(Op::Vmcall).await;
    }
    g.run(Op::Vmxoff).await;
    nvmx_machine::world::restart(&g);
    hypervisor(&g, &[]).await;
    launch(&g).await;
    g.run(Op::Write(0x3_0000, 0x77)).await;
    g.run(Op::Read(0x3_0000)).await;
    assert_eq!(g.gpr(0), 0x77);
    leave(&g).await;
    assert_eq!(g.vmread(VM_EXIT_REASON).await, Some(18));
    g.run(Op::Vmxoff).await;
    assert_eq!(g.flags(), 0);
}

/// Frames that a CPU has when L2 is outside VMX operation: all that it can have.
fn at_rest(world: &World) -> usize {
    world.cpu.frames.available() + world.cpu.ept01.tables() as usize
}

/// Runs a script with a failure that `set` arranges, and judges what comes of it.
fn judge(world: &mut World, name: &str, script: Script, k: u64, set: impl Fn(&mut World), end: impl Fn(&mut World)) {
    set(world);
    let over = world.boot(script);
    end(world);
    match over {
        End::Over => {
            let over = world.run(goes_on);
            assert!(matches!(over, End::Over), "{name}, {k}: {over:?} behind it");
        }
        End::Killed(KillReason::ForbiddenMemory(_) | KillReason::VmxAbort(_)) => {}
        End::Killed(KillReason::EntryFailed { reason, .. }) if reason >> 31 == 1 => {}
        End::Killed(other) => panic!("{name}, {k}: {other:?}"),
    }
}

/// The frames at rest after a script in which nothing fails, and the accesses that nvmx made to L2's memory meanwhile.
fn undisturbed(setup: Setup, name: &str, script: Script) -> (usize, u64) {
    let mut world = World::new(setup);
    let count = std::cell::Cell::new(0);
    let rest = at_rest(&world);
    judge(&mut world, name, script, 0, |_| silence::behind(None, OWN), |_| count.set(silence::end()));
    let full = at_rest(&world);
    assert!(full + 8 >= rest, "{name}: {rest} frames before, {full} after");
    (full, count.get())
}

/// After a failure with which the machine goes on, all frames come back once L2 leaves VMX operation.
fn nothing_is_lost(world: &World, full: usize, name: &str, k: u64) {
    if matches!(world.cpu.nested.operation, nvmx::cpu::Operation::Off) {
        assert_eq!(at_rest(world), full, "{name}, {k:#x}: frames are lost");
    }
}

fn every() -> bool {
    std::env::var_os("NVMX_EVERY").is_some()
}

#[test]
fn the_kth_access_finds_nothing() {
    for setup in Setup::all() {
        for (name, script) in SCRIPTS {
            let (full, all) = undisturbed(setup, name, *script);
            // Most accesses of a loop are alike: some of each, in other places by each strategy.
            let step = if every() { 1 } else { (all / 16).max(1) as usize };
            for k in (setup.storage as u64 + setup.strategy as u64..all).step_by(step) {
                let mut world = World::new(setup);
                judge(&mut world, name, *script, k, |_| silence::behind(Some(k), OWN), |_| _ = silence::end());
                nothing_is_lost(&world, full, name, k);
            }
        }
    }
}

#[test]
fn the_kth_frame_is_not_there() {
    for setup in Setup::all() {
        for (name, script) in SCRIPTS {
            let (full, _) = undisturbed(setup, name, *script);
            let mut k = 0;
            loop {
                let mut world = World::new(setup);
                let reached = std::cell::Cell::new(false);
                judge(
                    &mut world,
                    name,
                    *script,
                    k,
                    |world| world.cpu.frames.fail_behind(Some(k)),
                    |world| {
                        reached.set(world.cpu.frames.until_failure().is_none());
                        world.cpu.frames.fail_behind(None);
                    },
                );
                nothing_is_lost(&world, full, name, k);
                if !reached.get() {
                    break;
                }
                k += 1;
            }
        }
    }
}

#[test]
fn a_page_turns_out_not_to_be_l2s() {
    let pages = [
        0x1000,
        0x2000,
        0x6000,
        0x8000,
        VMXON,
        VMCS,
        OTHER,
        0x2_0000,
        0x2_1000,
        0x2_3000,
        0x2_4000,
        AREA,
        0x2_6000,
        0x2_8000,
        0x3_0000,
        0x3_1000,
        0x40_0000,
        EPT,
        EPT + 0x1000,
        EPT + 0x2000,
        EPT + 0x3000,
        0xA000,
        0x4000,
        0x3000,
    ];
    for (i, setup) in Setup::all().into_iter().enumerate() {
        for (name, script) in SCRIPTS {
            let (full, _) = undisturbed(setup, name, *script);
            for page in pages.into_iter().skip(i % 2).step_by(if every() { 1 } else { 2 }) {
                let mut world = World::new(setup);
                let phys = world.cpu.phys;
                let whole = world.cpu.guest;
                judge(
                    &mut world,
                    name,
                    *script,
                    page,
                    // Only nvmx finds it: L2 reaches the page still.
                    |world| world.cpu.guest = GuestMemory::new(phys, Span::sized(page, 0x1000), 39),
                    |world| world.cpu.guest = whole,
                );
                assert!(world.cpu.guest.translate(Gpa::new(page)).is_ok());
                nothing_is_lost(&world, full, name, page);
            }
        }
    }
}
