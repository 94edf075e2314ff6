//! A processor with VMX: registers, MSRs, VMCSs, entries and exits. The same code is the machine under nvmx and the bare machine
//! of a guest.
//!
//! Source: Intel SDM vol. 3C (December 2024), chapters "Virtual-Machine Control Structures", "VM Entries", "VM Exits", "VMX
//! Instruction Reference". Bits are numbers here, so that a wrong name in nvmx does not make both sides wrong.

use crate::second::core_support::Vmcs;
use crate::second::guest::Place;
use crate::second::{controls, guest as guest_rules, host};
use nvmx::addr::{Gpa, Hpa};
use nvmx::hw::phys::DirectMap;
use nvmx::mm::{self, PhysMem};
use nvmx::rules::checks::{CheckId, ReadsGuest};
use nvmx::vmx::field::{Area, PDPTES};
use nvmx::vmx::{Capabilities, Field, Field::*, Fields};
use std::collections::{BTreeMap, BTreeSet};

pub const EFER: u32 = 0xC000_0080;
pub const PAT: u32 = 0x277;
pub const MCG_STATUS: u32 = 0x17A;
pub const PERF_GLOBAL_CTRL: u32 = 0x38F;
pub const SHADOW: u32 = 1 << 31;

/// Where the processor keeps a VMCS that is not current.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Storage {
    /// Nowhere that software could find it.
    OnChip,
    /// In its region, at places of its own: a hypervisor below.
    InMemory,
}

/// Whose code runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum Level {
    L2,
    L3,
}

/// Who runs in VMX root operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Root {
    /// The program itself is the hypervisor.
    Bare,
    /// nvmx, with this vmcs01 once it is known.
    Nvmx { vmcs01: Option<u64> },
}

/// A VMX instruction failed: without a current VMCS, or with this number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fail {
    Invalid,
    Valid(u32),
}

pub type Done = Result<(), Fail>;

/// What an exit reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Exit {
    pub reason: u32,
    pub qualification: u64,
    pub length: u64,
    pub info: u32,
    pub intr: u32,
    pub error: u32,
    pub vectoring: u32,
    pub vectoring_error: u32,
    pub linear: u64,
    pub physical: u64,
}

impl Exit {
    pub fn new(reason: u32) -> Self {
        Exit { reason, ..Exit::default() }
    }

    /// By an instruction of this length.
    pub fn by(reason: u32, length: u64) -> Self {
        Exit { reason, length, ..Exit::default() }
    }

    pub fn because(self, qualification: u64) -> Self {
        Exit { qualification, ..self }
    }

    pub fn is_nmi(&self) -> bool {
        self.reason == 0 && self.intr & 0x8000_0700 == 0x8000_0200
    }
}

/// An event that the processor delivered to a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub struct Delivered {
    /// Bits 11:0 of the interruption information: vector, type, error code valid.
    pub info: u32,
    pub error: Option<u32>,
    /// Of the instruction, for software events.
    pub length: Option<u32>,
}

/// What came of VMLAUNCH or VMRESUME.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// The guest is about to run; it may exit before its first instruction.
    Guest(Option<Exit>),
    /// It failed after the state of the host was loaded again.
    Late,
}

#[derive(Clone)]
struct Region {
    fields: Vmcs,
    launched: bool,
    /// The first word of the region, while the VMCS is active.
    active: Option<u32>,
}

/// How often nvmx executed what.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    pub vmread: u64,
    pub vmwrite: u64,
    pub vmptrld: u64,
    pub vmclear: u64,
    pub entries: u64,
    pub invept: u64,
    pub invvpid: u64,
}

/// The processor.
pub struct Core {
    pub caps: Capabilities,
    pub revision: u32,
    pub storage: Storage,
    pub root: Root,
    pub memory: DirectMap,
    /// Registers that have a field in the guest-state area, by that field.
    pub state: Vmcs,
    pub gprs: [u64; 16],
    pub cr2: u64,
    pub dr: [u64; 4],
    pub dr6: u64,
    pub pkru: u64,
    pub xcr0: u64,
    /// MSRs without such a field.
    pub msrs: BTreeMap<u32, u64>,
    pub tsc: u64,
    pub vmxon: Option<u64>,
    pub current: Option<u64>,
    pub in_guest: bool,
    /// The next entry fails by a machine check.
    pub machine_check_at_entry: bool,
    /// What a machine check leaves in IA32_MCG_STATUS: of a witness.
    pub next_status: u64,
    regions: BTreeMap<u64, Region>,
    /// Delivered since somebody looked.
    pub delivered: Vec<Delivered>,
    pub counts: Counts,
    /// The fields that nvmx reached by VMREAD or VMWRITE.
    pub reached: BTreeSet<Field>,
    /// The numbers of the ports that were written, and the values.
    pub ports: Vec<(u16, u8)>,
    /// Registers of the local APIC, by offset.
    pub apic: BTreeMap<u32, u32>,
}

