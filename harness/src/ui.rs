//! What the user sees: steps with elapsed time on stderr, results and guests' lines on stdout.

use crate::proc;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use owo_colors::{OwoColorize, Style};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// The terminal. Cheap to clone; all clones draw on the same screen.
#[derive(Clone)]
pub struct Ui {
    bars: MultiProgress,
    live: bool,
    colour: bool,
    /// Show nvmx's own log and the commands that run
    pub verbose: bool,
}

/// Plain lines remind the reader of a long step this often.
const REMINDER: Duration = Duration::from_secs(30);

impl Ui {
    /// Looks at the terminal: colour only on one, and never with `NO_COLOR`.
    pub fn new(verbose: bool) -> Self {
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        Ui {
            bars: MultiProgress::new(),
            live: std::io::stderr().is_terminal() && !dumb,
            colour: std::io::stdout().is_terminal() && !no_colour && !dumb,
            verbose,
        }
    }

    /// A line of result, on stdout.
    pub fn line(&self, text: &str) {
        self.bars.suspend(|| {
            let mut out = std::io::stdout().lock();
            // A closed pipe (`| head`) is no reason to fail the run.
            let _ = writeln!(out, "{text}").and_then(|()| out.flush());
        });
    }

    /// A remark, on stderr.
    pub fn note(&self, text: &str) {
        self.bars.suspend(|| {
            let _ = writeln!(std::io::stderr(), "{text}");
        });
    }

    /// A remark for `--verbose` only.
    pub fn detail(&self, text: &str) {
        if self.verbose {
            self.note(text);
        }
    }

    /// `text` in a style, if colour is wanted.
    pub fn paint(&self, text: &str, style: Style) -> String {
        if self.colour { text.style(style).to_string() } else { text.to_string() }
    }

    /// Starts a step that may take long.
    pub fn step(&self, what: &str) -> Step {
        let bar = self.live.then(|| {
            let bar = self.bars.add(ProgressBar::new_spinner());
            let style = ProgressStyle::with_template("{spinner} {prefix} [{elapsed}] {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.set_prefix(what.to_string());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            self.note(&format!("{what} ..."));
        }
        Step { ui: self.clone(), bar, what: what.to_string(), start: Instant::now(), reminded: Instant::now() }
    }
}

/// A step under way; gone from the screen when dropped.
pub struct Step {
    ui: Ui,
    bar: Option<ProgressBar>,
    what: String,
    start: Instant,
    reminded: Instant,
}

impl Step {
    /// Shows what the step is at.
    pub fn at(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.trim().to_string()),
            None if self.reminded.elapsed() > REMINDER && !proc::interrupted() => {
                self.reminded = Instant::now();
                self.ui.note(&format!("{} ... {} s: {}", self.what, self.start.elapsed().as_secs(), text.trim()));
            }
            None => {}
        }
    }

    /// Ends the step with a line that stays.
    pub fn done(self, text: &str) {
        let (ui, seconds) = (self.ui.clone(), self.start.elapsed().as_secs_f64());
        drop(self);
        ui.note(&format!("{text} ({seconds:.1} s)"));
    }

    /// Time since the step began.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
