//! Where vmxtest's records under KVM may differ from the bare machine's: what KVM itself does otherwise.

use super::compare;
use crate::boot::{Ended, Outcome};
use crate::transcript::Line;
use l2_protocol::Kind;

/// A cause and the records that it changes.
pub struct Waiver {
    /// For reports
    pub id: &'static str,
    /// Names of `check` records; an asterisk stands for any text
    pub checks: &'static [&'static str],
    /// Why
    pub why: &'static str,
}

/// All of them. Each is a decision: keep this short.
pub const WAIVERS: &[Waiver] = &[
    Waiver {
        id: "kvm-fields",
        checks: &[
            "field GUEST_SMBASE",
            "field CR3_TARGET0",
            "field CR3_TARGET1",
            "field CR3_TARGET2",
            "field CR3_TARGET3",
            "field IO_RCX",
            "field IO_RSI",
            "field IO_RDI",
            "field IO_RIP",
        ],
        why: "KVM gives its guest no such fields, although every processor has them",
    },
    Waiver {
        id: "kvm-access-rights",
        checks: &["guest TR with bit 8", "guest CS with bit 11", "guest CS with bit 17"],
        why: "KVM drops reserved bits of access rights, so that no entry fails because of them",
    },
    Waiver {
        id: "kvm-fault-of-a-delivery",
        checks: &["an NMI without an IDT, exits by #GP", "INT1 without an IDT, exits by #GP"],
        why: "KVM reports no INT1 whose delivery faulted, and unblocks NMIs when the delivery of one faulted",
    },
    Waiver {
        id: "kvm-tsc-multiplier",
        checks: &["TSC multiplier 0"],
        why: "KVM lets an entry with a TSC multiplier of 0 through",
    },
    Waiver {
        id: "kvm-tsc-rounding",
        checks: &["TSC multiplier 1/65536: RDTSC", "TSC multiplier 1/65536: RDMSR"],
        why: "KVM scales the TSC and its own offset apart and rounds both, so that time may seem to be one tick earlier",
    },
    Waiver {
        id: "kvm-virtual-apic",
        checks: &["virtual-APIC page without memory"],
        why: "KVM refuses an entry whose virtual-APIC page it cannot map",
    },
    Waiver {
        id: "kvm-failed-entry",
        checks: &["failed entry: guest RFLAGS, *"],
        why: "where the processor refuses an entry, and not KVM itself, KVM saves guest state as if for an exit: above all what is \
              left of its preemption timer",
    },
    Waiver {
        id: "kvm-halted",
        checks: &[
            "a pending trap flag in the HLT state*",
            "halted at entry, *",
            "halted, posted interrupt, interrupts off",
            "ordering *; halted",
        ],
        why: "KVM ends the HLT state of its guest before an exit saves it",
    },
    Waiver {
        id: "kvm-timer",
        checks: &[
            "random base with a timer",
            "preemption timer of 30000 over exits of the hypervisor below",
            "preemption timer of 100000 over exits of the hypervisor below",
            "preemption timer of 1000000 over exits of the hypervisor below",
            "ordering *; exiting, windows, timer; plain",
            "ordering *; exiting, windows, timer; if0",
            "ordering *; exiting, windows, timer; sti",
            "ordering *; exiting, windows, timer; mov_ss",
            "ordering *; exiting, windows, timer; nmi_blocked",
            "ordering *; exiting, windows, timer; step",
        ],
        why: "KVM keeps the preemption timer by a clock of its own: a guest that ends soon is not stopped by it, others are stopped late, after \
              the windows",
    },
    Waiver {
        id: "kvm-injection",
        checks: &["ordering *; inject int1", "ordering *; inject mtf"],
        why: "KVM loses an INT1 and a pending MTF exit that are injected",
    },
    Waiver {
        id: "kvm-nmi",
        checks: &[
            "ordering NMI; *",
            "ordering interrupt and NMI; *",
            "ordering *; exiting, interrupt window; inject nmi",
        ],
        why: "KVM keeps blocking by NMI for each level: an NMI that waits while L2 has NMIs blocked comes to nvmx, or when KVM next looks",
    },
    Waiver {
        id: "kvm-last-branches",
        checks: &["task switch, *: last branches"],
        why: "KVM takes writes of LBR to IA32_DEBUGCTL and forgets them",
    },
    Waiver {
        id: "kvm-error-code",
        checks: &["inject #NP without an error code", "inject #UD with an error code"],
        why: "KVM does not offer the injection of exceptions with any error code (IA32_VMX_BASIC bit 56)",
    },
    Waiver {
        id: "kvm-bits",
        checks: &["each bit of *"],
        why: "KVM shows reserved bits of CR0 as they were written, drops those of access rights and has no CET",
    },
    Waiver {
        id: "kvm-areas",
        checks: &["MSR * in each area"],
        why: "KVM lacks MSRs that it reads as 0 and ignores in WRMSR, and refuses them in MSR areas; of IA32_BIOS_SIGN_ID the SDM allows that",
    },
    Waiver {
        id: "kvm-vmread-canonical",
        checks: &["vmread over the canonical edge"],
        why: "KVM, which answers VMREAD of shadowed fields itself, reports the missing page before the non-canonical address",
    },
];

