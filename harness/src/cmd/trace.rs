//! `trace`: what `run --trace` recorded, as trees in words or for other programs.

use crate::cli::{TraceArgs, TraceFormat};
use crate::trace::file::{self, Boot};
use crate::trace::tree::Builder;
use crate::trace::{export, stat, text};
use anyhow::Result;
use nvmx::vmx::exit::BasicReason;
use nvmx_setup::error::Stop;
use nvmx_setup::output::Output;
use nvmx_setup::ui::Ui;
use std::path::Path;

/// Trees before and after the one that is asked for.
const AROUND: usize = 3;

/// Runs the command.
///
/// # Errors
/// [`Stop::Usage`] if the file is no trace, or has no such boot, reason or exit.
pub fn run(ui: &Ui, args: &TraceArgs) -> Result<()> {
    let reason = args.reason.as_deref().map(reason).transpose().map_err(Stop::Usage)?;
    let output = Output::prepare(args.output.as_deref().unwrap_or(Path::new("-")))?;
    let trace = file::read(&args.file).map_err(|error| Stop::Usage(format!("{error:#}")))?;
    let boot = trace.boot(args.boot.as_deref()).map_err(Stop::Usage)?;
    let built = boot.build();
    let text = match args.format {
        TraceFormat::Text => {
            let others = trace.boots.iter().filter(|b| b.header.name != boot.header.name);
            let others: Vec<&str> = others.map(|boot| boot.header.name.as_str()).collect();
            words(boot, &built, args, reason, &others)?
        }
        TraceFormat::Perfetto => serde_json::to_string(&export::timeline(boot, &built))? + "\n",
        TraceFormat::Folded => export::folded(boot, &built),
        TraceFormat::Svg => export::flame(boot, &built)?,
        TraceFormat::Csv => export::csv(boot, &built),
    };
    if args.output.is_some() {
        output.write(&text)?;
    } else {
        text.lines().for_each(|line| ui.line(line));
    }
    Ok(())
}

/// An exit reason by its name or number.
fn reason(word: &str) -> Result<BasicReason, String> {
    let name = word.to_uppercase().replace(['-', ' '], "_");
    let number = word.parse().ok();
    let found = BasicReason::KNOWN.iter().find(|r| r.name() == Some(&*name) || number == Some(r.0));
    let known = || BasicReason::KNOWN.iter().filter_map(|r| r.name()).collect::<Vec<_>>().join(", ");
    found.copied().ok_or_else(|| format!("there is no exit reason `{word}`; there are: {}", known()))
}

fn words(
    boot: &Boot,
    built: &Builder,
    args: &TraceArgs,
    reason: Option<BasicReason>,
    others: &[&str],
) -> Result<String, Stop> {
    let mut lines = text::summary(boot, built);
    let selected = args.around.is_some() || args.top.is_some() || reason.is_some() || args.level.is_some();
    let (trees, left) = if selected {
        select(built, args, reason)?
    } else {
        lines.push(String::new());
        lines.push(stat::title(&boot.header.name, &boot.header.unit));
        lines.push(stat::render(&stat::rows(built)));
        lines.push(
            "The median tree of each level and reason (--reason, --level, --top and --around N show others):".into(),
        );
        (stat::medians(built), 0)
    };
    for root in trees {
        lines.push(String::new());
        lines.extend(text::tree(boot, built, root));
    }
    if left > 0 {
        lines.push(format!("... and {left} more trees (--limit)"));
    }
    if !others.is_empty() && !selected {
        lines.push(format!("also in the file (--boot NAME): {}", others.join(", ")));
    }
    Ok(lines.join("\n") + "\n")
}

/// The trees that were asked for, and how many more there are.
fn select(built: &Builder, args: &TraceArgs, reason: Option<BasicReason>) -> Result<(Vec<u32>, usize), Stop> {
    let roots: Vec<u32> = built.roots().collect();
    if let Some(number) = args.around {
        if built.exits.get(number as usize).is_none() {
            let text = format!("there is no exit #{number}: the trace has {}, from #0", built.exits.len());
            return Err(Stop::Usage(text));
        }
        let root = built.root_of(number);
        let at = roots.iter().position(|tree| *tree == root).unwrap_or(0);
        let (from, to) = (at.saturating_sub(AROUND), (at + AROUND + 1).min(roots.len()));
        return Ok((roots[from..to].to_vec(), 0));
    }
    let exit = |number: &u32| built.exits.get(*number as usize);
    let has = |root: &u32| match reason {
        None => true,
        Some(reason) => built.tree(*root).iter().any(|(_, n)| exit(n).is_some_and(|e| e.reason().basic() == reason)),
    };
    let level = |root: &u32| args.level.is_none_or(|level| exit(root).is_some_and(|e| e.level == level));
    let mut trees: Vec<u32> = roots.into_iter().filter(|root| level(root) && has(root)).collect();
    if let Some(top) = args.top {
        trees.sort_by_key(|root| std::cmp::Reverse(exit(root).and_then(|exit| exit.cost)));
        trees.truncate(top);
    }
    let left = trees.len().saturating_sub(args.limit);
    trees.truncate(args.limit);
    Ok((trees, left))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Cmd};
    use crate::trace::file::tests::boot;
    use clap::Parser;

    fn shown(options: &[&str]) -> Result<String, Stop> {
        let line = ["nvmx", "trace", "file"].iter().chain(options);
        let Cmd::Trace(args) = Cli::parse_from(line).command else { unreachable!() };
        let boot = boot();
        words(&boot, &boot.build(), &args, args.reason.as_deref().map(|r| reason(r).unwrap()), &["other"])
    }

    #[test]
    fn without_a_wish_one_tree_of_each_kind_is_shown() {
        let text = shown(&[]).unwrap();
        for part in ["#1 L3 CPUID", "#4 L3 EPT_VIOLATION", "#0 L2 VMLAUNCH", "--boot NAME): other", "share"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn trees_are_chosen_by_reason_level_cost_and_number() {
        let text = shown(&["--reason", "vmwrite"]).unwrap();
        assert!(text.contains("#1 L3 CPUID") && !text.contains("#4 "), "{text}");
        assert!(!shown(&["--level", "L2"]).unwrap().contains("L3 CPUID"));
        let top = shown(&["--top", "1"]).unwrap();
        assert!(top.contains("#1 L3 CPUID") && !top.contains("#0 ") && !top.contains("#4 "), "{top}");
        let text = shown(&["--around", "3"]).unwrap();
        assert!(text.contains("#0 ") && text.contains("#1 ") && text.contains("#4 "), "{text}");
        assert!(shown(&["--around", "99"]).unwrap_err().to_string().contains("has 5, from #0"));
        assert!(shown(&["--level", "3", "--limit", "1"]).unwrap().contains("and 1 more trees"));
        assert_eq!(reason("10").unwrap(), BasicReason::CPUID);
        assert!(reason("cpuidd").unwrap_err().contains("there are: EXCEPTION_OR_NMI"));
    }
}
