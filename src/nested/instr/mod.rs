//! VMX instructions of L2, a file a family. vmcs01 is current throughout.
//!
//! The processor itself raises #UD for the wrong mode before the exit; CPL and the rest are nvmx's to check, in the order
//! of the pseudocode in SDM vol. 3C, "VMX Instruction Reference".

pub mod entry;
pub mod fields;
pub mod invalidate;
pub mod pointers;
pub mod switch;

use crate::addr::{Gpa, PAGE_SIZE};
use crate::cpu::{Cpu, Operation};
use crate::guest::Stop;
use crate::guest::operand::{self, require_cpl0};
use crate::vmx::Capabilities;
use crate::vmx::instr::Direction;
use crate::x86::Fault;

/// #UD outside VMX operation, #GP(0) above CPL 0.
#[inline(always)]
fn require_root(cpu: &mut Cpu) -> Result<(), Fault> {
    if cpu.nested.operation == Operation::Off {
        return Err(Fault::InvalidOpcode);
    }
    require_cpl0(cpu)
}

/// The 64-bit memory operand of VMXON, VMPTRLD and VMCLEAR.
fn pointer_operand(cpu: &mut Cpu) -> Result<Gpa, Stop> {
    let linear = operand::linear(cpu, 8, Direction::Load)?;
    let [word] = operand::read_words(cpu, linear)?;
    Ok(Gpa::new(word))
}

/// 4 KiB aligned and within the physical-address width.
fn is_region_address(offered: &Capabilities, at: Gpa) -> bool {
    at.is_aligned(PAGE_SIZE) && offered.is_physical(at.get())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmx_region_is_a_page_within_the_physical_width() {
        for width in [32, 36, 39, 46, 52] {
            let machine = Capabilities::read(|_| 0, width, 48);
            for bit in 0..64 {
                let expected = (12..width).contains(&bit);
                assert_eq!(is_region_address(&machine, Gpa::new(1 << bit)), expected, "bit {bit}, width {width}");
            }
        }
    }
}
