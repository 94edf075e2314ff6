//! What VMX refused, told as it happens: from nvmx's `refused` records to words.

use crate::image;
use l2_protocol::{Kind, OwnedRecord};
use nvmx::rules::checks::CheckId;
use nvmx::vmx::Field;
use nvmx::vmx::VmxError;
use nvmx::vmx::exit::BasicReason;
use schemars::JsonSchema;
use serde::Serialize;
use std::path::Path;

/// One broken rule of a refused VM entry, or a VMX instruction that failed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, JsonSchema)]
pub struct Refusal {
    /// `VMLAUNCH`, `VMPTRLD`, ...
    pub instruction: String,
    /// Where it stands in L2, hexadecimal
    pub rip: String,
    /// The same by L2's symbols
    pub symbol: Option<String>,
    /// VM-instruction error; 0: VMfailInvalid
    pub error: Option<u32>,
    /// Basic exit reason of an entry that failed after loading guest state
    pub exit: Option<u32>,
    /// Exit qualification, hexadecimal
    pub qualification: Option<String>,
    /// The field that VMREAD or VMWRITE names
    pub operand: Option<FieldValue>,
    /// How often it has happened at this place for this reason
    pub count: u64,
    /// Which of the broken rules, from 1
    pub number: u64,
    /// How many rules are broken
    pub of: u64,
    /// The rule's name; `unknown`: the processor knows it and nvmx does not
    pub rule: Option<String>,
    /// What must hold, or what was wrong with the instruction
    pub text: Option<String>,
    /// The SDM's section in the chapter "VM Entries"
    pub section: Option<String>,
    /// The fields that the rule is about
    pub fields: Vec<FieldValue>,
    /// Bits of the first field that must be 1 and are 0, hexadecimal
    pub must_be_set: Option<String>,
    /// Bits of the first field that must be 0 and are 1, hexadecimal
    pub must_be_clear: Option<String>,
}

/// A field of the VMCS.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, JsonSchema)]
pub struct FieldValue {
    /// As in the SDM's list
    pub name: String,
    /// Hexadecimal
    pub encoding: String,
    /// Hexadecimal; nothing where it was not read
    pub value: Option<String>,
}

impl FieldValue {
    fn of_encoding(encoding: u64) -> Self {
        let field = u32::try_from(encoding).ok().and_then(Field::decode);
        let name = field.map_or("(no field of the SDM)".into(), |(field, high)| {
            format!("{}{}", field.name(), if high { " (high)" } else { "" })
        });
        FieldValue { name, encoding: format!("{encoding:#x}"), value: None }
    }
}

impl Refusal {
    /// Reads the record; the image names addresses.
    pub fn of(record: &OwnedRecord, l2: Option<&Path>) -> Option<Self> {
        let number = |key| record.number(key).ok();
        let small = |key| number(key).and_then(|n| u32::try_from(n).ok());
        let hex = |value: u64| format!("{value:#x}");
        let rip = number("rip").filter(|_| record.kind == Kind::Refused)?;
        let rule = record.get("rule");
        let known = rule.and_then(|name| CheckId::ALL.iter().find(|check| check.name() == name));
        let error = small("error").and_then(error_of);
        let fields: Vec<FieldValue> = record.get("fields").unwrap_or_default().split(' ').filter_map(value).collect();
        let first = fields.first().and_then(|field| parse(field.value.as_deref()?));
        let wrong = |key, wrong: fn(u64, u64) -> u64| {
            first.zip(number(key)).map(|(value, bits)| wrong(value, bits)).filter(|bits| *bits != 0).map(hex)
        };
        Some(Refusal {
            instruction: record.get("instruction")?.into(),
            rip: hex(rip),
            symbol: l2.and_then(|image| image::symbol_or_label(image, rip)),
            error: small("error"),
            exit: small("exit"),
            qualification: number("qualification").map(hex),
            operand: number("operand").map(FieldValue::of_encoding),
            count: number("count").unwrap_or(1),
            number: number("n").unwrap_or(1),
            of: number("of").unwrap_or(1),
            rule: rule.map(str::to_string),
            text: known.map(|check| check.text()).or(error.map(VmxError::text)).map(str::to_string),
            section: known.map(|check| check.section().to_string()),
            fields,
            must_be_set: wrong("ones", |value, ones| ones & !value),
            must_be_clear: wrong("zeros", |value, zeros| zeros & value),
        })
    }

    /// For people.
    pub fn lines(&self) -> Vec<String> {
        let place = self.symbol.as_ref().map_or(String::new(), |symbol| format!(" ({symbol})"));
        let again = if self.count > 1 { format!(", {} times so far", self.count) } else { String::new() };
        let (instruction, rip) = (&self.instruction, &self.rip);
        let mut lines = Vec::new();
        let Some(rule) = &self.rule else {
            let operand = self.operand.as_ref().map_or(String::new(), |f| format!(": {} {}", f.encoding, f.name));
            lines.push(format!("{instruction} at {rip}{place} failed: {}{operand}{again}", self.failure()));
            return lines;
        };
        if self.number == 1 {
            let rules = match self.of {
                _ if self.count > 1 => format!("{again}, {rule}"),
                1 => ", 1 rule is broken".into(),
                n => format!(", {n} rules are broken"),
            };
            lines.push(format!("VM entry refused: {instruction} at {rip}{place}: {}{rules}", self.failure()));
        }
        if self.count > 1 {
            return lines;
        }
        let text = self.text.as_deref().unwrap_or("the processor knows the rule and nvmx does not");
        let section = self.section.as_ref().map_or(String::new(), |s| format!(" (SDM, \"{s}\")"));
        lines.push(format!("  {}. {rule}: {text}{section}", self.number));
        for (i, field) in self.fields.iter().enumerate() {
            let mut line =
                format!("     {} ({}) = {}", field.name, field.encoding, field.value.as_deref().unwrap_or("?"));
            for (bits, what) in [(&self.must_be_set, "must be 1"), (&self.must_be_clear, "must be 0")] {
                if let Some(bits) = bits.as_ref().filter(|_| i == 0) {
                    line.push_str(&format!("; {} {what}", bit_numbers(parse(bits).unwrap_or(0))));
                }
            }
            lines.push(line);
        }
        lines
    }

