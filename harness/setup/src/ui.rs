//! What the user sees: steps with elapsed time on stderr, results and guests' lines on stdout.

use crate::output::Output;
use crate::proc;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use owo_colors::{OwoColorize, Style};
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// The terminal. Cheap to clone; all clones draw on the same screen.
#[derive(Clone)]
pub struct Ui {
    bars: MultiProgress,
    live: bool,
    colour: bool,
    /// Show nvmx's own log and the commands that run
    pub verbose: bool,
    /// What VMX refused is shown for programs
    pub json_refusals: bool,
    stdout: Arc<Stdout>,
}

/// What became of standard output.
#[derive(Default)]
struct Stdout {
    /// It belongs to a report: people read standard error
    reserved: AtomicBool,
    /// The first write that failed
    failed: OnceLock<String>,
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
            json_refusals: false,
            stdout: Arc::default(),
        }
    }

    /// Columns of the terminal that standard output is, if it is one.
    pub fn width(&self) -> Option<usize> {
        let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
        Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
    }

    /// A line of result, on stdout.
    pub fn line(&self, text: &str) {
        if self.stdout.reserved.load(Ordering::Relaxed) {
            return self.note(text);
        }
        self.bars.suspend(|| {
            let mut out = std::io::stdout().lock();
            // The work goes on, since it may have other results; in the end it counts.
            if let Err(error) = writeln!(out, "{text}").and_then(|()| out.flush()) {
                let _ = self.stdout.failed.set(error.to_string());
            }
        });
    }

    /// Keeps standard output free for a report, if it goes there: what else is to be read goes to standard error.
    pub fn reserve_stdout(&self, output: Option<&Output>) {
        if output.is_some_and(Output::is_stdout) {
            self.stdout.reserved.store(true, Ordering::Relaxed);
        }
    }

    /// Why standard output could not be written, if it could not.
    pub fn stdout_failure(&self) -> Option<&str> {
        self.stdout.failed.get().map(String::as_str)
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
