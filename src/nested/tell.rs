//! Telling people why VMX refused something, on the serial line, as it happens: once for each place in L2 and each reason,
//! and again when that has happened 10, 100, 1000 ... times.
//!
//! Only what fails comes here.

use super::judge;
use crate::cpu::{Cpu, Operation};
use crate::guest::operand;
use crate::hw::serial;
use crate::rules::checks::CheckId;
use crate::rules::explain::Refusal;
use crate::vmcs::vmcs12::Vmcs12;
use crate::vmx::controls::{PrimaryControls, SecondaryControls};
use crate::vmx::exit::{BasicReason, ExitReason};
use crate::vmx::{Capabilities, Field, Fields};
use crate::x86::{Cr0, rflags};
use arrayvec::ArrayVec;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};
use l2_protocol::{Hex, Kind};
use spin::Mutex;

/// `explain=` of the command line.
static ON: AtomicBool = AtomicBool::new(false);

/// Takes over `explain=` of the command line.
pub fn configure(on: bool) {
    ON.store(on, Ordering::Relaxed);
}

/// Places that are remembered; what comes after them is counted and not told.
const PLACES: usize = 256;

/// What was told already, by all CPUs: L2's code is the same on each. Not on a stack of nvmx, which is small.
static TOLD: Mutex<ToldSpots> = Mutex::new(ToldSpots { places: ArrayVec::new_const() });

/// A place in L2 and a reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Spot {
    rip: u64,
    reason: Refusal,
    /// The encoding of a field, where the reason is one
    operand: Option<u64>,
}

/// Places and how often.
struct ToldSpots {
    places: ArrayVec<(Spot, u64), PLACES>,
}

impl ToldSpots {
    /// How often it has happened now, if that is to be told.
    fn count(&mut self, place: Spot) -> Option<u64> {
        if let Some((_, count)) = self.places.iter_mut().find(|(known, _)| *known == place) {
            *count = count.saturating_add(1);
            let count = *count;
            return is_power_of_ten(count).then_some(count);
        }
        self.places.try_push((place, 1)).ok().map(|()| 1)
    }
}

fn is_power_of_ten(mut count: u64) -> bool {
    while count >= 10 && count % 10 == 0 {
        count /= 10;
    }
    count == 1
}

/// Notes a refusal for L2 to read, and tells it. The VMCS of the level that [`Operation`] says is current and complete.
#[cold]
pub fn refuse(cpu: &mut Cpu, refusal: Refusal) {
    cpu.nested.refusals.note(refusal);
    if !ON.load(Ordering::Relaxed) {
        return;
    }
    let (rip, reason) = at_the_instruction(cpu);
    let operand = matches!(refusal, Refusal::Instruction(_)).then(|| field_operand(cpu, reason)).flatten();
    // Which rule is the first one matters, not which value broke it.
    let place = Spot { rip, reason: refusal, operand };
    // Another CPU that tells something just now goes first, and this is not told.
    let Some(count) = TOLD.try_lock().and_then(|mut told| told.count(place)) else { return };
    let first = refusal.check();
    let told = match refusal {
        // A rule with its values is told once.
        Refusal::Controls(_) | Refusal::HostState(_) | Refusal::GuestState(..) if count == 1 => {
            judge::all_broken(cpu, |whole, rules| {
                let values = Some((whole.vmcs12, whole.offered));
                // What only the processor knows breaks no rule here.
                tell(&place, reason, count, if rules.is_empty() { first.as_slice() } else { rules }, values);
            })
        }
        _ => None,
    };
    if told.is_none() {
        tell(&place, reason, count, first.as_slice(), None::<(&Vmcs12, &Capabilities)>);
    }
}

/// L2's RIP and exit reason at its VMX instruction.
fn at_the_instruction(cpu: &mut Cpu) -> (u64, BasicReason) {
    let vmcs02 = match cpu.nested.operation {
        Operation::NonRoot { current, .. } => Some(cpu.nested.slots[current].vmcs02.region()),
        _ => None,
    };
    if vmcs02.is_some() {
        cpu.vmx.ptrld(cpu.vmcs01);
    }
    let rip = cpu.vmx.read(Field::GUEST_RIP);
    let reason = ExitReason(cpu.vmx.read(Field::VM_EXIT_REASON) as u32).basic();
    if let Some(vmcs02) = vmcs02 {
        cpu.vmx.ptrld(vmcs02);
    }
    (rip, reason)
}

/// The field that VMREAD or VMWRITE names.
fn field_operand(cpu: &mut Cpu, reason: BasicReason) -> Option<u64> {
    if reason != BasicReason::VMREAD && reason != BasicReason::VMWRITE {
        return None;
    }
    let info = operand::field_access_info(cpu);
    Some(operand::second_register(cpu, info))
}

