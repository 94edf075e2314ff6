//! What nvmx writes on the serial line about what VMX refuses. A test program of its own: all processors of a process share the
//! line, and what was told already.

#[path = "core/kit.rs"]
#[allow(dead_code, reason = "of tests/core")]
mod kit;

use kit::*;
use log::LevelFilter;
use nvmx::boot::options::Serial;
use nvmx::hw::serial;
use nvmx::nested::tell;
use nvmx_machine::guest::{Guest, Op};
use nvmx_machine::processor::Level;
use nvmx_machine::world::End;
use nvmx_machine::{Setup, World};

/// The lines since the last look, without the place in L2, which is the program's.
fn lines(g: &Guest) -> Vec<String> {
    let bytes: Vec<u8> = std::mem::take(&mut g.core().ports)
        .into_iter()
        .filter(|(port, _)| *port == 0x3F8)
        .map(|(_, byte)| byte)
        .collect();
    let text = String::from_utf8(bytes).expect("records are text");
    text.split("\r\n")
        .filter(|line| !line.is_empty())
        .map(|line| line.split(' ').filter(|word| !word.starts_with("rip=")).collect::<Vec<_>>().join(" "))
        .collect()
}

/// Refused entries and instructions, each with what must be told: the first time with every broken rule and its values, then at
/// the tenth time that it failed.
async fn refusals(g: Guest) {
    hypervisor(&g, &[]).await;
    lines(&g);

    // Controls: bits 1, 2 and 4 of the pin-based controls are always 1 (SDM vol. 3D, "Reserved Controls and Default Settings").
    write(&g, &[(PIN_BASED_VM_EXEC_CONTROL, 0), (CR3_TARGET_COUNT, 9)]).await;
    for time in 1..=10 {
        // The same place each time.
        g.set(GUEST_RIP, 0x10_2000);
        g.run(Op::Vmlaunch).await;
        assert_eq!(g.error().await, 7);
        let told = lines(&g);
        match time {
            1 => {
                assert_eq!(told.len(), 2, "{told:#?}");
                let first = "@L1 refused instruction=VMLAUNCH error=7 count=1 n=1 of=2 rule=PinControls \
                             fields=PIN_BASED_VM_EXEC_CONTROL=0x0 ones=0x16";
                assert!(told[0].replace('"', "").starts_with(first), "{told:#?}");
                assert!(told[1].contains("n=2 of=2") && told[1].contains("CR3_TARGET_COUNT=0x9"), "{told:#?}");
            }
            10 => assert!(told[0].contains("count=10") && !told[0].contains("fields="), "{told:#?}"),
            _ => assert_eq!(told, [""; 0], "{time}"),
        }
    }
    write(&g, &[control(PIN_BASED_VM_EXEC_CONTROL, 0, 0), control(CR3_TARGET_COUNT, 0, 0)]).await;

    // Host state.
    write(&g, &[(HOST_CR0, 0), (HOST_RIP, 1 << 63)]).await;
    g.run(Op::Vmlaunch).await;
    assert_eq!(g.error().await, 8);
    let told = lines(&g);
    assert!(told.iter().all(|line| line.contains("error=8")), "{told:#?}");
    assert!(told[0].contains("rule=HostCr0") && told[0].contains("ones=0x80000021"), "{told:#?}");
    assert!(told.iter().any(|line| line.contains("rule=HostRip")), "{told:#?}");
    write(&g, &[(HOST_CR0, 0x8001_0031), (HOST_RIP, HANDLER)]).await;

    // Guest state: an exit, with bit 31 of its reason.
    for (field, bad, good, rule) in [
        (GUEST_RFLAGS, 0, 2, "GuestRflagsReserved"),
        (GUEST_CR4, 0, 0x2020, "GuestCr4"),
        (GUEST_ACTIVITY_STATE, 7, 0, "GuestActivity"),
    ] {
        write(&g, &[(field, bad)]).await;
        g.run(Op::Vmlaunch).await;
        assert_eq!((g.level(), g.vmread(VM_EXIT_REASON).await), (Level::L2, Some(0x8000_0021)), "{rule}");
        let told = lines(&g);
        assert!(told.iter().all(|line| line.contains("exit=33 qualification=0x0")), "{told:#?}");
        assert!(told.iter().any(|line| line.contains(&format!("rule={rule}"))), "{told:#?}");
        write(&g, &[(field, good)]).await;
    }

    // Instructions: with the field that VMREAD names, without a rule.
    g.run(Op::Vmread(0x6FFE)).await;
    assert_eq!(lines(&g), ["@L1 refused instruction=\"VMREAD\" error=12 operand=0x6ffe count=1"]);
    g.run(Op::Vmptrld(VMCS + 8)).await;
    assert_eq!(lines(&g), ["@L1 refused instruction=\"VMPTRLD\" error=9 count=1"]);
    launch(&g).await;
    leave(&g).await;
    assert_eq!(lines(&g), [""; 0], "an entry that is good");
}

#[test]
fn a_refusal_is_told_once_with_every_rule_and_value_and_again_at_powers_of_ten() {
    // A process tells a refusal once for each place in L2: so each machine of the test has a process of its own.
    const MACHINE: &str = "NVMX_TOLD_ON";
    let setups = Setup::all();
    match std::env::var(MACHINE).ok().and_then(|number| number.parse::<usize>().ok()) {
        Some(number) => {
            let mut world = World::new(setups[number]);
            serial::init(Serial::COM1, LevelFilter::Off);
            tell::configure(true);
            let end = world.boot(refusals);
            assert!(matches!(end, End::Over), "{end:?}");
        }
        None => {
            for number in 0..setups.len() {
                let this = std::env::current_exe().expect("the test itself");
                let output = std::process::Command::new(this).env(MACHINE, number.to_string()).output();
                let output = output.expect("it starts again");
                assert!(output.status.success(), "machine {number}:\n{}", String::from_utf8_lossy(&output.stdout));
            }
        }
    }
}
