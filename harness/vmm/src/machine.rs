//! The virtual machine and the loop that runs each of its CPUs, on a thread of its own.

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
use memmap2::MmapMut;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

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
    vcpus: Vec<VcpuFd>,
    stats: Stats,
    // The order matters: a machine must be gone before its memory is.
    _vm: VmFd,
    _guest: Guest,
}

/// A machine with KVM's interrupt controllers and this memory from 0 on, which the caller keeps longer than the machine and leaves alone.
///
/// # Errors
/// What KVM refuses.
pub fn create(kvm: &Kvm, memory: &MmapMut) -> Result<VmFd> {
    let vm = kvm.create_vm().context("KVM makes no machine")?;
    vm.set_tss_address(TSS)?;
    vm.set_identity_map_address(IDENTITY_MAP)?;
    vm.create_irq_chip()?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: memory.len() as u64,
        userspace_addr: memory.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: 1. The region is the whole of a private mapping. 2. It lives as long as the machine, and nothing in this
    // process reads or writes it from here on.
    unsafe { vm.set_user_memory_region(region) }.context("KVM refuses the guest's memory")?;
    Ok(vm)
}

/// What the CPUs share.
struct Devices<'a> {
    serial: Serial,
    clock: Clock,
    stats: &'a Stats,
    console: &'a mut Console,
}

impl Machine {
    /// Makes the machine that the plan describes.
    ///
    /// # Errors
    /// What KVM refuses, or a file that cannot be loaded.
    pub fn new(plan: &Plan) -> Result<Self> {
        let guest = Guest::load(plan)?;
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let vm = create(&kvm, &guest.memory)?;
        vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })?;
        let vcpu = |id: u32| {
            let vcpu = vm.create_vcpu(id.into()).context("KVM makes no CPU")?;
            cpu::prepare(&kvm, &vcpu, id, plan.cpus, guest.start)?;
            Ok(vcpu)
        };
        let vcpus = (0..plan.cpus).map(vcpu).collect::<Result<Vec<_>>>()?;
        let stats = Stats::open(&vcpus)?;
        Ok(Machine { vcpus, stats, _vm: vm, _guest: guest })
    }

    /// Runs the guest until one of its CPUs ends it.
    ///
    /// # Errors
    /// If KVM cannot run a CPU.
    pub fn run(mut self, console: &mut Console) -> Result<End> {
        let (serial, clock, stats) = (Serial::new(self.stats.snapshot()), Clock::default(), &self.stats);
        let devices = Mutex::new(Devices { serial, clock, stats, console });
        let (over, (told, ends)) = (AtomicBool::new(false), mpsc::channel());
        let ids = Mutex::new(Vec::new());
        awaken_by_signal();
        let end = std::thread::scope(|scope| {
            let threads: Vec<_> = (self.vcpus.iter_mut())
                .map(|vcpu| {
                    let (told, ids, devices, over) = (told.clone(), &ids, &devices, &over);
                    std::thread::Builder::new().spawn_scoped(scope, move || {
                        // SAFETY: the call has no arguments.
                        let id = unsafe { libc::pthread_self() };
                        ids.lock().unwrap_or_else(PoisonError::into_inner).push(id);
                        if let Some(end) = (Cpu { vcpu, devices }).run(over).transpose() {
                            // Only the first end counts: nobody receives the others.
                            let _ = told.send(end);
                        }
                    })
                })
                .collect();
            let threads = threads.into_iter().collect::<std::io::Result<Vec<_>>>();
            drop(told);
            // A CPU that could not be started ends the machine, too.
            let end = threads.as_ref().map_or(Ok(End::Broken("no thread for a CPU".into())), |_| {
                ends.recv().unwrap_or_else(|_| Ok(End::Broken("every CPU has stopped".into())))
            });
            over.store(true, SeqCst);
            let threads = threads.unwrap_or_default();
            // A signal just before a CPU is entered is lost.
            while threads.iter().any(|thread| !thread.is_finished()) {
                for id in ids.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                    // SAFETY: the handle of the thread is still there, so that its id is its own.
                    unsafe { libc::pthread_kill(*id, WAKE) };
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            end
        });
        let Devices { mut serial, console, .. } = devices.into_inner().unwrap_or_else(PoisonError::into_inner);
        serial.finish(console);
        end
    }
}

/// The signal by which a thread leaves KVM.
const WAKE: libc::c_int = libc::SIGUSR1;

extern "C" fn awake(_: libc::c_int) {}

/// The signal only interrupts the call that the thread is in.
fn awaken_by_signal() {
    // SAFETY: all of the structure may be 0: no flags (a call is not made anew), nothing is masked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = awake as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: 1. The pointers are to a value that lives until the call returns, and null. 2. The handler does nothing.
    unsafe { libc::sigaction(WAKE, &action, std::ptr::null_mut()) };
}

/// One CPU.
struct Cpu<'a, 'd> {
    vcpu: &'a mut VcpuFd,
    devices: &'a Mutex<Devices<'d>>,
}

impl Cpu<'_, '_> {
    /// Runs it until it ends the machine, or until the machine is over by another CPU: then `None`.
    fn run(mut self, over: &AtomicBool) -> Result<Option<End>> {
        while !over.load(SeqCst) {
            if let Some(end) = self.once()? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    /// Runs it to its next exit.
    fn once(&mut self) -> Result<Option<End>> {
        let devices = || self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(BOCHS_SHUTDOWN, bytes)) if bytes.contains(&b'n') => return Ok(Some(End::Itself)),
            Ok(VcpuExit::IoOut(QEMU_EXIT, _)) => return Ok(Some(End::Itself)),
            Ok(VcpuExit::IoOut(port, bytes)) => devices().write(port, bytes),
            Ok(VcpuExit::IoIn(port, bytes)) => bytes.fill(devices().read(port)),
            // Nothing is there.
            Ok(VcpuExit::MmioRead(_, bytes)) => bytes.fill(0xFF),
            Ok(VcpuExit::MmioWrite(..) | VcpuExit::Intr) => {}
            Ok(VcpuExit::Shutdown) => return self.broken("triple fault of the guest"),
            Ok(VcpuExit::Hlt) => return Ok(Some(End::Broken("the guest has halted for good".into()))),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return self.broken(&format!("KVM cannot enter the guest: reason {reason:#x}"));
            }
            Ok(VcpuExit::InternalError) => {
                let detail = self.detail();
                return self.broken(&format!("KVM: internal error{detail}"));
            }
            Ok(other) => return Ok(Some(End::Broken(format!("KVM: unexpected {other:?}")))),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {}
            Err(e) => return Err(e).context("KVM cannot run the CPU"),
        }
        Ok(None)
    }

    /// The end of a machine that cannot go on, and where it was.
    fn broken(&self, why: &str) -> Result<Option<End>> {
        Ok(Some(End::Broken(format!("{why}{}", self.place()))))
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

impl Devices<'_> {
    fn write(&mut self, port: u16, bytes: &[u8]) {
        match port {
            DEBUG_PORT => bytes.iter().for_each(|byte| self.serial.take(*byte, self.stats, self.console)),
            COM1..=0x3FF => bytes.iter().for_each(|byte| self.serial.write(port, *byte, self.stats, self.console)),
            CLOCK..=0x71 => bytes.iter().for_each(|byte| self.clock.write(port, *byte)),
            _ => {}
        }
    }

    fn read(&self, port: u16) -> u8 {
        match port {
            COM1..=0x3FF => self.serial.read(port),
            CLOCK..=0x71 => self.clock.read(port),
            _ => 0xFF,
        }
    }
}
