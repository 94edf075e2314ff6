//! What an instruction does: by itself, or by an exit where the controls of the current VMCS ask for one.
//!
//! Source: SDM vol. 3C, "VMX Non-Root Operation", "Exit Qualification", tables of the instruction-information field.

use crate::memory::{READ, Unreached, WRITE};
use crate::processor::{Core, Delivered, Done, Entry, Exit, Fail, Root, is_canonical};
use nvmx::addr::Hpa;
use nvmx::mm::{PhysMem, Place};
use nvmx::vmx::{Field::*, Fields};

/// Where guests put the memory operands of their VMX instructions.
pub const OPERAND: u64 = 0x8000;

/// An instruction. Its operands are where `Core::prepare` puts them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Cpuid,
    Hlt,
    Pause,
    Rdtsc,
    Rdpmc,
    Invlpg(u64),
    Wbinvd,
    Invd,
    Monitor,
    Mwait,
    MovDr,
    Xsetbv(u32, u64),
    MovToCr0(u64),
    MovToCr3(u64),
    MovFromCr3,
    MovToCr4(u64),
    Clts,
    Lmsw(u16),
    Rdmsr(u32),
    Wrmsr(u32, u64),
    In(u16),
    Out(u16, u8),
    Read(u64),
    Write(u64, u64),
    /// INT3 and the like are not here: a fault of the guest's own
    Raise(u8, Option<u32>),
    Vmxon(u64),
    Vmxoff,
    Vmclear(u64),
    Vmptrld(u64),
    Vmptrst,
    Vmread(u64),
    /// To memory: the encoding, and the linear address of the operand
    VmreadTo(u64, u64),
    Vmwrite(u64, u64),
    /// From memory: the encoding, and the linear address of the operand
    VmwriteFrom(u64, u64),
    Vmlaunch,
    Vmresume,
    Vmcall,
    Invept(u64, u64),
    Invvpid(u64, u64, u64),
    Vmfunc(u32, u32),
    Getsec,
}

/// What became of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    Done,
    Exit(Exit),
}

const FLAGS: u64 = 0x8D5;
/// Vectors with an error code.
const UD: u8 = 6;
const GP: u8 = 13;
const PF: u8 = 14;

fn bit(value: u64, number: u32) -> bool {
    value >> number & 1 == 1
}

/// Instruction information: 64-bit addresses, DS, no index, no base, `reg2` (SDM, tables of that field).
fn memory_operand(reg2: u32) -> u32 {
    2 << 7 | 3 << 15 | 1 << 22 | 1 << 27 | reg2 << 28
}

impl Core {
    fn length(op: Op) -> u64 {
        match op {
            Op::Hlt => 1,
            // ModRM, SIB, four bytes of displacement.
            Op::VmreadTo(..) | Op::VmwriteFrom(..) => 8,
            Op::Vmread(_) | Op::Vmwrite(..) | Op::Vmptrld(_) | Op::Vmptrst => 4,
            Op::Vmclear(_) | Op::Vmxon(_) | Op::Invept(..) | Op::Invvpid(..) => 5,
            Op::Cpuid | Op::Rdtsc | Op::Rdmsr(_) | Op::Wrmsr(..) | Op::Pause => 2,
            _ => 3,
        }
    }