    /// How the processor tells it.
    fn failure(&self) -> String {
        match (self.error, self.exit) {
            (_, Some(reason)) => {
                let name = BasicReason(reason as u16).name().unwrap_or("?").replace('_', " ").to_lowercase();
                let qualification = self.qualification.as_deref().unwrap_or("?");
                format!("exit reason {reason} with bit 31 set ({name}), qualification {qualification}")
            }
            (Some(0) | None, None) => {
                "VMfailInvalid, there is no current VMCS or VMXON does not take its region".into()
            }
            (Some(number), None) => {
                format!("error {number}, {}", error_of(number).map_or("?", VmxError::text))
            }
        }
    }
}

fn error_of(number: u32) -> Option<VmxError> {
    VmxError::ALL.iter().copied().find(|error| *error as u32 == number)
}

/// `NAME=0x1`
fn value(word: &str) -> Option<FieldValue> {
    let (name, value) = word.split_once('=')?;
    let field = Field::ALL.iter().find(|field| field.name() == name)?;
    Some(FieldValue { name: name.into(), encoding: format!("{:#x}", field.encoding()), value: Some(value.into()) })
}

fn parse(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// "bit 3", "bits 63:32, 5"
pub fn bit_numbers(bits: u64) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for bit in (0..64).rev().filter(|bit| bits >> bit & 1 != 0) {
        match runs.last_mut() {
            Some((_, low)) if *low == bit + 1 => *low = bit,
            _ => runs.push((bit, bit)),
        }
    }
    let text = |&(high, low): &(u32, u32)| if high == low { format!("{high}") } else { format!("{high}:{low}") };
    let list: Vec<String> = runs.iter().map(text).collect();
    format!("{} {}", if bits.count_ones() == 1 { "bit" } else { "bits" }, list.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(record: &str) -> Vec<String> {
        Refusal::of(&OwnedRecord::parse(record).unwrap(), None).unwrap().lines()
    }

    #[test]
    fn a_broken_control_names_the_bits_that_are_wrong() {
        let text = lines(
            "@L1 refused instruction=VMLAUNCH rip=0x101234 error=7 count=1 n=1 of=2 rule=PinControls \
             fields=\"PIN_BASED_VM_EXEC_CONTROL=0x80000000\" ones=0x16 zeros=0xffffff00",
        );
        assert_eq!(text.len(), 3, "{text:?}");
        assert_eq!(
            text[0],
            "VM entry refused: VMLAUNCH at 0x101234: error 7, VM entry with invalid control fields, 2 rules are broken"
        );
        assert!(text[1].starts_with("  1. PinControls: pin-based controls are set"), "{text:?}");
        assert!(text[1].ends_with("(SDM, \"VM-Execution Control Fields\")"));
        assert_eq!(
            text[2],
            "     PIN_BASED_VM_EXEC_CONTROL (0x4000) = 0x80000000; bits 4, 2:1 must be 1; bit 31 must be 0"
        );
        let second = "@L1 refused instruction=VMLAUNCH rip=0x101234 error=7 count=1 n=2 of=2 rule=VpidNotZero \
                      fields=\"VIRTUAL_PROCESSOR_ID=0x0\"";
        assert!(lines(second)[0].starts_with("  2. VpidNotZero"));
    }

    #[test]
    fn a_failed_instruction_names_its_field_and_how_often() {
        let text = lines("@L1 refused instruction=VMWRITE rip=0x10 error=12 operand=0x6c14 count=100");
        assert_eq!(
            text,
            ["VMWRITE at 0x10 failed: error 12, VMREAD or VMWRITE of a field that this machine does not have: 0x6c14 \
              HOST_RSP, 100 times so far"]
        );
        assert!(lines("@L1 refused instruction=VMREAD rip=0x10 error=0 count=1")[0].contains("VMfailInvalid"));
    }

    #[test]
    fn an_entry_that_fails_late_tells_its_exit() {
        let text = lines(
            "@L1 refused instruction=VMRESUME rip=0x10 exit=33 qualification=0x4 count=1 n=1 of=1 rule=GuestLinkPointerRegion \
             fields=\"VMCS_LINK_POINTER=0x1000\"",
        );
        assert!(
            text[0].contains("exit reason 33 with bit 31 set") && text[0].contains("qualification 0x4"),
            "{text:?}"
        );
    }

    #[test]
    fn bits_are_told_in_runs() {
        assert_eq!(bit_numbers(8), "bit 3");
        assert_eq!(bit_numbers(0xFFFF_FFFF_0000_0021), "bits 63:32, 5, 0");
    }

    #[test]
    fn every_rule_and_error_has_words() {
        for check in CheckId::ALL {
            let record = format!("@L1 refused instruction=VMLAUNCH rip=0x1 error=7 count=1 rule={}", check.name());
            let text = lines(&record).join(" ");
            assert!(text.contains(check.text()) && text.contains(check.section()), "{text}");
        }
    }
}