fn bit(value: u64, number: u32) -> bool {
    value >> number & 1 == 1
}

/// With 48 bits of linear addresses.
pub fn is_canonical(linear: u64) -> bool {
    (linear as i64) << 16 >> 16 == linear as i64
}

/// Fields of the guest-state area that are registers.
pub fn registers() -> impl Iterator<Item = Field> {
    let others =
        [VMCS_LINK_POINTER, VMX_PREEMPTION_TIMER_VALUE, PML_INDEX, GUEST_INTERRUPT_STATUS, GUEST_IA32_PERF_GLOBAL_CTRL];
    let others = [&others[..], &[GUEST_IA32_BNDCFGS, GUEST_IA32_RTIT_CTL, GUEST_IA32_PKRS], &PDPTES[..]].concat();
    Field::ALL.iter().copied().filter(move |field| field.area() == Area::Guest && !others.contains(field))
}

/// Physical memory for the rules.
pub struct Physical<'a>(pub &'a DirectMap);

impl ReadsGuest for Physical<'_> {
    fn read_u32(&self, address: Gpa) -> Option<u32> {
        Some(self.0.read_u32(Hpa::new(address.get())))
    }

    fn read_u64(&self, address: Gpa) -> Option<u64> {
        Some(self.0.read_u64(Hpa::new(address.get())))
    }
}

impl Core {
    /// A processor after reset as far as it matters here: 64-bit mode, paging on.
    pub fn new(caps: Capabilities, revision: u32, root: Root, storage: Storage, memory: DirectMap) -> Self {
        let mut state = Vmcs::default();
        for (field, value) in [
            (GUEST_CR0, 0x8001_0031),
            (GUEST_CR3, 0x1000),
            (GUEST_CR4, 0x20),
            (GUEST_DR7, 0x400),
            (GUEST_RFLAGS, 2),
            (GUEST_IA32_EFER, 0xD00),
            (GUEST_IA32_PAT, 0x0007_0406_0007_0406),
        ] {
            state.set(field, value);
        }
        let msrs = [
            (0x1B, 0xFEE0_0900),
            (0x3A, 5),
            (MCG_STATUS, 0),
            (0x1A0, 1),
            (0xC000_0081, 0),
            (0xC000_0082, 0),
            (0xC000_0102, 0),
            (0xC000_0103, 0),
            (0x6E0, 0),
            (0xDA0, 0),
            (0x345, 0x2000),
        ];
        // A processor without counters has no such MSR.
        let counts = (caps.counters != 0).then_some((PERF_GLOBAL_CTRL, 0));
        Core {
            caps,
            revision,
            storage,
            root,
            memory,
            state,
            gprs: [0; 16],
            cr2: 0,
            dr: [0; 4],
            dr6: 0xFFFF_0FF0,
            pkru: 0,
            xcr0: 1,
            msrs: msrs.into_iter().chain(counts).collect(),
            tsc: 1 << 40,
            vmxon: None,
            current: None,
            in_guest: false,
            machine_check_at_entry: false,
            next_status: 5,
            regions: BTreeMap::new(),
            delivered: vec![],
            counts: Counts::default(),
            reached: BTreeSet::new(),
            ports: vec![],
            apic: BTreeMap::new(),
        }
    }

    /// Whose code runs, or ran last.
    pub fn level(&self) -> Level {
        let l3 = match self.root {
            Root::Bare => self.in_guest,
            Root::Nvmx { vmcs01 } => self.in_guest && self.current != vmcs01,
        };
        if l3 { Level::L3 } else { Level::L2 }
    }

    fn word(&self, at: u64) -> u64 {
        self.memory.read_u64(Hpa::new(at))
    }

    fn is_region_address(&self, at: u64) -> bool {
        at & 0xFFF == 0 && at >> self.caps.physical_width == 0
    }

    /// Does this processor have the field?
    pub fn has(&self, field: Field) -> bool {
        self.caps.has_field(field)
    }

    // ---- VMCSs ----

    fn place(region: u64, field: Field) -> Hpa {
        // Not the order of the table, and not aligned for all.
        let index = (field.index() * 5 + 7) % 256;
        Hpa::new(region + 64 + 14 * index as u64)
    }

