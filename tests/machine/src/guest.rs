//! A program in a guest: its instructions are async functions, so that it stands still while its hypervisor handles an exit.
//! On the bare machine L2's hypervisor is the program itself, and nothing ever waits.

use crate::exits::Step;
pub use crate::exits::{OPERAND, Op};
use crate::memory::WRITE;
use crate::processor::{Core, Delivered, Exit, Level, Root, registers};
use nvmx::addr::Hpa;
use nvmx::mm::{PhysMem, Place};
use nvmx::vmx::{Field, Field::*, Fields};
use std::cell::{Cell, RefCell, RefMut};
use std::fmt::Write;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

/// The processor as it is shared by the program and whoever runs it.
#[derive(Clone)]
pub struct Guest {
    core: Rc<RefCell<Core>>,
    exit: Rc<Cell<Option<Exit>>>,
    log: Rc<RefCell<Vec<String>>>,
    /// An NMI for whoever is in VMX root operation at the next exit.
    nmi: Rc<Cell<bool>>,
    /// A machine check before so many more instructions that nvmx executes.
    machine_check: Rc<Cell<Option<u32>>>,
}

/// How an instruction ended, as the program sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It completed, or the state was set otherwise at the same level.
    Done,
    /// An event came instead, or behind it.
    Event(Delivered),
    /// The other level runs now.
    Left,
}

/// As often as one instruction may exit without an end.
const TRIES: usize = 40;

impl Guest {
    pub fn new(core: Core) -> Self {
        Guest {
            core: Rc::new(RefCell::new(core)),
            exit: Rc::default(),
            log: Rc::default(),
            nmi: Rc::default(),
            machine_check: Rc::default(),
        }
    }

