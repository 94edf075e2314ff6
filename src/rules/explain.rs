//! Why VMX refused something last: what L2 reads by CPUID leaf [`abi::LEAF_REFUSAL`].
//!
//! A processor tells which group of rules an entry broke and no more. nvmx knows the rule, since it checks each by its name.

use crate::rules::checks::CheckId;
use crate::vmx::exit::BasicReason;
use crate::vmx::{Field, VmxError};
use l2_protocol::abi::{self, Refused};

/// One refusal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// VMfailValid with this number, VMfailInvalid without a reason that has a number.
    Instruction(Option<VmxError>),
    /// A check on control fields, or the processor's if it knows a rule that nvmx does not.
    Controls(Option<CheckId>),
    /// A check on the host-state area.
    HostState(CheckId),
    /// A check on the guest-state area, or the processor's, with the exit qualification.
    GuestState(Option<CheckId>, u64),
    /// The entry of the MSR-load area with this number, counted from 1.
    MsrLoading(CheckId, u64),
}

/// What a VMfailInvalid means that has no number.
const NO_NUMBER: (&str, &str) =
    ("FailInvalid", "there is no current VMCS, or VMXON got a region that it does not take");

impl Refusal {
    /// The rule, if it is one of those with a [`CheckId`] and known.
    pub fn check(self) -> Option<CheckId> {
        match self {
            Refusal::Instruction(_) => None,
            Refusal::Controls(check) | Refusal::GuestState(check, _) => check,
            Refusal::HostState(check) | Refusal::MsrLoading(check, _) => Some(check),
        }
    }

    fn fields(self) -> &'static [Field] {
        self.check().map_or(&[], CheckId::fields)
    }

    /// Name and text; empty if the rule is not known.
    fn words(self) -> (&'static str, &'static str) {
        match (self, self.check()) {
            (Refusal::Instruction(Some(error)), _) => (error.name(), error.text()),
            (Refusal::Instruction(None), _) => NO_NUMBER,
            (_, Some(check)) => (check.name(), check.text()),
            (_, None) => ("", ""),
        }
    }

    /// What was refused, error number or exit reason, exit qualification.
    pub fn summary(self) -> (Refused, u32, u64) {
        match self {
            Refusal::Instruction(error) => (Refused::Instruction, error.map_or(0, |e| e as u32), 0),
            Refusal::Controls(_) => (Refused::Controls, VmxError::EntryInvalidControlField as u32, 0),
            Refusal::HostState(_) => (Refused::HostState, VmxError::EntryInvalidHostStateField as u32, 0),
            Refusal::GuestState(_, qualification) => {
                (Refused::GuestState, BasicReason::ENTRY_INVALID_GUEST_STATE.0.into(), qualification)
            }
            Refusal::MsrLoading(_, number) => (Refused::MsrLoading, BasicReason::ENTRY_MSR_LOADING.0.into(), number),
        }
    }
}

/// The last refusal of a CPU, and how many there were.
#[derive(Clone, Copy, Default, Debug)]
pub struct Refusals {
    last: Option<Refusal>,
    count: u32,
}

impl Refusals {
    /// Keeps a refusal.
    #[cold]
    pub fn note(&mut self, refusal: Refusal) {
        let (name, text) = refusal.words();
        match refusal {
            Refusal::Instruction(_) => {}
            _ if name.is_empty() => log::debug!("VM entry refused by a rule that only the processor knows"),
            _ => log::debug!("VM entry refused: {name}: {text}"),
        }
        self.last = Some(refusal);
        self.count = self.count.wrapping_add(1);
    }