    fn keep_in_memory(&mut self, at: u64) {
        if self.storage == Storage::InMemory {
            if let Some(region) = self.regions.get(&at) {
                for field in Field::ALL {
                    let value = region.fields.get(*field).to_le_bytes();
                    let bytes = (64 - field.mask().leading_zeros() as usize).div_ceil(8);
                    self.memory.write_bytes(mm::Place::anywhere(Self::place(at, *field)), &value[..bytes]);
                }
            }
        }
    }

    fn take_from_memory(&mut self, at: u64) {
        if self.storage == Storage::InMemory {
            for field in Field::ALL {
                let mut value = [0; 8];
                let bytes = (64 - field.mask().leading_zeros() as usize).div_ceil(8);
                self.memory.read_bytes(Self::place(at, *field), &mut value[..bytes]);
                self.region(at).fields.set(*field, u64::from_le_bytes(value) & field.mask());
            }
        }
    }

    fn region(&mut self, at: u64) -> &mut Region {
        self.regions.entry(at).or_insert_with(|| Region { fields: Vmcs::default(), launched: false, active: None })
    }

    fn is_shadow(&self, at: u64) -> bool {
        self.word(at) as u32 & SHADOW != 0
    }

    /// The VMCS at `at` becomes active: what stands in its first word must not change until it is cleared.
    fn activate(&mut self, at: u64) {
        let word = self.word(at) as u32;
        let on_chip = self.storage == Storage::OnChip;
        let region = self.region(at);
        let before = *region.active.get_or_insert(word);
        assert!(
            before == word || !on_chip,
            "the first word of the active VMCS at {at:#x} was {before:#x}, is {word:#x}"
        );
        region.active = Some(word);
    }

    pub fn vmxon(&mut self, at: u64) -> Done {
        if self.vmxon.is_some() {
            return self.fail(15);
        }
        if !self.is_region_address(at) || self.word(at) as u32 != self.revision {
            return Err(Fail::Invalid);
        }
        self.vmxon = Some(at);
        self.current = None;
        Ok(())
    }

    pub fn vmxoff(&mut self) -> Done {
        self.vmxon = None;
        self.current = None;
        Ok(())
    }

    /// VMfail with a number: in the current VMCS, if there is one.
    pub fn fail(&mut self, number: u32) -> Done {
        match self.current {
            Some(at) => {
                self.region(at).fields.set(VM_INSTRUCTION_ERROR, number.into());
                Err(Fail::Valid(number))
            }
            None => Err(Fail::Invalid),
        }
    }

    pub fn vmptrld(&mut self, at: u64) -> Done {
        if !self.is_region_address(at) {
            return self.fail(9);
        }
        if self.vmxon == Some(at) {
            return self.fail(10);
        }
        let word = self.word(at) as u32;
        let shadow = word & SHADOW != 0;
        if word & !SHADOW != self.revision || shadow && !self.may_secondary(14) {
            return self.fail(11);
        }
        if self.current != Some(at) {
            if let Some(before) = self.current {
                self.keep_in_memory(before);
            }
            self.take_from_memory(at);
        }
        self.activate(at);
        self.current = Some(at);
        Ok(())
    }

    fn may_secondary(&self, number: u32) -> bool {
        self.caps.msr(0x48B).is_some_and(|msr| bit(msr, 32 + number))
    }

    pub fn vmclear(&mut self, at: u64) -> Done {
        if !self.is_region_address(at) {
            return self.fail(2);
        }
        if self.vmxon == Some(at) {
            return self.fail(3);
        }
        // A shadow VMCS of a hypervisor below is in memory all the time.
        if self.current == Some(at) || self.storage == Storage::OnChip {
            self.keep_in_memory(at);
        }
        let region = self.region(at);
        (region.active, region.launched) = (None, false);
        if self.current == Some(at) {
            self.current = None;
        }
        Ok(())
    }

    /// The current VMCS.
    pub fn get(&self, field: Field) -> u64 {
        self.current.and_then(|at| self.regions.get(&at)).map_or(0, |region| region.fields.get(field))
    }

    pub fn put(&mut self, field: Field, value: u64) {
        if let Some(at) = self.current {
            self.region(at).fields.set(field, value & field.mask());
        }
    }

    /// Any VMCS, for a test that looks behind the scenes.
    pub fn peek(&self, at: u64, field: Field) -> Option<u64> {
        self.regions.get(&at).map(|region| region.fields.get(field))
    }

    /// The value of an encoding in the VMCS at `at`.
    fn read_encoding(&mut self, at: u64, encoding: u64) -> Result<u64, Fail> {
        let Some((field, high)) = self.decode(encoding) else { return Err(self.fail(12).unwrap_err()) };
        let value = self.region(at).fields.get(field);
        Ok(if high { value >> 32 } else { value })
    }

