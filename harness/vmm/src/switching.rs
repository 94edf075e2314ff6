//! Many small guests on one CPU: what KVM does for a host full of them. Each has a VMCS, an EPT and a VPID of its own, and they are
//! entered in turn, each to its next write to a port.

use crate::console::Console;
use crate::counters::Counters;
use crate::facts::{counted, record, ticks};
use crate::multiboot::Start;
use crate::{cpu, machine};
use anyhow::{Context, Result, bail, ensure};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use l2_protocol::{Kind, Level};
use memmap2::MmapMut;

const NAME: &str = "load_guests";
const GUESTS: u32 = 12;
const ROUNDS: u32 = 400;
/// A page for the program, and one for what it counts.
const MEMORY: usize = 2 * 4096;
/// Nothing is there: the write goes to the VMM.
const PORT: u16 = 0x510;
/// The program, for 32-bit protected mode, at 0. It counts in memory, by steps that are in a register: a guest that got another's
/// memory or registers counts wrong.
///
/// ```text
/// again: add [0x1000], ecx
///        mov eax, [0x1000]
///        out dx, eax
///        jmp again
/// ```
const PROGRAM: [u8; 14] = [0x01, 0x0D, 0, 0x10, 0, 0, 0xA1, 0, 0x10, 0, 0, 0xEF, 0xEB, 0xF2];

/// Enters all guests in turn, round after round.
///
/// # Errors
/// What KVM refuses, or the guest that did not do what it is to do.
pub fn run(console: &mut Console) -> Result<()> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let named = |id: u32| move || format!("{NAME}: guest {id}");
    let mut guests =
        (0..GUESTS).map(|id| Guest::new(&kvm, id).with_context(named(id))).collect::<Result<Vec<Guest>>>()?;
    let (before, start) = (Counters::read(), ticks());
    let mut sum = 0;
    for round in 0..ROUNDS {
        for (id, guest) in (0..).zip(&mut guests) {
            let value = guest.enter().with_context(named(id))?;
            ensure!(value == written(id, round), "{NAME}: guest {id} wrote {value} in round {round}");
            sum += u64::from(value);
        }
    }
    let ticks = ticks() - start;
    let counters = before.zip(Counters::read());
    let counts = counters.iter().flat_map(|(from, to)| from.between(to));
    counted(console, NAME, GUESTS * ROUNDS, ticks, counts);
    record(console, Level::L2, Kind::Check, &[("name", NAME), ("result", &sum.to_string())]);
    Ok(())
}

/// The step in which a guest counts.
fn step(id: u32) -> u32 {
    id + 1
}

/// What a guest writes in a round.
fn written(id: u32, round: u32) -> u32 {
    step(id) * (round + 1)
}

/// A machine with one CPU.
struct Guest {
    vcpu: VcpuFd,
    // The order matters: a machine must be gone before its memory is.
    _vm: VmFd,
    _memory: MmapMut,
}

impl Guest {
    fn new(kvm: &Kvm, id: u32) -> Result<Self> {
        let mut memory = MmapMut::map_anon(MEMORY).context("no memory")?;
        memory[..PROGRAM.len()].copy_from_slice(&PROGRAM);
        let vm = machine::create(kvm, &memory)?;
        let vcpu = vm.create_vcpu(0).context("KVM makes no CPU")?;
        cpu::prepare(kvm, &vcpu, 0, 1, Start { entry: 0, info: 0 })?;
        let mut registers = vcpu.get_regs()?;
        (registers.rcx, registers.rdx) = (step(id).into(), PORT.into());
        vcpu.set_regs(&registers)?;
        Ok(Guest { vcpu, _vm: vm, _memory: memory })
    }

    /// Runs it until it writes to its port: what it wrote.
    fn enter(&mut self) -> Result<u32> {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, bytes)) => return Ok(u32::from_le_bytes(bytes.try_into()?)),
                Ok(other) => bail!("it exits with {other:?}"),
                Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {}
                Err(e) => return Err(e).context("KVM cannot run it"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The program's instructions by hand, for a guest with this step.
    fn simulate(step: u32, rounds: u32) -> Vec<u32> {
        let mut memory = vec![0; MEMORY];
        memory[..PROGRAM.len()].copy_from_slice(&PROGRAM);
        let (mut eip, mut eax, mut writes) = (0usize, 0, Vec::new());
        let word = |memory: &[u8], at: usize| u32::from_le_bytes(memory[at..at + 4].try_into().unwrap());
        while writes.len() < rounds as usize {
            match &memory[eip..eip + 2] {
                [0x01, 0x0D] => {
                    let at = word(&memory, eip + 2) as usize;
                    let sum = word(&memory, at) + step;
                    memory[at..at + 4].copy_from_slice(&sum.to_le_bytes());
                    eip += 6;
                }
                [0xA1, _] => {
                    eax = word(&memory, word(&memory, eip + 1) as usize);
                    eip += 5;
                }
                [0xEF, _] => {
                    writes.push(eax);
                    eip += 1;
                }
                [0xEB, by] => eip = eip.checked_add_signed(2 + *by as i8 as isize).unwrap(),
                other => panic!("{other:x?} at {eip}"),
            }
        }
        writes
    }

    #[test]
    fn the_program_writes_what_is_expected_of_it() {
        let all: Vec<Vec<u32>> = (0..GUESTS).map(|id| simulate(step(id), ROUNDS)).collect();
        for (id, writes) in (0..).zip(&all) {
            assert!((0..).zip(writes).all(|(round, value)| *value == written(id, round)), "guest {id}");
        }
        let sum: u64 = all.iter().flatten().map(|value| u64::from(*value)).sum();
        assert_eq!(sum, (12 * 13 / 2) * (400 * 401 / 2));
    }
}