    /// EAX, EBX, ECX, EDX of [`abi::LEAF_REFUSAL`] for a value of ECX.
    pub fn leaf(&self, subleaf: u32) -> [u32; 4] {
        const LAST: u32 = 0xFF;
        let Some(last) = self.last else { return [0; 4] };
        let ((refused, number, qualification), (name, text)) = (last.summary(), last.words());
        match (subleaf & !LAST, subleaf) {
            (_, abi::REFUSAL_SUMMARY) => [refused as u32, number, qualification as u32, self.count],
            (_, abi::REFUSAL_RULE) => {
                let rule = last.check().map_or(0, |check| check as u32 + 1);
                [rule, last.fields().len() as u32, name.len() as u32, text.len() as u32]
            }
            (abi::REFUSAL_FIELDS, _) => {
                let from = 4 * (subleaf & LAST) as usize;
                let mut fields = last.fields().iter().skip(from);
                [(); 4].map(|()| fields.next().map_or(abi::NO_FIELD, |field| field.encoding()))
            }
            (abi::REFUSAL_NAME, _) => words(name, subleaf & LAST),
            (abi::REFUSAL_TEXT, _) => words(text, subleaf & LAST),
            _ => [0; 4],
        }
    }
}

/// Sixteen bytes of a text as four words, the first byte lowest.
fn words(text: &str, sixteenth: u32) -> [u32; 4] {
    let mut bytes = text.bytes().skip(16 * sixteenth as usize);
    [(); 4].map(|()| u32::from_le_bytes([(); 4].map(|()| bytes.next().unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(refusal: Refusal) -> Refusals {
        let mut refusals = Refusals::default();
        refusals.note(refusal);
        refusals
    }

    fn text(refusals: &Refusals, part: u32) -> String {
        let bytes = (part..=part + 0xFF).flat_map(|i| refusals.leaf(i)).flat_map(u32::to_le_bytes);
        String::from_utf8(bytes.take_while(|&byte| byte != 0).collect()).unwrap()
    }

    #[test]
    fn before_the_first_refusal_there_is_nothing() {
        for subleaf in [0, 1, 2, 0x100, 0x200, 0x300, u32::MAX] {
            assert_eq!(Refusals::default().leaf(subleaf), [0; 4]);
        }
    }

    #[test]
    fn every_rule_comes_through_with_name_text_and_fields() {
        for (number, &check) in (1..).zip(CheckId::ALL) {
            let refusals = after(Refusal::GuestState(Some(check), 4));
            assert_eq!(refusals.leaf(0), [4, 33, 4, 1]);
            let [rule, fields, name, what] = refusals.leaf(1);
            assert_eq!((rule, fields as usize), (number, check.fields().len()));
            assert_eq!((name as usize, what as usize), (check.name().len(), check.text().len()));
            assert_eq!(
                (text(&refusals, 0x200).as_str(), text(&refusals, 0x300).as_str()),
                (check.name(), check.text())
            );
            let encodings: Vec<u32> = (0x100..0x110).flat_map(|i| refusals.leaf(i)).collect();
            let wanted: Vec<u32> = check.fields().iter().map(|f| f.encoding()).collect();
            assert_eq!(&encodings[..wanted.len()], wanted);
            assert!(encodings[wanted.len()..].iter().all(|&e| e == abi::NO_FIELD));
        }
    }

    #[test]
    fn each_group_has_its_number_and_the_count_goes_on() {
        let mut refusals = Refusals::default();
        for (refusal, summary) in [
            (Refusal::Instruction(Some(VmxError::UnsupportedVmcsComponent)), [1, 12, 0, 1]),
            (Refusal::Instruction(None), [1, 0, 0, 2]),
            (Refusal::Controls(None), [2, 7, 0, 3]),
            (Refusal::HostState(CheckId::HostCr0), [3, 8, 0, 4]),
            (Refusal::MsrLoading(CheckId::MsrLoadBase, 7), [5, 34, 7, 5]),
        ] {
            refusals.note(refusal);
            assert_eq!(refusals.leaf(abi::REFUSAL_SUMMARY), summary);
        }
    }

    #[test]
    fn a_rule_that_only_the_processor_knows_has_no_words() {
        assert_eq!(after(Refusal::GuestState(None, 0)).leaf(abi::REFUSAL_RULE), [0; 4]);
        let named = after(Refusal::Instruction(Some(VmxError::VmclearVmxonPointer)));
        assert_eq!(text(&named, abi::REFUSAL_NAME), "VmclearVmxonPointer");
    }
}
