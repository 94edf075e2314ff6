//! docs/lab.md, docs/lab.zh.md and their plots: all figures in them come from docs/lab-figures.json, which `lab --bless` writes.

use super::EXPERIMENTS;
use super::figures::FIRST_SIGHT_TICKS;
use super::figures::{Boot, Figures, SCHEMA};
use super::text;
use anyhow::{Context, Result, ensure};
use nvmx_setup::output::Output;
use std::path::{Path, PathBuf};

/// The pages that tell the story.
pub const PAGES: [&str; 2] = ["docs/lab.md", "docs/lab.zh.md"];

/// Where the figures are.
pub fn figures_file(root: &Path) -> PathBuf {
    root.join("docs/lab-figures.json")
}

/// The figures that the pages show.
///
/// # Errors
/// If the file is not there or is no such file.
pub fn read(root: &Path) -> Result<Figures> {
    let path = figures_file(root);
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let figures: Figures = serde_json::from_str(&text).with_context(|| format!("{} is no figures", path.display()))?;
    ensure!(figures.schema == SCHEMA, "{} has schema {}, not {SCHEMA}", path.display(), figures.schema);
    Ok(figures)
}

/// What each file has to contain: the plots, and the pages with their blocks made anew.
///
/// # Errors
/// If a page cannot be read or lacks a block.
pub fn rendered(root: &Path, figures: &Figures) -> Result<Vec<(PathBuf, String)>> {
    let mut files: Vec<(PathBuf, String)> =
        EXPERIMENTS.iter().map(|e| (root.join(format!("docs/lab/{}.svg", e.name)), (e.plot)(figures).svg())).collect();
    for page in PAGES {
        let path = root.join(page);
        let mut text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        for e in EXPERIMENTS {
            let block = format!("```\n$ ./nvmx lab {}\n{}```\n", e.name, text::measured(figures, e));
            text =
                with_block(&text, e.name, &block).with_context(|| format!("{page} has no block `lab {}`", e.name))?;
        }
        let tree = format!("```\n$ ./nvmx lab price --trace\n...\n{}\n...\n```\n", figures.trace.join("\n"));
        text = with_block(&text, "trace", &tree).with_context(|| format!("{page} has no block `lab trace`"))?;
        let overview = format!("```\n$ ./nvmx lab\n{}\n```\n", text::overview(figures, &EXPERIMENTS));
        text = with_block(&text, "all", &overview).with_context(|| format!("{page} has no block `lab all`"))?;
        files.push((path, text));
    }
    Ok(files)
}

/// The text with what stands between the two marks replaced.
fn with_block(text: &str, name: &str, block: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- lab {name}: begin -->\n"), format!("<!-- lab {name}: end -->"));
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}{block}{end}{after}"))
}

/// Writes figures, plots and pages.
///
/// # Errors
/// If a file cannot be written.
pub fn bless(root: &Path, figures: &Figures) -> Result<()> {
    let json = serde_json::to_string_pretty(figures)? + "\n";
    std::fs::create_dir_all(root.join("docs/lab"))?;
    for (path, text) in rendered(root, figures)?.into_iter().chain([(figures_file(root), json)]) {
        Output::prepare(&path)?.write(&text)?;
    }
    Ok(())
}

/// How far instructions may be from the recorded ones: the compiler and every change of nvmx move them a little.
const TOLERANCE: f64 = 0.25;
/// Rows whose exits may be as far: they follow the clock, which runs on while the levels below work, or depend on which pages the
/// compiler puts the guest's code and data on. All other exits are told exactly.
const LOOSE: [&str; 4] = ["mmio/", "paging/shadow", "cow/shadow", "cow/filtered"];
/// So many hardware exits in a bracket of many events may be nvmx's first sight of a page, and so many in one of few.
const FIRST_SIGHTS: [f64; 2] = [8.0, 2.0];

/// How far a figure may be from the recorded one.
fn allowed(row: &str, key: &str, value: f64, count: f64) -> f64 {
    let loose = LOOSE.iter().any(|start| row.starts_with(start));
    match key {
        "exits" if !loose => 0.0,
        key if key.starts_with("x_") && !loose => 0.0,
        "hw_exits" if !loose => FIRST_SIGHTS[usize::from(count < 100.0)] / count.max(1.0),
        "ticks" => TOLERANCE * value.abs().max(20.0) + FIRST_SIGHT_TICKS / count.max(1.0),
        _ => TOLERANCE * value.abs().max(20.0),
    }
}

