//! The drawings of the page. Colours are those of the levels, from the page's style.

use super::super::Event;
use crate::text::escape;
use crate::text::{grouped, number};
use crate::trace::stat::Row;
use crate::trace::tree::Builder;
use crate::transcript::stack::StackLevel;
use std::fmt::Write;

const WIDE: f64 = 1100.0;

/// The number of a level's colour.
fn colour(level: u8) -> u8 {
    level.min(4)
}

fn svg(height: f64, title: &str, body: &str) -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDE} {height:.0}\" role=\"img\" aria-label=\"{0}\"><title>{0}</title>\n{body}</svg>\n",
        escape(title)
    )
}

fn text(out: &mut String, x: f64, y: f64, class: &str, words: &str) {
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{}</text>", escape(words));
}

fn bar(out: &mut String, [x, y, width, height]: [f64; 4], class: &str, tip: &str) {
    let _ = writeln!(
        out,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{height:.1}\" rx=\"2\" class=\"{class}\"><title>{}</title></rect>",
        width.max(0.8),
        escape(tip)
    );
}

/// The levels as boxes, the innermost guest on top.
pub fn stack(levels: &[StackLevel]) -> String {
    const STEP: f64 = 74.0;
    let mut out = String::new();
    let count = levels.len();
    for (n, level) in levels.iter().rev().enumerate() {
        let number = count - 1 - n;
        let (y, inset) = (8.0 + n as f64 * STEP, n as f64);
        let (x, width) = (8.0 + (count as f64 - 1.0 - inset) * 26.0, WIDE - 16.0 - (count as f64 - 1.0 - inset) * 52.0);
        let class = format!("box s{}", colour(number as u8));
        let _ = writeln!(
            out,
            "<rect x=\"{x:.0}\" y=\"{y:.0}\" width=\"{width:.0}\" height=\"52\" rx=\"9\" class=\"{class}\"/>\
             <rect x=\"{x:.0}\" y=\"{y:.0}\" width=\"46\" height=\"52\" rx=\"9\" class=\"f{}\"/>",
            colour(number as u8)
        );
        text(&mut out, x + 23.0, y + 31.0, "mid big in", &level.level);
        text(&mut out, x + 60.0, y + 22.0, "big", format!("{} {}", level.name, level.version).trim());
        let more = [level.cpu.clone(), level.features.join(" ")];
        let more = more.iter().filter(|t| !t.is_empty()).cloned().collect::<Vec<_>>().join(" · ");
        text(&mut out, x + 60.0, y + 41.0, "dim", &shortened(&more, ((width - 70.0) / 6.4) as usize));
        if n > 0 {
            let above = count - n;
            let what = match above {
                1 => "runs on the processor's VMX".to_string(),
                2 => "vmcs01, ept01".into(),
                3 => "vmcs12 of L2, vmcs02 in fact; ept12 of L2, ept02 in fact".into(),
                _ => "a VMCS of the level below, merged by each level under it".into(),
            };
            text(&mut out, WIDE / 2.0, y - 7.0, "mid dim", &format!("↑ {what}"));
        }
    }
    svg(count as f64 * STEP + 4.0, "The levels of the run", &out)
}

fn shortened(words: &str, most: usize) -> String {
    if words.chars().count() <= most {
        words.into()
    } else {
        words.chars().take(most.saturating_sub(1)).collect::<String>() + "…"
    }
}

/// One bar an event: what L3 itself, L2's handler and nvmx take. Bars that are much longer than most are cut.
pub fn stages(events: &[Event], unit: &str) -> String {
    const LEFT: f64 = 150.0;
    const RIGHT: f64 = 190.0;
    let parts = |e: &Event| {
        let (whole, inside) = (e.nested?, e.l1_instructions?);
        let own = e.native.unwrap_or(0.0).clamp(0.0, (whole - inside).max(0.0));
        Some((own, (whole - inside - own).max(0.0), inside.max(0.0), whole))
    };
    let rows: Vec<(&Event, _)> = events.iter().filter_map(|e| Some((e, parts(e)?))).collect();
    let mut wholes: Vec<f64> = rows.iter().map(|(_, p)| p.3).collect();
    wholes.sort_by(f64::total_cmp);
    let most = wholes.get(wholes.len() * 9 / 10).copied().unwrap_or(1.0).max(1.0) * 1.05;
    let scale = (WIDE - LEFT - RIGHT) / most;
    let mut out = String::new();
    for (n, (event, (own, l2, inside, whole))) in rows.iter().enumerate() {
        let y = 6.0 + n as f64 * 20.0;
        text(&mut out, LEFT - 8.0, y + 11.5, "end", &event.event);
        let mut x = LEFT;
        for (value, level, who) in [(*own, 3, "L3 itself"), (*l2, 2, "L2"), (*inside, 1, "nvmx")] {
            let width = (value * scale).min(LEFT + most * scale - x).max(0.0);
            if value > 0.0 {
                bar(
                    &mut out,
                    [x, y, width, 15.0],
                    &format!("f{level}"),
                    &format!("{who}: {} {unit}", number(Some(value))),
                );
            }
            x += width;
        }
        let cut = if *whole > most { " » cut" } else { "" };
        let words = format!("{}{cut}  ({} exits)", number(Some(*whole)), number(event.hw_exits));
        text(&mut out, x + 6.0, y + 11.5, "dim", &words);
    }
    svg(rows.len() as f64 * 20.0 + 10.0, "Cost of one event by stage", &out)
}

