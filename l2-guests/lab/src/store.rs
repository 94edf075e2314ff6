//! The one store that the experiments trap: `mov [rdi], rax`, so that its emulation is a few lines.

use crate::vm::Vm;
use core::arch::asm;
use l2_kit::{fields as f, vmx};

const CODE: [u8; 3] = [0x48, 0x89, 0x07];

/// The guest's side.
#[inline(always)]
pub fn store(address: u64, value: u64) {
    // SAFETY: the address is memory or a device of the experiment.
    unsafe { asm!("mov [rdi], rax", in("rdi") address, in("rax") value, options(nostack, preserves_flags)) };
}

/// The hypervisor's side: what the guest wants to store where, after an EPT violation by [`store`]; the guest goes on after it.
/// An EPT violation tells no instruction length (SDM "Information for VM Exits Due to Instruction Execution").
pub fn emulate(vm: &Vm) -> Option<(u64, u64)> {
    let rip = vmx::read(f::GUEST_RIP);
    // SAFETY: the guest's code is this image's.
    if unsafe { *(rip as *const [u8; 3]) } != CODE {
        return None;
    }
    vmx::write(f::GUEST_RIP, rip + CODE.len() as u64);
    Some((vm.vcpu.registers.rdi, vm.vcpu.registers.rax))
}
