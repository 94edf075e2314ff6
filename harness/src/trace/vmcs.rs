//! Where a field comes from: vmcs12, vmcs02 and vmcs01 side by side at an exit, the rule that merges it, and who wrote last.

use super::file::Boot;
use super::log::What;
use crate::text::grouped;
use nvmx::vmx::Field;
use nvmx::vmx::exit::BasicReason;
use nvmx::vmx::field::{Area, Home};
use std::collections::BTreeMap;

/// A field's value, and the exit after which it was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Written {
    value: Option<u64>,
    after: Option<u32>,
}

type Values = BTreeMap<u32, Written>;

/// Everything that is known of the VMCSs at an exit.
#[derive(Debug, Default)]
pub struct Fields {
    /// The VMCS that runs L2
    vmcs01: Option<u64>,
    /// The VMCS of L3 that ran last
    vmcs02: Option<u64>,
    /// By address
    hardware: BTreeMap<u64, Values>,
    /// What L2 wrote by VMWRITE that exited, by the address of the vmcs02 that carries it
    trapped: BTreeMap<u64, Values>,
}

/// One line of the comparison.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// The field
    pub field: Field,
    /// What L2 wrote, where it is known
    pub vmcs12: Option<u64>,
    /// What the processor ran L3 with
    pub vmcs02: Option<u64>,
    /// What it ran L2 with
    pub vmcs01: Option<u64>,
    /// The exit after which vmcs02 (alone on the machine: the only one) got its value; `None`: before the first
    pub after: Option<u32>,
    /// How vmcs02 gets its value
    pub rule: &'static str,
}

impl Fields {
    /// As they were when the exit with this number came.
    ///
    /// # Errors
    /// If there is no such exit.
    pub fn at(boot: &Boot, number: u32) -> Result<Self, String> {
        let nested = boot.header.levels.guests.len() > 1;
        let link = Field::VMCS_LINK_POINTER.encoding();
        let mut state = Fields::default();
        let mut pending = Values::new();
        let mut next = 0u32;
        let mut first: BTreeMap<u32, u64> = BTreeMap::new();
        for record in boot.records() {
            let vmcs01 = *first.entry(record.cpu).or_insert(record.vmcs);
            let is02 = !nested || record.vmcs != vmcs01;
            match &record.what {
                What::Fields(list) => {
                    let values = state.hardware.entry(record.vmcs).or_default();
                    for (field, value) in list {
                        values.insert(*field, Written { value: Some(*value), after: next.checked_sub(1) });
                    }
                }
                What::Entry(_) if is02 => {
                    state.vmcs02 = Some(record.vmcs);
                    state.trapped.entry(record.vmcs).or_default().append(&mut pending);
                }
                What::Exit(facts) => {
                    if nested {
                        state.vmcs01 = Some(vmcs01);
                    }
                    if is02 {
                        state.vmcs02 = Some(record.vmcs);
                    }
                    if next == number {
                        return Ok(state);
                    }
                    let reason = u32::from(BasicReason::VMWRITE.0);
                    if !is02 && facts.reason == reason {
                        let value = (facts.info & 1 << 10 != 0).then_some(facts.operand);
                        let written = Written { value, after: Some(next) };
                        let values = state.hardware.get(&vmcs01);
                        let shadow = values.and_then(|values| values.get(&link)?.value).filter(|at| *at != u64::MAX);
                        let target = match shadow {
                            Some(vmcs02) => state.trapped.entry(vmcs02).or_default(),
                            None => &mut pending,
                        };
                        target.insert(facts.address as u32, written);
                    }
                    next += 1;
                }
                What::Entry(_) | What::Fail(_) => {}
            }
        }
        Err(format!("there is no exit #{number}: the trace has {}, from #0", grouped(next.into())))
    }

    /// All fields, in the order of nvmx's table; those that no VMCS here has are left out.
    pub fn lines(&self) -> Vec<Line> {
        let of = |vmcs: Option<u64>| vmcs.and_then(|vmcs| self.hardware.get(&vmcs));
        let (vmcs01, vmcs02) = (of(self.vmcs01), of(self.vmcs02));
        let trapped = self.vmcs02.and_then(|vmcs| self.trapped.get(&vmcs));
        let mut lines = Vec::new();
        for field in Field::ALL {
            let get = |values: Option<&Values>| values?.get(&field.encoding()).copied();
            let (in01, in02) = (get(vmcs01), get(vmcs02));
            if in01.is_none() && in02.is_none() {
                continue;
            }
            let vmcs12 = match field.home() {
                // L2's value is what the processor runs with.
                Home::Vmcs02 | Home::Watched if self.vmcs01.is_some() => in02.and_then(|written| written.value),
                _ => get(trapped).and_then(|written| written.value),
            };
            let rule = if self.vmcs01.is_some() { rule(*field) } else { "as the hypervisor wrote it" };
            lines.push(Line {
                field: *field,
                vmcs12,
                vmcs02: in02.and_then(|written| written.value),
                vmcs01: in01.and_then(|written| written.value),
                after: in02.and_then(|written| written.after),
                rule,
            });
        }
        lines
    }
}