    /// Puts the operands into registers and memory; a write of memory may exit.
    fn prepare(&mut self, op: Op) -> Result<(), Exit> {
        let two = |value: u64| (value & 0xFFFF_FFFF, value >> 32);
        match op {
            Op::Rdmsr(index) => self.gprs[1] = index.into(),
            Op::Wrmsr(index, value) | Op::Xsetbv(index, value) => {
                self.gprs[1] = index.into();
                (self.gprs[0], self.gprs[2]) = two(value);
            }
            Op::MovToCr0(value) | Op::MovToCr3(value) | Op::MovToCr4(value) => self.gprs[0] = value,
            Op::Out(_, value) => self.gprs[0] = value.into(),
            Op::Vmread(encoding) | Op::VmreadTo(encoding, _) | Op::VmwriteFrom(encoding, _) => self.gprs[1] = encoding,
            Op::Vmwrite(encoding, value) => (self.gprs[0], self.gprs[1]) = (value, encoding),
            Op::Vmfunc(eax, ecx) => (self.gprs[0], self.gprs[1]) = (eax.into(), ecx.into()),
            Op::Vmxon(at) | Op::Vmclear(at) | Op::Vmptrld(at) => self.store(OPERAND, at)?,
            Op::Invept(kind, eptp) => {
                self.gprs[0] = kind;
                self.store(OPERAND, eptp)?;
                self.store(OPERAND + 8, 0)?;
            }
            Op::Invvpid(kind, vpid, linear) => {
                self.gprs[0] = kind;
                self.store(OPERAND, vpid)?;
                self.store(OPERAND + 8, linear)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn store(&mut self, at: u64, value: u64) -> Result<(), Exit> {
        let at = self.physical(at, READ | WRITE).map_err(|e| Exit { qualification: e.qualification & !READ, ..e })?;
        self.memory.write_u64(Place::anywhere(Hpa::new(at)), value);
        Ok(())
    }

    /// Executes an instruction of the program.
    pub fn execute(&mut self, op: Op) -> Step {
        if let Err(exit) = self.prepare(op) {
            return Step::Exit(exit);
        }
        if let Some(exit) = self.exit_of(op) {
            return Step::Exit(exit);
        }
        match self.perform(op) {
            Ok(step) => step,
            Err((vector, error)) => self.raise(vector, error, None),
        }
    }

    /// A fault of the instruction: an exit if the exception bitmap says so, else the guest's handler runs.
    pub fn raise(&mut self, vector: u8, error: Option<u32>, address: Option<u64>) -> Step {
        let with_code = if error.is_some() { 1 << 11 } else { 0 };
        let info = u32::from(vector) | 3 << 8 | with_code;
        let chosen = bit(self.get(EXCEPTION_BITMAP), vector.into());
        let fits = error.unwrap_or(0) & self.get(PAGE_FAULT_ERROR_CODE_MASK) as u32
            == self.get(PAGE_FAULT_ERROR_CODE_MATCH) as u32;
        let exits = if vector == 14 { chosen == fits } else { chosen };
        let flags = self.state.get(GUEST_RFLAGS) | 1 << 16;
        self.state.set(GUEST_RFLAGS, flags);
        if self.in_guest && exits {
            let qualification = address.unwrap_or(0);
            return Step::Exit(Exit { qualification, intr: info | 1 << 31, error: error.unwrap_or(0), ..Exit::new(0) });
        }
        if let Some(address) = address {
            self.cr2 = address;
        }
        self.deliver_event(Delivered { info, error, length: None });
        // A monitor trap comes behind the delivery.
        if self.in_guest && self.primary(27) { Step::Exit(Exit::new(37)) } else { Step::Done }
    }

    fn exit_of(&self, op: Op) -> Option<Exit> {
        if !self.in_guest {
            return None;
        }
        let when = |wanted: bool, reason| wanted.then_some(reason);
        let reason = match op {
            Op::Cpuid => Some(10),
            Op::Hlt => when(self.primary(7), 12),
            Op::Invd => Some(13),
            Op::Invlpg(_) => when(self.primary(9), 14),
            Op::Rdpmc => when(self.primary(11), 15),
            Op::Rdtsc => when(self.primary(12), 16),
            Op::Vmcall => Some(18),
            Op::Vmclear(_) => Some(19),
            Op::Vmlaunch => Some(20),
            Op::Vmptrld(_) => Some(21),
            Op::Vmptrst => Some(22),
            Op::Vmread(_) | Op::VmreadTo(..) => when(!self.may_shadow(), 23),
            Op::Vmresume => Some(24),
            Op::Vmwrite(..) | Op::VmwriteFrom(..) => when(!self.may_shadow(), 25),
            Op::Vmxoff => Some(26),
            Op::Vmxon(_) => Some(27),
            Op::MovDr => when(self.primary(23), 29),
            Op::In(port) | Op::Out(port, _) => when(self.io_exits(port), 30),
            Op::Rdmsr(index) => when(self.msr_exits(index, 0), 31),
            Op::Wrmsr(index, _) => when(self.msr_exits(index, 2048), 32),
            Op::Mwait => when(self.primary(10), 36),
            Op::Monitor => when(self.primary(29), 39),
            Op::Pause => when(self.primary(30), 40),
            Op::Invept(..) => Some(50),
            Op::Invvpid(..) => Some(53),
            Op::Wbinvd => when(self.secondary(6), 54),
            Op::Xsetbv(..) => Some(55),
            Op::Getsec => Some(11),
            Op::MovToCr0(value) => return self.cr_exit(0, value, CR0_GUEST_HOST_MASK, CR0_READ_SHADOW),
            Op::MovToCr4(value) => return self.cr_exit(4, value, CR4_GUEST_HOST_MASK, CR4_READ_SHADOW),
            Op::MovToCr3(value) => {
                return (self.primary(15) && !self.is_target(value)).then(|| Exit::by(28, 3).because(3));
            }
            Op::MovFromCr3 => return self.primary(16).then(|| Exit::by(28, 3).because(3 | 1 << 4)),
            Op::Clts => {
                let owned = bit(self.get(CR0_GUEST_HOST_MASK), 3) && bit(self.get(CR0_READ_SHADOW), 3);
                return owned.then(|| Exit::by(28, 3).because(2 << 4));
            }
            Op::Lmsw(value) => {
                let (mask, shadow) = (self.get(CR0_GUEST_HOST_MASK), self.get(CR0_READ_SHADOW));
                let sets = mask & 1 != 0 && value & 1 != 0 && shadow & 1 == 0;
                let changes = mask & 0xE & (u64::from(value) ^ shadow) != 0;
                return (sets || changes).then(|| Exit::by(28, 3).because(3 << 4 | u64::from(value) << 16));
            }
            Op::Vmfunc(..) | Op::Read(_) | Op::Write(..) | Op::Raise(..) => None,
        };
        let mut exit = Self::told_of_operands(op, Exit::by(reason?, Self::length(op)));
        match op {
            Op::Invlpg(at) => exit.qualification = at,
            Op::In(port) => exit.qualification = 1 << 3 | u64::from(port) << 16,
            Op::Out(port, _) => exit.qualification = u64::from(port) << 16,
            _ => {}
        }
        Some(exit)
    }

    /// What an exit of a VMX instruction says of its operands.
    fn told_of_operands(op: Op, exit: Exit) -> Exit {
        let (info, qualification) = match op {
            Op::Vmclear(_) | Op::Vmptrld(_) | Op::Vmptrst | Op::Vmxon(_) | Op::Invept(..) | Op::Invvpid(..) => {
                (memory_operand(0), OPERAND)
            }
            // The value in RAX, the encoding in RCX.
            Op::Vmread(_) | Op::Vmwrite(..) => (1 << 10 | 1 << 28 | 2 << 7, 0),
            Op::VmreadTo(_, at) | Op::VmwriteFrom(_, at) => (memory_operand(1), at),
            _ => return exit,
        };
        Exit { info, qualification, ..exit }
    }

    fn is_unprivileged(&self) -> bool {
        self.state.get(GUEST_SS_AR_BYTES) >> 5 & 3 != 0
    }

    /// VMREAD and VMWRITE of this guest may reach a shadow VMCS without an exit.
    fn may_shadow(&self) -> bool {
        let encoding = self.gprs[1];
        encoding >> 15 == 0 && self.secondary(14)
    }

    fn cr_exit(&self, number: u64, value: u64, mask: nvmx::vmx::Field, shadow: nvmx::vmx::Field) -> Option<Exit> {
        let owned = self.get(mask);
        ((value ^ self.get(shadow)) & owned != 0).then(|| Exit::by(28, 3).because(number))
    }

    fn is_target(&self, value: u64) -> bool {
        let targets = [CR3_TARGET_VALUE0, CR3_TARGET_VALUE1, CR3_TARGET_VALUE2, CR3_TARGET_VALUE3];
        let count = self.get(CR3_TARGET_COUNT) as usize;
        targets[..count.min(4)].iter().any(|field| self.get(*field) == value)
    }

    fn io_exits(&self, port: u16) -> bool {
        if self.primary(25) {
            let page = if port < 0x8000 { self.get(IO_BITMAP_A) } else { self.get(IO_BITMAP_B) };
            let port = u64::from(port & 0x7FFF);
            return bit(self.memory.read_u64(Hpa::new(page + port / 64 * 8)), port as u32 % 64);
        }
        self.primary(24)
    }

    /// `half`: 0 for reads, 2048 for writes.
    fn msr_exits(&self, index: u32, half: u64) -> bool {
        if !self.primary(28) {
            return true;
        }
        let (quarter, number) = match index {
            0..=0x1FFF => (0, index),
            0xC000_0000..=0xC000_1FFF => (1024, index & 0x1FFF),
            _ => return true,
        };
        let at = self.get(MSR_BITMAP) + half + quarter + u64::from(number / 64) * 8;
        bit(self.memory.read_u64(Hpa::new(at)), number % 64)
    }

    /// Behind an instruction that ran.
    fn complete(&mut self, op: Op) -> Step {
        let rip = self.state.get(GUEST_RIP) + Self::length(op);
        let blocking = self.state.get(GUEST_INTERRUPTIBILITY_INFO) & !3;
        let flags = self.state.get(GUEST_RFLAGS) & !(1 << 16);
        self.state.set(GUEST_RIP, rip).set(GUEST_INTERRUPTIBILITY_INFO, blocking).set(GUEST_RFLAGS, flags);
        if self.in_guest && self.primary(27) { Step::Exit(Exit::new(37)) } else { Step::Done }
    }

    /// Reports the result of a VMX instruction that ran.
    fn report(&mut self, op: Op, done: Done) -> Step {
        let flag = match done {
            Ok(()) => 0,
            Err(Fail::Invalid) => 1,
            Err(Fail::Valid(_)) => 1 << 6,
        };
        let flags = self.state.get(GUEST_RFLAGS) & !FLAGS | flag;
        self.state.set(GUEST_RFLAGS, flags);
        self.complete(op)
    }

    /// What the instruction does where nothing exits; a fault otherwise.
    fn perform(&mut self, op: Op) -> Result<Step, (u8, Option<u32>)> {
        let gp = (GP, Some(0));
        match op {
            Op::Rdmsr(index) => {
                let value = self.msr(index).ok_or(gp)?;
                (self.gprs[0], self.gprs[2]) = (value & 0xFFFF_FFFF, value >> 32);
            }
            Op::Wrmsr(index, value) if !self.set_msr(index, value) => return Err(gp),
            Op::MovToCr0(value) => self.set_cr(GUEST_CR0, value, CR0_GUEST_HOST_MASK),
            Op::MovToCr4(value) => self.set_cr(GUEST_CR4, value, CR4_GUEST_HOST_MASK),
            Op::MovToCr3(value) => _ = self.state.set(GUEST_CR3, value),
            Op::MovFromCr3 => self.gprs[0] = self.state.get(GUEST_CR3),
            Op::Clts => {
                let value = self.state.get(GUEST_CR0) & !8;
                self.set_cr(GUEST_CR0, value, CR0_GUEST_HOST_MASK);
            }
            Op::Lmsw(value) => {
                let old = self.state.get(GUEST_CR0);
                self.set_cr(GUEST_CR0, old & !0xE | u64::from(value & 0xF), CR0_GUEST_HOST_MASK);
            }
            Op::Hlt => _ = self.state.set(GUEST_ACTIVITY_STATE, 0),
            Op::In(port) => self.gprs[0] = u64::from(port & 0xFF),
            Op::Rdtsc | Op::Rdpmc => (self.gprs[0], self.gprs[2]) = (0x1234, 0),
            Op::Cpuid => (self.gprs[0], self.gprs[3], self.gprs[1], self.gprs[2]) = (1, 2, 3, 4),
            Op::Xsetbv(index, value) => {
                if index != 0 || value & 1 == 0 || value & !7 != 0 || value & 6 == 4 {
                    return Err(gp);
                }
                self.xcr0 = value;
            }
            Op::Read(at) => match self.physical(at, READ) {
                Ok(at) => self.gprs[0] = self.memory.read_u64(Hpa::new(at)),
                Err(exit) => return Ok(Step::Exit(exit)),
            },
            Op::Write(at, value) => match self.physical(at, WRITE) {
                Ok(at) => self.memory.write_u64(Place::anywhere(Hpa::new(at)), value),
                Err(exit) => return Ok(Step::Exit(exit)),
            },
            Op::Raise(vector, error) => {
                let address = (vector == 14).then_some(0xABC0);
                return Ok(self.raise(vector, error, address));
            }
            Op::Vmfunc(function, index) => return self.vmfunc(op, function, index),
            Op::Vmread(_) | Op::VmreadTo(..) | Op::Vmwrite(..) | Op::VmwriteFrom(..) if self.in_guest => {
                return self.shadowed(op);
            }
            Op::Getsec => return Err((UD, None)),
            Op::Vmxon(_)
            | Op::Vmxoff
            | Op::Vmclear(_)
            | Op::Vmptrld(_)
            | Op::Vmptrst
            | Op::Vmread(_)
            | Op::VmreadTo(..)
            | Op::Vmwrite(..)
            | Op::VmwriteFrom(..)
            | Op::Vmlaunch
            | Op::Vmresume
            | Op::Vmcall
            | Op::Invept(..)
            | Op::Invvpid(..) => return self.vmx(op),
            _ => {}
        }
        Ok(self.complete(op))
    }

    // ---- Operands of VMREAD and VMWRITE: 64 bits in 64-bit mode, else 32 ----

    pub(crate) fn is_long(&self) -> bool {
        bit(self.state.get(GUEST_IA32_EFER), 10)
    }

    /// VMREAD or VMWRITE of a guest: by VMCS shadowing, or an exit.
    fn shadowed(&mut self, op: Op) -> Result<Step, (u8, Option<u32>)> {
        let (reason, bitmap) = match op {
            Op::Vmread(_) | Op::VmreadTo(..) => (23, VMREAD_BITMAP),
            _ => (25, VMWRITE_BITMAP),
        };
        let encoding = self.gprs[1];
        let link = match self.shadow_vmcs(encoding, bitmap) {
            None => return Ok(Step::Exit(Self::told_of_operands(op, Exit::by(reason, Self::length(op))))),
            Some(_) if self.is_unprivileged() => return Err((GP, Some(0))),
            Some(Err(fail)) => return Ok(self.report(op, Err(fail))),
            Some(Ok(link)) => link,
        };
        if reason == 23 {
            let read = self.read_shadow(link, encoding);
            return Ok(self.was_read(op, read));
        }
        Ok(match self.source(op) {
            Err(step) => step,
            Ok(value) => {
                let done = self.write_shadow(link, encoding, value);
                self.report(op, done)
            }
        })
    }

    /// VMREAD ends: with its destination, if it has a value.
    fn was_read(&mut self, op: Op, read: Result<u64, Fail>) -> Step {
        if let Ok(value) = read {
            let bytes = if self.is_long() { 8 } else { 4 };
            match op {
                Op::VmreadTo(_, at) => match self.places(at, bytes, WRITE) {
                    Err(step) => return step,
                    Ok(places) => {
                        let value = value.to_le_bytes();
                        for (n, place) in places.into_iter().enumerate() {
                            self.memory.write_bytes(Place::anywhere(Hpa::new(place)), &value[n..=n]);
                        }
                    }
                },
                _ if bytes == 8 => self.gprs[0] = value,
                _ => self.gprs[0] = value & 0xFFFF_FFFF,
            }
        }
        self.report(op, read.map(drop))
    }

    /// The value that VMWRITE writes. A memory operand is loaded before the encoding is judged.
    fn source(&mut self, op: Op) -> Result<u64, Step> {
        let bytes = if self.is_long() { 8 } else { 4 };
        let Op::VmwriteFrom(_, at) = op else {
            return Ok(if bytes == 8 { self.gprs[0] } else { self.gprs[0] & 0xFFFF_FFFF });
        };
        let mut value = [0; 8];
        for (n, place) in self.places(at, bytes, READ)?.into_iter().enumerate() {
            self.memory.read_bytes(Hpa::new(place), &mut value[n..=n]);
        }
        Ok(u64::from_le_bytes(value))
    }

    /// Where the bytes of an operand lie. The SDM leaves open which of two pages is found wanting first; here the page tables are
    /// asked for both, then EPT. Nothing is accessed before.
    fn places(&mut self, at: u64, bytes: u64, access: u64) -> Result<Vec<u64>, Step> {
        let (base, refused) = if self.is_long() {
            (0, !is_canonical(at) || !is_canonical(at.wrapping_add(bytes - 1)))
        } else {
            // A data segment that grows upwards.
            let rights = self.state.get(GUEST_DS_AR_BYTES);
            let beyond = (at & 0xFFFF_FFFF) + bytes - 1 > self.state.get(GUEST_DS_LIMIT);
            let read_only = access == WRITE && !bit(rights, 1);
            (self.state.get(GUEST_DS_BASE), bit(rights, 16) || beyond || read_only)
        };
        if refused {
            return Err(self.raise(GP, Some(0), None));
        }
        let width = if self.is_long() { u64::MAX } else { 0xFFFF_FFFF };
        let linear: Vec<u64> = (0..bytes).map(|n| at.wrapping_add(base + n) & width).collect();
        let pages: Vec<usize> = (0..linear.len()).filter(|n| *n == 0 || linear[*n] & 0xFFF == 0).collect();
        let mut found = vec![];
        for n in &pages {
            found.push(self.translated(linear[*n], access).map_err(|why| match why {
                Unreached::PageFault(error) => self.raise(PF, Some(error), Some(linear[*n])),
                Unreached::Exit(exit) => Step::Exit(exit),
            })?);
        }
        for (n, at) in pages.iter().zip(&mut found) {
            *at = self.physical(*at, access).map_err(|exit| Step::Exit(Exit { linear: linear[*n], ..exit }))?;
        }
        let page_of = |n: usize| pages.iter().zip(&found).rfind(|(first, _)| **first <= n).expect("the first byte's");
        Ok((0..linear.len()).map(|n| page_of(n).1 + (n - page_of(n).0) as u64).collect())
    }

    fn set_cr(&mut self, register: nvmx::vmx::Field, value: u64, mask: nvmx::vmx::Field) {
        let owned = if self.in_guest { self.get(mask) } else { 0 };
        let value = value & !owned | self.state.get(register) & owned;
        self.state.set(register, value);
    }

    fn vmfunc(&mut self, op: Op, function: u32, index: u32) -> Result<Step, (u8, Option<u32>)> {
        if !self.in_guest || !self.secondary(13) || function > 63 {
            return Err((UD, None));
        }
        let exit = Step::Exit(Exit::by(59, Self::length(op)));
        if !bit(self.get(VM_FUNCTION_CONTROLS), function) || index >= 512 {
            return Ok(exit);
        }
        let eptp = self.memory.read_u64(Hpa::new(self.get(EPTP_LIST_ADDRESS) + 8 * u64::from(index)));
        if self.invept(1, eptp).is_err() {
            return Ok(exit);
        }
        self.put(EPT_POINTER, eptp);
        if self.has(EPTP_INDEX) {
            self.put(EPTP_INDEX, index.into());
        }
        Ok(self.complete(op))
    }

    /// A VMX instruction in VMX root operation, or outside VMX operation.
    fn vmx(&mut self, op: Op) -> Result<Step, (u8, Option<u32>)> {
        assert!(matches!(self.root, Root::Bare), "a guest under nvmx is never in VMX root operation");
        let privileged = !self.is_unprivileged();
        let gp = (GP, Some(0));
        if let Op::Vmxon(_) = op {
            let (cr0, cr4) = (self.state.get(GUEST_CR0), self.state.get(GUEST_CR4));
            if !bit(cr4, 13) {
                return Err((UD, None));
            }
            let fixed = |value: u64, zero: u64, one: u64| value & zero == zero && value & !one == 0;
            let allowed = self.msrs.get(&0x3A).is_some_and(|msr| msr & 5 == 5);
            if !privileged
                || self.vmxon.is_none()
                    && !(fixed(cr0, self.caps.cr0_fixed0, self.caps.cr0_fixed1)
                        && fixed(cr4, self.caps.cr4_fixed0, self.caps.cr4_fixed1)
                        && allowed)
            {
                return Err(gp);
            }
        } else if self.vmxon.is_none() {
            return Err((UD, None));
        } else if !privileged {
            return Err(gp);
        }
        let operand = self.memory.read_u64(Hpa::new(OPERAND));
        let further = self.memory.read_u64(Hpa::new(OPERAND + 8));
        let kind = self.gprs[0];
        let done = match op {
            Op::Vmxon(_) => self.vmxon(operand),
            Op::Vmxoff => self.vmxoff(),
            Op::Vmclear(_) => self.vmclear(operand),
            Op::Vmptrld(_) => self.vmptrld(operand),
            Op::Vmptrst => {
                self.memory.write_u64(Place::anywhere(Hpa::new(OPERAND)), self.current.unwrap_or(u64::MAX));
                Ok(())
            }
            Op::Vmread(encoding) | Op::VmreadTo(encoding, _) => {
                let read = self.vmread(encoding);
                return Ok(self.was_read(op, read));
            }
            Op::Vmwrite(encoding, _) | Op::VmwriteFrom(encoding, _) if self.current.is_some() => {
                match self.source(op) {
                    Err(step) => return Ok(step),
                    Ok(value) => self.vmwrite(encoding, value),
                }
            }
            Op::Vmwrite(..) | Op::VmwriteFrom(..) => Err(Fail::Invalid),
            Op::Vmcall => self.fail(1),
            Op::Invept(..) => self.invept(kind, operand),
            Op::Invvpid(..) => self.invvpid(kind, operand, further),
            _ => match self.vmentry(op == Op::Vmlaunch) {
                Ok(Entry::Late) => return Ok(Step::Done),
                Ok(Entry::Guest(exit)) => {
                    if let Some(exit) = exit {
                        self.vmexit(exit);
                    }
                    return Ok(Step::Done);
                }
                Err(fail) => Err(fail),
            },
        };
        Ok(self.report(op, done))
    }
}
