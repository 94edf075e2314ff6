//! Traces for other programs: a timeline (Chrome's JSON, which Perfetto reads), folded stacks and their flame graph, CSV.

use super::file::Boot;
use super::text;
use super::tree::{Builder, Next};
use super::why;
use anyhow::{Context, Result};
use inferno::flamegraph;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Chrome's trace-event JSON: one track a CPU, each exit a slice from its exit to where its guest goes on, the work of each level
/// in it. A microsecond of the timeline stands for a tick.
pub fn timeline(boot: &Boot, built: &Builder) -> Value {
    let mut events = vec![json!({ "ph": "M", "name": "process_name", "pid": 1, "args": { "name": boot.header.name } })];
    let mut cpus: Vec<u32> = built.exits.iter().map(|exit| exit.cpu).collect();
    cpus.sort_unstable();
    cpus.dedup();
    for cpu in cpus {
        events.push(
            json!({ "ph": "M", "name": "thread_name", "pid": 1, "tid": cpu, "args": { "name": format!("CPU {cpu}") } }),
        );
    }
    for (number, exit) in (0u32..).zip(&built.exits) {
        let Some(until) = exit.until else { continue };
        let name = format!("L{} {}", exit.level, exit.reason());
        let detail = why::detail(&exit.facts);
        events.push(slice(
            exit.cpu,
            &name,
            exit.tick,
            until,
            json!({
                "exit": number,
                "detail": detail,
                "qualification": format!("{:#x}", exit.facts.qualification),
                "at": boot.name(exit.level, exit.facts.rip),
                "why": exit.why.to_string(),
                "then": text::after(boot, exit),
            }),
        ));
        let root = &boot.header.levels.name;
        let done = exit.entered;
        events.push(slice(
            exit.cpu,
            root,
            exit.tick,
            done,
            json!({ "work": text::in_root(exit.root).trim_start_matches(", ") }),
        ));
        for (level, from, to) in built.handling(exit) {
            events.push(slice(exit.cpu, &format!("L{level}"), from, to, json!({})));
        }
    }
    json!({
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": { "boot": boot.header.name, "unit": format!("1 us stands for 1 of {}", boot.header.unit) },
    })
}

fn slice(cpu: u32, name: &str, from: u64, to: u64, args: Value) -> Value {
    json!({ "ph": "X", "pid": 1, "tid": cpu, "name": name, "ts": from, "dur": to.saturating_sub(from), "args": args })
}

/// Stacks with their ticks, one a line, as flame graph programs read them: which exit, who worked on it, which exit of theirs,
/// and so on.
pub fn folded(boot: &Boot, built: &Builder) -> String {
    let mut stacks: BTreeMap<String, u64> = BTreeMap::new();
    let mut paths: Vec<String> = Vec::with_capacity(built.exits.len());
    for exit in &built.exits {
        let parent =
            exit.parent.and_then(|parent| Some((paths.get(parent as usize)?, built.exits.get(parent as usize)?)));
        let own = format!("L{} {}", exit.level, exit.reason());
        let path = match parent {
            Some((path, parent)) => match parent.next {
                Next::Reflected { level, .. } => format!("{path};L{level} handles it;{own}"),
                _ => format!("{path};{own}"),
            },
            None => own,
        };
        let mut add = |who: String, ticks: u64| {
            if ticks > 0 {
                *stacks.entry(format!("{path};{who}")).or_default() += ticks;
            }
        };
        add(boot.header.levels.name.clone(), exit.root_ticks);
        for (level, ticks) in &exit.handlers {
            add(format!("L{level} handles it"), *ticks);
        }
        paths.push(path);
    }
    let mut text = String::new();
    for (stack, ticks) in stacks {
        let _ = writeln!(text, "{stack} {ticks}");
    }
    text
}

/// The flame graph of [`folded`] as one SVG, which can be searched and zoomed in a browser.
///
/// # Errors
/// If there is nothing to draw.
pub fn flame(boot: &Boot, built: &Builder) -> Result<String> {
    let folded = folded(boot, built);
    let mut options = flamegraph::Options::default();
    options.title = format!("Where the {} of exits go: {}", boot.header.unit, boot.header.name);
    options.count_name = boot.header.unit.clone();
    options.name_type = "Level:".into();
    options.deterministic = true;
    let mut svg = Vec::new();
    flamegraph::from_lines(&mut options, folded.lines(), &mut svg)
        .context("the trace has no exit that was finished")?;
    Ok(String::from_utf8(svg)?)
}