/// Bars of how often each reason occurred, by level; ten times as often is one step.
pub fn reasons(rows: &[Row]) -> String {
    const LEFT: f64 = 230.0;
    let most = rows.iter().map(|r| r.count).max().unwrap_or(1).max(2) as f64;
    let mut rows: Vec<&Row> = rows.iter().collect();
    rows.sort_by_key(|row| std::cmp::Reverse((row.level, row.count)));
    let mut out = String::new();
    for (n, row) in rows.iter().enumerate() {
        let y = 6.0 + n as f64 * 20.0;
        text(&mut out, LEFT - 8.0, y + 11.5, "end", &format!("L{} {}", row.level, row.reason));
        let length = |count: u64| ((1.0 + count as f64).log10() / (1.0 + most).log10()) * (WIDE - LEFT - 260.0);
        let tip = format!("{} exits, {} of them reflected", grouped(row.count), grouped(row.reflected));
        bar(&mut out, [LEFT, y, length(row.count), 15.0], &format!("f{}", colour(row.level)), &tip);
        let words = format!("{}, {:.1} % of the ticks", grouped(row.count), row.share);
        text(&mut out, LEFT + length(row.count) + 6.0, y + 11.5, "dim", &words);
    }
    svg(rows.len() as f64 * 20.0 + 10.0, "Exits by reason and level (logarithmic)", &out)
}

/// Costs of an event with more and more hypervisors below it, ten times as much is one step.
pub fn depth(series: &[(String, Vec<Option<f64>>)], names: &[String], unit: &str) -> String {
    const LEFT: f64 = 150.0;
    let most = series.iter().flat_map(|(_, v)| v).flatten().copied().fold(10.0, f64::max);
    let x = |value: f64| LEFT + (1.0 + value.max(0.0)).log10() / (1.0 + most).log10() * (WIDE - LEFT - 120.0);
    let mut out = String::new();
    let height = series.len() as f64 * 30.0;
    let mut power = 1.0;
    while power <= most {
        let _ = writeln!(
            out,
            "<line x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"4\" y2=\"{1:.0}\" class=\"axis\"/>",
            x(power),
            height + 6.0
        );
        text(&mut out, x(power), height + 20.0, "mid dim", &grouped(power as u64));
        power *= 10.0;
    }
    for (n, (event, values)) in series.iter().enumerate() {
        let y = 20.0 + n as f64 * 30.0;
        text(&mut out, LEFT - 8.0, y + 4.0, "end", event);
        let ends: Vec<f64> = values.iter().flatten().map(|v| x(*v)).collect();
        if let (Some(first), Some(last)) = (ends.first(), ends.last()) {
            let _ = writeln!(
                out,
                "<line x1=\"{first:.1}\" x2=\"{last:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\" class=\"axis\" style=\"stroke-width:3\"/>"
            );
        }
        for (level, value) in values.iter().enumerate() {
            let Some(value) = value else { continue };
            let class = [3, 2, 1, 4, 0][level.min(4)];
            let tip = format!("{}: {} {unit}", names.get(level).map_or("", String::as_str), number(Some(*value)));
            let _ = writeln!(
                out,
                "<circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"6\" class=\"f{class}\"><title>{}</title></circle>",
                x(*value),
                escape(&tip)
            );
            text(&mut out, x(*value), y - 9.0, "mid dim", &number(Some(*value)));
        }
    }
    svg(height + 26.0, "The cascade by depth (logarithmic)", &out)
}

