//! INVEPT and INVVPID of L2.

use super::{done, require_root};
use crate::ept::Eptp;
use crate::error::{Fault, VmxError, VmxResult};
use crate::hw::vmx::Invalidate;
use crate::vcpu::{Cpu, Next, Stop, operand};
use crate::vmx::Field;
use crate::vmx::instr::{Direction, InstructionInfo};
use l2_protocol::abi::Counter;

const INVALID_OPERAND: VmxResult = VmxResult::FailValid(VmxError::InvalidOperandToInveptInvvpid);

/// The type in a register and the 128-bit descriptor in memory.
fn operands(cpu: &mut Cpu) -> Result<(u64, u64, u64), Stop> {
    let info = InstructionInfo(cpu.vmx.read(Field::VMX_INSTRUCTION_INFO) as u32);
    let kind = operand::gpr(cpu, info.reg2());
    let kind = if operand::in_64_bit_mode(cpu) { kind } else { kind & 0xFFFF_FFFF };
    let linear = operand::linear(cpu, 16, Direction::Load)?;
    let mut bytes = [0; 16];
    operand::read(cpu, linear, &mut bytes)?;
    let value = u128::from_le_bytes(bytes);
    Ok((kind, value as u64, (value >> 64) as u64))
}

/// INVEPT
pub fn invept(cpu: &mut Cpu) -> Result<Next, Stop> {
    let caps = cpu.config.offered.ept_vpid;
    if !caps.invept() {
        return Err(Fault::InvalidOpcode.into());
    }
    require_root(cpu)?;
    let (kind, eptp, _) = operands(cpu)?;
    let before = cpu.ept02.stats().flushes;
    match kind {
        1 if caps.invept_single() => {
            if !crate::nested::checks::eptp_is_valid(eptp, &cpu.config.offered) {
                return done(cpu, INVALID_OPERAND);
            }
            cpu.ept02.invept_single(Eptp::new(eptp));
        }
        2 if caps.invept_all() => cpu.ept02.invept_all(),
        _ => return done(cpu, INVALID_OPERAND),
    }
    let flushed = cpu.ept02.stats().flushes - before;
    cpu.vmx.counters.add(Counter::Ept02Flushes, flushed);
    done(cpu, VmxResult::Succeed)
}

/// INVVPID
pub fn invvpid(cpu: &mut Cpu) -> Result<Next, Stop> {
    let caps = cpu.config.offered.ept_vpid;
    if !caps.invvpid() {
        return Err(Fault::InvalidOpcode.into());
    }
    require_root(cpu)?;
    let (kind, word, linear) = operands(cpu)?;
    let vpid12 = word as u16;
    let reserved = word >> 16 != 0;
    let offered = match kind {
        0 => caps.invvpid_address(),
        1 => caps.invvpid_single(),
        2 => caps.invvpid_all(),
        3 => caps.invvpid_single_retaining_globals(),
        _ => false,
    };
    let needs_vpid = kind != 2;
    let bad_address = kind == 0 && !cpu.config.offered.is_canonical(linear);
    if !offered || reserved || needs_vpid && vpid12 == 0 || bad_address {
        return done(cpu, INVALID_OPERAND);
    }
    let (vmx, vpids) = (&mut cpu.vmx, &cpu.nested.vpids);
    match (kind, vpids.lookup(vpid12)) {
        // Also what L2 has cached itself under vpid01, which costs it no more than time.
        (2, _) => vmx.invvpid(Invalidate::All, 0, 0),
        // A processor in 4-level paging may refuse an address that is canonical for 5 levels only.
        (0, Some(vpid02)) if is_canonical_48(linear) => vmx.invvpid(Invalidate::Individual, vpid02, linear),
        (0 | 1, Some(vpid02)) => vmx.invvpid(Invalidate::Single, vpid02, 0),
        (3, Some(vpid02)) => vmx.invvpid(Invalidate::SingleRetainingGlobals, vpid02, 0),
        // Nothing was ever cached under that VPID.
        _ => {}
    }
    done(cpu, VmxResult::Succeed)
}

fn is_canonical_48(linear: u64) -> bool {
    matches!(linear as i64 >> 47, 0 | -1)
}
