//! The virtual machine and the loop that runs it.

use crate::clock::{CLOCK, Clock};
use crate::console::Console;
use crate::cpu;
use crate::guest::Guest;
use crate::plan::Plan;
use crate::serial::{COM1, Serial};
use crate::stats::Stats;
use anyhow::{Context, Result};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

/// Three pages below the firmware's place, of which KVM wants to know on Intel CPUs.
const TSS: usize = 0xFFFB_D000;
const IDENTITY_MAP: u64 = 0xFFFB_C000;
/// The word "Shutdown" ends the machine; its last letter is in it once.
const BOCHS_SHUTDOWN: u16 = 0x8900;
const QEMU_EXIT: u16 = 0xF4;
/// Another VMM in the guest writes its lines here.
const DEBUG_PORT: u16 = 0xE9;

/// How the guest ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// By an exit port
    Itself,
    /// In another way
    Broken(String),
}

/// The machine.
pub struct Machine {
    vcpu: VcpuFd,
    stats: Stats,
    // The order matters: a machine must be gone before its memory is.
    _vm: VmFd,
    _guest: Guest,
}

impl Machine {
    /// Makes the machine that the plan describes.
    ///
    /// # Errors
    /// What KVM refuses, or a file that cannot be loaded.
    pub fn new(plan: &Plan) -> Result<Self> {
        let guest = Guest::load(plan)?;
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let vm = kvm.create_vm().context("KVM makes no machine")?;
        vm.set_tss_address(TSS)?;
        vm.set_identity_map_address(IDENTITY_MAP)?;
        vm.create_irq_chip()?;
        vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: guest.memory.len() as u64,
            userspace_addr: guest.memory.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: 1. The region is the whole of a private mapping. 2. It lives as long as the machine, and nothing in this
        // process reads or writes it from here on.
        unsafe { vm.set_user_memory_region(region) }.context("KVM refuses the guest's memory")?;
        let vcpu = vm.create_vcpu(0).context("KVM makes no CPU")?;
        cpu::prepare(&kvm, &vcpu, guest.start)?;
        let stats = Stats::open(&vcpu)?;
        Ok(Machine { vcpu, stats, _vm: vm, _guest: guest })
    }

    /// Runs the guest to its end.
    ///
    /// # Errors
    /// If KVM cannot run the CPU.
    pub fn run(mut self, console: &mut Console) -> Result<End> {
        let mut serial = Serial::new(self.stats.snapshot());
        let mut clock = Clock::default();
        let end = loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, bytes)) => match port {
                    BOCHS_SHUTDOWN if bytes.contains(&b'n') => break End::Itself,
                    QEMU_EXIT => break End::Itself,
                    DEBUG_PORT => bytes.iter().for_each(|b| serial.take(*b, &self.stats, console)),
                    COM1..=0x3FF => {
                        for byte in bytes {
                            serial.write(port, *byte, &self.stats, console);
                        }
                    }
                    CLOCK..=0x71 => bytes.iter().for_each(|byte| clock.write(port, *byte)),
                    _ => {}
                },
                Ok(VcpuExit::IoIn(port, bytes)) => {
                    let value = match port {
                        COM1..=0x3FF => serial.read(port),
                        CLOCK..=0x71 => clock.read(port),
                        _ => 0xFF,
                    };
                    bytes.fill(value);
                }
                // Nothing is there.
                Ok(VcpuExit::MmioRead(_, bytes)) => bytes.fill(0xFF),
                Ok(VcpuExit::MmioWrite(..) | VcpuExit::Intr) => {}
                Ok(VcpuExit::Shutdown) => break End::Broken(format!("triple fault of the guest{}", self.place())),
                Ok(VcpuExit::Hlt) => break End::Broken("the guest has halted for good".into()),
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    break End::Broken(format!("KVM cannot enter the guest: reason {reason:#x}{}", self.place()));
                }
                Ok(VcpuExit::InternalError) => {
                    break End::Broken(format!("KVM: internal error{}{}", self.detail(), self.place()));
                }
                Ok(other) => break End::Broken(format!("KVM: unexpected {other:?}")),
                Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {}
                Err(e) => return Err(e).context("KVM cannot run the CPU"),
            }
        };
        serial.finish(console);
        Ok(end)
    }

    /// What KVM says about its internal error.
    fn detail(&mut self) -> String {
        // SAFETY: the last exit was an internal error, so that this member is the valid one.
        let error = unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.internal };
        let data: Vec<String> =
            error.data.iter().take(error.ndata.min(16) as usize).map(|d| format!("{d:#x}")).collect();
        format!(" {} [{}]", error.suberror, data.join(" "))
    }

    fn place(&self) -> String {
        match (self.vcpu.get_regs(), self.vcpu.get_sregs()) {
            (Ok(r), Ok(s)) => format!(
                ": RIP={:#x} RSP={:#x} CR0={:#x} CR3={:#x} CR4={:#x} CS={:#x}",
                r.rip, r.rsp, s.cr0, s.cr3, s.cr4, s.cs.selector
            ),
            _ => String::new(),
        }
    }
}
