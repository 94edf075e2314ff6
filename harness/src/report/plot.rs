//! Bars as SVG, readable in light and dark.

use crate::text::{escape, number};

/// How pages with such bars look.
pub const STYLE: &str = "\
    body{font:16px/1.5 sans-serif;max-width:1200px;margin:auto;padding:1em;background:#fff;color:#222}\n\
    .two{display:grid;grid-template-columns:1fr 1fr;gap:1.5em;align-items:start}.two p:first-child{margin-top:0}\n\
    @media(max-width:800px){.two{display:block}}\n\
    svg{width:100%;height:auto}\n\
    .wide{overflow-x:auto}table{border-collapse:collapse;font-size:14px;margin:1em 0}\n\
    th,td{padding:.2em .8em;text-align:right;white-space:nowrap}td.say{white-space:normal}\n\
    th{border-bottom:2px solid #888;vertical-align:bottom}td{border-bottom:1px solid #ddd}\n\
    th:first-child,td:first-child,th.say,td.say{text-align:left}\n\
    section{border-top:1px solid #ccc;margin-top:2em}ul.small,p.small{font-size:14px}\n\
    .good,.part,.bad{border-left:4px solid #2a2;padding-left:.5em}.part{border-color:#c80}.bad{border-color:#c00}\n\
    a{color:#25c}\n\
    @media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}td{border-color:#444}a{color:#8af}}\n";

/// Horizontal bars in groups.
#[derive(Clone, PartialEq, Debug)]
pub struct Plot {
    /// What the bars tell
    pub title: String,
    /// Whether ten times as much is one step
    pub log: bool,
    /// What the bars of a group are
    pub series: Vec<String>,
    /// Groups: a name, and a value for each series that has one
    pub groups: Vec<(String, Vec<Option<f64>>)>,
}

impl Plot {
    /// No bars yet.
    pub fn new(title: &str, log: bool, series: &[&str]) -> Self {
        let series = series.iter().map(|s| s.to_string()).collect();
        Plot { title: title.into(), log, series, groups: Vec::new() }
    }

    /// Adds a group.
    pub fn group(&mut self, name: &str, values: impl IntoIterator<Item = Option<f64>>) {
        self.groups.push((name.into(), values.into_iter().collect()));
    }

    /// The drawing.
    pub fn svg(&self) -> String {
        const LEFT: f64 = 200.0;
        const WIDTH: f64 = 420.0;
        const BAR: f64 = 18.0;
        let most = self.groups.iter().flat_map(|(_, v)| v).flatten().copied().fold(1.0, f64::max);
        let length = |value: f64| {
            let part = if self.log { (1.0 + value.max(0.0)).log10() / (1.0 + most).log10() } else { value / most };
            (part * WIDTH).max(0.0)
        };
        let mut body = String::new();
        let mut y = 30.0;
        for (name, values) in &self.groups {
            let middle = y + values.len() as f64 * BAR / 2.0 + 4.0;
            body += &format!(
                "<text class=\"t\" x=\"{}\" y=\"{middle:.0}\" text-anchor=\"end\">{}</text>\n",
                LEFT - 8.0,
                escape(name)
            );
            for (series, value) in values.iter().enumerate() {
                if let Some(value) = value {
                    let wide = length(*value);
                    body += &format!(
                        "<rect class=\"s{series}\" x=\"{LEFT}\" y=\"{y:.0}\" width=\"{:.1}\" height=\"{}\"/>\
                         <text class=\"v\" x=\"{:.1}\" y=\"{:.0}\">{}</text>\n",
                        wide.max(1.0),
                        BAR - 3.0,
                        LEFT + wide + 5.0,
                        y + 12.0,
                        number(Some(*value))
                    );
                }
                y += BAR;
            }
            y += 8.0;
        }
        for (i, name) in self.series.iter().enumerate() {
            let x = LEFT + 140.0 * i as f64;
            body += &format!(
                "<rect class=\"s{i}\" x=\"{x}\" y=\"{:.0}\" width=\"10\" height=\"10\"/><text class=\"v\" x=\"{}\" y=\"{:.0}\">{}</text>\n",
                y,
                x + 14.0,
                y + 10.0,
                escape(name)
            );
        }
        let scale = if self.log { " (logarithmic)" } else { "" };
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 720 {:.0}\" role=\"img\" font-family=\"sans-serif\">\n\
             <style>.t,.h{{font-size:14px;fill:#222}}.h{{font-weight:bold}}.v{{font-size:12px;fill:#444}}\
             .s0{{fill:#4c78a8}}.s1{{fill:#f58518}}.s2{{fill:#54a24b}}.s3{{fill:#b279a2}}.s4{{fill:#9d755d}}\
             @media (prefers-color-scheme:dark){{.t,.h{{fill:#ddd}}.v{{fill:#bbb}}}}</style>\n\
             <title>{1}{scale}</title>\n<text class=\"h\" x=\"8\" y=\"18\">{1}{scale}</text>\n{body}</svg>\n",
            y + 18.0,
            escape(&self.title)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_has_a_bar_for_each_value_and_no_markup_from_names() {
        let mut plot = Plot::new("a <b>", true, &["one", "two"]);
        plot.group("x & y", [Some(1.0), None]);
        plot.group("z", [Some(100.0), Some(0.0)]);
        let svg = plot.svg();
        assert_eq!(svg.matches("<rect").count(), 3 + 2);
        assert!(svg.contains("a &lt;b&gt; (logarithmic)") && svg.contains("x &amp; y"));
    }
}