/// For each reason how its costs are spread: a histogram over a logarithmic axis, with median and 99th percentile.
pub fn spread(built: &Builder, rows: &[Row]) -> String {
    const LEFT: f64 = 230.0;
    const BINS: usize = 120;
    let level = rows.iter().map(|r| r.level).max().unwrap_or(0);
    let rows: Vec<&Row> = rows.iter().filter(|r| r.level == level && r.count >= 5 && r.max > 0).take(14).collect();
    let least = rows.iter().map(|r| r.min.max(1)).min().unwrap_or(1) as f64;
    let most = rows.iter().map(|r| r.max).max().unwrap_or(10) as f64 * 1.02;
    let part = |cost: f64| ((cost.max(1.0) / least).ln() / (most / least).ln().max(0.01)).clamp(0.0, 1.0);
    let wide = WIDE - LEFT - 30.0;
    let height = rows.len() as f64 * 44.0;
    let mut out = String::new();
    let mut power = 10f64.powf(least.log10().floor());
    while power <= most {
        if power >= least {
            let x = LEFT + part(power) * wide;
            let _ =
                writeln!(out, "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"4\" y2=\"{:.0}\" class=\"axis\"/>", height + 4.0);
            text(&mut out, x, height + 18.0, "mid dim", &grouped(power as u64));
        }
        power *= 10.0;
    }
    for (n, row) in rows.iter().enumerate() {
        let base = 36.0 + n as f64 * 44.0;
        let mut bins = [0u64; BINS];
        let same = |e: &&crate::trace::tree::Exit| e.level == row.level && e.reason().to_string() == row.reason;
        for cost in built.exits.iter().filter(same).filter_map(|e| e.cost) {
            bins[((part(cost as f64) * (BINS - 1) as f64) as usize).min(BINS - 1)] += 1;
        }
        let top = bins.iter().copied().max().unwrap_or(1).max(1) as f64;
        text(&mut out, LEFT - 8.0, base - 8.0, "end", &row.reason);
        text(&mut out, LEFT - 8.0, base + 5.0, "end dim", &format!("{} exits", grouped(row.count)));
        for (bin, count) in bins.iter().enumerate().filter(|(_, count)| **count > 0) {
            let high = (1.0 + *count as f64).ln() / (1.0 + top).ln() * 28.0;
            let x = LEFT + bin as f64 / (BINS - 1) as f64 * wide;
            let tip = format!("{} exits", grouped(*count));
            bar(&mut out, [x, base - high, wide / BINS as f64, high], &format!("f{}", colour(row.level)), &tip);
        }
        for (value, name) in [(row.p50, "p50"), (row.p99, "p99")] {
            let x = LEFT + part(value as f64) * wide + wide / BINS as f64 / 2.0;
            let _ = writeln!(
                out,
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" class=\"tick\"><title>{name}: {}</title></line>",
                base,
                base + 6.0,
                grouped(value)
            );
        }
    }
    svg(height + 24.0, "Spread of the cost per exit (both axes logarithmic)", &out)
}

/// One tree in time: a lane a level, from the exit to where its guest goes on.
pub fn timeline(built: &Builder, root: u32) -> String {
    let Some((tree, cost)) = built.exits.get(root as usize).and_then(|e| Some((e, e.cost?))) else {
        return String::new();
    };
    let levels: Vec<u8> = std::iter::once(built.levels().root).chain(built.levels().guests.iter().copied()).collect();
    let lane = |level: u8| levels.iter().rev().position(|l| *l == level).unwrap_or(0) as f64;
    const LEFT: f64 = 70.0;
    let scale = (WIDE - LEFT - 20.0) / cost.max(1) as f64;
    let x = |tick: u64| LEFT + tick.saturating_sub(tree.tick) as f64 * scale;
    let mut out = String::new();
    for level in &levels {
        let y = 10.0 + lane(*level) * 40.0;
        text(&mut out, LEFT - 10.0, y + 19.0, "end", &built.levels().name(*level));
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{1:.1}\" y2=\"{1:.1}\" class=\"axis\"/>",
            WIDE - 20.0,
            y + 34.0
        );
    }
    let mut run = |level: u8, from: u64, to: u64, tip: &str, words: &str| {
        let (y, width) = (10.0 + lane(level) * 40.0, (to.saturating_sub(from)) as f64 * scale);
        bar(&mut out, [x(from), y + 2.0, width, 30.0], &format!("f{}", colour(level)), tip);
        if width > 7.0 * words.len() as f64 + 8.0 {
            text(&mut out, x(from) + width / 2.0, y + 21.0, "mid in", words);
        }
    };
    for (_, number) in built.tree(root) {
        let Some(exit) = built.exits.get(number as usize) else { continue };
        let done = exit.tick + exit.root_ticks;
        let words = format!("L{} {}: {}", exit.level, exit.reason(), grouped(exit.root_ticks));
        run(built.levels().root, exit.tick, done, &words, &words);
        for (level, from, to) in built.handling(exit) {
            let ticks = grouped(to.saturating_sub(from));
            run(level, from, to, &format!("L{level}: {ticks}"), &ticks);
        }
    }
    svg(levels.len() as f64 * 40.0 + 14.0, &format!("L{} {} in time", tree.level, tree.reason()), &out)
}
