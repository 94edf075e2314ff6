//! `--report FILE.html`: one page that needs nothing else.

use super::Experiment;
use super::figures::Figures;
use super::plot::escape;
use super::text;

/// The page: for each experiment the claim, the plot beside it, the table, the verdict.
pub fn html(figures: &Figures, wanted: &[&Experiment]) -> String {
    let mut body = String::new();
    for e in wanted {
        let judgement = (e.judge)(figures);
        let class = match judgement.verdict {
            super::Verdict::Contradicted => "bad",
            super::Verdict::Holds => "good",
            _ => "part",
        };
        body += &format!(
            "<section id=\"{}\"><h2>{}</h2><div class=\"two\"><div><p><b>Claim.</b> {}</p><p><b>Condition.</b> {}</p>\
             <p><b>Mechanism.</b> {}</p><p><b>Experiment.</b> {}</p><p class=\"{class}\"><b>{}.</b> {}</p></div>\
             <div>{}</div></div><pre>{}</pre></section>\n",
            e.name,
            escape(e.title),
            escape(e.claim),
            escape(e.condition),
            escape(e.mechanism),
            escape(e.method),
            escape(judgement.verdict.word()),
            escape(&judgement.why),
            (e.plot)(figures).svg(),
            escape(&text::measured(figures, e)),
        );
    }
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>nvmx: the VM-exit lab</title>\n\
         <meta name=\"viewport\" content=\"width=device-width\"><meta name=\"color-scheme\" content=\"light dark\">\n<style>\n\
         body{{font:16px/1.5 sans-serif;max-width:1200px;margin:auto;padding:1em;background:#fff;color:#222}}\n\
         .two{{display:grid;grid-template-columns:1fr 1fr;gap:1em}}@media(max-width:800px){{.two{{display:block}}}}\n\
         pre{{overflow-x:auto;background:#f4f4f4;padding:1em;font-size:13px;line-height:1.3}}\n\
         .good{{border-left:4px solid #2a2;padding-left:.5em}}.part{{border-left:4px solid #c80;padding-left:.5em}}\n\
         .bad{{border-left:4px solid #c00;padding-left:.5em}}\n\
         @media(prefers-color-scheme:dark){{body{{background:#181818;color:#ddd}}pre{{background:#242424}}}}\n\
         </style></head><body>\n<h1>The VM-exit lab</h1>\n<p>Measured on {}. {}</p>\n{body}<section><h2>The model of cycles</h2><pre>{}</pre></section>\n</body></html>\n",
        escape(&figures.machine),
        escape(&text::cycles_note(figures)),
        escape(&text::constants()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_whole_and_needs_no_other_file() {
        let figures = Figures::new("a <machine>".into(), "instructions");
        let page = html(&figures, &super::super::EXPERIMENTS);
        assert_eq!(page.matches("<section").count(), 11);
        assert_eq!(page.matches("<svg").count(), 10);
        assert!(page.contains("a &lt;machine&gt;") && page.contains("prefers-color-scheme:dark"));
        assert!(!page.contains("src=") && !page.contains("href="));
    }
}