    fn write_encoding(&mut self, at: u64, encoding: u64, value: u64) -> Done {
        let Some((field, high)) = self.decode(encoding) else { return self.fail(12) };
        if field.area() == Area::ExitInfo && !bit(self.caps.misc.0, 29) {
            return self.fail(13);
        }
        let old = self.region(at).fields.get(field);
        let value = if high { old & 0xFFFF_FFFF | value << 32 } else { value };
        self.region(at).fields.set(field, value & field.mask());
        Ok(())
    }

    fn decode(&self, encoding: u64) -> Option<(Field, bool)> {
        let encoding = u32::try_from(encoding).ok()?;
        let field = *Field::ALL.iter().find(|field| field.encoding() == encoding & !1)?;
        let high = encoding & 1 == 1;
        (self.has(field) && (!high || encoding >> 13 & 3 == 1)).then_some((field, high))
    }

    pub fn vmread(&mut self, encoding: u64) -> Result<u64, Fail> {
        let Some(at) = self.current else { return Err(Fail::Invalid) };
        self.read_encoding(at, encoding)
    }

    pub fn vmwrite(&mut self, encoding: u64, value: u64) -> Done {
        let Some(at) = self.current else { return Err(Fail::Invalid) };
        self.write_encoding(at, encoding, value)
    }

    /// The shadow VMCS that a guest's VMREAD or VMWRITE reaches by VMCS shadowing; `None` if the controls or the bitmap make it exit.
    pub fn shadow_vmcs(&self, encoding: u64, bitmap: Field) -> Option<Result<u64, Fail>> {
        let passes = self.secondary(14)
            && encoding >> 15 == 0
            && !bit(self.word(self.get(bitmap) + (encoding & 0x7FFF) / 64 * 8), encoding as u32 & 63);
        passes.then(|| match self.get(VMCS_LINK_POINTER) {
            u64::MAX => Err(Fail::Invalid),
            link => Ok(link),
        })
    }

    pub fn read_shadow(&mut self, link: u64, encoding: u64) -> Result<u64, Fail> {
        self.in_shadow(link, |core| core.read_encoding(link, encoding))
    }

    pub fn write_shadow(&mut self, link: u64, encoding: u64, value: u64) -> Done {
        self.in_shadow(link, |core| core.write_encoding(link, encoding, value))
    }

    fn in_shadow<T>(&mut self, link: u64, access: impl FnOnce(&mut Self) -> T) -> T {
        self.activate(link);
        self.take_from_memory(link);
        let current = self.current;
        let result = access(self);
        self.current = current;
        self.keep_in_memory(link);
        result
    }

    pub fn invept(&mut self, kind: u64, eptp: u64) -> Done {
        let cap = self.caps.ept_vpid.0;
        let good = match kind {
            1 => bit(cap, 25) && !self.eptp_is_bad(eptp),
            2 => bit(cap, 26),
            _ => false,
        };
        if good { Ok(()) } else { self.fail(28) }
    }

    fn eptp_is_bad(&self, eptp: u64) -> bool {
        let mut probe = Vmcs::default();
        for field in [PIN_BASED_VM_EXEC_CONTROL, CPU_BASED_VM_EXEC_CONTROL, SECONDARY_VM_EXEC_CONTROL] {
            probe.set(field, 0);
        }
        probe.set(CPU_BASED_VM_EXEC_CONTROL, 1 << 31).set(SECONDARY_VM_EXEC_CONTROL, 2).set(EPT_POINTER, eptp);
        controls::violations(&probe, &self.caps).iter().any(|name| name.starts_with("Eptp"))
    }

    pub fn invvpid(&mut self, kind: u64, vpid: u64, linear: u64) -> Done {
        let cap = self.caps.ept_vpid.0;
        let good = kind < 4
            && bit(cap, 40 + kind as u32)
            && bit(cap, 32)
            && vpid >> 16 == 0
            && (kind == 2 || vpid != 0)
            && (kind != 0 || is_canonical(linear));
        if good { Ok(()) } else { self.fail(28) }
    }

    // ---- Controls of the current VMCS ----

    pub fn pin(&self, number: u32) -> bool {
        bit(self.get(PIN_BASED_VM_EXEC_CONTROL), number)
    }

    pub fn primary(&self, number: u32) -> bool {
        bit(self.get(CPU_BASED_VM_EXEC_CONTROL), number)
    }

    pub fn secondary(&self, number: u32) -> bool {
        self.primary(31) && bit(self.get(SECONDARY_VM_EXEC_CONTROL), number)
    }

    fn exit_control(&self, number: u32) -> bool {
        bit(self.get(VM_EXIT_CONTROLS), number)
    }

    fn entry_control(&self, number: u32) -> bool {
        bit(self.get(VM_ENTRY_CONTROLS), number)
    }