/// The waiver for a record.
fn waiver(check: &str) -> Option<&'static Waiver> {
    let named = |name: &&str| match name.split_once('*') {
        Some((begin, end)) => check.len() >= name.len() - 1 && check.starts_with(begin) && check.ends_with(end),
        None => *name == check,
    };
    WAIVERS.iter().find(|w| w.checks.iter().any(&named))
}

/// Both guests came to their end, and the records of the other boot differ only where KVM is the cause. The guest's own
/// verdict counts unless waived records explain it.
///
/// # Errors
/// What differs, one per line.
pub fn agree_but_for_kvm(one: &Outcome, other: &Outcome) -> Result<(), String> {
    one.verdict().map_err(|e| format!("{}: {e}; nothing to compare", one.name))?;
    let over = other.transcript.of_kind(Kind::End).next_back();
    let broken = other.transcript.lines.iter().any(|l| matches!(l, Line::Broken(..)));
    let Some(end) = over.filter(|_| !matches!(other.ended, Ended::Timeout(_)) && !broken) else {
        let reason = other.verdict().err().unwrap_or_else(|| "it did not end as it should".into());
        return Err(format!("{}: {reason}", other.name));
    };
    let comparison = compare::compare(&one.transcript, &other.transcript);
    if comparison.compared == 0 {
        return Err("there are no check records: nothing is compared".into());
    }
    let name = |key: &str| key.split_once(' ').map_or(key, |(_, name)| name).to_string();
    let is_waived =
        |d: &&compare::Difference| d.one.is_some() && d.other.is_some() && waiver(&name(&d.key.0)).is_some();
    let (waived, rest): (Vec<_>, Vec<_>) = comparison.differ.iter().partition(is_waived);
    if !rest.is_empty() {
        let lines: Vec<String> = rest.iter().flat_map(|d| d.lines(&one.name, &other.name)).take(12).collect();
        return Err(format!("{} records differ and no waiver says why:\n  {}", rest.len(), lines.join("\n  ")));
    }
    if end.get("status") != Some("pass") && waived.is_empty() {
        return Err(format!("{} says that it failed, and no record differs", other.name));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::tests::outcome;

    const PASS: &str = "@L2 end status=pass failed=0";
    const FAIL: &str = "@L2 end status=fail failed=1";

    #[test]
    fn only_what_kvm_causes_may_differ() {
        let bare = outcome("bare", &["@L2 check name=\"field IO_RCX\" x=1", "@L2 check name=b x=1", PASS]);
        let kvm = outcome("kvm", &["@L2 check name=\"field IO_RCX\" x=2", "@L2 check name=b x=1", FAIL]);
        assert_eq!(agree_but_for_kvm(&bare, &kvm), Ok(()));
        let other = outcome("kvm", &["@L2 check name=\"field IO_RCX\" x=1", "@L2 check name=b x=2", PASS]);
        assert!(agree_but_for_kvm(&bare, &other).unwrap_err().contains("b: x=1 against 2"));
        let missing = outcome("kvm", &["@L2 check name=b x=1", PASS]);
        assert!(agree_but_for_kvm(&bare, &missing).is_err());
    }

    #[test]
    fn an_asterisk_stands_for_any_text() {
        for (check, id) in [
            ("task switch, paging: last branches", Some("kvm-last-branches")),
            ("task switch, paging: last branch", None),
            ("MSR 0x8b in each area", Some("kvm-areas")),
            ("MSR  in each area", Some("kvm-areas")),
            ("MSR in each area", None),
            ("field IO_RCX", Some("kvm-fields")),
            ("field IO_RCX again", None),
        ] {
            assert_eq!(waiver(check).map(|w| w.id), id, "{check}");
        }
    }

    #[test]
    fn a_guest_that_failed_without_a_difference_or_did_not_end_fails() {
        let bare = outcome("bare", &["@L2 check name=b x=1", PASS]);
        assert!(agree_but_for_kvm(&bare, &outcome("kvm", &["@L2 check name=b x=1", FAIL])).is_err());
        assert!(agree_but_for_kvm(&bare, &outcome("kvm", &["@L2 check name=b x=1"])).is_err());
        assert!(agree_but_for_kvm(&outcome("bare", &[PASS]), &outcome("kvm", &[PASS])).is_err());
    }
}
