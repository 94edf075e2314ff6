//! From records to averages per event: one table for people, one JSON file for programs.

pub mod added;
pub mod budget;
pub mod growth;
pub mod json;
pub mod junit;
pub mod ledger;
pub mod linux;
pub mod model;
pub mod page;
pub mod plot;
pub mod provenance;
pub mod spread;
pub mod stack;
pub mod table;

use crate::transcript::Transcript;
use l2_protocol::{Kind, OwnedRecord};
use model::Range;
use schemars::JsonSchema;
use serde::Serialize;

/// The event whose bracket holds nothing: what the bracket itself costs.
const CALIBRATION: &str = "empty";

macro_rules! event {
    ($( $(#[$doc:meta])* $name:ident, )*) => {
        /// Averages of one event over the boots of a run. Figures without a value are `null`: not measured there.
        #[derive(Clone, PartialEq, Debug, Default, Serialize, JsonSchema)]
        pub struct Event {
            /// Its name
            pub event: String,
            /// Who handles the exit under nvmx: `L2`, `nvmx` or `hardware`
            pub handled_by: String,
            /// Events in the bracket under nvmx
            pub count: u64,
            $( $(#[$doc])* pub $name: Option<f64>, )*
            /// Cycles under nvmx by the model of `./nvmx lab --model`, where ticks are instructions
            pub cycles: Option<Range>,
            /// Cycles with KVM in nvmx's place by that model: at least, since KVM's VMREAD, VMWRITE and VMPTRLD are not counted
            pub kvm_cycles: Option<Range>,
        }

        impl Event {
            /// A figure by its JSON name.
            pub fn figure(&self, name: &str) -> Option<f64> {
                match name {
                    $( stringify!($name) => self.$name, )*
                    _ => None,
                }
            }

            /// The names of all figures.
            pub const FIGURES: &'static [&'static str] = &[$( stringify!($name), )*];
        }
    };
}

event! {
    /// Ticks without any hypervisor
    native,
    /// Ticks with one hypervisor
    one_level,
    /// Ticks under nvmx
    nested,
    /// ... where brackets were many, of the bracket below which a tenth of them lies
    nested_p10,
    /// ... and below which nine tenths lie
    nested_p90,
    /// Hardware exits, of all levels
    hw_exits,
    /// ... of L2
    exits_l2,
    /// ... of L3
    exits_l3,
    /// Exits that L2 got to see
    reflected,
    /// Ticks inside nvmx
    l1_instructions,
    /// VMREAD executed by nvmx
    l1_vmread,
    /// VMWRITE executed by nvmx
    l1_vmwrite,
    /// VMPTRLD executed by nvmx
    l1_vmptrld,
    /// VMCLEAR executed by nvmx
    l1_vmclear,
    /// INVEPT executed by nvmx
    l1_invept,
    /// INVVPID executed by nvmx
    l1_invvpid,
    /// VMREAD of L2 that exited
    trapped_vmread,
    /// VMWRITE of L2 that exited
    trapped_vmwrite,
    /// Entries filled in ept02
    ept02_fills,
    /// ept02 contexts that an INVEPT of L2 concerned
    ept02_flushes,
    /// Exits to KVM, where KVM is below nvmx, by KVM's own count
    l0_exits,
    /// Ticks with KVM in nvmx's place
    under_kvm,
    /// Exits to KVM there, by KVM's own count
    kvm_exits,
}

/// The averages of a run: `bare` is the guest alone on the machine, `nested` the same guest under nvmx.
pub fn events(bare: Option<&Transcript>, nested: &Transcript) -> Vec<Event> {
    let mut rows: Vec<Event> = Vec::new();
    // The order in which the guest measures is the order of the table.
    let all = nested.of_kind(Kind::Event).chain(bare.into_iter().flat_map(|t| t.of_kind(Kind::Event)));
    for record in all {
        let Some(name) = record.get("name").filter(|n| *n != CALIBRATION) else { continue };
        if !rows.iter().any(|row| row.event == name) {
            rows.push(row(name, bare, nested));
        }
    }
    rows
}

fn row(name: &str, bare: Option<&Transcript>, nested: &Transcript) -> Event {
    // Events of L3 are compared by L3's bracket; one that only L2 has (its own CPUID, say) by L2's.
    let scope_in = |t: &Transcript| {
        let scopes: Vec<&str> = named(t, name).filter_map(|r| r.get("scope")).collect();
        if scopes.contains(&"l3") { Some("l3".to_string()) } else { scopes.first().map(|s| s.to_string()) }
    };
    let scope = scope_in(nested).or_else(|| bare.and_then(scope_in)).unwrap_or_default();
    let inner = bracket(nested, name, &scope);
    let bare_of = |scope: &str| bare.and_then(|t| average(t, bracket(t, name, scope)?, scope, "ticks"));
    let own = if scope == "l3" { None } else { bare_of(&scope) };
    let of = |key: &str| average(nested, inner?, &scope, key);
    let any = inner.or_else(|| bracket(bare?, name, &scope));
    let handled_by = any.and_then(|r| r.get("handled_by")).unwrap_or_default();
    Event {
        event: name.to_string(),
        handled_by: handled_by.to_string(),
        count: inner.and_then(|r| r.number("count").ok()).unwrap_or(0),
        native: bare_of("native").or(own),
        one_level: bare_of("l3"),
        nested: of("ticks"),
        nested_p10: of("ticks_p10"),
        nested_p90: of("ticks_p90"),
        hw_exits: of("hw_exits"),
        exits_l2: of("exits_l2"),
        exits_l3: of("exits_l3"),
        reflected: of("reflected"),
        l1_instructions: of("l1_ticks"),
        l1_vmread: of("l1_vmread"),
        l1_vmwrite: of("l1_vmwrite"),
        l1_vmptrld: of("l1_vmptrld"),
        l1_vmclear: of("l1_vmclear"),
        l1_invept: of("l1_invept"),
        l1_invvpid: of("l1_invvpid"),
        trapped_vmread: of("trapped_vmread"),
        trapped_vmwrite: of("trapped_vmwrite"),
        ept02_fills: of("ept02_fills"),
        ept02_flushes: of("ept02_flushes"),
        l0_exits: inner.and_then(|record| kvm_exits(nested, record, &scope, "l0_exits")),
        under_kvm: None,
        kvm_exits: None,
        cycles: None,
        kvm_cycles: None,
    }
}

/// Adds what the model makes of counted instructions and exits.
pub fn add_cycles(events: &mut [Event]) {
    for event in events {
        let sum = |figures: [Option<f64>; 2]| figures.into_iter().flatten().sum();
        let counts = |instructions, exits| model::Counts { instructions, exits, ..model::Counts::default() };
        event.cycles = event.nested.zip(event.hw_exits).map(|(instructions, exits)| {
            model::cycles(&model::Counts {
                accesses: sum([event.l1_vmread, event.l1_vmwrite]),
                pointers: sum([event.l1_vmptrld, event.l1_vmclear]),
                invalidations: sum([event.l1_invept, event.l1_invvpid]),
                ..counts(instructions, exits)
            })
        });
        let kvm = event.under_kvm.zip(event.kvm_exits);
        event.kvm_cycles = kvm.map(|(instructions, exits)| model::cycles(&counts(instructions, exits)));
    }
}

/// Adds what the same guest cost with KVM in nvmx's place.
pub fn add_peer(events: &mut [Event], kvm: &Transcript) {
    for event in events {
        // As for nvmx: the guest's bracket, or that of the guest hypervisor's own events.
        let found = ["l3", "l2"].into_iter().find_map(|scope| Some((bracket(kvm, &event.event, scope)?, scope)));
        if let Some((record, scope)) = found {
            event.under_kvm = average(kvm, record, scope, "ticks");
            // With KVM in KVM, the lower one takes every exit.
            let exits = |key| kvm_exits(kvm, record, scope, key);
            event.kvm_exits = exits("outer_exits").or_else(|| exits("l0_exits"));
        }
    }
}

fn named<'a>(transcript: &'a Transcript, name: &'a str) -> impl Iterator<Item = &'a OwnedRecord> {
    transcript.of_kind(Kind::Event).filter(move |r| r.get("name") == Some(name))
}

fn bracket<'a>(transcript: &'a Transcript, name: &str, scope: &str) -> Option<&'a OwnedRecord> {
    transcript.of_kind(Kind::Event).find(|r| r.get("name") == Some(name) && r.get("scope") == Some(scope))
}

/// KVM's exits per event. The VMM counts from the end of the line before: in the guest's brackets that is as much for the
/// empty one, but before the guest hypervisor's own empty bracket comes all its set-up, so that nothing is taken off there.
fn kvm_exits(transcript: &Transcript, record: &OwnedRecord, scope: &str, key: &str) -> Option<f64> {
    average(transcript, record, if scope == "l2" { "" } else { scope }, key)
}

/// A total without what the bracket itself costs, per event; three decimals.
fn average(transcript: &Transcript, record: &OwnedRecord, scope: &str, key: &str) -> Option<f64> {
    let total = record.number(key).ok()? as f64;
    let count = record.number("count").ok().filter(|&n| n > 0)? as f64;
    let of_empty = |key| bracket(transcript, CALIBRATION, scope).and_then(|r| r.number(key).ok());
    // Of many brackets round nothing the least is what a bracket takes: all else is noise.
    let least = key.starts_with("ticks").then(|| of_empty("ticks_least")).flatten();
    let empty = least.or_else(|| of_empty(key)).unwrap_or(0) as f64;
    // Zero is not written as -0.
    Some((((total - empty) / count * 1000.0).round() / 1000.0) + 0.0)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::transcript::Line;

    /// A transcript of these lines.
    pub fn transcript(lines: &[&str]) -> Transcript {
        Transcript { lines: lines.iter().map(|l| Line::parse(l)).collect() }
    }

    #[test]
    fn set_up_before_an_empty_bracket_is_not_taken_off_kvms_count() {
        let nested = transcript(&[
            "@L2 event name=empty handled_by=hardware scope=l2 count=1 ticks=10 l0_exits=1337",
            "@L2 event name=l2_cpuid handled_by=nvmx scope=l2 count=1000 ticks=20010 l0_exits=3078",
        ]);
        let row = &events(None, &nested)[0];
        assert_eq!((row.nested, row.l0_exits), (Some(20.0), Some(3.078)));
    }

    #[test]
    fn the_peer_is_measured_by_the_same_bracket() {
        let mut events = sample();
        let kvm = transcript(&[
            "@L2 event name=empty handled_by=hardware scope=l3 count=1 ticks=50 l0_exits=4",
            "@L2 event name=cpuid handled_by=L2 scope=native count=1000 ticks=9 l0_exits=9",
            "@L2 event name=cpuid handled_by=L2 scope=l3 count=1000 ticks=15000050 l0_exits=2004",
        ]);
        add_peer(&mut events, &kvm);
        assert_eq!((events[0].under_kvm, events[0].kvm_exits), (Some(15000.0), Some(2.0)));
        assert_eq!(events[1].under_kvm, None);
    }

    /// A run with a CPUID of L3 and one of L2.
    pub fn sample() -> Vec<Event> {
        let bare = transcript(&[
            "@L2 event name=empty handled_by=hardware scope=native count=1 ticks=10",
            "@L2 event name=cpuid handled_by=hardware scope=native count=1000 ticks=3010",
            "@L2 event name=empty handled_by=hardware scope=l3 count=1 ticks=50",
            "@L2 event name=cpuid handled_by=L2 scope=l3 count=1000 ticks=260050",
            "@L2 event name=l2_cpuid handled_by=nvmx scope=l2 count=100 ticks=310",
        ]);
        let nested = transcript(&[
            "@L2 event name=empty handled_by=hardware scope=l3 count=1 ticks=100 hw_exits=2 l1_ticks=7 l1_vmread=5",
            "@L2 event name=cpuid handled_by=L2 scope=native count=1000 ticks=9999",
            "@L2 event name=cpuid handled_by=L2 scope=l3 count=1000 ticks=1200100 hw_exits=2002 l1_ticks=900007 l1_vmread=19005",
            "@L2 event name=l2_cpuid handled_by=nvmx scope=l2 count=100 ticks=20000 hw_exits=100",
        ]);
        events(Some(&bare), &nested)
    }

    #[test]
    fn of_many_brackets_the_least_of_the_empty_one_is_taken_off() {
        let said = transcript(&[
            "@L2 event name=empty scope=l3 count=1 ticks=90 ticks_p10=60 ticks_p90=200 ticks_least=50 brackets=31",
            "@L2 event name=cpuid handled_by=L2 scope=l3 count=10 ticks=1050 ticks_p10=950 ticks_p90=1250 ticks_least=900",
        ]);
        let event = events(None, &said).remove(0);
        assert_eq!((event.nested, event.nested_p10, event.nested_p90), (Some(100.0), Some(90.0), Some(120.0)));
    }

    #[test]
    fn the_cost_of_the_bracket_is_subtracted_before_dividing() {
        let rows = sample();
        let cpuid = &rows[0];
        assert_eq!((cpuid.native, cpuid.one_level, cpuid.nested), (Some(3.0), Some(260.0), Some(1200.0)));
        assert_eq!((cpuid.hw_exits, cpuid.l1_vmread, cpuid.l1_instructions), (Some(2.0), Some(19.0), Some(900.0)));
        assert_eq!(cpuid.l1_vmwrite, None);
        assert_eq!((cpuid.count, cpuid.handled_by.as_str()), (1000, "L2"));
    }

    #[test]
    fn cycles_are_modelled_from_all_that_is_counted() {
        let mut rows = sample();
        rows[0].l1_vmptrld = Some(2.0);
        (rows[0].under_kvm, rows[0].kvm_exits) = (Some(15_000.0), Some(2.0));
        add_cycles(&mut rows);
        let exits = model::ROUND_TRIP.cycles.mid * 2.0;
        let own = 1200.0 + exits + 19.0 * model::VMREAD.cycles.mid + 2.0 * model::POINTER.cycles.mid;
        assert_eq!(rows[0].cycles.map(|range| range.mid), Some(own));
        assert_eq!(rows[0].kvm_cycles.map(|range| range.mid), Some(15_000.0 + exits));
    }

    #[test]
    fn an_event_of_l2_alone_is_compared_with_the_bare_machine() {
        let rows = sample();
        let own = rows.iter().find(|r| r.event == "l2_cpuid").unwrap();
        assert_eq!((own.native, own.one_level), (Some(3.1), None));
        assert_eq!((own.nested, own.hw_exits), (Some(200.0), Some(1.0)));
        assert_eq!(own.handled_by, "nvmx");
    }

    #[test]
    fn the_calibration_is_no_row_and_a_count_of_zero_has_no_average() {
        let rows = sample();
        assert!(rows.iter().all(|r| r.event != "empty"));
        let none = events(None, &transcript(&["@L2 event name=x scope=l3 count=0 ticks=5"]));
        assert_eq!(none[0].nested, None);
    }
}