    // ---- VM entry ----

    /// VMLAUNCH or VMRESUME.
    pub fn vmentry(&mut self, launch: bool) -> Result<Entry, Fail> {
        let Some(at) = self.current.filter(|at| !self.is_shadow(*at)) else { return Err(Fail::Invalid) };
        let number = |this: &mut Self, number| this.fail(number).unwrap_err();
        if bit(self.state.get(GUEST_INTERRUPTIBILITY_INFO), 1) {
            return Err(number(self, 26));
        }
        match (launch, self.region(at).launched) {
            (true, true) => return Err(number(self, 4)),
            (false, false) => return Err(number(self, 5)),
            _ => {}
        }
        let vmcs = self.region(at).fields.clone();
        if !controls::violations(&vmcs, &self.caps).is_empty() || self.threshold_is_high(&vmcs) {
            return Err(number(self, 7));
        }
        let long_mode = bit(self.state.get(GUEST_IA32_EFER), 10);
        if !host::violations(&vmcs, &self.caps, long_mode).is_empty() {
            return Err(number(self, 8));
        }
        let place = Place { current: Gpa::new(at), revision: self.revision };
        let broken = guest_rules::violations_at(&vmcs, &self.caps, &Physical(&self.memory), place);
        let first = CheckId::ALL.iter().map(|check| check.name()).find(|name| broken.contains(name));
        if let Some(name) = first {
            let qualification = match name {
                "GuestPdptes" => 2,
                "GuestBlockingNmiSti" => 3,
                name if name.starts_with("GuestLinkPointer") => 4,
                _ => 0,
            };
            self.fail_late(33, qualification);
            return Ok(Entry::Late);
        }
        if std::mem::take(&mut self.machine_check_at_entry) {
            self.machine_check();
            self.fail_late(41, 0);
            return Ok(Entry::Late);
        }
        self.load_guest(&vmcs);
        let (list, count) = (vmcs.get(VM_ENTRY_MSR_LOAD_ADDR), vmcs.get(VM_ENTRY_MSR_LOAD_COUNT));
        if let Err(entry) = self.load_msrs(list, count) {
            self.fail_late(34, entry);
            return Ok(Entry::Late);
        }
        let region = self.region(at);
        region.launched = true;
        self.in_guest = true;
        self.counts.entries += 1;
        if bit(self.get(SECONDARY_VM_EXEC_CONTROL), 14) && self.secondary(14) {
            let link = self.get(VMCS_LINK_POINTER);
            if link != u64::MAX {
                self.activate(link);
            }
        }
        Ok(Entry::Guest(self.deliver()))
    }

    /// The threshold of a TPR shadow, without accesses or interrupts that the processor virtualizes.
    fn threshold_is_high(&self, v: &Vmcs) -> bool {
        let primary = v.get(CPU_BASED_VM_EXEC_CONTROL);
        let secondary = if bit(primary, 31) { v.get(SECONDARY_VM_EXEC_CONTROL) } else { 0 };
        let vtpr = self.memory.read_u32(Hpa::new(v.get(VIRTUAL_APIC_ADDRESS) + 0x80)) >> 4 & 0xF;
        bit(primary, 21) && !bit(secondary, 0) && !bit(secondary, 9) && v.get(TPR_THRESHOLD) & 0xF > u64::from(vtpr)
    }

    fn load_guest(&mut self, v: &Vmcs) {
        let before = self.state.clone();
        for field in registers() {
            self.state.set(field, v.get(field));
        }
        if !self.entry_control(2) {
            self.state.set(GUEST_DR7, before.get(GUEST_DR7));
            self.state.set(GUEST_IA32_DEBUGCTL, before.get(GUEST_IA32_DEBUGCTL));
        }
        if !self.entry_control(14) {
            self.state.set(GUEST_IA32_PAT, before.get(GUEST_IA32_PAT));
        }
        if !self.entry_control(15) {
            let long = if self.entry_control(9) { 1 << 10 } else { 0 };
            let mut efer = before.get(GUEST_IA32_EFER) & !(1 << 10) | long;
            if bit(v.get(GUEST_CR0), 31) {
                efer = efer & !(1 << 8) | long >> 2;
            }
            self.state.set(GUEST_IA32_EFER, efer);
        }
        for field in [VMX_PREEMPTION_TIMER_VALUE, PML_INDEX].iter().chain(&PDPTES) {
            self.state.set(*field, v.get(*field));
        }
        if self.entry_control(13) {
            self.msrs.insert(PERF_GLOBAL_CTRL, v.get(GUEST_IA32_PERF_GLOBAL_CTRL));
        }
    }