    pub fn core(&self) -> RefMut<'_, Core> {
        self.core.borrow_mut()
    }

    pub fn level(&self) -> Level {
        self.core().level()
    }

    pub fn is_bare(&self) -> bool {
        self.core().root == Root::Bare
    }

    /// The exit that the program waits in.
    pub fn take_exit(&self) -> Option<Exit> {
        self.exit.take()
    }

    /// An NMI arrives in nvmx, once this guest has exited.
    pub fn nmi_at_next_exit(&self) {
        self.nmi.set(true);
    }

    pub fn take_nmi(&self) -> bool {
        self.nmi.take()
    }

    /// A machine check hits nvmx, before the instruction of its own with this number from now on.
    pub fn machine_check_in(&self, instructions: u32) {
        self.machine_check.set(Some(instructions));
    }

    /// The machine check that was asked for has not come, and does not come any more.
    pub fn no_machine_check(&self) -> bool {
        self.machine_check.take().is_some()
    }

    /// nvmx is about to execute an instruction: does a machine check come first?
    pub fn machine_check_comes(&self) -> bool {
        let left = self.machine_check.get();
        self.machine_check.set(left.and_then(|left| left.checked_sub(1)));
        left == Some(0)
    }

    pub fn log(&self) -> Vec<String> {
        self.log.borrow().clone()
    }

    pub fn note(&self, text: impl Into<String>) {
        self.log.borrow_mut().push(text.into());
    }

    /// The guest that runs exits; goes on when a guest runs again.
    pub async fn exit(&self, exit: Exit) {
        if self.is_bare() {
            self.core().vmexit(exit);
            return;
        }
        self.exit.set(Some(exit));
        let mut waited = false;
        poll_fn(|_| match std::mem::replace(&mut waited, true) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }

    /// Executes an instruction until it has come to an end.
    pub async fn run(&self, op: Op) -> Outcome {
        // A NOP before it: no instruction of L2 lies where an exit may land, so that the two can be told apart.
        if self.level() == Level::L2 {
            let rip = self.get(GUEST_RIP) + 1;
            self.set(GUEST_RIP, rip);
        }
        for _ in 0..TRIES {
            let (level, rip, events) = {
                let mut core = self.core();
                core.delivered.clear();
                (core.level(), core.state.get(GUEST_RIP), core.delivered.len())
            };
            let step = self.core().execute(op);
            if let Step::Exit(exit) = step {
                self.exit(exit).await;
            }
            let core = self.core();
            if core.level() != level {
                return Outcome::Left;
            }
            if let Some(event) = core.delivered.get(events) {
                return Outcome::Event(*event);
            }
            if step == Step::Done || core.state.get(GUEST_RIP) != rip {
                return Outcome::Done;
            }
        }
        panic!("{op:?} never ends");
    }

    /// What the program sees, written to its log: everything at the level that runs.
    pub fn see(&self, what: impl std::fmt::Debug) {
        let text = format!("{what:?}: {}", self.state());
        self.note(text);
    }

    /// Registers and events of the level that runs.
    pub fn state(&self) -> String {
        let core = self.core();
        let mut text = format!("{:?}", core.level());
        let (masks, shadows) = ([CR0_GUEST_HOST_MASK, CR4_GUEST_HOST_MASK], [CR0_READ_SHADOW, CR4_READ_SHADOW]);
        for field in registers() {
            let value = core.state.get(field);
            let of_l2_under_nvmx = !matches!(core.root, Root::Bare) && core.level() == Level::L2;
            // What L2 reads under nvmx, which owns bits of the two.
            let seen = match [GUEST_CR0, GUEST_CR4].iter().position(|f| *f == field) {
                Some(i) if of_l2_under_nvmx => {
                    let mask = core.get(masks[i]);
                    value & !mask | core.get(shadows[i]) & mask
                }
                _ => value,
            };
            let unusable = rights_of(field).is_some_and(|rights| core.state.get(rights) >> 16 & 1 == 1);
            if seen != 0 && !unusable {
                let _ = write!(text, " {}={seen:#x}", field.name());
            }
        }
        let _ = write!(text, " gprs={:x?} cr2={:#x} xcr0={:#x} msrs={:x?}", core.gprs, core.cr2, core.xcr0, core.msrs);
        for event in &core.delivered {
            let _ = write!(text, " {event:x?}");
        }
        text
    }

    // ---- L2's memory, without exits: it is the machine's ----

    pub fn peek(&self, at: u64) -> u64 {
        self.core().memory.read_u64(Hpa::new(at))
    }

    pub fn poke(&self, at: u64, value: u64) {
        self.mark_written(at);
        self.core().memory.write_u64(Place::anywhere(Hpa::new(at)), value);
    }

    pub fn poke_u32(&self, at: u64, value: u32) {
        self.mark_written(at);
        self.core().memory.write_bytes(Place::anywhere(Hpa::new(at)), &value.to_le_bytes());
    }

    /// A store of L2 leaves its mark in ept01. While L3 runs it is a store of nobody's, like that of a device.
    fn mark_written(&self, at: u64) {
        let mut core = self.core();
        if core.level() == Level::L2 {
            let _ = core.physical(at, WRITE);
        }
    }

    /// A register without an exit: what a guest changes by itself.
    pub fn set(&self, field: Field, value: u64) {
        self.core().state.set(field, value);
    }

    pub fn get(&self, field: Field) -> u64 {
        self.core().state.get(field)
    }

    pub fn flags(&self) -> u64 {
        self.get(GUEST_RFLAGS) & 0x8D5
    }

    pub fn gpr(&self, number: usize) -> u64 {
        self.core().gprs[number]
    }

    // ---- Shorthands of a hypervisor ----

    /// VMREAD by RAX; `None` if it failed.
    pub async fn vmread(&self, field: Field) -> Option<u64> {
        self.run(Op::Vmread(field.encoding().into())).await;
        (self.flags() == 0).then(|| self.gpr(0))
    }

    pub async fn vmwrite(&self, field: Field, value: u64) -> bool {
        self.run(Op::Vmwrite(field.encoding().into(), value)).await;
        self.flags() == 0
    }

    /// The number of the last error.
    pub async fn error(&self) -> u64 {
        self.vmread(VM_INSTRUCTION_ERROR).await.unwrap_or(0)
    }
}

/// The rights of the segment that a base or a limit belongs to; they mean nothing while it is unusable.
fn rights_of(field: Field) -> Option<Field> {
    Some(match field {
        GUEST_ES_BASE | GUEST_ES_LIMIT => GUEST_ES_AR_BYTES,
        GUEST_SS_BASE | GUEST_SS_LIMIT => GUEST_SS_AR_BYTES,
        GUEST_DS_BASE | GUEST_DS_LIMIT => GUEST_DS_AR_BYTES,
        GUEST_FS_LIMIT => GUEST_FS_AR_BYTES,
        GUEST_GS_LIMIT => GUEST_GS_AR_BYTES,
        GUEST_LDTR_BASE | GUEST_LDTR_LIMIT => GUEST_LDTR_AR_BYTES,
        _ => return None,
    })
}