/// How the field of vmcs02 gets its value.
fn rule(field: Field) -> &'static str {
    match (field.home(), field.area()) {
        (Home::Vmcs02, _) => "L2's own: it lives in vmcs02",
        (Home::Watched, _) => "L2's own; nvmx sees each write and checks it",
        (Home::Cache, Area::Host) => "nvmx's; L2's goes to vmcs01's guest state at a reflected exit",
        (Home::Cache, Area::Guest) => "nvmx derives it from L2's",
        (Home::Cache, Area::ExitInfo) => "nvmx gives it to L2",
        (Home::Cache, Area::Control) => match field {
            Field::PIN_BASED_VM_EXEC_CONTROL | Field::CPU_BASED_VM_EXEC_CONTROL | Field::SECONDARY_VM_EXEC_CONTROL => {
                "L2's bits and those that nvmx needs"
            }
            Field::VM_EXIT_CONTROLS | Field::VM_ENTRY_CONTROLS => {
                "nvmx's exits and entries, with what L2 asks for its guest"
            }
            Field::EPT_POINTER => "the composed EPT (ept02) of L2's",
            Field::VIRTUAL_PROCESSOR_ID => "a VPID of nvmx's for L2's",
            Field::MSR_BITMAP | Field::IO_BITMAP_A | Field::IO_BITMAP_B => {
                "L2's page, or its bits and nvmx's in a page of nvmx"
            }
            _ => "nvmx's value for L2's: an address translated by ept01, or nvmx does it itself",
        },
    }
}

/// The comparison as a table.
pub fn render(lines: &[Line], nested: bool) -> Vec<String> {
    let value = |value: Option<u64>| value.map_or("-".into(), |v| format!("{v:#x}"));
    let after = |after: Option<u32>| after.map_or("before #0".into(), |n| format!("#{n}"));
    let mut rows = vec![if nested {
        ["field", "vmcs12", "vmcs02", "vmcs01", "written after", "rule"].map(String::from).to_vec()
    } else {
        ["field", "value", "written after"].map(String::from).to_vec()
    }];
    for line in lines {
        let name = format!("{} ({:#06x})", line.field.name(), line.field.encoding());
        rows.push(if nested {
            let [vmcs12, vmcs02, vmcs01] = [line.vmcs12, line.vmcs02, line.vmcs01].map(value);
            vec![name, vmcs12, vmcs02, vmcs01, after(line.after), line.rule.to_string()]
        } else {
            vec![name, value(line.vmcs02), after(line.after)]
        });
    }
    let columns = rows[0].len();
    let wide: Vec<usize> = (0..columns).map(|c| rows.iter().map(|row| row[c].len()).max().unwrap_or(0)).collect();
    let pad = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&wide).map(|(cell, wide)| format!("{cell:wide$}")).collect();
        cells.join("  ").trim_end().to_string()
    };
    rows.iter().map(pad).collect()
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::boot_of;
    use super::super::log::{Facts, Record};
    use super::super::tree::tests::{entry, exit, nested};
    use super::*;

    fn fields(vmcs: u64, list: &[(Field, u64)]) -> Record {
        let list = list.iter().map(|(field, value)| (field.encoding(), *value)).collect();
        Record { tick: 0, vmcs, cpu: 0, executed: 0, what: What::Fields(list) }
    }

    fn vmwrite(vmcs: u64, field: Field, value: u64) -> Record {
        let facts = Facts {
            reason: BasicReason::VMWRITE.0.into(),
            address: field.encoding().into(),
            operand: value,
            info: 1 << 10,
            ..Facts::default()
        };
        Record { tick: 0, vmcs, cpu: 0, executed: 0, what: What::Exit(facts) }
    }

    #[test]
    fn three_vmcs_side_by_side_with_the_last_writer() {
        use Field as F;
        let link = |at: u64| fields(1, &[(F::VMCS_LINK_POINTER, at), (F::HOST_RIP, 7)]);
        let boot = boot_of(
            nested(),
            &[
                link(u64::MAX),
                entry(1, 1, 0),
                vmwrite(1, F::HOST_RIP, 0x50),
                entry(2, 1, 0),
                exit(3, 1, BasicReason::VMLAUNCH, 0),
                fields(2, &[(F::HOST_RIP, 7), (F::GUEST_CR3, 9)]),
                entry(4, 2, 0),
                exit(5, 2, BasicReason::CPUID, 0),
                link(2),
                entry(6, 1, 0),
                vmwrite(1, F::HOST_RIP, 0x60),
                entry(7, 1, 0),
                exit(8, 1, BasicReason::VMRESUME, 0),
                fields(2, &[(F::GUEST_CR3, 10)]),
                entry(9, 2, 0),
                exit(10, 2, BasicReason::CPUID, 0),
            ],
        );
        let at = |number: u32, field: Field| {
            let lines = Fields::at(&boot, number).unwrap().lines();
            lines.into_iter().find(|line| line.field == field).unwrap()
        };
        let host = at(2, F::HOST_RIP);
        assert_eq!((host.vmcs12, host.vmcs02, host.vmcs01, host.after), (Some(0x50), Some(7), Some(7), Some(1)));
        assert_eq!(at(5, F::HOST_RIP).vmcs12, Some(0x60));
        let cr3 = at(5, F::GUEST_CR3);
        assert_eq!((cr3.vmcs12, cr3.vmcs02, cr3.vmcs01, cr3.after), (Some(10), Some(10), None, Some(4)));
        assert_eq!(at(4, F::GUEST_CR3).after, Some(1));
        let text = render(&Fields::at(&boot, 5).unwrap().lines(), true).join("\n");
        assert!(text.contains("GUEST_CR3 (0x6802)") && text.contains("L2's own: it lives in vmcs02"), "{text}");
        assert!(Fields::at(&boot, 6).unwrap_err().contains("has 6, from #0"));
    }
}