    /// Delivers the event of the entry; the exit that comes before the first instruction, if one does.
    fn deliver(&mut self) -> Option<Exit> {
        let info = self.get(VM_ENTRY_INTR_INFO_FIELD) as u32;
        let (valid, kind) = (info >> 31 == 1, info >> 8 & 7);
        if valid && kind == 7 {
            return Some(Exit::new(37));
        }
        if valid {
            let error = (info & 1 << 11 != 0).then(|| self.get(VM_ENTRY_EXCEPTION_ERROR_CODE) as u32);
            let length = matches!(kind, 4..=6).then(|| self.get(VM_ENTRY_INSTRUCTION_LEN) as u32);
            self.deliver_event(Delivered { info: info & 0xFFF, error, length });
            if self.primary(27) {
                return Some(Exit::new(37));
            }
        }
        self.before_instruction()
    }

    /// An event reaches the guest: it runs its handler next.
    pub fn deliver_event(&mut self, event: Delivered) {
        let mut blocking = self.state.get(GUEST_INTERRUPTIBILITY_INFO) & !3;
        if event.info & 0x700 == 0x200 {
            blocking |= 8;
        }
        self.state.set(GUEST_INTERRUPTIBILITY_INFO, blocking);
        self.state.set(GUEST_ACTIVITY_STATE, 0);
        self.delivered.push(event);
    }

    /// Exits that are due before the next instruction.
    pub fn before_instruction(&self) -> Option<Exit> {
        let blocking = self.state.get(GUEST_INTERRUPTIBILITY_INFO);
        if self.pin(6) && self.state.get(VMX_PREEMPTION_TIMER_VALUE) == 0 {
            return Some(Exit::new(52));
        }
        if self.primary(22) && blocking & 0b1011 == 0 {
            return Some(Exit::new(8));
        }
        if self.primary(2) && blocking & 0b11 == 0 && bit(self.state.get(GUEST_RFLAGS), 9) {
            return Some(Exit::new(7));
        }
        None
    }

    /// An entry fails after its controls were found good.
    fn fail_late(&mut self, reason: u32, qualification: u64) {
        let blocking = self.state.get(GUEST_INTERRUPTIBILITY_INFO) & 8;
        self.put(VM_EXIT_REASON, u64::from(reason | 1 << 31));
        self.put(EXIT_QUALIFICATION, qualification);
        self.load_host(blocking);
        self.load_msrs_of_the_host();
    }

    /// A machine check (SDM vol. 3B, "IA32_MCG_STATUS MSR").
    pub fn machine_check(&mut self) {
        let status = self.msrs.entry(MCG_STATUS).or_default();
        assert_eq!(*status & 4, 0, "a machine check while one is in progress shuts the processor down");
        *status = self.next_status;
    }

    // ---- VM exit ----

    /// The guest exits: its state goes to the VMCS, the host's comes from there.
    pub fn vmexit(&mut self, exit: Exit) {
        assert!(self.in_guest, "an exit in VMX root operation");
        self.in_guest = false;
        if matches!(exit.reason, 48 | 49 | 62 | 66) && exit.vectoring == 0 {
            // The instruction starts again (SDM vol. 3C, "Saving RIP, RSP, RFLAGS, and SSP").
            self.state.set(GUEST_RFLAGS, self.state.get(GUEST_RFLAGS) | 1 << 16);
        }
        for field in registers() {
            let saved = match field {
                GUEST_DR7 | GUEST_IA32_DEBUGCTL => self.exit_control(2),
                GUEST_IA32_PAT => self.exit_control(18),
                GUEST_IA32_EFER => self.exit_control(20),
                _ => true,
            };
            if saved {
                self.put(field, self.state.get(field));
            }
        }
        if self.exit_control(22) {
            self.put(VMX_PREEMPTION_TIMER_VALUE, self.state.get(VMX_PREEMPTION_TIMER_VALUE));
        }
        self.put(PML_INDEX, self.state.get(PML_INDEX));
        if self.exit_control(30) {
            self.put(GUEST_IA32_PERF_GLOBAL_CTRL, self.msrs[&PERF_GLOBAL_CTRL]);
        }
        if self.secondary(7) {
            let long = bit(self.state.get(GUEST_IA32_EFER), 10);
            let controls = self.get(VM_ENTRY_CONTROLS) & !(1 << 9);
            self.put(VM_ENTRY_CONTROLS, controls | u64::from(long) << 9);
        }
        self.put(VM_ENTRY_INTR_INFO_FIELD, self.get(VM_ENTRY_INTR_INFO_FIELD) & !(1 << 31));
        for (field, value) in [
            (VM_EXIT_REASON, exit.reason.into()),
            (EXIT_QUALIFICATION, exit.qualification),
            (VM_EXIT_INSTRUCTION_LEN, exit.length),
            (VMX_INSTRUCTION_INFO, exit.info.into()),
            (VM_EXIT_INTR_INFO, exit.intr.into()),
            (VM_EXIT_INTR_ERROR_CODE, exit.error.into()),
            (IDT_VECTORING_INFO_FIELD, exit.vectoring.into()),
            (IDT_VECTORING_ERROR_CODE, exit.vectoring_error.into()),
            (GUEST_LINEAR_ADDRESS, exit.linear),
            (GUEST_PHYSICAL_ADDRESS, exit.physical),
        ] {
            self.put(field, value);
        }
        let (list, count) = (self.get(VM_EXIT_MSR_STORE_ADDR), self.get(VM_EXIT_MSR_STORE_COUNT));
        self.store_msrs(list, count);
        let blocked = match (self.pin(3), self.pin(5)) {
            _ if exit.is_nmi() => 8,
            (true, true) => 0,
            _ => self.state.get(GUEST_INTERRUPTIBILITY_INFO) & 8,
        };
        self.load_host(blocked);
        self.load_msrs_of_the_host();
    }

