//! INVEPT and INVVPID of L2.

use super::require_root;
use crate::cpu::Cpu;
use crate::ept::Eptp;
use crate::guest::{Next, Stop, operand};
use crate::hw::vmx::Invalidate;
use crate::nested::result::done;
use crate::rules::checks::eptp_is_valid;
use crate::vmx::instr::{Direction, InstructionInfo};
use crate::vmx::{Capabilities, Field, VmxError, VmxResult};
use crate::x86::Fault;
use crate::x86::canonical::is_canonical_48;
use l2_protocol::abi::Counter;

const INVALID_OPERAND: VmxResult = VmxResult::FailValid(VmxError::InvalidOperandToInveptInvvpid);

/// The type in a register and the 128-bit descriptor in memory.
fn operands(cpu: &mut Cpu) -> Result<(u64, u64, u64), Stop> {
    let info = InstructionInfo(cpu.vmx.read(Field::VMX_INSTRUCTION_INFO) as u32);
    let kind = operand::second_register(cpu, info);
    let linear = operand::linear(cpu, 16, Direction::Load)?;
    let [first, second] = operand::read_words(cpu, linear)?;
    Ok((kind, first, second))
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
    match Invept::decode(&cpu.config.offered, kind, eptp) {
        Some(Invept::Single(eptp12)) => cpu.ept02.invept_single(eptp12),
        Some(Invept::All) => cpu.ept02.invept_all(),
        None => return done(cpu, INVALID_OPERAND),
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
    let Some((kind, vpid12)) = decode_invvpid(&cpu.config.offered, kind, word, linear) else {
        return done(cpu, INVALID_OPERAND);
    };
    let vmx = &mut cpu.vmx;
    match (kind, cpu.nested.vpids.lookup(vpid12)) {
        // Also what L2 has cached itself under vpid01, which costs it no more than time.
        (Invalidate::All, _) => vmx.invvpid(Invalidate::All, 0, 0),
        // A processor in 4-level paging may refuse an address that is canonical for 5 levels only.
        (Invalidate::Individual, Some(vpid02)) if is_canonical_48(linear) => {
            vmx.invvpid(Invalidate::Individual, vpid02, linear);
        }
        (Invalidate::Individual | Invalidate::Single, Some(vpid02)) => vmx.invvpid(Invalidate::Single, vpid02, 0),
        (Invalidate::SingleRetainingGlobals, Some(vpid02)) => {
            vmx.invvpid(Invalidate::SingleRetainingGlobals, vpid02, 0);
        }
        // Nothing is cached under that VPID.
        (_, None) => {}
    }
    done(cpu, VmxResult::Succeed)
}

/// What an INVEPT of L2 concerns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Invept {
    Single(Eptp),
    All,
}

impl Invept {
    /// `None` if the operands are invalid (SDM vol. 3C, "INVEPT", table "INVEPT types").
    fn decode(offered: &Capabilities, kind: u64, eptp: u64) -> Option<Self> {
        match kind {
            1 if offered.ept_vpid.invept_single() && eptp_is_valid(eptp, offered) => {
                Some(Self::Single(Eptp::new(eptp)))
            }
            2 if offered.ept_vpid.invept_all() => Some(Self::All),
            _ => None,
        }
    }
}

/// The type and the VPID of an INVVPID of L2; `None` if the operands are invalid (SDM vol. 3C, "INVVPID").
fn decode_invvpid(offered: &Capabilities, kind: u64, word: u64, linear: u64) -> Option<(Invalidate, u16)> {
    let caps = offered.ept_vpid;
    let (kind, is_offered) = match kind {
        0 => (Invalidate::Individual, caps.invvpid_address()),
        1 => (Invalidate::Single, caps.invvpid_single()),
        2 => (Invalidate::All, caps.invvpid_all()),
        3 => (Invalidate::SingleRetainingGlobals, caps.invvpid_single_retaining_globals()),
        _ => return None,
    };
    // Bits 63:16 are reserved for every type.
    let vpid12 = u16::try_from(word).ok()?;
    let has_vpid = vpid12 != 0 || kind == Invalidate::All;
    let has_address = kind != Invalidate::Individual || offered.is_canonical(linear);
    (is_offered && has_vpid && has_address).then_some((kind, vpid12))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmx::caps::msr;
    use proptest::prelude::*;

    /// Everything allowed, and these bits of IA32_VMX_EPT_VPID_CAP.
    fn machine(ept_vpid: u64, linear_width: u32) -> Capabilities {
        let value = |index| if index == msr::IA32_VMX_EPT_VPID_CAP { ept_vpid } else { 0xFFFF_FFFF << 32 };
        Capabilities::read(value, 39, linear_width)
    }

    const WALK_4_WRITE_BACK: u64 = 1 << 6 | 1 << 14;
    const EPTP: u64 = 0x5000 | 3 << 3 | 6;

    proptest! {
        #[test]
        fn an_invvpid_is_valid_if_type_reserved_bits_vpid_and_address_are(
            kind in prop_oneof![0u64..5, any::<u64>()], caps in 0u64..16,
            word in prop_oneof![0u64..3, 0xFFFEu64..0x1_0002, any::<u64>()],
            linear in prop_oneof![any::<u64>(), 0x7FFF_FFFF_FFFEu64..0x8000_0000_0002, Just(0xFFFF_8000_0000_0000)],
        ) {
            let canonical = !(1 << 47..0xFFFF_8000_0000_0000).contains(&linear);
            let valid = kind < 4
                && caps >> kind & 1 == 1
                && word < 0x1_0000
                && (kind == 2 || word != 0)
                && (kind != 0 || canonical);
            let decoded = decode_invvpid(&machine(1 << 32 | caps << 40, 48), kind, word, linear);
            prop_assert_eq!(decoded.map(|(kind, vpid)| (kind as u64, u64::from(vpid))), valid.then_some((kind, word)));
        }
    }

    #[test]
    fn invept_takes_only_types_that_are_offered() {
        for caps in 0..4 {
            let machine = machine(WALK_4_WRITE_BACK | caps << 25, 48);
            for kind in 0..4 {
                let expected = match kind {
                    1 if caps & 1 != 0 => Some(Invept::Single(Eptp::new(EPTP))),
                    2 if caps & 2 != 0 => Some(Invept::All),
                    _ => None,
                };
                assert_eq!(Invept::decode(&machine, kind, EPTP), expected, "type {kind}, capabilities {caps:#b}");
            }
        }
    }

    #[test]
    fn invept_looks_at_the_eptp_for_a_single_context_only() {
        let machine = machine(WALK_4_WRITE_BACK | 3 << 25, 48);
        let invalid = [EPTP ^ 6, EPTP ^ 1 << 3, EPTP | 1 << 6, EPTP | 1 << 7, EPTP | 1 << 39];
        for eptp in invalid {
            assert_eq!(Invept::decode(&machine, 1, eptp), None, "{eptp:#x}");
            assert_eq!(Invept::decode(&machine, 2, eptp), Some(Invept::All), "{eptp:#x}");
        }
    }

    #[test]
    fn nvmx_hands_the_processor_only_addresses_of_48_bits() {
        for (linear, expected) in [
            (0x7FFF_FFFF_FFFF, true),
            (0x8000_0000_0000, false),
            (0xFFFF_7FFF_FFFF_FFFF, false),
            (0xFFFF_8000_0000_0000, true),
        ] {
            assert_eq!(is_canonical_48(linear), expected, "{linear:#x}");
        }
    }
}