/// Where a boot's figures are not the recorded ones.
pub fn differences(recorded: &Boot, run: &Boot) -> Vec<String> {
    let mut found = Vec::new();
    for (row, figures) in &recorded.rows {
        let Some(now) = run.rows.get(row) else {
            found.push(format!("{row} was not measured"));
            continue;
        };
        for (key, value) in figures {
            let new = now.get(key).copied().unwrap_or(0.0);
            let allowed = allowed(row, key, *value, figures.get("count").copied().unwrap_or(1.0));
            if (new - value).abs() > allowed + 1e-9 {
                found.push(format!("{row}: {key} is {new}, recorded {value}"));
            }
        }
    }
    found.extend(run.rows.keys().filter(|row| !recorded.rows.contains_key(*row)).map(|row| format!("{row} is new")));
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Verdict;

    fn root() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
    }

    #[test]
    fn pages_and_plots_are_what_the_recorded_figures_make_of_them() {
        let figures = read(root()).unwrap();
        for (path, text) in rendered(root(), &figures).unwrap() {
            let there = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(there == text, "{} is not made from docs/lab-figures.json: ./nvmx lab --bless", path.display());
        }
    }

    /// The parts of a chapter, in order: claim, mechanism, experiment, and the two questions.
    const PARTS: [[&str; 4]; 2] = [
        ["**Claim.**", "**Mechanism.**", "**Experiment.**", "**Two questions.**"],
        ["**论断。**", "**机制。**", "**实验。**", "**两个问题。**"],
    ];

    #[test]
    fn each_chapter_has_its_parts_in_order_in_both_languages() {
        for (page, parts) in PAGES.into_iter().zip(PARTS) {
            let text = std::fs::read_to_string(root().join(page)).unwrap();
            let chapters: Vec<&str> =
                text.split("\n## ").filter(|c| c.starts_with(|c: char| c.is_ascii_digit())).collect();
            assert_eq!(chapters.len(), EXPERIMENTS.len(), "{page}");
            for (chapter, e) in chapters.into_iter().zip(EXPERIMENTS) {
                let at = |what: &str| chapter.find(what).unwrap_or_else(|| panic!("{page}, {}: no {what}", e.name));
                let [claim, mechanism, experiment, questions] = parts.map(at);
                let output = at(&format!("<!-- lab {}: begin -->", e.name));
                let plot = at(&format!("](lab/{}.svg)", e.name));
                let order = [claim, mechanism, experiment, output, plot, questions];
                assert!(order.is_sorted(), "{page}, {}: {order:?}", e.name);
                assert!(chapter[mechanism..experiment].contains("SDM"), "{page}, {}: which chapter?", e.name);
                // A question in italics, its answer on the next line.
                let asked = chapter[questions..].lines().filter(|l| l.starts_with("1. *")).count();
                let answered = chapter[questions..].lines().filter(|l| l.starts_with("   ")).count();
                assert_eq!((asked, answered), (2, 2), "{page}, {}", e.name);
            }
        }
    }

    #[test]
    fn the_code_of_an_experiment_can_be_read_in_class() {
        const MOST: usize = 250;
        for folder in ["l2-guests/lab/src", "l2-guests/lab/src/experiments", "harness/src/lab"] {
            for file in std::fs::read_dir(root().join(folder)).unwrap() {
                let path = file.unwrap().path();
                if path.extension().is_none_or(|e| e != "rs") {
                    continue;
                }
                let text = std::fs::read_to_string(&path).unwrap();
                let inside = folder.ends_with("experiments") && !path.ends_with("mod.rs");
                assert!(text.lines().count() < MOST, "{}", path.display());
                assert!(!inside || text.split("\nuse ").next().unwrap().contains("Mechanism: "), "{}", path.display());
            }
        }
    }

    #[test]
    fn the_recorded_figures_bear_every_claim_out() {
        let figures = read(root()).unwrap();
        for e in EXPERIMENTS {
            let judgement = (e.judge)(&figures);
            let failed: Vec<_> = judgement.asserted.iter().filter(|(_, holds)| !holds).collect();
            assert!(failed.is_empty(), "{}: {failed:?}", e.name);
            assert_ne!(judgement.verdict, Verdict::NotMeasured, "{}", e.name);
        }
    }

    #[test]
    fn a_claim_falls_when_its_counts_do() {
        let figures = read(root()).unwrap();
        for (e, stack, row, key, value) in [
            ("msr_bitmap", "nested", "msr_bitmap/rdmsr_passed/l3", "hw_exits", 1.0),
            ("price", "twice", "price/rdtsc/l3", "hw_exits", 4.0),
            ("syscall", "one", "syscall/syscall/l3", "exits", 1.0),
            ("rings", "one", "rings/sidt/native", "guest_wrong", 1.0),
            ("paging", "one", "paging/walk_4k_4k/l3", "references", 20.0),
            ("mmio", "one", "mmio/sampled/l3", "exits", 0.01),
            ("cow", "nested", "cow/filtered_call/l3", "write_exits", 128.0),
            ("security", "twice", "security/rootkit_guarded/l3", "alarms", 31.0),
            ("cascade", "thrice", "cascade/cpuid/l3", "hw_exits", 16.0),
            ("compare", "kvm", "price/cpuid/l3", "ticks", 100.0),
        ] {
            let mut wrong = figures.clone();
            let row = wrong.boots.get_mut(stack).and_then(|b| b.rows.get_mut(row)).expect(e);
            assert_ne!(row.insert(key.into(), value), Some(value), "{e}");
            let judged = (super::super::find(e).unwrap().judge)(&wrong);
            assert_eq!(judged.verdict, Verdict::Contradicted, "{e}");
        }
    }

    #[test]
    fn exits_are_compared_exactly_and_instructions_are_not() {
        let boot = |ticks: f64, exits: f64| {
            let of = [("count", 1000.0), ("ticks", ticks), ("hw_exits", exits)];
            let row = of.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
            Boot { rows: [("a/b/l3".to_string(), row)].into(), ..Boot::default() }
        };
        assert!(differences(&boot(1000.0, 2.0), &boot(1050.0, 2.0)).is_empty());
        assert_eq!(differences(&boot(1000.0, 2.0), &boot(1000.0, 3.0)).len(), 1);
        assert_eq!(differences(&boot(1000.0, 2.0), &boot(2000.0, 2.0)).len(), 1);
        assert_eq!(differences(&boot(1000.0, 2.0), &Boot::default()).len(), 1);
        assert_eq!(differences(&Boot::default(), &boot(1000.0, 2.0)).len(), 1);
    }
}