    /// The VM-exit MSR-load area, behind an exit and behind an entry that fails late (SDM vol. 3C, "VM-Entry Failures During or
    /// After Loading Guest State").
    fn load_msrs_of_the_host(&mut self) {
        let (list, count) = (self.get(VM_EXIT_MSR_LOAD_ADDR), self.get(VM_EXIT_MSR_LOAD_COUNT));
        assert!(self.load_msrs(list, count).is_ok(), "VMX abort: an MSR of the VM-exit area does not load");
    }

    /// The guest's state goes to the VMCS as if it had not run since; `launched` says that it had been entered by VMLAUNCH.
    pub fn stand_still(&mut self, launched: bool) {
        self.vmexit(Exit::default());
        if let (true, Some(at)) = (launched, self.current) {
            self.region(at).launched = false;
        }
    }

    fn load_host(&mut self, blocking: u64) {
        let long = self.exit_control(9);
        let v = |field| self.get(field);
        let cr4 = if long { v(HOST_CR4) | 0x20 } else { v(HOST_CR4) & !(1 << 17) };
        let mut state = self.state.clone();
        for (field, value) in [
            (GUEST_CR0, v(HOST_CR0)),
            (GUEST_CR3, v(HOST_CR3)),
            (GUEST_CR4, cr4),
            (GUEST_DR7, 0x400),
            (GUEST_IA32_DEBUGCTL, 0),
            (GUEST_SYSENTER_CS, v(HOST_IA32_SYSENTER_CS)),
            (GUEST_SYSENTER_ESP, v(HOST_IA32_SYSENTER_ESP)),
            (GUEST_SYSENTER_EIP, v(HOST_IA32_SYSENTER_EIP)),
            (GUEST_RIP, v(HOST_RIP)),
            (GUEST_RSP, v(HOST_RSP)),
            (GUEST_RFLAGS, 2),
            (GUEST_GDTR_BASE, v(HOST_GDTR_BASE)),
            (GUEST_IDTR_BASE, v(HOST_IDTR_BASE)),
            (GUEST_GDTR_LIMIT, 0xFFFF),
            (GUEST_IDTR_LIMIT, 0xFFFF),
            (GUEST_INTERRUPTIBILITY_INFO, blocking),
            (GUEST_ACTIVITY_STATE, 0),
            (GUEST_PENDING_DBG_EXCEPTIONS, 0),
            (GUEST_CS_SELECTOR, v(HOST_CS_SELECTOR)),
            (GUEST_CS_BASE, 0),
            (GUEST_CS_LIMIT, 0xFFFF_FFFF),
            (GUEST_CS_AR_BYTES, if long { 0xA09B } else { 0xC09B }),
            (GUEST_TR_SELECTOR, v(HOST_TR_SELECTOR)),
            (GUEST_TR_BASE, v(HOST_TR_BASE)),
            (GUEST_TR_LIMIT, 0x67),
            (GUEST_TR_AR_BYTES, 0x8B),
            (GUEST_LDTR_SELECTOR, 0),
            (GUEST_LDTR_AR_BYTES, 1 << 16),
        ] {
            state.set(field, value);
        }
        for (selector, base, limit, rights, from, at) in [
            (GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_AR_BYTES, HOST_SS_SELECTOR, 0),
            (GUEST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_AR_BYTES, HOST_DS_SELECTOR, 0),
            (GUEST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_AR_BYTES, HOST_ES_SELECTOR, 0),
            (GUEST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_AR_BYTES, HOST_FS_SELECTOR, v(HOST_FS_BASE)),
            (GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_AR_BYTES, HOST_GS_SELECTOR, v(HOST_GS_BASE)),
        ] {
            state.set(selector, v(from)).set(base, at);
            if v(from) == 0 {
                state.set(rights, 1 << 16);
            } else {
                state.set(rights, 0xC093).set(limit, 0xFFFF_FFFF);
            }
        }
        if self.exit_control(19) {
            state.set(GUEST_IA32_PAT, v(HOST_IA32_PAT));
        }
        let efer = if self.exit_control(21) {
            v(HOST_IA32_EFER)
        } else {
            state.get(GUEST_IA32_EFER) & !0x500 | if long { 0x500 } else { 0 }
        };
        state.set(GUEST_IA32_EFER, efer);
        if self.exit_control(12) {
            let value = v(HOST_IA32_PERF_GLOBAL_CTRL);
            self.msrs.insert(PERF_GLOBAL_CTRL, value);
        }
        self.state = state;
    }