/// A record for each rule, or one where there is none.
fn tell(
    place: &Spot,
    reason: BasicReason,
    count: u64,
    rules: &[CheckId],
    values: Option<(&impl Fields, &Capabilities)>,
) {
    let (_, number, qualification) = place.reason.summary();
    let entry = !matches!(place.reason, Refusal::Instruction(_));
    let exits = matches!(place.reason, Refusal::GuestState(..) | Refusal::MsrLoading(..));
    let of = rules.len().max(1);
    for n in 0..of {
        let rule = rules.get(n).copied();
        serial::record(Kind::Refused, |record| {
            record.add("instruction", &format_args!("{reason}"));
            record.add("rip", &Hex(place.rip));
            record.add(if exits { "exit" } else { "error" }, &number);
            if exits {
                record.add("qualification", &Hex(qualification));
            }
            if let Some(encoding) = place.operand {
                record.add("operand", &Hex(encoding));
            }
            record.add("count", &count);
            if entry {
                record.add("n", &(n + 1));
                record.add("of", &of);
                record.add("rule", &rule.map_or("unknown", CheckId::name));
            }
            let Some((rule, (fields, caps))) = rule.zip(values) else { return };
            if !rule.fields().is_empty() {
                record.add("fields", &format_args!("{}", List { rule, fields }));
            }
            if let Some((ones, zeros)) = required(rule, fields, caps) {
                record.add("ones", &Hex(ones));
                record.add("zeros", &Hex(zeros));
            }
        });
    }
}

/// Fields with their values, as `NAME=0x1 NAME=0x2`.
struct List<'a, F> {
    rule: CheckId,
    fields: &'a F,
}

impl<F: Fields> fmt::Display for List<'_, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, field) in self.rule.fields().iter().enumerate() {
            let gap = if i == 0 { "" } else { " " };
            write!(f, "{gap}{}={:#x}", field.name(), self.fields.get(*field))?;
        }
        Ok(())
    }
}

/// Bits of a rule's first field that must be 1 and that must be 0, where the processor says so.
fn required(rule: CheckId, fields: &impl Fields, caps: &Capabilities) -> Option<(u64, u64)> {
    let control = |ones: u32, may: u32| (u64::from(ones), u64::from(!may));
    let has = |field, bit: u32| fields.get(field) & u64::from(bit) != 0;
    let unrestricted = has(Field::CPU_BASED_VM_EXEC_CONTROL, PrimaryControls::ACTIVATE_SECONDARY_CONTROLS.bits())
        && has(Field::SECONDARY_VM_EXEC_CONTROL, SecondaryControls::UNRESTRICTED_GUEST.bits());
    let exempt = if unrestricted { Cr0::PE.bits() | Cr0::PG.bits() } else { 0 };
    Some(match rule {
        CheckId::PinControls => control(caps.pin.must_be_one(), caps.pin.may_be_one()),
        CheckId::PrimaryControls => control(caps.primary.must_be_one(), caps.primary.may_be_one()),
        CheckId::SecondaryControls => control(caps.secondary.must_be_one(), caps.secondary.may_be_one()),
        CheckId::ExitControls => control(caps.exit.must_be_one(), caps.exit.may_be_one()),
        CheckId::EntryControls => control(caps.entry.must_be_one(), caps.entry.may_be_one()),
        CheckId::VmFunctionControls => (0, !caps.vmfunc),
        CheckId::GuestCr0 => (caps.cr0_fixed0 & !exempt, !(caps.cr0_fixed1 | exempt)),
        CheckId::HostCr0 => (caps.cr0_fixed0, !caps.cr0_fixed1),
        CheckId::GuestCr4 | CheckId::HostCr4 => (caps.cr4_fixed0, !caps.cr4_fixed1),
        CheckId::GuestRflagsReserved => (rflags::FIXED, rflags::RESERVED),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_told_at_first_and_at_powers_of_ten() {
        let mut told = ToldSpots { places: ArrayVec::new() };
        let place = Spot { rip: 1, reason: Refusal::Controls(Some(CheckId::PinControls)), operand: None };
        let counts: Vec<u64> = (0..1000).filter_map(|_| told.count(place)).collect();
        assert_eq!(counts, [1, 10, 100, 1000]);
        assert_eq!(told.count(Spot { rip: 2, ..place }), Some(1));
        assert_eq!(told.count(Spot { operand: Some(0x6c14), ..place }), Some(1));
    }

    #[test]
    fn more_places_than_are_remembered_are_not_told() {
        let mut told = ToldSpots { places: ArrayVec::new() };
        let place = |rip| Spot { rip, reason: Refusal::Instruction(None), operand: None };
        assert!((0..PLACES as u64).all(|rip| told.count(place(rip)) == Some(1)));
        assert_eq!(told.count(place(PLACES as u64)), None);
        assert_eq!((0..9).filter_map(|_| told.count(place(0))).last(), Some(10));
    }
}