/// The columns of [`csv`].
const COLUMNS: &str = "exit,cpu,level,tick,cost,reason,detail,qualification,rip,symbol,why,next,root_ticks,handler_ticks,vmread,\
                       vmwrite,vmptrld,vmclear,invept,invvpid,shadow_vmread,shadow_vmwrite,filled,parent";

/// One line an exit; numbers that do not apply are left empty.
pub fn csv(boot: &Boot, built: &Builder) -> String {
    let mut out = format!("{COLUMNS}\n");
    for (number, e) in (0u32..).zip(&built.exits) {
        let or_empty = |value: Option<u64>| value.map_or(String::new(), |v| v.to_string());
        let next = match e.next {
            Next::Open => "open".to_string(),
            Next::Kept => "kept".into(),
            Next::Switched => "switched".into(),
            Next::Reflected { level, .. } => format!("reflected to L{level}"),
            Next::Entered { level } => format!("entered L{level}"),
        };
        let words =
            [why::detail(&e.facts), e.why.to_string(), boot.name(e.level, e.facts.rip)].map(|text| quoted(&text));
        let [detail, why, symbol] = words;
        let _ = writeln!(
            out,
            "{number},{},L{},{},{},{},{detail},{:#x},{:#x},{symbol},{why},{next},{},{},{},{},{},{},{},{},{},{},{},{}",
            e.cpu,
            e.level,
            e.tick,
            or_empty(e.cost),
            quoted(&e.reason().to_string()),
            e.facts.qualification,
            e.facts.rip,
            e.root_ticks,
            e.handler_ticks(),
            e.root.vmread,
            e.root.vmwrite,
            e.root.vmptrld,
            e.root.vmclear,
            e.root.invept,
            e.root.invvpid,
            e.handler.shadow_vmread,
            e.handler.shadow_vmwrite,
            e.fill().map_or(String::new(), |address| format!("{address:#x}")),
            or_empty(e.parent.map(u64::from)),
        );
    }
    out
}

fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_string() }
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::boot;
    use super::*;

    #[test]
    fn every_tick_of_an_exit_is_in_one_stack() {
        let boot = boot();
        let text = folded(&boot, &boot.build());
        let expected = "L2 VMLAUNCH;nvmx 10\nL3 CPUID;L2 handles it 40\nL3 CPUID;L2 handles it;L2 VMRESUME;nvmx 60\n\
                        L3 CPUID;L2 handles it;L2 VMWRITE;nvmx 10\nL3 CPUID;nvmx 50\nL3 EPT_VIOLATION;nvmx 20\n";
        assert_eq!(text, expected);
        let sum: u64 = text.lines().map(|l| l.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()).sum();
        assert_eq!(sum, 10 + 160 + 20);
        let svg = flame(&boot, &boot.build()).unwrap();
        assert!(svg.contains("<svg") && svg.contains("L2 handles it") && svg.contains("VMRESUME"), "{svg}");
    }

    #[test]
    fn slices_of_the_timeline_lie_in_each_other() {
        let boot = boot();
        let value = timeline(&boot, &boot.build());
        let events = value["traceEvents"].as_array().unwrap();
        let of = |name: &str| {
            let found = events.iter().filter(move |e| e["name"] == name);
            found.map(|e| (e["ts"].as_u64().unwrap(), e["dur"].as_u64().unwrap())).collect::<Vec<_>>()
        };
        assert_eq!(of("L3 CPUID"), [(100, 160)]);
        assert_eq!(of("L2"), [(150, 30), (190, 10)]);
        assert_eq!(of("nvmx"), [(20, 10), (100, 50), (180, 10), (200, 60), (300, 20)]);
    }

    #[test]
    fn csv_has_a_line_for_each_exit_with_as_many_columns_as_the_head() {
        let boot = boot();
        let text = csv(&boot, &boot.build());
        assert_eq!(text.lines().count(), 6);
        let columns = text.lines().next().unwrap().split(',').count();
        assert!(text.lines().all(|line| line.split(',').count() == columns), "{text}");
        assert!(text.contains("1,0,L3,100,160,CPUID,leaf 0x0,"), "{text}");
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
    }
}
