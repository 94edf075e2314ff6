//! `--report FILE.html`: one page that needs nothing else.

use super::experiment::{Experiment, Judgement, Table, Verdict, levels};
use super::figures::Figures;
use super::text;
use crate::report::plot::STYLE;
use crate::text::escape;
use std::fmt::Write;

/// The page: all verdicts, then for each experiment the claim, the plot beside it, the table, the sources.
pub fn html(figures: &Figures, wanted: &[&Experiment]) -> String {
    let judged: Vec<(&&Experiment, Judgement)> = wanted.iter().map(|e| (e, (e.judge)(figures))).collect();
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>nvmx: the VM-exit lab</title>\n\
         <meta name=\"viewport\" content=\"width=device-width\"><meta name=\"color-scheme\" content=\"light dark\">\n\
         <style>\n{STYLE}</style></head><body>\n<h1>The VM-exit lab</h1>\n<p>Measured on {}. {}</p>\n",
        escape(&figures.machine),
        escape(&text::cycles_note(figures)),
    );
    page += &overview(figures, &judged);
    judged.iter().for_each(|(e, judgement)| page += &section(figures, e, judgement));
    let _ = write!(
        page,
        "<section id=\"model\"><h2>The model of cycles</h2><p>Instructions and the sum of these costs.</p>{}</section>\n</body></html>\n",
        table(&text::constants_table())
    );
    page
}

fn overview(figures: &Figures, judged: &[(&&Experiment, Judgement)]) -> String {
    let head: Vec<String> =
        levels(figures).iter().map(|(_, name)| format!("<th class=\"say\">{}</th>", escape(name))).collect();
    let mut text = format!(
        "<div class=\"wide\"><table><tr><th>experiment</th><th class=\"say\">claim</th>{}<th class=\"say\">verdict</th></tr>\n",
        head.concat()
    );
    for (e, judgement) in judged {
        let levels: Vec<String> =
            judgement.levels.iter().map(|level| format!("<td class=\"say\">{}</td>", escape(level))).collect();
        let _ = writeln!(
            text,
            "<tr><td><a href=\"#{0}\">{0}</a></td><td class=\"say\">{1}</td>{2}<td class=\"say\">{3}</td></tr>",
            e.name,
            escape(e.claim),
            levels.concat(),
            judgement.verdict.word()
        );
    }
    text + "</table></div>\n"
}

fn section(figures: &Figures, e: &Experiment, judgement: &Judgement) -> String {
    let class = match judgement.verdict {
        Verdict::Contradicted => "bad",
        Verdict::Holds => "good",
        _ => "part",
    };
    let made = (e.table)(figures);
    let measured = judgement.verdict != Verdict::NotMeasured;
    let kept = judgement.asserted.iter().filter(|(_, holds)| *holds).count();
    let why = if measured {
        format!("{} Asserted by counts: {kept} of {} hold.", judgement.why, judgement.asserted.len())
    } else {
        "A figure is missing, so that nothing is asserted.".into()
    };
    let mut text =
        format!("<section id=\"{}\"><h2>{}. {}</h2>\n<div class=\"two\"><div>\n", e.name, e.number, escape(e.title));
    for (what, said) in
        [("Claim", e.claim), ("Condition", e.condition), ("Mechanism", e.mechanism), ("Experiment", e.method)]
    {
        let _ = writeln!(text, "<p><b>{what}.</b> {}</p>", escape(said));
    }
    let _ = write!(
        text,
        "<p class=\"{class}\"><b>Verdict: {}.</b> {}</p></div>\n<div>{}</div></div>\n{}",
        judgement.verdict.word(),
        escape(&why),
        (e.plot)(figures).svg(),
        table(&made)
    );
    let fallen =
        judgement.asserted.iter().filter(|(_, holds)| measured && !holds).map(|(what, _)| format!("Not so: {what}"));
    for note in made.notes.iter().cloned().chain(fallen).chain(e.lacks(figures)) {
        let _ = writeln!(text, "<p class=\"small\">{}</p>", escape(&note));
    }
    let sources: Vec<String> = e.sources.iter().map(|source| format!("<li>{}</li>", escape(source))).collect();
    text + &format!("<ul class=\"small\">{}</ul></section>\n", sources.concat())
}

/// A cell with more characters is prose.
const LONG: usize = 45;

fn table(table: &Table) -> String {
    let cells = |row: &[String], tag: &str| -> String {
        let cell = |cell: &String| {
            let class = if cell.chars().count() > LONG { " class=\"say\"" } else { "" };
            format!("<{tag}{class}>{}</{tag}>", escape(cell))
        };
        row.iter().map(cell).collect()
    };
    let rows: Vec<String> = table.rows.iter().map(|row| format!("<tr>{}</tr>\n", cells(row, "td"))).collect();
    format!("<div class=\"wide\"><table><tr>{}</tr>\n{}</table></div>\n", cells(&table.head, "th"), rows.concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::{EXPERIMENTS, pages};
    use std::path::Path;

    #[test]
    fn the_page_is_whole_and_needs_no_other_file() {
        let figures = Figures::new("a <machine>".into(), "instructions");
        let page = html(&figures, &EXPERIMENTS);
        assert_eq!(page.matches("<section").count(), 11);
        assert_eq!(page.matches("<svg").count(), 10);
        assert!(page.contains("a &lt;machine&gt;") && page.contains("prefers-color-scheme:dark"));
        assert!(!page.contains("src=") && !page.contains("href=\"h"));
    }

    #[test]
    fn it_shows_beside_each_claim_a_plot_of_what_was_measured_and_each_figure_of_the_tables() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let figures = pages::read(root).unwrap();
        let page = html(&figures, &EXPERIMENTS);
        for e in EXPERIMENTS {
            let from = page.find(&format!("<section id=\"{}\">", e.name)).expect(e.name);
            let section = &page[from..from + page[from..].find("</section>").unwrap()];
            let at = |what: &str| section.find(what).unwrap_or_else(|| panic!("{}: no {what}", e.name));
            assert!(at(&escape(e.claim)) < at("<svg") && at("<svg") < at("<table"));
            let bars = (e.plot)(&figures).groups.iter().flat_map(|(_, values)| values).flatten().count();
            assert!(bars > 0 && section.matches("<rect").count() > bars, "{}: a bar is missing", e.name);
            for row in (e.table)(&figures).rows {
                row.iter().for_each(|cell| assert!(section.contains(&format!("<td>{}</td>", escape(cell)))));
            }
            assert!(section.contains((e.judge)(&figures).verdict.word()));
            assert!(page.contains(&format!("href=\"#{}\"", e.name)));
            e.sources.iter().for_each(|source| assert!(section.contains(&escape(source))));
        }
    }
}