    // ---- MSRs ----

    /// The register that holds an MSR.
    fn register_of(index: u32) -> Option<Field> {
        Some(match index {
            0x174 => GUEST_SYSENTER_CS,
            0x175 => GUEST_SYSENTER_ESP,
            0x176 => GUEST_SYSENTER_EIP,
            0x1D9 => GUEST_IA32_DEBUGCTL,
            0x277 => GUEST_IA32_PAT,
            0xC000_0080 => GUEST_IA32_EFER,
            0xC000_0100 => GUEST_FS_BASE,
            0xC000_0101 => GUEST_GS_BASE,
            _ => return None,
        })
    }

    /// RDMSR without regard to exits; `None` for #GP.
    pub fn msr(&self, index: u32) -> Option<u64> {
        match index {
            0x10 => Some(self.tsc),
            0x480..=0x491 => self.caps.msr(index),
            _ => match Self::register_of(index) {
                Some(field) => Some(self.state.get(field)),
                None => self.msrs.get(&index).copied(),
            },
        }
    }

    /// WRMSR without regard to exits; false for #GP.
    pub fn set_msr(&mut self, index: u32, value: u64) -> bool {
        let canonical = matches!(value as i64 >> 47, 0 | -1);
        let legal = match index {
            0x174 => true,
            0x175 | 0x176 | 0xC000_0082 | 0xC000_0100..=0xC000_0102 => canonical,
            0x1D9 => value & !0xFFC3 == 0,
            PAT => (0..8).all(|i| [0, 1, 4, 5, 6, 7].contains(&(value >> (8 * i) & 0xFF))),
            EFER => {
                let (old, paging) = (self.state.get(GUEST_IA32_EFER), bit(self.state.get(GUEST_CR0), 31));
                value & !0xD01 == 0 && !(paging && (old ^ value) >> 8 & 1 == 1)
            }
            0x1B => value & !(0x7F_FFFF_FFFF ^ 0x6FF) == 0 && value & 1 << 11 != 0,
            0xC000_0103 => value >> 32 == 0,
            PERF_GLOBAL_CTRL => value & !self.caps.counters == 0,
            0x3A | 0x480..=0x491 => false,
            _ => true,
        };
        if !legal {
            return false;
        }
        match (index, Self::register_of(index)) {
            (EFER, _) => {
                let lma = self.state.get(GUEST_IA32_EFER) & 1 << 10;
                self.state.set(GUEST_IA32_EFER, value & !(1 << 10) | lma);
            }
            (_, Some(field)) => _ = self.state.set(field, value & field.mask()),
            _ => match self.msrs.get_mut(&index) {
                Some(msr) => *msr = value,
                None => return false,
            },
        }
        true
    }

    /// Loads an area; the number of the entry that fails, counted from 1.
    fn load_msrs(&mut self, list: u64, count: u64) -> Result<(), u64> {
        for i in 0..count {
            let (index, value) = (self.word(list + 16 * i), self.word(list + 16 * i + 8));
            let forbidden = [0xC000_0100, 0xC000_0101].contains(&index) || (0x800..0x900).contains(&index);
            if index >> 32 != 0 || forbidden || !self.set_msr(index as u32, value) {
                return Err(i + 1);
            }
        }
        Ok(())
    }

    fn store_msrs(&mut self, list: u64, count: u64) {
        for i in 0..count {
            let index = self.word(list + 16 * i);
            let value = (index >> 32 == 0).then(|| self.msr(index as u32)).flatten();
            let Some(value) = value else { panic!("VMX abort: MSR {index:#x} of the VM-exit area is not stored") };
            self.memory.write_u64(mm::Place::anywhere(Hpa::new(list + 16 * i + 8)), value);
        }
    }
}
