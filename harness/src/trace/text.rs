//! Trees in the terminal.

use super::file::{Boot, Source};
use super::log::Counts;
use super::tree::{Builder, Exit, Next};
use super::why;
use crate::text::grouped;

/// A tree, one line an exit and one for what followed it.
pub fn tree(boot: &Boot, built: &Builder, root: u32) -> Vec<String> {
    let mut lines = Vec::new();
    for (depth, number) in built.tree(root) {
        let Some(exit) = built.exits.get(number as usize) else { continue };
        let indent = "|  ".repeat(depth);
        lines.push(format!("{indent}{}", head(boot, number, exit)));
        lines.push(format!("{indent}|  why: {}; {}", exit.why, after(boot, exit)));
        lines.extend(work(boot, exit).into_iter().map(|line| format!("{indent}|  {line}")));
    }
    let (totals, unit) = (built.totals(root), &boot.header.unit);
    let root = built.exits.get(root as usize);
    if let (Some(cost), true) = (root.and_then(|exit| exit.cost), totals.exits > 1) {
        let fills =
            if totals.fills > 0 { format!(", {} entries filled in ept02", totals.fills) } else { String::new() };
        lines.push(format!(
            "`- in all {} {unit}: {} hardware exits, {} {} inside {}{fills}",
            grouped(cost),
            totals.exits,
            grouped(totals.root_ticks),
            unit,
            built.levels().name(built.levels().root)
        ));
    }
    lines
}

/// An exit in one line.
pub fn head(boot: &Boot, number: u32, exit: &Exit) -> String {
    let detail = why::detail(&exit.facts);
    let detail = if detail.is_empty() { detail } else { format!(" {detail}") };
    let (cpu, at) = (exit.cpu, boot.name(exit.level, exit.facts.rip));
    format!("#{number} L{} {}{detail} at {at} (CPU {cpu}, {})", exit.level, exit.reason(), grouped(exit.tick))
}

/// What followed an exit.
pub fn after(boot: &Boot, exit: &Exit) -> String {
    let root = &boot.header.levels.name;
    match exit.next {
        Next::Open => "the guest was not entered again".into(),
        Next::Kept => match exit.fill() {
            Some(address) => format!("{root} fills an entry of its EPT for {address:#x}, L{} goes on", exit.level),
            None => format!("{root} does it alone, L{} goes on", exit.level),
        },
        Next::Switched => format!("{root} enters another guest"),
        Next::Reflected { level, rip } => format!("reflected to L{level} at {}", boot.name(level, rip)),
        Next::Entered { level } => format!("{root} enters L{level}"),
    }
}

/// What the levels did for it.
fn work(boot: &Boot, exit: &Exit) -> Vec<String> {
    let (root, unit) = (&boot.header.levels.name, &boot.header.unit);
    let mut lines = Vec::new();
    if exit.next != Next::Open {
        lines.push(format!("{root}: {} {unit}{}", grouped(exit.root_ticks), in_root(exit.root)));
    }
    if let Next::Reflected { level, .. } = exit.next {
        let (reads, writes) = (exit.handler.shadow_vmread, exit.handler.shadow_vmwrite);
        let shadow = if reads + writes > 0 {
            format!(", {reads} VMREAD and {writes} VMWRITE without an exit")
        } else {
            String::new()
        };
        for (who, ticks) in &exit.handlers {
            let shadow = if *who == level { shadow.as_str() } else { "" };
            lines.push(format!("L{who}: {} {unit}{shadow}", grouped(*ticks)));
        }
    }
    lines
}

/// VMX instructions in words.
pub fn in_root(counts: Counts) -> String {
    let all = [
        (counts.vmread, "VMREAD"),
        (counts.vmwrite, "VMWRITE"),
        (counts.vmptrld.into(), "VMPTRLD"),
        (counts.vmclear.into(), "VMCLEAR"),
        (counts.invept.into(), "INVEPT"),
        (counts.invvpid.into(), "INVVPID"),
    ];
    all.iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, name)| format!(", {} {name}", grouped((*count).into())))
        .collect()
}

/// Who recorded.
pub fn source(boot: &Boot) -> String {
    match (boot.header.source, boot.header.written) {
        (Source::Emulator, _) => "recorded by the emulator".into(),
        (Source::Ring, None) => "recorded by nvmx".into(),
        (Source::Ring, Some(written)) => format!("recorded by nvmx, the last of {}", grouped(written)),
    }
}

/// What a boot's trace holds, in a line or two.
pub fn summary(boot: &Boot, built: &Builder) -> Vec<String> {
    let source = source(boot);
    let mut line = format!("{}: {} exits, {source}", boot.header.name, grouped(built.exits.len() as u64));
    for level in &boot.header.levels.guests {
        let count = built.exits.iter().filter(|exit| exit.level == *level).count();
        line.push_str(&format!(", {} of L{level}", grouped(count as u64)));
    }
    let mut lines = vec![line];
    for failure in built.failures.iter().take(20) {
        lines.push(failed(boot, failure));
    }
    if built.failures.len() > 20 {
        lines.push(format!("... and {} more VMX instructions that failed", built.failures.len() - 20));
    }
    lines
}

fn failed(boot: &Boot, failure: &super::tree::Failure) -> String {
    let name = nvmx::vmx::VmxError::ALL.iter().find(|e| **e as u32 == failure.error);
    let text = name.map_or(String::new(), |e| format!(" ({})", e.text()));
    let after = failure.after.map_or(String::new(), |n| format!(", after exit #{n}"));
    let at = boot.name(failure.level, failure.rip);
    format!("a VMX instruction of L{} failed with error {}{text} at {at}{after}", failure.level, failure.error)
}

#[cfg(test)]
mod tests {
    use super::super::file::tests::boot;
    use super::*;

    #[test]
    fn a_tree_tells_of_each_exit_why_it_came_and_what_followed() {
        let boot = boot();
        let lines = tree(&boot, &boot.build(), 1);
        let expected = [
            "#1 L3 CPUID leaf 0x0 at 0x1064 (CPU 0, 100)",
            "|  why: always exits; reflected to L2 at 0x2096",
            "|  nvmx: 50 instructions, 10 VMREAD",
            "|  L2: 40 instructions",
            "|  #2 L2 VMWRITE VIRTUAL_PROCESSOR_ID at 0x10b4 (CPU 0, 180)",
            "|  |  why: always exits; nvmx does it alone, L2 goes on",
            "|  |  nvmx: 10 instructions, 1 VMREAD",
            "|  #3 L2 VMRESUME at 0x10c8 (CPU 0, 200)",
            "|  |  why: always exits; nvmx enters L3",
            "|  |  nvmx: 60 instructions, 10 VMREAD",
            "`- in all 160 instructions: 3 hardware exits, 120 instructions inside nvmx",
        ];
        assert_eq!(lines, expected);
        assert_eq!(summary(&boot, &boot.build()), ["sample: 5 exits, recorded by the emulator, 3 of L2, 2 of L3"]);
    }
}
